package bench

import (
	"math"
	"time"

	"cowherd/block"
	"cowherd/kcopyd"
)

// What a foreground beside a stream of copies does.
const (
	foregroundNone = "none"
	foregroundRead = "read" // reads of the source, past the engine
	foregroundCopy = "copy" // copies of chunks, for which a write waits, by the same engine and by reading and writing
)

const (
	foregroundBlock = 4 << 10
	foregroundDepth = 32
	// foregroundPart is the part of the range, at its end, that is the foreground's alone.
	foregroundPart = 16
	// foregroundBlocks bounds the blocks that it goes over.
	foregroundBlocks = 1 << 14
	// foregroundRate is how many requests a second it makes where a plan says nothing.
	foregroundRate = 4000
)

// foregroundUnits is how many of the units of the range are the foreground's.
func foregroundUnits(c *Cell, units int64) int64 {
	if !hasForeground(c) {
		return 0
	}
	return max(1, units/foregroundPart)
}

// foreground makes the job beside the jobs of a stream of copies; nil: there is none. It is paced, and its latencies count
// from when its requests are due. It tells the throttle of the engine of each request, if there is a throttle.
func (l *load) foreground(s *stack) *job {
	c := l.cell
	if !hasForeground(c) {
		return nil
	}
	units := c.Range / c.Block
	from := (units - foregroundUnits(c, units)) * c.Block / foregroundBlock
	list := make([]uint32, min(c.Range/foregroundBlock-from, foregroundBlocks))
	for i := range list {
		list[i] = uint32(from + l.rand.Int64N(c.Range/foregroundBlock-from))
	}
	j := newJob(s.copies.from, block.Queue(c.Jobs), foregroundDepth, block.OpRead, foregroundBlock, foregroundBlock, list)
	if c.Foreground == foregroundCopy {
		j.copies = &copies{
			engine: s.copies.engine, from: s.copies.from, to: s.copies.to, offload: kcopyd.OffloadOff, class: kcopyd.CopyOnWrite,
		}
	}
	if s.throttle != nil {
		j.tell = s.throttle.Foreground
	}
	j.limit, j.from, j.interval = math.MaxInt, int64(c.Warmup), float64(time.Second)/c.ForegroundRate
	j.until.Store(int64(c.Warmup + c.Time))
	return j
}

// runBeside runs jobs, and beside them another one, which may be nil.
func runBeside(jobs []*job, beside *job) (measurement, error) {
	if beside == nil {
		return runJobs(jobs)
	}
	beside.epoch = time.Now()
	over := make(chan struct{})
	go func() {
		beside.run()
		close(over)
	}()
	m, err := runJobs(jobs)
	beside.until.Store(0)
	<-over
	m.spun += beside.spun
	if err == nil {
		err = beside.err
	}
	return m, err
}

// foregroundIO is what the foreground's own requests have come to at the leaf device of a role.
func foregroundIO(j *job, role string) ioCount {
	n := uint64(j.sent)
	switch {
	case role == roleDevice:
		return ioCount{Reads: n, ReadBytes: n * foregroundBlock}
	case role == roleOther && j.copies != nil:
		return ioCount{Writes: n, WriteBytes: n * foregroundBlock}
	}
	return ioCount{}
}
