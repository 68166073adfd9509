package dm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"cowherd/block"
	"cowherd/dm"
	"cowherd/internal/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must happen before it gives up.
const patience = 30 * time.Second

// ram is a device in memory. Its bytes are plain memory, so that the race detector sees accesses without an order.
type ram struct{ data []byte }

func (d *ram) Size() int64 { return int64(len(d.data)) }

func (d *ram) Limits() block.Limits { return block.NoLimits() }

func (d *ram) Submit(r *block.Request) {
	switch r.Op {
	case block.OpRead:
		copy(r.Data, d.data[r.Offset:r.End()])
	case block.OpWrite:
		copy(d.data[r.Offset:r.End()], r.Data)
	case block.OpWriteZeroes:
		clear(d.data[r.Offset:r.End()])
	}
	r.Complete(nil)
}

// window is a target: a part of a device.
type window struct {
	lower        block.Device
	offset, size int64
}

func (w *window) Size() int64          { return w.size }
func (w *window) Limits() block.Limits { return w.lower.Limits() }
func (w *window) Map(r *block.Request) block.Device {
	r.Offset += w.offset
	return w.lower
}

// taker is a target that takes every request and submits it itself.
type taker struct{ window }

func (w *taker) Map(r *block.Request) block.Device {
	w.window.Map(r).Submit(r)
	return nil
}

// lister is a window that knows of a hole in its second half.
type lister struct{ window }

func (w *lister) Extents(offset, length int64, yield func(block.Extent) bool) error {
	half := w.size / 2
	if offset < half && !yield(block.Extent{Offset: offset, Length: min(length, half-offset)}) {
		return nil
	}
	if end := offset + length; end > half {
		offset = max(offset, half)
		yield(block.Extent{Offset: offset, Length: end - offset, Hole: true, Zero: true})
	}
	return nil
}

// call is a request and its result.
type call struct {
	r    block.Request
	done chan error
}

func (c *call) Complete(_ *block.Request, err error) { c.done <- err }

// submit starts a request.
func submit(d block.Device, op block.Op, queue block.Queue, offset int64, data []byte) *call {
	c := &call{done: make(chan error, 1)}
	c.r = block.Request{Op: op, Queue: queue, Offset: offset, Length: int64(len(data)), Data: data}
	c.r.Push(c)
	d.Submit(&c.r)
	return c
}

// pending fails the test if the request is over.
func (c *call) pending(t *testing.T, what string) {
	t.Helper()
	select {
	case err := <-c.done:
		t.Fatalf("%s: the request is over (%v)", what, err)
	default:
	}
}

// wait is the request's result.
func (c *call) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-c.done:
		return err
	case <-time.After(patience):
		t.Fatal("a request was lost")
		return nil
	}
}

func (c *call) want(t *testing.T, want error) {
	t.Helper()
	if err := c.wait(t); !errors.Is(err, want) || want == nil && err != nil {
		t.Fatalf("got %v, want %v", err, want)
	}
}

func inTime(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func TestSubmit(t *testing.T) {
	lower := &ram{data: make([]byte, 10000)}
	w := window{lower: lower, offset: 1000, size: 5000}
	for _, target := range []dm.Target{&w, &taker{w}} {
		d := dm.NewDevice("x", target, false)
		if d.Name() != "x" || d.Size() != 5000 || d.Limits() != lower.Limits() {
			t.Errorf("name %q, size %d, limits %+v", d.Name(), d.Size(), d.Limits())
		}
		if err := block.Write(d, []byte("hello"), 4995); err != nil {
			t.Fatal(err)
		}
		if got := lower.data[5995:6000]; !bytes.Equal(got, []byte("hello")) {
			t.Errorf("got %q", got)
		}
		got := make([]byte, 5)
		if err := block.Read(d, got, 4995); err != nil || !bytes.Equal(got, []byte("hello")) {
			t.Errorf("got %q, %v", got, err)
		}
		if err := block.Write(d, []byte("hello"), 4996); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("write behind the end: %v", err)
		}
		if err := block.Read(d, got, 4996); !errors.Is(err, syscall.EIO) {
			t.Errorf("read behind the end: %v", err)
		}
		if err := block.Flush(d); err != nil {
			t.Error(err)
		}
		clear(lower.data)
	}
}

func TestReadOnly(t *testing.T) {
	d := dm.NewDevice("x", &window{lower: &ram{data: make([]byte, 512)}, size: 512}, true)
	if !d.Limits().ReadOnly {
		t.Error("the limits do not say it")
	}
	for _, op := range []block.Op{block.OpWrite, block.OpWriteZeroes, block.OpDiscard} {
		if err := block.Do(d, op, 0, 0, 0, nil); !errors.Is(err, syscall.EROFS) {
			t.Errorf("%v: %v", op, err)
		}
	}
	if err := block.Flush(d); err != nil {
		t.Error(err)
	}
}

func TestSuspendKeepsRequests(t *testing.T) {
	lower := fault.New(&ram{data: make([]byte, 512)})
	d := dm.NewDevice("x", &window{lower: lower, size: 512}, false)
	if err := d.Suspend(inTime(t)); err != nil {
		t.Fatal(err)
	}
	if err := d.Suspend(inTime(t)); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("suspended twice: %v", err)
	}
	var calls []*call
	for i := range 5 {
		for queue := range block.Queue(3) {
			calls = append(calls, submit(d, block.OpWrite, queue, int64(queue), []byte{byte(i + 1)}))
		}
	}
	flush := submit(d, block.OpFlush, 0, 0, nil)
	for _, c := range calls {
		c.pending(t, "suspended")
	}
	flush.pending(t, "suspended")
	if lower.Seen(block.OpWrite)+lower.Seen(block.OpFlush) != 0 {
		t.Error("a request went through a suspended device")
	}
	// What does not fit the device needs no device.
	submit(d, block.OpWrite, 0, 512, []byte{1}).want(t, syscall.ENOSPC)
	d.Resume()
	for _, c := range calls {
		c.want(t, nil)
	}
	flush.want(t, nil)
	got := make([]byte, 3)
	if err := block.Read(d, got, 0); err != nil || !bytes.Equal(got, []byte{5, 5, 5}) {
		t.Errorf("kept requests of one queue did not go on in order: got %d, %v", got, err)
	}
	d.Resume() // has no effect
	submit(d, block.OpWrite, 0, 0, []byte{1}).want(t, nil)
}

func TestSuspendWaits(t *testing.T) {
	lower := fault.New(&ram{data: make([]byte, 512)})
	d := dm.NewDevice("x", &window{lower: lower, size: 512}, false)
	lower.Hold(func(*block.Request) bool { return true })
	var held []*call
	for i := range 3 {
		held = append(held, submit(d, block.OpWrite, block.Queue(i), int64(i), []byte{1}))
	}
	suspended := make(chan error, 1)
	go func() { suspended <- d.Suspend(inTime(t)) }()
	kept := keptRequest(t, d, lower)
	select {
	case err := <-suspended:
		t.Fatalf("suspended with requests in flight (%v)", err)
	default:
	}
	lower.Release()
	if err := <-suspended; err != nil {
		t.Fatal(err)
	}
	for _, c := range held {
		c.want(t, nil)
	}
	kept.pending(t, "suspended")
	d.Resume()
	kept.want(t, nil)
}

// keptRequest submits requests until the device keeps one, so that its gate is closed. The lower device holds those
// that still got through.
func keptRequest(t *testing.T, d *dm.Device, lower *fault.Device) *call {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); runtime.Gosched() {
		before := lower.Seen(block.OpRead)
		c := submit(d, block.OpRead, 0, 0, make([]byte, 1))
		if lower.Seen(block.OpRead) == before {
			return c
		}
	}
	t.Fatal("the gate was never closed")
	return nil
}

func TestSuspendGivesUp(t *testing.T) {
	lower := fault.New(&ram{data: make([]byte, 512)})
	d := dm.NewDevice("x", &window{lower: lower, size: 512}, false)
	lower.Hold(func(r *block.Request) bool { return r.Op == block.OpWrite })
	stuck := submit(d, block.OpWrite, 3, 0, []byte{1})
	ctx, cancel := context.WithCancel(context.Background())
	suspended := make(chan error, 1)
	go func() { suspended <- d.Suspend(ctx) }()
	kept := keptRequest(t, d, lower)
	cancel()
	if err := <-suspended; !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	// Service is restored, for those that were kept and for new ones, and the next try succeeds.
	kept.want(t, nil)
	submit(d, block.OpRead, 0, 0, make([]byte, 1)).want(t, nil)
	if err := d.Close(ctx); !errors.Is(err, context.Canceled) {
		t.Fatalf("close: got %v", err)
	}
	submit(d, block.OpRead, 0, 0, make([]byte, 1)).want(t, nil)
	lower.Release()
	stuck.want(t, nil)
	if err := d.Suspend(inTime(t)); err != nil {
		t.Fatal(err)
	}
	d.Resume()
}

// TestSuspendIdle suspends an idle device with a context that has ended: there is nothing to wait for.
func TestSuspendIdle(t *testing.T) {
	d := dm.NewDevice("x", &window{lower: &ram{data: make([]byte, 512)}, size: 512}, false)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for range 20 {
		if err := d.Suspend(ctx); err != nil {
			t.Fatal(err)
		}
		d.Resume()
	}
}

// TestSuspendIsNotDisturbed: while one goroutine suspends, Resume does not open the gate for it, and Close does not
// take the target away from the requests that it waits for.
func TestSuspendIsNotDisturbed(t *testing.T) {
	lower := fault.New(&ram{data: make([]byte, 512)})
	d := dm.NewDevice("x", &window{lower: lower, size: 512}, false)
	lower.Hold(func(r *block.Request) bool { return true })
	stuck := submit(d, block.OpWrite, 1, 0, []byte{1})
	suspended := make(chan error, 1)
	go func() { suspended <- d.Suspend(inTime(t)) }()
	kept := keptRequest(t, d, lower)
	d.Resume()
	if err := d.Close(inTime(t)); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("close during a suspend: %v", err)
	}
	kept.pending(t, "suspending")
	lower.Release()
	if err := <-suspended; err != nil {
		t.Fatal(err)
	}
	stuck.want(t, nil)
	kept.pending(t, "suspended")
	if err := d.Close(inTime(t)); err != nil {
		t.Fatal(err)
	}
	kept.want(t, syscall.ESHUTDOWN)
}

func TestClose(t *testing.T) {
	for _, suspendFirst := range []bool{false, true} {
		t.Run(fmt.Sprintf("suspended=%v", suspendFirst), func(t *testing.T) {
			lower := fault.New(&ram{data: make([]byte, 512)})
			d := dm.NewDevice("x", &window{lower: lower, size: 512}, false)
			var kept *call
			if suspendFirst {
				if err := d.Suspend(inTime(t)); err != nil {
					t.Fatal(err)
				}
				kept = submit(d, block.OpRead, 0, 0, make([]byte, 1))
			}
			if err := d.Close(inTime(t)); err != nil {
				t.Fatal(err)
			}
			if kept != nil {
				kept.want(t, syscall.ESHUTDOWN)
			}
			for _, op := range []block.Op{block.OpRead, block.OpWrite} {
				submit(d, op, 0, 0, make([]byte, 1)).want(t, syscall.ESHUTDOWN)
			}
			submit(d, block.OpFlush, 0, 0, nil).want(t, syscall.ESHUTDOWN)
			if n := lower.Seen(block.OpRead) + lower.Seen(block.OpWrite); n != 0 {
				t.Errorf("%d requests went through a closed device", n)
			}
			err := d.Extents(0, 512, func(block.Extent) bool { t.Error("an extent of a closed device"); return true })
			if !errors.Is(err, syscall.ESHUTDOWN) {
				t.Errorf("extents: %v", err)
			}
			if err := d.Close(inTime(t)); err != nil {
				t.Errorf("closed twice: %v", err)
			}
		})
	}
}

func TestExtents(t *testing.T) {
	w := window{lower: &ram{data: make([]byte, 1000)}, size: 1000}
	list := func(d *dm.Device) (found []block.Extent, err error) {
		err = d.Extents(100, 800, func(x block.Extent) bool { found = append(found, x); return true })
		return found, err
	}
	plain := dm.NewDevice("x", &w, false)
	found, err := list(plain)
	if want := (block.Extent{Offset: 100, Length: 800}); err != nil || len(found) != 1 || found[0] != want {
		t.Errorf("got %+v, %v", found, err)
	}

	d := dm.NewDevice("x", &lister{w}, false)
	if err := d.Suspend(inTime(t)); err != nil {
		t.Fatal(err)
	}
	listed := make(chan []block.Extent, 1)
	go func() {
		found, err := list(d)
		if err != nil {
			t.Error(err)
		}
		listed <- found
	}()
	for range 100 {
		runtime.Gosched()
	}
	select {
	case <-listed:
		t.Error("extents of a suspended device")
	default:
	}
	d.Resume()
	found = <-listed
	if len(found) != 2 || found[0].Hole || !found[1].Hole || found[1].Offset != 500 {
		t.Errorf("got %+v", found)
	}
}

// guarded is a target that a suspended device must leave alone: it touches plain memory that the test writes to
// while the device is suspended.
type guarded struct {
	lower  block.Device
	size   int64
	epoch  int          // written only while the device is suspended
	inside atomic.Int64 // requests between Map and completion
	seen   atomic.Int64
}

func (g *guarded) Size() int64          { return g.size }
func (g *guarded) Limits() block.Limits { return g.lower.Limits() }

func (g *guarded) Map(r *block.Request) block.Device {
	g.inside.Add(1)
	g.seen.Add(int64(min(g.epoch, 1)))
	r.Push(g)
	return g.lower
}

func (g *guarded) Complete(r *block.Request, err error) {
	if g.epoch < 0 {
		err = errors.New("the target is gone")
	}
	g.inside.Add(-1)
	r.Complete(err)
}

func (g *guarded) Extents(offset, length int64, yield func(block.Extent) bool) error {
	g.inside.Add(1)
	defer g.inside.Add(-1)
	yield(block.Extent{Offset: offset, Length: length, Hole: g.epoch < 0})
	return nil
}

// TestLoad suspends and resumes a device under load from many goroutines, and closes it at the end.
func TestLoad(t *testing.T) {
	for _, async := range []bool{false, true} {
		t.Run(fmt.Sprintf("async=%v", async), func(t *testing.T) { testLoad(t, async) })
	}
}

func testLoad(t *testing.T, async bool) {
	const (
		submitters = 8
		stripe     = 64
		suspends   = 100
	)
	var lower block.Device = &ram{data: make([]byte, submitters*stripe)}
	if async {
		a := fault.NewAsync(lower, 3, 1)
		defer a.Close()
		lower = a
	}
	g := &guarded{lower: lower, size: lower.Size(), epoch: 1}
	d := dm.NewDevice("x", g, false)
	var users sync.WaitGroup
	var served atomic.Int64
	for i := range submitters {
		users.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(i), 2))
			model := make([]byte, stripe)
			for n := 0; ; n++ {
				err := step(d, rnd, block.Queue(rnd.IntN(9)), int64(i)*stripe, model)
				if errors.Is(err, syscall.ESHUTDOWN) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				served.Add(1)
			}
		})
	}
	users.Go(func() { listForever(t, d) })
	for i := range suspends {
		if err := d.Suspend(inTime(t)); err != nil {
			t.Fatal(err)
		}
		if n := g.inside.Load(); n != 0 {
			t.Errorf("suspended with %d requests in the target", n)
		}
		g.epoch = -1
		runtime.Gosched()
		g.epoch = i + 1
		before := served.Load()
		d.Resume()
		for served.Load() < before+10 {
			runtime.Gosched()
		}
	}
	if err := d.Close(inTime(t)); err != nil {
		t.Fatal(err)
	}
	g.epoch = -1
	users.Wait()
	if g.seen.Load() == 0 {
		t.Error("no request went through")
	}
}

// listForever asks for extents until the device is closed.
func listForever(t *testing.T, d *dm.Device) {
	for {
		err := d.Extents(0, 10, func(x block.Extent) bool {
			if x.Hole {
				t.Error("extents of a suspended device")
			}
			return true
		})
		if err != nil {
			return
		}
		runtime.Gosched()
	}
}

// step does one operation in a stripe that nobody else uses, and keeps its model.
func step(d block.Device, rnd *rand.Rand, queue block.Queue, base int64, model []byte) error {
	offset := rnd.IntN(len(model))
	data := make([]byte, rnd.IntN(len(model)-offset+1))
	op := block.OpRead
	if rnd.IntN(2) == 0 {
		op = block.OpWrite
		for i := range data {
			data[i] = byte(rnd.Uint32())
		}
	}
	c := submit(d, op, queue, base+int64(offset), data)
	select {
	case err := <-c.done:
		if err != nil {
			return err
		}
	case <-time.After(patience):
		return errors.New("a request was lost")
	}
	if op == block.OpWrite {
		copy(model[offset:], data)
	} else if !bytes.Equal(data, model[offset:offset+len(data)]) {
		return fmt.Errorf("read of %d bytes at %d: wrong data", len(data), offset)
	}
	return nil
}

// counterDone counts completions.
type counterDone struct {
	n atomic.Int64
	_ [128]byte // on a cache line of its own
}

func (c *counterDone) Complete(*block.Request, error) { c.n.Add(1) }

func TestAllocations(t *testing.T) {
	d := dm.NewDevice("x", &window{lower: &ram{data: make([]byte, 512)}, size: 512}, false)
	done := new(counterDone)
	r := &block.Request{Op: block.OpWrite, Length: 16, Data: make([]byte, 16)}
	if n := testing.AllocsPerRun(1000, func() {
		r.Push(done)
		d.Submit(r)
	}); n != 0 {
		t.Errorf("%v allocations for each request", n)
	}
}

func BenchmarkSubmit(b *testing.B) {
	d := dm.NewDevice("x", &window{lower: &ram{data: make([]byte, 512)}, size: 512}, false)
	var queues atomic.Uint32
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		done := new(counterDone)
		r := &block.Request{Op: block.OpRead, Queue: block.Queue(queues.Add(1)), Length: 16, Data: make([]byte, 16)}
		for pb.Next() {
			r.Push(done)
			d.Submit(r)
		}
	})
}

// rendezvous is a device whose first write ends when the second comes.
type rendezvous struct {
	ram
	came sync.WaitGroup
}

func (d *rendezvous) Submit(r *block.Request) {
	d.came.Done()
	d.came.Wait()
	r.Complete(nil)
}

// TestKeptByQueue: what was kept of one queue does not wait for what another queue's does in Submit.
func TestKeptByQueue(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(2, runtime.GOMAXPROCS(0)))) // two shards
	lower := &rendezvous{ram: ram{data: make([]byte, 512)}}
	lower.came.Add(2)
	d := dm.NewDevice("x", &window{lower: lower, size: 512}, false)
	do(t, d.Suspend(inTime(t)))
	one, two := submit(d, block.OpWrite, 0, 0, []byte{1}), submit(d, block.OpWrite, 1, 1, []byte{1})
	go d.Resume()
	one.want(t, nil)
	two.want(t, nil)
	do(t, d.Suspend(inTime(t)))
	d.Resume()
}

// TestFlush: a flush past the gate is in flight, though its submitter waits for it no longer.
func TestFlush(t *testing.T) {
	for _, held := range []bool{false, true} {
		lower := fault.New(&ram{data: make([]byte, 512)})
		d := dm.NewDevice("x", &window{lower: lower, size: 512}, false)
		if err := d.Flush(inTime(t)); !errors.Is(err, syscall.EBUSY) {
			t.Errorf("a flush past a gate that is open: %v", err)
		}
		do(t, d.Suspend(inTime(t)))
		do(t, d.Flush(inTime(t)))
		lower.Hold(func(*block.Request) bool { return true })
		ctx, cancel := context.WithCancel(t.Context())
		over := make(chan error, 1)
		go func() { over <- d.Flush(ctx) }()
		for lower.Seen(block.OpFlush) < 2 {
			runtime.Gosched()
		}
		cancel()
		if err := <-over; !errors.Is(err, context.Canceled) {
			t.Fatalf("a flush that does not end: %v", err)
		}
		ctx, cancel = context.WithTimeout(t.Context(), time.Millisecond)
		if held { // the gate stays closed throughout
			if err := d.Hold(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a hold with a flush in flight: %v", err)
			}
		} else {
			d.Resume()
			if err := d.Suspend(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a suspend with a flush in flight: %v", err)
			}
		}
		cancel()
		lower.Release()
		if !held {
			do(t, d.Suspend(inTime(t)))
		}
		do(t, d.Hold(inTime(t)))
		d.Unhold()
		d.Resume()
		do(t, d.Close(inTime(t)))
	}
}
