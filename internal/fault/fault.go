// Package fault puts a device under a test's control: requests can be held back, made to fail, or completed late and
// out of order by other goroutines. Errors are injected above the lower device, holding too, so that what the lower
// device holds is what would be on a disk.
//
// A Recorder records what reaches several disks, and its Replay gives what they hold after a crash at any moment.
//
// Lock order: all are leaves: Device.mu, Async.mu, Recorder.mu, Image.mu.
package fault

import (
	"math/rand/v2"
	"sync"

	"cowherd/block"
)

// Device passes requests on to another device unless its rules say otherwise. Safe for concurrent use.
type Device struct {
	lower block.Device
	cond  *sync.Cond // +checklocksignore: set once

	mu   sync.Mutex
	hold func(*block.Request) bool  // +checklocks:mu
	fail func(*block.Request) error // +checklocks:mu
	held []*block.Request           // +checklocks:mu
	seen map[block.Op]int           // +checklocks:mu
}

// New is a Device over lower without any rule.
func New(lower block.Device) *Device {
	d := &Device{lower: lower, seen: make(map[block.Op]int)}
	d.cond = sync.NewCond(&d.mu)
	return d
}

// Size is the lower device's.
func (d *Device) Size() int64 { return d.lower.Size() }

// Limits are the lower device's.
func (d *Device) Limits() block.Limits { return d.lower.Limits() }

// Extents are the lower device's.
func (d *Device) Extents(offset, length int64, yield func(block.Extent) bool) error {
	if l, ok := d.lower.(block.ExtentLister); ok {
		return l.Extents(offset, length, yield)
	}
	yield(block.Extent{Offset: offset, Length: length})
	return nil
}

// Hold keeps back, from now on, every request for which match is true; nil: none. Held ones stay held.
func (d *Device) Hold(match func(*block.Request) bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.hold = match
}

// Fail makes every request fail, from now on, for which match gives an error; nil: none.
func (d *Device) Fail(match func(*block.Request) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fail = match
}

// Seen is the number of requests of this kind that were submitted so far.
func (d *Device) Seen(op block.Op) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.seen[op]
}

// WaitHeld waits until at least n requests are held.
func (d *Device) WaitHeld(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for len(d.held) < n {
		d.cond.Wait()
	}
}

// Release lets the held requests go on, oldest first, and holds no more.
func (d *Device) Release() {
	d.mu.Lock()
	held := d.held
	d.held, d.hold = nil, nil
	d.mu.Unlock()
	for _, r := range held {
		d.lower.Submit(r)
	}
}

// Submit holds r, fails it, or passes it on.
func (d *Device) Submit(r *block.Request) {
	d.mu.Lock()
	d.seen[r.Op]++
	if d.hold != nil && d.hold(r) {
		d.held = append(d.held, r)
		d.cond.Broadcast()
		d.mu.Unlock()
		return
	}
	var err error
	if d.fail != nil {
		err = d.fail(r)
	}
	d.mu.Unlock()
	if err != nil {
		r.Complete(block.WrapError(r, err))
		return
	}
	d.lower.Submit(r)
}

// Async passes requests on from goroutines of its own, in random order, so that completions come late, out of order
// and from elsewhere, as a disk's do.
type Async struct {
	lower block.Device
	wg    sync.WaitGroup

	mu     sync.Mutex
	cond   *sync.Cond
	rand   *rand.Rand       // +checklocks:mu
	queued []*block.Request // +checklocks:mu
	closed bool             // +checklocks:mu
}

// NewAsync is an Async over lower with the given number of goroutines, which Close stops.
func NewAsync(lower block.Device, workers int, seed uint64) *Async {
	a := &Async{lower: lower, rand: rand.New(rand.NewPCG(seed, 0))}
	a.cond = sync.NewCond(&a.mu)
	for range workers {
		a.wg.Go(a.work)
	}
	return a
}

// Size is the lower device's.
func (a *Async) Size() int64 { return a.lower.Size() }

// Limits are the lower device's.
func (a *Async) Limits() block.Limits { return a.lower.Limits() }

// Submit queues r.
func (a *Async) Submit(r *block.Request) {
	a.mu.Lock()
	a.queued = append(a.queued, r)
	a.mu.Unlock()
	a.cond.Signal()
}

func (a *Async) work() {
	for {
		a.mu.Lock()
		for len(a.queued) == 0 && !a.closed {
			a.cond.Wait()
		}
		if len(a.queued) == 0 {
			a.mu.Unlock()
			return
		}
		i, last := a.rand.IntN(len(a.queued)), len(a.queued)-1
		r := a.queued[i]
		a.queued[i] = a.queued[last]
		a.queued = a.queued[:last]
		a.mu.Unlock()
		a.lower.Submit(r)
	}
}

// Close waits for what is queued and stops the goroutines.
func (a *Async) Close() {
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.cond.Broadcast()
	a.wg.Wait()
}
