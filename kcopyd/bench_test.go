package kcopyd

import (
	"fmt"
	"sync"
	"testing"

	"cowherd/block"
)

// A window keeps the jobs of one goroutine: it submits them again as they are done, and sleeps only when none is. It
// costs as little as it can, so that the engine is measured.
type window struct {
	wake  chan struct{}
	ready []*Job // the goroutine's own
	_     [128]byte
	mu    sync.Mutex
	// +checklocks:mu
	done []*Job
	// +checklocks:mu
	asleep bool
	_      [128]byte
}

func newWindow(depth int, length int64, queue int, d block.Device) *window {
	// At least a few cache lines each, lest goroutines share one.
	w := &window{wake: make(chan struct{}, 1), done: make([]*Job, 0, 64), ready: make([]*Job, 0, 64)}
	for range depth {
		j := &Job{From: Region{d, 0}, To: []Region{{d, 1 << 40}}, Length: length, Queue: block.Queue(queue)}
		j.Done = w.add
		w.ready = append(w.ready, j)
	}
	return w
}

// add is the jobs' Done.
func (w *window) add(j *Job) {
	w.mu.Lock()
	w.done = append(w.done, j)
	wake := w.asleep
	w.asleep = false
	w.mu.Unlock()
	if wake {
		w.wake <- struct{}{}
	}
}

// next returns a job to submit.
func (w *window) next() *Job {
	for len(w.ready) == 0 {
		w.mu.Lock()
		w.ready, w.done = w.done, w.ready
		w.asleep = len(w.ready) == 0
		asleep := w.asleep
		w.mu.Unlock()
		if asleep {
			<-w.wake
		}
	}
	j := w.ready[len(w.ready)-1]
	w.ready = w.ready[:len(w.ready)-1]
	return j
}

// drain waits for all jobs.
func (w *window) drain(depth int) {
	for range depth {
		w.next()
	}
}

func benchmarkCopy(b *testing.B, length int64, depth int, kind string, device func() block.Device) {
	for _, engine := range engines {
		b.Run(fmt.Sprintf("%s/%s/depth=%d", engine.name, kind, depth), func(b *testing.B) {
			e := engine.make(Config{})
			var mu sync.Mutex
			queue := 0
			b.ReportAllocs()
			b.SetBytes(length)
			b.RunParallel(func(pb *testing.PB) {
				mu.Lock()
				w := newWindow(depth, length, queue, device())
				queue++
				mu.Unlock()
				for pb.Next() {
					e.Submit(w.next())
				}
				w.drain(depth)
			})
			if err := e.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// noop is the device that costs nothing: what is measured is the engine, and the window.
func noop() block.Device { return null{} }

// memory is a device of 1 MiB for each goroutine that copies its bytes, wherever they lie.
func memory() block.Device {
	data := make([]byte, 1<<20)
	return &hooked{null{}, func(r *block.Request) {
		if r.Op == block.OpRead {
			copy(r.Data, data[:r.Length])
		} else {
			copy(data[:r.Length], r.Data)
		}
		r.Complete(nil)
	}}
}

func BenchmarkCopy4K(b *testing.B) {
	for _, depth := range []int{1, 32} {
		benchmarkCopy(b, 4096, depth, "noop", noop)
		benchmarkCopy(b, 4096, depth, "memory", memory)
	}
}

func BenchmarkCopy1M(b *testing.B) {
	benchmarkCopy(b, 1<<20, 1, "noop", noop)
	benchmarkCopy(b, 1<<20, 1, "memory", memory)
}

// BenchmarkWindow is the share of the window in the figures above.
func BenchmarkWindow(b *testing.B) {
	b.RunParallel(func(pb *testing.PB) {
		w := newWindow(1, 4096, 0, null{})
		for pb.Next() {
			j := w.next()
			j.Done(j)
		}
	})
}
