package snapshot

import (
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/internal/percpu"
	"cowherd/kcopyd"
)

// pendingMax is the default limit of exceptions in flight for one snapshot (the kernel's snapshot_cow_threshold).
const pendingMax = 2048

// runMax is the most bytes that one exception copies, if a chunk is not larger: enough to make large writes cheap,
// little enough to keep buffers small.
const runMax = kcopyd.SubJobSize

// Store is what a snapshot needs of an exception store.
type Store interface {
	// Allocate reserves a run of at least one and at most want consecutive chunks of the COW device. ENOSPC: no room.
	Allocate(queue block.Queue, want int) (first cowstore.Chunk, count int, err error)
	// Usage is in sectors, as in the kernel's status line.
	Usage() (allocated, total, metadata block.Sector)
}

// Config is what a snapshot is made of.
type Config struct {
	Name   string // in messages
	Origin *Origin
	COW    block.Device // the COW device; it stays the caller's, to close when the snapshot is gone
	// Store allocates chunks of COW. A *cowstore.Persistent brings its exceptions along: New loads them. One that is not
	// valid makes a snapshot that is Invalid from the start.
	Store     Store
	ChunkSize cowstore.ChunkSize // 0: that of a persistent store
	Engine    kcopyd.Engine      // copies; may be shared
	ReadOnly  bool               // writes to the snapshot fail with EROFS
	// DiscardZeroesCOW and DiscardPassdownOrigin are the kernel's features of these names. The second needs the first.
	DiscardZeroesCOW, DiscardPassdownOrigin bool
	// PendingMax is the limit of exceptions in flight, at most 16383; 0: 2048.
	PendingMax int
	// OneLock has one lock guard all exceptions, with a serialised engine only. It is there to be compared with.
	OneLock bool
	// OnFull is what happens when the COW device has no room for an exception; see there for COWMax and StallMax.
	OnFull   OnFull
	COWMax   int64 // bytes; 0: no limit
	StallMax time.Duration
	// Warned is called, with no lock held, each time that one of the percentages WarnAt of the COW device is in use for
	// the first time. It must not block. nil: nobody is warned.
	WarnAt []int
	Warned func(percent int)
	// Overflowed is called, with no lock held, when the snapshot overflows (FullOverflow). It must not block. May be nil.
	Overflowed func(cause error)
	// Stalled is called, with no lock held, when a request begins to wait for room (FullThrottle) and none waited
	// before. It must not block. May be nil.
	Stalled func()
	// Invalidated is called once, with no lock held, when the snapshot becomes invalid. It must not block. May be nil.
	Invalidated func(cause error)
}

// Snapshot is the snapshot target: the origin as it was when the snapshot was added to it, and what was written to
// the snapshot since. All methods are safe for concurrent use. See the package comment for how it works.
type Snapshot struct {
	// What a write to the origin looks at when its chunk has been copied, in one cache line.
	size       int64
	chunkShift uint
	known      knownCopied
	table      *table
	cause      atomic.Pointer[error] // why the snapshot is invalid; nil: it is valid
	coarse     coarse

	name        string
	origin      *Origin
	cow         block.Device
	store       Store
	chunkSize   cowstore.ChunkSize
	engine      kcopyd.Engine
	readOnly    bool
	discards    bool // DiscardZeroesCOW
	passdown    bool // DiscardPassdownOrigin
	invalidated func(error)

	// persistent is the store when it is one; nil: transient. See persist.go for verdict.
	persistent *cowstore.Persistent
	verdict    verdict
	full       fullness

	exceptions  *exceptionPool
	reads       trackedReads
	overwritten percpu.Shards[atomic.Uint64] // chunks filled by writes to the snapshot, without a copy
}

// New makes a snapshot that is not yet added to its origin.
func New(c Config) (*Snapshot, error) {
	persistent, _ := c.Store.(*cowstore.Persistent)
	if persistent != nil && c.ChunkSize == 0 {
		c.ChunkSize = persistent.ChunkSize()
	}
	if err := check(&c, persistent); err != nil {
		return nil, fmt.Errorf("snapshot %q: %w", c.Name, err)
	}
	if c.PendingMax == 0 {
		c.PendingMax = pendingMax
	}
	s := &Snapshot{
		name:        c.Name,
		origin:      c.Origin,
		size:        c.Origin.Size(),
		cow:         c.COW,
		store:       c.Store,
		persistent:  persistent,
		chunkSize:   c.ChunkSize,
		chunkShift:  c.ChunkSize.Shift(),
		engine:      c.Engine,
		readOnly:    c.ReadOnly,
		discards:    c.DiscardZeroesCOW,
		passdown:    c.DiscardPassdownOrigin,
		invalidated: c.Invalidated,
		table:       newTable(),
		known:       newKnownCopied(c.ChunkSize.ChunkCeil(c.Origin.Size())),
		reads:       trackedReads{shards: percpu.New[trackShard]()},
		overwritten: percpu.New[atomic.Uint64](),
	}
	if c.OneLock {
		s.coarse.mu = new(sync.Mutex)
	}
	s.exceptions = newExceptionPool(s, min(c.PendingMax, slotIndexMax))
	s.full.init(s, &c)
	if persistent == nil {
		s.verdict.known.Store(true)
		return s, nil
	}
	if err := s.load(); err != nil {
		return nil, fmt.Errorf("snapshot %q: %w", c.Name, err)
	}
	return s, nil
}

// check tells what is wrong with a Config.
func check(c *Config, persistent *cowstore.Persistent) error {
	cow := c.COW.Limits()
	checkChunkSize := cowstore.CheckChunkSize // there are stores with smaller chunks than new ones may have
	if persistent == nil {
		checkChunkSize = cowstore.CheckNewChunkSize
	}
	if err := checkChunkSize(int64(c.ChunkSize), c.Origin.Limits().LogicalBlock, cow.LogicalBlock); err != nil {
		return err
	}
	if persistent != nil && c.ChunkSize != persistent.ChunkSize() {
		return fmt.Errorf("chunk size %d: the store has %d: %w", c.ChunkSize, persistent.ChunkSize(), syscall.EINVAL)
	}
	if b := int64(cow.LogicalBlock); c.Origin.Size()%b != 0 {
		return fmt.Errorf("the origin's size %d is not a multiple of the COW device's logical block size %d: %w",
			c.Origin.Size(), b, syscall.EINVAL)
	}
	if c.DiscardPassdownOrigin && !c.DiscardZeroesCOW {
		return fmt.Errorf("discard_passdown_origin needs discard_zeroes_cow")
	}
	if cow.ReadOnly && (persistent == nil || !c.ReadOnly) {
		return fmt.Errorf("the COW device is read-only: %w", syscall.EROFS)
	}
	return nil
}

// Size is the origin's when the snapshot was made, in bytes.
func (s *Snapshot) Size() int64 { return s.size }

// Limits are those of the origin and the COW device together. Discard is there only with DiscardZeroesCOW.
func (s *Snapshot) Limits() block.Limits { return s.limitsWith(s.discards, s.passdown) }

// limitsWith are the limits with and without the features DiscardZeroesCOW and DiscardPassdownOrigin.
func (s *Snapshot) limitsWith(discards, passdown bool) block.Limits {
	l := s.origin.Limits().Stack(s.cow.Limits())
	l.ReadOnly = s.readOnly
	l.NeedsFlush = s.cow.Limits().NeedsFlush
	l.WriteZeroesMax = min(s.cow.Limits().WriteZeroesMax, writeZeroesMax)
	l.DiscardMax, l.DiscardGranularity = 0, int64(s.chunkSize)
	if discards {
		l.DiscardMax = writeZeroesMax
		// A piece of a discard reaches the COW device as one or the other.
		for _, most := range []int64{s.cow.Limits().WriteZeroesMax, s.cow.Limits().DiscardMax} {
			if most > 0 {
				l.DiscardMax = min(l.DiscardMax, most)
			}
		}
	}
	if below := s.origin.device.Limits().DiscardMax; passdown && below > 0 {
		l.DiscardMax = min(l.DiscardMax, below)
	}
	return l
}

// Map remaps r to the origin or the COW device, or takes it (nil).
func (s *Snapshot) Map(r *block.Request) block.Device {
	if s.invalidCause() != nil {
		r.Complete(s.invalidError(r))
		return nil
	}
	switch {
	case r.Op == block.OpFlush:
		return s.cow
	case r.Op == block.OpRead:
		return s.mapRead(r)
	case r.Op == block.OpDiscard:
		s.discard(r)
	case r.Op == block.OpWriteZeroes && r.Flags&block.Fast != 0:
		// It may need a copy first; and were it refused by the COW device, in place of a copy, that would cost the
		// snapshot.
		r.Complete(block.NewError(r, syscall.ENOTSUP, "a snapshot has no fast way to write zeroes"))
	default:
		s.write(r)
	}
	return nil
}

func (s *Snapshot) chunkOf(offset int64) cowstore.Chunk {
	return cowstore.Chunk(offset >> s.chunkShift)
}

// chunksOf is the half-open range of chunks that the bytes [offset, offset+length) touch.
func (s *Snapshot) chunksOf(offset, length int64) (start, end cowstore.Chunk) {
	if length == 0 {
		return s.chunkOf(offset), s.chunkOf(offset)
	}
	return s.chunkOf(offset), s.chunkOf(offset+length-1) + 1
}

// lookup is the slot of chunk.
func (s *Snapshot) lookup(chunk cowstore.Chunk) slot {
	if at := s.table.find(chunk); at != nil {
		return slot(at.Load())
	}
	return 0
}

// moveTo is the offset on the COW device of the byte at offset of the snapshot, whose chunk lies at chunk to.
func (s *Snapshot) moveTo(offset int64, to cowstore.Chunk) int64 {
	return s.chunkSize.Offset(to) + offset&(int64(s.chunkSize)-1)
}

// invalidError is what a request to an invalid snapshot fails with.
func (s *Snapshot) invalidError(r *block.Request) error {
	return &block.Error{
		Op: r.Op, Offset: r.Offset, Length: r.Length, Errno: syscall.EIO,
		Err: fmt.Errorf("snapshot %q is invalid: %w", s.name, s.invalidCause()),
	}
}

// Status is the state of a snapshot.
type Status struct {
	Invalid     error // the cause; nil: valid
	Overflowed  bool
	Persistent  bool
	ChunkSize   cowstore.ChunkSize
	Allocated   block.Sector // on the COW device
	Total       block.Sector
	Metadata    block.Sector
	Copied      uint64 // chunks copied from the origin; for a persistent store all exceptions since it was made
	Overwritten uint64 // chunks filled by writes to the snapshot without a copy
	TableBytes  int64  // memory of the exception table
	Pending     int    // exceptions in flight
	Stalled     int    // requests that wait for room
}

// Status is a look at the counters; while I/O runs they need not agree with each other.
func (s *Snapshot) Status() Status {
	st := Status{
		Invalid:    s.invalidCause(),
		Overflowed: s.full.overflowed.Load(),
		Persistent: s.persistent != nil,
		ChunkSize:  s.chunkSize,
		TableBytes: s.table.bytes() + s.known.bytes(),
		Pending:    s.exceptions.inUse(),
		Stalled:    s.full.stalled(),
	}
	st.Allocated, st.Total, st.Metadata = s.store.Usage()
	for i := range s.overwritten.Len() {
		st.Overwritten += s.overwritten.Index(i).Load()
	}
	held := uint64(s.chunkSize.ChunkFloor((st.Allocated - min(st.Allocated, st.Metadata)).Bytes()))
	st.Copied = held - min(held, st.Overwritten+uint64(st.Pending))
	return st
}

// String is the kernel's status line, in its order of precedence: "Invalid", "Overflow", or "allocated/total metadata"
// in sectors.
func (st Status) String() string {
	switch {
	case st.Invalid != nil:
		return "Invalid"
	case st.Overflowed:
		return "Overflow"
	}
	return fmt.Sprintf("%d/%d %d", st.Allocated, st.Total, st.Metadata)
}

// Table is what the kernel's table line says behind the devices: the type of the store, the chunk size in sectors, and
// the features.
func (s *Snapshot) Table() string {
	kind := "N"
	switch {
	case s.persistent != nil && s.full.policy == FullOverflow:
		kind = "PO"
	case s.persistent != nil:
		kind = "P"
	}
	line := fmt.Sprintf("%s %d", kind, block.SectorFloor(int64(s.chunkSize)))
	switch {
	case s.passdown:
		line += " 2 discard_zeroes_cow discard_passdown_origin"
	case s.discards:
		line += " 1 discard_zeroes_cow"
	}
	return line
}
