package conformance

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cowherd/api"
)

// endLimit is how long a daemon may take to end.
const endLimit = 40 * time.Second

// daemon is a directory and the daemon that runs in it, or does not.
type daemon struct {
	t                      testing.TB
	dir                    string // short enough for sockets
	control, socket, state string
	api                    *api.Client

	cmd    *exec.Cmd
	log    *lockedBuffer
	exited chan struct{} // closed when the process has been waited for; nil: it was not started
}

// lockedBuffer is what a process writes, to be read meanwhile.
type lockedBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer // +checklocks:mu
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// shortDir is a new directory whose path leaves room for the name of a socket (a path of one has at most 107 bytes).
func shortDir(t testing.TB) string {
	t.Helper()
	parent := os.TempDir()
	if len(parent) > 60 {
		parent = "/tmp"
	}
	dir, err := os.MkdirTemp(parent, "cowherd-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// prepare makes the directory of a daemon. What is started in it ends with the test, and is looked at then.
func prepare(t testing.TB) *daemon {
	t.Helper()
	d := &daemon{t: t, dir: shortDir(t)}
	d.control = filepath.Join(d.dir, "run", "control.sock")
	d.socket = filepath.Join(d.dir, "run", "nbd.sock")
	d.state = filepath.Join(d.dir, "state")
	d.api = api.NewClient(d.control)
	t.Cleanup(func() {
		if d.running() {
			d.stop()
		}
		d.api.Close()
		if t.Failed() && d.log != nil {
			text := d.log.String()
			t.Logf("the end of the daemon's log:\n%s", text[max(0, len(text)-3000):])
		}
	})
	return d
}

// startDaemon starts a daemon that ends with the test. flags are added to those that say where it lives.
func startDaemon(t testing.TB, flags ...string) *daemon {
	t.Helper()
	d := prepare(t)
	d.start(flags...)
	return d
}

// command is a daemon to be started.
func (d *daemon) command(flags ...string) *exec.Cmd {
	d.t.Helper()
	args := append([]string{"serve", "--control", d.control, "--nbd", "unix:" + d.socket, "--state", d.state}, flags...)
	return exec.Command(program(d.t), args...)
}

// start starts the daemon and waits until it says that it is ready.
func (d *daemon) start(flags ...string) {
	d.t.Helper()
	d.launch(d.command(append(flags, "--ready-fd", "3")...))
}

// launch starts cmd, which is a daemon that writes to descriptor 3 when it is ready.
func (d *daemon) launch(cmd *exec.Cmd) {
	d.t.Helper()
	ready, theirs, err := os.Pipe()
	if err != nil {
		d.t.Fatal(err)
	}
	defer ready.Close()
	cmd.ExtraFiles = append([]*os.File{theirs}, cmd.ExtraFiles...)
	d.spawn(cmd)
	_ = theirs.Close()
	d.awaitReady(ready)
}

// awaitReady waits until the daemon writes to ready that it is ready.
func (d *daemon) awaitReady(ready *os.File) {
	d.t.Helper()
	if line, err := bufio.NewReader(ready).ReadString('\n'); err != nil || line != "ready\n" {
		d.t.Fatalf("the daemon says %q instead of ready: %v\n%s", line, err, d.log)
	}
}

// spawn starts cmd as the daemon's process, without waiting for anything.
func (d *daemon) spawn(cmd *exec.Cmd) {
	d.t.Helper()
	d.log, d.exited, d.cmd = &lockedBuffer{}, make(chan struct{}), cmd
	cmd.Stderr = d.log
	// Should the test be killed, so is the daemon.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		d.exited = nil
		d.t.Fatal(err)
	}
	exited := d.exited
	go func() {
		defer close(exited)
		_ = cmd.Wait() // ProcessState has what it says
	}()
}

// running tells whether there is a process.
func (d *daemon) running() bool {
	if d.exited == nil {
		return false
	}
	select {
	case <-d.exited:
		return false
	default:
		return true
	}
}

// signal sends the daemon a signal.
func (d *daemon) signal(sig syscall.Signal) {
	d.t.Helper()
	if err := d.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		d.t.Errorf("signal %v: %v", sig, err)
	}
}

// wait waits for the daemon's end and returns its exit status; -1 when a signal ended it.
func (d *daemon) wait() int {
	d.t.Helper()
	select {
	case <-d.exited:
	case <-time.After(endLimit):
		d.t.Errorf("the daemon does not end:\n%s", d.log)
		d.signal(syscall.SIGKILL)
		<-d.exited
	}
	return d.cmd.ProcessState.ExitCode()
}

// stop ends the daemon and checks that it ended well and left nothing.
func (d *daemon) stop() {
	d.t.Helper()
	d.signal(syscall.SIGTERM)
	if status := d.wait(); status != 0 {
		d.t.Errorf("the daemon's exit status is %d", status)
	}
	d.checkLog()
	d.checkLeft()
}

// checkLog looks for what must never be in a log.
func (d *daemon) checkLog() {
	d.t.Helper()
	for _, bad := range []string{"panic", "DATA RACE", "fatal error", "level=ERROR"} {
		if strings.Contains(d.log.String(), bad) {
			d.t.Errorf("the daemon's log has %q:\n%s", bad, d.log)
		}
	}
}

// checkLeft looks for what an ended daemon has left behind.
func (d *daemon) checkLeft() {
	d.t.Helper()
	for dir, want := range map[string]string{filepath.Dir(d.socket): "[]", d.state: "[lock state.json]"} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			d.t.Error(err)
		}
		names := []string{}
		for _, e := range entries {
			names = append(names, e.Name())
		}
		// A daemon that had nothing attached has no state file.
		if got := fmt.Sprint(names); err == nil && got != want && (dir != d.state || got != "[lock]") {
			d.t.Errorf("left behind in %s: %s, want %s", dir, got, want)
		}
	}
}

// uri is an export on the daemon's unix socket.
func (d *daemon) uri(export string) string { return "nbd+unix:///" + export + "?socket=" + d.socket }

// result is what became of a command line.
type result struct {
	stdout, stderr string
	status         int
}

// try runs a command of cowherd.
func (d *daemon) try(args ...string) result {
	d.t.Helper()
	return runProgram(d.t, nil, program(d.t), append([]string{"--control", d.control}, args...)...)
}

// do runs a command of cowherd that must succeed, and returns what it prints.
func (d *daemon) do(args ...string) string {
	d.t.Helper()
	r := d.try(args...)
	if r.status != 0 {
		d.t.Fatalf("cowherd %s: status %d\n%s", strings.Join(args, " "), r.status, r.stderr)
	}
	return r.stdout
}

// drop removes a snapshot whose last client may not have been counted off yet.
func (d *daemon) drop(name string) {
	d.t.Helper()
	for deadline := time.Now().Add(endLimit); ; time.Sleep(2 * time.Millisecond) {
		r := d.try("rm", name)
		if r.status == 0 {
			return
		}
		if !strings.Contains(r.stderr, "in use by") || time.Now().After(deadline) {
			d.t.Fatalf("cowherd rm %s: status %d\n%s", name, r.status, r.stderr)
		}
	}
}

// refused runs a command of cowherd that must fail and say why, with all of these texts.
func (d *daemon) refused(args []string, texts ...string) {
	d.t.Helper()
	r := d.try(args...)
	for _, text := range texts {
		if r.status != 1 || !strings.Contains(r.stderr, text) || r.stdout != "" {
			d.t.Errorf("cowherd %s: status %d, %q, want status 1 and %q; it prints %q", strings.Join(args, " "), r.status,
				r.stderr, text, r.stdout)
		}
	}
}

// status is the state of a device, by the command line.
func (d *daemon) status(name string) api.Device {
	d.t.Helper()
	var x api.Device
	if err := json.Unmarshal([]byte(d.do("status", "--json", name)), &x); err != nil {
		d.t.Fatal(err)
	}
	return x
}

// runProgram runs a program to its end. env is added to the environment.
func runProgram(t testing.TB, env []string, name string, args ...string) result {
	t.Helper()
	r, err := tryProgram(env, name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// tryProgram is runProgram for any goroutine. An error means that the program did not run to its end.
func tryProgram(env []string, name string, args ...string) (result, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.WaitDelay = time.Second // for what a killed program's children keep open
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if err != nil && !errors.As(err, new(*exec.ExitError)) {
		return result{}, fmt.Errorf("%s: %w", name, err)
	}
	if ctx.Err() != nil {
		return result{}, fmt.Errorf("%s %s takes longer than %v\n%s%s", name, strings.Join(args, " "), commandLimit, &stdout,
			&stderr)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}, nil
}
