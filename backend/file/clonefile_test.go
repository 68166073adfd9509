package file

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// cloningCalls clone by copying, in any file system.
func cloningCalls() calls {
	sys := kernelCalls()
	sys.fsType = func(int) (int64, error) { return unix.XFS_SUPER_MAGIC, nil }
	sys.clone = cloneByCopy
	return sys
}

// cloneSource makes a file "from" that can be cloned, and returns its directory and what it holds.
func cloneSource(t *testing.T) (dir string, content []byte) {
	t.Helper()
	dir = t.TempDir()
	content = bytes.Repeat([]byte("cowherd "), (5*copyUnit+800)/8)
	if err := os.WriteFile(filepath.Join(dir, "from"), content, 0o644); err != nil {
		t.Fatal(err)
	}
	fd, err := openRetrying(dir, unix.O_RDWR|unix.O_TMPFILE, 0o600)
	if err != nil {
		t.Skipf("%s has no unnamed files: %v", dir, err)
	}
	must(t, unix.Close(fd))
	return dir, content
}

// names checks what is in a directory.
func names(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
}

func TestCloneFile(t *testing.T) {
	dir, content := cloneSource(t)
	from := filepath.Join(dir, "from")
	for _, test := range []struct {
		to   string
		mode os.FileMode
		o    CloneOptions
		done []int64
	}{
		{"a", 0o644, CloneOptions{}, []int64{5*copyUnit + 800}},
		{"b", 0o755, CloneOptions{Flush: true}, []int64{5*copyUnit + 800}},
		{"c", 0o600, CloneOptions{Flush: true, CloneMax: 2 * copyUnit}, []int64{2 * copyUnit, 4 * copyUnit, 5*copyUnit + 800}},
	} {
		if err := os.Chmod(from, test.mode); err != nil {
			t.Fatal(err)
		}
		var done []int64
		test.o.Progress = func(n, size int64) {
			if done = append(done, n); size != int64(len(content)) {
				t.Errorf("size %d", size)
			}
		}
		sys, flushes := cloningCalls(), 0
		sys.fdatasync = func(fd int) error { flushes++; return unix.Fdatasync(fd) }
		to := filepath.Join(dir, test.to)
		c, err := cloneFile(sys, from, to, test.o)
		if err != nil || c != (Cloned{Size: int64(len(content))}) || flushes > 0 != test.o.Flush || !slices.Equal(done, test.done) {
			t.Errorf("%+v, %v; flushes %d, progress %d", c, err, flushes, done)
		}
		stat, err := os.Stat(to)
		if err != nil || stat.Mode() != test.mode&^0o111 {
			t.Errorf("%v, %v", stat.Mode(), err)
		}
		if got, err := os.ReadFile(to); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	}
	names(t, dir, "a", "b", "c", "from")
}

// TestCloneFileChanged: a source that is written meanwhile is told of.
func TestCloneFileChanged(t *testing.T) {
	dir, _ := cloneSource(t)
	from := filepath.Join(dir, "from")
	sys := cloningCalls()
	sys.clone = func(to, source int, a, b, n int64) error {
		return errors.Join(cloneByCopy(to, source, a, b, n), os.Chtimes(from, time.Now(), time.Now().Add(time.Hour)))
	}
	if c, err := cloneFile(sys, from, filepath.Join(dir, "to"), CloneOptions{}); err != nil || !c.Changed {
		t.Errorf("%+v, %v", c, err)
	}
}

// TestCloneFileNot: what cannot be cloned, or not by so little, is left to others, and nothing is left behind.
func TestCloneFileNot(t *testing.T) {
	for name, prepare := range map[string]func(t *testing.T, sys *calls, dir, from, to string){
		"no source":    func(t *testing.T, _ *calls, _, from, _ string) { must(t, os.Remove(from)) },
		"a directory":  func(t *testing.T, _ *calls, _, from, _ string) { must(t, os.Remove(from), os.Mkdir(from, 0o700)) },
		"a FIFO":       func(t *testing.T, _ *calls, _, from, _ string) { must(t, os.Remove(from), unix.Mkfifo(from, 0o600)) },
		"other system": func(_ *testing.T, sys *calls, _, _, _ string) { sys.fsType = fsType },
		"impossible":   func(_ *testing.T, sys *calls, _, _, _ string) { sys.clone = failingClone(unix.EXDEV) },
		"no room":      func(_ *testing.T, sys *calls, _, _, _ string) { sys.clone = failingClone(unix.ENOSPC) },
		"broken":       func(_ *testing.T, sys *calls, _, _, _ string) { sys.clone = failingClone(unix.EIO) },
		"too short": func(_ *testing.T, sys *calls, _, _, _ string) {
			sys.clone = func(int, int, int64, int64, int64) error { return nil }
		},
		"open for writing": func(t *testing.T, _ *calls, _, from, _ string) {
			d, err := Open(from, Options{})
			must(t, err)
			t.Cleanup(func() { must(t, d.Close()) })
		},
		"open in qemu": func(t *testing.T, _ *calls, _, from, _ string) {
			f, err := os.Open(from)
			must(t, err)
			t.Cleanup(func() { must(t, f.Close()) })
			l := unix.Flock_t{Type: unix.F_RDLCK, Start: 101, Len: 1}
			must(t, unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l))
			if writes, err := QemuWrites(from); err != nil || !writes {
				t.Errorf("QemuWrites: %v, %v", writes, err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir, _ := cloneSource(t)
			from, to := filepath.Join(dir, "from"), filepath.Join(t.TempDir(), "to")
			sys := cloningCalls()
			prepare(t, &sys, dir, from, to)
			if c, err := cloneFile(sys, from, to, CloneOptions{Flush: true}); !errors.Is(err, unix.ENOTSUP) {
				t.Errorf("%+v, %v", c, err)
			}
			names(t, filepath.Dir(to))
		})
	}
}

// TestCloneFileTaken: a file that comes to be there meanwhile is another's, and stays.
func TestCloneFileTaken(t *testing.T) {
	dir, _ := cloneSource(t)
	to := filepath.Join(dir, "to")
	sys := cloningCalls()
	sys.clone = func(fd, source int, a, b, n int64) error {
		return errors.Join(cloneByCopy(fd, source, a, b, n), os.WriteFile(to, []byte("mine"), 0o600))
	}
	if c, err := cloneFile(sys, filepath.Join(dir, "from"), to, CloneOptions{Flush: true}); !errors.Is(err, unix.ENOTSUP) {
		t.Errorf("%+v, %v", c, err)
	}
	if got, err := os.ReadFile(to); err != nil || string(got) != "mine" {
		t.Errorf("%q, %v", got, err)
	}
}

// TestCloneFileShared: a source that is open for writing is cloned if that is asked for.
func TestCloneFileShared(t *testing.T) {
	dir, _ := cloneSource(t)
	from := filepath.Join(dir, "from")
	d, err := Open(from, Options{})
	must(t, err)
	defer d.Close()
	if c, err := cloneFile(cloningCalls(), from, filepath.Join(dir, "to"), CloneOptions{Shared: true}); err != nil {
		t.Errorf("%+v, %v", c, err)
	}
}

// TestCloneFileLost: a clone that cannot be made durable is removed, and that is an error.
func TestCloneFileLost(t *testing.T) {
	dir, _ := cloneSource(t)
	sys := cloningCalls()
	sys.fdatasync = func(int) error { return unix.EIO }
	_, err := cloneFile(sys, filepath.Join(dir, "from"), filepath.Join(dir, "to"), CloneOptions{Flush: true})
	if !errors.Is(err, unix.EIO) || errors.Is(err, unix.ENOTSUP) {
		t.Error(err)
	}
	names(t, dir, "from")
}

func failingClone(err error) func(int, int, int64, int64, int64) error {
	return func(int, int, int64, int64, int64) error { return err }
}

// must ends the test at the first error.
func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}
