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
	truncate    func(fd int, size int64) error

	// For copies to another descriptor.
	fsType    func(fd int) (int64, error)
	clone     func(to, from int, source, destination, length int64) error
	copyRange func(to, from int, source, destination, length int64) (int64, error)
	nvme      func(fd int, request uint, c *nvmeCommand) (status int, err error)
	writeBack func(fd int, offset, length int64) error
	uncache   func(fd int, offset, length int64) error
	cached    func(fd int, offset, length int64) (pages uint64, err error)
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
		truncate:    unix.Ftruncate,
		fsType:      fsType,
		clone:       cloneRange,
		copyRange:   copyRange,
		nvme:        nvme,
		writeBack:   writeBack,
		uncache:     uncache,
		cached:      cached,
	}
}

// briefMax is the longest transfer in bytes that is made without telling the scheduler.
const briefMax = 64 << 10

// brief are the calls for a file whose data is in memory. A transfer there is over in a microsecond or two, so it is
// made as if it were a copy: a call that tells the scheduler costs a tenth of a microsecond more, and while it runs
// another thread may take over the processor that it left, for which its own thread then has to wait.
func (c calls) brief() calls {
	pread, pwrite := c.pread, c.pwrite
	c.pread = func(fd int, p []byte, offset int64) (int, error) {
		if len(p) > briefMax {
			return pread(fd, p, offset)
		}
		return transfer(unix.SYS_PREAD64, fd, p, offset)
	}
	c.pwrite = func(fd int, p []byte, offset int64) (int, error) {
		if len(p) > briefMax {
			return pwrite(fd, p, offset)
		}
		return transfer(unix.SYS_PWRITE64, fd, p, offset)
	}
	return c
}

// transfer is pread or pwrite of p without a word to the scheduler.
func transfer(call uintptr, fd int, p []byte, offset int64) (int, error) {
	at := unsafe.Pointer(unsafe.SliceData(p))
	n, _, errno := unix.RawSyscall6(call, uintptr(fd), uintptr(at), uintptr(len(p)), uintptr(offset), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
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

// fsType is the type of the file system that a file is on.
func fsType(fd int) (int64, error) {
	var st unix.Statfs_t
	err := retry(func() error { return unix.Fstatfs(fd, &st) })
	return int64(st.Type), err
}

// cloneRange lets a range of the file to share the blocks of a range of the file from.
func cloneRange(to, from int, source, destination, length int64) error {
	return unix.IoctlFileCloneRange(to, &unix.FileCloneRange{
		Src_fd: int64(from), Src_offset: uint64(source), Src_length: uint64(length), Dest_offset: uint64(destination),
	})
}

// copyRange leaves a copy to the file system.
func copyRange(to, from int, source, destination, length int64) (int64, error) {
	n, err := unix.CopyFileRange(from, &source, to, &destination, int(length), 0)
	return int64(n), err
}

// nvme sends a command to an NVMe controller and waits for it. The status is that of its completion, 0 if all is well.
func nvme(fd int, request uint, c *nvmeCommand) (status int, err error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(unsafe.Pointer(c)))
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}

// writeBack writes what is dirty in a range of the page cache, and waits for it; the disk's own cache is not flushed.
func writeBack(fd int, offset, length int64) error {
	return unix.SyncFileRange(fd, offset, length,
		unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
}

// uncache drops from the page cache what it can of a range that is not dirty.
func uncache(fd int, offset, length int64) error {
	return unix.Fadvise(fd, offset, length, unix.FADV_DONTNEED)
}

// cached is how many pages of a range the page cache holds. ENOSYS: a kernel before 6.5 cannot tell.
func cached(fd int, offset, length int64) (pages uint64, err error) {
	var has unix.Cachestat_t
	err = unix.Cachestat(uint(fd), &unix.CachestatRange{Off: uint64(offset), Len: uint64(length)}, &has, 0)
	return has.Cache, err
}
