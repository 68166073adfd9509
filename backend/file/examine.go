package file

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// pageSize in bytes: the least that is preferred for I/O.
const pageSize = 4096

// examineFile finds the size and the limits of a regular file.
func (d *Device) examineFile(st *unix.Stat_t) error {
	var fs unix.Statfs_t
	if err := retry(func() error { return unix.Fstatfs(d.fd, &fs) }); err != nil {
		return fmt.Errorf("fstatfs: %w", err)
	}
	d.id = identity{device: st.Dev, inode: st.Ino}
	d.fsType, d.fsBlock = fs.Type, fs.Bsize
	d.inMemory = fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC
	if d.inMemory {
		d.sys = d.sys.brief()
	}
	d.size.Store(st.Size)
	l := &d.limits
	l.LogicalBlock = 1
	if d.direct {
		if err := d.findAlignment(); err != nil {
			return err
		}
		if err := d.checkDirect(st.Size); err != nil {
			return err
		}
	}
	l.PreferredIO = max(int(st.Blksize), pageSize, l.LogicalBlock)
	l.WriteZeroesMax = math.MaxInt64 // at worst they are written
	if d.limits.ReadOnly || d.canPunch() {
		l.DiscardMax = math.MaxInt64
		l.DiscardGranularity = max(int64(st.Blksize), 1)
	}
	return nil
}

// canPunch tries to punch a hole behind the end of the file, which changes nothing.
func (d *Device) canPunch() bool {
	err := retry(func() error { return d.sys.fallocate(d.fd, punchMode, d.Size(), pageSize) })
	d.noPunch.Store(absent(err))
	return !absent(err)
}

// findAlignment finds what direct I/O on a regular file must be aligned to: the kernel's word if it gives one, else
// the smaller of 512 and 4096 that a read is accepted with.
func (d *Device) findAlignment() error {
	var stx unix.Statx_t
	err := retry(func() error { return unix.Statx(d.fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &stx) })
	if err == nil && stx.Mask&unix.STATX_DIOALIGN != 0 && stx.Dio_offset_align > 0 {
		d.limits.LogicalBlock = int(stx.Dio_offset_align)
		d.memoryAlign = int(max(stx.Dio_mem_align, 1))
		return nil
	}
	p := aligned(make([]byte, 2*memoryAlignMax), memoryAlignMax)
	for _, size := range []int{512, 4096} {
		err = retry(func() error { _, err := d.sys.pread(d.fd, p[:size], 0); return err })
		if err == nil {
			d.limits.LogicalBlock, d.memoryAlign = size, size
			return nil
		}
		if !errors.Is(err, unix.EINVAL) {
			break
		}
	}
	return fmt.Errorf("direct I/O: a trial read failed: %w", err)
}

// checkDirect tells whether direct I/O reaches all of a regular file of size bytes.
func (d *Device) checkDirect(size int64) error {
	if size%int64(d.limits.LogicalBlock) != 0 {
		return fmt.Errorf("direct I/O is not possible: the size %d is not a multiple of the block size %d: %w",
			size, d.limits.LogicalBlock, unix.EINVAL)
	}
	return nil
}

// examineBlock finds the size and the limits of a block device.
func (d *Device) examineBlock(st *unix.Stat_t) error {
	logical, err := unix.IoctlGetInt(d.fd, unix.BLKSSZGET)
	if err != nil {
		return fmt.Errorf("BLKSSZGET: %w", err)
	}
	physical, err := unix.IoctlGetUint32(d.fd, unix.BLKPBSZGET)
	if err != nil {
		return fmt.Errorf("BLKPBSZGET: %w", err)
	}
	l := &d.limits
	l.LogicalBlock = logical
	if readOnly, err := unix.IoctlGetInt(d.fd, unix.BLKROGET); err == nil && readOnly != 0 {
		l.ReadOnly, l.NeedsFlush = true, false // root may open it for writing all the same
	}
	size, err := d.blockSize()
	if err != nil {
		return err
	}
	d.size.Store(size)
	if d.direct {
		d.memoryAlign = logical
	}
	d.id = identity{device: st.Rdev, isBlock: true}
	queue := sysfsQueue(st.Rdev)
	l.PreferredIO = max(int(physical), pageSize, logical)
	l.WriteZeroesMax = math.MaxInt64
	if number(queue, "discard_max_bytes") > 0 {
		l.DiscardMax = math.MaxInt64 // the kernel splits what is longer than its own limit
		l.DiscardGranularity = max(number(queue, "discard_granularity"), int64(logical))
	}
	d.fastZeroout = number(queue, "write_zeroes_max_bytes") > 0
	return nil
}

// blockSize is the size in bytes that a block device has now, in whole logical blocks.
func (d *Device) blockSize() (int64, error) {
	size, err := d.sys.seek(d.fd, 0, unix.SEEK_END)
	if err != nil {
		return 0, fmt.Errorf("lseek: %w", err)
	}
	logical := int64(d.limits.LogicalBlock)
	return size / logical * logical, nil
}

// sysfsQueue is the directory of the attributes of a block device's queue; a partition has that of its disk.
func sysfsQueue(device uint64) string {
	dir := fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(device), unix.Minor(device))
	if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
		// Not filepath.Join: dir is a symbolic link, and the disk is the parent of what it points to.
		return dir + "/../queue"
	}
	return dir + "/queue"
}

// number is the attribute name in dir; 0 when there is none.
func number(dir, name string) int64 {
	n, err := readNumber(dir, name)
	if err != nil {
		return 0
	}
	return n
}

// readNumber reads the attribute name in dir.
func readNumber(dir, name string) (int64, error) {
	text, err := os.ReadFile(dir + "/" + name)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
}
