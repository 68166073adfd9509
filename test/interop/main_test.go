//go:build interop

// Package interop hands persistent snapshots and clones to and fro between cowherd and Linux, whose formats they have.
// The kernel is a real one, in a guest under emulation; see README.md.
//
// In both directions a store that one has written is opened by the other, which must see the same view, by its
// checksum, and count the same usage; it writes on, and hands the store back. A model, two byte slices to which the same
// writes are applied, says what both must see.
package interop

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// root is the module's directory.
const root = "../.."

// programDir is where cowherd is built.
var programDir string

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == guestProgram {
		os.Exit(guestMain(os.Args[1:]))
	}
	os.Exit(run(m))
}

// run runs the tests in an environment that does not depend on the user's.
func run(m *testing.M) (status int) {
	dir, err := os.MkdirTemp("", "cowherd-interop-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	programDir = dir
	for name, value := range map[string]string{
		"PATH":            os.Getenv("PATH") + ":/usr/sbin:/sbin",
		"COWHERD_CONTROL": filepath.Join(dir, "nobody-listens-here.sock"),
		"LC_ALL":          "C",
		"NOTIFY_SOCKET":   "",
	} {
		if err := os.Setenv(name, value); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	status = m.Run()
	if err := goleak.Find(); err != nil && status == 0 {
		fmt.Fprintln(os.Stderr, err)
		status = 1
	}
	return status
}

// runProgram runs a program to its end, at most for limit, and returns its exit status and what it prints.
func runProgram(limit time.Duration, name string, args ...string) (status int, stdout, stderr string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	var out, diagnosis strings.Builder
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &out, &diagnosis, time.Second
	err = cmd.Run()
	switch {
	case ctx.Err() != nil:
		err = fmt.Errorf("%s %s takes longer than %v: %s%s", name, strings.Join(args, " "), limit, &out, &diagnosis)
	case errors.As(err, new(*exec.ExitError)):
		err = nil
	}
	return cmd.ProcessState.ExitCode(), out.String(), diagnosis.String(), err
}
