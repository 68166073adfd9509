package fault

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"cowherd/block"
)

// Recorder keeps, in one order, what happens to several disks in memory and what a test marks between, so that a Replay
// can tell what each disk would have held had the power failed at any moment.
//
//	mark     "write 7 is submitted"
//	write    cow: 4096 bytes at 8192                 the disk holds it, in a cache that a power failure empties
//	flush    cow                                     what had completed before it was submitted is safe now
//	write    cow: 4096 bytes at 4096, FUA
//	durable  cow: 4096 bytes at 4096                 the write with FUA completes next
//	write    origin: 1024 bytes at 3072
//	mark     "write 7 is acknowledged"
//
// Invariants:
//
//  1. An event is recorded at the moment at which it takes effect: every read sees exactly the writes before it.
//  2. A flush makes durable the writes to its disk that had completed when it was submitted, and no others. Those in
//     flight meanwhile are not covered, even if they take effect before the flush does.
//  3. A write with FUA is durable when it completes, not when it takes effect.
//  4. Writes are whole sectors, as disks have them: of a sector that is written in part all is recorded, as it is then.
//  5. A disk that has grown is as small as before after a power failure, unless a flush, or a write with FUA, that came
//     later is durable.
//
// A disk never fails and never loses what it has acknowledged; faults are put above it. Safe for concurrent use.
type Recorder struct {
	mu    sync.Mutex
	disks []*Disk // +checklocks:mu
	log   []event // +checklocks:mu
	// Counts what happens, completions and submissions of flushes too, which are not in the log.
	clock uint64 // +checklocks:mu
	// When the flushes in flight were submitted.
	flushes map[*block.Request]uint64 // +checklocks:mu
}

// Kind is what an event is.
type Kind uint8

// The kinds of events.
const (
	EventWrite   Kind = iota // a write, a write of zeroes or a discard has taken effect
	EventFlush               // a flush has taken effect
	EventDurable             // a write with FUA is about to complete
	EventGrow                // the disk has become larger
	EventMark                // Recorder.Mark was called
)

// Event is an entry of a recorder's log.
type Event struct {
	Kind           Kind
	Disk           *Disk       // nil for a mark
	Op             block.Op    // EventWrite, EventDurable: what was asked
	Flags          block.Flags // of the request
	Offset, Length int64       // EventWrite, EventDurable: the sectors, in bytes. EventGrow: Length is the new size
	Mark           any         // EventMark
}

// String is a line of a log.
func (e Event) String() string {
	switch e.Kind {
	case EventMark:
		return fmt.Sprintf("mark     %v", e.Mark)
	case EventFlush:
		return "flush    " + e.Disk.name
	case EventGrow:
		return fmt.Sprintf("grow     %s: to %d bytes", e.Disk.name, e.Length)
	}
	kind, fua := "write   ", ""
	if e.Kind == EventDurable {
		kind = "durable "
	}
	if e.Flags&block.FUA != 0 {
		fua = ", FUA"
	}
	return fmt.Sprintf("%s %s: %v, %d bytes at %d%s", kind, e.Disk.name, e.Op, e.Length, e.Offset, fua)
}

// event is an Event with what a replay needs.
type event struct {
	Event
	data      []byte // EventWrite: what the sectors hold afterwards
	completed uint64 // EventWrite, EventGrow: the clock when it completed; 0: it has not
	submitted uint64 // EventFlush: the clock when it was submitted
	write     int    // EventDurable: the index of the write in the log
}

// NewRecorder is a Recorder without disks.
func NewRecorder() *Recorder { return &Recorder{flushes: make(map[*block.Request]uint64)} }

// Mark puts what a test knows into the log.
func (r *Recorder) Mark(mark any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log = append(r.log, event{Event: Event{Kind: EventMark, Mark: mark}})
}

// tickLocked is the clock's next value.
//
// +checklocks:r.mu
func (r *Recorder) tickLocked() uint64 {
	r.clock++
	return r.clock
}

// discarded is what discarded bytes read as: neither what was there nor zeroes.
const discarded = 0xDD

// DiskConfig describes a disk.
type DiskConfig struct {
	Name    string
	Content []byte // what it holds at first; the recorder's from now on
	Limits  block.Limits
	// Through puts something in front of the disk, such as an Async, which requests pass between their submission and
	// the moment when they take effect; nil: nothing, they take effect in Submit.
	Through func(block.Device) block.Device
}

// Disk is a device in memory whose writes and flushes are recorded. It may be used concurrently.
type Disk struct {
	recorder *Recorder
	name     string
	index    int
	limits   block.Limits
	size     atomic.Int64
	first    []byte // what it held at first
	content  []byte // +checklocksignore: guarded by the recorder's lock
	path     block.Device
}

// NewDisk adds a disk to the recorder.
func (r *Recorder) NewDisk(c DiskConfig) *Disk {
	d := &Disk{recorder: r, name: c.Name, limits: c.Limits, first: c.Content, content: slices.Clone(c.Content)}
	d.size.Store(int64(len(c.Content)))
	d.path = (*platter)(d)
	if c.Through != nil {
		d.path = c.Through(d.path)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	d.index = len(r.disks)
	r.disks = append(r.disks, d)
	return d
}

// Name is what the disk is called in a log.
func (d *Disk) Name() string { return d.name }

// Size is the length of the disk's content.
func (d *Disk) Size() int64 { return d.size.Load() }

// Limits are those that the disk was made with.
func (d *Disk) Limits() block.Limits { return d.limits }

// Grow makes the disk at least size bytes long; what is new is zero.
func (d *Disk) Grow(size int64) error {
	r := d.recorder
	r.mu.Lock()
	defer r.mu.Unlock()
	if more := size - d.size.Load(); more > 0 {
		d.content = append(d.content, make([]byte, more)...)
		grown := Event{Kind: EventGrow, Disk: d, Length: size}
		r.log = append(r.log, event{Event: grown, completed: r.tickLocked()})
		d.size.Store(size)
	}
	return nil
}

// Submit passes r on to the disk.
func (d *Disk) Submit(r *block.Request) {
	if err := block.CheckRange(r, d.Size(), d.limits); err != nil {
		r.Complete(err)
		return
	}
	if r.Op == block.OpFlush {
		d.recorder.mu.Lock()
		d.recorder.flushes[r] = d.recorder.tickLocked()
		d.recorder.mu.Unlock()
	}
	d.path.Submit(r)
}

// platter is a Disk behind all that lies in front of it.
type platter Disk

func (p *platter) Size() int64          { return p.size.Load() }
func (p *platter) Limits() block.Limits { return p.limits }

// Submit does r, and records it.
func (p *platter) Submit(r *block.Request) {
	rec := p.recorder
	rec.mu.Lock()
	switch {
	case r.Op == block.OpRead:
		copy(r.Data, p.content[r.Offset:r.End()])
	case r.Op == block.OpFlush:
		rec.log = append(rec.log, event{Event: Event{Kind: EventFlush, Disk: (*Disk)(p)}, submitted: rec.flushes[r]})
		delete(rec.flushes, r)
	case r.Length > 0:
		p.change(r)
		at := rec.writtenLocked((*Disk)(p), r)
		// Unlocked between effect and completion, so that other requests get in between.
		rec.mu.Unlock()
		rec.mu.Lock()
		rec.completeLocked(at)
	}
	rec.mu.Unlock()
	r.Complete(nil)
}

// change does a request that writes. The recorder is locked.
func (p *platter) change(r *block.Request) {
	place := p.content[r.Offset:r.End()]
	switch r.Op {
	case block.OpWrite:
		copy(place, r.Data)
	case block.OpWriteZeroes:
		clear(place)
	case block.OpDiscard:
		for i := range place {
			place[i] = discarded
		}
	}
}

// writtenLocked records a write that has taken effect, and returns its index in the log.
//
// +checklocks:r.mu
func (r *Recorder) writtenLocked(d *Disk, req *block.Request) int {
	start := block.SectorFloor(req.Offset).Bytes()
	end := min(block.SectorCeil(req.End()).Bytes(), d.size.Load())
	r.log = append(r.log, event{
		Event: Event{Kind: EventWrite, Disk: d, Op: req.Op, Flags: req.Flags, Offset: start, Length: end - start},
		data:  slices.Clone(d.content[start:end]),
	})
	return len(r.log) - 1
}

// completeLocked records that a write completes.
//
// +checklocks:r.mu
func (r *Recorder) completeLocked(write int) {
	e := &r.log[write]
	e.completed = r.tickLocked()
	if e.Flags&block.FUA != 0 {
		done := e.Event
		done.Kind = EventDurable
		r.log = append(r.log, event{Event: done, write: write})
	}
}
