package offload

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"cowherd/backend/file"
	"cowherd/block"
)

// benchSize is the size in bytes of the files that are copied between: whole, in pieces.
const benchSize = 64 * mib

// BenchmarkCopy copies pieces of one file to another that has its blocks, in sequence and at random, by a clone and by
// reading and writing (page cache and direct), depth 1, on a disk in memory, which is as fast as one can be. The flush at
// the end of each pass over the file is part of the mean, and not of the median.
func BenchmarkCopy(b *testing.B) {
	for _, kind := range sharing {
		b.Run(kind.name, func(b *testing.B) {
			d := mounted(b, kind, diskSize)
			for size := int64(4 * kib); size <= 4*mib; size *= 4 {
				for _, order := range []string{"seq", "random"} {
					for _, method := range []string{"clone", "readwrite", "direct"} {
						b.Run(fmt.Sprintf("%dKiB/%s/%s", size/kib, order, method), func(b *testing.B) {
							d.benchmarkCopy(b, method, size, order)
						})
					}
				}
			}
		})
	}
}

// benchmarkCopy is one of them.
func (d disk) benchmarkCopy(b *testing.B, method string, size int64, how string) {
	d.t = b // whose end is the files' end
	o := file.Options{Direct: method == "direct"}
	from, to := d.create("from", benchSize, o), d.create("to", benchSize, o)
	defer d.remove(from, to)
	scribble(b, from, 1)
	scribble(b, to, 2)
	order := rand.New(rand.NewPCG(1, 2)).Perm(benchSize / int(size))
	p := make([]byte, size)
	times := make([]time.Duration, 0, b.N)
	b.SetBytes(size)
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		k := i % len(order)
		at := int64(k) * size
		if how == "random" {
			at = int64(order[k]) * size
		}
		began := time.Now()
		var err error
		if method == "clone" {
			_, err = to.Copy(block.CopyClone, from, at, at, size)
		} else if err = block.Read(from, p, at); err == nil {
			err = block.Write(to, p, at)
		}
		times = append(times, time.Since(began))
		if err == nil && (k == len(order)-1 || i == b.N-1) {
			err = block.Flush(to)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	slices.Sort(times)
	b.ReportMetric(float64(times[len(times)/2].Nanoseconds()), "p50-ns")
}
