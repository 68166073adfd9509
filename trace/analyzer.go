package trace

import (
	"time"

	"cowherd/block"
)

// livesMax bounds the lives that an Analyzer follows at a time: more than requests can be in flight, so that what is
// beyond are those whose last record was dropped.
const livesMax = 1 << 16

// A Life is one request from the moment it came to the traced device until it was completed, or one copy.
type Life struct {
	At     time.Duration // since the trace began
	Op     string        // read, write, flush, discard, write-zeroes; copy
	Class  string        // of a copy: copy-on-write, hydration, merge, bulk
	Offset int64         // bytes; of a copy: in its (first) destination
	Length int64         // bytes
	Queue  int
	CPU    int // that issued it; -1: not known
	Failed bool

	// The parts of its time, which add up to Total. A request that never was issued to the device below (a discard that is
	// dropped, an error) has all its time in Map.
	Held   time.Duration // the device was suspended
	Map    time.Duration // looking up where it goes, and what else cowherd does
	Wait   time.Duration // for a copy, made on its behalf or on another's
	Device time.Duration // the device below
	Total  time.Duration
}

// life is a request of which not all records have come.
type life struct {
	Life
	queued, held, admitted, waiting, issued int64 // ns since the epoch; 0: not yet
}

// An Analyzer puts the records of a Tracer together. It has one user at a time.
type Analyzer struct {
	tracer *Tracer
	lives  map[uint64]*life
	free   []*life
	sum    Summary
	// Lives that ended while the Analyzer was not there for their beginning, or whose records were dropped.
	broken uint64
}

// NewAnalyzer is the one reader of t.
func NewAnalyzer(t *Tracer) *Analyzer {
	return &Analyzer{tracer: t, lives: map[uint64]*life{}}
}

// Poll takes what has been recorded since the last call, and gives what has ended to yield, if that is not nil. The Life
// is the caller's only until yield returns.
func (a *Analyzer) Poll(yield func(*Life)) {
	a.tracer.drain(func(rec *record) {
		if rec.kind == kindCopy {
			a.copied(rec, yield)
			return
		}
		a.stage(rec, yield)
	})
}

// copied takes in a copy.
func (a *Analyzer) copied(rec *record, yield func(*Life)) {
	l := Life{
		At: time.Duration(rec.at), Op: "copy", Class: rec.class.String(), Offset: rec.offset, Length: rec.length,
		Queue: int(rec.queue), CPU: known(rec.cpu), Failed: rec.failed, Total: time.Duration(rec.took),
	}
	l.Device = l.Total
	a.sum.add(&l)
	if yield != nil {
		yield(&l)
	}
}

func known(cpu uint16) int {
	if cpu == noCPU {
		return -1
	}
	return int(cpu)
}

// stage takes in a stage of a request.
func (a *Analyzer) stage(rec *record, yield func(*Life)) {
	s := block.Stage(rec.kind)
	if s == block.StageQueued {
		l := a.begin(rec)
		l.queued = rec.at
		return
	}
	l := a.lives[rec.id]
	if l == nil {
		if s == block.StageCompleted {
			a.broken++
		}
		return
	}
	switch s {
	case block.StageHeld:
		l.held = rec.at
	case block.StageAdmitted:
		l.admitted = rec.at
	case block.StageWaiting:
		if l.waiting == 0 {
			l.waiting = rec.at
		}
	case block.StageIssued:
		l.issued = rec.at
		l.CPU = known(rec.cpu)
	case block.StageCompleted:
		l.Failed = rec.failed
		a.complete(l, rec, yield)
	}
}

// complete ends a life. One that was held and never admitted outlived the trace: what it did then is not known.
func (a *Analyzer) complete(l *life, rec *record, yield func(*Life)) {
	delete(a.lives, rec.id)
	a.free = append(a.free, l)
	if l.held > 0 && l.admitted == 0 && !l.Failed {
		a.broken++
		return
	}
	l.end(rec.at)
	a.sum.add(&l.Life)
	if yield != nil {
		yield(&l.Life)
	}
}

// begin begins a life.
func (a *Analyzer) begin(rec *record) *life {
	if len(a.lives) >= livesMax {
		a.broken += uint64(len(a.lives))
		clear(a.lives)
	}
	var l *life
	if n := len(a.free); n > 0 {
		l, a.free = a.free[n-1], a.free[:n-1]
	} else {
		l = new(life)
	}
	*l = life{Life: Life{
		At: time.Duration(rec.at), Op: rec.op.String(), Offset: rec.offset, Length: rec.length, Queue: int(rec.queue), CPU: -1,
	}}
	a.lives[rec.id] = l
	return l
}

// end cuts the time of a life in its parts.
func (l *life) end(at int64) {
	l.Total = time.Duration(at - l.queued)
	if l.held > 0 {
		l.Held = time.Duration(max(l.admitted, l.held) - l.held)
	}
	if l.issued > 0 {
		l.Device = time.Duration(at - l.issued)
		if l.waiting > 0 && l.waiting < l.issued {
			l.Wait = time.Duration(l.issued - l.waiting)
		}
	} else if l.waiting > 0 {
		l.Wait = time.Duration(at - l.waiting)
	}
	l.Map = l.Total - l.Held - l.Wait - l.Device
}

// Summary is what has been seen since the trace began.
func (a *Analyzer) Summary() *Summary {
	a.sum.Elapsed = time.Since(a.tracer.epoch)
	a.sum.Dropped = a.tracer.Dropped()
	a.sum.Broken = a.broken
	return &a.sum
}
