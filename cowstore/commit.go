package cowstore

import (
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"

	"cowherd/block"
)

// Commit asks a store to remember that Count chunks of the origin, from Old on, lie in as many chunks of the COW device,
// from New on, whose data has been written. It is the store's until Done is called, and then the caller's again.
type Commit struct {
	Old, New Chunk
	Count    int
	// Done is called once, with no lock held, when the exceptions are durable, or never will be: Err.
	Done func(*Commit)
	Err  error

	put  int // records that are in the table
	next *Commit
}

// commitList is a queue of commits, linked through themselves.
type commitList struct{ head, tail *Commit }

func (l *commitList) empty() bool { return l.head == nil }

func (l *commitList) push(c *Commit) {
	c.next = nil
	if l.tail == nil {
		l.head = c
	} else {
		l.tail.next = c
	}
	l.tail = c
}

func (l *commitList) pop() *Commit {
	c := l.head
	if l.head = c.next; l.head == nil {
		l.tail = nil
	}
	c.next = nil
	return c
}

// add moves all of more to the end of l.
func (l *commitList) add(more *commitList) {
	switch {
	case more.head == nil:
		return
	case l.tail == nil:
		l.head = more.head
	default:
		l.tail.next = more.head
	}
	l.tail = more.tail
	*more = commitList{}
}

// committing is the group commit. Copies end in any order, on any goroutine; each adds its commit to those gathered,
// and goes on with its next request. Whoever finds nobody at work becomes the runner, which moves on from completion to
// completion, on whichever goroutine that is, until nothing is left: there is no thread of its own, and a completion
// that comes before Submit returns is a turn of a loop and no recursion.
//
//	gathered     data written, not known to be durable
//	   | flush begins: a flush covers what was complete before
//	covered
//	   | flush ends
//	ready        data durable: records may be written
//	   | put: as many as fit the area's segment, in one write
//	written
//	   | flush begins and ends; the same flush covers what has gathered meanwhile
//	done         Done is called, while the next write or flush is under way
//
// So under load each flush serves two groups, the records of one and the data of the next, and a commit takes between
// one and two flushes and a write. A put writes into one area only, and ends with a flush before the next: a crash
// cannot keep records of an area and lose those before it. The area that follows the current is zeroed with the first
// put into the current one, and the current is not filled before the flush behind that.
//
// Rejected: to write when the last allocated exception commits, as the kernel does (latency grows with the load, and
// one slow copy holds up all); a ticket and a sleeping leader for each caller (a completion must not sleep); FUA on the
// area's write (it would flush the same device cache and cover no data).
//
// Invariants:
//
//  1. running is true from the first gathered commit until the runner has found nothing to do, with mu held. Everything
//     but mu's own is the runner's.
//  2. A commit is in one list at a time, and moves as drawn.
type committing struct {
	mu sync.Mutex
	// +checklocks:mu
	gathered commitList
	// +checklocks:mu
	running bool
	// Closed when the runner ends; not nil while somebody waits for that.
	ended chan struct{} // +checklocks:mu

	covered, ready, written, done commitList
	failure                       error // no record is written any more
	stage                         commitStage
	unflushed                     bool // there was a put since the last flush

	barrier atomic.Int32 // I/O of the stage in flight, and one while it is issued
	ioErr   atomic.Pointer[error]

	data, zero, flush block.Request
}

// commitStage is what the runner has issued.
type commitStage uint8

const (
	resting commitStage = iota // nothing, only Dones are called
	putting
	flushing
)

// Commit takes c. It neither waits for I/O that others have begun nor for locks that are held across I/O.
func (p *Persistent) Commit(c *Commit) {
	c.Err, c.put = nil, 0
	x := &p.commit
	x.mu.Lock()
	x.gathered.push(c)
	idle := !x.running
	x.running = true
	x.mu.Unlock()
	if idle {
		p.runCommits()
	}
}

// runCommits moves commits on until it has to wait for I/O, whose last completion calls it again, or nothing is left.
func (p *Persistent) runCommits() {
	x := &p.commit
	for p.nextStage() {
		x.barrier.Store(1)
		switch x.stage {
		case putting:
			p.put()
		case flushing:
			if p.flushes {
				p.submit(&x.flush, block.OpFlush, 0, nil)
			}
		case resting:
		}
		x.callDone()
		if x.barrier.Add(-1) > 0 {
			return
		}
		p.endStage()
	}
}

// nextStage chooses what is to be issued; false: nothing is left, and the caller is the runner no longer.
func (p *Persistent) nextStage() bool {
	x := &p.commit
	if !x.ready.empty() && !x.unflushed && x.failure == nil {
		x.stage = putting
		return true
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	switch {
	case x.failure != nil:
		x.stage = resting
		x.failLocked()
		if !x.done.empty() {
			return true
		}
	case !x.gathered.empty() || x.unflushed:
		x.stage = flushing
		x.covered = x.gathered
		x.gathered = commitList{}
		return true
	case !x.done.empty():
		x.stage = resting
		return true
	}
	x.running = false
	if x.ended != nil {
		close(x.ended)
		x.ended = nil
	}
	return false
}

// failLocked gives up all commits.
// +checklocks:x.mu
func (x *committing) failLocked() {
	for _, l := range []*commitList{&x.written, &x.ready, &x.covered, &x.gathered} {
		for c := l.head; c != nil; c = c.next {
			c.Err = x.failure
		}
		x.done.add(l)
	}
}

// endStage draws the conclusions when all I/O of the stage is over.
func (p *Persistent) endStage() {
	x := &p.commit
	if err := x.ioErr.Load(); err != nil && x.failure == nil {
		x.failure = fmt.Errorf("the exception store could not be written: %w", *err)
	}
	if x.failure != nil || x.stage != flushing {
		return
	}
	x.unflushed = false
	p.table.prepared = p.table.zeroed
	x.done.add(&x.written)
	x.ready.add(&x.covered)
}

// callDone hands back the commits that are done.
func (x *committing) callDone() {
	done := x.done
	x.done = commitList{}
	for !done.empty() {
		c := done.pop()
		c.Done(c)
	}
}

// submit issues one I/O of the stage.
func (p *Persistent) submit(r *block.Request, op block.Op, offset int64, data []byte) {
	p.commit.barrier.Add(1)
	r.Reset()
	r.Op, r.Offset, r.Length, r.Data = op, offset, int64(len(data)), data
	r.Push((*stageIO)(p))
	p.device.Submit(r)
}

// stageIO is the Persistent as the Completer of a stage's I/O.
type stageIO Persistent

func (s *stageIO) Complete(_ *block.Request, err error) {
	p := (*Persistent)(s)
	if err != nil {
		first := err
		p.commit.ioErr.CompareAndSwap(nil, &first)
	}
	if p.commit.barrier.Add(-1) == 0 {
		p.endStage()
		p.runCommits()
	}
}

// put writes records of ready commits to the table's segment, and zeroes to the area behind the current one if that has
// not been done.
func (p *Persistent) put() {
	x, t := &p.commit, &p.table
	x.unflushed = true
	layout := p.now()
	nextExists := t.area+1 < layout.Areas()
	if t.zeroed <= t.area && nextExists {
		t.zeroed = t.area + 1
		x.barrier.Add(1)
		x.zero.Reset()
		x.zero.Op, x.zero.Offset, x.zero.Length = block.OpWriteZeroes, layout.place(t.area+1, 0), int64(p.chunkSize)
		x.zero.Push((*stageIO)(p))
		submitZeroes(p.device, &x.zero)
	}
	room := t.room(layout, t.prepared > t.area)
	if room == 0 && !nextExists {
		x.failure = fmt.Errorf("%w: %w", errNoArea, syscall.ENOSPC)
		return
	}
	first := t.slot
	for room > 0 && !x.ready.empty() {
		c := x.ready.head
		for ; room > 0 && c.put < c.Count; room-- {
			t.append(Record{Old: c.Old + Chunk(c.put), New: c.New + Chunk(c.put)})
			c.put++
		}
		if c.put == c.Count {
			x.written.push(x.ready.pop())
		}
	}
	if t.slot > first {
		offset, data := t.dirty(layout, first)
		p.submit(&x.data, block.OpWrite, offset, data)
		t.turn(layout)
		p.current.Store(t.area)
	}
}

// wait returns when there is no runner.
func (x *committing) wait() {
	x.mu.Lock()
	if !x.running {
		x.mu.Unlock()
		return
	}
	if x.ended == nil {
		x.ended = make(chan struct{})
	}
	ended := x.ended
	x.mu.Unlock()
	<-ended
}
