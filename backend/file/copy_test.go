package file

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cowherd/block"
	"cowherd/internal/invariant"
)

const copyUnit = 4096 // the block of the file systems that are played here

// shared is a device on a new file of a file system that is said to share blocks; how it does so is cloneByCopy.
func shared(t testing.TB, size int64) *Device {
	t.Helper()
	d := created(t, t.TempDir(), size, Options{})
	d.fsType, d.fsBlock = unix.XFS_SUPER_MAGIC, copyUnit
	d.sys.clone = cloneByCopy
	return d
}

// remote is a device on a new file of a file system that is said to be a server's.
func remote(t testing.TB, size int64) *Device {
	t.Helper()
	d := created(t, t.TempDir(), size, Options{})
	d.fsType = unix.NFS_SUPER_MAGIC
	return d
}

// cloneByCopy obeys the kernel's rules for a clone, as far as they concern ranges, and copies.
func cloneByCopy(to, from int, source, destination, length int64) error {
	sourceSize, err := size(from)
	if err != nil {
		return err
	}
	destinationSize, err := size(to)
	if err != nil {
		return err
	}
	atEnd := source+length == sourceSize && destination+length >= destinationSize
	if (source|destination)%copyUnit != 0 || length%copyUnit != 0 && !atEnd || source+length > sourceSize {
		return unix.EINVAL
	}
	p := make([]byte, length)
	if _, err := unix.Pread(from, p, source); err != nil {
		return err
	}
	_, err = unix.Pwrite(to, p, destination)
	return err
}

// scribbled fills d from a seed and is what it holds then.
func scribbled(t testing.TB, d block.Device, seed byte) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(p)
	if err := block.Write(d, p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// holds checks all that d holds.
func holds(t testing.TB, d block.Device, want []byte) {
	t.Helper()
	p := make([]byte, d.Size())
	if err := block.Read(d, p, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p, want) {
		t.Errorf("%d bytes are not what they should be", len(p))
	}
}

func TestCopyOffers(t *testing.T) {
	leaks(t)
	a, b := shared(t, 1<<20), shared(t, 1<<20)
	r, s := remote(t, 1<<20), remote(t, 1<<20)
	plain := created(t, t.TempDir(), 1<<20, Options{})
	memory := created(t, memoryDir(t), 1<<20, Options{})
	methods := func(to, from block.Device) (list []block.CopyMethod) {
		for _, o := range to.(block.Copier).CopyOffers(from) {
			list = append(list, o.Method)
			if o.Granularity < 512 || o.Granularity&(o.Granularity-1) != 0 || o.LengthMax < o.Granularity ||
				o.LengthMax%o.Granularity != 0 || o.Concurrency < 1 {
				t.Errorf("offer %+v", o)
			}
		}
		return list
	}
	clone, server := []block.CopyMethod{block.CopyClone}, []block.CopyMethod{block.CopyServer}
	for i, c := range []struct {
		to, from block.Device
		want     []block.CopyMethod
	}{
		{a, b, clone}, {a, a, clone}, {r, s, server}, {a, r, nil}, {r, a, nil}, {memory, memory, nil}, {a, memory, nil},
		{a, &Striped{}, nil},
	} {
		if got := methods(c.to, c.from); !slices.Equal(got, c.want) {
			t.Errorf("case %d: %v, want %v", i, got, c.want)
		}
	}
	if plain.fsType != unix.XFS_SUPER_MAGIC && plain.fsType != unix.BTRFS_SUPER_MAGIC && methods(plain, plain) != nil {
		t.Errorf("%#x: %v", plain.fsType, methods(plain, plain))
	}
	b.fsBlock = 1024
	if got := methods(a, b); got != nil {
		t.Errorf("file systems of two blocks: %v", got)
	}
	b.fsBlock = copyUnit
	for _, errno := range []unix.Errno{unix.EXDEV, unix.EOPNOTSUPP, unix.EBADF, unix.EPERM, unix.ETXTBSY, unix.EIO, 0} {
		a.sys.clone = func(int, int, int64, int64, int64) error { return errno }
		if errno == 0 {
			a.sys.clone = func(int, int, int64, int64, int64) error { return nil }
		}
		if got := methods(a, b); got != nil {
			t.Errorf("the kernel answers %v: %v", errno, got)
		}
	}
	a.limits.ReadOnly = true
	if got := methods(a, b); got != nil {
		t.Errorf("a read-only destination: %v", got)
	}
	a.limits.ReadOnly = false
}

// TestCopyClone: ranges of all kinds, by the rules for clones.
func TestCopyClone(t *testing.T) {
	leaks(t)
	const tail = 1000
	size := int64(64*copyUnit + tail)
	s, d := shared(t, size), shared(t, size)
	want, source := scribbled(t, d, 1), scribbled(t, s, 2)
	for _, c := range []struct {
		name             string
		from, to, length int64
		want             int64
	}{
		{"one block", 0, 5 * copyUnit, copyUnit, copyUnit},
		{"many", 7 * copyUnit, copyUnit, 40 * copyUnit, 40 * copyUnit},
		{"nothing", copyUnit, 0, 0, 0},
		{"the end", 60 * copyUnit, 60 * copyUnit, 4*copyUnit + tail, 4*copyUnit + tail},
		{"the last bytes", 64 * copyUnit, 64 * copyUnit, tail, tail},
		{"the end of the source alone", 63 * copyUnit, copyUnit, copyUnit + tail, 0},
		{"the end of the destination alone", copyUnit, 63 * copyUnit, copyUnit + tail, 0},
		{"from between blocks", 512, 0, copyUnit, 0},
		{"to between blocks", 0, 512, copyUnit, 0},
		{"part of a block", 0, 0, 512, 0},
	} {
		n, err := d.Copy(block.CopyClone, s, c.from, c.to, c.length)
		if err != nil || n != c.want {
			t.Errorf("%s: %d, %v", c.name, n, err)
		}
		copy(want[c.to:], source[c.from:c.from+n])
	}
	holds(t, d, want)
	holds(t, s, source)
}

// TestCopyWithin: a file is cloned to itself unless the ranges overlap, by whatever name it is opened.
func TestCopyWithin(t *testing.T) {
	leaks(t)
	d := shared(t, 16*copyUnit)
	want := scribbled(t, d, 1)
	again, err := Open(d.Path(), Options{ReadOnly: true, Shared: true})
	if err != nil {
		t.Fatal(err)
	}
	closing(t, again)
	again.fsType, again.fsBlock = d.fsType, d.fsBlock
	for _, s := range []*Device{d, again} {
		for _, c := range []struct{ from, to, length, want int64 }{
			{0, 4, 4, 4}, {4, 0, 4, 4}, {8, 12, 4, 4}, {0, 0, 4, 0}, {0, 1, 4, 0}, {1, 0, 4, 0}, {0, 3, 4, 0},
		} {
			n, err := d.Copy(block.CopyClone, s, c.from*copyUnit, c.to*copyUnit, c.length*copyUnit)
			if err != nil || n != c.want*copyUnit {
				t.Errorf("%+v: %d, %v", c, n, err)
			}
			copy(want[c.to*copyUnit:], bytes.Clone(want[c.from*copyUnit:c.from*copyUnit+n]))
		}
	}
	holds(t, d, want)
}

// TestCopyErrno: what an errno of the kernel's becomes.
func TestCopyErrno(t *testing.T) {
	leaks(t)
	for _, c := range []struct{ kernel, want unix.Errno }{
		{unix.EOPNOTSUPP, unix.ENOTSUP}, {unix.ENOSYS, unix.ENOTSUP}, {unix.ENOTTY, unix.ENOTSUP},
		{unix.EXDEV, unix.ENOTSUP}, {unix.EINVAL, unix.ENOTSUP}, {unix.EBADF, unix.ENOTSUP}, {unix.EPERM, unix.ENOTSUP},
		{unix.EACCES, unix.ENOTSUP}, {unix.ETXTBSY, unix.ENOTSUP},
		{unix.EIO, unix.EIO}, {unix.ENOSPC, unix.ENOSPC}, {unix.EDQUOT, unix.EDQUOT}, {unix.EFBIG, unix.EFBIG},
		{unix.ENOMEM, unix.ENOMEM},
	} {
		s, d := shared(t, 64*copyUnit), shared(t, 64*copyUnit)
		d.sys.clone = func(int, int, int64, int64, int64) error { return c.kernel }
		d.sys.copyRange = func(int, int, int64, int64, int64) (int64, error) { return 0, c.kernel }
		for _, method := range []block.CopyMethod{block.CopyClone, block.CopyServer} {
			n, err := d.Copy(method, s, copyUnit, 2*copyUnit, 8*copyUnit)
			if n != 0 || block.Errno(err) != c.want || !errors.Is(err, c.kernel) {
				t.Errorf("%v of %v: %d, %v (errno %v)", method, c.kernel, n, err, block.Errno(err))
			}
			for _, text := range []string{d.Path(), s.Path(), method.String(), "at 4096", "32768 bytes at offset 8192"} {
				if err == nil || !strings.Contains(err.Error(), text) {
					t.Errorf("%q is not in %v", text, err)
				}
			}
			d.fsType, s.fsType = unix.NFS_SUPER_MAGIC, unix.NFS_SUPER_MAGIC
		}
	}
}

// TestCopyAbsent: what cannot be asked of the kernel.
func TestCopyAbsent(t *testing.T) {
	leaks(t)
	s, d := shared(t, 16*copyUnit), shared(t, 16*copyUnit)
	for _, method := range []block.CopyMethod{0, block.CopyServer, block.CopyDevice, 99} {
		if n, err := d.Copy(method, s, 0, 0, copyUnit); n != 0 || block.Errno(err) != unix.ENOTSUP {
			t.Errorf("%v: %d, %v", method, n, err)
		}
	}
	if n, err := d.Copy(block.CopyClone, &Striped{}, 0, 0, copyUnit); n != 0 || block.Errno(err) != unix.ENOTSUP {
		t.Errorf("from another kind of device: %d, %v", n, err)
	}
	s.fsType = unix.EXT4_SUPER_MAGIC
	if n, err := d.Copy(block.CopyClone, s, 0, 0, copyUnit); n != 0 || block.Errno(err) != unix.ENOTSUP {
		t.Errorf("from another file system: %d, %v", n, err)
	}
	d.limits.ReadOnly = true
	if n, err := d.Copy(block.CopyClone, s, 0, 0, copyUnit); n != 0 || block.Errno(err) != unix.EROFS {
		t.Errorf("to a read-only device: %d, %v", n, err)
	}
	d.limits.ReadOnly = false
}

// TestCloneEINVAL: a kernel that says EINVAL when a clone fails in the middle is asked for less until the cause shows.
func TestCloneEINVAL(t *testing.T) {
	leaks(t)
	const blocks = 64
	for good := range int64(blocks) {
		s, d := shared(t, blocks*copyUnit), shared(t, blocks*copyUnit)
		source := scribbled(t, s, 1)
		d.sys.clone = func(to, from int, source, destination, length int64) error {
			if source >= good*copyUnit {
				return unix.ENOSPC
			}
			if source+length > good*copyUnit {
				return unix.EINVAL
			}
			return cloneByCopy(to, from, source, destination, length)
		}
		var at int64
		var err error
		for at < blocks*copyUnit && err == nil {
			var n int64
			n, err = d.Copy(block.CopyClone, s, at, at, blocks*copyUnit-at)
			if n == 0 && err == nil {
				t.Fatalf("no progress at %d", at)
			}
			at += n
		}
		if at != good*copyUnit || block.Errno(err) != unix.ENOSPC {
			t.Errorf("room for %d blocks: copied %d bytes, %v", good, at, err)
		}
		p := make([]byte, at)
		if err := block.Read(d, p, 0); err != nil || !bytes.Equal(p, source[:at]) {
			t.Errorf("room for %d blocks: what was copied is wrong, %v", good, err)
		}
	}
}

// TestCopyTruncated: a copy never makes a truncated file longer again, nor shows what a truncated source has lost.
func TestCopyTruncated(t *testing.T) {
	leaks(t)
	for _, make := range []func(testing.TB, int64) *Device{shared, remote} {
		method := block.CopyClone
		s, d := make(t, 16*copyUnit), make(t, 16*copyUnit)
		if d.fsType == unix.NFS_SUPER_MAGIC {
			method = block.CopyServer
			d.sys.copyRange = func(int, int, int64, int64, int64) (int64, error) { return 0, nil }
		}
		if err := os.Truncate(s.Path(), 8*copyUnit); err != nil {
			t.Fatal(err)
		}
		n, err := d.Copy(method, s, 8*copyUnit, 0, 8*copyUnit)
		if n != 0 || block.Errno(err) != unix.ENOTSUP || s.failure.Load() == nil || d.failure.Load() != nil {
			t.Errorf("%v from a truncated file: %d, %v", method, n, err)
		}
		n, err = d.Copy(method, s, 0, 0, copyUnit)
		if n != 0 || block.Errno(err) != unix.ENOTSUP || !strings.Contains(err.Error(), "truncated") {
			t.Errorf("%v from a failed device: %d, %v", method, n, err)
		}

		s = make(t, 16*copyUnit)
		if err := os.Truncate(d.Path(), 8*copyUnit); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			n, err = d.Copy(method, s, 8*copyUnit, 8*copyUnit, 8*copyUnit)
			if n != 0 || block.Errno(err) != unix.EIO || !strings.Contains(err.Error(), "truncated") {
				t.Errorf("%v to a truncated file: %d, %v", method, n, err)
			}
		}
		if info, err := os.Stat(d.Path()); err != nil || info.Size() != 8*copyUnit {
			t.Errorf("the file is longer again: %v, %v", info, err)
		}
	}
}

// TestCopyLonger: of files that others have made longer the whole blocks are cloned, and not the tail.
func TestCopyLonger(t *testing.T) {
	leaks(t)
	const size = 4*copyUnit + 512
	for longer := range 2 {
		s, d := shared(t, size), shared(t, size)
		if err := os.Truncate([]*Device{s, d}[longer].Path(), 16*copyUnit); err != nil {
			t.Fatal(err)
		}
		var at int64
		for {
			n, err := d.Copy(block.CopyClone, s, at, at, size-at)
			if err != nil {
				t.Fatal(err)
			}
			if at += n; n == 0 {
				break
			}
		}
		if at != 4*copyUnit {
			t.Errorf("%d: %d bytes are cloned", longer, at)
		}
	}
}

// TestCopyFailed: neither to a device that has failed nor, as it may show what never reached the disk, from one.
func TestCopyFailed(t *testing.T) {
	leaks(t)
	s, d := shared(t, 16*copyUnit), shared(t, 16*copyUnit)
	lost := errors.New("the disk is lost")
	s.fail(lost)
	if _, err := d.Copy(block.CopyClone, s, 0, 0, copyUnit); block.Errno(err) != unix.ENOTSUP || !errors.Is(err, lost) {
		t.Errorf("from what has failed: %v", err)
	}
	d.fail(fmt.Errorf("fdatasync: %w", unix.EINVAL))
	if _, err := d.Copy(block.CopyClone, s, 0, 0, copyUnit); block.Errno(err) != unix.EIO {
		t.Errorf("to what has failed: %v", err)
	}
}

// TestCopyClose: closing either device waits for a copy, and what comes afterwards fails.
func TestCopyClose(t *testing.T) {
	leaks(t)
	for which := range 2 {
		dir := t.TempDir()
		var pair [2]*Device
		for i := range pair {
			var err error
			if pair[i], err = Create(filepath.Join(dir, fmt.Sprint(i)), 16*copyUnit, Options{}); err != nil {
				t.Fatal(err)
			}
			pair[i].fsType, pair[i].fsBlock = unix.XFS_SUPER_MAGIC, copyUnit
		}
		s, d := pair[0], pair[1]
		begun, goOn := make(chan struct{}), make(chan struct{})
		d.sys.clone = func(to, from int, source, destination, length int64) error {
			close(begun)
			<-goOn
			return cloneByCopy(to, from, source, destination, length)
		}
		copied, closed := make(chan error, 1), make(chan error, 1)
		go func() {
			_, err := d.Copy(block.CopyClone, s, 0, 0, copyUnit)
			copied <- err
		}()
		<-begun
		go func() { closed <- pair[which].Close() }()
		for !pair[which].closed.Load() {
			select {
			case err := <-closed:
				t.Fatalf("closed too early: %v", err)
			default:
			}
		}
		close(goOn)
		if err := errors.Join(<-copied, <-closed); err != nil {
			t.Error(err)
		}
		n, err := d.Copy(block.CopyClone, s, 0, 0, copyUnit)
		if n != 0 || block.Errno(err) != unix.ESHUTDOWN || d.CopyOffers(s) != nil {
			t.Errorf("after Close: %d, %v", n, err)
		}
		if err := pair[1-which].Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestCopyInterrupted: a signal is no end.
func TestCopyInterrupted(t *testing.T) {
	leaks(t)
	s, d := shared(t, 16*copyUnit), shared(t, 16*copyUnit)
	want, calls := scribbled(t, s, 1), 0
	d.sys.clone = func(to, from int, source, destination, length int64) error {
		if calls++; calls%3 != 0 {
			return unix.EINTR
		}
		return cloneByCopy(to, from, source, destination, length)
	}
	if n, err := d.Copy(block.CopyClone, s, 0, 0, 16*copyUnit); n != 16*copyUnit || err != nil || calls != 3 {
		t.Errorf("%d, %v, %d calls", n, err, calls)
	}
	holds(t, d, want)
}

// TestCopyServer: the kernel's own copy_file_range, where files are said to be a server's; short copies are told.
func TestCopyServer(t *testing.T) {
	leaks(t)
	const size = 1<<20 + 100
	s, d := remote(t, size), remote(t, size)
	want, source := scribbled(t, d, 1), scribbled(t, s, 2)
	whole := d.sys.copyRange
	d.sys.copyRange = func(to, from int, source, destination, length int64) (int64, error) {
		return whole(to, from, source, destination, min(length, 100<<10))
	}
	n, err := d.Copy(block.CopyServer, s, 4096, 8192, 256<<10)
	if errors.Is(err, unix.EXDEV) || errors.Is(err, fs.ErrPermission) {
		t.Skipf("no copy_file_range here: %v", err)
	}
	if n != 100<<10 || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	copy(want[8192:], source[4096:4096+n])
	if n, err = d.Copy(block.CopyServer, s, 1<<20, 1<<20, 100); n != 100 || err != nil {
		t.Errorf("the tail: %d, %v", n, err)
	}
	copy(want[1<<20:], source[1<<20:])
	if n, err = d.Copy(block.CopyServer, s, 0, 100, 4096); n != 0 || err != nil {
		t.Errorf("unaligned: %d, %v", n, err)
	}
	holds(t, d, want)
	holds(t, s, source)
}

// TestCopyAllocs: a copy allocates nothing.
func TestCopyAllocs(t *testing.T) {
	if invariant.Enabled {
		t.Skip("the race detector allocates too")
	}
	s, d := shared(t, 16*copyUnit), shared(t, 16*copyUnit)
	d.sys.clone = func(to, from int, source, destination, length int64) error {
		err := cloneRange(to, from, source, destination, length)
		if errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.EXDEV) {
			return nil
		}
		return err
	}
	count := math.Inf(1)
	for range 5 { // whatever else goes on in the process is counted too, so the least counts
		count = min(count, testing.AllocsPerRun(100, func() {
			if _, err := d.Copy(block.CopyClone, s, 0, copyUnit, 4*copyUnit); err != nil {
				t.Fatal(err)
			}
		}))
	}
	if count > 1 { // the argument of the ioctl
		t.Errorf("%v allocations", count)
	}
}

// TestStripedRemap: where the bytes lie, and that who asked is waited for.
func TestStripedRemap(t *testing.T) {
	leaks(t)
	for _, count := range []int{1, 4} {
		s, err := TempStriped(t.TempDir(), 1<<20, 4096, count)
		if err != nil {
			t.Fatal(err)
		}
		want := scribbled(t, s, 1)
		for at := int64(0); at < s.Size(); {
			to, offset, n, ok := s.Remap(5, at, s.Size()-at)
			if !ok || n <= 0 || n > s.Size()-at {
				t.Fatalf("%d: %d bytes, %v", at, n, ok)
			}
			p := make([]byte, n)
			if err := block.Read(to, p, offset); err != nil || !bytes.Equal(p, want[at:at+n]) {
				t.Fatalf("%d bytes at %d lie elsewhere: %v", n, at, err)
			}
			s.Release(5)
			at += n
		}
		if _, _, n, _ := s.Remap(5, 512, 1024); n != 1024 {
			t.Errorf("a part of a stripe: %d bytes", n)
		}
		closed := make(chan error, 1)
		go func() { closed <- s.Close() }()
		for !s.files[0].closed.Load() {
			select {
			case err := <-closed:
				t.Fatalf("closed while one holds an answer: %v", err)
			default:
			}
		}
		if _, _, _, ok := s.Remap(5, 0, 512); ok {
			t.Error("an answer after Close")
		}
		s.Release(5)
		if err := <-closed; err != nil {
			t.Error(err)
		}
	}
}

// TestAppending: a file that every write would be appended to is refused, unless it is only read.
func TestAppending(t *testing.T) {
	leaks(t)
	path := filepath.Join(t.TempDir(), "log")
	for flags, want := range map[int]unix.Errno{
		os.O_RDWR | os.O_CREATE | os.O_APPEND: unix.EINVAL, os.O_WRONLY | os.O_APPEND: unix.EINVAL, os.O_RDONLY | os.O_APPEND: 0,
	} {
		f, err := os.OpenFile(path, flags|os.O_CREATE, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		d, err := New(f, Options{})
		if block.Errno(err) != want {
			t.Errorf("flags %#x: %v", flags, err)
		}
		if err == nil {
			closing(t, d)
		} else if !strings.Contains(err.Error(), path) {
			t.Errorf("%v does not name the file", err)
		}
	}
}

// TestAllocate: the blocks are there before they are written, or there is no file.
func TestAllocate(t *testing.T) {
	leaks(t)
	for i, dir := range []string{memoryDir(t), t.TempDir()} {
		d := created(t, dir, 1<<20, Options{Allocate: true})
		var st unix.Stat_t
		if err := unix.Stat(d.Path(), &st); err != nil || st.Blocks*512 < 1<<20 || d.Size() != 1<<20 {
			t.Errorf("%d bytes of %d are allocated, %v", st.Blocks*512, d.Size(), err)
		}
		holds(t, d, make([]byte, 1<<20))
		path := filepath.Join(dir, "large")
		// More than the memory has; and what no disk is asked for, lest it be filled.
		if large, err := Create(path, []int64{1 << 42, 1 << 62}[i], Options{Allocate: true}); err == nil {
			t.Error("all this is allocated")
			closing(t, large)
		} else if !strings.Contains(err.Error(), path) {
			t.Errorf("%v does not name the file", err)
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a file is left behind: %v", err)
		}
		created(t, t.TempDir(), 0, Options{Allocate: true})
	}
}
