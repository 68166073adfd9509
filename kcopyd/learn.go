package kcopyd

import (
	"math"
	"math/bits"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"

	"cowherd/block"
)

const (
	// sizeShift is the binary logarithm of the smallest size that is learnt about; each class is twice the one before,
	// and the last has no end.
	sizeShift = 14
	sizeCount = 14
	// offloadFrom is the size in bytes from which offload is preferred before anything is learnt. Where btrfs takes 20 to
	// 30 us for a clone of any size and XFS 25 to 45, copies through the page cache on a disk in memory take as long,
	// writing back included, for 16 KiB and 100 KiB.
	offloadFrom = 128 << 10
	// guessOffload is what one offload is believed to take before any was timed, in ns, and guessRate at how many bytes a
	// microsecond data is believed to be read and written.
	guessOffload = 30000
	guessRate    = 4000
	// A trial has writeJobs jobs that are read and written, and offloadJobs that are offloaded: of the former more, since
	// what a few cost to be written back, waiting for the disk each for itself, is many times what it is for many. Where
	// to read and write is preferred, so that more of them cost nothing, they are preferredJobs. Of large jobs, of which
	// one tells as much, there are trialLeast; between them writeBytes, or preferredBytes, is the bound.
	//
	// The first trial has one job of each way, and decides only where one is clearTimes as good as the other. Where
	// offload is clearTimes as bad, of that there are trialLeast; where reading and writing is hopeless times as bad, of
	// both.
	writeJobs      = 32
	writeBytes     = 1 << 20
	preferredJobs  = 64
	preferredBytes = 4 << 20
	offloadJobs    = 8
	trialLeast     = 2
	clearTimes     = 3
	// exploreShare bounds what trials cost: one part in so many of the time, and half of that after each trial that did
	// not change the preference, trialsMost times. firstShare is the bound while the other way was never tried.
	exploreShare = 32
	firstShare   = 16
	trialsMost   = 4
	// doubt is what the other way is believed to cost more for the sake of the bounds above, one part in so many of its
	// cost, where it may in truth cost less.
	doubt = 16
	// hopeless is how many times more it must cost to read and write for that not to be tried at all before it is known:
	// nothing makes it much faster than guessRate.
	hopeless = 4
	// worthTimes times what an offload is believed to take is what it must cost to read and write for a lasting method to
	// be tried at all. Where jobs do not take as long by themselves, trials of reading and writing alone find that out:
	// surelyTrials of them, ever farther apart, since others may keep the machine busy for a while, from one in
	// firstWriting jobs to one in laterWriting; but clearTrials where it is clearTimes as much.
	worthTimes   = 2
	surelyTrials = 8
	clearTrials  = 2
	firstWriting = 32
	laterWriting = 4096
	// watchShare is how many jobs there are to one that is timed, outside trials.
	watchShare = 64
	// betterBy is how much cheaper, in percent, the other way must be for the preference to change: enough that noise
	// does not turn it over and over, and less than what would be noticed.
	betterBy = 5
)

// A way is how a job was copied.
type way uint8

const (
	readWritten way = iota
	offloaded
	wayCount
)

// A purpose is why a job goes the way it goes, and whether it is timed.
type purpose uint8

const (
	ordinary purpose = iota // it is not timed
	watched                 // it goes the preferred way, and is timed
	inTrial                 // it is a part of a trial, and timed
)

// A settler is a device that may keep what was written to it in memory, and can be told to let it go: neither is a flush.
// Both are safe for concurrent use, also with requests.
type settler interface {
	// WriteBack starts to write length bytes from offset on to where they are kept in the end.
	WriteBack(offset, length int64) error
	// Settle does so too, and waits for the end.
	Settle(offset, length int64) error
}

// learnt is what experience says about a route: whether it or reading and writing is cheaper, by size of the job. One way
// is preferred for each class of sizes. A job is decided upon once, whatever it is cut into.
//
// What is written to a page cache has a price that somebody pays later: a flush, or a clone of the same range, which the
// kernel begins by writing the range back. So the two ways are compared in trials, in which each is charged with what it
// causes and nothing else:
//
//	a job begins a trial by chance:    the next ones are spread over both ways, and timed
//	    offload:                       before its call what is dirty in the two ranges is written back, untimed; waiting
//	                                   in the lane is not timed either: it tells how many jobs there are, not their cost
//	    after the last:                what was read and written is written back, all together, and timed
//	    the cost of offload:           the median of the last times
//	    of reading and writing:        of what trials made of it, writing back included, the lower quartile: others who use
//	                                   the disk make that longer; no less than the median of the last times
//	    cheaper by betterBy percent:   the other way is preferred from now on
//
// The chance is such that what trials cost more than the preferred way would have is exploreShare of the time at first,
// and becomes less as they go on to say the same. Outside trials one job in watchShare is timed, so that the chance
// follows when the preferred way becomes slow. All other jobs read some shared words, and write none.
//
// A lasting method (block.CopyOffer) leaves a mark with the first call: on XFS one clone makes all later copies of 16 KiB
// by reading and writing a third slower. Even to try it may cost more than it can ever bring, so that there is no trial of
// it before it promises much, by what is known of reading and writing alone; unless larger jobs are offloaded anyway.
//
// Tried: averages of all jobs, without writing back. Clones that were tried after copies by reading and writing then paid
// for these, and one mistake fed on itself: who writes over shared blocks pays for new ones.
type learnt struct {
	preferred atomic.Uint32 // bit k: jobs of class k are offloaded
	gates     [sizeCount]gate
	settles   bool        // +checklocksignore: never changes; the destination is a settler
	lasting   bool        // +checklocksignore: never changes; see block.CopyOffer
	used      atomic.Bool // something was offloaded

	mu sync.Mutex
	// +checklocks:mu
	classes [sizeCount]class
}

// A gate is what jobs of one class look at.
type gate struct {
	chance atomic.Uint32 // that a job begins a trial, of 2^32
	timing atomic.Uint32 // that it does, or is timed, of 2^32
	// trial is the trial in course: how many jobs of it are to be sent still, and in the lower 16 bits of how many, and
	// in the lowest how many of these are offloaded, evenly spread.
	trial atomic.Uint64
}

// class is what is known of jobs of one class.
type class struct {
	took  [wayCount]samples // ns from a job's start to its end
	whole samples           // ns of one that is read and written, writing back included; one for each trial

	open   int   // jobs of the trial in course that have not ended
	spent  int64 // ns that those of the last trial took that went the other way, all waiting included
	dirty  *extents
	trials int // that confirmed the preference, since it changed
	turns  int // how often it changed
}

// samples are the last few times of something, in ns.
type samples struct {
	ns    [16]int64
	count int // ever
	since int // what count was when the conditions may have changed
}

// add adds one.
func (s *samples) add(ns int64) {
	s.ns[s.count%len(s.ns)] = ns
	s.count++
}

// quantile is the value that n in eight of them do not reach: of those since the conditions may have changed, if there
// are any.
func (s *samples) quantile(n int) int64 {
	count := min(s.count, len(s.ns))
	if s.since < s.count {
		count = min(s.count-s.since, len(s.ns))
	}
	var sorted [len(s.ns)]int64
	for i := range count {
		sorted[i] = s.ns[(s.count-1-i)%len(s.ns)]
	}
	slices.Sort(sorted[:count])
	return sorted[min(count*n/8, count-1)]
}

// extents are what the jobs of a trial that were read and written have left to be written back.
type extents struct {
	took  samples
	list  [preferredJobs]extent
	count int
	bytes int64 // that the jobs were asked to copy; what of it lies elsewhere is not in the list
}

// An extent is a range of the destination.
type extent struct{ at, length int64 }

func (l *learnt) init(target block.Device, o block.CopyOffer) {
	_, l.settles = target.(settler)
	l.lasting = o.Lasting
	l.preferred.Store(^uint32(0) << sizeClass(offloadFrom))
	for k := range l.gates {
		l.gates[k].timing.Store(math.MaxUint32) // the first jobs are timed; see pace
	}
}

// sizeClass is the class of jobs of n bytes.
func sizeClass(n int64) int {
	return min(max(bits.Len64(uint64(n))-1-sizeShift, 0), sizeCount-1)
}

// trialLocked is how many jobs of class k go each way in a trial of the way other.
//
// +checklocks:l.mu
func (l *learnt) trialLocked(k int, other way) (jobs [wayCount]int) {
	c := &l.classes[k]
	jobs[readWritten] = trialJobs(k, writeJobs, writeBytes)
	jobs[offloaded] = min(jobs[readWritten], offloadJobs)
	if other == offloaded && (c.whole.count > 0 || !l.lasting) {
		jobs[readWritten] = trialJobs(k, preferredJobs, preferredBytes)
	}
	rw, o := l.costLocked(k, readWritten), l.costLocked(k, offloaded)
	switch {
	case other == offloaded && !l.worthLocked(k):
		jobs[offloaded] = 0
	case c.took[other].count == 0:
		return [wayCount]int{1, 1}
	case o > clearTimes*rw:
		jobs[offloaded] = trialLeast
	case rw > hopeless*o:
		return [wayCount]int{trialLeast, trialLeast}
	}
	return jobs
}

// trialJobs is how many jobs of class k there are to be of a way whose bounds these are.
func trialJobs(k int, jobs, bytes int) int {
	return min(max(bytes>>(sizeShift+k), trialLeast), jobs)
}

// worthLocked tells whether offload may be tried for jobs of class k. One that is lasting is not, even once, unless it
// promises to be much cheaper.
//
// +checklocks:l.mu
func (l *learnt) worthLocked(k int) bool {
	if !l.lasting || l.used.Load() {
		return true
	}
	c := &l.classes[k]
	least := l.costLocked(k, offloaded) * worthTimes
	switch cost, trials := l.costLocked(k, readWritten), c.whole.count; {
	case trials >= surelyTrials:
		return cost > least
	case trials >= clearTrials && cost > clearTimes*least:
		return true
	}
	return c.took[readWritten].count >= len(c.took[readWritten].ns) && c.took[readWritten].quantile(4) > least
}

// preference is the preferred way of class k.
func (l *learnt) preference(k int) way {
	if l.preferred.Load()&(1<<k) != 0 {
		return offloaded
	}
	return readWritten
}

// plain tells whether a job of class k that has drawn a number is read and written without being timed.
func (l *learnt) plain(k int, draw uint32) bool {
	g := &l.gates[k]
	return draw >= g.timing.Load() && g.trial.Load()>>32 == 0 && l.preference(k) == readWritten
}

// pick decides on a job of class k that has drawn a number. Unless it is ordinary, ended has to be called for it.
func (l *learnt) pick(k int, draw uint32) (way, purpose) {
	g := &l.gates[k]
	if draw < g.chance.Load() {
		l.try(k)
	}
	for t := g.trial.Load(); t>>32 > 0; t = g.trial.Load() {
		if g.trial.CompareAndSwap(t, t-1<<32) {
			if left, all, n := t>>32, t>>16&math.MaxUint16, t&math.MaxUint16; left*n%all < n {
				return offloaded, inTrial
			}
			return readWritten, inTrial
		}
	}
	if draw < g.timing.Load() {
		return l.preference(k), watched
	}
	return l.preference(k), ordinary
}

// try begins a trial, unless one is in course.
func (l *learnt) try(k int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := &l.classes[k]
	if c.open > 0 {
		return
	}
	jobs := l.trialLocked(k, l.preference(k)^offloaded)
	c.open = jobs[readWritten] + jobs[offloaded]
	c.spent, c.dirty = 0, new(extents)
	c.took[l.preference(k)^offloaded].since = c.took[l.preference(k)^offloaded].count
	l.gates[k].chance.Store(0)
	l.gates[k].trial.Store(uint64(c.open)<<32 | uint64(c.open)<<16 | uint64(jobs[offloaded]))
}

// An outcome is what became of a job that was timed.
type outcome struct {
	class   int
	length  int64 // bytes
	way     way
	purpose purpose
	valid   bool   // it went that way, and without an error
	elapsed int64  // ns
	waited  int64  // ns of it that are not to be charged to it
	dirty   extent // what it may have left to be written back, as far as is known
}

// ended is told of a job that was not ordinary. It is true for the last of a trial: then the extents have to be written
// back, and decide called.
func (l *learnt) ended(o outcome) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := &l.classes[o.class]
	if o.valid {
		c.took[o.way].add(o.elapsed - o.waited)
	}
	if o.purpose != inTrial {
		if c.open == 0 {
			l.paceLocked(o.class)
		}
		return false
	}
	if o.way != l.preference(o.class) {
		c.spent += o.elapsed
	}
	if d := c.dirty; o.valid && o.way == readWritten && o.dirty.length > 0 {
		d.list[d.count] = o.dirty
		d.count++
		d.took.add(o.elapsed)
		d.bytes += o.length
	}
	c.open--
	if c.open > 0 {
		return false
	}
	c.open = 1 // decide is the last
	return true
}

// decide ends a trial of class k. To write back what it has left took ns for each job; negative: that is not known.
func (l *learnt) decide(k int, ns int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := &l.classes[k]
	if ns >= 0 {
		c.whole.add(c.dirty.took.quantile(4) + ns) // whatever part of it the jobs had to wait for already
	}
	c.open, c.dirty = 0, nil
	preferred := l.preference(k)
	other := preferred ^ offloaded
	own, cost := l.costLocked(k, preferred), l.costLocked(k, other)
	switch first := c.took[other].count < trialLeast; {
	case first && (c.took[other].count == 0 || cost*clearTimes >= own):
	case first || cost*(100+betterBy)/100 < own:
		l.preferred.Store(l.preferred.Load() ^ 1<<k)
		c.spent = 0
		c.trials = c.turns
		c.turns++
	default:
		c.trials++
	}
	l.paceLocked(k)
}

// costLocked is what a job of class k costs in ns by the way w, as far as is known. Where nothing is known of writing back,
// it takes as long again, as is usual where the page cache is of a disk in memory.
//
// +checklocks:l.mu
func (l *learnt) costLocked(k int, w way) int64 {
	c := &l.classes[k]
	took := int64(guessOffload)
	switch {
	case c.took[w].count > 0:
		took = c.took[w].quantile(4)
	case w == readWritten:
		took = int64(1) << (k + sizeShift) * 1000 / guessRate
	}
	if w == offloaded || !l.settles {
		return took
	}
	if c.whole.count > 0 {
		return max(took, c.whole.quantile(2))
	}
	return 2 * took
}

// paceLocked sets the chances of class k, where no trial is in course.
//
// +checklocks:l.mu
func (l *learnt) paceLocked(k int) {
	c, g := &l.classes[k], &l.gates[k]
	preferred := l.preference(k)
	if c.took[preferred].count < trialLeast {
		return // all are timed
	}
	chance := l.chanceLocked(k, preferred^offloaded)
	g.chance.Store(uint32(min(chance, 1) * math.MaxUint32))
	g.timing.Store(uint32(min(chance+1.0/watchShare, 1) * math.MaxUint32))
}

// chanceLocked is how often a job of class k is to begin a trial of the way other.
//
// +checklocks:l.mu
func (l *learnt) chanceLocked(k int, other way) float64 {
	c := &l.classes[k]
	own, cost := l.costLocked(k, other^offloaded), l.costLocked(k, other)
	share := int64(exploreShare)
	switch {
	case other == offloaded && !l.worthLocked(k):
		if !l.settles {
			return 0
		}
		return max(1.0/float64(int64(firstWriting)<<min(c.whole.count, 16)), 1.0/laterWriting)
	case c.took[other].count > 0:
		if cost*(100+betterBy)/100 >= own {
			share <<= min(c.trials, trialsMost)
		}
	case other == readWritten && cost > hopeless*own:
		return 0
	default:
		share = firstShare
	}
	jobs := int64(l.trialLocked(k, other)[other])
	extra := max(jobs*cost-jobs*own, c.spent-jobs*own, jobs*cost/doubt, 1)
	return float64(own) / float64(extra*share)
}

// threshold is the size in bytes from which on all sizes are offloaded; 0: none is.
func (l *learnt) threshold(floor int64) int64 {
	ones := bits.LeadingZeros32(^(l.preferred.Load() << (32 - sizeCount)))
	if ones == 0 {
		return 0
	}
	return max(1<<(sizeShift+sizeCount-ones), floor)
}

// A course is what a job has been decided to take, and has taken. Jobs of several sub-jobs guard it by state.mu.
type course struct {
	began   int64 // ns, of the engine's clock
	draw    uint32
	drawn   bool  // draw is valid
	waited  int64 // ns that its first offload was not under way
	route   *route
	class   int // of sizes
	way     way
	purpose purpose
	taken   [wayCount]int64 // bytes
	mixed   bool            // there was another route
	first   extent          // what could be offloaded of it at first, where it lies on the destination
}

// prefers tells whether a part of the job, body bytes at the destination's offset at, is to take the route r. It decides
// for the job when it sees r for the first time.
func (j *Job) prefers(r *route, at, body int64) bool {
	st := &j.state
	if e := st.core; body < e.floor || e.threshold > 0 {
		return body >= max(e.floor, e.threshold)
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	c := &st.course
	switch c.route {
	case nil:
		c.route, c.first = r, extent{at, body}
		c.class = sizeClass(j.Length)
		if !c.drawn {
			c.draw = rand.Uint32()
		}
		c.way, c.purpose = r.pick(c.class, c.draw)
	case r:
	default:
		c.mixed = true
		return r.preference(sizeClass(j.Length)) == offloaded
	}
	return c.way == offloaded
}

// note adds n bytes that are about to be copied one way.
func (st *jobState) note(w way, n int64) {
	st.mu.Lock()
	st.course.taken[w] += n
	st.mu.Unlock()
}

// prepare comes before the call for the piece of s, which has waited in its lane.
func (s *subJob) prepare() {
	st := &s.job.state
	st.mu.Lock()
	why := st.course.purpose
	st.mu.Unlock()
	if why == ordinary {
		return
	}
	if why == inTrial {
		s.passage.settle(s.length)
	}
	st.mu.Lock()
	if c := &st.course; c.waited == 0 {
		c.waited = st.core.now() - s.began
	}
	st.mu.Unlock()
}

// settle sees to it that nothing is dirty in the passage's first length bytes, on both sides. Its errors are not lost: a
// device that has failed fails the call that follows, too.
func (x *passage) settle(length int64) {
	if d, ok := x.source.device.(settler); ok {
		_ = d.Settle(x.source.at, length)
	}
	if d, ok := x.target.device.(settler); ok {
		_ = d.Settle(x.target.at, length)
	}
}

// conclude learns from a job that has ended.
func (c *core) conclude(j *Job) {
	st := &j.state
	st.mu.Lock()
	x := st.course
	st.course = course{}
	st.mu.Unlock()
	if x.purpose == ordinary {
		return
	}
	o := outcome{
		class: x.class, length: j.Length, way: x.way, purpose: x.purpose,
		elapsed: c.now() - x.began, waited: x.waited, dirty: x.first,
		valid: !x.mixed && j.Err() == nil && x.taken[x.way] >= j.Length-j.Length/8,
	}
	r := x.route
	if !r.ended(o) {
		return
	}
	if !r.settles {
		r.decide(o.class, -1)
		return
	}
	c.lanes.Add(1)
	go r.settle(o.class)
}

// settle writes back what the jobs of a trial of class k have left, and ends the trial.
func (r *route) settle(k int) {
	c := r.lane.core
	defer c.lanes.Done()
	r.mu.Lock()
	dirty := r.classes[k].dirty // nobody else's: no job of the trial is left
	r.mu.Unlock()
	began := c.now()
	ns := int64(-1)
	if bytes := dirty.settle(r.copier.(settler)); bytes > 0 {
		each := float64(dirty.bytes) / float64(bytes) / float64(dirty.count)
		ns = int64(float64(c.now()-began) * each)
	}
	r.decide(k, ns)
}

// settle writes the extents back, and returns how many bytes; after an error 0.
func (e *extents) settle(d settler) (bytes int64) {
	for _, x := range e.list[:e.count] {
		if d.WriteBack(x.at, x.length) != nil {
			return 0
		}
		bytes += x.length
	}
	for _, x := range e.list[:e.count] {
		if d.Settle(x.at, x.length) != nil {
			return 0
		}
	}
	return bytes
}
