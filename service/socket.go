package service

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cowherd/api"
)

// Limits of looking at a socket that is already there.
const (
	probeTimeout = time.Second
	lockTries    = 100
	lockPause    = 10 * time.Millisecond
)

// unixListener listens on a unix socket of mode 0600 and removes it when it is closed, unless something else is found
// in its place by then.
type unixListener struct {
	net.Listener
	path   string
	id     fileID
	remove sync.Once
}

// listenUnix makes the directory of path if need be (mode 0700) and listens there. A socket file that nobody listens
// on any more is replaced. EADDRINUSE: somebody does. EEXIST: path is something else.
func listenUnix(path string) (*unixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	unlock, err := lockDir(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	defer unlock()
	if err := removeStale(path); err != nil {
		return nil, err
	}
	// The mode of the socket before it is bound is that of the file: there is no moment in which others may connect.
	private := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }), err)
	}}
	l, err := private.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	info, err := os.Lstat(path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("socket %s: %w", path, err), l.Close())
	}
	return &unixListener{Listener: l, path: path, id: idOf(info)}, nil
}

// Close stops listening and removes the socket file.
func (l *unixListener) Close() error {
	err := l.Listener.Close()
	l.remove.Do(func() {
		if info, statErr := os.Lstat(l.path); statErr == nil && idOf(info) == l.id {
			err = errors.Join(err, os.Remove(l.path))
		}
	})
	return err
}

// lockDir keeps other daemons from looking at, removing and making sockets in dir at the same time.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for range lockTries {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
			break
		}
		time.Sleep(lockPause)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), f.Close())
	}
	return func() { _ = f.Close() }, nil // read-only: the lock ends whatever Close says
}

// removeStale removes what a daemon that was killed has left behind. Nothing but a dead socket is ever removed.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	if info.Mode().Type() != os.ModeSocket {
		return api.Errorf(syscall.EEXIST, "socket %s: there is something else at this path, and it is not removed", path)
	}
	conn, err := net.DialTimeout("unix", path, probeTimeout)
	if err == nil {
		return errors.Join(api.Errorf(syscall.EADDRINUSE, "socket %s: another process listens on it", path), conn.Close())
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return api.Errorf(syscall.EADDRINUSE, "socket %s: cannot tell whether a process listens on it: %v", path, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("socket: stale: %w", err)
	}
	return nil
}
