package file

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// calls are the system calls that a device makes for requests: what a test replaces to see a disk fail.
type calls struct {
	pread       func(fd int, p []byte, offset int64) (int, error)
	preadNowait func(fd int, p []byte, offset int64) (int, error)
	pwrite      func(fd int, p []byte, offset int64) (int, error)
	pwriteDsync func(fd int, p []byte, offset int64) (int, error)
	fdatasync   func(fd int) error
	fallocate   func(fd int, mode uint32, offset, length int64) error
	discard     func(fd int, offset, length int64) error
	zeroout     func(fd int, offset, length int64) error
	seek        func(fd int, offset int64, whence int) (int64, error)
	size        func(fd int) (int64, error)
}

// kernelCalls are the real ones.
func kernelCalls() calls {
	return calls{
		pread:       unix.Pread,
		preadNowait: preadNowait,
		pwrite:      unix.Pwrite,
		pwriteDsync: pwriteDsync,
		fdatasync:   unix.Fdatasync,
		fallocate:   unix.Fallocate,
		discard:     func(fd int, offset, length int64) error { return rangeIoctl(fd, unix.BLKDISCARD, offset, length) },
		zeroout:     func(fd int, offset, length int64) error { return rangeIoctl(fd, unix.BLKZEROOUT, offset, length) },
		seek:        unix.Seek,
		size:        size,
	}
}

// preadNowait reads what is in the page cache; EAGAIN, or less than was asked for, where the disk would be needed.
func preadNowait(fd int, p []byte, offset int64) (int, error) {
	return unix.Preadv2(fd, [][]byte{p}, offset, unix.RWF_NOWAIT)
}

// pwriteDsync writes and returns when the data is durable.
func pwriteDsync(fd int, p []byte, offset int64) (int, error) {
	return unix.Pwritev2(fd, [][]byte{p}, offset, unix.RWF_DSYNC)
}

// rangeIoctl makes an ioctl of a block device that takes a range.
func rangeIoctl(fd int, request uint, offset, length int64) error {
	arg := [2]uint64{uint64(offset), uint64(length)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(unsafe.Pointer(&arg)))
	if errno != 0 {
		return errno
	}
	return nil
}

// size is the length of a regular file.
func size(fd int) (int64, error) {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	return st.Size, err
}
