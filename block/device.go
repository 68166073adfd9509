// Package block is the heart's vocabulary: a Request, the Device that takes it, its Limits, its Extents and its
// errors. It imports the standard library only, and everything else in cowherd stands on it.
//
// # Rules of a Device
//
//  1. Submit takes a request and completes it exactly once (Request.Complete), with no lock held: possibly before
//     Submit returns (memory, page cache) and possibly on another goroutine (a slow disk, a network). Submit may block
//     for as long as the I/O itself takes, never longer.
//  2. Locality: all I/O made on behalf of a request carries its Queue.
//  3. Work of unbounded length that starts from a completion goes through a loop, never through recursion.
//  4. Buffers have one owner at a time. Nothing is allocated per request in steady state.
//  5. Ranges that come from outside are checked once, at the top of a stack (CheckRange); a leaf may trust them.
//  6. Overlapping requests in flight at the same time have no order between them; who needs one waits.
//
// The package has no locks, and none may be held by a caller of Submit or Complete.
package block

import (
	"math"
	"syscall"
)

// SectorSize is the size of a sector in bytes: the unit of device-mapper tables, whatever a device's logical block.
const SectorSize = 512

// Sector counts sectors of 512 bytes.
type Sector uint64

// Bytes is the sector's offset in bytes.
func (s Sector) Bytes() int64 { return int64(s) * SectorSize }

// SectorFloor is the number of whole sectors in n bytes.
func SectorFloor(n int64) Sector { return Sector(n / SectorSize) }

// SectorCeil is the number of sectors that n bytes touch.
func SectorCeil(n int64) Sector { return Sector((n + SectorSize - 1) / SectorSize) }

// A Device is something that requests can be submitted to. All methods are safe for concurrent use.
type Device interface {
	// Submit takes ownership of r until it completes it. See the package comment for the rules.
	Submit(r *Request)
	// Size is the device's length in bytes. While the device is open it never gets smaller, and larger only when it is a
	// Grower and somebody calls Grow.
	Size() int64
	// Limits are what the device can take. They do not change while the device is open.
	Limits() Limits
}

// Limits say what requests a device takes and which it likes.
type Limits struct {
	// LogicalBlock is the size in bytes, a power of two, of which offset and length of every request are multiples.
	LogicalBlock int
	// PreferredIO is the size in bytes of the I/O that suits the device best; at least LogicalBlock.
	PreferredIO int
	// DiscardMax is the largest OpDiscard in bytes; 0: the device has no discard.
	DiscardMax int64
	// DiscardGranularity is the unit in bytes that a discard frees; smaller parts may be ignored.
	DiscardGranularity int64
	// WriteZeroesMax is the largest OpWriteZeroes in bytes; 0: the device has none, zeroes must be written.
	WriteZeroesMax int64
	// ReadOnly: every request that writes fails with EROFS.
	ReadOnly bool
	// NeedsFlush: completed writes may be lost in a crash until a flush. Without it OpFlush does nothing.
	NeedsFlush bool
}

// Stack combines the limits of a device with those of one below it, as the block layer does: what any of the two
// cannot take, the stack cannot take.
func (l Limits) Stack(below Limits) Limits {
	l.LogicalBlock = max(l.LogicalBlock, below.LogicalBlock)
	l.PreferredIO = max(l.PreferredIO, below.PreferredIO)
	l.DiscardMax = min(l.DiscardMax, below.DiscardMax)
	l.DiscardGranularity = max(l.DiscardGranularity, below.DiscardGranularity)
	l.WriteZeroesMax = min(l.WriteZeroesMax, below.WriteZeroesMax)
	l.ReadOnly = l.ReadOnly || below.ReadOnly
	l.NeedsFlush = l.NeedsFlush || below.NeedsFlush
	return l
}

// NoLimits takes everything: where stacking starts.
func NoLimits() Limits {
	return Limits{
		LogicalBlock:       1,
		PreferredIO:        4096,
		DiscardMax:         math.MaxInt64,
		DiscardGranularity: 1,
		WriteZeroesMax:     math.MaxInt64,
	}
}

// CheckRange tells whether r fits a device of the given size and limits: nil, or an *Error with EINVAL (misaligned,
// negative, Data of another length, unknown operation), ENOSPC (a write behind the end), EIO (a read behind the
// end, as a Linux block device answers), EROFS or ENOTSUP.
func CheckRange(r *Request, size int64, l Limits) error {
	if r.Op == OpFlush {
		return nil
	}
	if r.Op >= opCount {
		return NewError(r, syscall.EINVAL, "unknown operation")
	}
	if r.Offset < 0 || r.Length < 0 || r.Offset > math.MaxInt64-r.Length {
		return NewError(r, syscall.EINVAL, "offset or length out of range")
	}
	if mask := int64(l.LogicalBlock) - 1; (r.Offset|r.Length)&mask != 0 {
		return NewError(r, syscall.EINVAL, "not aligned to the logical block size")
	}
	if hasData := r.Op == OpRead || r.Op == OpWrite; hasData && int64(len(r.Data)) != r.Length {
		return NewError(r, syscall.EINVAL, "length of the buffer differs from the request's")
	}
	if r.Op.Writes() && l.ReadOnly {
		return NewError(r, syscall.EROFS, "the device is read-only")
	}
	if r.End() > size {
		if r.Op == OpRead {
			return NewError(r, syscall.EIO, "beyond the end of the device")
		}
		return NewError(r, syscall.ENOSPC, "beyond the end of the device")
	}
	return checkPowers(r, l)
}

// checkPowers checks the operations that a device need not have.
func checkPowers(r *Request, l Limits) error {
	most := int64(math.MaxInt64)
	switch r.Op {
	case OpDiscard:
		most = l.DiscardMax
	case OpWriteZeroes:
		most = l.WriteZeroesMax
	}
	if most == 0 {
		return NewError(r, syscall.ENOTSUP, "the device does not support it")
	}
	if r.Length > most {
		return NewError(r, syscall.EINVAL, "longer than the device's limit")
	}
	return nil
}

// A Grower is a device that can be made larger while requests run on it. It is an optional power of a Device.
type Grower interface {
	// Grow makes the device at least size bytes long; what is new reads as zeroes unless it is a disk that had more
	// than was used. A size that the device has already is no error and changes nothing: a device never shrinks. Size
	// tells the new length from before Grow returns. ENOSPC, EFBIG: it cannot be that long, and is as it was.
	Grow(size int64) error
}

// An Extent is a range of a device in one state.
type Extent struct {
	Offset, Length int64 // bytes
	Hole           bool  // nothing is allocated there
	Zero           bool  // it reads as zeroes
}

// An ExtentLister knows which ranges of a device hold data. It is an optional power of a Device.
type ExtentLister interface {
	// Extents calls yield for consecutive extents that cover [offset, offset+length), in order and without gaps,
	// cut to that range, until yield returns false. What is not known is reported as data. It may block for as long
	// as the look-up takes, and is a hint about a device that is being written: only what was there before the call
	// and stays unwritten meanwhile is exact.
	Extents(offset, length int64, yield func(Extent) bool) error
}

// ExtentsOf asks d for its extents, as ExtentLister says; a device that does not know has data everywhere.
func ExtentsOf(d Device, offset, length int64, yield func(Extent) bool) error {
	if l, ok := d.(ExtentLister); ok {
		return l.Extents(offset, length, yield)
	}
	yield(Extent{Offset: offset, Length: length})
	return nil
}
