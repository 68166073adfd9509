package clone

import (
	"sync"
	"sync/atomic"
	"time"

	"cowherd/block"
	"cowherd/internal/percpu"
	"cowherd/kcopyd"
)

// A hydration owns a run of claimed regions until it settles them or gives them back. It is of one of three sorts: the
// copy of a region that a write waits for, a write that covers its regions and fills them in place of a copy, or a run
// that a worker copies in the background.
type hydration struct {
	clone *Clone
	table *table
	start Region
	count Region
	queue block.Queue

	// request is the write that goes on when the regions are settled; nil in the background.
	request *block.Request
	// attempt is how often the regions were tried before, in the background.
	attempt uint8
	zero    bool // the source has a hole there, in the background
	// active: the foreground was active when it began, in the background; see hydrator.
	active bool
	began  time.Time

	job  kcopyd.Job
	dest [1]kcopyd.Region

	next *hydration // in a free list
	_    percpu.Pad
}

// hydrationPool keeps the hydrations that are not in use. How many there are is bounded by the requests in flight, and
// by the threshold in the background.
type hydrationPool struct{ shards percpu.Shards[poolShard] }

type poolShard struct {
	spare atomic.Pointer[hydration] // one that is free, so that the common case takes no lock
	mu    sync.Mutex
	// The others.
	free *hydration // +checklocks:mu
}

// take gives an idle hydration of regions of t.
func (p *hydrationPool) take(c *Clone, t *table, queue block.Queue) *hydration {
	s := p.shards.At(uint(queue))
	h := s.spare.Swap(nil)
	if h == nil {
		h = s.pop()
	}
	if h == nil {
		h = &hydration{clone: c}
		h.job.Done = h.copied
	}
	h.table, h.queue = t, queue
	return h
}

func (s *poolShard) pop() *hydration {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.free
	if h != nil {
		s.free, h.next = h.next, nil
	}
	return h
}

// put takes back a hydration whose regions are nobody's.
func (p *hydrationPool) put(h *hydration) {
	h.table, h.request, h.count, h.attempt, h.zero, h.active = nil, nil, 0, 0, false, false
	s := p.shards.At(uint(h.queue))
	if s.spare.CompareAndSwap(nil, h) {
		return
	}
	s.mu.Lock()
	h.next = s.free
	s.free = h
	s.mu.Unlock()
}

// claim makes h the owner of as many regions as possible from start on, before limit; none if another owns start, or it
// is hydrated.
func (h *hydration) claim(start, limit Region) Region {
	count, disturbed := h.table.claim(start, limit)
	h.start, h.count = start, count
	if disturbed {
		h.clone.wake(start+count, limit-start-count)
	}
	return count
}

// copy copies the regions of h from the source to the destination; zero: from nothing, they are zeroes.
func (h *hydration) copy(class kcopyd.Class, zero bool) {
	c := h.clone
	from := c.offset(h.start)
	h.job.From = kcopyd.Region{Device: c.source, Offset: from}
	if zero {
		h.job.From = kcopyd.Region{}
	}
	h.dest[0] = kcopyd.Region{Device: c.dest, Offset: from}
	h.job.To, h.job.Length = h.dest[:], c.end(h.start+h.count)-from
	h.job.Class, h.job.Queue = class, h.queue
	c.engine.Submit(&h.job)
}

// copied is the end of a copy.
func (h *hydration) copied(j *kcopyd.Job) {
	if h.request == nil {
		h.clone.hydrator.copied(h, j.Err())
		return
	}
	c, t := h.clone, h.table
	r, err := h.finish(j.Err(), true)
	if err != nil {
		r.Complete(block.WrapError(r, err))
		return
	}
	c.writeSettled(t, r)
}

// finish ends the ownership of h, which is idle then: its regions are settled if err is nil, and else given back. Who
// waits for them looks again, unless it is told that the error is theirs too. It returns the request that h was for, and
// err, or why the regions could not be settled.
func (h *hydration) finish(err error, theirs bool) (*block.Request, error) {
	c, r, start, count := h.clone, h.request, h.start, h.count
	if err == nil {
		err = c.settle(h.table, start, count, h.queue)
	} else {
		// A part may have been written.
		c.destZero.Store(false)
		h.table.unclaim(start, count)
	}
	c.pool.put(h)
	if err != nil && theirs {
		c.failWaiting(start, err)
	} else {
		c.wake(start, count)
	}
	if err != nil && r != nil {
		c.hydrator.missed(start)
	}
	return r, err
}

// settle makes regions of t hydrated that the caller owns. If the metadata can no longer be written, they are given back.
func (c *Clone) settle(t *table, start, count Region, queue block.Queue) error {
	if m := c.mode(); m != ReadWrite {
		c.destZero.Store(false)
		t.unclaim(start, count)
		return c.modeError()
	}
	if t.settle(start, count, queue) {
		c.committer.arm()
	}
	return nil
}

// overwriting is a hydration as the Completer of the write that fills its regions.
type overwriting hydration

func (o *overwriting) Complete(r *block.Request, err error) {
	h := (*hydration)(o)
	if _, lost := h.finish(err, false); err == nil {
		err = lost
	}
	if err != nil {
		err = block.WrapError(r, err)
	}
	r.Complete(err)
}
