package dm_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
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

// BenchmarkStall suspends and resumes an origin with 8 snapshots over a file in memory, on which 4 writers work, and tells
// how long its requests wait: from the beginning of the suspend to the end of the resume, and the slowest request.
func BenchmarkStall(b *testing.B) {
	const size, jobs = 256 << 20, 4
	dir, err := os.MkdirTemp("/dev/shm", "cowherd-bench-")
	if err != nil {
		b.Skipf("needs a tmpfs: %v", err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "origin")
	leaf, err := file.Create(path, size, file.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer leaf.Close()
	devices := map[string]block.Device{"o": leaf}
	for i := range 8 {
		devices[fmt.Sprint("c", i)] = memory(b, size)
	}
	x := newRig(b, devices)
	x.mustCreate("base", fmt.Sprintf("0 %d snapshot-origin o", size/512))
	for i := range 8 {
		x.mustCreate(fmt.Sprint("s", i), fmt.Sprintf("0 %d snapshot o c%d N 8", size/512, i))
	}
	d := x.open("base")
	var over atomic.Bool
	var writers sync.WaitGroup
	slowest := make([]time.Duration, jobs)
	for w := range jobs {
		writers.Go(func() {
			rnd := rand.New(rand.NewPCG(1, uint64(w)))
			data := make([]byte, 4096)
			for !over.Load() {
				start := time.Now()
				if err := block.Do(d, block.OpWrite, 0, rnd.Int64N(size/4096)*4096, 4096, data); err != nil {
					b.Error(err)
					return
				}
				slowest[w] = max(slowest[w], time.Since(start))
			}
		})
	}
	var stalls []time.Duration
	for b.Loop() {
		start := time.Now()
		do(b, x.Suspend(b.Context(), "base", true))
		do(b, x.Resume(b.Context(), "base", true))
		stalls = append(stalls, time.Since(start))
		time.Sleep(time.Millisecond) // requests run
	}
	over.Store(true)
	writers.Wait()
	slices.Sort(stalls)
	b.ReportMetric(stalls[len(stalls)/2].Seconds()*1e3, "p50-ms")
	b.ReportMetric(stalls[len(stalls)*99/100].Seconds()*1e3, "p99-ms")
	b.ReportMetric(slices.Max(slowest).Seconds()*1e3, "slowest-request-ms")
}
