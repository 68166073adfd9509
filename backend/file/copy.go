package file

import (
	"errors"
	"fmt"
	"math/bits"

	"golang.org/x/sys/unix"

	"cowherd/block"
	"cowherd/internal/invariant"
)

const (
	// cloneMaxDefault is the longest clone of one call, in bytes. While it runs the kernel holds the locks of both files,
	// so that their other users wait, and it begins by writing back what is dirty in the two ranges. A call costs ten
	// microseconds whatever its length, of which only copies of whole images on an idle machine see anything.
	cloneMaxDefault = 64 << 20
	// serverMax and serverAtOnce are the same for a server: bytes of one call, and calls in flight that hide the time
	// of a round trip. A server may do less (Linux's nfsd stops after 4 MiB), which is a short copy.
	serverMax    = 16 << 20
	serverAtOnce = 4
	// serverGranularity in bytes: page cache and server would share what is not a whole page.
	serverGranularity = pageSize
)

// CopyOffers implements block.Copier: clones between files of one file system that shares blocks, the NVMe Copy command
// within one namespace, and last a copy by the server of a network file system.
func (d *Device) CopyOffers(source block.Device) []block.CopyOffer {
	s, ok := source.(*Device)
	if !ok || d.limits.ReadOnly || d.isBlock != s.isBlock || !d.beginCopy(s) {
		return nil
	}
	defer d.endCopy(s)
	if d.isBlock {
		return d.commandOffers(s)
	}
	var offers []block.CopyOffer
	if d.clones(s) {
		longest := max(d.cloneMax&^(d.fsBlock-1), d.fsBlock)
		offers = append(offers, block.CopyOffer{
			Method: block.CopyClone, Granularity: d.fsBlock, TailAtEnd: true, LengthMax: longest, Concurrency: 1,
			// XFS marks both files as ones that share blocks. From then on each write looks in the file system's tree of
			// shared blocks: one clone of 4 KiB made writes of 16 KiB through the page cache take 2 us more, a third.
			Lasting: d.fsType == unix.XFS_SUPER_MAGIC,
		})
	}
	if d.copiesAtServer(s) {
		offers = append(offers, block.CopyOffer{
			Method: block.CopyServer, Granularity: serverGranularity, TailAtEnd: true, LengthMax: serverMax,
			Concurrency: serverAtOnce,
		})
	}
	return offers
}

// Copy implements block.Copier. What has made a method impossible is the cause of its ENOTSUP.
func (d *Device) Copy(method block.CopyMethod, source block.Device, from, to, length int64) (int64, error) {
	s, ok := source.(*Device)
	if !ok {
		return 0, d.wrapCopy(to, length, fmt.Errorf("from a %T: %w", source, unix.ENOTSUP))
	}
	if !d.beginCopy(s) {
		return 0, d.wrapCopy(to, length, &block.Error{Op: block.OpWrite, Offset: to, Length: length,
			Errno: unix.ESHUTDOWN, Err: errClosed})
	}
	defer d.endCopy(s)
	n, err := d.copyFrom(method, s, from, to, length)
	if err != nil {
		err = d.wrapCopy(to, length, fmt.Errorf("%s from %s at %d: %w", method, s.path, from, err))
	}
	return n, err
}

// copyFrom is Copy between two devices that are counted.
func (d *Device) copyFrom(method block.CopyMethod, s *Device, from, to, length int64) (int64, error) {
	invariant.Check(min(from, to, length) >= 0 && from <= s.Size()-length && to <= d.Size()-length,
		"copy of %d bytes from %d to %d, out of %d and %d", length, from, to, s.Size(), d.Size())
	if d.limits.ReadOnly {
		return 0, unix.EROFS
	}
	if f := d.failure.Load(); f != nil {
		return 0, f
	}
	if f := s.failure.Load(); f != nil {
		// What a failed device reads from the page cache may never have reached the disk: it must be read.
		return 0, absence{f}
	}
	if length == 0 {
		return 0, nil
	}
	switch {
	case method == block.CopyClone && d.mayClone(s):
		return d.clone(s, from, to, length)
	case method == block.CopyServer && d.copiesAtServer(s):
		return d.copyAtServer(s, from, to, length)
	case method == block.CopyDevice && d.isBlock && s.isBlock:
		return d.copyByCommand(s, from, to, length)
	}
	return 0, unix.ENOTSUP
}

// beginCopy counts a copy from s as a request in flight of both devices; false, and it is not, when one is closed.
func (d *Device) beginCopy(s *Device) bool {
	if !d.enter(d.queues.Index(0)) {
		return false
	}
	if !s.enter(s.queues.Index(0)) {
		d.leave(d.queues.Index(0))
		return false
	}
	return true
}

// endCopy takes back what beginCopy has counted.
func (d *Device) endCopy(s *Device) {
	s.leave(s.queues.Index(0))
	d.leave(d.queues.Index(0))
}

// absence is a reason why a method cannot be used although its errno says something else.
type absence struct{ cause error }

func (a absence) Error() string { return a.cause.Error() }
func (a absence) Unwrap() error { return a.cause }

// wrapCopy makes err an error of a copy to [to, to+length), with the errno that the contract of block.Copier asks for.
func (d *Device) wrapCopy(to, length int64, err error) error {
	r := &block.Request{Op: block.OpWrite, Offset: to, Length: length}
	e := block.WrapError(r, fmt.Errorf("file %s: copy: %w", d.path, err))
	switch {
	case errors.As(err, new(absence)):
		e.Errno = unix.ENOTSUP
	case errors.As(err, new(*failure)):
		e.Errno = unix.EIO // whatever the errno of the cause
	case absentForPair(err):
		e.Errno = unix.ENOTSUP
	}
	return e
}

// absentForPair tells whether err says that two files, or two descriptors of files, have no such method: the file
// system lacks it (ENOTSUP, ENOSYS, ENOTTY), they lie on two (EXDEV), their attributes or the kernel's configuration
// exclude it (EINVAL: one has checksums, the other has not; ETXTBSY: a swap file), or they are not open for it (EBADF:
// for appending), or the user may not (EPERM, EACCES).
func absentForPair(err error) bool {
	for _, errno := range []unix.Errno{
		unix.ENOTSUP, unix.ENOSYS, unix.ENOTTY, unix.EXDEV, unix.EINVAL, unix.ETXTBSY, unix.EBADF, unix.EPERM, unix.EACCES,
	} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// fits tells whether a range can be copied in units of so many bytes, a power of two: the length may be any where it
// ends both devices.
func (d *Device) fits(s *Device, from, to, length, unit int64) bool {
	if (from|to)&(unit-1) != 0 {
		return false
	}
	return length&(unit-1) == 0 || from+length == s.Size() && to+length == d.Size()
}

// overlaps tells whether the two ranges are of one file and have bytes in common.
func (d *Device) overlaps(s *Device, from, to, length int64) bool {
	return d.id == s.id && from < to+length && to < from+length
}

// mayClone tells whether both files are on file systems of one kind that shares blocks.
func (d *Device) mayClone(s *Device) bool {
	return mayShare(d.fsType) && s.fsType == d.fsType && s.fsBlock == d.fsBlock && bits.OnesCount64(uint64(d.fsBlock)) == 1
}

// mayShare tells whether files share blocks on a type of file systems. ZFS is not among them: there the call was known to
// miss dirty data (openzfs/zfs#15842).
func mayShare(fsType int64) bool {
	return fsType == unix.XFS_SUPER_MAGIC || fsType == unix.BTRFS_SUPER_MAGIC
}

// clones tells whether the kernel clones from s to d. It is asked for a range that lies behind the end of every file:
// that is refused with EINVAL after all questions about the two files themselves, and changes nothing.
func (d *Device) clones(s *Device) bool {
	if !d.mayClone(s) {
		return false
	}
	err := retry(func() error { return d.sys.clone(d.fd, s.fd, nowhere, 0, d.fsBlock) })
	return errors.Is(err, unix.EINVAL)
}

// nowhere is an offset behind the end of every file, and a multiple of the block of every file system.
const nowhere = 1 << 62

// clone lets d share a range of s.
//
// EINVAL says little. Where nothing forbids a clone, XFS gives it also when one fails in the middle: the cause is then
// found by asking for less, until the call succeeds (a short copy) or has nothing done before it fails.
func (d *Device) clone(s *Device, from, to, length int64) (int64, error) {
	if !d.fits(s, from, to, length, d.fsBlock) || d.overlaps(s, from, to, length) {
		return 0, nil
	}
	if err := d.checkEnd(); err != nil { // the clone would make the file longer again
		return 0, err
	}
	for {
		err := retry(func() error { return d.sys.clone(d.fd, s.fd, from, to, length) })
		if err == nil {
			return length, nil
		}
		if !errors.Is(err, unix.EINVAL) {
			return 0, named("FICLONERANGE", err)
		}
		if err := d.checkEnd(); err != nil {
			return 0, err
		}
		if err := s.checkEnd(); err != nil {
			return 0, absence{err}
		}
		if length < d.fsBlock {
			return 0, nil // a tail of files that have become longer than the devices
		}
		if length == d.fsBlock {
			return 0, named("FICLONERANGE", err)
		}
		length = (length/2 + d.fsBlock - 1) &^ (d.fsBlock - 1)
	}
}

// copiesAtServer tells whether both files are on network file systems of one kind that has a copy at the server. Which
// server it is, and whether it copies, is for the kernel to find; where it finds that it cannot, the kernel reads and
// writes by itself, and nobody is told.
func (d *Device) copiesAtServer(s *Device) bool {
	switch d.fsType {
	case unix.NFS_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.CEPH_SUPER_MAGIC:
		return s.fsType == d.fsType
	}
	return false
}

// copyAtServer is one copy_file_range.
func (d *Device) copyAtServer(s *Device, from, to, length int64) (int64, error) {
	if !d.fits(s, from, to, length, serverGranularity) || d.overlaps(s, from, to, length) {
		return 0, nil
	}
	if err := d.checkEnd(); err != nil {
		return 0, err
	}
	var n int64
	err := retry(func() (err error) { n, err = d.sys.copyRange(d.fd, s.fd, from, to, length); return err })
	if err != nil {
		return 0, named("copy_file_range", err)
	}
	if n == 0 {
		if err := s.checkEnd(); err != nil {
			return 0, absence{err}
		}
	}
	return n, nil
}

// checkEnd lets the device fail when its file has become shorter than the device.
func (d *Device) checkEnd() error {
	known := d.Size() // before the file is asked: Grow changes the file first
	size, err := d.sys.size(d.fd)
	if err != nil {
		return d.fail(fmt.Errorf("fstat: %w", err))
	}
	if size < known {
		return d.truncated(size)
	}
	return nil
}
