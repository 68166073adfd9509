package dm_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cowherd/backend/file"
	"cowherd/backend/null"
	"cowherd/block"
	"cowherd/dm"
	"cowherd/target"
	"cowherd/target/linear"
)

// counting is a submitter that sends its next request when one is done.
type counting struct {
	r    block.Request
	done int
}

func (c *counting) Complete(*block.Request, error) { c.done++ }

// run sends n reads or writes of 4 KiB.
func (c *counting) run(d block.Device, op block.Op, n int, data []byte) {
	for i := range n {
		c.r.Op, c.r.Data, c.r.Length = op, data, int64(len(data))
		c.r.Offset = int64(i&1023) << 12
		c.r.Push(c)
		d.Submit(&c.r)
	}
}

// BenchmarkNull is the null device, bare and below 1 and 3 linear targets: 4 KiB, in process, one request at a time. A
// busy machine makes the figures worthless, but not the ratios: of pieces of a millisecond or less that follow one another,
// their median.
func BenchmarkNull(b *testing.B) {
	const size, piece = 1 << 40, 2000
	for _, op := range []block.Op{block.OpRead, block.OpWrite} {
		b.Run(op.String(), func(b *testing.B) {
			leaf, err := null.New(null.Config{Size: size})
			if err != nil {
				b.Fatal(err)
			}
			defer leaf.Close()
			devices := []block.Device{leaf}
			for i := range 3 {
				below := target.Lower{Device: devices[i], Name: target.Name("x")}
				devices = append(devices, dm.NewDevice(fmt.Sprint(i), linear.New(below, 0, size), false))
			}
			var c counting
			data := make([]byte, 4096)
			var one, three, bare []float64
			b.ReportAllocs()
			for n := 0; n < b.N; n += 4 * piece {
				var took [4]float64
				for _, depth := range []int{0, 1, 0, 3} {
					start := time.Now()
					c.run(devices[depth], op, piece, data)
					took[depth] = time.Since(start).Seconds()
				}
				one, three = append(one, took[0]/took[1]), append(three, took[0]/took[3])
				bare = append(bare, took[0]/piece*1e9)
			}
			for _, x := range [][]float64{one, three, bare} {
				slices.Sort(x)
			}
			b.ReportMetric(one[len(one)/2], "of-bare-by-1")
			b.ReportMetric(three[len(three)/2], "of-bare-by-3")
			b.ReportMetric(bare[len(bare)/2], "bare-ns")
		})
	}
}

// instant is a moment, or a span of time, and how long requests waited that met it: those in flight at its beginning, and
// those that came before its end.
type instant struct {
	start, end atomic.Int64 // nanoseconds since the beginning of all; end 0: it is not over
	worst      atomic.Int64 // the longest wait in nanoseconds, from its start or the request's, whichever was later
}

// load is writers that keep a device busy, and instants that they meet.
type load struct {
	epoch    time.Time
	instants []instant
	latest   atomic.Int64 // how many of the instants have begun
	over     atomic.Bool
	writers  sync.WaitGroup
}

func (x *load) now() int64 { return int64(time.Since(x.epoch)) + 1 }

// meet tells the instants that a request met how long it took from then on.
func (x *load) meet(start, end int64) {
	for i := x.latest.Load() - 1; i >= 0; i-- {
		m := &x.instants[i]
		if over := m.end.Load(); over != 0 && over < start {
			return
		}
		for wait := end - max(start, m.start.Load()); ; {
			if worst := m.worst.Load(); wait <= worst || m.worst.CompareAndSwap(worst, wait) {
				break
			}
		}
	}
}

// write writes 4 KiB at random places of a device until the load is over.
func (x *load) write(b *testing.B, d block.Device, queue int) {
	rnd := rand.New(rand.NewPCG(1, uint64(queue)))
	r, done := block.Request{}, make(chan error, 1)
	data := make([]byte, 4096)
	told := whenDone(func(err error) { done <- err })
	for !x.over.Load() {
		r.Op, r.Queue, r.Length, r.Data = block.OpWrite, block.Queue(queue), 4096, data
		r.Offset = rnd.Int64N(d.Size()/4096) * 4096
		start := x.now()
		r.Push(told)
		d.Submit(&r)
		if err := <-done; err != nil {
			b.Error(err)
			return
		}
		x.meet(start, x.now())
		runtime.Gosched() // as a connection waits for its next request
	}
}

// during runs f in an instant of its own.
func (x *load) during(f func()) {
	m := &x.instants[x.latest.Load()]
	m.start.Store(x.now())
	x.latest.Add(1)
	f()
	m.end.Store(x.now())
}

// BenchmarkStall suspends and resumes an origin with 8 snapshots on which 4 writers work, all on files of a tmpfs. It tells
// how long the slowest request waited that met a suspend ("stall"), and for comparison the slowest of those in flight at a
// moment when nothing happens ("none"): with more writers than processors that is time spent waiting for a processor. "verbs" is
// the time from the beginning of the suspend to the end of the resume.
func BenchmarkStall(b *testing.B) {
	const size, jobs = 256 << 20, 4
	dir, err := os.MkdirTemp("/dev/shm", "cowherd-bench-")
	if err != nil {
		b.Skipf("needs a tmpfs: %v", err)
	}
	defer os.RemoveAll(dir)
	devices := map[string]block.Device{}
	for _, name := range []string{"o", "c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7"} {
		leaf, err := file.Create(filepath.Join(dir, name), size, file.Options{})
		if err != nil {
			b.Fatal(err)
		}
		defer leaf.Close()
		devices[name] = leaf
	}
	x := newRig(b, devices)
	x.mustCreate("base", fmt.Sprintf("0 %d snapshot-origin o", size/512))
	for i := range 8 {
		x.mustCreate(fmt.Sprint("s", i), fmt.Sprintf("0 %d snapshot o c%d N 8", size/512, i))
	}
	d := x.open("base")
	l := &load{epoch: time.Now(), instants: make([]instant, 2*b.N)}
	for w := range jobs {
		l.writers.Go(func() { l.write(b, d, w) })
	}
	b.ResetTimer()
	for range b.N {
		l.during(func() {
			do(b, x.Suspend(b.Context(), "base", true))
			do(b, x.Resume(b.Context(), "base", true))
		})
		time.Sleep(time.Millisecond) // requests run
		l.during(func() {})
		time.Sleep(time.Millisecond)
	}
	b.StopTimer()
	l.over.Store(true)
	l.writers.Wait()
	var stall, none, verbs []int64
	for i := range l.instants {
		if m := &l.instants[i]; i%2 == 0 {
			stall, verbs = append(stall, m.worst.Load()), append(verbs, m.end.Load()-m.start.Load())
		} else {
			none = append(none, m.worst.Load())
		}
	}
	for name, list := range map[string][]int64{"stall": stall, "none": none, "verbs": verbs} {
		slices.Sort(list)
		b.ReportMetric(float64(list[len(list)/2])/1e6, name+"-p50-ms")
		b.ReportMetric(float64(list[len(list)*99/100])/1e6, name+"-p99-ms")
		b.ReportMetric(float64(list[len(list)-1])/1e6, name+"-max-ms")
	}
}
