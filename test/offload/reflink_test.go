package offload

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"cowherd/backend/file"
	"cowherd/block"
	"cowherd/kcopyd"
)

var (
	belowFlag  = flag.String("below", "/dev/shm", "directory of the files below the loop devices of BenchmarkReflink")
	directFlag = flag.Bool("direct", false, "BenchmarkReflink: past the page cache")
)

// A contestant copies chunks in one way, between two files of its own.
type contestant struct {
	name     string
	way      kcopyd.Offload
	engine   *kcopyd.Scaled
	from, to *file.Device
	calls    []time.Duration // of a copy, by turn: its mean
	whole    []time.Duration // with its share of the flush at the end of the turn
}

// BenchmarkReflink compares random copies of chunks within one file system with reflinks by read and write, by clones,
// and by what the engine learns. Each has two files of its own, in the same state at first, so that it pays for what it
// leaves: dirty pages, shared blocks, extents. They take turns of some milliseconds, each of which ends with a flush that
// counts; one round is an iteration. The better way is the one of the smaller median, and the ratio to it the median of
// those of the rounds.
//
//	go test ./test/offload -run xxx -bench Reflink/xfs -benchtime 40x [-below /tmp] [-direct]
func BenchmarkReflink(b *testing.B) {
	for _, kind := range sharing {
		b.Run(kind.name, func(b *testing.B) {
			d := mountedOver(b, kind, 4*gib, *belowFlag)
			for size := int64(4 * kib); size <= 4*mib; size *= 2 {
				b.Run(fmt.Sprintf("%dKiB", size/kib), func(b *testing.B) { d.benchmarkReflink(b, size) })
			}
		})
	}
}

// benchmarkReflink is one size of it.
func (d disk) benchmarkReflink(b *testing.B, size int64) {
	d.t = b // whose end is the files' end
	list := []*contestant{
		{name: "clone", way: kcopyd.CloneOnly}, {name: "rw", way: kcopyd.OffloadOff}, {name: "auto", way: kcopyd.OffloadAuto},
		{name: "clone2", way: kcopyd.CloneOnly}, {name: "rw2", way: kcopyd.OffloadOff},
	}
	for i, c := range list {
		c.engine = kcopyd.NewScaled(kcopyd.Config{})
		c.from = d.create(c.name+"-from", benchSize, file.Options{Direct: *directFlag})
		c.to = d.create(c.name+"-to", benchSize, file.Options{Direct: *directFlag})
		defer d.remove(c.from, c.to)
		scribble(b, c.from, byte(i))
		scribble(b, c.to, byte(i+3))
		if err := block.Flush(c.to); err != nil {
			b.Fatal(err)
		}
		defer c.close(b)
	}
	rng := rand.New(rand.NewPCG(uint64(size), 1))
	b.ResetTimer()
	for i := range b.N {
		seed := rng.Uint64() // all copy the same chunks
		for k := range list {
			list[(i+k)%len(list)].turn(b, size, seed)
		}
	}
	b.StopTimer()
	compare(b, list)
}

// turn copies some chunks, and flushes.
func (c *contestant) turn(b *testing.B, size int64, seed uint64) {
	count := int(min(max(16*mib/size, 24), 128))
	rng := rand.New(rand.NewPCG(seed, 2))
	done := make(chan struct{}, 1)
	j := &kcopyd.Job{From: kcopyd.Region{Device: c.from}, To: []kcopyd.Region{{Device: c.to}}, Length: size,
		Class: kcopyd.Bulk, Offload: c.way, Done: func(*kcopyd.Job) { done <- struct{}{} }}
	began := time.Now()
	for range count {
		j.From.Offset = rng.Int64N(benchSize/size) * size
		j.To[0].Offset = rng.Int64N(benchSize/size) * size
		c.engine.Submit(j)
		<-done
		if j.Err() != nil {
			b.Fatal(j.Err())
		}
	}
	calls := time.Since(began)
	if err := block.Flush(c.to); err != nil {
		b.Fatal(err)
	}
	c.calls = append(c.calls, calls/time.Duration(count))
	c.whole = append(c.whole, time.Since(began)/time.Duration(count))
}

// close ends the contestant.
func (c *contestant) close(b *testing.B) {
	if err := c.engine.Close(); err != nil {
		b.Error(err)
	}
}

// compare reports the medians, flushes included, and the ratio of auto to the better of the two ways; in the log there is
// more. The second contestants of the two ways tell how far equals are apart.
func compare(b *testing.B, list []*contestant) {
	clone, rw, auto, clone2, rw2 := list[0], list[1], list[2], list[3], list[4]
	for _, flushed := range []bool{false, true} {
		of, what := func(c *contestant) []time.Duration { return c.calls }, "calls"
		if flushed {
			of, what = func(c *contestant) []time.Duration { return c.whole }, "flushed"
		}
		better, again := clone, clone2
		if median(of(rw)) < median(of(clone)) {
			better, again = rw, rw2
		}
		line := ""
		for _, c := range list[:3] {
			line += fmt.Sprintf("%s %.1f (%.1f) ", c.name, micros(median(of(c))), micros(slices.Min(of(c))))
		}
		b.Logf("%-7s %sauto/%s %.2f (%.2f), equals %.2f (%.2f)", what, line, better.name,
			median(ratios(of(auto), of(better))), float64(slices.Min(of(auto)))/float64(slices.Min(of(better))),
			median(ratios(of(again), of(better))), float64(slices.Min(of(again)))/float64(slices.Min(of(better))))
		if flushed {
			b.ReportMetric(median(ratios(of(auto), of(better))), "auto/better")
		}
	}
	for _, c := range list[:3] {
		b.ReportMetric(float64(median(c.whole).Nanoseconds()), c.name+"-ns")
	}
	for _, r := range auto.engine.Stats().Routes {
		b.Logf("threshold %d KiB", r.Threshold/kib)
	}
}

// ratios are those of the rounds.
func ratios(of, to []time.Duration) []float64 {
	list := make([]float64, len(of))
	for i := range of {
		list[i] = float64(of[i]) / float64(to[i])
	}
	return list
}

// median of an uneven number of values; of an even one the upper of the two.
func median[T time.Duration | float64](values []T) T {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}

// micros is d in microseconds.
func micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }
