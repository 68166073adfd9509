package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// adoptCommand has this program run another one that puts itself in the background, as nbd-server does unless it is to
// serve one client only: "peers adopt PROGRAM ARGS...". It becomes the parent of what is left, so that its CPU time is
// counted among that of children, and kills that when it is asked to end. It ends when all of it has ended.
const adoptCommand = "adopt"

// spawnAdopted is spawn for such a program. The kernel asks the adopter to end should this program be killed.
func spawnAdopted(dir, program string, args ...string) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	attributes := apart()
	attributes.Pdeathsig = syscall.SIGTERM
	return spawnWith(attributes, dir, self, append([]string{adoptCommand, program}, args...)...)
}

// adopt is the adopter.
func adopt(args []string) error {
	if len(args) == 0 {
		return errors.New("adopt: no program")
	}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM, syscall.SIGINT)
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("adopt: %w", err)
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	files := []*os.File{os.Stdin, os.Stdout, os.Stderr}
	if _, err := os.StartProcess(path, args, &os.ProcAttr{Files: files}); err != nil {
		return err
	}
	none := make(chan struct{})
	go func() {
		defer close(none)
		for {
			if _, err := unix.Wait4(-1, nil, 0, nil); err != nil && !errors.Is(err, unix.EINTR) {
				return // no child is left
			}
		}
	}()
	select {
	case <-none:
	case <-ended:
		killChildren(none)
	}
	return nil
}

// killChildren kills children until there are none. What a killed child leaves becomes a child in turn.
func killChildren(none <-chan struct{}) {
	for {
		for _, child := range children(os.Getpid()) {
			_ = unix.Kill(child, unix.SIGKILL) // an error means that it has ended
		}
		select {
		case <-none:
			return
		case <-time.After(time.Millisecond):
		}
	}
}
