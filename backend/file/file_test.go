package file

import (
	"bytes"
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"cowherd/backend/devicetest"
	"cowherd/block"
)

const modelSize = 1<<20 + 8192

// variants are ways to get a device, each of which must behave as the model does.
var variants = []struct {
	name string
	make func(t *testing.T) *Device
}{
	{"memory", func(t *testing.T) *Device { return created(t, memoryDir(t), modelSize+77, Options{}) }},
	{"memory temporary", func(t *testing.T) *Device { return temp(t, memoryDir(t)) }},
	{"disk", func(t *testing.T) *Device { return created(t, diskDir(t), modelSize+77, Options{}) }},
	{"disk temporary", func(t *testing.T) *Device { return temp(t, diskDir(t)) }},
	{"direct", func(t *testing.T) *Device { return direct(t) }},
	{"direct, bounced", func(t *testing.T) *Device {
		d := direct(t)
		d.memoryAlign = 1 << 20 // no buffer is aligned like that
		return d
	}},
	{"nothing cached", func(t *testing.T) *Device {
		d := onDisk(t, modelSize)
		d.nowait = true
		d.sys.preadNowait = func(int, []byte, int64) (int, error) { return 0, unix.EAGAIN }
		return d
	}},
	{"no probe of the cache", func(t *testing.T) *Device {
		d := onDisk(t, modelSize)
		d.nowait = false
		return d
	}},
	{"short transfers and signals", func(t *testing.T) *Device {
		d := onDisk(t, 64<<10)
		d.interrupt()
		return d
	}},
	{"no ZERO_RANGE", func(t *testing.T) *Device { return without(t, zeroRangeMode) }},
	{"no holes", func(t *testing.T) *Device { return without(t, punchMode) }},
	{"no fallocate", func(t *testing.T) *Device { return without(t, punchMode, zeroRangeMode) }},
	{"no RWF_DSYNC", func(t *testing.T) *Device {
		d := onDisk(t, modelSize)
		d.sys.pwriteDsync = func(int, []byte, int64) (int, error) { return 0, unix.ENOTSUP }
		return d
	}},
	{"no SEEK_DATA", func(t *testing.T) *Device {
		d := onDisk(t, modelSize)
		d.sys.seek = func(int, int64, int) (int64, error) { return 0, unix.EINVAL }
		return d
	}},
}

func temp(t *testing.T, dir string) *Device {
	t.Helper()
	d, err := Temp(dir, modelSize)
	if err != nil {
		t.Fatal(err)
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) > 0 {
		t.Errorf("a temporary file has a name: %v, %v", names, err)
	}
	return closing(t, d)
}

func direct(t *testing.T) *Device {
	t.Helper()
	d, err := Create(filepath.Join(diskDir(t), "disk.img"), modelSize, Options{Direct: true})
	if errors.Is(err, unix.EINVAL) {
		t.Skipf("no direct I/O here: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return closing(t, d)
}

// without is a device whose file system lacks modes of fallocate.
func without(t *testing.T, modes ...uint32) *Device {
	t.Helper()
	d := onDisk(t, modelSize)
	real := d.sys.fallocate
	d.sys.fallocate = func(fd int, mode uint32, offset, length int64) error {
		if slices.Contains(modes, mode) {
			return unix.ENOTSUP
		}
		return real(fd, mode, offset, length)
	}
	d.limits.DiscardMax = 0
	var st unix.Stat_t
	if err := errors.Join(unix.Fstat(d.fd, &st), d.examineFile(&st)); err != nil {
		t.Fatal(err)
	}
	d.inMemory = false
	if none := slices.Contains(modes, punchMode); (d.Limits().DiscardMax == 0) != none {
		t.Errorf("limits %+v", d.Limits())
	}
	return d
}

// interrupt makes every transfer of d a short one, and every other call interrupted by a signal.
func (d *Device) interrupt() {
	short := func(call func(int, []byte, int64) (int, error)) func(int, []byte, int64) (int, error) {
		return func(fd int, p []byte, offset int64) (int, error) {
			if rand.IntN(2) == 0 {
				return 0, unix.EINTR
			}
			return call(fd, p[:min(len(p), 1+rand.IntN(1+len(p)))], offset)
		}
	}
	d.sys.pread, d.sys.preadNowait = short(d.sys.pread), short(d.sys.preadNowait)
	d.sys.pwrite, d.sys.pwriteDsync = short(d.sys.pwrite), short(d.sys.pwriteDsync)
	fallocate := d.sys.fallocate
	d.sys.fallocate = func(fd int, mode uint32, offset, length int64) error {
		if rand.IntN(2) == 0 {
			return unix.EINTR
		}
		return fallocate(fd, mode, offset, length)
	}
	d.sys.fdatasync = func(int) error { return []error{nil, unix.EINTR}[rand.IntN(2)] }
}

func TestModel(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			leaks(t)
			devicetest.Model(t, v.make(t), 60)
		})
	}
}

func TestDisjoint(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			leaks(t)
			devicetest.Disjoint(t, v.make(t), 4, 15)
		})
	}
}

func TestEdges(t *testing.T) {
	leaks(t)
	for _, size := range []int64{0, 1, 4097, 1 << 40, math.MaxInt64 - 511} {
		d, err := Temp(memoryDir(t), size)
		if err != nil {
			t.Errorf("size %d: %v", size, err)
			continue
		}
		closing(t, d)
		err = errors.Join(
			block.Read(d, nil, size),
			block.Write(d, nil, size),
			block.Do(d, block.OpDiscard, 0, size, 0, nil),
			block.Do(d, block.OpWriteZeroes, 0, size, 0, nil),
			block.Do(d, block.OpDiscard, 0, 0, size, nil),
			block.Do(d, block.OpWriteZeroes, block.Fast, 0, size, nil),
			block.Flush(d))
		if size > 0 {
			err = errors.Join(err, block.Write(d, []byte{7}, size-1))
		}
		if err != nil || d.Size() != size {
			t.Errorf("size %d: got %d, %v", size, d.Size(), err)
		}
		devicetest.Extents(t, d, 0, size)
	}
}

func TestExtents(t *testing.T) {
	const unit = 64 << 10
	for _, dir := range []func(testing.TB) string{memoryDir, diskDir} {
		d := created(t, dir(t), 16*unit, Options{})
		size, _ := d.sys.size(d.fd)
		if d.size.Store(size); size != 16*unit {
			t.Fatalf("the file has %d bytes", size)
		}
		for _, i := range []int64{1, 4, 5, 15} {
			if err := block.Write(d, bytes.Repeat([]byte{7}, unit), i*unit); err != nil {
				t.Fatal(err)
			}
		}
		if err := block.Do(d, block.OpDiscard, 0, 5*unit, unit, nil); err != nil {
			t.Fatal(err)
		}
		want := []block.Extent{
			{Offset: 100, Length: unit - 100, Hole: true, Zero: true},
			{Offset: unit, Length: unit},
			{Offset: 2 * unit, Length: 2 * unit, Hole: true, Zero: true},
			{Offset: 4 * unit, Length: unit},
			{Offset: 5 * unit, Length: 10 * unit, Hole: true, Zero: true},
			{Offset: 15 * unit, Length: unit - 100},
		}
		if list := devicetest.Extents(t, d, 100, 16*unit-200); !slices.Equal(list, want) {
			t.Errorf("extents %v, want %v", list, want)
		}
		calls := 0
		if err := d.Extents(0, 16*unit, func(block.Extent) bool { calls++; return false }); err != nil || calls != 1 {
			t.Errorf("yield was called %d times after it returned false: %v", calls, err)
		}
	}
}

// TestZeroKeepsAllocated: NoUnmap leaves a range allocated, and its absence does not.
func TestZeroKeepsAllocated(t *testing.T) {
	const size = 1 << 20
	for _, dir := range []func(testing.TB) string{memoryDir, diskDir} {
		d := created(t, dir(t), size, Options{})
		if err := block.Write(d, bytes.Repeat([]byte{7}, size), 0); err != nil {
			t.Fatal(err)
		}
		for _, flags := range []block.Flags{block.NoUnmap, block.NoUnmap | block.Fast, 0} {
			err := block.Do(d, block.OpWriteZeroes, flags, 0, size, nil)
			if d.inMemory && flags&block.Fast != 0 {
				if block.Errno(err) != unix.ENOTSUP {
					t.Errorf("flags %d: %v, want ENOTSUP", flags, err)
				}
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			var st unix.Stat_t
			if err := unix.Fstat(d.fd, &st); err != nil {
				t.Fatal(err)
			}
			if allocated := st.Blocks*512 >= size; allocated != (flags != 0) {
				t.Errorf("flags %d: %d bytes are allocated", flags, st.Blocks*512)
			}
			p := bytes.Repeat([]byte{0xee}, size)
			if err := block.Read(d, p, 0); err != nil || slices.Max(p) != 0 {
				t.Errorf("flags %d: the range does not read as zeroes: %v", flags, err)
			}
		}
	}
}

func TestTruncated(t *testing.T) {
	leaks(t)
	for name, d := range map[string]*Device{
		"inline": created(t, t.TempDir(), 64<<10, Options{}),
		"pool":   onDisk(t, 64<<10),
		"flush":  created(t, t.TempDir(), 64<<10, Options{}),
	} {
		if err := block.Write(d, make([]byte, 64<<10), 0); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(d.Path(), 10_000); err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 4096)
		if err := block.Read(d, p, 4096); err != nil {
			t.Errorf("%s: read of what is left: %v", name, err)
		}
		if name != "flush" {
			err := block.Read(d, p, 8192)
			if block.Errno(err) != syscall.EIO || !strings.Contains(err.Error(), "truncated") {
				t.Errorf("%s: read across the new end: %v", name, err)
			}
		}
		if err := block.Flush(d); block.Errno(err) != syscall.EIO || !strings.Contains(err.Error(), "truncated") {
			t.Errorf("%s: flush: %v", name, err)
		}
		for _, op := range []block.Op{block.OpDiscard, block.OpWriteZeroes} {
			if err := block.Do(d, op, 0, 0, 4096, nil); block.Errno(err) != syscall.EIO {
				t.Errorf("%s: %v: %v", name, op, err)
			}
		}
		if err := block.Write(d, p, 32<<10); block.Errno(err) != syscall.EIO {
			t.Errorf("%s: a write would grow the file again: %v", name, err)
		}
		err := d.Extents(0, 64<<10, func(block.Extent) bool { return true })
		if block.Errno(err) != syscall.EIO {
			t.Errorf("%s: extents: %v", name, err)
		}
	}
}

func TestGrown(t *testing.T) {
	d := created(t, t.TempDir(), 4096, Options{})
	if err := os.Truncate(d.Path(), 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(block.Write(d, make([]byte, 4096), 0), block.Flush(d)); err != nil {
		t.Error(err)
	}
	if list := devicetest.Extents(t, d, 0, 4096); d.Size() != 4096 || len(list) != 1 {
		t.Errorf("size %d, extents %v", d.Size(), list)
	}
}

func TestReadOnly(t *testing.T) {
	leaks(t)
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, []byte("frozen"), 0o400); err != nil {
		t.Fatal(err)
	}
	d, err := Open(path, Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	closing(t, d)
	if l := d.Limits(); !l.ReadOnly || l.NeedsFlush {
		t.Errorf("limits %+v", l)
	}
	p := make([]byte, 6)
	if err := errors.Join(block.Read(d, p, 0), block.Flush(d)); err != nil || string(p) != "frozen" {
		t.Errorf("read %q, %v", p, err)
	}
	for _, op := range []block.Op{block.OpWrite, block.OpDiscard, block.OpWriteZeroes} {
		if err := block.Do(d, op, block.FUA, 0, 6, p); block.Errno(err) != syscall.EROFS {
			t.Errorf("%v: %v, want EROFS", op, err)
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	leaks(t)
	dir := t.TempDir()
	fifo, odd := filepath.Join(dir, "fifo"), filepath.Join(dir, "odd")
	if err := errors.Join(unix.Mkfifo(fifo, 0o600), os.WriteFile(odd, make([]byte, 1000), 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		o    Options
		want syscall.Errno
	}{
		{filepath.Join(dir, "missing"), Options{}, unix.ENOENT},
		{dir, Options{ReadOnly: true}, unix.EISDIR},
		{fifo, Options{}, unix.EINVAL},
		{"/dev/null", Options{}, unix.EINVAL},
		{odd, Options{Direct: true}, unix.EINVAL},
	} {
		d, err := Open(c.path, c.o)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.path) {
			t.Errorf("open %s: %v, want %v", c.path, err, c.want)
		}
		if d != nil {
			closing(t, d)
		}
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(null, Options{}); !errors.Is(err, unix.EINVAL) {
		t.Errorf("device of %s: %v", os.DevNull, err)
	}
	if _, err := New(null, Options{}); err == nil {
		t.Error("a closed file was taken")
	}
	writer, err := os.OpenFile(odd, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(writer, Options{}); !errors.Is(err, unix.EINVAL) {
		t.Errorf("device of a file that cannot be read: %v", err)
	}
}

func TestCreateRefuses(t *testing.T) {
	leaks(t)
	dir := t.TempDir()
	taken, fresh := filepath.Join(dir, "taken"), filepath.Join(dir, "fresh")
	if err := os.WriteFile(taken, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Create(taken, 1, Options{}); !errors.Is(err, unix.EEXIST) {
		t.Errorf("create over a file: %v", err)
	}
	if _, err := Create(fresh, 1, Options{ReadOnly: true}); !errors.Is(err, unix.EINVAL) {
		t.Errorf("create read-only: %v", err)
	}
	if _, err := Create(fresh, 1, Options{Direct: true}); !errors.Is(err, unix.EINVAL) {
		t.Errorf("create with direct I/O and a size for which there is none: %v", err)
	}
	if _, err := Create(fresh, -1, Options{}); !errors.Is(err, unix.EINVAL) {
		t.Errorf("create with a negative size: %v", err)
	}
	if _, err := Temp(filepath.Join(dir, "missing"), 1); !errors.Is(err, unix.ENOENT) {
		t.Errorf("temporary file in a directory that is missing: %v", err)
	}
	if _, err := Temp(dir, -1); !errors.Is(err, unix.EINVAL) {
		t.Errorf("temporary file of a negative size: %v", err)
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) != 1 {
		t.Errorf("left behind: %v, %v", names, err)
	}
}

// TestRemoved: what stands in for O_TMPFILE leaves no name either.
func TestRemoved(t *testing.T) {
	leaks(t)
	dir := t.TempDir()
	f, err := removed(dir)
	if err != nil {
		t.Fatal(err)
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) > 0 {
		t.Errorf("left behind: %v, %v", names, err)
	}
	d, err := New(f, Options{})
	if err != nil {
		t.Fatal(err)
	}
	closing(t, d)
}

func TestLock(t *testing.T) {
	leaks(t)
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	write, read, shared := Options{}, Options{ReadOnly: true}, Options{Shared: true}
	for _, c := range []struct {
		first, second Options
		refused       bool
	}{
		{write, write, true}, {write, read, true}, {read, write, true}, {read, read, false},
		{write, shared, false}, {shared, write, false},
	} {
		first, err := Open(path, c.first)
		if err != nil {
			t.Fatal(err)
		}
		second, err := Open(path, c.second)
		if refused := errors.Is(err, unix.EBUSY) && strings.Contains(err.Error(), path); refused != c.refused {
			t.Errorf("%+v after %+v: %v", c.second, c.first, err)
		}
		if err := first.Close(); err != nil {
			t.Error(err)
		}
		if second != nil {
			if err := second.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestNoSpace(t *testing.T) {
	leaks(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("no small file system can be mounted: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	d := created(t, dir, 1<<20, Options{})
	p := make([]byte, 64<<10)
	if err := block.Write(d, p, 0); err != nil {
		t.Fatal(err)
	}
	err := block.Write(d, p, 512<<10)
	if block.Errno(err) != syscall.ENOSPC || !strings.Contains(err.Error(), d.Path()) {
		t.Errorf("write on a full file system: %v", err)
	}
	if err := block.Do(d, block.OpWriteZeroes, block.NoUnmap, 512<<10, 4096, nil); block.Errno(err) != syscall.ENOSPC {
		t.Errorf("write of zeroes that need room on a full file system: %v", err)
	}
	if err := errors.Join(block.Write(d, p, 0), block.Flush(d)); err != nil {
		t.Errorf("a lack of space is not the end: %v", err)
	}
}

func TestClose(t *testing.T) {
	leaks(t)
	d, err := Temp(t.TempDir(), 4096)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); !errors.Is(err, errClosed) {
		t.Errorf("second Close: %v", err)
	}
	for op := block.OpRead; op <= block.OpWriteZeroes; op++ {
		if err := block.Do(d, op, 0, 0, 0, nil); block.Errno(err) != syscall.ESHUTDOWN {
			t.Errorf("%v after Close: %v, want ESHUTDOWN", op, err)
		}
	}
	if err := d.Sync(); block.Errno(err) != syscall.ESHUTDOWN {
		t.Errorf("sync after Close: %v, want ESHUTDOWN", err)
	}
	if err := d.Extents(0, 4096, func(block.Extent) bool { return true }); !errors.Is(err, errClosed) {
		t.Errorf("extents after Close: %v", err)
	}
}
