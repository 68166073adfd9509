package kcopyd

import (
	"runtime"
	"sync"
)

// batchMax bounds how many sub-jobs get their buffers before those before them have been issued: few enough that a
// buffer is in the CPU's cache still when it is written. Copies of 4 KiB between devices in memory, 64 in flight, take
// about a fifth less time with it.
const batchMax = 8

// Serialised is the kernel's scheme: one worker issues all I/O and runs all callbacks. Everybody else, who submits a
// job or completes an I/O, puts a sub-job in one of four lists and wakes the worker if it sleeps. The worker takes
// over all lists at once, in one turn of the lock, and an I/O that completes before Device.Submit returns does not
// touch them: such a sub-job is the worker's still.
type Serialised struct {
	core
	shard   *shard        // the only one that is used: the worker's
	wake    chan struct{} // the worker's sleep is over; room for one, sent by who cleared asleep
	stopped chan struct{} // closed by the worker
	stop    sync.Once

	_  [128]byte // what is above is read all the time, what is below is written by everybody
	mu sync.Mutex
	// +checklocks:mu
	shared lists
	// +checklocks:mu
	jobs uint64 // submitted
	// +checklocks:mu
	asleep bool
	// +checklocks:mu
	stopping bool
	// +checklocks:mu
	waiting int // sub-jobs that the worker has no buffer for
	// +checklocks:mu
	waits uint64 // sub-jobs that it ever had none for
}

// lists are the kernel's four lists of work.
type lists struct {
	callback subJobs // of jobs that only run their callback
	complete subJobs // in phaseEnd
	gate     subJobs // in phasePlan or phaseStart, and to pass the throttle first
	plan     subJobs // in phasePlan
	pages    subJobs // in phaseStart
	io       subJobs // in phaseTake, or in phaseWrite
}

// join moves all of m to the ends of l.
func (l *lists) join(m *lists) {
	l.callback.join(&m.callback)
	l.complete.join(&m.complete)
	l.gate.join(&m.gate)
	l.plan.join(&m.plan)
	l.pages.join(&m.pages)
	l.io.join(&m.io)
}

// worker is what belongs to the worker's goroutine.
type worker struct {
	*Serialised
	lists
	blocked bool   // there was no buffer for the first in pages, and none was given back since
	waits   uint64 // sub-jobs that had to wait
	waited  int    // those of them that are still there: the first ones in pages
}

// NewSerialised makes a serialised engine and starts its worker.
func NewSerialised(config Config) *Serialised {
	e := &Serialised{wake: make(chan struct{}, 1), stopped: make(chan struct{})}
	e.core.init(config, e)
	e.inline = config.OffloadInWorker
	e.shard = e.pool.shards.Index(0)
	go e.work()
	return e
}

// Submit starts a job. See Engine. It never blocks.
func (e *Serialised) Submit(j *Job) {
	todo := e.begin(j, e.shard)
	phase := todo.head.phase
	e.mu.Lock()
	e.jobs++
	switch {
	case phase == phaseEnd:
		e.shared.callback.join(&todo)
	case e.throttle != nil:
		e.shared.gate.join(&todo)
	case phase == phasePlan:
		e.shared.plan.join(&todo)
	default:
		e.shared.pages.join(&todo)
	}
	e.unlockAndWake()
}

// resume hands s to the worker.
func (e *Serialised) resume(s *subJob) {
	e.mu.Lock()
	switch s.phase {
	case phaseEnd:
		e.shared.complete.push(s)
	case phasePlan:
		e.shared.plan.push(s)
	case phaseStart:
		e.shared.pages.push(s)
	default:
		e.shared.io.push(s)
	}
	e.unlockAndWake()
}

// unlockAndWake ends a change of the lists.
//
// +checklocksrelease:e.mu
func (e *Serialised) unlockAndWake() {
	wake := e.asleep
	e.asleep = false
	e.mu.Unlock()
	if wake {
		e.wake <- struct{}{}
	}
}

// work is the worker.
func (e *Serialised) work() {
	defer close(e.stopped)
	w := worker{Serialised: e}
	for w.fetch() {
		w.runComplete()
		w.runGate()
		w.runPlan()
		w.runPages()
		w.runIO()
		w.runComplete()
	}
}

// fetch takes over the shared lists. It sleeps while there is nothing to do, and is false when the engine stops.
func (w *worker) fetch() bool {
	for {
		w.mu.Lock()
		w.lists.join(&w.shared)
		w.noteWaits()
		w.Serialised.waiting, w.Serialised.waits = w.waited, w.waits
		if w.runnable() || w.stopping {
			more := !w.stopping
			w.mu.Unlock()
			return more
		}
		w.asleep = true
		w.mu.Unlock()
		<-w.wake
	}
}

// runnable tells whether there is anything that need not wait for others.
func (w *worker) runnable() bool {
	return w.callback.head != nil || w.complete.head != nil || w.gate.head != nil ||
		w.plan.head != nil || w.io.head != nil ||
		(w.pages.head != nil && !w.blocked)
}

// noteWaits counts those that wait for a buffer.
func (w *worker) noteWaits() {
	if w.blocked {
		w.waits += uint64(w.pages.count - w.waited)
		w.waited = w.pages.count
	}
}

// runComplete ends pieces and jobs, and runs the callbacks.
func (w *worker) runComplete() {
	w.complete.join(&w.callback)
	if w.complete.head == nil {
		return
	}
	w.giveAll()
	for s := w.complete.pop(); s != nil; s = w.complete.pop() {
		w.end(s)
	}
}

// giveAll gives back the buffers of the sub-jobs in phaseEnd, in one turn of the lock.
func (w *worker) giveAll() {
	w.shard.mu.Lock()
	defer w.shard.mu.Unlock()
	for s := w.complete.head; s != nil; s = s.next {
		if s.buf != nil {
			w.blocked = false
		}
		w.shard.giveLocked(s)
	}
}

// end ends the piece of s, which has given its buffer back, and its job if it was the last of it.
func (w *worker) end(s *subJob) {
	j := s.job
	if next := s.passTurn(); next != nil {
		w.io.push(next)
	}
	if s.gentle {
		defer runtime.Gosched() // who serves the foreground may be waiting for this CPU
	}
	if s.admitted {
		w.throttle.leave(s)
	}
	switch {
	case s.goesOn():
		w.requeue(s)
	case s.isWhole():
		w.finish(j)
	case s.leave():
		w.shard.count(j.tally())
		w.finish(j)
	}
}

// requeue has s look for another piece.
func (w *worker) requeue(s *subJob) {
	s.phase = s.again()
	if w.throttle != nil {
		w.gate.push(s)
		return
	}
	w.route(s)
}

// route puts s, which is to look for a piece, in the list that it belongs to.
func (w *worker) route(s *subJob) {
	if s.phase == phasePlan {
		w.plan.push(s)
	} else {
		w.pages.push(s)
	}
}

// runGate lets through what the throttle admits. The rest it will resume.
func (w *worker) runGate() {
	for s := w.gate.pop(); s != nil; s = w.gate.pop() {
		if w.throttle.admits(s) {
			w.route(s)
		}
	}
}

// runPlan finds out how pieces are to be copied.
func (w *worker) runPlan() {
	for s := w.plan.pop(); s != nil; s = w.plan.pop() {
		switch {
		case !s.plan(): // a lane has it
		case s.phase == phaseStart:
			w.pages.push(s)
		default:
			w.complete.push(s)
		}
	}
}

// runPages finds buffers for a few sub-jobs, or until there are none.
func (w *worker) runPages() {
	for !w.blocked && w.takeFree() {
		s := w.pages.head
		if s.buf = w.pool.find(w.shard, s.bufferClass()); s.buf == nil {
			w.blocked = true
			return
		}
		w.admit(s)
	}
}

// takeFree takes free buffers, in one turn of the lock. It is true if it ended because there was none.
func (w *worker) takeFree() bool {
	w.shard.mu.Lock()
	defer w.shard.mu.Unlock()
	for s := w.pages.head; s != nil && w.io.count < batchMax; s = w.pages.head {
		if s.wantsBuffer() {
			if s.buf = w.shard.takeLocked(s.bufferClass()); s.buf == nil {
				return true
			}
		}
		w.admit(s)
	}
	return false
}

// admit moves s, the first in pages, on to io.
func (w *worker) admit(s *subJob) {
	w.pages.pop()
	w.waited = max(w.waited-1, 0)
	s.phase = phaseTake
	w.io.push(s)
}

// runIO issues reads and writes. A sub-job goes on at once as long as its I/O completes at once.
func (w *worker) runIO() {
	for s := w.io.pop(); s != nil; s = w.io.pop() {
		if s.issue() {
			w.complete.push(s)
		}
	}
}

// QueueJobs is the number of jobs submitted on each of the engine's queues, which is one: the worker.
func (e *Serialised) QueueJobs() []uint64 {
	return []uint64{e.submitted()}
}

// submitted is the number of jobs ever submitted.
func (e *Serialised) submitted() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.jobs
}

// Stats are the engine's counters since it was made.
func (e *Serialised) Stats() Stats {
	stats := e.core.Stats()
	e.mu.Lock()
	stats.JobsWaiting, stats.BufferWaits = int64(e.waiting), e.waits
	e.mu.Unlock()
	return stats
}

// Close waits until no job is in flight and stops the worker. See Engine.
func (e *Serialised) Close() error {
	e.drain()
	e.stop.Do(func() {
		e.mu.Lock()
		e.stopping = true
		e.unlockAndWake()
	})
	<-e.stopped
	e.lanes.Wait()
	e.helpers.Wait()
	return nil
}
