package null

import (
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cowherd/block"
)

// spin is the part of a wait in which the goroutine only yields. It covers what a sleeping thread may oversleep: the
// kernel's timer slack of 50 us and the wake-up.
const spin = 100 * time.Microsecond

// queue completes its requests in order, each one latency after it has entered the ring.
type queue struct {
	latency time.Duration
	start   time.Time // what times of the ring count from
	link    *timeline // what the data of requests crosses; may be nil

	mu   sync.Mutex
	work sync.Cond // the ring is not empty, or the queue is closing
	// ring has as many slots as the queue is deep, of which count are taken, in order of time from head on.
	ring  []slot // +checklocks:mu
	head  int    // +checklocks:mu
	count int    // +checklocks:mu
	// backlog holds the requests that found no place. It is empty while the ring has one.
	backlog block.List // +checklocks:mu
	closing bool       // +checklocks:mu
}

// slot is a request that the queue works on.
type slot struct {
	request *block.Request
	due     time.Duration // since queue.start
}

func newQueue(latency time.Duration, depth int, link *timeline) *queue {
	q := &queue{latency: latency, start: time.Now(), ring: make([]slot, depth), link: link}
	q.work.L = &q.mu
	return q
}

// now is the time since start, by the monotonic clock.
func (q *queue) now() time.Duration { return time.Since(q.start) }

// dueNow is when r is due if it enters the ring now.
func (q *queue) dueNow(r *block.Request) time.Duration {
	if q.link == nil {
		return q.now() + q.latency
	}
	return q.link.reserve(int64(len(r.Data))).Sub(q.start) + q.latency
}

// submit takes r, which is complete but for the time.
func (q *queue) submit(r *block.Request) {
	q.mu.Lock()
	if q.closing {
		q.mu.Unlock()
		r.Complete(block.NewError(r, syscall.ESHUTDOWN, "the null device is closed"))
		return
	}
	if q.count < len(q.ring) {
		q.enterLocked(r)
	} else {
		q.backlog.PushBack(r)
	}
	first := q.count == 1
	q.mu.Unlock()
	if first {
		q.work.Signal()
	}
}

// enterLocked puts r in the ring, which has a place.
//
// +checklocks:q.mu
func (q *queue) enterLocked(r *block.Request) {
	q.ring[(q.head+q.count)%len(q.ring)] = slot{request: r, due: q.dueNow(r)}
	q.count++
}

// run is the queue's goroutine. It ends when the queue is closed and empty.
func (q *queue) run() {
	for {
		due, ok := q.next()
		if !ok {
			return
		}
		q.waitUntil(due)
		for r := q.pop(); r != nil; r = q.pop() {
			r.Complete(nil)
		}
	}
}

// next waits for a request and tells when the oldest is due; false when there will be none any more.
func (q *queue) next() (due time.Duration, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.count == 0 {
		if q.closing {
			return 0, false
		}
		q.work.Wait()
	}
	return q.ring[q.head].due, true
}

// pop removes the oldest request when it is due, and lets one in from the backlog; else nil.
func (q *queue) pop() *block.Request {
	now := q.now()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.count == 0 || q.ring[q.head].due > now {
		return nil
	}
	r := q.ring[q.head].request
	q.ring[q.head] = slot{}
	q.head = (q.head + 1) % len(q.ring)
	q.count--
	if waiting := q.backlog.PopFront(); waiting != nil {
		q.enterLocked(waiting)
	}
	return r
}

// waitUntil is sleepUntil for a time of the ring.
func (q *queue) waitUntil(due time.Duration) { sleepUntil(q.start.Add(due)) }

// sleepUntil returns at the time due or a few microseconds after it. The Go scheduler's own timers may be a millisecond
// late on an idle machine, hence the system call for what is long and yielding for the rest.
func sleepUntil(due time.Time) {
	for left := time.Until(due); left > 0; left = time.Until(due) {
		if left <= spin {
			runtime.Gosched()
			continue
		}
		pause := unix.NsecToTimespec(int64(left - spin))
		_ = unix.Nanosleep(&pause, nil) // cut short by a signal, it is made up for by the loop
	}
}

// close makes the goroutine end once the queue is empty.
func (q *queue) close() {
	q.mu.Lock()
	q.closing = true
	q.mu.Unlock()
	q.work.Signal()
}
