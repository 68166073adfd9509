package offload

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"cowherd/backend/file"
	"cowherd/block"
)

// fill takes all the room there is, and returns what gives it back.
func (d *disk) fill() (free func()) {
	d.t.Helper()
	var names []string
	for size := int64(64 * mib); size >= 4*kib; {
		path := fmt.Sprintf("%s/fill-%d", d.dir, len(names))
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err == nil {
			names = append(names, path)
			err = unix.Fallocate(int(f.Fd()), 0, 0, size)
			if closeErr := f.Close(); closeErr != nil {
				d.t.Fatal(closeErr)
			}
		}
		if err != nil {
			size /= 2
		}
	}
	return func() {
		for _, name := range names {
			if err := os.Remove(name); err != nil {
				d.t.Error(err)
			}
		}
		d.used() // which waits for the room
	}
}

// TestFull: on a full disk a clone fails with ENOSPC and harms nothing; with room it goes on.
func TestFull(t *testing.T) {
	const size, unit = 64 * mib, 4 * kib
	for _, kind := range []fileSystem{xfs, btrfsMixed} {
		t.Run(kind.name, func(t *testing.T) {
			d := mounted(t, kind, 320*mib)
			from, to := d.create("from", size, file.Options{}), d.create("to", size, file.Options{})
			source, want := scribble(t, from, 1), make([]byte, size)
			free := d.fill()
			order := rand.New(rand.NewPCG(1, 2)).Perm(size / unit)
			full := 0
			for i, block64 := range order {
				at := int64(block64) * unit
				n, err := to.Copy(block.CopyClone, from, at, at, unit)
				if err != nil {
					if block.Errno(err) != unix.ENOSPC || !strings.Contains(err.Error(), to.Path()) {
						t.Fatal(err)
					}
					if full++; full == 1 {
						t.Logf("full after %d clones: %v", i, err)
					}
				}
				copy(want[at:at+n], source[at:])
				if full == 3 { // each looks everywhere for room, which takes its time
					break
				}
			}
			if full == 0 {
				t.Error("the disk has room for everything")
			}
			holds(t, from, 0, source)
			holds(t, to, 0, want)
			// What is shared cannot be overwritten without room, and is as it was.
			if err := block.Write(from, make([]byte, size), 0); block.Errno(err) != unix.ENOSPC {
				t.Errorf("write to what is shared: %v", err)
			}
			holds(t, to, 0, want)
			free()
			copy(source, scribble(t, from, 2))
			cloned(t, to, from, 0, 0, size)
			if err := block.Flush(to); err != nil {
				t.Error(err)
			}
			holds(t, to, 0, source)
		})
	}
}

// TestTruncated: neither a file that loses its end while it is copied nor one that loses it while it is copied to is
// made whole by that.
func TestTruncated(t *testing.T) {
	const size = 16 * mib
	for _, kind := range sharing {
		t.Run(kind.name, func(t *testing.T) {
			d := mounted(t, kind, diskSize)
			from, to := d.create("from", size, file.Options{}), d.create("to", size, file.Options{})
			data := scribble(t, from, 1)
			if n, err := to.Copy(block.CopyClone, from, 0, 0, size); n != size || err != nil {
				t.Fatalf("%d, %v", n, err)
			}
			if err := os.Truncate(from.Path(), size/2); err != nil {
				t.Fatal(err)
			}
			n, err := to.Copy(block.CopyClone, from, 0, 0, size)
			if n != 0 || block.Errno(err) != unix.ENOTSUP || !strings.Contains(err.Error(), "truncated") {
				t.Errorf("from a truncated file: %d, %v", n, err)
			}
			if err := readWrite(to, from, 0, 0, size); block.Errno(err) != unix.EIO {
				t.Errorf("read of a truncated file: %v", err)
			}
			holds(t, to, 0, data)

			whole := d.create("whole", size, file.Options{})
			if err := os.Truncate(to.Path(), size/2); err != nil {
				t.Fatal(err)
			}
			n, err = to.Copy(block.CopyClone, whole, size/2, size/2, size/2)
			if n != 0 || block.Errno(err) != unix.EIO || !strings.Contains(err.Error(), "truncated") {
				t.Errorf("to a truncated file: %d, %v", n, err)
			}
			if info, err := os.Stat(to.Path()); err != nil || info.Size() != size/2 {
				t.Errorf("the file is made whole: %v, %v", info, err)
			}
		})
	}
}

// TestGrown: both files grow while one is cloned to the other, and the tail behind what was cloned is cloned too.
func TestGrown(t *testing.T) {
	const step, steps = mib + 512, 32
	for _, kind := range sharing {
		t.Run(kind.name, func(t *testing.T) {
			d := mounted(t, kind, diskSize)
			from, to := d.create("from", step, file.Options{}), d.create("to", step, file.Options{})
			data := make([]byte, steps*step)
			_, _ = rand.NewChaCha8([32]byte{1}).Read(data)
			if err := block.Write(from, data[:step], 0); err != nil {
				t.Fatal(err)
			}
			var grower sync.WaitGroup
			grower.Go(func() {
				for i := int64(2); i <= steps; i++ {
					for _, f := range []*file.Device{from, to} {
						if err := f.Grow(i * step); err != nil {
							t.Error(err)
						}
					}
					if err := block.Write(from, data[(i-1)*step:i*step], (i-1)*step); err != nil {
						t.Error(err)
					}
				}
			})
			for range 100 { // whole blocks of what they have: the tail is the tail of both only at the end
				length := min(from.Size(), to.Size()) &^ 4095
				cloned(t, to, from, 0, 0, length)
			}
			grower.Wait()
			cloned(t, to, from, 0, 0, steps*step)
			holds(t, to, 0, data)
		})
	}
}

// setAttribute sets or clears an attribute (chattr) of a file.
func setAttribute(t *testing.T, path string, bit int, set bool) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		t.Fatal(err)
	}
	flags &^= uint32(bit)
	if set {
		flags |= uint32(bit)
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags)); err != nil {
		t.Fatal(err)
	}
}

// TestAttributes: what attributes of a file forbid is absent. FS_IMMUTABLE_FL is seen before, FS_NOCOW_FL (btrfs) of one
// of the files when a clone is tried.
func TestAttributes(t *testing.T) {
	const immutable, noCOW = 0x10, 0x800000
	for _, kind := range sharing {
		t.Run(kind.name, func(t *testing.T) {
			d := mounted(t, kind, diskSize)
			from, to := d.create("from", mib, file.Options{}), d.create("to", mib, file.Options{})
			scribble(t, from, 1)
			setAttribute(t, to.Path(), immutable, true)
			n, err := to.Copy(block.CopyClone, from, 0, 0, mib)
			if n != 0 || block.Errno(err) != unix.ENOTSUP || offered(to, from) != nil {
				t.Errorf("to an immutable file: %d, %v, offered %v", n, err, offered(to, from))
			}
			setAttribute(t, to.Path(), immutable, false)
			holds(t, to, 0, make([]byte, mib))
			if kind.name != "btrfs" {
				return
			}
			path := d.dir + "/plain"
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			setAttribute(t, path, noCOW, true)
			if err := os.Truncate(path, mib); err != nil {
				t.Fatal(err)
			}
			plain, err := file.Open(path, file.Options{})
			if err != nil {
				t.Fatal(err)
			}
			closing(t, plain)
			if n, err := plain.Copy(block.CopyClone, from, 0, 0, mib); n != 0 || block.Errno(err) != unix.ENOTSUP {
				t.Errorf("to a file without checksums: %d, %v", n, err)
			}
			holds(t, plain, 0, make([]byte, mib))
		})
	}
}

// TestAppending: a file that is only appended to is no destination, and the error says why.
func TestAppending(t *testing.T) {
	d := mounted(t, xfs, diskSize)
	path := d.dir + "/log"
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if made, err := file.New(f, file.Options{}); block.Errno(err) != syscall.EINVAL || !strings.Contains(err.Error(), "appending") {
		t.Errorf("%v, %v", made, err)
	}
	const appendOnly = 0x20
	setAttribute(t, path, appendOnly, true)
	defer setAttribute(t, path, appendOnly, false)
	if made, err := file.Open(path, file.Options{}); block.Errno(err) != syscall.EPERM || !strings.Contains(err.Error(), path) {
		t.Errorf("%v, %v", made, err)
	}
}

// TestSubvolumes: files of two subvolumes of a btrfs are on one file system, whatever stat says of their devices.
func TestSubvolumes(t *testing.T) {
	d := mounted(t, btrfs, diskSize)
	dir, err := os.Open(d.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	args := make([]byte, 4096) // struct btrfs_ioctl_vol_args: a descriptor, and a name
	copy(args[8:], "below")
	const create = 0x5000940e // BTRFS_IOC_SUBVOL_CREATE
	if err := ioctl(dir, create, args); err != nil {
		t.Fatal(err)
	}
	from, to := d.create("from", mib, file.Options{}), d.create("below/to", mib, file.Options{})
	data := scribble(t, from, 1)
	if got := offered(to, from); !slices.Equal(got, clone) {
		t.Fatalf("offered: %v", got)
	}
	cloned(t, to, from, 0, 0, mib)
	holds(t, to, 0, data)
}

// TestTemp: a file without a name can be filled by clones, as one file and as several; what the latter holds is found by
// Remap.
func TestTemp(t *testing.T) {
	d := mounted(t, xfs, diskSize)
	from := d.create("from", mib, file.Options{})
	data := scribble(t, from, 1)
	temp, err := file.Temp(d.dir, mib)
	if err != nil {
		t.Fatal(err)
	}
	closing(t, temp)
	cloned(t, temp, from, 0, 0, mib)
	holds(t, temp, 0, data)

	striped, err := file.TempStriped(d.dir, mib, 64*kib, 4)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := striped.Close(); err != nil {
			t.Error(err)
		}
	}()
	for at := int64(0); at < mib; {
		to, offset, n, ok := striped.Remap(0, at, mib-at)
		if !ok {
			t.Fatal("no answer")
		}
		cloned(t, to.(*file.Device), from, offset, at, n)
		striped.Release(0)
		at += n
	}
	got := make([]byte, mib)
	if err := block.Read(striped, got, 0); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the striped device holds something else, %v", err)
	}
}
