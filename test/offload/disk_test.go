package offload

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"cowherd/backend/file"
)

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30
)

// fileSystem is a kind of file system.
type fileSystem struct {
	name   string
	mkfs   []string // the program that makes it and its options; nil: it needs no disk
	shares bool     // blocks, between files
	again  string   // the option that mounts a copy of one that is mounted
}

var (
	xfs   = fileSystem{"xfs", []string{"mkfs.xfs", "-q", "-m", "reflink=1"}, true, "nouuid"}
	btrfs = fileSystem{"btrfs", []string{"mkfs.btrfs", "-q", "-m", "single"}, true, ""}
	// btrfsMixed keeps data and metadata in one place, so that it is full when it is full.
	btrfsMixed = fileSystem{"btrfs", []string{"mkfs.btrfs", "-q", "--mixed"}, true, ""}
	ext4       = fileSystem{"ext4", []string{"mkfs.ext4", "-q"}, false, ""}
	tmpfs      = fileSystem{"tmpfs", nil, false, ""}

	sharing     = []fileSystem{xfs, btrfs}
	fileSystems = []fileSystem{xfs, btrfs, ext4, tmpfs}
)

// diskSize is the size in bytes of a disk that is large enough for most: its file takes only what is written.
const diskSize = 1 * gib

// image makes a file of size bytes in directory dir that has no name.
func image(t testing.TB, dir string, size int64) *os.File {
	t.Helper()
	f, err := os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o600)
	if err != nil {
		t.Skipf("no file without a name in %s: %v", dir, err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

// loop attaches a file to a loop device, which ends with the last who has it open or mounted; the caller closes it.
func loop(t testing.TB, image *os.File) *os.File {
	t.Helper()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no loop devices: %v", err)
	}
	defer control.Close()
	config := &unix.LoopConfig{
		Fd: uint32(image.Fd()), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR},
	}
	for range 100 {
		number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Skipf("no free loop device: %v", err)
		}
		device, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", number), os.O_RDWR, 0)
		if err != nil {
			t.Skipf("the loop device cannot be opened: %v", err)
		}
		if err = unix.IoctlLoopConfigure(int(device.Fd()), config); err == nil {
			return device
		}
		_ = device.Close()
		if !errors.Is(err, unix.EBUSY) { // else somebody else was faster
			t.Skipf("the file cannot be attached to a loop device: %v", err)
		}
	}
	t.Skip("loop devices are always taken by others")
	return nil
}

// disk is a mounted file system on a disk of its own.
type disk struct {
	t     testing.TB
	kind  fileSystem
	image *os.File // below the loop device; nil without a disk
	dir   string
}

// mounted makes a disk of size bytes with a file system, below which is a file in memory, and mounts it until the end
// of the test.
func mounted(t testing.TB, kind fileSystem, size int64) *disk {
	t.Helper()
	return mountedOver(t, kind, size, "/dev/shm")
}

// mountedOver is mounted over a file of directory below.
func mountedOver(t testing.TB, kind fileSystem, size int64, below string) *disk {
	t.Helper()
	if os.Getenv(insideName) == "" {
		t.Skip("only root may mount file systems")
	}
	d := &disk{t: t, kind: kind}
	if kind.mkfs == nil {
		d.mount(kind.name, fmt.Sprintf("size=%d", size))
		return d
	}
	program, err := exec.LookPath(kind.mkfs[0])
	if err != nil {
		t.Skipf("%s is missing", kind.mkfs[0])
	}
	d.image = image(t, below, size)
	device := loop(t, d.image)
	defer device.Close()
	if out, err := exec.Command(program, append(kind.mkfs[1:], device.Name())...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", program, err, out)
	}
	d.mount(device.Name(), "")
	return d
}

// remounted mounts what is on an image, as after a crash if it is a copy of the image of a mounted one.
func remounted(t testing.TB, kind fileSystem, image *os.File) *disk {
	t.Helper()
	device := loop(t, image)
	defer device.Close()
	d := &disk{t: t, kind: kind, image: image}
	d.mount(device.Name(), kind.again)
	return d
}

// mount mounts until the end of the test.
func (d *disk) mount(device, options string) {
	d.t.Helper()
	d.dir = d.t.TempDir()
	if err := unix.Mount(device, d.dir, d.kind.name, 0, options); err != nil {
		if errors.Is(err, unix.ENODEV) {
			d.t.Skipf("this kernel has no %s", d.kind.name)
		}
		d.t.Fatalf("mount %s of %s: %v", device, d.kind.name, err)
	}
	d.t.Cleanup(d.unmount)
}

// unmount ends the mount; a second time it does nothing.
func (d *disk) unmount() {
	d.t.Helper()
	if d.dir == "" {
		return
	}
	// Somebody else may be looking at it just now, and the kernel may not be done with a file that was closed.
	err := unix.Unmount(d.dir, 0)
	for n := 0; errors.Is(err, unix.EBUSY) && n < 1000; n++ {
		time.Sleep(10 * time.Millisecond)
		err = unix.Unmount(d.dir, 0)
	}
	if err != nil {
		d.t.Errorf("unmount: %v", err)
	}
	d.dir = ""
}

// create makes a device on a new file, until the end of the test.
func (d *disk) create(name string, size int64, o file.Options) *file.Device {
	d.t.Helper()
	made, err := file.Create(filepath.Join(d.dir, name), size, o)
	if err != nil {
		d.t.Fatal(err)
	}
	return closing(d.t, made)
}

// remove takes the names of files away, so that others can have them.
func (d *disk) remove(list ...*file.Device) {
	d.t.Helper()
	for _, f := range list {
		if err := os.Remove(f.Path()); err != nil {
			d.t.Error(err)
		}
	}
}

// closing closes a device at the end of the test.
func closing(t testing.TB, d *file.Device) *file.Device {
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// used is how many bytes of the file system are taken, all that was written before included.
func (d *disk) used() int64 {
	d.t.Helper()
	f, err := os.Open(d.dir)
	if err != nil {
		d.t.Fatal(err)
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := errors.Join(unix.Syncfs(int(f.Fd())), unix.Statfs(d.dir, &st)); err != nil {
		d.t.Fatal(err)
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize
}

// ioctl makes an ioctl with a structure.
func ioctl(f *os.File, request uint, arg []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(request), uintptr(unsafe.Pointer(unsafe.SliceData(arg))))
	if errno != 0 {
		return errno
	}
	return nil
}
