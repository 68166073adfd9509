package file

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"cowherd/block"
)

// The NVMe Copy command moves blocks within a namespace. It goes to the controller through the block device's
// descriptor (NVME_IOCTL_IO_CMD), past partitions and past the page cache. So:
//
//   - A partition's offset is added here. Two devices are of one namespace when sysfs says that they are the same disk,
//     or partitions of it.
//   - Before the command, what is dirty of the source in the page cache is written to the disk, and the destination's
//     range is dropped from it, having been written too: a page that is dirty there would later overwrite the copy.
//   - After the command the destination's range is dropped again, for the kernel reads ahead, and others look at disks
//     (udev). What was read before the copy must not be shown after it.
//   - The kernel drops no page that is still being read, as it reads ahead, and none by parts, of up to 2 MiB. So it is
//     asked what is left (cachestat, Linux 6.5). Then reads are waited for, and what is beside the range is dropped with
//     it. While something is left even so, the range counts as not copied; writing it by the page cache puts everything
//     right.
//   - A device that does direct I/O reads and writes past the page cache anyhow: for its own sake nothing needs to be
//     dropped, and what is, as far as it can be, is for those who look at the disk after it.
//   - All of this is about the page cache of these two block devices. A disk has another one than its partitions: what
//     has been written to one of them and read from the other was never coherent.
//   - A flush of the destination sends a flush to the controller, which makes copies durable like writes.
const (
	nvmeIdentify = 0x06 // an admin command
	nvmeCopy     = 0x19 // an I/O command

	identifyNamespace  = 0 // what Identify is asked for (CNS)
	identifyController = 1
	identifySize       = 4096

	// nvmeRangesMax is the most source ranges that the command has room to count.
	nvmeRangesMax = 256
	// nvmeMax is the most bytes of a command, whatever the controller takes: it must end long before the kernel's timeout.
	nvmeMax = 16 << 20
	// nvmeAtOnce is how many commands at a time keep a controller busy.
	nvmeAtOnce = 4
)

// namespace is what is known of an NVMe namespace, and of a block device as a part of it.
type namespace struct {
	disk  string // its directory in sysfs
	start int64  // where the block device begins, in bytes
	id    uint32
	copyLimits
}

// copyLimits are what a namespace says of the Copy command.
type copyLimits struct {
	blockShift    uint  // binary logarithm of the logical block in bytes
	rangeBlocks   int64 // most blocks of one source range (MSSRL)
	commandBlocks int64 // most blocks of a command (MCL)
	ranges        int64 // most source ranges of a command (MSRC)
}

// commandMax is the most that one command copies from one range of bytes, in bytes.
func (l *copyLimits) commandMax() int64 {
	return min(min(l.commandBlocks, l.rangeBlocks*l.ranges)<<l.blockShift, nvmeMax)
}

// granularity is the unit of copies in bytes: a logical block, and no less than a page, for what is dropped from the
// page cache is whole pages.
func (l *copyLimits) granularity() int64 { return max(1<<l.blockShift, int64(os.Getpagesize())) }

// nvmeBuffer is the memory of a command: nothing of it may be on a stack, which moves.
type nvmeBuffer struct {
	command nvmeCommand
	ranges  [nvmeRangesMax]nvmeRange
	page    [identifySize]byte
}

var nvmeBuffers = sync.Pool{New: func() any { return new(nvmeBuffer) }}

// send sends the command in b with so many bytes of data, which lie in b too.
func (d *Device) send(request uint, b *nvmeBuffer, data unsafe.Pointer, length uintptr) error {
	b.command.address, b.command.dataLength = uint64(uintptr(data)), uint32(length)
	status, err := d.sys.nvme(d.fd, request, &b.command)
	runtime.KeepAlive(b)
	if errors.Is(err, unix.EINTR) {
		return fmt.Errorf("the command was aborted: %w", unix.EIO) // by its timeout: no signal interrupts it
	}
	if err == nil && status != 0 {
		err = nvmeStatus(status)
	}
	return err
}

// nvmeStatus is the status of a completed command that has failed: status code and status code type.
type nvmeStatus int

func (s nvmeStatus) Error() string {
	return fmt.Sprintf("NVMe status %#03x: %v", int(s)&0x7ff, s.Unwrap())
}

// Unwrap is the errno that stands for the status. ENOTSUP: the controller has no such command, or not with these fields,
// or its limits are other than it told.
func (s nvmeStatus) Unwrap() error {
	switch s & 0x7ff { // the rest says whether it is worth trying again
	case 0x001, 0x002, 0x00b, // invalid opcode, field, namespace or format
		0x183, // command size limit exceeded
		0x187, // overlapping ranges
		0x188: // not between these namespaces
		return unix.ENOTSUP
	case 0x081: // capacity exceeded
		return unix.ENOSPC
	}
	return unix.EIO
}

// commandOffers are the offers for two block devices.
func (d *Device) commandOffers(s *Device) []block.CopyOffer {
	to, from, err := d.namespaces(s)
	if err != nil {
		return nil
	}
	unit := to.granularity()
	longest := to.commandMax() &^ (unit - 1)
	if from.disk != to.disk || longest == 0 {
		return nil
	}
	if !d.direct && !d.tellsCached() {
		return nil
	}
	return []block.CopyOffer{{
		Method: block.CopyDevice, Granularity: unit, LengthMax: longest, Concurrency: nvmeAtOnce,
	}}
}

// tellsCached tells whether the kernel knows what of a device is in the page cache.
func (d *Device) tellsCached() bool {
	_, err := d.sys.cached(d.fd, 0, int64(os.Getpagesize()))
	return err == nil
}

// namespaces are what d and s are parts of.
func (d *Device) namespaces(s *Device) (to, from *namespace, err error) {
	if to, err = d.nvme(); err == nil {
		from, err = s.nvme()
	}
	return to, from, err
}

// copyByCommand copies a range by one Copy command.
func (d *Device) copyByCommand(s *Device, from, to, length int64) (int64, error) {
	target, source, err := d.namespaces(s)
	if err != nil {
		return 0, err
	}
	if target.disk != source.disk {
		return 0, fmt.Errorf("they are of two namespaces: %w", unix.EXDEV)
	}
	at, first := target.start+to, source.start+from
	if (from|to|length)&(target.granularity()-1) != 0 || (at|first)&(1<<target.blockShift-1) != 0 ||
		length > target.commandMax() || first < at+length && at < first+length {
		return 0, nil
	}
	if err := s.writeOut(from, length); err != nil {
		return 0, err
	}
	if done, err := d.drop(to, length); !done || err != nil {
		return 0, err
	}
	if err := d.command(target, first, at, length); err != nil {
		return 0, fmt.Errorf("NVMe Copy: %w", err)
	}
	if done, err := d.drop(to, length); !done || err != nil {
		return 0, err
	}
	return length, nil
}

// command sends the Copy command; first and at are offsets in the namespace, in bytes.
func (d *Device) command(ns *namespace, first, at, length int64) error {
	b := nvmeBuffers.Get().(*nvmeBuffer)
	defer nvmeBuffers.Put(b)
	source, left, count := first>>ns.blockShift, length>>ns.blockShift, 0
	for ; left > 0; count++ {
		blocks := min(left, ns.rangeBlocks)
		r := &b.ranges[count]
		putLittle64(&r.firstBlock, uint64(source))
		putLittle16(&r.blocksLess1, uint16(blocks-1))
		source, left = source+blocks, left-blocks
	}
	target := uint64(at >> ns.blockShift)
	b.command = nvmeCommand{
		opcode: nvmeCopy, nsid: ns.id, word10: uint32(target), word11: uint32(target >> 32), word12: uint32(count - 1),
	}
	return d.send(nvmeIoctlIO, b, unsafe.Pointer(&b.ranges), uintptr(count)*unsafe.Sizeof(b.ranges[0]))
}

// putLittle64 stores a number as the controller reads it.
func putLittle64(p *uint64, n uint64) {
	binary.LittleEndian.PutUint64((*[8]byte)(unsafe.Pointer(p))[:], n)
}

// putLittle16 is putLittle64 for 16 bits.
func putLittle16(p *uint16, n uint16) {
	binary.LittleEndian.PutUint16((*[2]byte)(unsafe.Pointer(p))[:], n)
}

// writeOut writes to the disk what is dirty of a range in the page cache. An error is reported to nobody else, so that
// it ends the device like a failed fdatasync.
func (d *Device) writeOut(offset, length int64) error {
	if err := retry(func() error { return d.sys.writeBack(d.fd, offset, length) }); err != nil {
		return d.fail(fmt.Errorf("sync_file_range: %w", err))
	}
	return nil
}

// dropTries is how often it is tried to drop a range from the page cache.
const dropTries = 3

// drop takes a range out of the page cache. not done: something is left there that matters.
func (d *Device) drop(offset, length int64) (done bool, err error) {
	start, end := offset, offset+length
	for range dropTries {
		if err := d.writeOut(start, end-start); err != nil {
			return false, err
		}
		err := d.sys.uncache(d.fd, start, end-start)
		if d.direct {
			return true, nil
		}
		left := uint64(0)
		if err == nil {
			left, err = d.sys.cached(d.fd, offset, length)
		}
		if err != nil {
			return false, fmt.Errorf("what the page cache holds is not known: %w", unix.ENOTSUP)
		}
		if left == 0 {
			return true, nil
		}
		if err := d.settle(offset, length); err != nil {
			return false, err
		}
		// What is left may be part of a larger page, which begins or ends outside.
		page := int64(os.Getpagesize())
		largest := page * page / 8 // what a table of 8-byte entries maps
		start, end = offset&^(largest-1), min((offset+length+largest-1)&^(largest-1), d.Size())
	}
	return false, nil
}

// settle waits for the pages of a range that are in the page cache but are still being read, as the kernel reads ahead:
// it looks for what is cached by halves, and has it read a byte of each page.
func (d *Device) settle(offset, length int64) error {
	left, err := d.sys.cached(d.fd, offset, length)
	if left == 0 || err != nil {
		return err
	}
	page := int64(os.Getpagesize())
	if length <= page {
		var p [1]byte
		return d.read(p[:], offset)
	}
	half := (length/2 + page - 1) &^ (page - 1)
	if err := d.settle(offset, half); err != nil {
		return err
	}
	return d.settle(offset+half, length-half)
}

// findNamespace asks what block device d is a part of, and what it can do. ENOTSUP: it is no NVMe device, or has no Copy
// command, or its blocks carry more than data.
func (d *Device) findNamespace() (*namespace, error) {
	disk, start, err := findDisk("/sys/dev/block", d.id.device)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", unix.ENOTSUP, err)
	}
	if !strings.HasPrefix(filepath.Base(disk), "nvme") {
		return nil, fmt.Errorf("%s is no NVMe disk: %w", filepath.Base(disk), unix.ENOTSUP)
	}
	id, err := d.sys.nvme(d.fd, nvmeIoctlID, nil)
	if err != nil {
		return nil, fmt.Errorf("NVME_IOCTL_ID: %w", err)
	}
	ns := &namespace{disk: disk, start: start, id: uint32(id)}
	if ns.copyLimits, err = d.askLimits(ns.id); err != nil {
		return nil, fmt.Errorf("namespace %d of %s: %w", id, filepath.Base(disk), err)
	}
	return ns, nil
}

// findDisk finds the disk that block device number is, or is a partition of: its directory in sysfs, and where on it
// the device begins, in bytes. root is the directory of all block devices by their numbers.
func findDisk(root string, number uint64) (disk string, start int64, err error) {
	dir, err := filepath.EvalSymlinks(fmt.Sprintf("%s/%d:%d", root, unix.Major(number), unix.Minor(number)))
	if err != nil {
		return "", 0, err
	}
	if _, err := os.Stat(filepath.Join(dir, "partition")); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return dir, 0, nil
		}
		return "", 0, err
	}
	sectors, err := readNumber(dir, "start")
	if err != nil {
		return "", 0, err
	}
	return filepath.Dir(dir), block.Sector(sectors).Bytes(), nil
}

// askLimits asks the controller whether it copies within a namespace, and how much.
func (d *Device) askLimits(id uint32) (copyLimits, error) {
	b := nvmeBuffers.Get().(*nvmeBuffer)
	defer nvmeBuffers.Put(b)
	b.command = nvmeCommand{opcode: nvmeIdentify, word10: identifyController}
	if err := d.send(nvmeIoctlAdmin, b, unsafe.Pointer(&b.page), identifySize); err != nil {
		return copyLimits{}, fmt.Errorf("identify controller: %w", err)
	}
	if err := checkController(&b.page); err != nil {
		return copyLimits{}, err
	}
	b.command = nvmeCommand{opcode: nvmeIdentify, nsid: id, word10: identifyNamespace}
	if err := d.send(nvmeIoctlAdmin, b, unsafe.Pointer(&b.page), identifySize); err != nil {
		return copyLimits{}, fmt.Errorf("identify namespace: %w", err)
	}
	return parseLimits(&b.page)
}

// checkController looks at a controller's data structure (NVM Express Base Specification 2.0, figure 275) for the Copy
// command, bit 8 of ONCS, and descriptor format 0, bit 0 of OCFS.
func checkController(p *[identifySize]byte) error {
	const oncs, ocfs = 520, 534
	if binary.LittleEndian.Uint16(p[oncs:])&(1<<8) == 0 {
		return fmt.Errorf("the controller has no Copy command: %w", unix.ENOTSUP)
	}
	if binary.LittleEndian.Uint16(p[ocfs:])&1 == 0 {
		return fmt.Errorf("the controller's Copy command has not descriptor format 0: %w", unix.ENOTSUP)
	}
	return nil
}

// parseLimits takes the limits from a namespace's data structure (NVM Command Set Specification 1.0, figure 97). One
// whose blocks carry metadata, or protection information, which names the block, is refused.
func parseLimits(p *[identifySize]byte) (copyLimits, error) {
	const flbas, dps, mssrl, mcl, msrc, lbaf = 26, 29, 74, 76, 80, 128
	format := p[lbaf+4*int(p[flbas]&0xf|p[flbas]>>1&0x30):]
	l := copyLimits{
		blockShift:    uint(format[2]),
		rangeBlocks:   int64(binary.LittleEndian.Uint16(p[mssrl:])),
		commandBlocks: int64(binary.LittleEndian.Uint32(p[mcl:])),
		ranges:        min(int64(p[msrc])+1, nvmeRangesMax),
	}
	switch {
	case l.blockShift < 9 || l.blockShift > 30:
		return l, fmt.Errorf("its logical block has 2^%d bytes: %w", l.blockShift, unix.ENOTSUP)
	case binary.LittleEndian.Uint16(format) != 0 || p[dps]&7 != 0:
		return l, fmt.Errorf("its blocks carry metadata: %w", unix.ENOTSUP)
	case l.rangeBlocks == 0 || l.commandBlocks == 0:
		return l, fmt.Errorf("it copies %d blocks of a range and %d at a time: %w", l.rangeBlocks, l.commandBlocks,
			unix.ENOTSUP)
	}
	return l, nil
}
