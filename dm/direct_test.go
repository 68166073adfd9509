package dm_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"cowherd/backend/mem"
	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/dm"
	"cowherd/internal/fault"
	"cowherd/kcopyd"
	"cowherd/target"
	"cowherd/target/linear"
	"cowherd/target/snapshot"
	"cowherd/trace"
)

// over makes a linear device over another, all of it from an offset on.
func over(d block.Device, name string, start, size int64) *dm.Device {
	return dm.NewDevice(name, linear.New(target.Lower{Device: d, Name: target.Name("x")}, start, size), false)
}

// prompt is a device in memory that does requests at once, and counts them. Its reads wait while wait is held.
type prompt struct {
	*mem.Device
	wait sync.RWMutex
	seen atomic.Int64
}

func (p *prompt) Submit(r *block.Request) { r.Complete(p.Perform(r)) }

func (p *prompt) Perform(r *block.Request) error {
	p.seen.Add(1)
	if r.Op == block.OpRead {
		p.wait.RLock()
		defer p.wait.RUnlock()
	}
	return p.Device.Perform(r)
}

// newPrompt makes one of size bytes.
func newPrompt(t *testing.T, size int64) *prompt {
	return &prompt{Device: memory(t, size).(*mem.Device)}
}

func TestDirect(t *testing.T) {
	t.Run("waits", func(t *testing.T) {
		lower := fault.New(memory(t, 1<<20))
		testDirect(t, lower, func() int64 { return int64(lower.Seen(block.OpRead) + lower.Seen(block.OpWrite)) })
	})
	t.Run("immediate", func(t *testing.T) {
		lower := newPrompt(t, 1<<20)
		testDirect(t, lower, lower.seen.Load)
	})
}

// testDirect: linear devices over each other, each of which is suspended, held, given another target and resumed in
// random order. While any of them is still, nothing that comes from above reaches the device below; every byte is where it
// belongs; nothing is lost.
func testDirect(t *testing.T, lower block.Device, seen func() int64) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	const size = 256 << 10
	one := over(lower, "one", 4096, size)
	two := over(one, "two", 0, size)
	three := over(two, "three", 0, size)
	devices := []*dm.Device{one, two, three}
	var over atomic.Bool
	var writers sync.WaitGroup
	for w := range int64(3) {
		writers.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(w)))
			model := make([]byte, size/4)
			for !over.Load() {
				offset := rnd.Int64N(int64(len(model))/512) * 512
				p := model[offset:][:512]
				if rnd.IntN(2) == 0 {
					p = bytes.Repeat([]byte{byte(rnd.Uint32())}, 512)
					copy(model[offset:], p)
					if err := block.Write(three, p, w*size/4+offset); err != nil {
						t.Error(err)
					}
					continue
				}
				got := make([]byte, 512)
				if err := block.Read(three, got, w*size/4+offset); err != nil || !bytes.Equal(got, p) {
					t.Errorf("read at %d: %v, or other data", offset, err)
				}
			}
		})
	}
	rnd := rand.New(rand.NewPCG(seed, 99))
	still := func() {
		before := seen()
		for range 20 {
			runtime.Gosched()
		}
		if now := seen(); now != before {
			t.Errorf("%d requests went through a device that is still", now-before)
		}
	}
	for range 400 {
		d := devices[rnd.IntN(3)]
		if rnd.IntN(3) == 0 {
			do(t, d.Hold(inTime(t)))
			still()
			d.Unhold()
			continue
		}
		do(t, d.Suspend(inTime(t)))
		still()
		switch {
		case rnd.IntN(2) == 0:
		case d == one:
			do(t, d.Replace(linear.New(target.Lower{Device: lower}, 4096, size), false))
		case d == two: // at another place of a device of another size, with the bytes that it had
			do(t, one.Suspend(inTime(t)))
			do(t, one.Replace(linear.New(target.Lower{Device: lower}, 0, size+4096), false))
			do(t, two.Replace(linear.New(target.Lower{Device: one}, 4096, size), false))
			one.Resume()
			d.Resume()
			do(t, two.Suspend(inTime(t)))
			do(t, one.Suspend(inTime(t)))
			do(t, one.Replace(linear.New(target.Lower{Device: lower}, 4096, size), false))
			do(t, two.Replace(linear.New(target.Lower{Device: one}, 0, size), false))
			one.Resume()
		}
		d.Resume()
	}
	over.Store(true)
	writers.Wait()
	for _, d := range []*dm.Device{three, two, one} {
		do(t, d.Close(inTime(t)))
		if err := block.Read(three, make([]byte, 512), 0); !errors.Is(err, syscall.ESHUTDOWN) {
			t.Errorf("a device below which one was removed: %v", err)
		}
	}
}

// TestDirectWaits: a device below is suspended when what went past its gate has ended, not before, and what comes then
// waits at its gate.
func TestDirectWaits(t *testing.T) {
	lower := fault.New(memory(t, 1<<20))
	one := over(lower, "one", 0, 8192)
	two := over(one, "two", 0, 8192)
	lower.Hold(func(*block.Request) bool { return true })
	c := submit(two, block.OpWrite, 1, 0, make([]byte, 512))
	suspended := make(chan error, 1)
	go func() { suspended <- one.Suspend(inTime(t)) }()
	awaitClosed(one)
	select {
	case err := <-suspended:
		t.Fatalf("suspended with a request in flight: %v", err)
	default:
	}
	c.pending(t, "held below")
	lower.Release()
	do(t, <-suspended)
	c.want(t, nil)
	kept := submit(two, block.OpWrite, 1, 0, make([]byte, 512))
	kept.pending(t, "suspended below")
	one.Resume()
	kept.want(t, nil)
}

// TestImmediateWaits: a suspend waits for a request that is being done at once; its submitter may then do what he likes.
func TestImmediateWaits(t *testing.T) {
	lower := newPrompt(t, 1<<20)
	d := over(over(lower, "one", 4096, 8192), "two", 0, 8192)
	lower.wait.Lock()
	over := make(chan error, 1)
	r := &block.Request{Op: block.OpRead, Length: 512, Data: make([]byte, 512)}
	r.Push(whenDone(func(err error) {
		do(t, d.Suspend(inTime(t))) // it is not in flight any more
		over <- err
	}))
	go d.Submit(r)
	for lower.seen.Load() == 0 {
		runtime.Gosched()
	}
	held := make(chan error, 1)
	go func() { held <- d.Hold(inTime(t)) }()
	awaitClosed(d)
	select {
	case err := <-held:
		t.Fatalf("held with a request in flight: %v", err)
	default:
	}
	lower.wait.Unlock()
	do(t, <-held)
	do(t, <-over)
	d.Unhold()
	d.Resume()
	if err := block.Read(d, make([]byte, 512), 8192); !errors.Is(err, syscall.EIO) {
		t.Errorf("a read beyond the end: %v", err)
	}
	do(t, d.Close(inTime(t)))
}

// whenDone is a Completer that runs a function.
type whenDone func(error)

func (f whenDone) Complete(_ *block.Request, err error) { f(err) }

// TestPassing: an origin whose snapshots come and go, one of small chunks and sometimes another one of larger ones, while it
// is written and read, mostly where everything has been copied. Each of them shows what the device below held when it was
// taken, for as long as it is there; nothing reaches a device that is still.
func TestPassing(t *testing.T) {
	t.Run("waits", func(t *testing.T) {
		lower := fault.NewAsync(memory(t, passingSize), 2, 1)
		defer lower.Close()
		testPassing(t, lower)
	})
	t.Run("immediate", func(t *testing.T) { testPassing(t, newPrompt(t, passingSize)) })
}

const passingSize = 256 << 10

func testPassing(t *testing.T, lower block.Device) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	origin := snapshot.NewOrigin(lower)
	base := dm.NewDevice("base", origin, false)
	top := over(base, "top", 0, passingSize)
	var over atomic.Bool
	var writers sync.WaitGroup
	for w := range 3 {
		writers.Go(func() {
			writePassing(t, []*dm.Device{base, top, base}[w], rand.New(rand.NewPCG(seed, uint64(w))), w, &over)
		})
	}
	rnd := rand.New(rand.NewPCG(seed, 99))
	var taken []*frozen
	for range 50 {
		do(t, base.Suspend(inTime(t)))
		before := read(t, lower)
		runtime.Gosched()
		switch n := len(taken); {
		case n == 0 || n < 2 && rnd.IntN(3) == 0:
			taken = append(taken, freeze(t, origin, before, cowstore.ChunkSize(4096<<rnd.IntN(3))))
		case rnd.IntN(2) == 0:
			taken[n-1].drop(t, origin)
			taken = taken[:n-1]
		}
		if !bytes.Equal(read(t, lower), before) {
			t.Error("a device was written that is still")
		}
		base.Resume()
		for range rnd.IntN(20) {
			runtime.Gosched()
		}
		for _, x := range taken {
			x.check(t)
		}
	}
	over.Store(true)
	writers.Wait()
	for _, x := range taken {
		x.check(t)
		x.drop(t, origin)
	}
	for _, d := range []*dm.Device{top, base} {
		do(t, d.Close(inTime(t)))
	}
}

// TestPassageVoid: an idle origin that gets another snapshot without being suspended is no danger to it.
func TestPassageVoid(t *testing.T) {
	lower := newPrompt(t, passingSize)
	origin := snapshot.NewOrigin(lower)
	x := freeze(t, origin, read(t, lower), 4096)
	d := dm.NewDevice("d", origin, false) // asks for the passage
	do(t, block.Write(d, bytes.Repeat([]byte{1}, 4096), 0))
	y := freeze(t, origin, read(t, lower), 4096)
	do(t, block.Write(d, bytes.Repeat([]byte{2}, 4096), 0))
	x.check(t)
	y.check(t)
	x.drop(t, origin)
	y.drop(t, origin)
	do(t, d.Close(inTime(t)))
}

// writePassing writes and reads its third of d, most of it in a few places, until over.
func writePassing(t *testing.T, d *dm.Device, rnd *rand.Rand, w int, over *atomic.Bool) {
	first := int64(w) * 20 * 4096
	model := make([]byte, 20*4096)
	do(t, block.Read(d, model, first))
	for !over.Load() {
		at := rnd.Int64N(8) * 512
		if rnd.IntN(8) == 0 {
			at = rnd.Int64N(19*8) * 512
		}
		p := model[at:][:512<<rnd.IntN(4)]
		if rnd.IntN(4) == 0 {
			got := make([]byte, len(p))
			if err := block.Read(d, got, first+at); err != nil || !bytes.Equal(got, p) {
				t.Errorf("read at %d: %v, or other data", first+at, err)
			}
			continue
		}
		for i := range p {
			p[i] = byte(rnd.Uint32())
		}
		if err := block.Write(d, p, first+at); err != nil {
			t.Error(err)
		}
	}
}

// frozen is a snapshot, and what it has to show.
type frozen struct {
	*snapshot.Snapshot
	view   *dm.Device
	engine kcopyd.Engine
	want   []byte
}

// freeze takes a snapshot of a suspended origin, which holds want.
func freeze(t *testing.T, origin *snapshot.Origin, want []byte, chunk cowstore.ChunkSize) *frozen {
	x := &frozen{engine: newEngine(), want: want}
	cow := memory(t, 4*passingSize)
	var err error
	x.Snapshot, err = snapshot.New(snapshot.Config{
		Name: "s", Origin: origin, COW: cow, Store: cowstore.NewTransient(cow.Size(), 0, chunk), ChunkSize: chunk, Engine: x.engine,
	})
	do(t, err)
	do(t, origin.Add(x.Snapshot))
	x.view = dm.NewDevice("view", x.Snapshot, true)
	return x
}

func (x *frozen) check(t *testing.T) {
	t.Helper()
	if got := read(t, x.view); !bytes.Equal(got, x.want) {
		t.Error("a snapshot is not frozen")
	}
}

// drop takes the snapshot out of its suspended, or idle, origin.
func (x *frozen) drop(t *testing.T, origin *snapshot.Origin) {
	do(t, x.view.Close(inTime(t)))
	origin.Remove(x.Snapshot)
	do(t, x.engine.Close())
	do(t, x.Close())
}

// read is all that d holds.
func read(t *testing.T, d block.Device) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	do(t, block.Read(d, p, 0))
	return p
}

// passer is a target that passes on what lies before open, and counts what it is asked to map.
type passer struct {
	target.Target
	below  block.Device
	sure   target.Passage
	open   atomic.Int64
	mapped atomic.Int64
}

func (x *passer) Map(r *block.Request) block.Device {
	x.mapped.Add(1)
	return x.Target.Map(r)
}

func (x *passer) Remap(offset, length int64) (to block.Device, at, n int64, ok bool) {
	return x.below, offset, length, true
}

func (x *passer) Passes(r *block.Request) bool { return r.End() <= x.open.Load() }

func (x *passer) Passage() (below block.Device, sure target.Passage) { return x.below, x.sure }

// TestPasser: what passes is not mapped, nor held up; a suspend waits for it; while a device is traced all of it is mapped.
func TestPasser(t *testing.T) {
	lower := fault.New(memory(t, 1<<20))
	x := &passer{Target: linear.New(target.Lower{Device: lower}, 0, 64<<10), below: lower, sure: target.NoPassage()}
	x.sure.Shift = 12
	x.sure.Pages[0].Store(new(target.PassagePage))
	x.open.Store(8192)
	d := dm.NewDevice("d", x, false)
	defer func() { do(t, d.Close(inTime(t))) }()
	wantMapped := func(op block.Op, offset, length int64, want int64) {
		t.Helper()
		before := x.mapped.Load()
		submit(d, op, 1, offset, make([]byte, length)).want(t, nil)
		if got := x.mapped.Load() - before; got != want {
			t.Errorf("%v of %d bytes at %d: mapped %d times, want %d", op, length, offset, got, want)
		}
	}
	wantMapped(block.OpWrite, 4096, 4096, 0)
	wantMapped(block.OpWrite, 8192, 512, 1)
	x.sure.Pages[0].Load()[0].Store(1<<3 | 1<<5)
	wantMapped(block.OpWrite, 3<<12, 4096, 0)
	wantMapped(block.OpWrite, 3<<12+512, 512, 0)
	wantMapped(block.OpWrite, 3<<12+512, 4096, 1) // of two units
	wantMapped(block.OpWrite, 4<<12, 512, 1)
	wantMapped(block.OpRead, 3<<12, 512, 1) // reads are asked for
	wantMapped(block.OpRead, 0, 512, 0)
	x.sure.Void.Store(true)
	wantMapped(block.OpWrite, 3<<12, 512, 1)
	x.sure.Void.Store(false)
	do(t, d.Trace(inTime(t), trace.New()))
	wantMapped(block.OpWrite, 3<<12, 512, 1)
	do(t, d.Trace(inTime(t), nil))
	wantMapped(block.OpWrite, 3<<12, 512, 0)

	lower.Hold(func(*block.Request) bool { return true })
	c := submit(d, block.OpWrite, 1, 3<<12, make([]byte, 512))
	held := make(chan error, 1)
	go func() { held <- d.Hold(inTime(t)) }()
	awaitClosed(d)
	select {
	case err := <-held:
		t.Fatalf("held with a request in flight: %v", err)
	default:
	}
	c.pending(t, "held below")
	kept := submit(d, block.OpWrite, 1, 5<<12, make([]byte, 512))
	kept.pending(t, "the gate is closed")
	lower.Release()
	do(t, <-held)
	c.want(t, nil)
	d.Unhold()
	kept.want(t, nil)
}

// awaitClosed waits until the gate of d is closed, which somebody is about to do.
func awaitClosed(d *dm.Device) {
	for {
		if _, _, _, ok := d.Remap(0, 0, 512); !ok {
			return
		}
		d.Release(0)
		runtime.Gosched()
	}
}
