package nbd

import (
	"context"
	"fmt"
	"math/bits"

	"cowherd/block"
)

// LengthMax is the largest read or write in bytes: the maximum block size that every export advertises.
const LengthMax = 32 << 20

// Exports is where a server finds what it exports. All methods are called from many goroutines.
type Exports interface {
	// List names the exports for clients that ask what there is.
	List(ctx context.Context) []Info
	// Open finds an export by name and takes a reference to it, given back by Export.Release. The empty name is the
	// default export, whatever the implementor makes of it. client says who asks, in words. An error with
	// fs.ErrNotExist in its chain tells the client that there is none of this name; any other one that it may not
	// have it, and why.
	Open(ctx context.Context, name, client string) (*Export, error)
}

// Info is an entry of the list of exports.
type Info struct {
	Name        string // at most 4096 bytes
	Description string // for people; may be empty
}

// An Export is a device under a name, opened for one connection (or for a client that only asks about it).
type Export struct {
	Name        string // canonical; what Server.Disconnect takes
	Description string // for people; may be empty
	Device      block.Device
	ReadOnly    bool // refuse what writes, whatever the device can do
	// MultiConn promises that a flush on one connection covers the writes completed on all of them.
	MultiConn bool
	// Contexts are offered to clients beside base:allocation.
	Contexts []Context
	// Release gives the reference back. It is called exactly once, when no request is in flight any more. May be nil.
	Release func()
}

// A Context is metadata about the ranges of an export.
type Context struct {
	Name string // namespace and leaf name with a colon between, such as "cowherd:copied"
	// Extents calls yield for consecutive ranges from offset on, with their lengths in bytes (multiples of the
	// device's logical block) and their flags, until [offset, offset+length) is covered or yield returns false. It
	// may block for as long as the look-up takes.
	Extents func(offset, length int64, yield func(length int64, flags uint32) bool) error
}

// baseAllocation is the context that every export has.
const baseAllocation = "base:allocation"

// release gives the reference back.
func (e *Export) release() {
	if e.Release != nil {
		e.Release()
	}
}

// check refuses an export that cannot be put in the protocol's terms.
func (e *Export) check() error {
	l := e.Device.Limits()
	switch {
	case len(e.Name) > stringMax:
		return fmt.Errorf("nbd: export name of %d bytes: at most %d", len(e.Name), stringMax)
	case l.LogicalBlock < 1 || bits.OnesCount(uint(l.LogicalBlock)) != 1 || l.LogicalBlock > minimumMax:
		return fmt.Errorf("nbd: export %q: logical block of %d bytes: not a power of two of at most %d",
			e.Name, l.LogicalBlock, minimumMax)
	}
	return nil
}

// minimumMax is the largest minimum block size that the protocol allows, in bytes.
const minimumMax = 64 << 10

// size is the export's length in bytes: what a client can address in whole logical blocks.
func (e *Export) size() int64 {
	return e.Device.Size() &^ (int64(e.Device.Limits().LogicalBlock) - 1)
}

// readOnly tells whether the export refuses writes.
func (e *Export) readOnly() bool { return e.ReadOnly || e.Device.Limits().ReadOnly }

// flags are the transmission flags of the export.
func (e *Export) flags(structured bool) uint16 {
	flags := uint16(flagHasFlags | flagSendFlush | flagSendFUA | flagSendCache)
	if e.readOnly() {
		flags |= flagReadOnly
	} else {
		flags |= flagSendWriteZeroes | flagSendFastZero
		if e.Device.Limits().DiscardMax > 0 {
			flags |= flagSendTrim
		}
	}
	if structured {
		flags |= flagSendDF
	}
	if e.MultiConn {
		flags |= flagCanMultiConn
	}
	return flags
}

// blockSizes are the minimum, preferred and maximum block size in bytes, within what the protocol allows: the
// preferred one a power of two of at least 512 and the minimum, the maximum a multiple of the minimum.
func (e *Export) blockSizes() (minimum, preferred, maximum uint32) {
	l := e.Device.Limits()
	p := max(l.PreferredIO, l.LogicalBlock, 512)
	p = min(1<<bits.Len(uint(p-1)), LengthMax)
	return uint32(l.LogicalBlock), uint32(p), LengthMax
}

// allocation is base:allocation of the device: from its extents, or data all over when it cannot tell.
func allocation(d block.Device) Context {
	lister, ok := d.(block.ExtentLister)
	if !ok {
		return Context{Name: baseAllocation, Extents: allData}
	}
	return Context{Name: baseAllocation, Extents: func(offset, length int64, yield func(int64, uint32) bool) error {
		return lister.Extents(offset, length, func(e block.Extent) bool {
			return yield(e.Length, stateFlags(e))
		})
	}}
}

func allData(_, length int64, yield func(int64, uint32) bool) error {
	yield(length, 0)
	return nil
}

// stateFlags are the flags of base:allocation for e.
func stateFlags(e block.Extent) uint32 {
	var flags uint32
	if e.Hole {
		flags |= stateHole
	}
	if e.Zero {
		flags |= stateZero
	}
	return flags
}

// contexts are all contexts of the export; a context's place in them is its identifier on the wire.
func (e *Export) contexts() []Context {
	return append([]Context{allocation(e.Device)}, e.Contexts...)
}
