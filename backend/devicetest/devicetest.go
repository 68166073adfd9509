// Package devicetest holds what the tests of all leaf devices share: random requests checked against a plain byte
// slice, extents checked against what is read, and a look for goroutines that were left behind. Only tests import it.
package devicetest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"cowherd/block"
)

// batchMax is the largest number of requests of one worker in flight.
const batchMax = 8

// Model does random operations on the whole of d, several in flight at a time, and checks every byte that it reads
// against a byte slice. The device holds anything at first; it should be a few MiB at most.
func Model(t *testing.T, d block.Device, steps int) {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	newWorker(t, d, 0, d.Size(), seed).run(steps)
}

// Disjoint does what Model does by several goroutines at once, each within a range of its own.
func Disjoint(t *testing.T, d block.Device, workers, steps int) {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	unit := int64(d.Limits().LogicalBlock)
	part := d.Size() / int64(workers) / unit * unit
	var wg sync.WaitGroup
	for i := range workers {
		w := newWorker(t, d, int64(i)*part, part, seed+uint64(i))
		wg.Go(func() { w.run(steps) })
	}
	wg.Wait()
}

// Leaks fails the test when more goroutines run at its end than at the call. Call it first.
func Leaks(t *testing.T) {
	t.Helper()
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		for range 200 {
			if runtime.NumGoroutine() <= before {
				return
			}
			time.Sleep(10 * time.Millisecond) // a goroutine that has been waited for may need a moment to vanish
		}
		stacks := make([]byte, 1<<20)
		t.Errorf("%d goroutines were left behind:\n%s",
			runtime.NumGoroutine()-before, stacks[:runtime.Stack(stacks, true)])
	})
}

// Extents lists the extents of a range and fails the test when they have gaps, overlap, lie outside, or when one that
// reads as zeroes does not.
func Extents(t *testing.T, d block.Device, offset, length int64) []block.Extent {
	t.Helper()
	var list []block.Extent
	at := offset
	err := d.(block.ExtentLister).Extents(offset, length, func(e block.Extent) bool {
		if e.Offset != at || e.Length <= 0 {
			t.Errorf("extent %+v where %d was next", e, at)
		}
		at = e.Offset + e.Length
		list = append(list, e)
		return true
	})
	if err != nil {
		t.Fatalf("extents of [%d, +%d): %v", offset, length, err)
	}
	if at != offset+length {
		t.Errorf("extents of [%d, +%d) end at %d", offset, length, at)
	}
	for _, e := range list {
		checkZero(t, d, e)
	}
	return list
}

// checkZero reads the first bytes of an extent that is said to read as zeroes.
func checkZero(t *testing.T, d block.Device, e block.Extent) {
	t.Helper()
	if !e.Zero {
		return
	}
	p := bytes.Repeat([]byte{0xee}, int(min(e.Length, 1<<20)))
	if err := block.Read(d, p, e.Offset); err != nil {
		t.Errorf("read of the zero extent %+v: %v", e, err)
	} else if slices.Max(p) != 0 {
		t.Errorf("the zero extent %+v does not read as zeroes", e)
	}
}

// worker does random operations within one range of a device.
type worker struct {
	t     *testing.T
	d     block.Device
	bytes *rand.ChaCha8 // data for writes
	rnd   *rand.Rand    // decisions, from the same source
	base  int64         // where the range starts
	unit  int64         // bytes
	data  []byte        // what the range must read as

	requests [batchMax]block.Request
	starts   [batchMax]int64 // where each began in the range: the device may change the request's offset
	done     chan result
}

// result is what a completion tells.
type result struct {
	r   *block.Request
	err error
}

func newWorker(t *testing.T, d block.Device, base, length int64, seed uint64) *worker {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	source := rand.NewChaCha8(key)
	return &worker{
		t: t, d: d, bytes: source, rnd: rand.New(source),
		base: base, unit: int64(d.Limits().LogicalBlock),
		data: make([]byte, length),
		done: make(chan result, batchMax),
	}
}

// Complete implements block.Completer.
func (w *worker) Complete(r *block.Request, err error) { w.done <- result{r, err} }

// run does steps batches, reads everything back and compares the extents with it.
func (w *worker) run(steps int) {
	w.adopt(0, int64(len(w.data)))
	for range steps {
		if w.batch(); w.t.Failed() {
			return
		}
	}
	p := make([]byte, len(w.data))
	if err := block.Read(w.d, p, w.base); err != nil {
		w.t.Error(err)
	}
	w.compare(p, 0)
	if _, ok := w.d.(block.ExtentLister); ok {
		Extents(w.t, w.d, w.base, int64(len(w.data)))
	}
}

// batch submits a few requests for ranges that do not overlap, waits for all, and brings the model up to date.
func (w *worker) batch() {
	cuts := make([]int64, 2*(1+w.rnd.IntN(batchMax)))
	for i := range cuts {
		cuts[i] = w.rnd.Int64N(int64(len(w.data))/w.unit+1) * w.unit
	}
	slices.Sort(cuts)
	count := len(cuts) / 2
	for i := range count {
		r := &w.requests[i]
		r.Reset()
		w.fill(r, cuts[2*i], cuts[2*i+1])
		w.starts[i] = r.Offset - w.base
		r.Push(w)
		w.d.Submit(r)
	}
	for range count {
		got := <-w.done
		for i := range w.requests {
			if got.r == &w.requests[i] {
				w.apply(got.r, w.starts[i], got.err)
			}
		}
	}
}

// fill makes r a random operation on [start, end) of the worker's range.
func (w *worker) fill(r *block.Request, start, end int64) {
	if w.rnd.IntN(2) == 0 { // mostly small ones, as in life
		end = min(end, start+w.unit*(1+w.rnd.Int64N(max(8192/w.unit, 1))))
	}
	r.Queue = block.Queue(w.rnd.Uint32())
	r.Offset, r.Length = w.base+start, end-start
	limits := w.d.Limits()
	switch n := w.rnd.IntN(10); {
	case n < 3:
		r.Op, r.Data = block.OpRead, bytes.Repeat([]byte{0xee}, int(r.Length))
	case n == 8 && limits.DiscardMax >= r.Length:
		r.Op = block.OpDiscard
	case n == 7 && limits.WriteZeroesMax >= r.Length:
		r.Op = block.OpWriteZeroes
		r.Flags = block.Flags(w.rnd.IntN(8)) // any of FUA, NoUnmap and Fast
	case n == 6 && w.rnd.IntN(4) == 0:
		r.Op, r.Offset, r.Length = block.OpFlush, 0, 0
	default:
		r.Op, r.Data = block.OpWrite, make([]byte, r.Length)
		_, _ = w.bytes.Read(r.Data)
		if w.rnd.IntN(16) == 0 {
			r.Flags = block.FUA
		}
	}
}

// apply does to the model what r, which began at start, has done to the device.
func (w *worker) apply(r *block.Request, start int64, err error) {
	if r.Op == block.OpWriteZeroes && r.Flags&block.Fast != 0 && errors.Is(err, syscall.ENOTSUP) {
		return // allowed, and nothing was changed
	}
	if err != nil {
		w.t.Error(err)
		return
	}
	switch r.Op {
	case block.OpRead:
		w.compare(r.Data, start)
	case block.OpWrite:
		copy(w.data[start:], r.Data)
	case block.OpDiscard:
		w.adopt(start, r.Length)
	case block.OpWriteZeroes:
		clear(w.data[start : start+r.Length])
	}
}

// adopt takes what a range reads as, which may be anything, for what it has to read as from now on.
func (w *worker) adopt(start, length int64) {
	if err := block.Read(w.d, w.data[start:start+length], w.base+start); err != nil {
		w.t.Error(err)
	}
}

// compare checks what was read at start against the model.
func (w *worker) compare(p []byte, start int64) {
	want := w.data[start : start+int64(len(p))]
	if bytes.Equal(p, want) {
		return
	}
	for i := range p {
		if p[i] != want[i] {
			w.t.Errorf("byte %d is %#x, in the model %#x; read of %d bytes at %d", w.base+start+int64(i), p[i], want[i],
				len(p), w.base+start)
			return
		}
	}
}
