package file

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"cowherd/block"
)

// Extents tells by SEEK_DATA and SEEK_HOLE which ranges hold data; what is allocated but was never written counts as a
// hole. All is data on a block device, and on a file system that cannot tell. The look-ups move the descriptor's
// offset, which nothing depends on, so they need no lock.
func (d *Device) Extents(offset, length int64, yield func(block.Extent) bool) error {
	q := d.queues.Index(0)
	if !d.enter(q) {
		return fmt.Errorf("extents of file %s: %w", d.path, errClosed)
	}
	defer d.leave(q)
	for end := offset + length; offset < end; {
		e, err := d.extent(offset)
		if err != nil {
			return fmt.Errorf("extents of file %s: %w", d.path, err)
		}
		e.Length = min(e.Length, end-offset)
		if !yield(e) {
			return nil
		}
		offset += e.Length
	}
	return nil
}

// extent is the extent that starts at offset. It ends at the end of the device at the latest.
func (d *Device) extent(offset int64) (block.Extent, error) {
	e := block.Extent{Offset: offset, Length: d.Size() - offset}
	if d.isBlock || d.noSeek.Load() {
		return e, nil
	}
	data, err := d.sys.seek(d.fd, offset, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // no data until the end of the file
		return d.lastHole(e)
	case errors.Is(err, unix.EINVAL) || absent(err):
		d.noSeek.Store(true)
		return e, nil
	case err != nil:
		return e, fmt.Errorf("lseek: %w", err)
	case data > offset:
		e.Hole, e.Zero = true, true
		e.Length = min(e.Length, data-offset)
		return e, nil
	}
	hole, err := d.sys.seek(d.fd, offset, unix.SEEK_HOLE)
	switch {
	case errors.Is(err, unix.ENXIO):
		return d.lastHole(e)
	case err != nil:
		return e, fmt.Errorf("lseek: %w", err)
	case hole > offset: // else a hole was punched between the two calls: called data, which does no harm
		e.Length = min(e.Length, hole-offset)
	}
	return e, nil
}

// lastHole makes e, which reaches to the end of the device, a hole, unless the file is shorter than that.
func (d *Device) lastHole(e block.Extent) (block.Extent, error) {
	known := d.Size() // before the file is asked: Grow changes the file first
	size, err := d.sys.size(d.fd)
	if err != nil {
		return e, fmt.Errorf("fstat: %w", err)
	}
	if size < known {
		return e, d.truncated(size)
	}
	e.Hole, e.Zero = true, true
	return e, nil
}
