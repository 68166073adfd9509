package service

import (
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

func TestListenUnix(t *testing.T) {
	old := syscall.Umask(0) // the mode must not depend on it
	defer syscall.Umask(old)
	path := filepath.Join(t.TempDir(), "deep", "er", "s.sock")
	l, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil || info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("mode %v, %v; want a socket of mode 0600", info.Mode(), err)
	}
	if dir, err := os.Stat(filepath.Dir(path)); err != nil || dir.Mode().Perm() != 0o700 {
		t.Errorf("directory: %v, %v; want mode 0700", dir.Mode(), err)
	}
	_, err = listenUnix(path)
	wantErrno(t, err, syscall.EADDRINUSE, "another process listens")
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
}

// TestStaleSocket: a socket that nobody listens on is replaced; nothing else is.
func TestStaleSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s.sock")
	dead, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	dead.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := dead.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	// What took the socket's place meanwhile is left alone.
	if err := os.Rename(path, path+".moved"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	_, err = listenUnix(path)
	wantErrno(t, err, syscall.EEXIST, "not removed")
	if text, err := os.ReadFile(path); err != nil || string(text) != "precious" {
		t.Errorf("the file holds %q, %v", text, err)
	}
	if err := os.Symlink("/nowhere", path+".link"); err != nil {
		t.Fatal(err)
	}
	_, err = listenUnix(path + ".link")
	wantErrno(t, err, syscall.EEXIST, "not removed")
}

func TestListenErrors(t *testing.T) {
	dir := t.TempDir()
	_, err := listenUnix(filepath.Join(dir, strings.Repeat("x", 120)))
	wantErrno(t, err, syscall.EINVAL, "socket")
	for _, address := range []string{"", "unix:", "tcp:", "x:y", "/path", "udp:127.0.0.1:0"} {
		_, err := listenNBD(address)
		wantErrno(t, err, syscall.EINVAL, "unix:PATH or tcp:HOST:PORT")
	}
	if _, err := listenNBD("tcp:127.0.0.1"); err == nil {
		t.Error("an address without a port is taken")
	}
	l, err := listenNBD("tcp:127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if a := addressOf(l); !strings.HasPrefix(a, "tcp:127.0.0.1:") {
		t.Errorf("address %q", a)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

func TestStateDir(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b")
	s, err := openStateDir(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = openStateDir(path)
	wantErrno(t, err, syscall.EBUSY, "another daemon (process "+strconv.Itoa(os.Getpid())+") uses it")
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	if s, err = openStateDir(path); err != nil {
		t.Fatal(err)
	}
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(path, "lock")
	_, err = openStateDir(file)
	wantErrno(t, err, syscall.ENOTDIR, "state directory")
}
