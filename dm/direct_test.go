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

// TestDirect: linear devices over each other, each of which is suspended, held, given another target and resumed in
// random order. While any of them is still, nothing that comes from above reaches the device below; every byte is where it
// belongs; nothing is lost.
func TestDirect(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	const size = 256 << 10
	lower := fault.New(memory(t, 1<<20))
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
		seen := lower.Seen(block.OpRead) + lower.Seen(block.OpWrite)
		for range 20 {
			runtime.Gosched()
		}
		if now := lower.Seen(block.OpRead) + lower.Seen(block.OpWrite); now != seen {
			t.Errorf("%d requests went through a device that is still", now-seen)
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
