package file

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"cowherd/block"
)

const (
	// bounceSize is the size in bytes of the buffers for direct I/O whose data is not aligned in memory.
	bounceSize = 256 << 10
	// zeroSize is the size in bytes of one write of zeroes.
	zeroSize = 256 << 10
	// memoryAlignMax is the largest alignment that our own buffers have.
	memoryAlignMax = 4096
)

// zeroes is what zeroes are written from where the file system cannot make them itself. It is never written to, so it
// takes no memory.
var zeroes [zeroSize + memoryAlignMax]byte

// aligned is the part of p that starts at the first multiple of memoryAlignMax and has count bytes.
func aligned(p []byte, count int) []byte {
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(p))) % memoryAlignMax
	return p[skip : int(skip)+count]
}

// isAligned tells whether the kernel takes p as it lies in memory.
func (d *Device) isAligned(p []byte) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(p)))&uintptr(d.memoryAlign-1) == 0
}

// bounce takes an aligned buffer of bounceSize bytes, which goes back by d.bounces.Put.
func (d *Device) bounce() *[]byte {
	if p, ok := d.bounces.Get().(*[]byte); ok {
		return p
	}
	p := aligned(make([]byte, bounceSize+memoryAlignMax), bounceSize)
	return &p
}

// readCached does the read r if that needs no wait; false: it is to be done again.
func (d *Device) readCached(r *block.Request) bool {
	n, err := d.sys.preadNowait(d.fd, r.Data, r.Offset)
	return err == nil && n == len(r.Data)
}

// read fills p from offset.
func (d *Device) read(p []byte, offset int64) error {
	if d.isAligned(p) {
		return d.readAligned(p, offset)
	}
	b := d.bounce()
	defer d.bounces.Put(b)
	for len(p) > 0 {
		part := (*b)[:min(len(p), bounceSize)]
		if err := d.readAligned(part, offset); err != nil {
			return err
		}
		n := copy(p, part)
		p, offset = p[n:], offset+int64(n)
	}
	return nil
}

// readAligned fills p, which lies in memory as the kernel wants it.
func (d *Device) readAligned(p []byte, offset int64) error {
	for len(p) > 0 {
		n, err := d.sys.pread(d.fd, p, offset)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("pread: %w", err)
		}
		if n == 0 || n < len(p) && n%d.limits.LogicalBlock != 0 { // the file ends here, or within this block
			return d.truncated(offset + int64(n))
		}
		p, offset = p[n:], offset+int64(n)
	}
	return nil
}

// truncated lets the device fail because the file ends at end, and is the error that says so.
func (d *Device) truncated(end int64) error {
	err := fmt.Errorf("it was truncated while in use: it ends at byte %d or before, and should have %d bytes: %w",
		end, d.Size(), unix.EIO)
	d.fail(err)
	return err
}

// write puts p at offset, durably with fua.
func (d *Device) write(p []byte, offset int64, fua bool) error {
	if fua && d.noDsync.Load() {
		if err := d.write(p, offset, false); err != nil {
			return err
		}
		return d.sync()
	}
	if d.isAligned(p) {
		return d.writeAligned(p, offset, fua)
	}
	b := d.bounce()
	defer d.bounces.Put(b)
	for len(p) > 0 {
		n := copy(*b, p)
		if err := d.writeAligned((*b)[:n], offset, fua); err != nil {
			return err
		}
		p, offset = p[n:], offset+int64(n)
	}
	return nil
}

// writeAligned writes p, which lies in memory as the kernel wants it.
func (d *Device) writeAligned(p []byte, offset int64, fua bool) error {
	call := d.sys.pwrite
	if fua {
		call = d.sys.pwriteDsync
	}
	for len(p) > 0 {
		n, err := call(d.fd, p, offset)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case fua && absent(err):
			d.noDsync.Store(true)
			return d.write(p, offset, true)
		case fua && !d.direct && errors.Is(err, unix.EIO):
			// The write-back failed, and what else it was to write is lost as after a failed fdatasync.
			return d.fail(fmt.Errorf("pwritev2: %w", err))
		case err != nil:
			return fmt.Errorf("pwrite: %w", err)
		case n == 0:
			return fmt.Errorf("pwrite wrote nothing: %w", unix.EIO)
		}
		p, offset = p[n:], offset+int64(n)
	}
	return nil
}

// absent tells whether err says that there is no such operation.
func absent(err error) bool {
	return errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENOTTY)
}
