package file

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Grow makes the device at least size bytes long while requests run on it: a regular file gets a hole at its end, a
// block device is taken as long as it is now. A size that the device has already changes nothing. ENOSPC: the block
// device is not that long; EFBIG: the file system takes no such file; EINVAL: direct I/O could not reach the end.
func (d *Device) Grow(size int64) error {
	q := d.queues.Index(0)
	if !d.enter(q) {
		return fmt.Errorf("grow file %s: %w", d.path, errClosed)
	}
	defer d.leave(q)
	d.growing.Lock()
	defer d.growing.Unlock()
	if size <= d.Size() {
		return nil
	}
	grow := d.growFile
	if d.isBlock {
		grow = d.growBlock
	}
	if err := grow(size); err != nil {
		return fmt.Errorf("grow file %s to %d bytes: %w", d.path, size, err)
	}
	return nil
}

// growFile makes a regular file longer. One that was made longer by others keeps what it has; one that was truncated is
// not grown again, which would hide the loss.
func (d *Device) growFile(size int64) error {
	if d.limits.ReadOnly {
		return unix.EROFS
	}
	if f := d.failure.Load(); f != nil {
		return f
	}
	if d.direct {
		if err := d.checkDirect(size); err != nil {
			return err
		}
	}
	has, err := d.sys.size(d.fd)
	if err != nil {
		return fmt.Errorf("fstat: %w", err)
	}
	if has < d.Size() {
		return d.truncated(has)
	}
	if has < size {
		if err := retry(func() error { return d.sys.truncate(d.fd, size) }); err != nil {
			return fmt.Errorf("ftruncate: %w", err)
		}
	}
	d.size.Store(size) // after the file has it: who finds the file shorter than this calls it truncated
	return nil
}

// growBlock takes the size that a block device has now.
func (d *Device) growBlock(size int64) error {
	has, err := d.blockSize()
	if err != nil {
		return err
	}
	if has < size {
		return fmt.Errorf("the block device has %d bytes: %w", has, unix.ENOSPC)
	}
	d.size.Store(has)
	return nil
}
