// Package offload tests copy offload on real file systems: XFS and btrfs, which share blocks between files, ext4 and
// tmpfs, which do not. Each is on a loop device over a file in memory, made by the test, and needs root.
//
//	seed -> list of steps     writes, zeroes, discards, flushes, clones and copies by reading and writing, between two
//	                          files and within each
//	for each file system:     the steps, by the page cache or direct; byte slices to which the same is done say what
//	                          the files must hold; what is a hole must read as zeroes
//
// Further tests are of what a random list seldom meets: holes, a full disk, files that others truncate, gigabytes, and
// crashes.
//
// Loop devices and mounts belong to the process. The tests run in a mount namespace of their own, the files below the
// loop devices have no name, and a loop device ends with its last user: whatever becomes of the process, nothing is
// left behind.
//
// A failure prints the command that repeats it:
//
//	go test ./test/offload -run TestModel -seed 7
//
// -seeds N tries the seeds 1 to N, -steps N makes longer lists.
package offload

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"cowherd/internal/invariant"
)

var (
	oneSeed   = flag.Uint64("seed", 0, "the only seed to try; 0: those that -seeds says")
	seedCount = flag.Uint64("seeds", 2, "try the seeds from 1 to this")
	stepCount = flag.Int("steps", stepsDefault(), "steps of a list")
)

// stepsDefault is less under the race detector, which takes many times as long.
func stepsDefault() int {
	if invariant.Enabled {
		return 150
	}
	return 600
}

// insideName is the variable that tells this program that it is in a mount namespace of its own.
const insideName = "COWHERD_OFFLOAD_INSIDE"

func TestMain(m *testing.M) {
	if os.Geteuid() == 0 && os.Getenv(insideName) == "" {
		status, err := runInside()
		if err == nil {
			os.Exit(status)
		}
		fmt.Fprintln(os.Stderr, "no mount namespace:", err) // the tests skip
	}
	goleak.VerifyTestMain(m)
}

// runInside runs this program again in a mount namespace of its own, and returns its status.
func runInside() (int, error) {
	runtime.LockOSThread() // the child is killed when the thread that started it ends
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideName+"=yes", "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	err = cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return max(exit.ExitCode(), 1), nil
	}
	return 0, err
}
