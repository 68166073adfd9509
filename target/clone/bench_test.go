package clone

import (
	"fmt"
	"sync"
	"testing"

	"cowherd/block"
	"cowherd/dm"
)

// noop is a device of some size that does nothing, at once.
type noop struct{ size int64 }

func (d noop) Size() int64             { return d.size }
func (d noop) Limits() block.Limits    { return block.NoLimits() }
func (d noop) Submit(r *block.Request) { r.Complete(nil) }

const (
	benchRegion  = 64 << 10
	benchRegions = 1 << 17
)

// benchClone is a clone over devices that do nothing.
func benchClone(b *testing.B, engine string) (*Clone, func()) {
	size := int64(benchRegion * benchRegions)
	e := newEngine(engine)
	c, err := New(Config{
		Source: noop{size}, Destination: noop{size}, Metadata: newMemory(benchRegion, size), Engine: e,
		Hydration: Hydration{Disabled: true},
	})
	if err != nil {
		b.Fatal(err)
	}
	return c, func() {
		if err := c.Close(); err != nil {
			b.Fatal(err)
		}
		if err := e.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkWrite: writes of 4 KiB, each to a region of its own, from goroutines with queues of their own, one request in
// flight each, on devices that do nothing.
func BenchmarkWrite(b *testing.B) {
	for _, engine := range engineNames {
		for _, jobs := range []int{1, 2} {
			b.Run(fmt.Sprintf("engine=%s/jobs=%d", engine, jobs), func(b *testing.B) {
				benchWrites(b, engine, jobs, true)
			})
		}
	}
	b.Run("hydrated", func(b *testing.B) { benchWrites(b, "scaled", 1, false) })
}

func benchWrites(b *testing.B, engine string, jobs int, anew bool) {
	b.ReportAllocs()
	var d *dm.Device
	end := func() {}
	for done := 0; done < b.N; {
		b.StopTimer()
		if d == nil || anew {
			end()
			var c *Clone
			c, end = benchClone(b, engine)
			d = dm.NewDevice("bench", c, false)
			if !anew { // leaves one region that is not, so that states are looked up
				if err := block.Do(d, block.OpDiscard, 0, benchRegion, benchRegion*(benchRegions-1), nil); err != nil {
					b.Fatal(err)
				}
			}
		}
		count := min(benchRegions-1, b.N-done)
		b.StartTimer()
		var all sync.WaitGroup
		for job := range jobs {
			all.Go(func() { benchJob(b, d, block.Queue(job), 1+count*job/jobs, 1+count*(job+1)/jobs) })
		}
		all.Wait()
		done += count
	}
	b.StopTimer()
	end()
}

// benchJob writes to each of the regions [start, end).
func benchJob(b *testing.B, d *dm.Device, queue block.Queue, start, end int) {
	r, data := new(block.Request), make([]byte, 4096)
	q := &quiet{done: make(chan struct{}, 1)}
	for i := start; i < end; i++ {
		// Neighbours in time are not neighbours on the device.
		region := int64(uint32(i) * 0x9E3779B1 % benchRegions)
		r.Op, r.Queue, r.Offset, r.Length, r.Data = block.OpWrite, queue, region*benchRegion+8192, 4096, data
		r.Push(q)
		d.Submit(r)
		<-q.done
	}
	if q.failed.Load() {
		b.Error("a request failed")
	}
}
