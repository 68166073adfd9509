package file

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"cowherd/internal/percpu"
)

// Options say how a file is opened. The zero value: for writing, by the page cache, and for nobody else.
type Options struct {
	// ReadOnly opens for reading only.
	ReadOnly bool
	// Direct does I/O past the page cache (O_DIRECT). The device then has the alignment that the disk wants.
	Direct bool
	// Shared leaves out the lock that keeps a regular file from other openers.
	Shared bool
	// Allocate gives a new file all its blocks at once (Create only), so that no write to it finds the disk full unless
	// it has come to share blocks with another file. Without it the file begins as one hole.
	Allocate bool
	// CloneMax is the longest clone to the file that is made by one call, in bytes; 0: what suits files that are in use
	// meanwhile, since each call keeps the other users of both files waiting.
	CloneMax int64
}

// Open opens a regular file or a block device, which keeps the size it has now. A regular file is locked (one writer,
// or any number of readers, as far as openers take such locks); a block device that is opened for writing is refused
// when it is mounted or otherwise in use. Both give EBUSY.
func Open(path string, o Options) (*Device, error) {
	var st unix.Stat_t
	if err := retry(func() error { return unix.Stat(path, &st) }); err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	if err := checkType(st.Mode); err != nil { // before opening it, which may wait (a FIFO) or have effects (a tape)
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	flags := os.O_RDWR
	if o.ReadOnly {
		flags = os.O_RDONLY
	} else if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		flags |= os.O_EXCL
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return nil, err
	}
	return take(f, o)
}

// Create makes a regular file of size bytes that reads as zeroes, for its owner only, and opens it. It fails with EEXIST
// when the name is taken, and when o.Allocate asks for it with ENOSPC when there is no room, or ENOTSUP when the file
// system cannot allocate ahead; no file is left behind.
func Create(path string, size int64, o Options) (*Device, error) {
	if o.ReadOnly {
		return nil, fmt.Errorf("create %s: read-only: %w", path, unix.EINVAL)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	var d *Device
	if err = f.Truncate(size); err == nil && o.Allocate && size > 0 {
		err = retry(func() error { return unix.Fallocate(int(f.Fd()), 0, 0, size) })
		if err != nil {
			err = fmt.Errorf("create %s: allocate %d bytes: %w", path, size, err)
		}
	}
	if err != nil {
		err = errors.Join(err, f.Close())
	} else {
		d, err = take(f, o)
	}
	if err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	return d, nil
}

// take is New, with direct I/O if o wants it.
func take(f *os.File, o Options) (*Device, error) {
	if o.Direct {
		if err := setDirect(f); err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	return New(f, o)
}

// setDirect turns direct I/O on. Opening with the flag would leave a new file behind where that is impossible.
func setDirect(f *os.File) error {
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_SETFL, flags|unix.O_DIRECT)
	}
	if err != nil {
		return fmt.Errorf("open %s: the file system has no direct I/O: %w", f.Name(), err)
	}
	return nil
}

// Temp opens a new file of size bytes, all holes, that has no name and vanishes when it is closed, in the file system
// of directory dir.
func Temp(dir string, size int64) (*Device, error) {
	f, err := unnamed(dir)
	if err != nil {
		return nil, err
	}
	if err := f.Truncate(size); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	d, err := New(f, Options{Shared: true})
	if err != nil {
		return nil, err
	}
	d.path = filepath.Join(dir, "(temporary)")
	return d, nil
}

// unnamed makes a file in dir that has no name.
func unnamed(dir string) (*os.File, error) {
	f, err := os.OpenFile(dir, os.O_RDWR|os.O_EXCL|unix.O_TMPFILE, 0o600)
	if err == nil {
		return f, nil
	}
	// A kernel or file system without O_TMPFILE takes it for opening a directory.
	if !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EINVAL) {
		return nil, err
	}
	return removed(dir)
}

// removed makes a file in dir and takes its name away.
func removed(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, ".cowherd-*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// New makes a device of an open file, which it takes over and closes, whether it succeeds or not. How the file was
// opened wins over o.ReadOnly and o.Direct.
func New(f *os.File, o Options) (*Device, error) {
	// The descriptor must be ours: a garbage-collected os.File closes its own.
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("file %s: F_DUPFD_CLOEXEC: %w", f.Name(), err), f.Close())
	}
	if err := f.Close(); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("file %s: F_GETFL: %w", f.Name(), err), unix.Close(fd))
	}
	if flags&unix.O_ACCMODE == unix.O_WRONLY {
		return nil, errors.Join(fmt.Errorf("file %s: it is open for writing only: %w", f.Name(), unix.EINVAL), unix.Close(fd))
	}
	if flags&unix.O_APPEND != 0 && flags&unix.O_ACCMODE != unix.O_RDONLY {
		return nil, errors.Join(fmt.Errorf("file %s: it is open for appending, which puts every write at its end: %w",
			f.Name(), unix.EINVAL), unix.Close(fd))
	}
	o.ReadOnly = flags&unix.O_ACCMODE == unix.O_RDONLY
	o.Direct = flags&unix.O_DIRECT != 0
	return newDevice(fd, f.Name(), o)
}

// newDevice makes a device of fd, which it owns from now on.
func newDevice(fd int, path string, o Options) (*Device, error) {
	d := &Device{
		path:        path,
		fd:          fd,
		sys:         kernelCalls(),
		direct:      o.Direct,
		memoryAlign: 1,
		cloneMax:    cmp.Or(o.CloneMax, cloneMaxDefault),
		queues:      percpu.New[queue](),
		idle:        make(chan struct{}, 1),
	}
	d.nvme = sync.OnceValues(d.findNamespace)
	d.limits.ReadOnly = o.ReadOnly
	d.limits.NeedsFlush = !o.ReadOnly
	d.workersMax = min(max(workersAll/d.queues.Len(), workersMin), workersMax)
	for i := range d.queues.Len() {
		q := d.queues.Index(i)
		q.run = func() { d.work(q) }
	}
	if err := d.examine(o); err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", path, err), unix.Close(fd))
	}
	return d, nil
}

// examine locks the file and finds its size and limits.
func (d *Device) examine(o Options) error {
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return fmt.Errorf("fstat: %w", err)
	}
	if err := checkType(st.Mode); err != nil {
		return err
	}
	d.isBlock = st.Mode&unix.S_IFMT == unix.S_IFBLK
	if !d.isBlock && !o.Shared {
		if err := d.lock(); err != nil {
			return err
		}
	}
	find := d.examineFile
	if d.isBlock {
		find = d.examineBlock
	}
	if err := find(&st); err != nil {
		return err
	}
	if !d.direct {
		_, err := d.sys.preadNowait(d.fd, make([]byte, 1), 0)
		d.nowait = err == nil || errors.Is(err, unix.EAGAIN)
	}
	return nil
}

// checkType refuses what is neither a regular file nor a block device.
func checkType(mode uint32) error {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFBLK:
		return nil
	case unix.S_IFDIR:
		return fmt.Errorf("it is a directory: %w", unix.EISDIR)
	}
	return fmt.Errorf("it is neither a regular file nor a block device: %w", unix.EINVAL)
}

// lock takes a lock on the whole file that belongs to the open file: it conflicts with other openers in this process
// too, and goes when the file is closed.
func (d *Device) lock() error {
	l := unix.Flock_t{Type: unix.F_WRLCK}
	if d.limits.ReadOnly {
		l.Type = unix.F_RDLCK
	}
	err := retry(func() error { return unix.FcntlFlock(uintptr(d.fd), unix.F_OFD_SETLK, &l) })
	switch {
	case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES):
		return fmt.Errorf("it is locked by another program, or is already open here: %w", unix.EBUSY)
	case absent(err) || errors.Is(err, unix.EINVAL):
		return nil // a file system without such locks
	}
	return named("F_OFD_SETLK", err)
}
