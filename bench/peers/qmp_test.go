package main

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
)

// monitor answers each line that comes to a socket with the next of its answers, after a greeting, and then hangs up.
func monitor(t *testing.T, answers ...string) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, "{\"QMP\": {}}\n")
		lines := bufio.NewScanner(conn)
		for _, answer := range append([]string{"{\"return\": {}}"}, answers...) {
			if !lines.Scan() {
				return
			}
			_, _ = io.WriteString(conn, strings.TrimSuffix(answer, "\n")+"\n")
		}
	}()
	t.Cleanup(func() {
		_ = listener.Close()
		<-done
	})
	return socket
}

func TestQMP(t *testing.T) {
	const (
		ok        = "{\"return\": {}}\n"
		other     = `{"event": "BLOCK_JOB_COMPLETED", "data": {"device": "other", "error": "no matter"}}` + "\n"
		completed = `{"event": "BLOCK_JOB_COMPLETED", "data": {"device": "h", "len": 7}}` + "\n"
		failed    = `{"event": "BLOCK_JOB_COMPLETED", "data": {"device": "h", "error": "no room"}}` + "\n"
		cancelled = `{"event": "BLOCK_JOB_CANCELLED", "data": {"device": "h"}}` + "\n"
	)
	tests := []struct{ name, answer, want string }{
		{"ends later", ok + other + completed, ""},
		{"ends before the answer", other + completed + ok, ""},
		{"fails", ok + failed, "no room"},
		{"is cancelled", ok + cancelled, "CANCELLED"},
		{"is refused", `{"error": {"class": "GenericError", "desc": "no such node"}}`, "no such node"},
		{"never ends", ok, "ended"},
		{"nonsense", "{", "monitor"},
	}
	for _, test := range tests {
		q, err := openQMP(t.Context(), monitor(t, test.answer))
		if err != nil {
			t.Fatal(err)
		}
		if err = q.execute(t.Context(), "block-stream", map[string]string{"job-id": "h"}); err == nil {
			err = q.jobEnded(t.Context(), "h")
		}
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
		_ = q.close()
	}
}

func TestQMPInterrupted(t *testing.T) {
	q, err := openQMP(t.Context(), monitor(t, `{"return": {}}`, "never sent"))
	if err != nil {
		t.Fatal(err)
	}
	if err := q.execute(t.Context(), "block-stream", nil); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := q.jobEnded(ctx, "h"); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
