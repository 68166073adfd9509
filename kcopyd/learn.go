package kcopyd

import (
	"math/bits"
	"sync"
	"sync/atomic"
)

const (
	// sizeShift is the binary logarithm of the smallest size that is learnt about; each class is twice the one before,
	// and the last has no end.
	sizeShift = 14
	sizeCount = 14
	// offloadFrom is the size in bytes from which offload is preferred before anything is learnt.
	offloadFrom = 64 << 10
	// exploreShare bounds what trying the slower way costs: one part in so many of the time. It costs more than it shows:
	// what was written in pages has to reach the disk before the next clone of the same range, whose time that is.
	exploreShare = 128
	// exploreEarly is the share while the slower way was taken less than exploreFew times, since first times tell little.
	exploreEarly = 32
	exploreFew   = 4
	// betterBy is how much faster, in percent, the other way must be for the preference to change: enough that noise
	// does not turn it over and over, and less than what would be noticed.
	betterBy = 5
	// outlierTimes bounds how much more than the average a measurement counts for.
	outlierTimes = 4
)

// A way is how a job was copied.
type way uint8

const (
	readWritten way = iota
	offloaded
	wayCount
)

// learnt is what experience says about a route: whether it or reading and writing is faster, by size of the job. What a
// job takes from its start to its end is averaged for both ways, so that buffers, lanes and parallel pieces all count.
//
// One way is preferred for each class of sizes. While jobs go that way a small share of their time is saved up, and when
// it pays for a job by the other way, the next one is sent there, so that what was true once does not stay believed. A
// job is decided upon once, whatever it is cut into.
type learnt struct {
	preferred atomic.Uint32 // bit k: jobs of class k are offloaded
	exploring atomic.Uint32 // bit k: the next job of class k goes the other way

	mu sync.Mutex
	// +checklocks:mu
	classes [sizeCount]struct {
		cost  [wayCount]int64 // ns, a moving average; 0: not known
		count [wayCount]int64
		saved int64 // ns
	}
}

func (l *learnt) init() {
	l.preferred.Store(^uint32(0) << sizeClass(offloadFrom))
}

// sizeClass is the class of jobs of n bytes.
func sizeClass(n int64) int {
	return min(max(bits.Len64(uint64(n))-1-sizeShift, 0), sizeCount-1)
}

// pick decides on a job of n bytes.
func (l *learnt) pick(n int64) way {
	mask := uint32(1) << sizeClass(n)
	w := readWritten
	if l.preferred.Load()&mask != 0 {
		w = offloaded
	}
	if e := l.exploring.Load(); e&mask != 0 && l.exploring.CompareAndSwap(e, e&^mask) {
		w ^= offloaded
	}
	return w
}

// guess is the cost in ns of a job of class k by a way that was never taken: cheap enough that it is tried soon.
func guess(w way, k int) int64 {
	if w == offloaded {
		return 20000
	}
	return 10000 + int64(1)<<(k+sizeShift)/4 // 4 GB/s
}

// learn adds a job of n bytes that took ns by the way w.
func (l *learnt) learn(w way, n, ns int64) {
	k := sizeClass(n)
	mask := uint32(1) << k
	l.mu.Lock()
	defer l.mu.Unlock()
	c := &l.classes[k]
	if c.count[w] > 2 {
		ns = min(ns, outlierTimes*c.cost[w])
	}
	c.count[w]++
	c.cost[w] += (ns - c.cost[w]) / min(c.count[w], 8)
	preferred := readWritten
	if l.preferred.Load()&mask != 0 {
		preferred = offloaded
	}
	other := preferred ^ offloaded
	expected := guess(other, k)
	if c.count[other] > 0 {
		expected = c.cost[other]
	}
	if w == preferred {
		share := int64(exploreShare)
		if c.count[other] < exploreFew {
			share = exploreEarly
		}
		c.saved = min(c.saved+ns/share, expected)
		if c.saved == expected {
			c.saved = 0
			l.exploring.Or(mask)
		}
	}
	if c.count[other] > 0 && c.cost[other]*(100+betterBy)/100 < c.cost[preferred] {
		c.saved = 0
		l.preferred.Store(l.preferred.Load() ^ mask)
		l.exploring.And(^mask)
	}
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
	began int64 // ns, of the engine's clock
	route *route
	way   way
	taken [wayCount]int64 // bytes
	mixed bool            // there was another route
}

// prefers tells whether a part of body bytes of the job is to take the route r. It decides for the job when it sees r
// for the first time.
func (st *jobState) prefers(r *route, body int64) bool {
	if e := st.core; body < e.floor || e.threshold > 0 {
		return body >= max(e.floor, e.threshold)
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	c := &st.course
	switch c.route {
	case nil:
		c.route, c.way = r, r.pick(body)
	case r:
	default:
		c.mixed = true
		return r.pick(body) == offloaded
	}
	return c.way == offloaded
}

// note adds n bytes that are about to be copied one way.
func (st *jobState) note(w way, n int64) {
	st.mu.Lock()
	st.course.taken[w] += n
	st.mu.Unlock()
}

// conclude learns from a job that has ended without an error.
func (c *core) conclude(j *Job) {
	st := &j.state
	st.mu.Lock()
	x := st.course
	st.course = course{}
	st.mu.Unlock()
	if x.route == nil || x.mixed || j.Err() != nil || x.taken[x.way] < j.Length-j.Length/8 {
		return
	}
	x.route.learn(x.way, j.Length, c.now()-x.began)
}
