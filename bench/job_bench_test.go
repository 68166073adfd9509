package bench

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"cowherd/block"
)

// BenchmarkJob is what the harness costs for a request: one job on a device that does nothing, 4 KiB. cpu-ns/op is
// processor time, which other load on the machine hardly changes.
func BenchmarkJob(b *testing.B) {
	for _, depth := range []int{1, 32} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			b.ReportAllocs()
			offsets := make([]uint32, b.N)
			j := newJob(blank{1 << 40}, 0, depth, block.OpWrite, 4096, 4096, offsets)
			before := processorTime()
			b.ResetTimer()
			m, err := runJobs([]*job{j})
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(processorTime()-before)/float64(m.count), "cpu-ns/op")
		})
	}
}

// BenchmarkLater is what a later write costs with the harness, in nanoseconds and set beside the bare null device, and what
// a linear target costs: one job, 4 KiB at random. A busy machine makes little of it wrong: the figures are medians of pieces
// of a millisecond that follow one another.
func BenchmarkLater(b *testing.B) {
	for _, depth := range []int{1, 32} {
		b.Run(fmt.Sprintf("depth=%d", depth), func(b *testing.B) {
			cells := []*Cell{
				{Stack: stackBare}, {Stack: stackMapped, Layers: 1}, {Stack: stackSnapshotOrigin, Snapshots: 1}, {Stack: stackClone},
			}
			var jobs []*job
			for _, c := range cells {
				jobs = append(jobs, laterJob(b, c, depth))
			}
			took := make([][]float64, len(jobs))
			ratios := make([][]float64, len(jobs))
			b.ResetTimer()
			for range b.N {
				now := make([]float64, len(jobs))
				for _, i := range []int{0, 1, 2, 3, 3, 2, 1, 0} {
					j := jobs[i]
					start := time.Now()
					j.run()
					now[i] += float64(time.Since(start)) / float64(2*j.limit)
					j.sent = 0
				}
				for i := range now {
					took[i], ratios[i] = append(took[i], now[i]), append(ratios[i], now[0]/now[i])
				}
			}
			for i, c := range cells {
				slices.Sort(took[i])
				slices.Sort(ratios[i])
				b.ReportMetric(took[i][len(took[i])/2], c.Stack+"-ns")
				b.ReportMetric(ratios[i][len(ratios[i])/2], c.Stack+"/bare")
			}
		})
	}
}

// laterJob is a job of later writes to the stack of a cell.
func laterJob(b *testing.B, c *Cell, depth int) *job {
	c.Device, c.Size, c.Block, c.Pattern, c.Jobs, c.Depth = deviceNull, 512<<20, 4096, patternRandom, 1, depth
	c.Engine, c.Offload, c.Writes, c.Store, c.Chunk, c.Region = Scaled, offloadOff, writesLater, Transient, 4096, 4096
	c.normalise()
	k, err := newKit(c, pool{})
	if err != nil {
		b.Fatal(err)
	}
	s, err := build(c, k)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := errors.Join(s.close(), k.close()); err != nil {
			b.Error(err)
		}
	})
	l := &load{cell: c, rand: rand.New(rand.NewPCG(1, 0))}
	if isCopyOnWrite(c) {
		if _, err := runJobs(l.jobs(s.device, nil, true)); err != nil {
			b.Fatal(err)
		}
	}
	j := l.jobs(s.device, nil, false)[0]
	j.epoch, j.limit = time.Now(), 20000
	return j
}
