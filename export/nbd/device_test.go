package nbd

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cowherd/block"
)

// fileDevice is a synchronous device over a file in the page cache: what is least between an export and a file system.
type fileDevice struct {
	fd     int
	size   int64
	limits block.Limits
}

// newFileDevice makes a device of size bytes over a sparse temporary file, in memory where there is such a directory.
func newFileDevice(t testing.TB, size int64) *fileDevice {
	t.Helper()
	f, err := os.CreateTemp(memoryDir(t), "nbd-test-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := os.Remove(f.Name()); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return fileDeviceOf(int(f.Fd()), size)
}

func fileDeviceOf(fd int, size int64) *fileDevice {
	l := block.NoLimits()
	l.NeedsFlush = true
	return &fileDevice{fd: fd, size: size, limits: l}
}

// memoryDir is a directory on tmpfs, or a temporary one.
func memoryDir(t testing.TB) string {
	if info, err := os.Stat("/dev/shm"); err == nil && info.IsDir() {
		return "/dev/shm"
	}
	return t.TempDir()
}

func (d *fileDevice) Size() int64          { return d.size }
func (d *fileDevice) Limits() block.Limits { return d.limits }

func (d *fileDevice) Submit(r *block.Request) {
	var n int
	var err error
	switch r.Op {
	case block.OpRead:
		n, err = syscall.Pread(d.fd, r.Data, r.Offset)
	case block.OpWrite:
		n, err = syscall.Pwrite(d.fd, r.Data, r.Offset)
		if err == nil && r.Flags&block.FUA != 0 {
			err = syscall.Fdatasync(d.fd)
		}
	case block.OpFlush:
		err = syscall.Fdatasync(d.fd)
	case block.OpDiscard:
		err = syscall.Fallocate(d.fd, 3, r.Offset, r.Length) // PUNCH_HOLE | KEEP_SIZE
	case block.OpWriteZeroes:
		mode := uint32(3)
		if r.Flags&block.NoUnmap != 0 {
			err = syscall.ENOTSUP
			break
		}
		err = syscall.Fallocate(d.fd, mode, r.Offset, r.Length)
	}
	if err == nil && n != len(r.Data) {
		err = syscall.EIO
	}
	r.Complete(err)
}

// Extents asks the file system for data and holes.
func (d *fileDevice) Extents(offset, length int64, yield func(block.Extent) bool) error {
	end := offset + length
	for offset < end {
		data, err := syscall.Seek(d.fd, offset, 3) // SEEK_DATA
		if err == syscall.ENXIO {
			data, err = end, nil
		}
		if err != nil {
			return err
		}
		if data > offset {
			e := block.Extent{Offset: offset, Length: min(data, end) - offset, Hole: true, Zero: true}
			if !yield(e) {
				return nil
			}
			offset += e.Length
			continue
		}
		hole, err := syscall.Seek(d.fd, offset, 4) // SEEK_HOLE
		if err != nil {
			return err
		}
		e := block.Extent{Offset: offset, Length: min(hole, end) - offset}
		if !yield(e) {
			return nil
		}
		offset += e.Length
	}
	return nil
}

// testExports is a fixed set of exports.
type testExports struct {
	mu      sync.Mutex
	exports map[string]*Export // +checklocks:mu
	// What the empty name stands for.
	fallback string // +checklocks:mu
	opened   atomic.Int64
	released atomic.Int64
}

func exportsOf(exports ...*Export) *testExports {
	t := &testExports{exports: make(map[string]*Export)}
	for i, e := range exports {
		if i == 0 {
			t.fallback = e.Name
		}
		t.exports[e.Name] = e
	}
	return t
}

func (t *testExports) List(context.Context) []Info {
	t.mu.Lock()
	defer t.mu.Unlock()
	var infos []Info
	for _, e := range t.exports {
		infos = append(infos, Info{e.Name, e.Description})
	}
	return infos
}

func (t *testExports) Open(_ context.Context, name, _ string) (*Export, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if name == "" {
		name = t.fallback
	}
	e, ok := t.exports[name]
	if !ok {
		return nil, fmt.Errorf("export %q: %w", name, fs.ErrNotExist)
	}
	t.opened.Add(1)
	opened := *e
	opened.Release = func() {
		t.released.Add(1)
		if e.Release != nil {
			e.Release()
		}
	}
	return &opened, nil
}

// socketPath is a path for a unix socket that is short enough for one.
func socketPath(t testing.TB) string {
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// countingDevice counts bytes by operation.
type countingDevice struct {
	*fileDevice
	bytes [8]atomic.Int64
}

func (d *countingDevice) Submit(r *block.Request) {
	d.bytes[r.Op].Add(r.Length)
	d.fileDevice.Submit(r)
}

// failingDevice fails everything that reaches beyond from, now or on another goroutine.
type failingDevice struct {
	*fileDevice
	from  atomic.Int64
	async atomic.Bool
}

func (d *failingDevice) Submit(r *block.Request) {
	if r.Op != block.OpFlush && r.End() <= d.from.Load() {
		d.fileDevice.Submit(r)
		return
	}
	err := block.NewError(r, syscall.ENOSPC, "as the test wants it")
	if d.async.Load() {
		go r.Complete(err)
		return
	}
	r.Complete(err)
}

// Extents hides the holes, so that reads reach the device.
func (d *failingDevice) Extents(offset, length int64, yield func(block.Extent) bool) error {
	yield(block.Extent{Offset: offset, Length: length})
	return nil
}

// laterDevice completes requests in Submit (now), on other goroutines in any order (later), in either way (mixed), or
// makes its submitter wait (slow).
type laterDevice struct {
	*fileDevice
	kind  string
	count atomic.Uint64
}

func newLaterDevice(t testing.TB, size int64, kind string) *laterDevice {
	return &laterDevice{fileDevice: newFileDevice(t, size), kind: kind}
}

func (d *laterDevice) Submit(r *block.Request) {
	n := d.count.Add(1)
	switch {
	case d.kind == "later" || d.kind == "mixed" && n%3 == 0:
		go d.fileDevice.Submit(r)
		return
	case d.kind == "slow" && n%2 == 0:
		time.Sleep(2 * slowAfter) // the device's own time, not the test's synchronisation
	}
	d.fileDevice.Submit(r)
}
