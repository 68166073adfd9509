package clone

import (
	"errors"
	"fmt"
	"iter"
	"math"
	"sync/atomic"
	"syscall"

	"cowherd/block"
	"cowherd/internal/percpu"
	"cowherd/kcopyd"
	"cowherd/target"
)

// Metadata is what a clone needs of its metadata: which regions are hydrated, durably. It is used by one goroutine at a
// time, but for Usage. A *clonemeta.Metadata is one.
type Metadata interface {
	RegionSize() block.Sector
	TargetSize() block.Sector
	// LoadBits yields what was committed last: word n has the bits of the regions from 64n on. Words that are not
	// yielded are zero. The slice is valid during the call only.
	LoadBits(yield func(firstWord uint64, words []uint64) bool) error
	// SetWords stages new values of words, in ascending order, for the next Commit.
	SetWords(words iter.Seq2[uint64, uint64]) error
	// Commit makes durable what was staged. After an error, of SetWords too, Abort must follow.
	Commit() error
	// Abort goes back to what was committed last.
	Abort() error
	// Usage is in blocks of 4096 bytes, as in the status line.
	Usage() (used, total uint64)
}

// The smallest and the largest region, in sectors (the kernel's limits), and the most regions. The kernel allows 2^31 of
// them; the metadata's format has room for more.
const (
	RegionSizeMin block.Sector = 8
	RegionSizeMax block.Sector = 1 << 21
	regionsMax                 = 1 << 40
)

// Config is what a clone is made of. Devices and metadata stay the caller's, to close when the clone is closed; the
// source may be closed as soon as the clone no longer uses it (EventHydrated).
type Config struct {
	Name        string       // in messages
	Source      block.Device // only read; nil: everything is hydrated
	Destination block.Device
	Metadata    Metadata // tells region size and length
	Engine      kcopyd.Engine

	Hydration
	NoDiscardPassdown bool // discards are not told to the destination
	// DestinationIsZero: the destination reads as zeroes wherever nothing was ever written, so that holes of the source
	// need no I/O. Only for a clone that was never used before: after a crash a region that is not hydrated may hold what
	// was written to it.
	DestinationIsZero bool
	// Arguments is what Table says behind the devices, word by word as it was given; nil: it is made up from the above.
	Arguments []string
	// Event is called, with no lock held, when something happens that users want to know. It must not block. May be nil.
	Event func(Event)
}

// Mode is what a clone can still do.
type Mode int32

// The modes, as the kernel's. There is no way back.
const (
	ReadWrite Mode = iota
	ReadOnly       // the metadata cannot be written: nothing is hydrated any more
	Fail           // nor read: all I/O fails
)

// String is the mode as it stands in the status line.
func (m Mode) String() string {
	switch m {
	case ReadWrite:
		return "rw"
	case ReadOnly:
		return "ro"
	}
	return "Fail"
}

// EventKind is what an event tells.
type EventKind uint8

// The kinds of events.
const (
	// EventHydrated: everything is hydrated and committed, and the source is no longer used. Once.
	EventHydrated EventKind = iota + 1
	// EventMode: the mode has changed, see Status; Err says why.
	EventMode
	// EventRegionFailed: a region was given up in the background, the first since hydration was last asked to try again.
	EventRegionFailed
	// EventStopped: hydration has come to its end with regions that have failed, or too many have; it stops until it is
	// asked to try again.
	EventStopped
)

// Event is something that happened to a clone.
type Event struct {
	Kind EventKind
	Mode Mode  // EventMode
	Err  error // the cause; nil for EventHydrated
}

// Clone is the clone target. All methods are safe for concurrent use. See the package comment for how it works.
type Clone struct {
	// table is the state of the regions; nil: all are hydrated and committed.
	table atomic.Pointer[table]
	state atomic.Int32 // a Mode

	dest       block.Device
	source     block.Device
	size       int64 // bytes
	regionSize int64 // bytes
	shift      uint  // its logarithm
	count      Region
	engine     kcopyd.Engine
	passdown   bool
	limits     block.Limits

	name      string
	meta      Metadata
	onEvent   func(Event)
	arguments []string
	noDiscard bool                  // NoDiscardPassdown
	cause     atomic.Pointer[error] // why the mode is not ReadWrite
	destZero  atomic.Bool           // what is not hydrated reads as zeroes on the destination

	sourceUsers percpu.Shards[counter]
	detached    atomic.Bool // the source is no longer used

	pool      hydrationPool
	waiting   waiting
	retry     retry
	committer committer
	hydrator  hydrator
}

// New makes a clone, with what the metadata says hydrated. Hydration begins with Resume.
func New(c Config) (*Clone, error) {
	x := &Clone{
		dest: c.Destination, source: c.Source, meta: c.Metadata, engine: c.Engine, name: c.Name,
		size:       c.Metadata.TargetSize().Bytes(),
		regionSize: c.Metadata.RegionSize().Bytes(),
		onEvent:    c.Event, arguments: c.Arguments, noDiscard: c.NoDiscardPassdown,
		sourceUsers: percpu.New[counter](),
		pool:        hydrationPool{shards: percpu.New[poolShard]()},
		retry:       retry{shards: percpu.New[retryShard]()},
	}
	if err := x.check(); err != nil {
		return nil, fmt.Errorf("clone %q: %w", c.Name, err)
	}
	for int64(1)<<x.shift < x.regionSize {
		x.shift++
	}
	x.count = Region((x.size + x.regionSize - 1) >> x.shift)
	below := c.Destination.Limits()
	x.passdown = !c.NoDiscardPassdown && below.DiscardMax >= x.regionSize
	x.destZero.Store(c.DestinationIsZero)
	x.limits = makeLimits(c.Destination, c.Source, x.regionSize)
	t, err := x.loadTable()
	if err != nil {
		return nil, fmt.Errorf("clone %q: %w", c.Name, err)
	}
	switch {
	case t.count() == x.count:
		x.detached.Store(true)
	case c.Source == nil:
		return nil, fmt.Errorf("clone %q: there is no source, and %d regions are not hydrated: %w", c.Name,
			x.count-t.count(), syscall.EINVAL)
	default:
		x.table.Store(t)
	}
	x.committer.init(x)
	x.hydrator.init(x, c.Hydration)
	return x, nil
}

// check tells what is wrong with the devices and the metadata.
func (c *Clone) check() error {
	size := block.SectorFloor(c.regionSize)
	switch {
	case c.size <= 0:
		return fmt.Errorf("the metadata is for a device of %d bytes: %w", c.size, syscall.EINVAL)
	case size < RegionSizeMin || size > RegionSizeMax:
		return fmt.Errorf("invalid region size: %d sectors are not between %d and %d: %w", size, RegionSizeMin, RegionSizeMax,
			syscall.EINVAL)
	case size&(size-1) != 0:
		return fmt.Errorf("region size is not a power of 2: %d sectors: %w", size, syscall.EINVAL)
	case (c.size-1)/c.regionSize >= regionsMax:
		return fmt.Errorf("too many regions, consider increasing the region size: %w", syscall.EINVAL)
	case c.dest.Size() < c.size:
		return fmt.Errorf("device size larger than destination device: %d and %d bytes: %w", c.size, c.dest.Size(), syscall.EINVAL)
	case c.source != nil && c.source.Size() < c.size:
		return fmt.Errorf("device size larger than source device: %d and %d bytes: %w", c.size, c.source.Size(), syscall.EINVAL)
	case c.dest.Limits().ReadOnly:
		return fmt.Errorf("the destination is read-only: %w", syscall.EROFS)
	}
	for _, d := range []block.Device{c.dest, c.source} {
		if d == nil {
			continue
		}
		if b := int64(d.Limits().LogicalBlock); c.regionSize%b != 0 || c.size%b != 0 {
			return fmt.Errorf("region size %d or length %d is not a multiple of the logical block size %d: %w",
				c.regionSize, c.size, b, syscall.EINVAL)
		}
	}
	return nil
}

const (
	// discardMax bounds one discard, in bytes, so that one request never has to mark an unbounded number of regions.
	discardMax = 1 << 40
	// writeZeroesMax bounds one write of zeroes likewise.
	writeZeroesMax = 32 << 20
)

// makeLimits are those of the destination, with the source's block. Discards are always there, as they hydrate regions.
func makeLimits(dest, source block.Device, regionSize int64) block.Limits {
	l := dest.Limits()
	if source != nil {
		l.LogicalBlock = max(l.LogicalBlock, source.Limits().LogicalBlock)
		l.PreferredIO = max(l.PreferredIO, source.Limits().PreferredIO)
	}
	l.DiscardMax, l.DiscardGranularity = discardMax, regionSize
	l.WriteZeroesMax = min(l.WriteZeroesMax, writeZeroesMax)
	l.NeedsFlush = true // of the metadata
	return l
}

// loadTable reads the regions' state from the metadata.
func (c *Clone) loadTable() (*table, error) {
	t := newTable(c.count)
	err := c.meta.LoadBits(func(first uint64, words []uint64) bool {
		if first > math.MaxUint64/64 {
			return false
		}
		t.load(first, words)
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("read which regions are hydrated: %w", err)
	}
	for i := range t.pages {
		t.shrink(i)
	}
	return t, nil
}

// Size is the clone's length in bytes.
func (c *Clone) Size() int64 { return c.size }

// Limits are what the clone takes.
func (c *Clone) Limits() block.Limits { return c.limits }

// Map remaps r to the destination or the source, or takes it (nil).
func (c *Clone) Map(r *block.Request) block.Device {
	t := c.table.Load()
	if t == nil && r.Op != block.OpDiscard {
		return c.dest
	}
	if c.mode() == Fail {
		r.Complete(block.WrapError(r, c.modeError()))
		return nil
	}
	c.hydrator.note(r.Queue)
	switch r.Op {
	case block.OpRead:
		return c.mapRead(r, t)
	case block.OpFlush:
		return c.mapFlush(r)
	case block.OpDiscard:
		c.discard(r)
		return nil
	}
	return c.mapWrite(r, t)
}

// Passes tells whether Map would return the destination for r, a read or a write, and do nothing else: all that it touches
// is hydrated, and settled if it is a write.
func (c *Clone) Passes(r *block.Request) bool {
	t := c.table.Load()
	if t == nil {
		return true
	}
	of := isHydrated
	if r.Op != block.OpRead {
		of = isSettled
	}
	if c.mode() == Fail || r.Length == 0 || r.Flags&(block.FUA|block.Fast) != 0 && of == isSettled {
		return false
	}
	start, end := c.regions(r.Offset, r.Length)
	if is, until := t.run(start, end, of); !is || until < end {
		return false
	}
	c.hydrator.note(r.Queue)
	return true
}

// Passage is the destination, where nothing goes without a question.
func (c *Clone) Passage() (below block.Device, sure target.Passage) {
	return c.dest, target.NoPassage()
}

// mapFlush remaps a flush to the destination, unless there is something to commit. The mode is looked at last: a commit
// that fails changes it before it says that it is over, so that there is nothing to commit only if nothing was lost.
func (c *Clone) mapFlush(r *block.Request) block.Device {
	if !c.uncommitted() && c.mode() == ReadWrite {
		r.Push((*flushing)(c))
		return c.dest
	}
	c.committer.add(r)
	return nil
}

// uncommitted tells whether regions are hydrated that are not committed. A commit in progress has taken its changes off
// the table after it has said that it is busy.
func (c *Clone) uncommitted() bool {
	t := c.table.Load()
	return t != nil && t.changed.Load() != nil || c.committer.busy.Load()
}

// durable tells whether the regions that were found settled in t are committed. If the commit that took them has failed,
// another table has come since, or all has failed.
func (c *Clone) durable(t *table) bool {
	if c.uncommitted() {
		return false
	}
	now := c.table.Load()
	return (now == t || now == nil) && c.mode() != Fail
}

// region is the region of the byte at offset.
func (c *Clone) region(offset int64) Region { return Region(offset >> c.shift) }

// regions is the half-open range of regions that the bytes [offset, offset+length) touch; length > 0.
func (c *Clone) regions(offset, length int64) (start, end Region) {
	return c.region(offset), c.region(offset+length-1) + 1
}

// offset is the first byte of region.
func (c *Clone) offset(region Region) int64 { return int64(region) << c.shift }

// end is the byte behind the regions before region: its offset, or the end of the device.
func (c *Clone) end(region Region) int64 {
	if region >= c.count {
		return c.size
	}
	return c.offset(region)
}

func (c *Clone) mode() Mode { return Mode(c.state.Load()) }

// modeError is why requests fail in the mode that the clone is in.
func (c *Clone) modeError() error {
	cause := errors.New("unknown cause")
	if p := c.cause.Load(); p != nil {
		cause = *p
	}
	return fmt.Errorf("clone %q is in mode %v: %w", c.name, c.mode(), cause)
}

// event tells an event to who wants to know.
func (c *Clone) event(e Event) {
	if c.onEvent != nil {
		c.onEvent(e)
	}
}
