package service

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"cowherd/api"
)

// stateDir is the directory that the daemon has to itself: COW space without a name lives in its file system. The file
// "lock" in it says that it is taken, by a lock that ends with the process, and by whom. It is never removed: who waits
// for the lock of a removed file would get one that nobody else looks at.
type stateDir struct {
	path string
	lock *os.File
}

// openStateDir makes the directory if need be and takes it. EBUSY: another daemon has it.
func openStateDir(path string) (*stateDir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(path, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		err = writePID(lock)
	} else if errors.Is(err, unix.EWOULDBLOCK) {
		err = api.Errorf(syscall.EBUSY, "state directory %s: another daemon%s uses it", path, readPID(lock))
	}
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return &stateDir{path: path, lock: lock}, nil
}

// close gives the directory up.
func (s *stateDir) close() error { return s.lock.Close() }

// writePID replaces what the lock file says.
func writePID(lock *os.File) error {
	if err := lock.Truncate(0); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	if _, err := lock.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	return nil
}

// readPID is " (process N)" for a message; empty when the lock file does not say.
func readPID(lock *os.File) string {
	var text [20]byte
	n, _ := lock.ReadAt(text[:], 0)
	pid, err := strconv.Atoi(strings.TrimSpace(string(text[:n])))
	if err != nil {
		return ""
	}
	return fmt.Sprintf(" (process %d)", pid)
}
