package kcopyd

import "sync"

// A lane makes the calls of copy offload that fill one device, as many at a time as the device gains from. A call blocks
// for as long as the copy takes, which is why it is not made on the queue that asked for it.
//
// There is no goroutine while there is nothing to do. One that has made its call first passes its place in the lane on,
// to a goroutine of its own if somebody waits, and then goes on with the sub-job: what a Done does, and what has to be
// read and written after all, keeps nobody waiting.
type lane struct {
	core  *core
	limit int    // +checklocksignore: never changes; calls at a time
	start func() // work, bound to the lane once, so that starting a goroutine allocates nothing

	mu sync.Mutex
	// +checklocks:mu
	urgent subJobs // of class CopyOnWrite: a request waits for them
	// +checklocks:mu
	others subJobs
	// +checklocks:mu
	running int // places taken
	// +checklocks:mu
	runningMost int // ever
}

func newLane(c *core, limit int) *lane {
	l := &lane{core: c, limit: max(limit, 1)}
	l.start = l.work
	return l
}

// push takes over s, which is in phaseOffload.
func (l *lane) push(s *subJob) {
	l.mu.Lock()
	if s.job.Class == CopyOnWrite {
		l.urgent.push(s)
	} else {
		l.others.push(s)
	}
	start := l.running < l.limit
	if start {
		l.running++
		l.runningMost = max(l.runningMost, l.running)
		l.core.lanes.Add(1)
	}
	l.mu.Unlock()
	if start {
		go l.start()
	}
}

// work has a place in the lane, and makes one call.
func (l *lane) work() {
	defer l.core.lanes.Done()
	s := l.pop()
	if s == nil {
		return
	}
	s.offload()
	l.pass()
	l.core.driver.resume(s)
}

// pass hands the caller's place in the lane on, or gives it back.
func (l *lane) pass() {
	l.mu.Lock()
	more := l.urgent.count+l.others.count > 0
	if more {
		l.core.lanes.Add(1)
	} else {
		l.running--
	}
	l.mu.Unlock()
	if more {
		go l.start()
	}
}

// pop removes the next sub-job. Without one, because somebody else was faster, it gives the caller's place back.
func (l *lane) pop() *subJob {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.urgent.pop()
	if s == nil {
		s = l.others.pop()
	}
	if s == nil {
		l.running--
	}
	return s
}

// waiting is the number of sub-jobs in the lane that no call is made for yet.
func (l *lane) waiting() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.urgent.count + l.others.count
}
