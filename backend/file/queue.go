package file

import (
	"sync"
	"sync/atomic"

	"cowherd/block"
)

const (
	// workersMax is the largest number of goroutines of one queue, and workersAll that of a whole device where each
	// queue can have workersMin: a goroutine in a system call holds a thread, and a process may have 10,000.
	workersMin = 4
	workersMax = 32
	workersAll = 256
	// aloneMin is the number of requests in a row that must find a queue empty before the next one is run inline.
	aloneMin = 8
	// probeEvery: of so many requests in a row that find a queue empty one goes to the pool all the same.
	probeEvery = 32
)

// queue is what the requests of one queue share.
type queue struct {
	// inflight counts requests from Submit to the end of their completion, and running goroutines: Close waits for it.
	inflight atomic.Int64
	run      func() // Device.work on this queue, made once so that starting a goroutine allocates nothing

	mu sync.Mutex
	// waiting holds the requests that no goroutine has taken yet.
	waiting block.List // +checklocks:mu
	// workers is the number of goroutines that run.
	workers int // +checklocks:mu
	// busy counts the requests that wait or are worked on by a goroutine, and those that runByDepth does inline.
	busy int // +checklocks:mu
	// alone is the number of requests in a row that found busy at 0.
	alone int // +checklocks:mu
}

// enter counts a request in q; false, and it is not counted, when the device is closed.
func (d *Device) enter(q *queue) bool {
	q.inflight.Add(1)
	if d.closed.Load() {
		d.leave(q)
		return false
	}
	return true
}

// leave takes back what enter has counted.
func (d *Device) leave(q *queue) {
	if q.inflight.Add(-1) == 0 && d.closed.Load() {
		select {
		case d.idle <- struct{}{}:
		default: // Close has a message already and will look at every queue after it
		}
	}
}

// runByDepth does r here when the queue seems to carry one request at a time, else in the pool.
func (d *Device) runByDepth(q *queue, r *block.Request) {
	q.mu.Lock()
	if q.busy == 0 {
		q.alone++
	} else {
		q.alone = 0
	}
	if q.alone <= aloneMin || q.alone%probeEvery == 0 {
		d.enqueueLocked(q, r)
		q.mu.Unlock()
		return
	}
	q.busy++
	q.mu.Unlock()

	err := d.perform(r)
	q.mu.Lock()
	q.busy--
	q.mu.Unlock()
	d.finish(q, r, err)
}

// runInPool hands r to the queue's goroutines.
func (d *Device) runInPool(q *queue, r *block.Request) {
	q.mu.Lock()
	d.enqueueLocked(q, r)
	q.mu.Unlock()
}

// enqueueLocked puts r on the list and starts a goroutine for it when there may be one more.
//
// +checklocks:q.mu
func (d *Device) enqueueLocked(q *queue, r *block.Request) {
	q.busy++
	q.waiting.PushBack(r)
	if q.workers < d.workersMax {
		q.workers++
		q.inflight.Add(1)
		go q.run()
	}
}

// work does what waits in q until nothing does.
func (d *Device) work(q *queue) {
	for r := q.take(); r != nil; r = q.take() {
		err := d.perform(r)
		q.mu.Lock()
		q.busy--
		q.mu.Unlock()
		d.finish(q, r, err)
	}
	d.leave(q)
}

// take removes the oldest waiting request; nil when there is none, and the goroutine that asked no longer counts.
func (q *queue) take() *block.Request {
	q.mu.Lock()
	defer q.mu.Unlock()
	r := q.waiting.PopFront()
	if r == nil {
		q.workers--
	}
	return r
}
