package kcopyd

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cowherd/backend/file"
	"cowherd/backend/mem"
	"cowherd/block"
	"cowherd/metrics"
)

// BenchmarkForeground measures the latency of random writes of 4 KiB, each of which a goroutine is asked for by another,
// as a connection's is by the network, alone (none) and beside a copy of everything from a queue of its own: without a
// throttle (free), and with one that knows of the writes (yielding).
func BenchmarkForeground(b *testing.B) {
	for _, kind := range []string{"mem", "file"} {
		source, target, live := benchDevice(b, kind), benchDevice(b, kind), benchDevice(b, kind)
		for _, queues := range []int{1, 2} {
			for round := range 2 { // A B C A B C
				for _, copying := range []string{"none", "free", "yielding"} {
					b.Run(fmt.Sprintf("%s/queues=%d/copy=%s#%d", kind, queues, copying, round), func(b *testing.B) {
						foreground(b, source, target, live, queues, copying)
					})
				}
			}
		}
	}
}

const benchSize = 128 << 20

// benchDevice is a device whose bytes have all been written.
func benchDevice(b *testing.B, kind string) block.Device {
	var d block.Device
	var err error
	switch kind {
	case "mem":
		d, err = mem.New(mem.Config{Size: benchSize})
	case "file":
		path := filepath.Join(b.TempDir(), "image")
		if err = errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, benchSize)); err == nil {
			d, err = file.Open(path, file.Options{})
		}
	}
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := d.(interface{ Close() error }).Close(); err != nil {
			b.Error(err)
		}
	})
	piece := bytes.Repeat([]byte{7}, 1<<20)
	for at := int64(0); at < benchSize; at += 1 << 20 {
		if err := block.Write(d, piece, at); err != nil {
			b.Fatal(err)
		}
	}
	return d
}

func foreground(b *testing.B, source, target, live block.Device, queues int, copying string) {
	throttle := NewThrottle()
	c := Config{}
	if copying == "yielding" {
		c.Throttle = throttle
	}
	e := NewScaled(c)
	var stop atomic.Bool
	var copier, servers sync.WaitGroup
	var copied atomic.Int64
	if copying != "none" {
		copier.Go(func() {
			for at := int64(0); !stop.Load(); at = (at + 4<<20) % benchSize {
				run(e, &Job{From: Region{source, at}, To: []Region{{target, at}}, Length: 4 << 20, Class: Bulk,
					Queue: block.Queue(queues), Offload: OffloadOff})
				copied.Add(4 << 20)
			}
		})
	}
	var latency metrics.Histogram
	b.ResetTimer()
	start := time.Now()
	for q := range queues {
		asked, answered := make(chan int64), make(chan error)
		servers.Go(func() {
			data := make([]byte, 4096)
			for at := range asked {
				throttle.Foreground(block.Queue(q))
				answered <- block.Write(live, data, at)
			}
		})
		servers.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(q)))
			for range b.N / queues {
				began := time.Now()
				asked <- rng.Int64N(benchSize/4096) * 4096
				if err := <-answered; err != nil {
					b.Error(err)
				}
				latency.Record(time.Since(began), 1)
			}
			close(asked)
		})
	}
	servers.Wait()
	elapsed := time.Since(start)
	b.StopTimer()
	stop.Store(true)
	copier.Wait()
	if err := e.Close(); err != nil {
		b.Fatal(err)
	}
	s := latency.Snapshot()
	b.ReportMetric(float64(s.Quantile(0.5))/1000, "p50-us")
	b.ReportMetric(float64(s.Quantile(0.99))/1000, "p99-us")
	b.ReportMetric(float64(s.Quantile(0.999))/1000, "p99.9-us")
	b.ReportMetric(float64(copied.Load())/elapsed.Seconds()/1e6, "copyMB/s")
}

// BenchmarkReflink compares random copies of 4 KiB to 4 MiB within one file system with reflinks by read and write, by
// clones, and by what the engine learns. REFLINK_DIR names a directory on such a file system, on a device in memory:
//
//	truncate -s 4G /dev/shm/xfs && mkfs.xfs -q /dev/shm/xfs && mount -o loop /dev/shm/xfs /mnt
func BenchmarkReflink(b *testing.B) {
	dir := os.Getenv("REFLINK_DIR")
	if dir == "" {
		b.Skip("REFLINK_DIR names no directory on a file system with reflinks")
	}
	engines := map[Offload]*Scaled{}
	for _, way := range []Offload{OffloadOff, CloneOnly, OffloadAuto} {
		engines[way] = NewScaled(Config{})
	}
	source, target := reflinkFile(b, dir, "source"), reflinkFile(b, dir, "target")
	names := map[Offload]string{OffloadOff: "readwrite", CloneOnly: "clone", OffloadAuto: "auto"}
	for size := int64(4 << 10); size <= 4<<20; size *= 4 {
		for round := range 3 {
			for _, way := range []Offload{OffloadOff, CloneOnly, OffloadAuto} {
				b.Run(fmt.Sprintf("%dk/%s#%d", size>>10, names[way], round), func(b *testing.B) {
					rng := rand.New(rand.NewPCG(uint64(size), uint64(round)))
					done := make(chan struct{}, 1)
					j := &Job{From: Region{Device: source}, To: []Region{{Device: target}}, Length: size, Class: Bulk,
						Offload: way, Done: func(*Job) { done <- struct{}{} }}
					b.SetBytes(size)
					if err := block.Flush(target); err != nil { // a clone would pay for what others have left to be written
						b.Fatal(err)
					}
					b.ResetTimer()
					for range b.N {
						j.From.Offset = rng.Int64N(benchSize/size) * size
						j.To[0].Offset = rng.Int64N(benchSize/size) * size
						engines[way].Submit(j)
						<-done
						if j.Err() != nil {
							b.Fatal(j.Err())
						}
					}
				})
			}
		}
	}
	for _, r := range engines[OffloadAuto].Stats().Routes {
		b.Logf("learnt: %+v", r)
	}
	for _, e := range engines {
		closeBench(b, e)
	}
}

// reflinkFile is a file of written bytes.
func reflinkFile(b *testing.B, dir, name string) block.Device {
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, bytes.Repeat([]byte{7}, benchSize), 0o600); err != nil {
		b.Fatal(err)
	}
	d, err := file.Open(path, file.Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := errors.Join(d.Close(), os.Remove(path)); err != nil {
			b.Error(err)
		}
	})
	return d
}
