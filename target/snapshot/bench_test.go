package snapshot

import (
	"fmt"
	"runtime"
	"sync"
	"testing"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/dm"
	"cowherd/kcopyd"
)

const (
	benchChunk  = 4 * kib
	benchChunks = 1 << 16 // of a device of 256 MiB
)

// noop is a device that does nothing, at once.
type noop struct{ ram }

func (d *noop) Size() int64             { return benchChunks * benchChunk }
func (d *noop) Submit(r *block.Request) { r.Complete(nil) }

func newNoop() *noop { return &noop{*newRAM(0)} }

// newTouchedRAM is a device whose memory the system has given already.
func newTouchedRAM() *ram {
	d := newRAM(benchChunks * benchChunk)
	fill(d.data, 1)
	return d
}

// bench is an origin with one snapshot.
type bench struct {
	engine  kcopyd.Engine
	origin  *Origin
	cow     block.Device
	dev     *dm.Device
	snap    *dm.Device
	current *Snapshot
}

// retake replaces the snapshot by a new one.
func (x *bench) retake(b *testing.B) {
	if x.current != nil {
		x.origin.Remove(x.current)
	}
	s, err := New(Config{
		Origin: x.origin, COW: x.cow, Store: cowstore.NewTransient(x.cow.Size(), 0, benchChunk),
		ChunkSize: benchChunk, Engine: x.engine,
	})
	if err != nil {
		b.Fatal(err)
	}
	if err := x.origin.Add(s); err != nil {
		b.Fatal(err)
	}
	x.current, x.snap = s, dm.NewDevice("snap", s, false)
}

// run does b.N operations, each on a chunk of its own until all have been used, from the given number of goroutines.
// prepare is called, off the clock, whenever the chunks begin anew.
func (x *bench) run(b *testing.B, jobs int, prepare func(), on func() *dm.Device, op block.Op) {
	b.ReportAllocs()
	b.SetBytes(benchChunk)
	b.ResetTimer()
	for done := 0; done < b.N; {
		b.StopTimer()
		prepare()
		count := min(benchChunks, b.N-done)
		var all sync.WaitGroup
		b.StartTimer()
		for job := range jobs {
			all.Go(func() { benchJob(b, on(), op, block.Queue(job), count*job/jobs, count*(job+1)/jobs) })
		}
		all.Wait()
		done += count
	}
}

// benchJob does the operations numbered from first on, one after the other, in a random order of chunks.
func benchJob(b *testing.B, d *dm.Device, op block.Op, queue block.Queue, first, end int) {
	q := &quiet{done: make(chan struct{}, 1)}
	r := &block.Request{Op: op, Queue: queue, Length: benchChunk, Data: make([]byte, benchChunk)}
	for i := first; i < end; i++ {
		r.Offset = int64(i*40503%benchChunks) * benchChunk
		r.Push(q)
		d.Submit(r)
		<-q.done
	}
	if q.failed.Load() {
		b.Error("a request failed")
	}
}

// benchmark runs f over both engines, both devices, and one or all CPUs.
func benchmark(b *testing.B, f func(b *testing.B, x *bench, jobs int)) {
	for _, device := range []string{"ram", "noop"} {
		for _, engine := range engineNames {
			var below, cow block.Device = newNoop(), newNoop()
			if device == "ram" {
				below, cow = newTouchedRAM(), newTouchedRAM()
			}
			x := &bench{engine: newEngine(engine), origin: NewOrigin(below), cow: cow}
			x.dev = dm.NewDevice("origin", x.origin, false)
			for _, jobs := range []int{1, runtime.GOMAXPROCS(0)} {
				b.Run(fmt.Sprintf("device=%s/engine=%s/jobs=%d", device, engine, jobs), func(b *testing.B) { f(b, x, jobs) })
			}
			if err := x.engine.Close(); err != nil {
				b.Error(err)
			}
		}
	}
}

// BenchmarkBare writes to an origin without snapshots.
func BenchmarkBare(b *testing.B) {
	benchmark(b, func(b *testing.B, x *bench, jobs int) {
		x.run(b, jobs, func() {}, func() *dm.Device { return x.dev }, block.OpWrite)
	})
}

// BenchmarkFirstWrite writes to chunks of the origin that must be copied first.
func BenchmarkFirstWrite(b *testing.B) {
	benchmark(b, func(b *testing.B, x *bench, jobs int) {
		x.run(b, jobs, func() { x.retake(b) }, func() *dm.Device { return x.dev }, block.OpWrite)
	})
}

// BenchmarkLaterWrite writes to chunks of the origin that have been copied.
func BenchmarkLaterWrite(b *testing.B) {
	benchmark(b, func(b *testing.B, x *bench, jobs int) {
		x.retake(b)
		benchJob(b, x.dev, block.OpWrite, 0, 0, benchChunks)
		x.run(b, jobs, func() {}, func() *dm.Device { return x.dev }, block.OpWrite)
	})
}

// BenchmarkSnapshotRead reads chunks of the snapshot that lie on the origin, or on the COW device.
func BenchmarkSnapshotRead(b *testing.B) {
	for _, on := range []string{"origin", "cow"} {
		b.Run("from="+on, func(b *testing.B) {
			benchmark(b, func(b *testing.B, x *bench, jobs int) {
				x.retake(b)
				if on == "cow" {
					benchJob(b, x.dev, block.OpWrite, 0, 0, benchChunks)
				}
				x.run(b, jobs, func() {}, func() *dm.Device { return x.snap }, block.OpRead)
			})
		})
	}
}

// BenchmarkSnapshotWrite writes whole chunks of the snapshot for the first time.
func BenchmarkSnapshotWrite(b *testing.B) {
	benchmark(b, func(b *testing.B, x *bench, jobs int) {
		x.run(b, jobs, func() { x.retake(b) }, func() *dm.Device { return x.snap }, block.OpWrite)
	})
}

// BenchmarkLoad opens a store of a million exceptions, scattered over 1 TiB or dense.
func BenchmarkLoad(b *testing.B) {
	const count = 1 << 20
	for _, spread := range []cowstore.Chunk{1, 256} {
		b.Run(fmt.Sprintf("spread=%d", spread), func(b *testing.B) {
			d := newRAM((count + count/256 + 10) * benchChunk)
			p, err := cowstore.CreatePersistent(d, benchChunk, cowstore.PersistentConfig{})
			if err != nil {
				b.Fatal(err)
			}
			done := make(chan struct{}, 1)
			c := &cowstore.Commit{Count: 1, Done: func(*cowstore.Commit) { done <- struct{}{} }}
			for i := range cowstore.Chunk(count) {
				if c.New, _, err = p.Allocate(0, 1); err != nil {
					b.Fatal(err)
				}
				c.Old = i * 0x9e3779b1 % count * spread
				p.Commit(c)
				<-done
			}
			p.Wait()
			origin := NewOrigin(sized{newNoop(), count * int64(spread) * benchChunk})
			b.ReportAllocs()
			for b.Loop() {
				p, err := cowstore.OpenPersistent(d, cowstore.PersistentConfig{})
				if err != nil {
					b.Fatal(err)
				}
				if _, err := New(Config{Origin: origin, COW: d, Store: p}); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/count, "ns/exception")
		})
	}
}

// sized is a device of another size.
type sized struct {
	block.Device
	size int64
}

func (d sized) Size() int64 { return d.size }
