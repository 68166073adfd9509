package kcopyd

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"cowherd/block"
	"cowherd/internal/percpu"
)

const (
	// gentlePiece is the size in bytes of a gentle piece (see pace): what somebody waits for at most who wants the CPU, or
	// the device, that it is copied with.
	gentlePiece = 32 << 10
	// busyForDefault is for how long the foreground counts as busy after its last request.
	busyForDefault = 2 * time.Millisecond
	// foregroundBit is the bit of Throttle.active for a foreground that is, or was, busy, and paceBit for pieces that wait for
	// a number of its requests; below are the classes' bits.
	foregroundBit = 1 << 31
	paceBit       = 1 << 30
	// lookEvery is how many requests of a queue there are between two looks at whether a piece may begin.
	lookEvery = 16
)

// A Limit bounds what is copied for one class of jobs. The zero value does not.
type Limit struct {
	// Rate is in bytes a second; 0: no bound. What is read and written counts, and what devices and servers copy;
	// clones and zeroing move nothing and do not.
	Rate int64 `json:"rate"`
	// Burst is how many bytes may have been saved up while less was copied than the rate allows; 0: 100 ms of it.
	Burst int64 `json:"burst"`
	// Share is the percentage of time, 1 to 100, in which at least one piece may be in flight, as in the kernel's
	// throttle; 0 and 100: no bound.
	Share int `json:"share"`
}

// A Throttle bounds the copies of all engines that were given it, and has work in the background give way to the
// foreground. It can be changed at any time; all methods are safe for concurrent use.
//
// # Design
//
// A piece of a job of a limited class passes the throttle before it takes a buffer. One that may not go on waits in a
// list of its class, in order, until a timer wakes it: nobody sleeps. A piece is let in while the balance of its class is
// above zero, and paid for in advance, so that the balance may sink below; what it did not move after all it gets back.
//
// Whoever serves requests in the foreground says so by Foreground, which is one addition to a counter of his queue. While
// these counters move, of all background pieces (classes other than CopyOnWrite) half as many are in flight as there are
// CPUs, at least one, so that what is asked of a device finds its queue short; and their pace (pace.go) is such that few
// requests meet one, or that it does them little harm. The others wait, without a buffer, for one that ends, or for the
// time of the next.
//
// Where nothing is limited and the foreground is silent, an engine loads one word that nobody writes.
//
// Lock order: mu is the only lock; it is taken with no other held.
type Throttle struct {
	active     atomic.Uint32 // bits: the classes that are limited, foregroundBit, paceBit
	_          percpu.Pad
	foreground percpu.Shards[atomic.Uint64] // requests since the throttle was made
	due        atomic.Uint64                // pace.due, valid with paceBit
	epoch      time.Time

	mu sync.Mutex
	// +checklocks:mu
	classes [ClassCount]throttled
	// +checklocks:mu
	yielding subJobs // in the background, and waiting for one that ends
	// +checklocks:mu
	yielded int // in flight that such may wait for
	// +checklocks:mu
	pace pace
	// +checklocks:mu
	pacer *time.Timer // fires when pace.latest has come; nil until somebody waits
	// +checklocks:mu
	yields uint64 // sub-jobs that had to wait for the foreground
	// +checklocks:mu
	seen uint64 // requests in the foreground when it was last looked
	// +checklocks:mu
	seenAt time.Duration // when they last had become more
	// +checklocks:mu
	busyFor time.Duration // busyForDefault, but for tests
}

// throttled is the state of one class. It is guarded by the Throttle's lock.
type throttled struct {
	limit    Limit
	balance  float64       // bytes
	last     time.Duration // when balance, io and total were brought up to date
	io       time.Duration // of total, with a piece in flight
	total    time.Duration
	inFlight int
	waiting  subJobs
	waits    uint64
	timer    *time.Timer // nil until somebody waits
}

// ThrottleStats tell of one class.
type ThrottleStats struct {
	Class   string `json:"class"`
	Limit   Limit  `json:"limit"`
	Waiting int    `json:"waiting"` // pieces that wait for the limit
	Waits   uint64 `json:"waits"`   // pieces that had to
}

// NewThrottle makes a throttle that limits nothing.
func NewThrottle() *Throttle {
	return &Throttle{foreground: percpu.New[atomic.Uint64](), epoch: time.Now(), busyFor: busyForDefault}
}

// Set changes the limit of a class. What waits goes by the new one. It fails with EINVAL when the limit is out of range.
func (t *Throttle) Set(class Class, l Limit) error {
	if class >= ClassCount || l.Rate < 0 || l.Burst < 0 || l.Share < 0 || l.Share > 100 {
		return fmt.Errorf("kcopyd: throttle of class %v to rate %d, burst %d, share %d: %w", class, l.Rate, l.Burst, l.Share,
			syscall.EINVAL)
	}
	t.mu.Lock()
	c := &t.classes[class]
	c.advance(t.now())
	if c.limit.Rate == 0 {
		c.balance = float64(l.burst())
	}
	c.limit = l
	c.balance = min(c.balance, float64(l.burst()))
	if l.Rate > 0 || (l.Share > 0 && l.Share < 100) {
		t.active.Or(1 << class)
	} else {
		t.active.And(^(uint32(1) << class))
	}
	freed := t.releaseLocked(class)
	t.mu.Unlock()
	freed.wakeAll()
	return nil
}

// Stats tell of all classes.
func (t *Throttle) Stats() []ThrottleStats {
	t.mu.Lock()
	defer t.mu.Unlock()
	stats := make([]ThrottleStats, ClassCount)
	for i := range t.classes {
		c := &t.classes[i]
		stats[i] = ThrottleStats{Class(i).String(), c.limit, c.waiting.count, c.waits}
	}
	return stats
}

// Yields is the number of pieces in the background that had to wait because the foreground was busy.
func (t *Throttle) Yields() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.yields
}

// Foreground notes a request of somebody who waits for it. Exports call it for each request that they take, on its queue.
func (t *Throttle) Foreground(q block.Queue) {
	n := t.foreground.At(uint(q)).Add(1)
	active := t.active.Load()
	if active&foregroundBit == 0 {
		t.active.Or(foregroundBit)
	}
	if active&paceBit != 0 && n%lookEvery == 0 {
		t.look()
	}
}

// look lets a piece begin if as many requests have been taken as it has been put off for.
func (t *Throttle) look() {
	if t.requests() >= t.due.Load() {
		t.goOn()
	}
}

// requests is how many requests in the foreground have ever been taken.
func (t *Throttle) requests() uint64 {
	var sum uint64
	for i := range t.foreground.Len() {
		sum += t.foreground.Index(i).Load()
	}
	return sum
}

// burst is how many bytes may be saved up.
func (l *Limit) burst() int64 {
	if l.Burst > 0 {
		return l.Burst
	}
	return max(l.Rate/10, 1)
}

// now is the throttle's clock.
func (t *Throttle) now() time.Duration { return time.Since(t.epoch) }

// idle tells whether jobs of the class pass as if there were no throttle.
func (t *Throttle) idle(class Class) bool {
	mask := uint32(1) << (class % ClassCount)
	if class != CopyOnWrite {
		mask |= foregroundBit
	}
	return t.active.Load()&mask == 0
}

// admits tells whether s may go on. If not it waits, is no longer the caller's, and will be resumed.
func (t *Throttle) admits(s *subJob) bool {
	class := s.job.Class % ClassCount
	if t.idle(class) || s.job.state.core.closing.Load() {
		return true
	}
	expected := s.expected()
	t.mu.Lock()
	defer t.mu.Unlock()
	if s.job.state.core.closing.Load() { // again, because Close looks for those that wait only once
		return true
	}
	c := &t.classes[class]
	c.advance(t.now())
	if c.limited() && (c.waiting.count > 0 || c.wait() > 0) {
		s.expects = expected
		c.waiting.push(s)
		c.waits++
		t.armLocked(class)
		return false
	}
	s.expects = expected
	return t.enterLocked(s)
}

// enterLocked lets s in, unless it is to wait for the foreground.
//
// +checklocks:t.mu
func (t *Throttle) enterLocked(s *subJob) bool {
	class := s.job.Class % ClassCount
	if class != CopyOnWrite && t.busyLocked() {
		if !t.opensLocked() {
			t.yielding.push(s)
			t.yields++
			t.awaitLocked()
			return false
		}
		t.yielded++
		s.yields, s.entered = true, t.now()
		if s.gentle = t.pace.begun(s.entered); s.gentle {
			s.expects = min(s.expects, gentlePiece)
		}
	}
	c := &t.classes[class]
	c.balance -= float64(s.expects)
	c.inFlight++
	s.admitted = true
	return true
}

// opensLocked tells whether another piece may be let in while the foreground is busy.
//
// +checklocks:t.mu
func (t *Throttle) opensLocked() bool {
	return t.yielded < yieldedMost() && t.pace.opens(t.now(), t.requests())
}

// awaitLocked sees to those that yield, unless a piece is in flight whose end will: requests in the foreground are to look
// after them, and a timer if there are too few.
//
// +checklocks:t.mu
func (t *Throttle) awaitLocked() {
	if t.yielded >= yieldedMost() {
		return
	}
	t.due.Store(t.pace.due)
	t.active.Or(paceBit)
	d := max(min(t.pace.latest-t.now(), t.busyFor), time.Microsecond) // the foreground may have fallen silent by then
	if t.pacer == nil {
		t.pacer = time.AfterFunc(d, t.goOn)
		return
	}
	t.pacer.Reset(d)
}

// goOn lets those go on that yield, as far as they may.
func (t *Throttle) goOn() {
	t.mu.Lock()
	t.active.And(^uint32(paceBit)) // whoever has to wait sets it again
	freed := t.openLocked()
	t.mu.Unlock()
	freed.wakeAll()
}

// openLocked takes those that yield and may go on from their list.
//
// +checklocks:t.mu
func (t *Throttle) openLocked() (freed subJobs) {
	for t.yielding.head != nil && (t.opensLocked() || !t.busyLocked()) {
		if next := t.yielding.pop(); t.enterLocked(next) {
			freed.push(next)
		}
	}
	if t.yielding.head != nil {
		t.awaitLocked()
	}
	return freed
}

// yieldedMost is how many pieces are in flight in the background while the foreground is busy.
func yieldedMost() int { return max(runtime.GOMAXPROCS(0)/2, 1) }

// busyLocked tells whether the foreground is busy.
//
// +checklocks:t.mu
func (t *Throttle) busyLocked() bool {
	if t.active.Load()&foregroundBit == 0 {
		return false
	}
	sum, now := t.requests(), t.now()
	if sum != t.seen {
		t.seen, t.seenAt = sum, now
		return true
	}
	if now-t.seenAt < t.busyFor {
		return true
	}
	t.active.And(^uint32(foregroundBit)) // the next request sets it again
	return false
}

// leave ends a piece that was let in, and wakes those that may go on instead.
func (t *Throttle) leave(s *subJob) {
	class := s.job.Class % ClassCount
	moved := s.moved()
	t.mu.Lock()
	c := &t.classes[class]
	now := t.now()
	c.advance(now)
	c.balance += float64(s.expects - moved)
	c.inFlight--
	if s.yields {
		t.yielded--
		if s.length > 0 { // else it found nothing to copy
			t.pace.ended(s.entered, now, moved, t.requests())
		}
	}
	s.admitted, s.gentle, s.yields = false, false, false
	freed := t.openLocked()
	more := t.releaseLocked(class)
	t.mu.Unlock()
	freed.join(&more)
	freed.wakeAll()
}

// releaseLocked takes those from the list of a class that may go on, and sets the timer for the others.
//
// +checklocks:t.mu
func (t *Throttle) releaseLocked(class Class) (freed subJobs) {
	c := &t.classes[class]
	for c.waiting.head != nil && (!c.limited() || c.wait() <= 0) {
		if s := c.waiting.pop(); t.enterLocked(s) {
			freed.push(s)
		}
	}
	t.armLocked(class)
	return freed
}

// armLocked sets the timer for the first that waits. While pieces are in flight that use up the share of time, the last
// of them will set it.
//
// +checklocks:t.mu
func (t *Throttle) armLocked(class Class) {
	c := &t.classes[class]
	if c.waiting.head == nil {
		return
	}
	d := max(c.wait(), time.Microsecond)
	if c.timer == nil {
		c.timer = time.AfterFunc(d, func() { t.fire(class) })
		return
	}
	c.timer.Reset(d)
}

// fire is the timer's function.
func (t *Throttle) fire(class Class) {
	t.mu.Lock()
	t.classes[class].advance(t.now())
	freed := t.releaseLocked(class)
	t.mu.Unlock()
	freed.wakeAll()
}

// lift lets all sub-jobs of an engine go on, which is being closed.
func (t *Throttle) lift(core *core) {
	t.mu.Lock()
	var freed subJobs
	for i := range t.classes {
		freed.joinOf(&t.classes[i].waiting, core)
	}
	freed.joinOf(&t.yielding, core)
	t.mu.Unlock()
	freed.wakeAll()
}

// limited tells whether the class has a limit.
func (c *throttled) limited() bool {
	return c.limit.Rate > 0 || (c.limit.Share > 0 && c.limit.Share < 100)
}

// advance brings the balance and the times up to date.
func (c *throttled) advance(now time.Duration) {
	passed := now - c.last
	c.last = now
	c.total += passed
	if c.inFlight > 0 {
		c.io += passed
	}
	for c.total >= time.Second { // what was long ago counts less and less
		c.total, c.io = c.total/2, c.io/2
	}
	if c.limit.Rate > 0 {
		c.balance = min(c.balance+passed.Seconds()*float64(c.limit.Rate), float64(c.limit.burst()))
	}
}

// wait is for how long nobody may be let in, given that nothing else is.
func (c *throttled) wait() time.Duration {
	var d time.Duration
	if c.limit.Rate > 0 && c.balance <= 0 {
		d = time.Duration((1 - c.balance) / float64(c.limit.Rate) * float64(time.Second))
		d = max(d, 1)
	}
	if share := time.Duration(c.limit.Share); share > 0 && share < 100 {
		d = max(d, c.io*100/share-c.total)
	}
	return d
}

// expected is how many bytes s will move, at most, in the piece that it is about to take.
func (s *subJob) expected() int64 {
	j := s.job
	if s.rest > 0 || s.isWhole() {
		return min(max(s.rest, s.length), SubJobSize)
	}
	st := &j.state
	st.mu.Lock()
	defer st.mu.Unlock()
	return min(j.Length-st.taken, SubJobSize)
}

// moved is how many bytes s moved in its piece.
func (s *subJob) moved() int64 {
	if s.method == methodClone || (s.method == methodZero && s.job.state.op == block.OpWriteZeroes) {
		return 0
	}
	return s.length
}

// goOn resumes s, which has waited, on a goroutine of its own.
func (s *subJob) goOn() {
	c := s.job.state.core
	defer c.helpers.Done()
	c.driver.resume(s)
}

// wakeAll starts a goroutine for each of the list, which is the caller's.
func (l *subJobs) wakeAll() {
	for s := l.pop(); s != nil; s = l.pop() {
		if s.wake == nil {
			s.wake = s.goOn // once, and kept: a pooled sub-job waits again
		}
		s.job.state.core.helpers.Add(1)
		go s.wake()
	}
}

// joinOf moves those of m that belong to an engine to l.
func (l *subJobs) joinOf(m *subJobs, core *core) {
	var others subJobs
	for s := m.pop(); s != nil; s = m.pop() {
		if s.job.state.core == core {
			l.push(s)
		} else {
			others.push(s)
		}
	}
	*m = others
}
