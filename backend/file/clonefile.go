package file

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// CloneOptions say how CloneFile makes a clone.
type CloneOptions struct {
	// Shared leaves out the lock on the source, and clones one that another program writes to.
	Shared bool
	// Flush makes the clone durable, with its name.
	Flush bool
	// CloneMax is the longest clone of one call, in bytes; 0: all at once.
	CloneMax int64
	// Progress, if there is one, is told of each call: so many bytes of all have been cloned. It is called on the
	// caller's goroutine.
	Progress func(done, size int64)
}

// Cloned is what CloneFile has done.
type Cloned struct {
	Size    int64 // in bytes
	Changed bool  // the source has been written meanwhile
}

// CloneFile makes the file to, which is not there, a clone of all of the regular file from, with its permissions but for
// those to execute. It does no more than that takes: to open the two and to close them as devices would take longer than
// to clone.
//
//	source        is a file that nobody writes to; lock it
//	destination   a file without a name (O_TMPFILE) in the directory of to, so that what is incomplete vanishes with
//	              the process, whatever ends it, and nobody else opens it
//	clone         FICLONERANGE, where both are on XFS, or on btrfs (see mayClone)
//	link          under the name to, which must not have come to be there
//	flush         fdatasync, and fsync of the directory: in this order one flush of the file system's journal has both
//
// ENOTSUP: it has not been made, and nothing has changed. It is not possible, or takes more than this; Open and Copy find
// out what it is. Another error is one of the flush: then to has been removed.
func CloneFile(from, to string, o CloneOptions) (Cloned, error) {
	return cloneFile(kernelCalls(), from, to, o)
}

func cloneFile(sys calls, from, to string, o CloneOptions) (c Cloned, err error) {
	source, before, err := openCloned(from, o.Shared)
	if err != nil {
		return c, notCloned(err)
	}
	defer unix.Close(source) // it is read only
	dir := filepath.Dir(to)
	if err := sharesBlocks(sys, source); err != nil || before.Size == 0 { // before anything is made elsewhere
		return c, notCloned(err)
	}
	fd, err := openRetrying(dir, unix.O_RDWR|unix.O_TMPFILE, before.Mode&0o666)
	if err != nil {
		return c, notCloned(err)
	}
	c.Size = before.Size
	if err = cloneAll(sys, fd, source, c.Size, o); err == nil { // locked until it is durable, as a Device would be
		err = unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
	}
	if err == nil {
		// Not AT_EMPTY_PATH, which asks for a capability before Linux 6.10.
		name := "/proc/self/fd/" + strconv.Itoa(fd)
		err = unix.Linkat(unix.AT_FDCWD, name, unix.AT_FDCWD, to, unix.AT_SYMLINK_FOLLOW)
	}
	if err != nil {
		return c, errors.Join(notCloned(err), unix.Close(fd))
	}
	if o.Flush {
		err = named("fdatasync", retry(func() error { return sys.fdatasync(fd) }))
	}
	err = errors.Join(err, named("close", unix.Close(fd)))
	if err == nil && o.Flush {
		err = syncDirectory(dir)
	}
	if err != nil {
		return c, errors.Join(fmt.Errorf("file %s: %w", to, err), named("unlink", unix.Unlink(to)))
	}
	var after unix.Stat_t
	err = unix.Stat(from, &after)
	c.Changed = err != nil || after.Dev != before.Dev || after.Ino != before.Ino || after.Mtim != before.Mtim
	return c, nil
}

// notCloned is ENOTSUP, whatever the cause is.
func notCloned(cause error) error { return fmt.Errorf("no clone: %w (%v)", unix.ENOTSUP, cause) }

// openRetrying opens a file that the process keeps to itself.
func openRetrying(path string, flags int, mode uint32) (fd int, err error) {
	err = retry(func() (err error) { fd, err = unix.Open(path, flags|unix.O_CLOEXEC, mode); return err })
	return fd, err
}

// openCloned opens and locks the file that is to be cloned.
func openCloned(path string, shared bool) (fd int, st unix.Stat_t, err error) {
	if err := unix.Stat(path, &st); err != nil { // before opening it, see Open
		return -1, st, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return -1, st, unix.EINVAL
	}
	if fd, err = openRetrying(path, unix.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
		return -1, st, err
	}
	if err = unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = unix.EINVAL
	}
	if err == nil && !shared {
		err = lockCloned(fd)
	}
	if err != nil {
		return -1, st, errors.Join(err, unix.Close(fd))
	}
	return fd, st, nil
}

// lockCloned locks a file for reading, unless it is open for writing elsewhere.
func lockCloned(fd int) error {
	if writes, err := qemuWrites(fd); writes || err != nil {
		return errors.Join(err, unix.EBUSY)
	}
	return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK})
}

// QemuWrites tells whether qemu has a file open for writing. qemu takes locks for reading only, on a byte for each
// permission, which the lock on the whole file that a Device takes does not meet: that at 100 + 1 stands for writing
// (block/file-posix.c of qemu, raw_apply_lock_bytes).
func QemuWrites(path string) (bool, error) {
	fd, err := openRetrying(path, unix.O_RDONLY, 0)
	if err != nil {
		return false, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd) // it is read only
	writes, err := qemuWrites(fd)
	return writes && err == nil, nil
}

// qemuWrites is QemuWrites for an open file. The error is of a file system without such locks.
func qemuWrites(fd int) (bool, error) {
	const permissionToWrite = 100 + 1
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: permissionToWrite, Len: 1}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l); err != nil {
		return false, err
	}
	whole := l.Start == 0 // a reader or writer as cowherd is one, which the lock meets
	return l.Type != unix.F_UNLCK && !whole, nil
}

// sharesBlocks is an error unless a file is on a file system on which files are cloned.
func sharesBlocks(sys calls, fd int) error {
	t, err := sys.fsType(fd)
	if err == nil && !mayShare(t) {
		err = unix.ENOTSUP
	}
	return err
}

// cloneAll makes the empty file fd a clone of all size bytes of the file source.
func cloneAll(sys calls, fd, source int, size int64, o CloneOptions) error {
	if err := sharesBlocks(sys, fd); err != nil {
		return err
	}
	longest := o.CloneMax
	if longest <= 0 {
		longest = size
	}
	for at := int64(0); at < size; { // the kernel refuses it between two file systems
		n := min(longest, size-at)
		if err := retry(func() error { return sys.clone(fd, source, at, at, n) }); err != nil {
			return named("FICLONERANGE", err)
		}
		at += n
		if o.Progress != nil {
			o.Progress(at, size)
		}
	}
	has, err := sys.size(fd)
	if err == nil && has != size {
		err = unix.EINVAL
	}
	return err
}

// syncDirectory makes durable what names there are in a directory.
func syncDirectory(path string) error {
	fd, err := openRetrying(path, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	err = retry(func() error { return unix.Fsync(fd) })
	return errors.Join(named("fsync "+path, err), unix.Close(fd))
}
