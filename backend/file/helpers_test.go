package file

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"cowherd/backend/devicetest"
	"cowherd/block"
)

// memoryDir is a new directory in memory.
func memoryDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "cowherd-test-*")
	if err != nil {
		t.Skipf("there is no file system in memory: %v", err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// diskDir is a new directory on a disk, or something like it.
func diskDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	if fs.Type == unix.TMPFS_MAGIC {
		t.Skip("the directory for temporary files is in memory")
	}
	return dir
}

// closing closes d at the end of the test, and checks that no goroutine and no descriptor is left behind.
func closing(t testing.TB, d *Device) *Device {
	t.Helper()
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// leaks checks at the end of the test that no goroutine and no descriptor is left behind. Call it first.
func leaks(t *testing.T) {
	t.Helper()
	devicetest.Leaks(t)
	before := descriptors(t)
	t.Cleanup(func() {
		if now := descriptors(t); now > before {
			t.Errorf("%d descriptors are open, %d were before", now, before)
		}
	})
}

func descriptors(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// created is a device on a new file.
func created(t testing.TB, dir string, size int64, o Options) *Device {
	t.Helper()
	d, err := Create(filepath.Join(dir, "disk.img"), size, o)
	if err != nil {
		t.Fatal(err)
	}
	return closing(t, d)
}

// onDisk is a device on a new file that takes the ways of a disk even when it is in memory, so that the tests of the
// pool need no disk.
func onDisk(t testing.TB, size int64) *Device {
	t.Helper()
	d := created(t, t.TempDir(), size, Options{})
	d.inMemory = false
	return d
}

// outcome is what a completion told.
type outcome struct {
	r   *block.Request
	err error
}

// outcomes is a Completer that passes on what it is told.
type outcomes chan outcome

func (c outcomes) Complete(r *block.Request, err error) { c <- outcome{r, err} }

// submit starts an operation on queue 0 and lets c know of its end.
func (c outcomes) submit(d *Device, op block.Op, flags block.Flags, offset int64, data []byte) {
	r := &block.Request{Op: op, Flags: flags, Offset: offset, Length: int64(len(data)), Data: data}
	r.Push(c)
	d.Submit(r)
}
