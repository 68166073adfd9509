package cowstore

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"

	"cowherd/block"
	"cowherd/internal/percpu"
)

// Commit asks a store to remember that Count chunks of the origin, from Old on, lie in as many chunks of the COW device,
// from New on, whose data has been written. It is the store's until Done is called, and then the caller's again.
type Commit struct {
	Old, New Chunk
	Count    int
	Queue    block.Queue
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
// and goes on with its next request. Whoever finds nobody at work starts the runner, a goroutine that moves on from
// completion to completion, on whichever goroutine that is, until nothing is left. It is a new goroutine each time, and
// not the caller's, because where I/O is over when Submit returns the caller would commit each exception by itself; so
// those gather which the caller has at hand before it sleeps. A completion that comes before Submit returns is a turn of
// a loop and no recursion.
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
// Done is called on goroutines of the commits' queues, one for each queue that a group has commits of: what follows (the
// write that waited for the copy) is I/O, and would be done by one CPU otherwise.
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
//
// Lock order: mu and doneShard.mu are leaves.
type committing struct {
	mu sync.Mutex
	// +checklocks:mu
	gathered commitList
	// +checklocks:mu
	running bool
	// Closed when the runner ends; not nil while somebody waits for that.
	ended chan struct{} // +checklocks:mu

	covered commitList
	ready   commitList
	written commitList
	done    commitList

	failure   error // no record is written any more
	stage     commitStage
	unflushed bool // there was a put since the last flush

	barrier atomic.Int32 // I/O of the stage in flight, and one while it is issued
	ioErr   atomic.Pointer[error]

	data  block.Request
	zero  block.Request
	flush block.Request

	run     func() // Persistent.runCommits, made once so that starting a goroutine allocates nothing
	calls   percpu.Shards[doneShard]
	calling sync.WaitGroup // goroutines of calls

	// Counted by the runner alone.
	records atomic.Uint64
	puts    atomic.Uint64
	flushes atomic.Uint64
}

// Commits count what has been committed since the store was opened.
type Commits struct {
	Records uint64 // exceptions
	Puts    uint64 // writes of records
	Flushes uint64
}

// Commits are the store's counters; while it is in use they need not agree with each other.
func (p *Persistent) Commits() Commits {
	x := &p.commit
	return Commits{Records: x.records.Load(), Puts: x.puts.Load(), Flushes: x.flushes.Load()}
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
		go x.run()
	}
}

func (x *committing) init(p *Persistent) {
	x.run = p.runCommits
	x.calls = percpu.New[doneShard]()
	for i := range x.calls.Len() {
		s := x.calls.Index(i)
		s.run = func() {
			s.drain()
			x.calling.Done()
		}
	}
}

// runCommits moves commits on until it has to wait for I/O, whose last completion calls it again, or nothing is left.
func (p *Persistent) runCommits() {
	x := &p.commit
	for {
		// Let those commit who are about to: where I/O is over when Submit returns, the runner would not wait for anything.
		runtime.Gosched()
		if !p.nextStage() {
			return
		}
		x.barrier.Store(1)
		switch x.stage {
		case putting:
			p.put()
		case flushing:
			if p.flushes {
				x.flushes.Add(1)
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

// doneShard is the commits of some queues that are done.
type doneShard struct {
	run func() // drains it

	mu sync.Mutex
	// +checklocks:mu
	list commitList
	// A goroutine runs the list dry.
	running bool // +checklocks:mu
}

// callDone hands back the commits that are done: on this goroutine if all are of one queue.
func (x *committing) callDone() {
	var mine *doneShard
	for !x.done.empty() {
		c := x.done.pop()
		s := x.calls.At(uint(c.Queue))
		s.mu.Lock()
		s.list.push(c)
		idle := !s.running
		s.running = true
		s.mu.Unlock()
		if !idle {
			continue
		}
		if mine != nil {
			x.calling.Add(1)
			go mine.run()
		}
		mine = s
	}
	if mine != nil {
		mine.drain()
	}
}

// drain calls Done until nothing is left. The caller has set running.
func (s *doneShard) drain() {
	for {
		s.mu.Lock()
		list := s.list
		s.list = commitList{}
		s.running = !list.empty()
		s.mu.Unlock()
		if list.empty() {
			return
		}
		for !list.empty() {
			c := list.pop()
			c.Done(c)
		}
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
		x.puts.Add(1)
		x.records.Add(uint64(t.slot - first))
		offset, data := t.dirty(layout, first)
		p.submit(&x.data, block.OpWrite, offset, data)
		t.turn(layout)
		p.current.Store(t.area)
	}
}

// wait returns when there is no runner and no Done is running.
func (x *committing) wait() {
	x.mu.Lock()
	var ended chan struct{}
	if x.running {
		if x.ended == nil {
			x.ended = make(chan struct{})
		}
		ended = x.ended
	}
	x.mu.Unlock()
	if ended != nil {
		<-ended
	}
	x.calling.Wait()
}
