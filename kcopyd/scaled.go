package kcopyd

import "runtime"

// restartsMax bounds how many sub-jobs of others a goroutine runs that gave a buffer back, before it leaves the rest
// to a goroutine of their own: nobody's Submit or completion is kept for as long as memory is short.
const restartsMax = 16

// Scaled is the engine that runs a job on the queue that asked for it. There is no worker: jobs move on in Submit and
// in the completions of their I/O, and queues share nothing unless memory is short.
type Scaled struct {
	core
}

// NewScaled makes a scaled engine.
func NewScaled(config Config) *Scaled {
	e := new(Scaled)
	e.core.init(config, e)
	return e
}

// Submit starts a job. See Engine.
func (e *Scaled) Submit(j *Job) {
	sh := e.pool.shards.At(uint(j.Queue))
	todo := e.begin(j, sh)
	if s := todo.head; s.next == nil && s.phase == phaseStart && (e.throttle == nil || e.throttle.idle(j.Class)) {
		e.dash(s, sh)
		return
	}
	sh.submitted.Add(1)
	e.run(todo)
}

// dash is run for s, the whole of a job of one piece that is read and written and that the throttle lets pass. It takes
// the steps of advance and end without the questions that have one answer then, and counts the job together with its
// buffer: most jobs break a chunk, and little else is done for one than what is done here.
func (e *Scaled) dash(s *subJob, sh *shard) {
	j := s.job
	switch {
	case j.state.lender != nil:
		sh.submitted.Add(1)
		s.borrow()
	case j.From.Device == nil:
		sh.submitted.Add(1)
	default:
		if e.pool.waiting.Load() == 0 {
			s.buf = sh.enter(classOf(s.length))
		} else {
			sh.submitted.Add(1)
		}
		if s.buf == nil {
			e.run(s.alone())
			return
		}
	}
	s.phase = phaseWrite
	s.startClock()
	if j.From.Device != nil && !s.read() {
		return
	}
	s.phase = phaseEnd
	if !s.unread && !s.write() {
		return
	}
	sh.give(s)
	if s.rest > 0 && s.goesOn() {
		s.phase = phaseStart
		e.run(s.alone())
		return
	}
	e.finish(j)
	if e.pool.waiting.Load() != 0 {
		var todo subJobs
		e.pool.restart(&todo)
		e.run(todo)
	}
}

// resume goes on with s on the goroutine of its completion.
func (e *Scaled) resume(s *subJob) { e.run(s.alone()) }

// run moves sub-jobs on until each waits for something or has ended its job, together with all that this sets free.
func (e *Scaled) run(todo subJobs) {
	restarts := 0
	for s := todo.pop(); s != nil; s = todo.pop() {
		restarts += e.advance(s, &todo)
		if restarts > restartsMax && todo.head != nil {
			rest := todo
			e.helpers.Go(func() { e.run(rest) })
			return
		}
	}
}

// advance moves s on until it waits or leaves, and appends what it sets free to todo. It returns how many of these
// had waited for a buffer.
func (e *Scaled) advance(s *subJob, todo *subJobs) int {
	restarts := 0
	for {
		if s.phase <= phaseStart && !s.admitted && e.throttle != nil && !e.throttle.admits(s) {
			return restarts
		}
		if s.phase == phasePlan && !s.plan() {
			return restarts
		}
		if s.phase == phaseStart && !e.pool.acquire(s) {
			return restarts
		}
		if s.phase != phaseEnd && !s.issue() {
			return restarts
		}
		gentle := s.gentle
		more := e.end(s, todo)
		restarts += e.pool.restart(todo)
		if gentle {
			runtime.Gosched() // who serves the foreground may be waiting for this CPU
		}
		if !more {
			return restarts
		}
		if todo.head != nil {
			todo.push(s) // those have buffers already, and must not sit on them until a large job is over
			return restarts
		}
	}
}

// end gives back the buffer of a sub-job in phaseEnd. It is true when s is to look for another piece; otherwise it has
// left, and its job with it if it was the last.
func (e *Scaled) end(s *subJob, todo *subJobs) bool {
	j := s.job
	if next := s.passTurn(); next != nil {
		todo.push(next)
	}
	if s.admitted {
		e.throttle.leave(s)
	}
	j.state.shard.give(s)
	if s.goesOn() {
		s.phase = s.again()
		return true
	}
	if s.isWhole() {
		e.finish(j)
		return false
	}
	if s.leave() {
		j.state.shard.count(j.tally())
		e.finish(j)
	}
	return false
}

// QueueJobs is the number of jobs submitted on each of the engine's queues, which are as many as the CPUs rounded up
// to a power of two: where the I/O was issued from.
func (e *Scaled) QueueJobs() []uint64 {
	jobs := make([]uint64, e.pool.shards.Len())
	for i := range jobs {
		jobs[i] = e.pool.shards.Index(i).jobs()
	}
	return jobs
}

// submitted is the sum of QueueJobs.
func (e *Scaled) submitted() uint64 {
	var sum uint64
	for i := range e.pool.shards.Len() {
		sum += e.pool.shards.Index(i).jobs()
	}
	return sum
}

// Close waits until no job is in flight. See Engine.
func (e *Scaled) Close() error {
	e.drain()
	e.helpers.Wait()
	e.lanes.Wait()
	return nil
}
