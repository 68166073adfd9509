package clone

import (
	"sync/atomic"
	"testing"

	"cowherd/block"
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

// TestAllocations: nothing is allocated for a request in steady state, but for the pages of the regions' state.
func TestAllocations(t *testing.T) {
	if invariant.Enabled {
		t.Skip("under the race detector sync.Pool forgets at random, and what is pooled is allocated anew")
	}
	const size = 512 << 20
	for _, name := range engineNames {
		t.Run(name, func(t *testing.T) {
			engine := newEngine(name)
			closing(t, engine)
			c, err := New(Config{
				Source: newRAM(size), Destination: newRAM(size), Metadata: newMemory(16*kib, size), Engine: engine,
				Hydration: Hydration{Disabled: true},
			})
			if err != nil {
				t.Fatal(err)
			}
			closing(t, c)
			d := dm.NewDevice("clone", c, false)
			buf, q, r := make([]byte, 128*kib), &quiet{done: make(chan struct{}, 1)}, new(block.Request)
			do := func(op block.Op, flags block.Flags, offset, length int64) {
				r.Op, r.Flags, r.Offset, r.Length, r.Data = op, flags, offset, length, nil
				if op == block.OpRead || op == block.OpWrite {
					r.Data = buf[:length]
				}
				r.Push(q)
				d.Submit(r)
				<-q.done
			}
			next := int64(0)
			for _, test := range []struct {
				name string
				most float64
				f    func()
			}{
				{"write of a part of a region", 0, func() { do(block.OpWrite, 0, next+5, 4096); next += 16 * kib }},
				{"write of a region", 0, func() { do(block.OpWrite, 0, next, 16*kib); next += 16 * kib }},
				{"write of regions and parts", 0, func() { do(block.OpWrite, 0, next+5, 64*kib); next += 80 * kib }},
				{"discard of regions", 0, func() { do(block.OpDiscard, 0, next, 64*kib); next += 64 * kib }},
				{"later write", 0, func() { do(block.OpWrite, 0, 5, 64*kib) }},
				{"later discard", 0, func() { do(block.OpDiscard, 0, 5, 64*kib) }},
				{"read of what is hydrated", 0, func() { do(block.OpRead, 0, 5, 64*kib) }},
				{"read of what is not", 0, func() { do(block.OpRead, 0, size-64*kib, 64*kib) }},
				{"read of both", 0, func() { do(block.OpRead, 0, next-32*kib, 64*kib) }},
			} {
				for range 20 {
					test.f()
				}
				best := 1000.0
				for range 3 { // a collection of garbage empties the pools
					best = min(best, testing.AllocsPerRun(100, test.f))
				}
				if best > test.most {
					t.Errorf("%s: %v allocations for each request", test.name, best)
				}
			}
			do(block.OpFlush, 0, 0, 0)
			do(block.OpWrite, block.FUA, 5, 4096)
			if q.failed.Load() {
				t.Error("a request failed")
			}
			if next+64*kib > size {
				t.Errorf("the device is too small: %d", next)
			}
		})
	}
}
