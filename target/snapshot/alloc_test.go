package snapshot

import (
	"sync/atomic"
	"testing"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/dm"
	"cowherd/internal/invariant"
)

// quiet is a Completer that allocates nothing.
type quiet struct {
	done   chan struct{}
	failed atomic.Bool
}

func (q *quiet) Complete(_ *block.Request, err error) {
	if err != nil {
		q.failed.Store(true)
	}
	q.done <- struct{}{}
}

// TestAllocations: nothing is allocated for a request in steady state. A first write may make the table grow.
func TestAllocations(t *testing.T) {
	if invariant.Enabled {
		t.Skip("under the race detector sync.Pool forgets at random, and what is pooled is allocated anew")
	}
	const size = 192 << 20
	forEachEngine(t, func(t *testing.T, engine string) {
		e := newEngine(engine)
		defer func() {
			if err := e.Close(); err != nil {
				t.Error(err)
			}
		}()
		origin := NewOrigin(newRAM(size))
		s, err := New(Config{
			Origin: origin, COW: newRAM(size), Store: cowstore.NewTransient(size, 0, 4*kib), ChunkSize: 4 * kib, Engine: e,
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := origin.Add(s); err != nil {
			t.Fatal(err)
		}
		dev, snap := dm.NewDevice("origin", origin, false), dm.NewDevice("snap", s, false)
		buf := make([]byte, 64*kib)
		q := &quiet{done: make(chan struct{}, 1)}
		r := new(block.Request)
		next := int64(0)
		do := func(d *dm.Device, op block.Op, offset, length int64) {
			r.Op, r.Offset, r.Length, r.Data = op, offset, length, nil
			if op == block.OpRead || op == block.OpWrite {
				r.Data = buf[:length]
			}
			r.Push(q)
			d.Submit(r)
			<-q.done
		}
		// Indexes that are still small grow often.
		do(dev, block.OpWriteZeroes, size/2, writeZeroesMax)
		do(dev, block.OpWriteZeroes, size/2+writeZeroesMax, writeZeroesMax)
		tests := []struct {
			name string
			most float64
			f    func()
		}{
			{"first write to the origin", 0.05, func() { do(dev, block.OpWrite, next, 4096); next += 4096 }},
			{"first write of many chunks", 0.2, func() { do(dev, block.OpWrite, next+100, 64*kib); next += 68 * kib }},
			{"first write of a part of the snapshot", 0.05, func() { do(snap, block.OpWrite, next+1, 100); next += 4096 }},
			{"first write of a chunk of the snapshot", 0.05, func() { do(snap, block.OpWrite, next, 4096); next += 4096 }},
			{"first write of chunks and parts of the snapshot", 0.05,
				func() { do(snap, block.OpWrite, next+100, 20*kib); next += 24 * kib }},
			{"later write to the origin", 0, func() { do(dev, block.OpWrite, 0, 4096) }},
			{"later write of many chunks", 0, func() { do(dev, block.OpWrite, 0, 64*kib) }},
			{"later write of zeroes", 0, func() { do(dev, block.OpWriteZeroes, 0, 64*kib) }},
			{"later write to the snapshot", 0, func() { do(snap, block.OpWrite, 100, 4096) }},
			{"read of the origin", 0, func() { do(dev, block.OpRead, 0, 4096) }},
			{"read of a copied chunk", 0, func() { do(snap, block.OpRead, 0, 4096) }},
			{"read of copied chunks", 0, func() { do(snap, block.OpRead, 100, 64*kib) }},
			{"tracked read", 0, func() { do(snap, block.OpRead, size-4096, 4096) }},
			{"tracked read of many chunks", 0, func() { do(snap, block.OpRead, size-128*kib+100, 64*kib) }},
			{"flush", 0, func() { do(snap, block.OpFlush, 0, 0) }},
		}
		for _, test := range tests {
			if n := allocsPerRun(100, test.f); n > test.most {
				t.Errorf("%s: %v allocations for each request, at most %v are allowed", test.name, n, test.most)
			}
		}
		if q.failed.Load() || s.invalidCause() != nil {
			t.Errorf("a request failed; the snapshot's cause is %v", s.invalidCause())
		}
	})
}

// allocsPerRun is testing.AllocsPerRun with the fraction, and the best of three: a collection of garbage empties the
// pools.
func allocsPerRun(runs int, f func()) float64 {
	for range 20 {
		f()
	}
	best := float64(runs)
	for range 3 {
		best = min(best, testing.AllocsPerRun(1, func() {
			for range runs {
				f()
			}
		})/float64(runs))
	}
	return best
}
