package kcopyd

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cowherd/backend/file"
	"cowherd/backend/mem"
	"cowherd/block"
	"cowherd/metrics"
)

// BenchmarkForeground measures the latency of random reads and writes of 4 KiB beside a copy in the background. Two
// connections, which are sockets, have 1 or 8 requests each in flight; client and server are goroutines of this process.
// Devices are in memory, files on tmpfs, and files on a disk, through the page cache and past it: FOREGROUND_DIR names a
// directory there, by default the one for temporary files.
//
// What is compared is measured in turn, for foregroundSlice each: alone (quiet), beside a copy of everything without a
// throttle (free), and with one that knows of the requests (yielding). Run it with -benchtime 1x; the figures are medians
// over foregroundRounds, of p99 as a ratio to the quiet slice before it too, with its range.
func BenchmarkForeground(b *testing.B) {
	for _, kind := range []string{"mem", "tmpfs", "disk", "direct"} {
		b.Run(kind, func(b *testing.B) {
			var x foregroundRig
			for _, d := range []*block.Device{&x.source, &x.target, &x.live} {
				*d = benchDevice(b, kind)
			}
			for _, op := range []block.Op{block.OpRead, block.OpWrite} {
				for _, depth := range []int{1, 8} {
					b.Run(fmt.Sprintf("%v/depth=%d", op, depth), func(b *testing.B) {
						for range b.N {
							x.measure(b, op, depth)
						}
					})
				}
			}
		})
	}
}

const (
	benchSize        = 128 << 20
	foregroundSlice  = 150 * time.Millisecond
	foregroundRounds = 5
	foregroundQueues = 2
)

// benchDevice is a device whose bytes have all been written.
func benchDevice(b *testing.B, kind string) block.Device {
	var d block.Device
	var err error
	dir := b.TempDir()
	switch kind {
	case "tmpfs":
		if dir, err = os.MkdirTemp("/dev/shm", "kcopyd-bench"); err != nil {
			b.Skip("there is no tmpfs: ", err)
		}
		b.Cleanup(func() { os.RemoveAll(dir) })
	case "disk", "direct":
		if at := os.Getenv("FOREGROUND_DIR"); at != "" {
			if dir, err = os.MkdirTemp(at, "kcopyd-bench"); err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { os.RemoveAll(dir) })
		}
	}
	if kind == "mem" {
		d, err = mem.New(mem.Config{Size: benchSize})
	} else {
		d, err = file.Create(filepath.Join(dir, "image"), benchSize, file.Options{Direct: kind == "direct"})
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
	if err := block.Flush(d); err != nil {
		b.Fatal(err)
	}
	return d
}

// foregroundRig is a copy from source to target beside requests for live.
type foregroundRig struct {
	source, target, live block.Device
}

// foregroundFigures are what a slice gives.
type foregroundFigures struct {
	p50, p99, p999 float64 // us
	rate           float64 // requests a second
	copied         float64 // MB/s
}

// measure runs all rounds and reports.
func (x *foregroundRig) measure(b *testing.B, op block.Op, depth int) {
	ways := []string{"quiet", "free", "yielding"}
	figures := map[string][]foregroundFigures{}
	for range foregroundRounds {
		for _, way := range ways {
			figures[way] = append(figures[way], x.slice(b, op, depth, way))
		}
	}
	for _, way := range ways {
		report := func(unit string, of func(i int) float64) []float64 {
			list := make([]float64, foregroundRounds)
			for i := range list {
				list[i] = of(i)
			}
			slices.Sort(list)
			b.ReportMetric(list[foregroundRounds/2], way+"-"+unit)
			return list
		}
		f := figures[way]
		report("p50-us", func(i int) float64 { return f[i].p50 })
		report("p99-us", func(i int) float64 { return f[i].p99 })
		report("p99.9-us", func(i int) float64 { return f[i].p999 })
		report("kIOPS", func(i int) float64 { return f[i].rate / 1000 })
		if way == "quiet" {
			continue
		}
		report("copyMB/s", func(i int) float64 { return f[i].copied })
		ratios := report("p99/quiet", func(i int) float64 { return f[i].p99 / figures["quiet"][i].p99 })
		b.ReportMetric(ratios[0], way+"-p99/quiet-min")
		b.ReportMetric(ratios[foregroundRounds-1], way+"-p99/quiet-max")
	}
}

// slice measures one way for foregroundSlice.
func (x *foregroundRig) slice(b *testing.B, op block.Op, depth int, way string) foregroundFigures {
	throttle := NewThrottle()
	c := Config{}
	if way == "yielding" {
		c.Throttle = throttle
	}
	e := NewScaled(c)
	var copied atomic.Int64
	var stop atomic.Bool
	var copier, clients sync.WaitGroup
	if way != "quiet" {
		copier.Go(func() { x.copyAll(e, &copied, &stop) })
	}
	time.Sleep(foregroundSlice / 10)
	var latency metrics.Histogram
	before, start := copied.Load(), time.Now()
	for q := range foregroundQueues {
		f := newForeground(b, x.live, op, block.Queue(q), depth)
		f.throttle, f.latency = throttle, &latency
		clients.Go(func() { f.serve(b) })
		clients.Go(func() { f.ask(b) })
	}
	clients.Wait()
	elapsed := time.Since(start).Seconds()
	moved := copied.Load() - before
	stop.Store(true)
	copier.Wait()
	closeBench(b, e)
	s := latency.Snapshot()
	us := func(q float64) float64 { return float64(s.Quantile(q)) / 1000 }
	return foregroundFigures{us(0.5), us(0.99), us(0.999), float64(s.Count) / elapsed, float64(moved) / elapsed / 1e6}
}

// copyAll copies everything again and again, on a queue of its own.
func (x *foregroundRig) copyAll(e Engine, copied *atomic.Int64, stop *atomic.Bool) {
	for at := int64(0); !stop.Load(); at = (at + 4<<20) % benchSize {
		run(e, &Job{From: Region{x.source, at}, To: []Region{{x.target, at}}, Length: 4 << 20, Class: Bulk,
			Queue: foregroundQueues, Offload: OffloadOff})
		copied.Add(4 << 20)
	}
}

// foreground is a connection: ask is the client, serve the server. A message is the number of a request.
type foreground struct {
	device         block.Device
	queue          block.Queue
	throttle       *Throttle
	latency        *metrics.Histogram
	client, server net.Conn
	requests       []foregroundRequest
}

// foregroundRequest is a request of a foreground.
type foregroundRequest struct {
	r     block.Request
	owner *foreground
	index byte
	began time.Time
	err   error
}

func newForeground(b *testing.B, d block.Device, op block.Op, queue block.Queue, depth int) *foreground {
	f := &foreground{device: d, queue: queue, requests: make([]foregroundRequest, depth)}
	for i := range f.requests {
		f.requests[i] = foregroundRequest{owner: f, index: byte(i),
			r: block.Request{Op: op, Queue: queue, Length: 4096, Data: alignedMemory(4096)}}
	}
	ends, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	for i, conn := range []*net.Conn{&f.client, &f.server} {
		end := os.NewFile(uintptr(ends[i]), "socket")
		if *conn, err = net.FileConn(end); err != nil {
			b.Fatal(err)
		}
		end.Close()
	}
	return f
}

// Complete answers the client.
func (x *foregroundRequest) Complete(_ *block.Request, err error) {
	x.err = err
	if _, err := x.owner.server.Write([]byte{x.index}); err != nil {
		x.err = err
	}
}

// serve submits what it is asked for.
func (f *foreground) serve(b *testing.B) {
	defer f.server.Close()
	var message [64]byte
	for {
		n, err := f.server.Read(message[:])
		for _, i := range message[:n] {
			f.throttle.Foreground(f.queue)
			x := &f.requests[i]
			x.r.Push(x)
			f.device.Submit(&x.r)
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				b.Error(err)
			}
			return
		}
	}
}

// ask keeps all requests in flight for foregroundSlice.
func (f *foreground) ask(b *testing.B) {
	defer f.client.Close()
	rng := rand.New(rand.NewPCG(1, uint64(f.queue)))
	var message [64]byte
	for i := range f.requests {
		message[i] = byte(i)
	}
	again := message[:len(f.requests)]
	until := time.Now().Add(foregroundSlice)
	for inFlight := 0; ; {
		now := time.Now()
		for _, i := range again {
			f.requests[i].began = now
			f.requests[i].r.Offset = rng.Int64N(benchSize/4096) * 4096
		}
		if len(again) > 0 {
			if _, err := f.client.Write(again); err != nil {
				b.Error(err)
				return
			}
		}
		inFlight += len(again)
		n, err := f.client.Read(message[:])
		if err != nil {
			b.Error(err)
			return
		}
		inFlight -= n
		now = time.Now()
		for _, i := range message[:n] {
			f.latency.Record(now.Sub(f.requests[i].began), 1)
			if err := f.requests[i].err; err != nil {
				b.Error(err)
			}
		}
		again = message[:n]
		if now.After(until) {
			again = nil
			if inFlight == 0 {
				return
			}
		}
	}
}
