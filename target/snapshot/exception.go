package snapshot

import (
	"sync"
	"sync/atomic"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/internal/percpu"
	"cowherd/kcopyd"
)

// exception is a pending exception: a run of consecutive chunks of the origin on their way to as many consecutive
// chunks of the COW device. From claim to finish it belongs to whoever moves it on: the goroutine that claimed it, the
// copy, the last tracked read. Others only load its slots and add requests to its wait list.
//
// A request that waits for a chunk adds itself to the exception that the chunk's slot names and looks at the slot once
// more; finish changes the slots first and takes the list then. By the time a request adds itself the exception may
// have been used again for other chunks: the second look then finds that the slot has changed, and wakes the whole
// list. To be woken is never a promise about a chunk, only a reason to look again.
type exception struct {
	snapshot *Snapshot
	index    uint32
	queue    block.Queue

	from  cowstore.Chunk // first chunk on the origin
	to    cowstore.Chunk // first chunk on the COW device
	count int
	head  *atomic.Uint64 // the slot of from; valid when count > 0

	// overwrite is the snapshot's own write that fills the chunks instead of a copy; nil: they are copied.
	overwrite *block.Request

	waiters block.WaitList // writes to the origin and to the snapshot, to be mapped anew

	readers drain // of tracked reads, before finish

	job    kcopyd.Job
	dest   [1]kcopyd.Region
	commit cowstore.Commit // persistent stores only

	next *exception // in a free list
	_    percpu.Pad
}

// pendingChunk is what a request has to wait for: the slot of a chunk, and what it held.
type pendingChunk struct {
	at   *atomic.Uint64 // nil: nothing to wait for
	seen slot
}

// over tells whether the exception that was seen has ended.
func (p pendingChunk) over() bool {
	now := slot(p.at.Load())
	return now.state() == none || now.state() == copied || now.index() != p.seen.index()
}

// await makes r wait for p; waker is told when it is worth another look, which may be at once.
func (s *Snapshot) await(p pendingChunk, r *block.Request, waker block.Waker) {
	e := s.exceptions.at(p.seen.index())
	r.Mark(block.StageWaiting)
	e.waiters.Add(r, waker)
	if p.over() {
		s.wakeAll(e)
	}
}

// wakeAll maps anew all that waits on e.
func (s *Snapshot) wakeAll(e *exception) {
	if waiting := e.waiters.Take(); waiting.Len() > 0 {
		s.origin.retry.add(waiting)
	}
}

// exceptionPool bounds the exceptions in flight (the kernel's snapshot_cow_threshold) and names each by a small
// index that fits a slot. Each queue keeps its own free list.
type exceptionPool struct {
	snapshot *Snapshot
	all      []atomic.Pointer[exception] // by index; set once each
	shards   percpu.Shards[exceptionShard]
	starved  atomic.Bool // waiting is not empty

	mu   sync.Mutex
	made int // +checklocks:mu
	// Requests to map anew when an exception is free.
	waiting block.List // +checklocks:mu
}

type exceptionShard struct {
	spare atomic.Pointer[exception] // one that is free, so that the common case takes no lock
	mu    sync.Mutex
	// The others.
	free *exception // +checklocks:mu
}

func newExceptionPool(s *Snapshot, limit int) *exceptionPool {
	return &exceptionPool{
		snapshot: s,
		all:      make([]atomic.Pointer[exception], limit),
		shards:   percpu.New[exceptionShard](),
	}
}

// at is the exception with the given index, which a slot named.
func (p *exceptionPool) at(index uint32) *exception { return p.all[index].Load() }

// get takes an idle exception for a run that starts at from; nil: all are in use.
func (p *exceptionPool) get(queue block.Queue, from cowstore.Chunk) *exception {
	e := p.shards.At(uint(queue)).pop()
	if e == nil {
		e = p.make()
	}
	for i := 0; e == nil && i < p.shards.Len(); i++ {
		e = p.shards.Index(i).pop()
	}
	if e == nil {
		return nil
	}
	e.queue, e.from, e.count = queue, from, 0
	return e
}

func (s *exceptionShard) pop() *exception {
	if e := s.spare.Swap(nil); e != nil {
		return e
	}
	s.mu.Lock()
	e := s.free
	if e != nil {
		s.free = e.next
	}
	s.mu.Unlock()
	return e
}

func (s *exceptionShard) push(e *exception) {
	if s.spare.CompareAndSwap(nil, e) {
		return
	}
	s.mu.Lock()
	e.next = s.free
	s.free = e
	s.mu.Unlock()
}

// count is the number of free exceptions.
func (s *exceptionShard) count() int {
	n := 0
	if s.spare.Load() != nil {
		n++
	}
	s.mu.Lock()
	for e := s.free; e != nil; e = e.next {
		n++
	}
	s.mu.Unlock()
	return n
}

// make adds an exception to the pool; nil when the limit is reached.
func (p *exceptionPool) make() *exception {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.made == len(p.all) {
		return nil
	}
	e := &exception{snapshot: p.snapshot, index: uint32(p.made)}
	e.readers.done = func() { e.snapshot.finish(e) }
	e.job.Done = e.copied
	e.commit.Done = e.committed
	p.all[p.made].Store(e)
	p.made++
	return e
}

// put takes back an exception; feedStarved is to follow.
func (p *exceptionPool) put(e *exception) { p.shards.At(uint(e.queue)).push(e) }

// feedStarved lets those go on who found the pool empty. Whoever puts an exception back must call it afterwards.
func (p *exceptionPool) feedStarved() {
	if p.starved.Load() {
		p.feed()
	}
}

// wait keeps r until an exception is free, for waker.
func (p *exceptionPool) wait(r *block.Request, waker block.Waker) {
	r.SetWaker(waker)
	p.mu.Lock()
	p.waiting.PushBack(r)
	p.starved.Store(true)
	p.mu.Unlock()
	// One that was put back between the failed get and the line above saw nobody waiting: look once more.
	if p.idle() {
		p.feed()
	}
}

// idle tells whether any shard has a free exception.
func (p *exceptionPool) idle() bool {
	for i := range p.shards.Len() {
		if p.shards.Index(i).count() > 0 {
			return true
		}
	}
	return false
}

// feed maps anew all that wait for an exception; who finds none again waits again.
func (p *exceptionPool) feed() {
	p.mu.Lock()
	p.starved.Store(false)
	waiting := p.waiting.Take()
	p.mu.Unlock()
	p.snapshot.origin.retry.add(waiting)
}

// inUse is the number of exceptions that are not idle; exact only when nothing is in flight.
func (p *exceptionPool) inUse() int {
	p.mu.Lock()
	n := p.made
	p.mu.Unlock()
	for i := range p.shards.Len() {
		n -= p.shards.Index(i).count()
	}
	return n
}
