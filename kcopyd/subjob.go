package kcopyd

import (
	"fmt"
	"sync/atomic"
	"syscall"
	"time"

	"cowherd/block"
)

// phase is what a sub-job has to do next.
type phase uint8

const (
	phasePlan    phase = iota // find a piece, and a method to copy it by
	phaseOffload              // copy it by offload, in a lane
	phaseStart                // find a buffer
	phaseTake                 // take a piece and read it
	phaseWrite                // write it, when it is its turn
	phaseEnd                  // give the buffer back
)

// A subJob copies pieces of a job, one at a time. It has one owner: the goroutine that runs it, the device that has
// its request, the list it is in, or, while it is parked, the sub-job whose turn it is.
//
// The fields stand in the order of their use: what a small job touches fills the first lines, and what a large or an
// offloaded one needs besides comes last.
type subJob struct {
	job  *Job
	next *subJob // of the list that holds it; the list's
	buf  *buffer

	// The piece.
	offset, length int64 // from the start of the job; length 0: it found none
	rest           int64 // bytes behind the piece that are to be planned by this sub-job

	phase    phase
	method   method
	weight   uint8 // how many pieces its time counts for; 0: it is not timed
	bad      uint8 // destinations that it could not be written to; guarded by the job's state.mu during I/O
	unread   bool  // it could not be read
	cut      bool  // it is not written because of an error before it
	admitted bool  // by the throttle, which is to be told of its end
	gentle   bool  // the foreground is busy, and the piece is to be small
	yields   bool  // the foreground was busy when it was admitted

	barrier barrier
	req     block.Request // the read, then the write to destination 0; of a lent piece its bytes
	noise   uint32        // decides which pieces are timed
	parked  bool          // it waits for its turn; guarded by the job's state.mu

	fan     *fan          // the other writes; nil until there are some
	began   int64         // when it was begun, in ns of the engine's clock; valid if timed
	avoid   int64         // up to where, from the start of the job, offload made no progress
	expects int64         // bytes that the throttle was paid for
	entered time.Duration // when it was admitted, by the throttle's clock; valid if it yields
	wake    func()        // goOn; nil until s has waited for the throttle
	passage *passage      // the way of the piece while it is being offloaded
}

// fan holds the requests for the destinations after the first. It is pooled.
type fan struct {
	reqs [DestinationsMax - 1]block.Request
}

// start makes s ready to work for j.
func (s *subJob) start(j *Job) {
	s.job = j
	s.offset, s.length, s.rest = 0, 0, 0
	s.phase, s.method, s.weight, s.bad = phaseStart, methodReadWrite, 0, 0
	s.unread, s.cut = false, false
}

// stop lets go of all that s refers to.
func (s *subJob) stop(c *core) {
	s.job, s.req.Data = nil, nil
	if f := s.fan; f != nil {
		s.fan = nil
		for i := range f.reqs {
			f.reqs[i].Data = nil
		}
		c.fans.Put(f)
	}
}

// alone is a list of s only.
func (s *subJob) alone() subJobs {
	s.next = nil
	return subJobs{head: s, tail: s, count: 1}
}

// isWhole tells whether s does all of its job.
func (s *subJob) isWhole() bool { return s == &s.job.state.whole }

// wantsBuffer tells whether s needs a buffer for what it does next.
func (s *subJob) wantsBuffer() bool {
	j := s.job
	if j.From.Device == nil || j.state.lender != nil {
		return false
	}
	return s.isWhole() || j.state.climbing || s.rest > 0 || j.more()
}

// more tells whether there is a piece to take.
func (j *Job) more() bool {
	st := &j.state
	st.mu.Lock()
	defer st.mu.Unlock()
	return j.moreLocked()
}

// bufferClass is the class of the buffer that s needs.
func (s *subJob) bufferClass() int {
	if s.job.state.climbing {
		return classOf(s.length)
	}
	return classOf(min(s.job.Length, s.job.state.step))
}

// moreLocked is more for a caller who holds the lock.
//
// +checklocks:j.state.mu
func (j *Job) moreLocked() bool {
	if j.state.taken == j.Length {
		return false
	}
	if j.stoppedLocked() {
		j.WriteBad |= j.everyDestination()
		return false
	}
	return true
}

// take gives s the next piece of its job; false when there is none. A sub-job that is whole, or has planned, has its
// piece at first. What is too long to be copied at a time is left for the next.
func (s *subJob) take() bool {
	switch {
	case s.job.state.climbing:
	case s.rest > 0:
		if !s.takeRest() {
			return false
		}
	case !s.isWhole() && !s.takeNext():
		return false
	}
	// In sequence no piece may be left for later: those behind it would hold the buffers, and their places in the
	// throttle, that it needs for its turn.
	if s.gentle && s.job.state.op == block.OpWrite && !s.ordered() {
		s.shorten(gentlePiece)
	}
	if s.job.state.lender != nil {
		s.borrow()
	}
	return true
}

// borrow has the source lend the piece of s, and shortens it to what is lent. Nothing: it cannot be read.
func (s *subJob) borrow() {
	j := s.job
	if s.req.Data = j.state.lender.Lend(j.From.Offset+s.offset, s.length); s.req.Data != nil {
		s.shorten(int64(len(s.req.Data)))
	}
}

// takeNext takes the next piece of the job.
func (s *subJob) takeNext() bool {
	s.unread, s.cut, s.bad, s.length = false, false, 0, 0
	j := s.job
	st := &j.state
	st.mu.Lock()
	defer st.mu.Unlock()
	if !j.moreLocked() {
		return false
	}
	s.offset = st.taken
	s.length = min(st.step, j.Length-st.taken)
	st.taken += s.length
	return true
}

// takeRest goes on with what an earlier, shorter piece has left; false when an error has ended the job.
func (s *subJob) takeRest() bool {
	s.offset += s.length
	s.length, s.rest = s.rest, 0
	s.unread, s.cut, s.bad = false, false, 0
	if s.isWhole() {
		return true // goesOn has looked
	}
	j := s.job
	st := &j.state
	st.mu.Lock()
	defer st.mu.Unlock()
	if j.stoppedLocked() {
		j.WriteBad |= j.everyDestination()
		s.length = 0
		return false
	}
	return true
}

// shorten makes the piece n bytes long if it is longer, and leaves the others for the next.
func (s *subJob) shorten(n int64) {
	if s.length > n {
		s.rest += s.length - n
		s.length = n
	}
}

// issue moves s on, from phaseTake or phaseWrite, as far as it goes without waiting. It is true when s is in phaseEnd
// and the caller's; otherwise s is no longer the caller's, and its driver will be told to resume it, or passTurn
// will return it.
func (s *subJob) issue() bool {
	if s.phase == phaseTake {
		if !s.take() {
			s.phase = phaseEnd
			return true
		}
		s.phase = phaseWrite
		s.startClock()
		if s.job.From.Device != nil && !s.read() {
			return false
		}
	}
	if s.ordered() && !s.inTurn() {
		return false
	}
	s.phase = phaseEnd
	return s.unread || s.cut || s.write()
}

// read submits the read of the piece. It is true when it has completed and s is the caller's still.
func (s *subJob) read() bool {
	if s.job.state.lender != nil {
		if s.req.Data == nil {
			s.unread = true
			s.job.failRead(fmt.Errorf("%d bytes at offset %d: beyond the end of the device: %w", s.length,
				s.job.From.Offset+s.offset, syscall.EIO))
		}
		return true
	}
	s.barrier.open(1)
	s.submit(&s.req, block.OpRead, &s.job.From, s.buf.bytes(s.length))
	return s.barrier.leave()
}

// write submits the writes of the piece. It is true when all have completed and s is the caller's still.
func (s *subJob) write() bool {
	j := s.job
	st := &j.state
	var data []byte
	switch {
	case st.lender != nil:
		data = s.req.Data
	case j.From.Device != nil:
		data = s.buf.bytes(s.length)
	case st.op == block.OpWrite:
		data = zeroes()[:s.length]
	}
	s.barrier.open(len(j.To))
	s.submit(&s.req, st.op, &j.To[0], data)
	if len(j.To) > 1 {
		if s.fan == nil {
			s.fan = st.core.fans.Get().(*fan)
		}
		for i := range j.To[1:] {
			s.submit(&s.fan.reqs[i], st.op, &j.To[i+1], data)
		}
	}
	return s.barrier.leave()
}

// submit hands one request for the piece to a device.
func (s *subJob) submit(r *block.Request, op block.Op, at *Region, data []byte) {
	r.Op, r.Flags, r.Queue = op, 0, s.job.Queue
	r.Offset, r.Length, r.Data = at.Offset+s.offset, s.length, data
	r.Push(s)
	at.Device.Submit(r)
}

// Complete is told of the end of each request. See block.Completer.
func (s *subJob) Complete(r *block.Request, err error) {
	if err != nil {
		s.fail(r, err)
	}
	if s.barrier.arrive() {
		s.job.state.core.driver.resume(s)
	}
}

// fail notes the error of a request: of the read when s is to write next, else of a write.
func (s *subJob) fail(r *block.Request, err error) {
	if s.phase == phaseWrite {
		s.unread = true
		s.job.failRead(err)
		return
	}
	i := 0
	for r != &s.req && r != &s.fan.reqs[i] {
		i++
	}
	if r != &s.req {
		i++
	}
	s.job.failWrite(s, i, err)
}

// ordered tells whether the pieces of s, which is one of several, are written in turn.
func (s *subJob) ordered() bool { return s.job.sequential() && !s.isWhole() }

// inTurn tells whether the piece of s, which is ordered, may be written now. If not, s is parked and no longer the
// caller's.
func (s *subJob) inTurn() bool {
	j := s.job
	st := &j.state
	st.mu.Lock()
	defer st.mu.Unlock()
	if s.offset != st.turn {
		s.parked = true
		return false
	}
	if st.failed && !s.unread {
		s.cut = true
		j.WriteBad |= j.everyDestination()
	}
	return true
}

// passTurn lets the next piece be written, after the one of s. It returns the sub-job that has it, if it waits for
// that; it is the caller's then.
func (s *subJob) passTurn() *subJob {
	j := s.job
	if s.length == 0 || !s.ordered() {
		return nil
	}
	st := &j.state
	st.mu.Lock()
	defer st.mu.Unlock()
	st.turn += s.length
	for i := range st.split.subJobs {
		if next := &st.split.subJobs[i]; next.parked && next.offset == st.turn {
			next.parked = false
			return next
		}
	}
	return nil
}

// goesOn tells whether s, whose piece has ended, is to look for another one.
func (s *subJob) goesOn() bool {
	if s.isWhole() {
		return s.rest > 0 && (s.job.Err() == nil || s.job.Flags == IgnoreErrors)
	}
	return s.length > 0 || s.rest > 0
}

// again is the phase in which s looks for another piece.
func (s *subJob) again() phase {
	if s.job.state.climbing {
		return phasePlan
	}
	return phaseStart
}

// leave ends the work of s on a job of several pieces. It is true for the last to leave: the job is the caller's. For
// the others it is gone.
func (s *subJob) leave() bool { return s.job.state.live.Add(-1) == 0 }

// A barrier tells who comes last: one of the completions of a number of requests, or who submitted them. The last
// one owns what the barrier belongs to; the others must not touch it any more. It can be used again and again
// without being reset, since a reset would be one more atomic operation for each I/O.
type barrier struct {
	arrived  atomic.Uint32 // since it was made, modulo 2^32
	expected uint32        // the same count when all are there; written by the owner only
}

// open expects count completions and the submitter.
func (b *barrier) open(count int) { b.expected += uint32(count) + 1 }

// arrive counts a completion and tells whether it was the last of all.
func (b *barrier) arrive() bool {
	expected := b.expected // afterwards it may be somebody else's
	return b.arrived.Add(1) == expected
}

// leave is the submitter's arrival: true when all completions came before.
func (b *barrier) leave() bool {
	if b.arrived.Load() == b.expected-1 {
		b.expected-- // nobody is left to count for, so the addition is saved
		return true
	}
	return b.arrive()
}

// subJobs is a list of sub-jobs, first in first out, linked through them. Not safe for concurrent use.
type subJobs struct {
	head, tail *subJob
	count      int
}

// push appends s.
func (l *subJobs) push(s *subJob) {
	one := s.alone()
	l.join(&one)
}

// pop removes the oldest; nil when the list is empty.
func (l *subJobs) pop() *subJob {
	s := l.head
	if s == nil {
		return nil
	}
	l.head = s.next
	if l.head == nil {
		l.tail = nil
	}
	s.next = nil
	l.count--
	return s
}

// join moves all of m to the end of l.
func (l *subJobs) join(m *subJobs) {
	if m.head == nil {
		return
	}
	if l.tail == nil {
		l.head = m.head
	} else {
		l.tail.next = m.head
	}
	l.tail = m.tail
	l.count += m.count
	*m = subJobs{}
}
