package kcopyd

import (
	"fmt"
	"testing"

	"cowherd/backend/mem"
	nulldevice "cowherd/backend/null"
	"cowherd/block"
)

// BenchmarkSmall is the processor time of copies that break a chunk: one goroutine, one job in flight, on devices that
// do nothing (noop), that zero what is read (null), and in memory (mem). It takes the next of a number of jobs each time:
// one stays in the CPU's cache, 1024 do not stay in its first level.
func BenchmarkSmall(b *testing.B) {
	for _, kind := range []string{"noop", "null", "mem"} {
		for _, length := range []int64{4 << 10, 64 << 10} {
			for _, count := range []int{1, 1024} {
				b.Run(fmt.Sprintf("%s/%dk/jobs=%d", kind, length>>10, count), func(b *testing.B) {
					benchmarkSmall(b, kind, length, count)
				})
			}
		}
	}
}

const smallSize = 1 << 20

func benchmarkSmall(b *testing.B, kind string, length int64, count int) {
	source, target := smallDevice(b, kind), smallDevice(b, kind)
	e := NewScaled(Config{})
	done := 0
	jobs := make([]*Job, count)
	for i := range jobs {
		at := int64(i) * length % smallSize
		jobs[i] = &Job{From: Region{source, at}, To: []Region{{target, at}}, Length: length, Class: CopyOnWrite,
			Done: func(*Job) { done++ }}
	}
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		e.Submit(jobs[i%count])
	}
	b.StopTimer()
	if done != b.N {
		b.Fatalf("%d of %d jobs are done", done, b.N)
	}
	if err := e.Close(); err != nil {
		b.Fatal(err)
	}
}

func smallDevice(b *testing.B, kind string) block.Device {
	switch kind {
	case "null":
		d, err := nulldevice.New(nulldevice.Config{Size: smallSize})
		if err != nil {
			b.Fatal(err)
		}
		return d
	case "mem":
		d, err := mem.New(mem.Config{Size: smallSize})
		if err != nil {
			b.Fatal(err)
		}
		if err := block.Write(d, make([]byte, smallSize), 0); err != nil {
			b.Fatal(err)
		}
		return d
	}
	return null{}
}
