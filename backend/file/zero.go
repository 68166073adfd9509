package file

import (
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"cowherd/block"
)

// Modes of fallocate. Both keep the size, so that a file which was truncated under us does not grow again.
const (
	punchMode     = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	zeroRangeMode = unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE
)

// discard gives a range back.
func (d *Device) discard(offset, length int64) error {
	if length == 0 {
		return nil
	}
	if d.isBlock {
		return named("BLKDISCARD", retry(func() error { return d.sys.discard(d.fd, offset, length) }))
	}
	done, err := d.fallocate(&d.noPunch, punchMode, offset, length)
	if !done {
		return fmt.Errorf("the file system cannot punch holes: %w", unix.ENOTSUP)
	}
	return err
}

// zero makes a range read as zeroes by the cheapest way there is.
func (d *Device) zero(offset, length int64, flags block.Flags) error {
	if length == 0 {
		return nil
	}
	zero := d.zeroFile
	if d.isBlock {
		zero = d.zeroBlock
	}
	if done, err := zero(offset, length, flags); done {
		return err
	}
	if flags&block.Fast != 0 {
		return fmt.Errorf("zeroes would have to be written: %w", unix.ENOTSUP)
	}
	for length > 0 {
		n := min(length, zeroSize)
		if err := d.write(aligned(zeroes[:], int(n)), offset, false); err != nil {
			return err
		}
		offset, length = offset+n, length-n
	}
	return nil
}

// zeroFile zeroes a range of a regular file: by a hole, or leaving it allocated by ZERO_RANGE. done: err is the result;
// else zeroes must be written, as for the latter on tmpfs. (A hole that is allocated again by another call would do
// there too, but costs as much and may find that the room is gone.)
func (d *Device) zeroFile(offset, length int64, flags block.Flags) (done bool, err error) {
	if flags&block.NoUnmap == 0 {
		if done, err := d.fallocate(&d.noPunch, punchMode, offset, length); done {
			return true, err
		}
	}
	return d.fallocate(&d.noZeroRange, zeroRangeMode, offset, length)
}

// zeroBlock zeroes a range of a block device: by what may unmap it, or leaving it allocated by BLKZEROOUT, which writes
// zeroes on devices that have no command for it.
func (d *Device) zeroBlock(offset, length int64, flags block.Flags) (done bool, err error) {
	if flags&block.NoUnmap == 0 {
		if done, err := d.fallocate(&d.noPunch, punchMode, offset, length); done {
			return true, err
		}
	}
	if d.noZeroout.Load() || flags&block.Fast != 0 && !d.fastZeroout {
		return false, nil
	}
	err = retry(func() error { return d.sys.zeroout(d.fd, offset, length) })
	if absent(err) {
		d.noZeroout.Store(true)
		return false, nil
	}
	return true, named("BLKZEROOUT", err)
}

// fallocate makes that call unless it is known to be missing. not done: it is missing, or cannot take this range.
func (d *Device) fallocate(missing *atomic.Bool, mode uint32, offset, length int64) (done bool, err error) {
	if missing.Load() {
		return false, nil
	}
	err = retry(func() error { return d.sys.fallocate(d.fd, mode, offset, length) })
	if absent(err) {
		missing.Store(true)
		return false, nil
	}
	if errors.Is(err, unix.EINVAL) {
		return false, nil
	}
	return true, named("fallocate", err)
}

// retry makes call until no signal interrupts it.
func retry(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// named puts the name of the system call before its error.
func named(name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", name, err)
}
