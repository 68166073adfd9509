package clone

import (
	"fmt"
	"math"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"cowherd/block"
	"cowherd/internal/percpu"
	"cowherd/kcopyd"
)

// Order is which regions are hydrated first.
type Order uint8

const (
	// Sequential: from the first to the last.
	Sequential Order = iota
	// Hottest: those near what has been read lately, then from the first to the last.
	Hottest
)

// Hydration is how a clone is hydrated in the background.
type Hydration struct {
	Disabled bool // until somebody enables it
	// Threshold is the most regions in flight, Batch the most regions in one copy; 0: 1, as in the kernel.
	Threshold, Batch uint32
	// PromoteOnRead: a region that was read from the source is hydrated before others.
	PromoteOnRead bool
	Order         Order
}

const (
	workersMax = 8
	// promotedMax bounds the queue of regions that were read; what does not fit is forgotten.
	promotedMax = 256
	// failedMax bounds the regions that have failed and are remembered. When there are more, hydration stops.
	failedMax = 4096
	// attemptsMax is how often a region is tried by itself; between attempts there are pauses, each four times the one
	// before.
	attemptsMax = 5
	pauseFirst  = 100 * time.Millisecond
	// activeBytes bounds a copy while the foreground is active, if a region is not larger.
	activeBytes = 64 << 10
	// activeFor is how long the foreground counts as active after its last request.
	activeFor = 20 * time.Millisecond
	// restMax bounds the rest that a worker takes between two copies while the foreground is active.
	restMax = 5 * time.Millisecond
	// zeroRunMax bounds the regions of a hole that are settled in one go, and markedMax those that are without a commit,
	// after which the memory of their state is given back.
	zeroRunMax = 1 << 18
	markedMax  = 1 << 22
	// zeroBytes bounds one write of zeroes, if a region is not larger: writes to its regions wait for it.
	zeroBytes = writeZeroesMax
)

// hydrator hydrates in the background. Workers are goroutines that exist while there is something to do:
//
//	worker:  until nothing is left, or it is stopped
//	           wait while the threshold or the window is full, or another worker looks for regions
//	           find regions: to be tried again, that were read, near what was read, the next
//	           claim them and hand them to kcopyd; on synchronous devices it is over then
//
// One worker at a time looks for regions, since that may ask the source for its extents; no lock is held meanwhile.
// Whatever makes something to do starts a worker if there is none.
//
// The foreground goes first. Every request leaves a mark in its queue's shard, a store that is left out if the mark is
// there; whoever looks for regions renews it. While there are marks a single copy of little length is in flight, and
// the worker rests after it for as long as it took. Idle or not, one CPU is left to others, so that the network is
// polled at once: a goroutine that computes all the time keeps the Go scheduler from it for up to 10 ms.
type hydrator struct {
	clone    *Clone
	promotes bool
	order    Order
	workers  int // at most

	marks percpu.Shards[atomic.Uint32]
	epoch atomic.Uint32 // what a mark must be to count

	// What follows is used by whoever has set scanning.
	current    run // taken from a queue, and not yet claimed to its end
	extents    [2]extent
	lastActive time.Time
	marked     Region

	mu sync.Mutex
	// Something has changed that a worker, or who stops them, may wait for.
	cond *sync.Cond // +checklocksignore: set once
	// Somebody wants hydration.
	enabled bool // +checklocks:mu
	// Between Resume and Suspend.
	resumed bool // +checklocks:mu
	// Everything is hydrated.
	complete bool // +checklocks:mu
	// Too many regions have failed.
	stopped bool // +checklocks:mu
	// EventStopped was told.
	told      bool   // +checklocks:mu
	threshold Region // +checklocks:mu
	batch     Region // +checklocks:mu
	// Workers that exist.
	alive int // +checklocks:mu
	// A worker looks for regions.
	scanning bool // +checklocks:mu
	// There is something new to find.
	again bool // +checklocks:mu
	// Regions and copies in flight, and how much may be.
	regions Region // +checklocks:mu
	copies  int    // +checklocks:mu
	window  window // +checklocks:mu
	// No copy begins before that.
	restUntil time.Time // +checklocks:mu
	// The next region; a region before it that must be looked at once more.
	cursor Region // +checklocks:mu
	rewind Region // +checklocks:mu

	// Regions that were read, oldest first, and groups of 64 regions that were, with how often.
	promoted []run                   // +checklocks:mu
	heat     [heatSize]heat          // +checklocks:mu
	heated   bool                    // +checklocks:mu
	failing  [attemptsMax][]retryRun // +checklocks:mu
	pending  int                     // +checklocks:mu
	failed   map[Region]struct{}     // +checklocks:mu
	firstErr error                   // +checklocks:mu
	timer    *time.Timer
}

// run is a run of regions to hydrate.
type run struct {
	start, end Region
	attempt    uint8 // how often they were tried
	sequence   bool  // they are the next, and not in a hurry
}

// retryRun is a run that has failed.
type retryRun struct {
	run
	due time.Time
}

// extent is a range of the source in one state.
type extent struct {
	offset, end int64
	zero        bool
}

// heat is how often regions of a group of 64 were read.
type heat struct {
	group uint64
	count uint32
}

const heatSize = 64

func (x *hydrator) init(c *Clone, h Hydration) {
	x.clone, x.promotes, x.order = c, h.PromoteOnRead, h.Order
	x.workers = min(runtime.GOMAXPROCS(0), workersMax)
	x.marks = percpu.New[atomic.Uint32]()
	x.epoch.Store(1)
	x.cond = sync.NewCond(&x.mu)
	x.timer = time.AfterFunc(time.Hour, x.retryDue)
	x.timer.Stop()
	x.mu.Lock()
	defer x.mu.Unlock()
	x.enabled, x.complete = !h.Disabled, c.table.Load() == nil
	x.threshold, x.batch = Region(max(1, h.Threshold)), Region(max(1, h.Batch))
	x.rewind = math.MaxUint64
	x.failed = make(map[Region]struct{})
}

// note marks that a request came on queue.
func (x *hydrator) note(queue block.Queue) {
	if m, now := x.marks.At(uint(queue)), x.epoch.Load(); m.Load() != now {
		m.Store(now)
	}
}

// active tells whether the foreground is active. For whoever has set scanning.
func (x *hydrator) active(now time.Time) bool {
	epoch := x.epoch.Load()
	for i := range x.marks.Len() {
		if x.marks.Index(i).Load() == epoch {
			x.epoch.Store(epoch + 1)
			x.lastActive = now
			return true
		}
	}
	return now.Sub(x.lastActive) < activeFor
}

// wantedLocked tells whether anything is to be hydrated at all.
//
// +checklocks:x.mu
func (x *hydrator) wantedLocked() bool {
	return x.enabled && x.resumed && !x.complete && !x.stopped && x.clone.mode() == ReadWrite
}

// startLocked makes sure that at least count workers exist, if they are wanted.
//
// +checklocks:x.mu
func (x *hydrator) startLocked(count int) {
	x.again = true
	if !x.wantedLocked() {
		return
	}
	for x.alive < min(count, x.workers) {
		x.alive++
		// Foreground queues are numbered from 0, so that these share shards with them last.
		queue := block.Queue(x.marks.Len() - x.alive)
		go x.work(queue)
	}
}

// work is a worker.
func (x *hydrator) work(queue block.Queue) {
	for h := x.next(queue); h != nil; h = x.next(queue) {
		h.copy(kcopyd.Hydration, h.zero)
		// Others may wait for a CPU.
		runtime.Gosched()
	}
}

// next finds and claims regions to copy; nil: the worker is to end, and counted off.
func (x *hydrator) next(queue block.Queue) *hydration {
	x.mu.Lock()
	defer x.mu.Unlock()
	for x.wantedLocked() {
		if rest := time.Until(x.restUntil); rest > 0 {
			x.mu.Unlock()
			time.Sleep(rest)
			x.mu.Lock()
			continue
		}
		limit := min(x.threshold, x.window.regions(x.clone.shift))
		if x.scanning || x.regions >= limit {
			x.cond.Wait()
			continue
		}
		x.scanning, x.again = true, false
		most, busy := min(x.batch, limit-x.regions), x.copies > 0
		x.mu.Unlock()
		h, found := x.scan(queue, most, busy)
		x.mu.Lock()
		x.scanning = false
		switch {
		case h != nil:
			x.regions += h.count
			x.copies++
			x.cond.Broadcast()
			return h
		case found: // but the foreground goes first
			if x.copies > 0 {
				x.cond.Wait()
			}
		case !x.again:
			x.endLocked()
			return nil
		}
	}
	x.endLocked()
	return nil
}

// endLocked counts a worker off.
//
// +checklocks:x.mu
func (x *hydrator) endLocked() {
	x.alive--
	x.cond.Broadcast()
}

// scan finds regions and claims them. found without regions: there are some, but not now. busy: there are copies in
// flight. The caller has set scanning.
func (x *hydrator) scan(queue block.Queue, most Region, busy bool) (h *hydration, found bool) {
	c := x.clone
	active := x.active(time.Now())
	if active {
		if busy {
			return nil, true
		}
		most = min(most, max(1, Region(activeBytes>>c.shift)))
	}
	if !c.enterSource(queue) {
		return nil, false
	}
	defer c.leaveSource(queue)
	t := c.table.Load()
	if t == nil {
		return nil, false
	}
	h = c.pool.take(c, t, queue)
	h.active, h.began = active, time.Now()
	for x.pick(t) {
		for x.current.start < x.current.end {
			ok := x.claim(h, most)
			switch {
			case !ok:
			case h.zero && c.destZero.Load():
				x.mark(h)
				h = c.pool.take(c, t, queue)
			default:
				return h, true
			}
			if !x.wanted() {
				c.pool.put(h)
				return nil, false
			}
		}
	}
	c.pool.put(h)
	return nil, false
}

func (x *hydrator) wanted() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.wantedLocked()
}

// pick makes sure that current holds regions; false: there are none.
func (x *hydrator) pick(t *table) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.current.start < x.current.end {
		if !x.current.sequence || len(x.promoted) == 0 && !x.heated && len(x.failing[0]) == 0 {
			return true
		}
		x.rewind = min(x.rewind, x.current.start) // what was read goes first; the rest is found again
	}
	if r, ok := x.retryLocked(time.Now()); ok {
		x.current = r
		return true
	}
	if len(x.promoted) > 0 {
		x.current = x.promoted[0]
		x.promoted = slices.Delete(x.promoted, 0, 1)
		return true
	}
	if x.hottestLocked() {
		return true
	}
	if x.pending+len(x.failed) >= failedMax {
		return false
	}
	x.cursor, x.rewind = min(x.cursor, x.rewind), math.MaxUint64
	start := t.next(x.cursor, t.regions)
	for ; start < t.regions; start = t.next(start+1, t.regions) {
		if _, failed := x.failed[start]; !failed {
			break
		}
	}
	x.current = run{start: start, end: min(start+stretch, t.regions), sequence: true}
	for region := range x.failed {
		if region > start {
			x.current.end = min(x.current.end, region)
		}
	}
	x.cursor = x.current.end
	return start < t.regions
}

// stretch is how many regions of the sequence are picked at once.
const stretch = 1 << 18

// hottestLocked makes current the regions that were read most; false: none were.
//
// +checklocks:x.mu
func (x *hydrator) hottestLocked() bool {
	best := &x.heat[0]
	for i := range x.heat {
		if x.heat[i].count > best.count {
			best = &x.heat[i]
		}
	}
	if best.count == 0 {
		x.heated = false
		return false
	}
	start := Region(best.group) * 64
	x.current = run{start: start, end: min(start+64, x.clone.count)}
	*best = heat{}
	return true
}

// claim claims regions at the start of current, at most so many if they have to be copied, and takes off current what it
// has looked at. false: there was nothing to claim there.
func (x *hydrator) claim(h *hydration, most Region) bool {
	c, t, r := x.clone, h.table, &x.current
	start := t.next(r.start, r.end)
	if start == r.end {
		r.start = r.end
		return false
	}
	end := min(start+most, r.end)
	h.zero, h.attempt = false, r.attempt
	if r.attempt == 0 {
		e := x.extentAt(c.offset(start))
		h.zero = e.zero && e.end >= c.end(start+1)
		if h.zero {
			most = x.zeroes(most)
		}
		switch {
		case h.zero && e.end >= c.size:
			end = min(r.end, start+most)
		case h.zero:
			end = min(r.end, start+most, c.region(e.end))
		case e.zero:
			end = start + 1
		default:
			end = min(end, max(start+1, c.region(e.end-1)+1))
		}
	}
	n := h.claim(start, end)
	r.start = start + max(n, 1)
	return n > 0
}

// zeroes is how many regions of a hole are hydrated in one go, where a copy may have so many: more if the destination need
// not be written to, or writes zeroes by itself.
func (x *hydrator) zeroes(most Region) Region {
	switch c := x.clone; {
	case c.destZero.Load():
		return zeroRunMax
	case c.dest.Limits().WriteZeroesMax > 0:
		return max(most, zeroBytes>>c.shift)
	}
	return most
}

// mark settles regions that are zeroes on both sides already.
func (x *hydrator) mark(h *hydration) {
	x.marked += h.count
	t := h.table
	if _, err := h.finish(nil, false); err == nil && (x.marked >= markedMax || t.count() == t.regions) {
		x.marked = 0
		// An error has changed the mode, and all know.
		_ = x.clone.Commit()
	}
}

// extentAt is the extent of the source around the byte at offset, as far as it is known to be in one state.
func (x *hydrator) extentAt(offset int64) extent {
	for i, e := range x.extents {
		if e.offset <= offset && offset < e.end {
			if i > 0 {
				x.extents[0], x.extents[1] = x.extents[1], x.extents[0]
			}
			return e
		}
	}
	c := x.clone
	found := extent{offset: offset, end: min(c.size, offset+extentWindow)}
	known := false
	err := extentsOf(c.source, offset, found.end-offset, func(e block.Extent) bool {
		end := e.Offset + e.Length
		if known && e.Zero != found.zero {
			return false
		}
		found.end, found.zero, known = end, e.Zero, true
		return true
	})
	if err != nil || !known {
		found = extent{offset: offset, end: min(c.size, offset+extentWindow)} // all is data; a read error will be met by the copy
	}
	x.extents[1] = x.extents[0]
	x.extents[0] = found
	return found
}

// copied is told of the end of a copy.
func (x *hydrator) copied(h *hydration, err error) {
	r := run{start: h.start, end: h.start + h.count, attempt: h.attempt}
	var rest time.Time
	now, began, zero := time.Now(), h.began, h.zero
	if h.active {
		rest = now.Add(min(now.Sub(began), restMax))
	}
	t := h.table
	// Before they are settled: the status never tells of more regions being hydrated than are left to be.
	x.mu.Lock()
	x.regions -= r.end - r.start
	x.mu.Unlock()
	_, err = h.finish(err, false)
	if err == nil && t.count() == t.regions {
		x.clone.committer.now() // it was the last
	}
	x.mu.Lock()
	x.copies--
	if err == nil && !zero {
		x.window.copied(int64(r.end-r.start)<<x.clone.shift, max(windowMin, x.clone.regionSize), began, now, x.copies == 0)
	}
	if !rest.IsZero() {
		x.restUntil = rest
	}
	var events []Event
	if err != nil && x.clone.mode() == ReadWrite {
		events = x.failLocked(r, err)
	}
	if len(x.failed) > 0 && !x.told && (x.stopped || t.count()+Region(len(x.failed)) >= t.regions) {
		x.told = true
		events = append(events, Event{Kind: EventStopped, Err: fmt.Errorf(
			"clone %q: hydration stops with %d regions that could not be copied, the first: %w", x.clone.name, len(x.failed), x.firstErr)})
	}
	if err != nil || x.alive == 0 {
		x.startLocked(1) // or lets who is about to end look again
	}
	x.cond.Broadcast()
	x.mu.Unlock()
	for _, e := range events {
		x.clone.event(e)
	}
}

// failLocked puts regions that could not be copied in the queues of those to be tried again: halves, until it is known
// which region is at fault. That one is given up after some attempts.
//
// +checklocks:x.mu
func (x *hydrator) failLocked(r run, err error) (events []Event) {
	if n := r.end - r.start; n > 1 {
		x.againLocked(run{start: r.start, end: r.start + n/2, attempt: max(r.attempt, 1)}, 0)
		x.againLocked(run{start: r.start + n/2, end: r.end, attempt: max(r.attempt, 1)}, 0)
		return nil
	}
	if r.attempt++; r.attempt < attemptsMax {
		x.againLocked(r, pauseFirst<<(2*(r.attempt-1)))
		return nil
	}
	x.failed[r.start] = struct{}{}
	if x.firstErr == nil {
		x.firstErr = fmt.Errorf("clone %q: region %d: %w", x.clone.name, r.start, err)
		events = append(events, Event{Kind: EventRegionFailed, Err: x.firstErr})
	}
	x.stopped = len(x.failed) >= failedMax
	return events
}

// againLocked makes r be tried again after a pause.
//
// +checklocks:x.mu
func (x *hydrator) againLocked(r run, pause time.Duration) {
	at := int(r.attempt)
	if pause == 0 {
		at = 0 // those that are due at once have a queue of their own
	}
	x.failing[at] = append(x.failing[at], retryRun{r, time.Now().Add(pause)})
	x.pending++
}

// dueLocked is when the first run is due that waits.
//
// +checklocks:x.mu
func (x *hydrator) dueLocked() time.Time {
	var due time.Time
	for _, q := range x.failing {
		if len(q) > 0 && (due.IsZero() || q[0].due.Before(due)) {
			due = q[0].due
		}
	}
	return due
}

// retryLocked takes a run that is due. If there is none the timer is set for the first that will be: who comes here and
// finds nothing ends, and has to be started again.
//
// +checklocks:x.mu
func (x *hydrator) retryLocked(now time.Time) (run, bool) {
	for i, q := range x.failing {
		if len(q) > 0 && !q[0].due.After(now) {
			r := q[0].run
			x.failing[i] = slices.Delete(q, 0, 1)
			x.pending--
			return r, true
		}
	}
	if due := x.dueLocked(); !due.IsZero() && x.resumed {
		x.timer.Reset(due.Sub(now))
	}
	return run{}, false
}

// retryDue is called when a run is due.
func (x *hydrator) retryDue() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.startLocked(x.workers)
}

// promote hydrates regions that were read before others, if there is room in the queue and nobody is in the way.
func (x *hydrator) promote(start, end Region) {
	if !x.promotes && x.order != Hottest || !x.mu.TryLock() {
		return
	}
	x.promoteLocked(start, end) // +checklocksforce: TryLock
	x.mu.Unlock()
}

// +checklocks:x.mu
func (x *hydrator) promoteLocked(start, end Region) {
	if !x.wantedLocked() {
		return
	}
	if x.order == Hottest {
		x.warmLocked(uint64(start / 64))
	}
	if x.promotes && len(x.promoted) < promotedMax {
		x.promoted = append(x.promoted, run{start: start, end: end})
	}
	x.startLocked(1)
}

// warmLocked counts a read of a group of 64 regions. Groups share places; one that is read again and again stays.
//
// +checklocks:x.mu
func (x *hydrator) warmLocked(group uint64) {
	h := &x.heat[group%heatSize]
	switch {
	case h.group == group:
		h.count++
	case h.count <= 1:
		*h = heat{group, 1}
	default:
		h.count--
	}
	x.heated = true
}

// missed is told of a region that somebody else had claimed and could not hydrate.
func (x *hydrator) missed(region Region) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.rewind = min(x.rewind, region)
	x.startLocked(1)
}

// finished is told that everything is hydrated.
func (x *hydrator) finished() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.complete = true
	x.timer.Stop()
	x.cond.Broadcast()
}

// resume lets workers start.
func (x *hydrator) resume() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.resumed = true
	x.startLocked(x.workers)
}

// suspend stops all workers and waits for what is in flight.
func (x *hydrator) suspend() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.resumed = false
	x.timer.Stop()
	x.cond.Broadcast()
	for x.alive > 0 || x.copies > 0 {
		x.cond.Wait()
	}
}
