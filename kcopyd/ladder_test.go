package kcopyd

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"

	"cowherd/block"
	"cowherd/internal/invariant"
)

// ladder is a world for jobs that may be offloaded: leaves with offers and faults of random kinds, below layers that mix
// them, and one destination area for each job.
type ladder struct {
	t       *testing.T
	source  *mosaic
	target  *mosaic
	leaves  []*leaf // of the target
	jobs    []*Job
	ioError bool // some calls fail with EIO
}

// TestLadder runs random jobs through random leaves and faults, from several goroutines, and checks every byte: what a job
// reports as done is done, the rest of the destination is untouched, and only errors that were injected are reported.
func TestLadder(t *testing.T) {
	seeds := []uint64{1, 2, 3, 4, 5, 6, 7, 8}
	if invariant.Enabled {
		seeds = seeds[:3] // each has hundreds of megabytes, every byte of which the race detector looks at
	}
	if *seedFlag != 0 {
		seeds = []uint64{*seedFlag}
	}
	for _, seed := range seeds {
		forLanes(t, Config{BufferCeiling: []int64{1, 0}[seed%2]}, func(t *testing.T, e testEngine) {
			t.Logf("seed %d", seed)
			l := newLadder(t, rand.New(rand.NewPCG(seed, 0)))
			l.run(e)
			l.check(e.Stats())
		})
	}
}

const (
	ladderUnit = 192 << 10
	ladderSize = 160 * ladderUnit
)

func newLadder(t *testing.T, rng *rand.Rand) *ladder {
	l := &ladder{t: t, ioError: rng.IntN(2) == 0}
	from := newLeaf(t, "source", ladderSize)
	fill(from.data, rng)
	l.source = &mosaic{t: t, unit: ladderUnit}
	for _, i := range rng.Perm(160) {
		l.source.pieces = append(l.source.pieces, Region{from, int64(i) * ladderUnit})
	}
	for i := range 4 {
		to := newLeaf(t, string(rune('a'+i)), ladderSize/4, randomOffers(rng)...)
		blank(to.data)
		to.fault = l.fault(rng.Uint64())
		l.leaves = append(l.leaves, to)
	}
	l.target = &mosaic{t: t, unit: ladderUnit}
	for _, i := range rng.Perm(160) {
		l.target.pieces = append(l.target.pieces, Region{l.leaves[i/40], int64(i%40) * ladderUnit})
	}
	for end := int64(0); ; {
		at := (end + rng.Int64N(5)*512 + 4095*rng.Int64N(2)) &^ 511
		length := []int64{512 * (1 + rng.Int64N(40)), 4096 * rng.Int64N(200), 2 << 20, 64 << 10}[rng.IntN(4)]
		if end = at + length; end > ladderSize {
			return l
		}
		from := at
		if rng.IntN(4) == 0 { // not aligned alike
			from = rng.Int64N((ladderSize-length)/512) * 512
		}
		j := &Job{From: Region{l.source, from}, To: []Region{{l.target, at}}, Length: length, Class: Class(rng.IntN(4)),
			Queue: block.Queue(rng.IntN(100)), Offload: Offload(max(rng.IntN(8)-4, 0))}
		l.jobs = append(l.jobs, j)
	}
}

// randomOffers are none, one or two methods.
func randomOffers(rng *rand.Rand) []block.CopyOffer {
	all := []block.CopyOffer{
		{Method: block.CopyClone, Granularity: 4096, TailAtEnd: true, LengthMax: 1 << 30, Concurrency: 1},
		{Method: block.CopyDevice, Granularity: 512, LengthMax: 128 << 10, Concurrency: 3},
	}
	i := rng.IntN(3)
	return all[i:min(i+1+rng.IntN(2), 2)]
}

// fault makes calls fail, or copy less, at random; after some time one method may be gone.
func (l *ladder) fault(seed uint64) func(block.CopyMethod, int64, int64, int64) (int64, error) {
	var mu sync.Mutex
	rng := rand.New(rand.NewPCG(seed, 1))
	gone := 3 + rng.IntN(60)
	calls := 0
	return func(_ block.CopyMethod, _, _, length int64) (int64, error) {
		mu.Lock()
		defer mu.Unlock()
		calls++
		part := rng.Int64N(length + 1)
		switch {
		case calls > gone:
			return part, syscall.ENOTSUP
		case l.ioError && rng.IntN(30) == 0:
			return part, syscall.EIO
		case rng.IntN(10) == 0:
			return max(part, min(length, 4096)), nil
		}
		return length, nil
	}
}

func (l *ladder) run(e Engine) {
	var all sync.WaitGroup
	const goroutines = 4
	for g := range goroutines {
		all.Go(func() {
			var inFlight sync.WaitGroup
			for i := g; i < len(l.jobs); i += goroutines {
				if i%32 == 3 || i%32 == 7 {
					l.target.suspended.Store(i%32 == 3)
				}
				inFlight.Add(1)
				l.jobs[i].Done = func(*Job) { inFlight.Done() }
				e.Submit(l.jobs[i])
			}
			inFlight.Wait()
		})
	}
	all.Wait()
}

func (l *ladder) check(s Stats) {
	target, source := make([]byte, ladderSize), make([]byte, ladderSize)
	if err := errors.Join(block.Read(l.target, target, 0), block.Read(l.source, source, 0)); err != nil {
		l.t.Fatal(err)
	}
	var end int64
	var failed uint64
	for i := range l.jobs {
		j := l.jobs[i]
		at := j.To[0].Offset
		if !all(target[end:at], sentinel) {
			l.t.Errorf("something was written before job %d", i)
		}
		end = at + j.Length
		if j.Err() == nil {
			if j.WriteBad != 0 || !bytes.Equal(target[at:end], source[j.From.Offset:][:j.Length]) {
				l.t.Errorf("job %d of %d bytes from %d to %d: no error, but wrong bytes", i, j.Length, j.From.Offset, at)
			}
			continue
		}
		failed++
		known := (l.ioError && errors.Is(j.WriteErr, syscall.EIO)) || (j.insists() && errors.Is(j.WriteErr, syscall.ENOTSUP))
		if j.WriteBad != 1 || j.ReadErr != nil || !known {
			l.t.Errorf("job %d: errors %v, %v, bad %b", i, j.ReadErr, j.WriteErr, j.WriteBad)
		}
	}
	l.t.Logf("%d bytes cloned, %d by the device, %d read and written", methodBytes(s, "clone"), methodBytes(s, "device"),
		methodBytes(s, "readwrite"))
	if s.Jobs != uint64(len(l.jobs)) || s.Errors != failed || l.source.held.Load()+l.target.held.Load() != 0 {
		l.t.Errorf("%d jobs, %d failed, %d layers held, but stats %+v", len(l.jobs), failed,
			l.source.held.Load()+l.target.held.Load(), s)
	}
	for _, to := range l.leaves {
		to.mu.Lock()
		for _, o := range to.offers {
			if limit := max(o.Concurrency, to.offers[0].Concurrency, to.offers[len(to.offers)-1].Concurrency); to.runningMost > limit {
				l.t.Errorf("%d calls at a time, at most %d", to.runningMost, limit)
			}
		}
		to.mu.Unlock()
	}
}
