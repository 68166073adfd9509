package service

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"cowherd/api"
)

// newClient is a client of d that ends with the test.
func newClient(t testing.TB, d *Daemon) *api.Client {
	c := api.NewClient(d.config.Control)
	t.Cleanup(c.Close)
	return c
}

func TestControl(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	c := newClient(t, d)
	ctx := t.Context()

	v, err := c.Version(ctx)
	if err != nil || v.Version != "test" || v.Engine != EngineScaled || len(v.NBD) != 1 || v.StateDir != d.state.path {
		t.Errorf("version: %+v, %v", v, err)
	}
	if list, err := c.Devices(ctx); err != nil || list == nil || len(list) != 0 {
		t.Errorf("devices: %v, %v; want an empty array", list, err)
	}
	made, err := c.Attach(ctx, api.AttachRequest{Name: "vm", Device: "mem:1M"})
	if err != nil || made.Name != "vm" || made.SizeBytes != 1<<20 || made.Device != "mem:1M" || made.Users == nil {
		t.Errorf("attach: %+v, %v", made, err)
	}
	taken, err := c.TakeSnapshot(ctx, api.SnapshotRequest{Name: "vm@a", ChunkBytes: 8192, MaxCOWBytes: 65536})
	if err != nil || taken.Name != "vm@a" || taken.Snapshot.ChunkBytes != 8192 || taken.Snapshot.TotalBytes != 65536 {
		t.Errorf("snapshot: %+v, %v", taken, err)
	}
	list, err := c.Devices(ctx)
	if err != nil || len(list) != 2 || list[0].Name != "vm" || list[1].Name != "vm@a" ||
		!slices.Equal(list[0].Snapshots, []string{"vm@a"}) {
		t.Errorf("devices: %+v, %v", list, err)
	}
	one, err := c.Device(ctx, "vm@a")
	if err != nil || one.Snapshot.Origin != "vm" || one.State != api.StateValid {
		t.Errorf("device: %+v, %v", one, err)
	}
	user := mustDialNBD(t, d, "vm@a")
	user.read(t, 0, 8192)
	one, err = c.Device(ctx, "vm@a")
	if err != nil || len(one.Users) != 1 || one.Users[0].Commands["read"].Bytes != 8192 {
		t.Errorf("device in use: %+v, %v", one.Users, err)
	}
	err = c.RemoveSnapshot(ctx, "vm@a", false)
	wantErrno(t, err, syscall.EBUSY, "in use by")
	if err := c.RemoveSnapshot(ctx, "vm@a", true); err != nil {
		t.Error(err)
	}
	if err := c.Detach(ctx, "vm"); err != nil {
		t.Error(err)
	}
	_, err = c.Device(ctx, "vm")
	wantErrno(t, err, syscall.ENOENT, `no device "vm"`)
}

// TestControlRefuses sends what the client never would.
func TestControlRefuses(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", d.config.Control)
	}}
	defer transport.CloseIdleConnections()
	client := http.Client{Transport: transport}
	for _, test := range []struct {
		method, path, kind, body string
		status                   int
		errno, text              string
	}{
		{"POST", "/v1/devices", "application/json", `{"name":"vm","device":"mem:1M","colour":1}`, 400, "EINVAL", "colour"},
		{"POST", "/v1/devices", "application/json", `{"name":"vm","device":"mem:1M"} {}`, 400, "EINVAL", "more than one"},
		{"POST", "/v1/devices", "application/json", `{"name":5}`, 400, "EINVAL", "name"},
		{"POST", "/v1/devices", "application/json", ``, 400, "EINVAL", "EOF"},
		{"POST", "/v1/devices", "application/json", `{`, 400, "EINVAL", "EOF"},
		{"POST", "/v1/devices", "text/plain", `{"name":"vm","device":"mem:1M"}`, 400, "EINVAL", "application/json"},
		{"POST", "/v1/devices", "application/json", `"` + strings.Repeat("x", api.BodyMax), 413, "EMSGSIZE", "65536"},
		{"POST", "/v1/snapshots", "application/json", `{"name":"vm@a","chunk_bytes":1.5}`, 400, "EINVAL", "chunk_bytes"},
		{"POST", "/v1/snapshots", "application/json", `{"name":"vm@a"}`, 404, "ENOENT", "vm"},
		{"PUT", "/v1/snapshots/vm@a/size", "application/json", `{"size_bytes":"1M"}`, 400, "EINVAL", "size_bytes"},
		{"PUT", "/v1/snapshots/vm@a/size", "application/json", `{"size_bytes":1}`, 404, "ENOENT", "vm"},
		{"PUT", "/v1/snapshots/vm@a/merge", "application/json", `{"running":1}`, 400, "EINVAL", "running"},
		{"PUT", "/v1/snapshots/vm@a/merge", "application/json", `{"running":true}`, 404, "ENOENT", "vm"},
		{"POST", "/v1/snapshots", "application/json", `{"name":"vm@a","warn_at":[200]}`, 400, "EINVAL", "200%"},
		{"DELETE", "/v1/snapshots/vm@a?force=perhaps", "", "", 400, "EINVAL", "force"},
		{"DELETE", "/v1/devices/vm/source", "", "", 404, "ENOENT", "vm"},
		{"DELETE", "/v1/devices/vm", "", "", 404, "ENOENT", "vm"},
		{"GET", "/v1/devices/..%2f..", "", "", 404, "ENOENT", ""},
		{"PUT", "/v1/devices", "", "", 404, "ENOENT", "PUT /v1/devices"},
		{"GET", "/", "", "", 404, "ENOENT", "GET /"},
		{"GET", "/v1/events?since=x", "", "", 400, "EINVAL", "since"},
		{"GET", "/v1/events?since=-1", "", "", 400, "EINVAL", "since"},
		{"GET", "/v1/events?since=1", "", "", 400, "EINVAL", "no event 1"},
		{"GET", "/v1/events?follow=2", "", "", 400, "EINVAL", "follow"},
	} {
		body := strings.NewReader(test.body)
		r, err := http.NewRequestWithContext(t.Context(), test.method, "http://cowherd"+test.path, body)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Content-Type", test.kind)
		answer, err := client.Do(r)
		if err != nil {
			t.Fatalf("%s %s: %v", test.method, test.path, err)
		}
		text, err := io.ReadAll(answer.Body)
		if err := errors.Join(err, answer.Body.Close()); err != nil {
			t.Error(err)
		}
		var e struct{ Error, Errno string }
		if err := json.Unmarshal(text, &e); err != nil || answer.StatusCode != test.status || e.Errno != test.errno ||
			!strings.Contains(e.Error, test.text) {
			t.Errorf("%s %s %.50s: %d %s; want %d, %s and %q", test.method, test.path, test.body, answer.StatusCode, text,
				test.status, test.errno, test.text)
		}
	}
	if len(d.Devices()) != 0 {
		t.Error("something was made")
	}
}

// collect reads events until want of them are there.
func collect(t *testing.T, c *api.Client, q api.EventsQuery, want int) []api.Event {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var events []api.Event
	for e, err := range c.Events(ctx, q) {
		if err != nil {
			t.Fatalf("after %d events: %v", len(events), err)
		}
		if events = append(events, e); len(events) == want {
			break
		}
	}
	return events
}

func TestEventStream(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	c := newClient(t, d)
	attach(t, d, "a", "mem:1M")
	attach(t, d, "b", "mem:1M")
	all := collect(t, c, api.EventsQuery{}, -1)
	if len(all) != 2 || all[0].Seq != 1 || all[0].Name != "a" || all[1].Type != api.EventDeviceAttached {
		t.Errorf("all: %+v", all)
	}
	since := uint64(1)
	if got := collect(t, c, api.EventsQuery{Since: &since}, -1); len(got) != 1 || got[0].Seq != 2 {
		t.Errorf("since 1: %+v", got)
	}
	if got := collect(t, c, api.EventsQuery{Since: &since, Follow: true}, 1); len(got) != 1 || got[0].Seq != 2 {
		t.Errorf("since 1, followed: %+v", got)
	}
	since = 3
	for _, err := range c.Events(t.Context(), api.EventsQuery{Since: &since}) {
		wantErrno(t, err, syscall.EINVAL, "no event 3")
	}
	since = 0
	publishMany(d.bus, eventsKept)
	got := collect(t, c, api.EventsQuery{Since: &since}, -1)
	if len(got) != eventsKept+1 || got[0].Type != api.EventMissed || got[0].Missed != 2 || got[1].Seq != 3 {
		t.Errorf("%d events, the first %+v", len(got), got[0])
	}
}

// TestFollow: events arrive as they happen, and the stream ends with the daemon.
func TestFollow(t *testing.T) {
	d, err := New(testConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	d.Serve()
	attach(t, d, "a", "mem:1M")
	conn, err := net.Dial("unix", d.config.Control)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	answer, err := http.ReadResponse(bufio.NewReader(conn), nil) // the header comes at once
	if err != nil {
		t.Fatal(err)
	}
	attach(t, d, "b", "mem:1M")
	lines := bufio.NewScanner(answer.Body)
	if !lines.Scan() || !strings.Contains(lines.Text(), `"seq":2`) || !strings.Contains(lines.Text(), `"name":"b"`) {
		t.Errorf("got %q, %v", lines.Text(), lines.Err())
	}
	if err := d.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	for lines.Scan() {
		t.Logf("at the end: %s", lines.Text())
	}
	if err := lines.Err(); err != nil {
		t.Errorf("the stream does not end well: %v", err)
	}
}

func TestStreamsLimit(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	for range streamsMax {
		d.control.streams <- struct{}{}
	}
	for _, err := range newClient(t, d).Events(t.Context(), api.EventsQuery{Follow: true}) {
		wantErrno(t, err, syscall.EAGAIN, "64 event streams")
	}
}

// TestLimitListener: one connection too many waits until another has gone, and Close ends the wait.
func TestLimitListener(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &limitListener{Listener: inner, slots: make(chan struct{}, 1), closed: make(chan struct{})}
	var clients [2]net.Conn
	for i := range clients {
		if clients[i], err = net.Dial("tcp", inner.Addr().String()); err != nil {
			t.Fatal(err)
		}
		defer clients[i].Close()
	}
	first, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan net.Conn)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- c
		}
	}()
	select {
	case <-accepted:
		t.Error("two connections at a time")
	case <-time.After(20 * time.Millisecond):
	}
	if err := errors.Join(first.Close(), first.Close()); err == nil {
		t.Error("the second Close of a connection succeeds")
	}
	second := <-accepted
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, ok := <-accepted; ok {
		t.Error("a connection was accepted after Close")
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
}
