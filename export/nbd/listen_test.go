package nbd

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

const listenChild = "NBD_LISTEN_CHILD"

// TestListenersChild is the child of TestListeners: it has a socket passed and serves one connection.
func TestListenersChild(t *testing.T) {
	if os.Getenv(listenChild) == "" {
		t.Skip("only as a child of TestListeners")
	}
	t.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid())) // which the parent could not know
	listeners, err := Listeners()
	if err != nil || len(listeners) != 1 {
		t.Fatalf("%v, %v", listeners, err)
	}
	if os.Getenv("LISTEN_FDS") != "" || os.Getenv("LISTEN_PID") != "" {
		t.Error("the environment still tells of the sockets")
	}
	c, err := listeners[0].Accept()
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(c, "hello")
	c.Close()
	listeners[0].Close()
}

func TestListeners(t *testing.T) {
	path := socketPath(t)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	f, err := l.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command(os.Args[0], "-test.run=^TestListenersChild$")
	cmd.Env = append(os.Environ(), listenChild+"=1", "LISTEN_FDS=1")
	cmd.ExtraFiles = []*os.File{f}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	got := string(newClient(t, c).receive(5))
	if err := cmd.Wait(); err != nil || got != "hello" {
		t.Errorf("%q, %v\n%s", got, err, out.String())
	}
}

func TestListenersNone(t *testing.T) {
	for _, tc := range []struct {
		pid, fds string
		ok       bool
	}{
		{"", "", true}, {"1", "1", true}, {"me", "1", true},
		{strconv.Itoa(os.Getpid()), "0", true}, {strconv.Itoa(os.Getpid()), "-1", false},
		{strconv.Itoa(os.Getpid()), "x", false}, {strconv.Itoa(os.Getpid()), "1000000", false},
	} {
		t.Setenv("LISTEN_PID", tc.pid)
		t.Setenv("LISTEN_FDS", tc.fds)
		l, err := Listeners()
		if len(l) != 0 || (err == nil) != tc.ok {
			t.Errorf("%+v: %v, %v", tc, l, err)
		}
		if _, ok := os.LookupEnv("LISTEN_FDS"); ok {
			t.Errorf("%+v: LISTEN_FDS is still set", tc)
		}
	}
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	// The descriptor is closed by listenersFrom; f must not close it once more.
	fd, err := dupOf(f)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := listenersFrom(fd, 1); err == nil {
		t.Error("a file taken for a socket")
	}
}
