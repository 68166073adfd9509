package kcopyd

import (
	"bytes"
	"errors"
	"flag"
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"cowherd/block"
	"cowherd/internal/invariant"
)

var seedFlag = flag.Uint64("seed", 0, "run the model test with this seed only")

// badUnit is what an injected error lies in: a request that touches a bad unit fails, and does nothing.
const badUnit = 64 << 10

// model is a world for jobs: a source and destination area, the errors in them, and the jobs, which lie apart in the
// destination.
type model struct {
	t         *testing.T
	rng       *rand.Rand
	from, to  *ram
	bad       [2][]bool // by unit, of the source and of the destination
	source    block.Device
	target    block.Device
	zeroSteps int64 // bytes of a piece when write zeroes is used; 0: it is not
	jobs      []*modelJob
	written   atomic.Uint64
}

type modelJob struct {
	Job
	m    *model
	done atomic.Int32
	wg   *sync.WaitGroup
}

// TestModel runs random jobs from several goroutines, between devices of random kinds with random errors, and checks
// every byte of the destinations against what the job reports.
func TestModel(t *testing.T) {
	seeds := []uint64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}
	if invariant.Enabled {
		seeds = seeds[:8] // each ceiling twice
	}
	if *seedFlag != 0 {
		seeds = []uint64{*seedFlag}
	}
	for _, seed := range seeds {
		ceiling := []int64{1, SubJobSize + 4096, 3 * SubJobSize, 0}[seed%4]
		forEngines(t, Config{BufferCeiling: ceiling}, func(t *testing.T, e testEngine) {
			t.Logf("seed %d", seed)
			m := newModel(t, seed)
			m.run(e)
			m.checkStats(e.Stats())
		})
	}
}

func newModel(t *testing.T, seed uint64) *model {
	m := &model{t: t, rng: rand.New(rand.NewPCG(seed, 0))}
	m.from, m.to = newRAM(t, 6<<20), newRAM(t, 20<<20)
	fill(m.from.data, m.rng)
	blank(m.to.data)
	if m.rng.IntN(2) == 0 {
		m.zeroSteps = []int64{4096, 300 << 10, math.MaxInt64}[m.rng.IntN(3)]
		m.to.zeroMax = m.zeroSteps
	}
	density := []float64{0, 0, 0.01, 0.05}[m.rng.IntN(4)]
	m.source = m.device(m.from, 0, density)
	m.target = m.device(m.to, 1, density)
	for end := int64(0); ; {
		j := m.newJob(&end)
		if end > m.to.Size() {
			return m
		}
		m.jobs = append(m.jobs, j)
	}
}

// device puts errors and a random way of completing before r.
func (m *model) device(r *ram, which int, density float64) block.Device {
	m.bad[which] = make([]bool, len(r.data)/badUnit+1)
	for i := range m.bad[which] {
		m.bad[which][i] = m.rng.Float64() < density
	}
	d := failing(r, func(r *block.Request) bool { return m.isBad(which, r.Offset, r.Length) })
	switch m.rng.IntN(4) {
	case 0:
		return d
	case 1:
		return newAsync(m.t, d, 3, m.rng.Uint64())
	case 2: // errors come at once, other completions later
		slow := newAsync(m.t, r, 2, m.rng.Uint64())
		return failing(slow, func(r *block.Request) bool { return m.isBad(which, r.Offset, r.Length) })
	default: // now and then a request completes later
		slow := newAsync(m.t, d, 1, m.rng.Uint64())
		var count atomic.Int64
		return &hooked{d, func(r *block.Request) {
			if count.Add(1)%3 == 0 {
				slow.Submit(r)
			} else {
				d.Submit(r)
			}
		}}
	}
}

func (m *model) isBad(which int, offset, length int64) bool {
	for u := offset / badUnit; u <= (offset+length-1)/badUnit; u++ {
		if m.bad[which][u] {
			return true
		}
	}
	return false
}

// newJob makes a job whose destinations begin at *end, and moves *end behind them.
func (m *model) newJob(end *int64) *modelJob {
	j := &modelJob{m: m}
	switch m.rng.IntN(10) {
	case 0:
		j.Length = m.rng.Int64N(3)
	case 1:
		j.Length = m.rng.Int64N(5 << 20)
	case 2:
		j.Length = SubJobSize - 1 + m.rng.Int64N(3)
	default:
		j.Length = m.rng.Int64N(64 << 10)
	}
	j.Flags = Flags(m.rng.IntN(4))
	j.Queue = block.Queue(m.rng.IntN(1 << 16))
	if m.rng.IntN(4) != 0 {
		j.From = Region{m.source, m.rng.Int64N(m.from.Size() - j.Length)}
	}
	count := 1
	if m.rng.IntN(3) == 0 {
		count = m.rng.IntN(DestinationsMax + 1)
	}
	for range count {
		*end += m.rng.Int64N(100)
		j.To = append(j.To, Region{m.target, *end})
		*end += j.Length
	}
	j.Done = func(*Job) {
		if j.done.Add(1) != 1 {
			m.t.Error("Done was called twice")
		}
		j.wg.Done()
	}
	return j
}

// run submits the jobs from several goroutines, each with several in flight, and checks them.
func (m *model) run(e Engine) {
	var all sync.WaitGroup
	const goroutines = 4
	for g := range goroutines {
		all.Go(func() {
			var inFlight sync.WaitGroup
			for i := g; i < len(m.jobs); i += goroutines {
				m.jobs[i].wg = &inFlight
				inFlight.Add(1)
				e.Submit(&m.jobs[i].Job)
				if i/goroutines%8 == 7 {
					inFlight.Wait()
				}
			}
			inFlight.Wait()
			for i := g; i < len(m.jobs); i += goroutines {
				m.jobs[i].check(i)
			}
		})
	}
	all.Wait()
}

// want is what a destination holds in the piece [at, at+n) of the job when it has been written.
func (j *modelJob) want(at, n int64) []byte {
	if j.From.Device == nil {
		return make([]byte, n)
	}
	return j.m.from.data[j.From.Offset+at:][:n]
}

// check compares the job's result with the bytes of its destinations.
func (j *modelJob) check(index int) {
	m := j.m
	step := int64(SubJobSize)
	if j.From.Device == nil && m.zeroSteps > 0 {
		step = m.zeroSteps
	}
	ignore := j.Flags&IgnoreErrors != 0 && j.Flags&WriteSequentially == 0
	var readErr, writeErr bool // there was something to fail
	var writeBad, cut uint32
	for at := int64(0); at < j.Length && len(j.To) > 0; {
		n := min(step, j.Length-at)
		unread := j.From.Device != nil && m.isBad(0, j.From.Offset+at, n)
		readErr = readErr || unread
		for d := range j.To {
			to := j.To[d].Offset + at
			unwritten := m.isBad(1, to, n)
			writeErr = writeErr || (unwritten && !unread)
			have := m.to.data[to : to+n]
			switch {
			case bytes.Equal(have, j.want(at, n)):
				m.written.Add(uint64(n))
				if unread || unwritten || (cut>>d&1 != 0 && j.Flags&WriteSequentially != 0) {
					m.t.Errorf("job %d wrote piece %d to destination %d, which it must not", index, at, d)
				}
			case all(have, sentinel):
				writeBad |= 1 << d
				cut |= 1 << d
				if ignore && !unread && !unwritten {
					m.t.Errorf("job %d did not write piece %d to destination %d, which it must", index, at, d)
				}
			default:
				m.t.Errorf("job %d left a mess in piece %d of destination %d", index, at, d)
			}
		}
		at += n
	}
	j.checkResult(index, readErr, writeErr, writeBad, ignore || j.Length <= step)
}

// checkResult compares the job's result with what was found: the pieces to fail, which it met all if exact, and the
// destinations that are not complete.
func (j *modelJob) checkResult(index int, readErr, writeErr bool, writeBad uint32, exact bool) {
	t := j.m.t
	if j.done.Load() != 1 {
		t.Errorf("job %d: Done was called %d times", index, j.done.Load())
	}
	if j.WriteBad != writeBad {
		t.Errorf("job %d reports bad %b, found %b", index, j.WriteBad, writeBad)
	}
	if (writeBad != 0) != (j.Err() != nil) {
		t.Errorf("job %d: error %v, bad destinations %b", index, j.Err(), writeBad)
	}
	if (j.ReadErr != nil && !readErr) || (j.WriteErr != nil && !writeErr) {
		t.Errorf("job %d: errors %v, %v, which it did not meet", index, j.ReadErr, j.WriteErr)
	}
	if exact && (readErr != (j.ReadErr != nil) || writeErr != (j.WriteErr != nil)) {
		t.Errorf("job %d: errors %v, %v, but had to meet: read %v, write %v", index, j.ReadErr, j.WriteErr, readErr,
			writeErr)
	}
	if j.Err() != nil && !errors.Is(j.Err(), errInjected) {
		t.Errorf("job %d: %v", index, j.Err())
	}
}

// checkStats compares the counters with what was found.
func (m *model) checkStats(s Stats) {
	var failed uint64
	for _, j := range m.jobs {
		if j.Err() != nil {
			failed++
		}
	}
	if s.Jobs != uint64(len(m.jobs)) || s.Errors != failed || s.BytesWritten != m.written.Load() {
		m.t.Errorf("%d jobs, %d failed, %d bytes written, but stats %+v", len(m.jobs), failed, m.written.Load(), s)
	}
}
