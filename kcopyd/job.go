package kcopyd

import (
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"syscall"

	"cowherd/block"
	"cowherd/internal/invariant"
)

// jobState is the engine's part of a Job.
//
// The fields stand in the order of their use, as a sub-job's do.
type jobState struct {
	core  *core  // the engine; nil while the job is not in flight
	shard *shard // whose buffers and counters the job uses
	// watched is what those remember of the job who are told of it; nil: nobody is.
	watched *jobWatch
	// lender is the source if it lends its bytes: then no buffer is needed, and nothing is read.
	lender block.Lender
	split  *split // the sub-jobs of a job of several pieces; nil: whole
	step   int64  // bytes of a piece, but for the last
	op     block.Op
	// climbing: its pieces are planned one by one, since they may be offloaded.
	climbing bool
	why      reason       // it is not, although it might; reasonNone once that has been counted
	live     atomic.Int32 // sub-jobs of split that have not left

	whole subJob // does all the work of a job of one piece

	course course // of a job that climbs; guarded by mu

	// mu is taken by jobs of several pieces, and when there is an error; it guards the job's result too.
	mu sync.Mutex
	// +checklocks:mu
	failed bool // there was an error
	// +checklocks:mu
	taken int64 // bytes from the start of the job that sub-jobs have taken
	// +checklocks:mu
	turn int64 // where the next write begins, WriteSequentially only
}

// split is the state of a job of several pieces. It is pooled.
type split struct {
	subJobs [SplitCount]subJob
}

// check tells what is wrong with a job as it was submitted.
func (j *Job) check() error {
	if len(j.To) > DestinationsMax {
		return fmt.Errorf("kcopyd: job of %d destinations, at most %d: %w", len(j.To), DestinationsMax, syscall.EINVAL)
	}
	if j.Length < 0 || (j.From.Device != nil && !j.From.holds(j.Length)) {
		return fmt.Errorf("kcopyd: job of %d bytes at offset %d: %w", j.Length, j.From.Offset, syscall.EINVAL)
	}
	for i := range j.To {
		if to := &j.To[i]; to.Device == nil || !to.holds(j.Length) {
			return fmt.Errorf("kcopyd: destination %d at offset %d: %w", i, to.Offset, syscall.EINVAL)
		}
	}
	return nil
}

// holds tells whether length bytes from the region's offset on are a range at all.
func (r *Region) holds(length int64) bool {
	return r.Offset >= 0 && r.Offset <= math.MaxInt64-length
}

// begin takes a job that was submitted, and returns its sub-jobs: in phaseStart, or one in
// phaseEnd when the job has nothing to do but its callback. The job uses the buffers and the counters of sh.
func (c *core) begin(j *Job, sh *shard) subJobs {
	st := &j.state
	if invariant.Enabled {
		invariant.Check(st.core == nil, "kcopyd: a job was submitted while it was in flight")
		invariant.Check(!c.closed.Load(), "kcopyd: a job was submitted to a closed engine")
	}
	st.core, st.shard = c, sh
	if list := c.watchers.list.Load(); list != nil {
		st.watched = watch(*list, j)
	}
	j.ReadErr, j.WriteErr, j.WriteBad = nil, nil, 0
	if err := j.check(); err != nil {
		j.WriteErr, j.WriteBad = err, math.MaxUint32
		return st.nothing(j)
	}
	if j.Length == 0 || len(j.To) == 0 {
		return st.nothing(j)
	}
	st.step, st.op = SubJobSize, block.OpWrite
	if j.Length <= st.step || !j.sequential() {
		st.lender, _ = j.From.Device.(block.Lender)
	}
	climbs, err := c.climbs(j)
	if err != nil {
		j.WriteErr, j.WriteBad = err, j.everyDestination()
		return st.nothing(j)
	}
	if st.climbing = climbs; climbs {
		return c.climb(j)
	}
	if j.From.Device == nil {
		st.planZeroes(j.To)
	}
	if j.Length > st.step {
		return c.split(j, phaseStart)
	}
	st.whole.start(j)
	st.whole.length = j.Length
	if j.From.Device == nil {
		st.whole.method = methodZero
	}
	return st.whole.alone()
}

// climb gives a job that may be offloaded its sub-jobs.
func (c *core) climb(j *Job) subJobs {
	st := &j.state
	st.course.began = c.now()
	if j.Length > st.step {
		return c.split(j, phasePlan)
	}
	st.whole.start(j)
	st.whole.phase, st.whole.rest, st.whole.avoid = phasePlan, j.Length, 0
	return st.whole.alone()
}

// nothing is the list of sub-jobs of a job j that has nothing to do but its callback.
func (st *jobState) nothing(j *Job) subJobs {
	st.whole.start(j)
	st.whole.phase = phaseEnd
	return st.whole.alone()
}

// planZeroes finds out how to zero the destinations.
func (st *jobState) planZeroes(to []Region) {
	most := int64(math.MaxInt64)
	for i := range to {
		limits := to[i].Device.Limits()
		unit := int64(max(limits.LogicalBlock, 1))
		most = min(most, limits.WriteZeroesMax/unit*unit)
	}
	if most > 0 {
		st.step, st.op = most, block.OpWriteZeroes
	}
}

// split gives a job of several pieces its sub-jobs, which start in the given phase.
func (c *core) split(j *Job, first phase) subJobs {
	st := &j.state
	st.mu.Lock()
	st.taken, st.turn, st.failed = 0, 0, false
	st.mu.Unlock()
	count := int((j.Length-1)/st.step) + 1
	if (j.Length-1)/st.step >= SplitCount {
		count = SplitCount
	}
	st.split = c.splits.Get().(*split)
	st.live.Store(int32(count))
	var todo subJobs
	for i := range st.split.subJobs[:count] {
		s := &st.split.subJobs[i]
		s.start(j)
		s.phase, s.avoid = first, 0
		if j.From.Device == nil {
			s.method = methodZero
		}
		todo.push(s)
	}
	return todo
}

// finish ends a job that has been counted: it is the caller's again when its Done is called.
func (c *core) finish(j *Job) {
	st := &j.state
	sh := st.shard
	if st.climbing {
		st.climbing = false
		c.conclude(j)
	}
	if sp := st.split; sp != nil {
		st.split = nil
		for i := range sp.subJobs {
			sp.subJobs[i].stop(c)
		}
		c.splits.Put(sp)
	} else {
		if st.whole.rest > 0 { // an error came before
			j.WriteBad |= j.everyDestination()
		}
		st.whole.stop(c)
	}
	st.core, st.shard, st.lender = nil, nil, nil
	if st.watched != nil {
		st.watched.end(j)
	}
	j.Done(j)
	sh.finished.Add(1)
	if c.closing.Load() {
		c.wakeCloser()
	}
}

// tally is the job's own entry in the counters; the bytes were counted piece by piece.
func (j *Job) tally() tally {
	if j.ReadErr != nil || j.WriteErr != nil {
		return tally{jobs: 1, errors: 1}
	}
	return tally{jobs: 1}
}

// failRead notes that a piece could not be read: it will not be written.
func (j *Job) failRead(err error) {
	st := &j.state
	st.mu.Lock()
	defer st.mu.Unlock()
	if j.ReadErr == nil {
		j.ReadErr = fmt.Errorf("kcopyd: source: %w", err)
	}
	j.WriteBad |= j.everyDestination()
	st.failed = true
}

// failWrite notes that the piece of s could not be written to destination i.
func (j *Job) failWrite(s *subJob, i int, err error) {
	st := &j.state
	st.mu.Lock()
	defer st.mu.Unlock()
	s.bad++
	if j.WriteErr == nil {
		j.WriteErr = fmt.Errorf("kcopyd: destination %d: %w", i, err)
	}
	j.WriteBad |= 1 << i
	st.failed = true
}

// failOffload notes that the piece of s could not be offloaded. An offload does not tell a source that cannot be read
// from a destination that cannot be written, so that all its errors are the destination's.
func (j *Job) failOffload(s *subJob, err error) {
	st := &j.state
	st.mu.Lock()
	defer st.mu.Unlock()
	s.bad++
	if j.WriteErr == nil {
		j.WriteErr = fmt.Errorf("kcopyd: destination 0, or its source: %w", err)
	}
	j.WriteBad |= 1
	st.failed = true
}

// everyDestination is WriteBad when no destination was written completely.
func (j *Job) everyDestination() uint32 { return 1<<len(j.To) - 1 }

// stoppedLocked tells whether the job's remaining pieces are not to be copied any more.
//
// +checklocks:j.state.mu
func (j *Job) stoppedLocked() bool {
	return j.state.failed && (j.Flags&IgnoreErrors == 0 || j.sequential())
}

// sequential tells whether the job's pieces are written one after the other.
func (j *Job) sequential() bool { return j.Flags&WriteSequentially != 0 }
