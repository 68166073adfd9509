package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestErrno: every errno survives the way over the wire by its name.
func TestErrno(t *testing.T) {
	for errno := syscall.Errno(1); errno < errnoMax; errno++ {
		name := errnoName(errno)
		if got := errnoNamed(name); errnoName(got) != name {
			t.Errorf("%d (%s) comes back as %d", errno, name, got)
		}
		if s := Status(errno); s < 400 || s > 599 {
			t.Errorf("%s: status %d", name, s)
		}
	}
	if errnoName(9999) != "EIO" || errnoNamed("ENOSUCH") != syscall.EIO || errnoNamed("") != syscall.EIO {
		t.Error("what is unknown is not EIO")
	}
}

func TestAsError(t *testing.T) {
	for _, test := range []struct {
		err  error
		want syscall.Errno
	}{
		{errors.New("x"), syscall.EIO},
		{fmt.Errorf("x: %w", syscall.ENOSPC), syscall.ENOSPC},
		{fmt.Errorf("x: %w", context.DeadlineExceeded), syscall.ETIMEDOUT},
		{fmt.Errorf("x: %w", context.Canceled), syscall.ECANCELED},
		{fmt.Errorf("x: %w", Errorf(syscall.EBUSY, "y %d", 1)), syscall.EBUSY},
		{errors.Join(Errorf(syscall.EBUSY, "y"), syscall.EIO), syscall.EBUSY},
	} {
		e := AsError(test.err)
		if e.Errno != test.want || e.Message != test.err.Error() || !errors.Is(e, test.want) {
			t.Errorf("%v: %v, %q", test.err, e.Errno, e.Message)
		}
	}
}

// serve answers every request on a unix socket by h.
func serve(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(h)
	if err := server.Listener.Close(); err != nil {
		t.Fatal(err)
	}
	server.Listener = l
	server.Start()
	c := NewClient(path)
	t.Cleanup(func() {
		c.Close()
		server.Close()
	})
	return c
}

func TestClientErrors(t *testing.T) {
	for _, test := range []struct {
		name    string
		status  int
		body    string
		isError bool // an *Error
		text    string
	}{
		{"an error", 409, `{"error":"it is in use","errno":"EBUSY"}`, true, "it is in use"},
		{"an unknown errno", 500, `{"error":"strange","errno":"EWHAT"}`, true, "strange"},
		{"not our error", 502, `<html>no`, false, "502 Bad Gateway: <html>no"},
		{"an empty error", 500, `{}`, false, "500"},
		{"no JSON", 200, `hello`, false, "answer of the daemon"},
		{"cut off", 200, `{"name":`, false, "unexpected EOF"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(test.status)
				_, _ = io.WriteString(w, test.body)
			})
			_, err := c.Device(t.Context(), "vm")
			if err == nil || errors.As(err, new(*Error)) != test.isError || !strings.Contains(err.Error(), test.text) {
				t.Errorf("got %v, want %q", err, test.text)
			}
		})
	}
}

func TestClientPaths(t *testing.T) {
	var asked []string
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.Method+" "+r.URL.Path+" "+r.URL.RawQuery)
		if r.Method == http.MethodPost {
			var any map[string]any
			if err := ReadJSON(w, r, &any, BodyMax); err != nil {
				t.Error(err)
			}
			_ = WriteJSON(w, http.StatusCreated, any)
			return
		}
		if r.Method == http.MethodDelete {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		_ = WriteJSON(w, http.StatusOK, struct{}{})
	})
	ctx := t.Context()
	_, err1 := c.Version(ctx)
	_, err2 := c.Devices(ctx)
	_, err3 := c.Device(ctx, "a/b@c d")
	made, err4 := c.Attach(ctx, AttachRequest{Name: "vm", Device: "mem:1M"})
	_, err5 := c.TakeSnapshot(ctx, SnapshotRequest{Name: "vm@a"})
	err := errors.Join(err1, err2, err3, err4, err5, c.Detach(ctx, "vm"), c.RemoveSnapshot(ctx, "vm@a", false),
		c.RemoveSnapshot(ctx, "vm@a", true))
	if _, err6 := c.DetachSource(ctx, "web"); err == nil {
		err = err6
	}
	if err != nil || made.Name != "vm" {
		t.Errorf("%+v, %v", made, err)
	}
	want := []string{
		"GET /v1/version ", "GET /v1/devices ", "GET /v1/devices/a/b@c d ", "POST /v1/devices ", "POST /v1/snapshots ",
		"DELETE /v1/devices/vm ", "DELETE /v1/snapshots/vm@a ", "DELETE /v1/snapshots/vm@a force=true",
		"DELETE /v1/devices/web/source ",
	}
	if strings.Join(asked, "\n") != strings.Join(want, "\n") {
		t.Errorf("asked for %q, want %q", asked, want)
	}
}

func TestClientEvents(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if got := r.URL.RawQuery; got != "follow=false&since=5" {
			t.Errorf("query %q", got)
		}
		_, _ = io.WriteString(w, "{\"seq\":6,\"type\":\"x\",\"new\":1}\n{\"seq\":7}\nnonsense\n")
	})
	since, last := uint64(5), uint64(5)
	var failed error
	for e, err := range c.Events(t.Context(), EventsQuery{Since: &since}) {
		if err != nil {
			failed = err
			continue
		}
		if last++; e.Seq != last {
			t.Errorf("event %d, want %d", e.Seq, last)
		}
	}
	if last != 7 || failed == nil {
		t.Errorf("last event %d, then %v", last, failed)
	}
}

func TestNoDaemon(t *testing.T) {
	dir := t.TempDir()
	c := NewClient(filepath.Join(dir, "none"))
	if _, err := c.Version(t.Context()); err == nil || !strings.Contains(err.Error(), `is "cowherd serve" running?`) ||
		!errors.Is(err, syscall.ENOENT) {
		t.Errorf("no socket: %v", err)
	}
	path := filepath.Join(dir, "dead")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := NewClient(path).Version(t.Context()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a dead socket: %v", err)
	}
	silent := serve(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := silent.Version(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
}

// FuzzReadJSON: whatever comes as a body is either taken or refused with an errno of its own.
func FuzzReadJSON(f *testing.F) {
	for _, s := range []string{`{"name":"vm","device":"mem:1M"}`, `{"name":1}`, `{} {}`, `[`, "\x00", ``} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(s))
		r.Header.Set("Content-Type", "application/json")
		var body SnapshotRequest
		err := ReadJSON(httptest.NewRecorder(), r, &body, BodyMax)
		if err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.EMSGSIZE) {
			t.Fatalf("%q: %v", s, err)
		}
	})
}
