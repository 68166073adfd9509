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
	"cowherd/dm"
	"cowherd/internal/fault"
	"cowherd/target"
	"cowherd/target/linear"
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
	for { // until its gate is closed
		if _, _, _, ok := one.Remap(0, 0, 512); !ok {
			break
		}
		one.Release(0)
		runtime.Gosched()
	}
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
	for { // until its gate is closed
		if _, _, _, ok := d.Remap(0, 0, 512); !ok {
			break
		}
		d.Release(0)
		runtime.Gosched()
	}
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
