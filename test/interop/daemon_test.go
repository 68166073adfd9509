//go:build interop

package interop

import (
	"bufio"
	"bytes"
	"context"
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
	"cowherd/backend/nbd"
	"cowherd/block"
)

const (
	// commandLimit bounds a command of cowherd, endLimit the end of a daemon.
	commandLimit = 100 * time.Second
	endLimit     = 40 * time.Second
)

// build builds cowherd once.
var build = sync.OnceValues(func() (path string, err error) {
	path = filepath.Join(programDir, "cowherd")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", path, "./cmd/cowherd")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

// cowherd runs the program, which must succeed, and returns what it prints.
func cowherd(t *testing.T, args ...string) string {
	t.Helper()
	status, stdout, stderr := tryCowherd(t, args...)
	if status != 0 {
		t.Fatalf("cowherd %s: status %d\n%s%s", strings.Join(args, " "), status, stdout, stderr)
	}
	return stdout
}

// tryCowherd runs the program.
func tryCowherd(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	path, err := build()
	if err == nil {
		status, stdout, stderr, err = runProgram(commandLimit, path, args...)
	}
	if err != nil {
		t.Fatal(err)
	}
	return status, stdout, stderr
}

// daemon is a directory and the daemon that runs in it, or does not.
type daemon struct {
	t       *testing.T
	dir     string
	control string
	socket  string
	api     *api.Client
	cmd     *exec.Cmd // nil: it does not run
	log     *bytes.Buffer
}

// newDaemon makes the directory of a daemon that ends with the test at the latest.
func newDaemon(t *testing.T) *daemon {
	t.Helper()
	dir, err := os.MkdirTemp("", "cowherd-") // short: the path of a socket has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{t: t, dir: dir, control: filepath.Join(dir, "control.sock"), socket: filepath.Join(dir, "nbd.sock")}
	d.api = api.NewClient(d.control)
	t.Cleanup(func() {
		d.kill()
		d.api.Close()
		if t.Failed() && d.log != nil {
			t.Logf("the daemon's log:\n%s", d.log)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return d
}

// start starts the daemon and waits until it is ready. flags are added to those that say where it lives.
func (d *daemon) start(flags ...string) {
	d.t.Helper()
	path, err := build()
	if err != nil {
		d.t.Fatal(err)
	}
	ready, theirs, err := os.Pipe()
	if err != nil {
		d.t.Fatal(err)
	}
	defer ready.Close()
	d.log = &bytes.Buffer{}
	d.cmd = exec.Command(path, append([]string{"serve", "--control", d.control, "--nbd", "unix:" + d.socket,
		"--state", filepath.Join(d.dir, "state"), "--ready-fd", "3"}, flags...)...)
	d.cmd.ExtraFiles, d.cmd.Stderr = []*os.File{theirs}, d.log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err = d.cmd.Start()
	_ = theirs.Close()
	if err != nil {
		d.cmd = nil
		d.t.Fatal(err)
	}
	if line, err := bufio.NewReader(ready).ReadString('\n'); err != nil || line != "ready\n" {
		d.kill()
		d.t.Fatalf("the daemon says %q instead of ready: %v", line, err)
	}
}

// kill ends the daemon as a power failure would, but for what the kernel holds in its page cache.
func (d *daemon) kill() {
	d.t.Helper()
	if d.cmd == nil {
		return
	}
	_ = d.cmd.Process.Kill()
	_ = d.cmd.Wait() // killed is how it ends
	d.cmd = nil
}

// stop ends the daemon in good order.
func (d *daemon) stop() {
	d.t.Helper()
	late := time.AfterFunc(endLimit, func() { _ = d.cmd.Process.Kill() })
	defer late.Stop()
	_ = d.cmd.Process.Signal(syscall.SIGTERM)
	if err := d.cmd.Wait(); err != nil {
		d.t.Errorf("the daemon's end: %v", err)
	}
	d.cmd = nil
	for _, bad := range []string{"panic", "fatal error", "level=ERROR"} {
		if strings.Contains(d.log.String(), bad) {
			d.t.Errorf("the daemon's log has %q", bad)
		}
	}
}

// do runs a command that asks the daemon, and must succeed.
func (d *daemon) do(args ...string) string {
	d.t.Helper()
	return cowherd(d.t, append([]string{"--control", d.control}, args...)...)
}

// try runs a command that asks the daemon.
func (d *daemon) try(args ...string) (status int, stdout, stderr string) {
	d.t.Helper()
	return tryCowherd(d.t, append([]string{"--control", d.control}, args...)...)
}

// refuses runs a command that must fail and say why.
func (d *daemon) refuses(why string, args ...string) {
	d.t.Helper()
	if status, _, stderr := d.try(args...); status != 1 || !strings.Contains(stderr, why) {
		d.t.Errorf("cowherd %s: status %d, %q; want status 1 and %q", strings.Join(args, " "), status, stderr, why)
	}
}

// open opens an export.
func (d *daemon) open(export string) *nbd.Device {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	device, err := nbd.Open(ctx, nbd.Config{Network: "unix", Address: d.socket, Export: export, Connections: 1})
	if err != nil {
		d.t.Fatal(err)
	}
	return device
}

// contents reads an export.
func (d *daemon) contents(export string) []byte {
	d.t.Helper()
	device := d.open(export)
	defer device.Close()
	p := make([]byte, device.Size())
	for at := 0; at < len(p); at += mib {
		if err := block.Read(device, p[at:min(at+mib, len(p))], int64(at)); err != nil {
			d.t.Fatal(err)
		}
	}
	return p
}

// The names of a pair in a daemon.
const (
	live = "vm"
	snap = "vm@s"
)

// take attaches the origin of a pair, and makes its store (fresh) or opens it.
func (d *daemon) take(p *pair, fresh bool) {
	d.t.Helper()
	d.do("attach", live, p.origin)
	args := []string{"snapshot", snap, "--persistent", "--store", p.cow}
	if fresh {
		args = append(args, "--chunk", fmt.Sprint(p.chunk))
	} else {
		args = append(args, "--reopen")
	}
	if p.kind == "PO" {
		args = append(args, "--on-full", "overflow")
	}
	d.do(args...)
}

// status is the snapshot's status line without the table's range and target.
func (d *daemon) status() string {
	d.t.Helper()
	line := strings.TrimSpace(d.do("status", "--dm", snap))
	fields := strings.SplitN(line, " ", 4) // start, length, target
	if len(fields) < 4 {
		d.t.Fatalf("status --dm prints %q", line)
	}
	return fields[3]
}

// look compares the exports with the model of a pair.
func (d *daemon) look(p *pair, when string) {
	d.t.Helper()
	if !bytes.Equal(d.contents(live), p.originModel) {
		d.t.Errorf("%s: cowherd shows another origin than the model", when)
	}
	if !bytes.Equal(d.contents(snap), p.viewModel) {
		d.t.Errorf("%s: cowherd shows another snapshot than the model", when)
	}
}

// write does loads on both exports.
func (d *daemon) write(loads []load) {
	d.t.Helper()
	for _, l := range loads {
		export := live
		if l.snap {
			export = snap
		}
		d.writeTo(export, l.workload)
	}
}

// writeTo does a workload on an export, and flushes.
func (d *daemon) writeTo(export string, w workload) {
	d.t.Helper()
	device := d.open(export)
	err := w.each(device.Size(), func(p []byte, offset int64) error { return block.Write(device, p, offset) })
	if err == nil {
		err = block.Flush(device)
	}
	if err = errors.Join(err, device.Close()); err != nil {
		d.t.Fatal(err)
	}
}
