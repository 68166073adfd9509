package kcopyd

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync/atomic"
	"syscall"
	"testing"

	"cowherd/block"
)

// TestSizes copies and zeroes jobs of all sorts of sizes, between devices of all sorts.
func TestSizes(t *testing.T) {
	sizes := []int64{0, 1, 511, 512, 4096, 4097, 64 << 10, SubJobSize - 1, SubJobSize, SubJobSize + 1,
		2 * SubJobSize, 4<<20 + 12345, SplitCount*SubJobSize + 1}
	kinds := []string{"sync", "async", "async source", "async destination"}
	forEngines(t, Config{}, func(t *testing.T, e testEngine) {
		rng := rand.New(rand.NewPCG(1, 2))
		for _, kind := range kinds {
			from, to := newRAM(t, 5<<20), newRAM(t, 5<<20)
			fill(from.data, rng)
			var source, destination block.Device = from, to
			if kind == "async" || kind == "async source" {
				source = newAsync(t, from, 2, 3)
			}
			if kind == "async" || kind == "async destination" {
				destination = newAsync(t, to, 2, 4)
			}
			for _, size := range sizes {
				for _, zero := range []bool{false, true} {
					name := fmt.Sprintf("%s, %d bytes, zero %v", kind, size, zero)
					blank(to.data)
					j := &Job{To: []Region{{destination, 77}}, Length: size, Queue: block.Queue(size)}
					want := make([]byte, size)
					if !zero {
						j.From = Region{source, 99}
						copy(want, from.data[99:])
					}
					run(e, j)
					if j.Err() != nil || j.WriteBad != 0 {
						t.Errorf("%s: error %v, bad %b", name, j.Err(), j.WriteBad)
					}
					if !bytes.Equal(to.data[77:77+size], want) {
						t.Errorf("%s: wrong bytes", name)
					}
					if !all(to.data[:77], sentinel) || !all(to.data[77+size:], sentinel) {
						t.Errorf("%s: wrote outside", name)
					}
				}
			}
		}
	})
}

// TestDestinations copies to 1 to 8 destinations, with errors in some of them.
func TestDestinations(t *testing.T) {
	forEngines(t, Config{}, func(t *testing.T, e testEngine) {
		rng := rand.New(rand.NewPCG(5, 6))
		from := newRAM(t, 2<<20)
		fill(from.data, rng)
		for count := 1; count <= DestinationsMax; count++ {
			for _, size := range []int64{4096, 1<<20 + 7} {
				for _, bad := range []uint32{0, 1, 1 << (count - 1), 0x55 & (1<<count - 1)} {
					rams := make([]*ram, count)
					to := make([]Region, count)
					for i := range to {
						rams[i] = newRAM(t, 2<<20)
						to[i] = Region{rams[i], int64(i) * 1000}
						if bad&(1<<i) != 0 {
							to[i].Device = failing(rams[i], func(*block.Request) bool { return true })
						}
						if i%2 == 1 {
							to[i].Device = newAsync(t, to[i].Device, 1, uint64(i))
						}
					}
					j := &Job{From: Region{from, 0}, To: to, Length: size, Flags: IgnoreErrors}
					run(e, j)
					if j.WriteBad != bad || (bad != 0) != errors.Is(j.WriteErr, errInjected) || j.ReadErr != nil {
						t.Errorf("%d destinations, bad %b: got bad %b, errors %v, %v", count, bad, j.WriteBad, j.ReadErr,
							j.WriteErr)
					}
					for i, r := range rams {
						want := from.data[:size]
						if bad&(1<<i) != 0 {
							want = make([]byte, size)
						}
						if !bytes.Equal(r.data[to[i].Offset:to[i].Offset+size], want) {
							t.Errorf("%d destinations, bad %b: destination %d has wrong bytes", count, bad, i)
						}
					}
				}
			}
		}
	})
}

// TestZeroes checks which operation zeroes, and that its maximum is respected.
func TestZeroes(t *testing.T) {
	cases := []struct {
		name     string
		max      []int64 // of each destination
		block    int
		length   int64
		zeroings int64 // of each destination
	}{
		{"none has it", []int64{0, 0}, 512, 1 << 20, 0},
		{"one has not", []int64{1 << 20, 0}, 512, 1 << 20, 0},
		{"all have it", []int64{math.MaxInt64, math.MaxInt64}, 512, 64 << 20, 1},
		{"the smallest counts", []int64{1 << 20, 64 << 10}, 512, 1 << 20, 16},
		{"more pieces than sub-jobs", []int64{4096}, 512, 1<<20 + 512, 257},
		{"in whole blocks", []int64{10000}, 4096, 64 << 10, 8},
		{"less than a block", []int64{1000}, 4096, 64 << 10, 0},
	}
	forEngines(t, Config{}, func(t *testing.T, e testEngine) {
		for _, c := range cases {
			j := &Job{Length: c.length}
			var rams []*ram
			for _, most := range c.max {
				r := newRAM(t, c.length+2*4096)
				blank(r.data)
				r.block, r.zeroMax = c.block, most
				rams = append(rams, r)
				j.To = append(j.To, Region{r, 4096})
			}
			run(e, j)
			if j.Err() != nil || j.WriteBad != 0 {
				t.Errorf("%s: error %v, bad %b", c.name, j.Err(), j.WriteBad)
			}
			for _, r := range rams {
				if n := r.zeroings.Load(); n != c.zeroings {
					t.Errorf("%s: %d zeroings, want %d", c.name, n, c.zeroings)
				}
				end := 4096 + c.length
				if !all(r.data[4096:end], 0) || !all(r.data[:4096], sentinel) || !all(r.data[end:], sentinel) {
					t.Errorf("%s: wrong bytes", c.name)
				}
			}
		}
		if !all(zeroes(), 0) {
			t.Fatal("the zero buffer was written to")
		}
	})
}

// TestInvalid checks that a job which cannot be submitted completes all the same.
func TestInvalid(t *testing.T) {
	d := null{}
	one := []Region{{d, 0}}
	cases := []struct {
		name string
		job  Job
	}{
		{"too many destinations", Job{To: make([]Region, DestinationsMax+1), Length: 1}},
		{"negative length", Job{From: Region{d, 0}, To: one, Length: -1}},
		{"negative source", Job{From: Region{d, -1}, To: one, Length: 1}},
		{"source overflows", Job{From: Region{d, math.MaxInt64}, To: one, Length: 1}},
		{"negative destination", Job{From: Region{d, 0}, To: []Region{{d, -1}}, Length: 1}},
		{"destination overflows", Job{To: []Region{{d, math.MaxInt64 - 1}}, Length: 2}},
		{"destination without a device", Job{From: Region{d, 0}, To: make([]Region, 1), Length: 1}},
	}
	forEngines(t, Config{}, func(t *testing.T, e testEngine) {
		for i := range cases {
			c := &cases[i]
			run(e, &c.job)
			if !errors.Is(c.job.WriteErr, syscall.EINVAL) || c.job.WriteBad != math.MaxUint32 {
				t.Errorf("%s: error %v, bad %#x", c.name, c.job.WriteErr, c.job.WriteBad)
			}
		}
		if s := e.Stats(); s.Errors != uint64(len(cases)) || s.Jobs != s.Errors {
			t.Errorf("stats: %+v", s)
		}
	})
}

// TestCallbackOnly runs jobs that move nothing, and a job again and again from its own callback.
func TestCallbackOnly(t *testing.T) {
	forEngines(t, Config{}, func(t *testing.T, e testEngine) {
		for _, j := range []*Job{{}, {Length: 1 << 30}, {From: Region{null{}, 0}, Length: 4096},
			{From: Region{null{}, 0}, To: []Region{{null{}, 0}}}} {
			run(e, j)
			if j.Err() != nil || j.WriteBad != 0 {
				t.Errorf("error %v, bad %b", j.Err(), j.WriteBad)
			}
		}
		done := make(chan struct{})
		again := 10
		j := &Job{Done: func(j *Job) {
			if again--; again == 0 {
				close(done)
				return
			}
			e.Submit(j)
		}}
		e.Submit(j)
		<-done
		if s := e.Stats(); s.Jobs != 14 || s.BytesRead != 0 || s.BytesWritten != 0 || s.Errors != 0 {
			t.Errorf("stats: %+v", s)
		}
	})
}

// TestErrorsStop checks how far a job goes on after an error in its piece 2 of 20, on devices where one piece is
// copied after the other, and that only the pieces that were read are written.
func TestErrorsStop(t *testing.T) {
	const pieces, bad = 20, 2
	cases := []struct {
		op      block.Op
		flags   Flags
		written int // pieces
	}{
		{block.OpRead, 0, bad},
		{block.OpWrite, 0, bad},
		{block.OpRead, IgnoreErrors, pieces - 1},
		{block.OpWrite, IgnoreErrors, pieces - 1},
		{block.OpRead, WriteSequentially, bad},
		{block.OpWrite, WriteSequentially | IgnoreErrors, bad},
	}
	for _, c := range cases {
		forEngines(t, Config{BufferCeiling: 1}, func(t *testing.T, e testEngine) {
			from, to := newRAM(t, pieces*SubJobSize), newRAM(t, pieces*SubJobSize)
			fill(from.data, rand.New(rand.NewPCG(7, 8)))
			isBad := func(r *block.Request) bool { return r.Op == c.op && r.Offset == bad*SubJobSize }
			j := &Job{
				From:   Region{failing(from, isBad), 0},
				To:     []Region{{failing(to, isBad), 0}},
				Length: pieces * SubJobSize,
				Flags:  c.flags,
			}
			run(e, j)
			if (j.ReadErr != nil) != (c.op == block.OpRead) || (j.WriteErr != nil) != (c.op == block.OpWrite) ||
				!errors.Is(j.Err(), errInjected) || j.WriteBad != 1 {
				t.Errorf("%s, flags %b: errors %v, %v, bad %b", c.op, c.flags, j.ReadErr, j.WriteErr, j.WriteBad)
			}
			written := 0
			for i := range pieces {
				at, end := i*SubJobSize, (i+1)*SubJobSize
				if bytes.Equal(from.data[at:end], to.data[at:end]) {
					written++
				} else if !all(to.data[at:end], 0) {
					t.Errorf("%s, flags %b: piece %d is neither copied nor untouched", c.op, c.flags, i)
				}
			}
			if written != c.written {
				t.Errorf("%s, flags %b: %d pieces written, want %d", c.op, c.flags, written, c.written)
			}
			if s := e.Stats(); s.BytesWritten != uint64(written)*SubJobSize || s.Errors != 1 {
				t.Errorf("%s, flags %b: stats %+v", c.op, c.flags, s)
			}
		})
	}
}

// TestSequential checks that each write follows the one before, though reads complete in any order, and that nothing
// is written after an error.
func TestSequential(t *testing.T) {
	const bad, size = 17, 30*SubJobSize + 5
	for _, ceiling := range []int64{1, 3 * SubJobSize, 0} {
		forEngines(t, Config{BufferCeiling: ceiling}, func(t *testing.T, e testEngine) {
			from, to := newRAM(t, size), newRAM(t, size)
			fill(from.data, rand.New(rand.NewPCG(9, 10)))
			var failure atomic.Int32 // the block.Op that fails in piece bad, or none of them
			fails := func(r *block.Request) bool {
				return int32(r.Op) == failure.Load() && r.Offset == bad*SubJobSize
			}
			var next atomic.Int64
			source := newAsync(t, failing(from, fails), 3, 11)
			slow := newAsync(t, &hooked{to, func(r *block.Request) {
				next.Add(r.Length)
				failing(to, fails).Submit(r)
			}}, 2, 12)
			destination := &hooked{to, func(r *block.Request) {
				if at := next.Load(); r.Offset != at {
					t.Errorf("write at %d before the one at %d has completed", r.Offset, at)
				}
				slow.Submit(r)
			}}
			j := &Job{From: Region{source, 0}, To: []Region{{destination, 0}}, Length: size,
				Flags: WriteSequentially | IgnoreErrors}
			for _, op := range []block.Op{block.OpFlush, block.OpRead, block.OpWrite} {
				failure.Store(int32(op))
				next.Store(0)
				blank(to.data)
				run(e, j)
				end := 0
				for end < size && to.data[end] != sentinel {
					end++
				}
				if !bytes.Equal(to.data[:end], from.data[:end]) || !all(to.data[end:], sentinel) {
					t.Errorf("%s failed: what was written up to %d is not all", op, end)
				}
				ok := end == size && j.Err() == nil && j.WriteBad == 0
				switch op {
				case block.OpRead: // pieces before it need not have been written yet
					ok = end <= bad*SubJobSize && j.ReadErr != nil && j.WriteBad == 1
				case block.OpWrite:
					ok = end == bad*SubJobSize && j.WriteErr != nil && j.WriteBad == 1
				}
				if !ok {
					t.Errorf("%s failed: %d bytes written, errors %v, %v", op, end, j.ReadErr, j.WriteErr)
				}
			}
		})
	}
}

// TestInFlight checks that a large job has SplitCount pieces in flight, no fewer and no more.
func TestInFlight(t *testing.T) {
	forEngines(t, Config{}, func(t *testing.T, e testEngine) {
		const size = 40 * SubJobSize
		from, to := newAsync(t, null{}, 1, 13), newAsync(t, null{}, 1, 14)
		held := newAsync(t, from, 0, 15) // completes nothing by itself
		var inFlight, most atomic.Int64
		source := &hooked{null{}, func(r *block.Request) {
			n := inFlight.Add(1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			held.Submit(r)
		}}
		destination := &hooked{null{}, func(r *block.Request) {
			r.Push(completer(func(r *block.Request, err error) {
				inFlight.Add(-1)
				r.Complete(err)
			}))
			to.Submit(r)
		}}
		done := make(chan struct{})
		j := &Job{From: Region{source, 0}, To: []Region{{destination, 0}}, Length: size}
		j.Done = func(*Job) { close(done) }
		e.Submit(j)
		for held.count() < SplitCount { // all start without any completion
			yield()
		}
		for open := true; open; {
			select {
			case <-done:
				open = false
			default:
				held.step(false)
				yield()
			}
		}
		if n := most.Load(); n != SplitCount {
			t.Errorf("%d pieces in flight, want %d", n, SplitCount)
		}
	})
}

// completer makes a block.Completer of a function.
type completer func(r *block.Request, err error)

func (c completer) Complete(r *block.Request, err error) { c(r, err) }
