package cowstore

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"

	"cowherd/block"
)

// PersistentConfig is what a persistent store can be told. The zero value is the default.
type PersistentConfig struct {
	// ReadOnly: nothing on the device is changed, and nothing can be allocated, committed or made invalid. For tools.
	ReadOnly bool
}

// Persistent is the exception store of the kernel's type "P": a table of exceptions on the COW device itself, in the
// format of format.go, that survives a restart. Safe for concurrent use, but for LoadTable, which comes first.
//
//	CreatePersistent or OpenPersistent    header
//	LoadTable                             the table is streamed to the snapshot, gaps are found, the tail is cleaned
//	Allocate, write the chunk, Commit     any number at a time: see commit.go
//	Last, Erase                           a merge takes the table back from its end: see tail.go
//	Invalidate                            at any time, once, for good
//	Wait                                  nothing of the store's own I/O is in flight
//
// Chunks are given out in ascending order, and so are the gaps: chunks below the highest that no record names. A crash
// leaves them, because a chunk is given out before its record is written. The kernel has no use for gaps and therefore
// writes records in the order of allocation (commit 230c83afdd9c); here the table says which chunks are free, so
// records may be written in any order.
//
// Invariants:
//
//  1. A chunk is given out once, and never one that holds metadata or that a record names.
//  2. A record is written when its chunk's data is durable, and its Done is called when the record is.
//  3. Behind the last record everything up to the end of its area is zero; before the last slot of an area is filled,
//     the next area is zero, and that is durable. So whatever part of a write survives a crash, the table read back is
//     a prefix of the records in the order of their commits, and nothing behind it can come to life later.
//  4. After an error of the device no record is written any more: what the device holds is unknown.
//  5. The header is written from a buffer of its own.
type Persistent struct {
	device    block.Device
	readOnly  bool
	valid     bool // what the header said when the store was opened
	chunkSize ChunkSize
	layout    Layout // but for Chunks, which grows: see chunks
	flushes   bool   // the device needs them

	chunks  atomic.Uint64 // whole chunks of the device
	next    atomic.Uint64 // above all chunks that were given out; never one of metadata
	limit   atomic.Uint64 // chunks from here on are not given out
	hasGaps atomic.Bool
	current atomic.Uint64 // the area that records are put in; for Usage
	warning warning

	gapMu sync.Mutex
	// Chunks below next that are free, but for areas that lie between them; the lowest last.
	gaps []chunkRun // +checklocks:gapMu

	table  tail // where the table ends
	commit committing
	header invalidation
}

// CreatePersistent makes a new, empty store on d, whatever was there before, and opens it. EINVAL: d has no room for
// header, area and one chunk of data, or is read-only; or chunkSize does not suit it.
func CreatePersistent(d block.Device, chunkSize ChunkSize, c PersistentConfig) (*Persistent, error) {
	if err := CheckNewChunkSize(int64(chunkSize), d.Limits().LogicalBlock); err != nil {
		return nil, fmt.Errorf("%w: %w", err, syscall.EINVAL)
	}
	layout := NewLayout(d.Size(), chunkSize)
	if layout.Chunks < 3 {
		return nil, fmt.Errorf("the COW device has %d bytes: a store with chunks of %d needs 3 of them: %w", d.Size(),
			chunkSize, syscall.EINVAL)
	}
	if c.ReadOnly || d.Limits().ReadOnly {
		return nil, fmt.Errorf("make an exception store: the COW device is read-only: %w", syscall.EROFS)
	}
	if err := format(d, layout); err != nil {
		return nil, fmt.Errorf("make an exception store: %w", err)
	}
	return OpenPersistent(d, c)
}

// format writes an empty store. What was there is no store from the first step on, and the new one is there with the
// last: a crash between leaves nothing that could be taken for either.
func format(d block.Device, l Layout) error {
	p := make([]byte, l.pieceSize())
	if err := block.Write(d, p, 0); err != nil {
		return err
	}
	if err := block.Flush(d); err != nil {
		return err
	}
	for area := range min(l.Areas(), 2) {
		if err := zero(d, l.place(area, 0), int64(l.ChunkSize)); err != nil {
			return err
		}
	}
	if err := block.Flush(d); err != nil {
		return err
	}
	if rest := int64(l.ChunkSize) - int64(len(p)); rest > 0 {
		if err := zero(d, int64(len(p)), rest); err != nil {
			return err
		}
	}
	Header{Valid: true, ChunkSize: l.ChunkSize}.put(p)
	if err := block.Write(d, p, 0); err != nil {
		return err
	}
	return block.Flush(d)
}

// zero writes zeroes and waits for it.
func zero(d block.Device, offset, length int64) error {
	r := &block.Request{Op: block.OpWriteZeroes, Offset: offset, Length: length}
	done := make(chan error, 1)
	r.Push(completer(func(err error) { done <- err }))
	submitZeroes(d, r)
	return <-done
}

// completer is a function as the Completer of a request.
type completer func(error)

func (f completer) Complete(_ *block.Request, err error) { f(err) }

// zeroes is what zeroes are written from.
var zeroes [pieceBytes]byte

// submitZeroes submits r, a write of zeroes: as a plain write where that is little, because to make a hole and to fill it
// soon after costs a file system more.
func submitZeroes(d block.Device, r *block.Request) {
	if r.Length > pieceBytes {
		block.SubmitZeroes(d, r)
		return
	}
	r.Op, r.Data = block.OpWrite, zeroes[:r.Length]
	d.Submit(r)
}

// OpenPersistent opens the store on d, whose chunk size is that of its header. ErrNoStore: there is none.
// *CorruptError: it cannot be used. A store that was made invalid is opened; see Valid. Before anything else Load is
// called, once.
func OpenPersistent(d block.Device, c PersistentConfig) (*Persistent, error) {
	if !c.ReadOnly && d.Limits().ReadOnly {
		return nil, fmt.Errorf("the COW device is read-only: %w", syscall.EROFS)
	}
	h, err := ReadHeader(d)
	if err != nil {
		return nil, err
	}
	p := &Persistent{
		device:    d,
		readOnly:  c.ReadOnly,
		valid:     h.Valid,
		chunkSize: h.ChunkSize,
		layout:    NewLayout(d.Size(), h.ChunkSize),
		flushes:   d.Limits().NeedsFlush,
	}
	if p.layout.Chunks < 2 {
		return nil, corruptHeader("the device has %d bytes: there is no room for an area of %d behind the header",
			d.Size(), h.ChunkSize)
	}
	p.next.Store(2)
	p.measure(d.Size())
	p.table.init(p)
	p.commit.init(p)
	return p, nil
}

// measure takes over a new size of the device.
func (p *Persistent) measure(size int64) {
	l := NewLayout(size, p.chunkSize)
	limit := l.Chunks
	// The chunk that would fill the last area is of no use: no area could follow, and the kernel then cannot open the
	// store.
	if limit > 1 && (limit-1)%l.stride() == 0 {
		limit--
	}
	p.limit.Store(uint64(limit))
	p.chunks.Store(uint64(l.Chunks))
	p.warning.measure(uint64(l.Chunks))
}

// now is the layout at this moment.
func (p *Persistent) now() Layout {
	return Layout{ChunkSize: p.chunkSize, Chunks: Chunk(p.chunks.Load())}
}

// ChunkSize is the store's, from its header.
func (p *Persistent) ChunkSize() ChunkSize { return p.chunkSize }

// Valid tells whether the header called the store valid when it was opened.
func (p *Persistent) Valid() bool { return p.valid }

// Allocate reserves a run of consecutive chunks: at least one, at most want (want > 0). The error is ENOSPC when every
// chunk is taken.
func (p *Persistent) Allocate(_ block.Queue, want int) (first Chunk, count int, err error) {
	if p.readOnly {
		return 0, 0, syscall.EROFS
	}
	if p.hasGaps.Load() {
		if first, count = p.takeGap(want); count > 0 {
			return first, count, nil
		}
	}
	stride := uint64(p.layout.stride())
	for {
		next, limit := p.next.Load(), p.limit.Load()
		if next >= limit {
			return 0, 0, fmt.Errorf("no room: all %d chunks of %d bytes are in use: %w", p.chunks.Load(), p.chunkSize,
				syscall.ENOSPC)
		}
		// Up to the next area: chunk n holds one if n modulo stride is 1.
		n := min(uint64(want), limit-next, stride-(next-1)%stride)
		after := uint64(p.layout.skipMetadata(Chunk(next + n)))
		if p.next.CompareAndSwap(next, after) {
			p.warning.check(after)
			return Chunk(next), int(n), nil
		}
	}
}

// takeGap takes up to want chunks of the lowest gap; count 0: there is none.
func (p *Persistent) takeGap(want int) (first Chunk, count int) {
	p.gapMu.Lock()
	defer p.gapMu.Unlock()
	stride := p.layout.stride()
	for len(p.gaps) > 0 && count == 0 {
		g := &p.gaps[len(p.gaps)-1]
		first = p.layout.skipMetadata(g.first)
		if first < g.end {
			count = int(min(Chunk(want), g.end-first, stride-(first-1)%stride))
		}
		if g.first = first + Chunk(count); g.first >= g.end {
			p.gaps = p.gaps[:len(p.gaps)-1]
		}
	}
	p.hasGaps.Store(len(p.gaps) > 0)
	return first, count
}

// Usage counts sectors as the kernel does: allocated is everything below the highest chunk that was given out, metadata
// and gaps included; total is the device; metadata are the header and the areas up to the one that follows the current.
func (p *Persistent) Usage() (allocated, total, metadata block.Sector) {
	sectors := func(chunks uint64) block.Sector { return block.SectorFloor(p.chunkSize.Offset(Chunk(chunks))) }
	return sectors(p.next.Load()), block.SectorFloor(p.device.Size()), sectors(p.current.Load() + 2)
}

// Warn calls warned, with no lock held, each time that one of the percentages of the device has been given out for the
// first time. To be called before the first Allocate. warned must not block.
func (p *Persistent) Warn(percents []int, warned func(percent int)) {
	p.warning.set(percents, warned)
	p.warning.measure(p.chunks.Load())
}

// Resize lets the store use size bytes of its device, which is that large already. EINVAL: it uses as much or more.
func (p *Persistent) Resize(size int64) error {
	if p.readOnly {
		return errReadOnly()
	}
	if NewLayout(size, p.chunkSize).Chunks < p.now().Chunks || size > p.device.Size() {
		return fmt.Errorf("resize to %d bytes: the store has %d chunks of %d, and the device %d bytes: %w", size,
			p.chunks.Load(), p.chunkSize, p.device.Size(), syscall.EINVAL)
	}
	p.measure(size)
	return nil
}

// errReadOnly is what commits fail with.
func errReadOnly() error {
	return fmt.Errorf("the exception store is open for reading only: %w", syscall.EROFS)
}

// invalidation makes the header say that the store is invalid, once.
type invalidation struct {
	mu sync.Mutex
	// +checklocks:mu
	state invalidState
	// +checklocks:mu
	err error // of the attempt, once it is over
	// Those who wait for its end.
	waiting []func(error) // +checklocks:mu

	r    block.Request
	page []byte
}

type invalidState uint8

const (
	untouched invalidState = iota
	invalidating
	invalidated
)

// StartInvalidate makes the store invalid for good, on the device; done is called once, with no lock held and possibly
// before StartInvalidate returns, when that is durable or has failed.
func (p *Persistent) StartInvalidate(done func(error)) {
	h := &p.header
	h.mu.Lock()
	state, err := h.state, h.err
	if state != invalidated {
		h.waiting = append(h.waiting, done)
	}
	if state == untouched {
		h.state = invalidating
	}
	h.mu.Unlock()
	switch {
	case state == invalidated:
		done(err)
	case state == untouched && p.readOnly:
		p.endInvalidate(errReadOnly())
	case state == untouched:
		h.page = make([]byte, max(block.SectorSize, p.device.Limits().LogicalBlock))
		Header{ChunkSize: p.chunkSize}.put(h.page)
		h.r.Op, h.r.Offset, h.r.Length, h.r.Data = block.OpWrite, 0, int64(len(h.page)), h.page
		h.r.Push((*headerWritten)(p))
		p.device.Submit(&h.r)
	}
}

// Invalidate is StartInvalidate that waits. It must not be called from a completion.
func (p *Persistent) Invalidate() error {
	done := make(chan error, 1)
	p.StartInvalidate(func(err error) { done <- err })
	return <-done
}

// headerWritten is the Persistent as the Completer of the header's write, and of the flush behind it.
type headerWritten Persistent

func (w *headerWritten) Complete(r *block.Request, err error) {
	p := (*Persistent)(w)
	if err != nil || r.Op == block.OpFlush || !p.flushes {
		p.endInvalidate(err)
		return
	}
	r.Reset()
	r.Op = block.OpFlush
	r.Push(w)
	p.device.Submit(r)
}

// endInvalidate tells those who wait.
func (p *Persistent) endInvalidate(err error) {
	if err != nil {
		err = fmt.Errorf("the header of the exception store could not be made invalid: %w", err)
	}
	h := &p.header
	h.mu.Lock()
	h.state, h.err = invalidated, err
	waiting := h.waiting
	h.waiting = nil
	h.mu.Unlock()
	for _, done := range waiting {
		done(err)
	}
}

// Wait returns when none of the store's own I/O is in flight and no Done is running. Nothing may be committed meanwhile.
// It must not be called from a completion.
func (p *Persistent) Wait() {
	p.commit.wait()
	h := &p.header
	h.mu.Lock()
	busy := h.state == invalidating
	h.mu.Unlock()
	if busy {
		_ = p.Invalidate() // the error is that of the one under way, whose caller is told
	}
}

var errNoArea = errors.New("no room for the area of records that must follow a full one")
