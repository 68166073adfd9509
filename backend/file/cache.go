package file

import (
	"golang.org/x/sys/unix"
)

// WriteBack starts to write a range from the page cache to the disk. It waits for room in the disk's queue, but not for
// the end, and is no flush: nothing is durable before one. Where there is nothing to start it does nothing.
func (d *Device) WriteBack(offset, length int64) error {
	q := d.queues.Index(0)
	if !d.enter(q) {
		return named("write back "+d.path, errClosed)
	}
	defer d.leave(q)
	if d.inMemory || d.direct || length <= 0 {
		return nil
	}
	err := retry(func() error { return unix.SyncFileRange(d.fd, offset, length, unix.SYNC_FILE_RANGE_WRITE) })
	if absent(err) {
		return nil
	}
	return named("write back "+d.path, named("sync_file_range", err))
}

// Settle writes a range from the page cache to the disk, and waits for the end. It is no flush: nothing is durable before
// one. An error ends the device, since a later flush would not tell it again. Where there is nothing to write it does
// nothing.
func (d *Device) Settle(offset, length int64) error {
	q := d.queues.Index(0)
	if !d.enter(q) {
		return named("settle "+d.path, errClosed)
	}
	defer d.leave(q)
	if d.inMemory || d.direct || length <= 0 {
		return nil
	}
	err := retry(func() error { return d.sys.writeBack(d.fd, offset, length) })
	if err == nil || absent(err) {
		return nil
	}
	return named("settle "+d.path, d.fail(named("sync_file_range", err)))
}

// DropCache makes later reads come from the disk: it makes durable what has been written, and lets the page cache go as
// far as nobody else uses it. In a file system in memory there is no other place to read from, and it does nothing.
func (d *Device) DropCache() error {
	q := d.queues.Index(0)
	if !d.enter(q) {
		return named("drop the cache of "+d.path, errClosed)
	}
	defer d.leave(q)
	if d.inMemory {
		return nil
	}
	if !d.limits.ReadOnly {
		if err := d.sync(); err != nil {
			return named("drop the cache of "+d.path, err)
		}
	}
	err := retry(func() error { return unix.Fadvise(d.fd, 0, 0, unix.FADV_DONTNEED) })
	return named("drop the cache of "+d.path, named("fadvise", err))
}
