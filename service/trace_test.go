package service

import (
	"context"
	"syscall"
	"testing"
	"time"

	"cowherd/api"
)

// TestTrace follows a device that has a snapshot through the control API.
func TestTrace(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	attach(t, d, "vm", image(t, imageBytes))
	take(t, d, api.SnapshotRequest{Name: "vm@a", Store: "mem"})
	client := newClient(t, d)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var requests []*api.TraceRequest
	var last *api.TraceSummary
	for line, err := range client.Trace(ctx, "vm", api.TraceQuery{Every: 100 * time.Millisecond, Requests: true}) {
		if err != nil {
			if ctx.Err() == nil {
				t.Fatal(err)
			}
			break
		}
		if r := line.Request; r != nil && r.Op != "read" && r.Op != "flush" {
			requests = append(requests, r)
		}
		if line.Summary == nil {
			continue
		}
		if last == nil {
			_, err := first(client.Trace(ctx, "vm", api.TraceQuery{}))
			wantErrno(t, err, syscall.EBUSY, "traced already")
			put(t, d, "vm", 3, pattern(1, 1))
			put(t, d, "vm", 3, pattern(1, 2))
		}
		if last = line.Summary; len(requests) == 3 {
			cancel()
		}
	}
	copies, writes := 0, 0
	for _, r := range requests {
		switch {
		case r.Op == "copy" && r.Class == "cow" && r.Length == 4096:
			copies++
		case r.Op == "write" && r.Offset == 3*4096 && r.TotalUS > 0 && r.CPU >= 0:
			writes++
		default:
			t.Errorf("%+v", r)
		}
	}
	if copies != 1 || writes != 2 {
		t.Errorf("%d copies and %d writes were seen, want 1 and 2", copies, writes)
	}
	if len(last.CPUs) == 0 || len(last.Queues) == 0 || len(last.Flows) == 0 || last.Dropped > 0 {
		t.Errorf("summary %+v", last)
	}
	// When one trace is over there may be another, which has an end of its own.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		line, err := first(client.Trace(t.Context(), "vm@a", api.TraceQuery{For: time.Millisecond}))
		if err == nil {
			if line.Summary == nil || !line.Summary.Last {
				t.Errorf("the only line is %+v", line)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// first is the first of what a trace tells.
func first(lines func(func(api.TraceLine, error) bool)) (line api.TraceLine, err error) {
	lines(func(l api.TraceLine, e error) bool {
		line, err = l, e
		return false
	})
	return line, err
}

func TestTraceRefused(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	attach(t, d, "vm", image(t, imageBytes))
	client := newClient(t, d)
	for _, test := range []struct {
		name  string
		query api.TraceQuery
		errno syscall.Errno
		text  string
	}{
		{"nope", api.TraceQuery{}, syscall.ENOENT, `"nope"`},
		{"vm", api.TraceQuery{Every: time.Millisecond}, syscall.EINVAL, "100ms"},
		{"vm", api.TraceQuery{For: -1}, syscall.EINVAL, "for="},
	} {
		_, err := first(client.Trace(t.Context(), test.name, test.query))
		wantErrno(t, err, test.errno, test.text)
	}
}
