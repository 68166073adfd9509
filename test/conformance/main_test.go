// Package conformance tests cowherd as its users meet it: the program, built as they would build it, serves disk images
// from a process of its own, and the clients are other people's: fio, qemu-img, qemu-io, nbdinfo, nbdcopy, nbdsh,
// nbdkit, nbdfuse and the tools of ext4. A test whose client is missing is skipped and says which.
//
// # What every test checks beside its own subject
//
// A daemon that a test has started is ended by SIGTERM, and then
//
//   - its exit status is 0,
//   - its log tells of no panic, no data race and no error,
//   - its sockets are gone and its state directory holds nothing but the lock and the state file.
//
// When the tests run under the race detector, so does the daemon.
//
// Goroutines left behind fail the package: goleak looks at the tests' own process, in which one test runs a daemon too.
package conformance

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// commandLimit bounds every program that a test runs to its end.
const commandLimit = 100 * time.Second

// root is the module's directory.
const root = "../.."

// programDir is where the program is built.
var programDir string

func TestMain(m *testing.M) { os.Exit(run(m)) }

// run runs the tests in an environment that does not depend on the user's.
func run(m *testing.M) (status int) {
	dir, err := os.MkdirTemp("", "cowherd-program-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	programDir = dir
	for name, value := range map[string]string{
		"PATH":            os.Getenv("PATH") + ":/usr/sbin:/sbin", // where mke2fs and e2fsck are
		"COWHERD_CONTROL": filepath.Join(dir, "nobody-listens-here.sock"),
		"LC_ALL":          "C",
		"NOTIFY_SOCKET":   "",
		"LIBNBD_DEBUG":    "0",
		// Else each process under the race detector ends a second later.
		"GORACE": strings.TrimSpace(os.Getenv("GORACE") + " atexit_sleep_ms=0"),
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

// build builds the program once.
var build = sync.OnceValues(func() (path string, err error) {
	if err := lookAtSources(); err != nil {
		return "", err
	}
	path = filepath.Join(programDir, "cowherd")
	args := []string{"build", "-buildvcs=false", "-o", path}
	env := append(os.Environ(), "CGO_ENABLED=0")
	if underRace() {
		args, env = append(args, "-race"), append(os.Environ(), "CGO_ENABLED=1")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", append(args, "./cmd/cowherd")...)
	cmd.Dir, cmd.Env = root, env
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

// lookAtSources looks at all of the program's sources, by which the go command learns that the results of this package
// depend on them: it keeps results, and the program is no import of ours.
func lookAtSources() error {
	return filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.IsDir() && filepath.Ext(path) != ".go" {
			return err
		}
		if name := entry.Name(); entry.IsDir() && path != root && (strings.HasPrefix(name, ".") || name == "bin") {
			return fs.SkipDir
		}
		// A file may vanish while others work in the tree.
		if _, err = os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
}

// underRace tells whether this is a build for the race detector.
func underRace() bool {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return false
	}
	for _, s := range info.Settings {
		if s.Key == "-race" {
			return s.Value == "true"
		}
	}
	return false
}

// program is the path of the program.
func program(t testing.TB) string {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		t.Skipf("the program cannot be built: %v", err)
	}
	path, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return path
}
