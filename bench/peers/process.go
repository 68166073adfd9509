package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

const (
	startLimit = 10 * time.Second // for a server to listen
	stopLimit  = 5 * time.Second  // for a server to end when it is asked to
	pollEvery  = 5 * time.Millisecond
)

// process is a server's process, in a process group of its own, so that an interrupt from the terminal reaches only
// this program, which then ends its servers in order.
type process struct {
	cmd    *exec.Cmd
	log    string        // path of the file that has its output
	exited chan struct{} // closed when it has ended and was waited for
}

// apart puts a process in a group of its own, and has the kernel kill it should this program be killed.
func apart() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// spawn starts a program that writes below dir. What it prints goes to a file beside dir.
func spawn(dir, program string, args ...string) (*process, error) {
	return spawnWith(apart(), dir, program, args...)
}

func spawnWith(attributes *syscall.SysProcAttr, dir, program string, args ...string) (*process, error) {
	path, err := filepath.Abs(program)
	if filepath.Base(program) == program {
		path, err = exec.LookPath(program)
	}
	if err != nil {
		return nil, err
	}
	p := &process{log: dir + ".log", exited: make(chan struct{})}
	log, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer log.Close() // the process has its own
	p.cmd = exec.Command(path, args...)
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = dir, log, log
	p.cmd.Env = append(os.Environ(), "TMPDIR="+dir)
	p.cmd.SysProcAttr = attributes
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(p.exited)
		_ = p.cmd.Wait() // how it ended is in the log, and only matters if it was not asked to
	}()
	return p, nil
}

// waitListening waits until the process greets NBD clients at a socket.
func (p *process) waitListening(ctx context.Context, socket string) error {
	return p.wait(ctx, socket, "NBDMAGIC")
}

// waitConnecting waits until the process accepts connections at a socket.
func (p *process) waitConnecting(ctx context.Context, socket string) error {
	return p.wait(ctx, socket, "")
}

func (p *process) wait(ctx context.Context, socket, greeting string) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	ticker := time.NewTicker(pollEvery)
	defer ticker.Stop()
	for {
		err := greets(ctx, socket, greeting)
		if err == nil {
			return nil
		}
		select {
		case <-p.exited:
			return fmt.Errorf("it ended at once")
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", filepath.Base(socket), errors.Join(context.Cause(ctx), err))
		case <-ticker.C:
		}
	}
}

// greets tells whether a server at a socket begins with a greeting.
func greets(ctx context.Context, socket, greeting string) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetReadDeadline(deadline); err != nil {
			return err
		}
	}
	got := make([]byte, len(greeting))
	if _, err := io.ReadFull(conn, got); err != nil {
		return err
	}
	if string(got) != greeting {
		return fmt.Errorf("it greets with %q", got)
	}
	return nil
}

// stop ends the process and returns the end of its log.
func (p *process) stop() string {
	// Errors mean that it has ended already.
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(stopLimit):
		_ = p.cmd.Process.Kill()
		<-p.exited
	}
	log, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return tail(log)
}

// tail is the end of what a program printed, for an error.
func tail(output []byte) string {
	const most = 500
	output = bytes.TrimSpace(output)
	return string(output[max(0, len(output)-most):])
}

// withLog adds what a server logged to an error.
func withLog(err error, log string) error {
	if log == "" {
		return err
	}
	return fmt.Errorf("%w; its log: %s", err, log)
}
