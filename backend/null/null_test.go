package null

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"cowherd/backend/devicetest"
	"cowherd/block"
)

func newDevice(t testing.TB, c Config) *Device {
	t.Helper()
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func TestModel(t *testing.T) {
	for _, latency := range []time.Duration{0, 5 * time.Microsecond} {
		for _, unit := range []int{1, 512, 4096} {
			t.Run(fmt.Sprintf("%v/%d", latency, unit), func(t *testing.T) {
				devicetest.Leaks(t)
				c := Config{Size: 300 << 10, MemoryBacked: true, LogicalBlock: unit, Latency: latency, Queues: 3, Depth: 2}
				devicetest.Model(t, newDevice(t, c), 50)
			})
		}
	}
}

func TestDisjoint(t *testing.T) {
	devicetest.Leaks(t)
	devicetest.Disjoint(t, newDevice(t, Config{Size: 1 << 20, MemoryBacked: true}), 8, 30)
	devicetest.Disjoint(t, newDevice(t, Config{Size: 1 << 20, MemoryBacked: true, Latency: 1000, Depth: 4}), 8, 30)
}

func TestNewChecks(t *testing.T) {
	for _, c := range []Config{
		{Size: -512}, {Size: 1}, {Size: math.MaxInt64}, {Size: 512, Latency: -1},
		{Size: 512, Queues: -1}, {Size: 512, Queues: queuesMax + 1}, {Size: 512, Depth: -1}, {Size: 512, Depth: depthMax + 1},
		{LogicalBlock: -512}, {LogicalBlock: 513}, {LogicalBlock: 128 << 10}, {Size: 512, LogicalBlock: 4096},
	} {
		if _, err := New(c); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%+v: got %v, want EINVAL", c, err)
		}
	}
}

func TestEdges(t *testing.T) {
	for _, c := range []Config{
		{}, {Size: 512}, {Size: math.MaxInt64 - 511}, {Size: math.MaxInt64, LogicalBlock: 1},
		{Size: math.MaxInt64 - 4095, LogicalBlock: 4096, MemoryBacked: true},
		{Size: math.MaxInt64 - 511, Latency: 1000, Queues: 1},
	} {
		d := newDevice(t, c)
		size, unit := d.Size(), int64(d.Limits().LogicalBlock)
		if size != c.Size {
			t.Errorf("%+v: size %d", c, size)
		}
		err := errors.Join(
			block.Read(d, nil, size),
			block.Write(d, nil, size),
			block.Do(d, block.OpDiscard, 0, 0, size, nil),
			block.Do(d, block.OpWriteZeroes, block.Fast, 0, size, nil),
			block.Flush(d))
		if size >= unit {
			err = errors.Join(err, block.Write(d, bytes.Repeat([]byte{7}, int(unit)), size-unit))
		}
		if err != nil {
			t.Errorf("%+v: %v", c, err)
		}
		devicetest.Extents(t, d, 0, size)
		devicetest.Extents(t, d, size, 0)
	}
}

// TestKeepsNothing: without memory writes are dropped, reads give zeroes, and everything counts as data.
func TestKeepsNothing(t *testing.T) {
	d := newDevice(t, Config{Size: 1 << 62})
	p := bytes.Repeat([]byte{7}, 4096)
	if err := block.Write(d, p, 1<<40); err != nil {
		t.Fatal(err)
	}
	if err := block.Read(d, p, 1<<40); err != nil {
		t.Fatal(err)
	}
	if slices.Max(p) != 0 {
		t.Error("a read does not give zeroes")
	}
	want := block.Extent{Offset: 512, Length: 1 << 61}
	if list := devicetest.Extents(t, d, 512, 1<<61); len(list) != 1 || list[0] != want {
		t.Errorf("extents %v, want %v", list, want)
	}
}

// recorder keeps the order and the times of completions.
type recorder struct {
	start time.Time
	left  sync.WaitGroup

	mu      sync.Mutex
	offsets []int64         // +checklocks:mu
	times   []time.Duration // +checklocks:mu
}

func (c *recorder) Complete(r *block.Request, err error) {
	if err != nil {
		panic(err)
	}
	c.mu.Lock()
	c.offsets = append(c.offsets, r.Offset)
	c.times = append(c.times, time.Since(c.start))
	c.mu.Unlock()
	c.left.Done()
}

// submit sends count reads, all to one queue, and waits for their completions.
func (c *recorder) submit(d *Device, count int) {
	c.start = time.Now()
	c.left.Add(count)
	for i := range count {
		r := &block.Request{Op: block.OpRead, Offset: int64(i), Data: make([]byte, 1), Length: 1}
		r.Push(c)
		d.Submit(r)
	}
	c.left.Wait()
}

// TestOrder: a queue completes in order, also what had to wait for a place.
func TestOrder(t *testing.T) {
	devicetest.Leaks(t)
	d := newDevice(t, Config{Size: 1 << 20, LogicalBlock: 1, Latency: 200 * time.Microsecond, Queues: 1, Depth: 16})
	c := &recorder{}
	c.submit(d, 100)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.IsSorted(c.offsets) {
		t.Errorf("completed out of order: %v", c.offsets)
	}
	for i, at := range c.times {
		// Request i is in the ring's turn number i/16, and each turn takes a latency.
		if least := time.Duration(i/16+1) * 200 * time.Microsecond; at < least {
			t.Errorf("request %d was completed after %v, before %v", i, at, least)
		}
	}
}

// TestLatency: never early, and usually not late either. The bound is loose: the machine may be busy.
func TestLatency(t *testing.T) {
	for _, latency := range []time.Duration{10 * time.Microsecond, 300 * time.Microsecond, 3 * time.Millisecond} {
		d := newDevice(t, Config{Size: 1 << 20, Latency: latency})
		took := make([]time.Duration, 21)
		for i := range took {
			start := time.Now()
			if err := block.Read(d, make([]byte, 512), 0); err != nil {
				t.Fatal(err)
			}
			took[i] = time.Since(start)
		}
		slices.Sort(took)
		t.Logf("latency %v: shortest %v, median %v, longest %v", latency, took[0], took[10], took[20])
		if took[0] < latency || took[10] > latency+20*time.Millisecond {
			t.Errorf("latency %v: shortest %v, median %v", latency, took[0], took[10])
		}
	}
}

// chain submits itself again from its completion until it has run often enough.
type chain struct {
	d    *Device
	left int
	done chan struct{}
}

func (c *chain) Complete(r *block.Request, err error) {
	if err != nil {
		panic(err)
	}
	if c.left--; c.left == 0 {
		close(c.done)
		return
	}
	r.Push(c)
	c.d.Submit(r)
}

// TestSubmitFromCompletion: a completion that submits to its own full queue does not stop it.
func TestSubmitFromCompletion(t *testing.T) {
	devicetest.Leaks(t)
	d := newDevice(t, Config{Size: 1 << 20, Latency: 1000, Queues: 1, Depth: 1})
	chains := make([]chain, 4)
	for i := range chains {
		c := &chains[i]
		*c = chain{d: d, left: 200, done: make(chan struct{})}
		r := &block.Request{Op: block.OpWrite, Data: make([]byte, 512), Length: 512}
		r.Push(c)
		d.Submit(r)
	}
	for i := range chains {
		<-chains[i].done
	}
}

// TestClose: Close waits for what is in flight and in the backlog; later requests fail.
func TestClose(t *testing.T) {
	devicetest.Leaks(t)
	d, err := New(Config{Size: 1 << 20, LogicalBlock: 1, Latency: 2 * time.Millisecond, Queues: 1, Depth: 3})
	if err != nil {
		t.Fatal(err)
	}
	c := &recorder{start: time.Now()}
	c.left.Add(8)
	for range 8 {
		r := &block.Request{Op: block.OpFlush}
		r.Push(c)
		d.Submit(r)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	c.mu.Lock()
	if len(c.offsets) != 8 {
		t.Errorf("Close returned after %d of 8 completions", len(c.offsets))
	}
	c.mu.Unlock()
	if err := block.Flush(d); block.Errno(err) != syscall.ESHUTDOWN {
		t.Errorf("a request after Close: %v, want ESHUTDOWN", err)
	}
	if err := d.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

// ignore is a Completer that does nothing.
type ignore struct{}

func (ignore) Complete(*block.Request, error) {}

func benchmarkInline(b *testing.B, op block.Op, c Config) {
	d := newDevice(b, c)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		r := block.Request{Op: op, Data: make([]byte, 4096), Length: 4096}
		for pb.Next() {
			r.Push(ignore{})
			d.Submit(&r)
		}
	})
}

func BenchmarkRead4K(b *testing.B)  { benchmarkInline(b, block.OpRead, Config{Size: 1 << 40}) }
func BenchmarkWrite4K(b *testing.B) { benchmarkInline(b, block.OpWrite, Config{Size: 1 << 40}) }

func BenchmarkMemoryWrite4K(b *testing.B) {
	benchmarkInline(b, block.OpWrite, Config{Size: 1 << 40, MemoryBacked: true})
}

// token hands a request back to the benchmark that submitted it.
type token chan *block.Request

func (c token) Complete(r *block.Request, _ error) { c <- r }

// BenchmarkLatency keeps 32 requests in flight: ns/op is 1/32 of the latency and what the queue adds to it.
func BenchmarkLatency(b *testing.B) {
	for _, latency := range []time.Duration{10 * time.Microsecond, 100 * time.Microsecond, time.Millisecond} {
		b.Run(latency.String(), func(b *testing.B) {
			d := newDevice(b, Config{Size: 1 << 40, Latency: latency, Queues: 1})
			done := make(token, 32)
			for range cap(done) {
				done <- &block.Request{Op: block.OpWrite, Data: make([]byte, 4096), Length: 4096}
			}
			b.ReportAllocs()
			for b.Loop() {
				r := <-done
				r.Push(done)
				d.Submit(r)
			}
			for range cap(done) {
				<-done
			}
		})
	}
}
