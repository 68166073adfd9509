package dm

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"

	"cowherd/block"
	"cowherd/internal/percpu"
	"cowherd/target"
)

// A Target is what a mapped device is made of; see package target.
type Target = target.Target

// Device is a mapped device: a name and a live target behind a gate that can be closed.
//
//	Submit(r):  inflight[queue]++
//	            gate closed?  inflight[queue]--, r is kept until Resume
//	            target.Map(r), and what follows
//	r is done:  inflight[queue]--; gate closed and nothing left in flight: Suspend goes on
//
// The counters are per queue and the gate is a word that is only read, so requests on different queues share no
// cache line that is written. Who enters counts itself first and looks at the gate then; Suspend closes the gate first
// and sums the counters then: one of the two sees the other.
//
// Invariants:
//
//  1. While a Device is suspended no request is between Submit and its completion in the target.
//  2. No request is lost: what Submit kept is submitted by Resume, or failed with ESHUTDOWN when the device is closed.
type Device struct {
	// What every request looks at lies together, in one cache line: a copy of a few KiB later none of it is in the
	// innermost cache any more.
	inflight percpu.Shards[counter]
	live     atomic.Pointer[live]
	size     int64
	mask     int64       // logical block - 1
	readOnly bool        // writes are refused
	closed   atomic.Bool // the gate

	name   string
	limits block.Limits

	mu sync.Mutex
	// Requests that came while the gate was closed.
	kept block.List // +checklocks:mu
	// Closed when nothing is in flight; not nil while Suspend waits for that.
	drained chan struct{} // +checklocks:mu
	// Closed when the gate is opened; not nil while it is closed.
	reopened chan struct{} // +checklocks:mu
}

type counter struct{ n atomic.Int64 }

// live is a target with its optional powers.
type live struct {
	target   Target
	extents  block.ExtentLister // nil: it has none
	remapper target.Remapper    // nil: it is none
}

// NewDevice makes a running device of one target. readOnly makes every write fail with EROFS.
func NewDevice(name string, target Target, readOnly bool) *Device {
	d := &Device{name: name, size: target.Size(), limits: target.Limits(), inflight: percpu.New[counter]()}
	d.limits.ReadOnly = d.limits.ReadOnly || readOnly
	d.mask, d.readOnly = int64(d.limits.LogicalBlock)-1, d.limits.ReadOnly
	d.setTarget(target)
	return d
}

func (d *Device) setTarget(t Target) {
	t = unwrap(t)
	l := &live{target: t}
	l.extents, _ = t.(block.ExtentLister)
	l.remapper, _ = t.(target.Remapper)
	d.live.Store(l)
}

// Name is the device's name.
func (d *Device) Name() string { return d.name }

// Size is the target's, in bytes.
func (d *Device) Size() int64 { return d.size }

// Limits are the target's.
func (d *Device) Limits() block.Limits { return d.limits }

// Submit checks r and maps it. While the device is suspended it keeps r for later.
func (d *Device) Submit(r *block.Request) {
	if !d.isPlain(r) {
		if err := block.CheckRange(r, d.size, d.limits); err != nil {
			r.Complete(err)
			return
		}
	}
	in := d.inflight.At(uint(r.Queue))
	in.n.Add(1)
	if d.closed.Load() {
		d.leave(in)
		d.keep(r)
		return
	}
	l := d.live.Load()
	if l == nil {
		d.leave(in)
		r.Complete(d.gone(r))
		return
	}
	r.Push((*gate)(d))
	if to := l.target.Map(r); to != nil {
		to.Submit(r)
	}
}

// isPlain tells whether r is a read or a write in which CheckRange would find nothing wrong.
func (d *Device) isPlain(r *block.Request) bool {
	return r.Op <= block.OpWrite && (r.Op == block.OpRead || !d.readOnly) && int64(len(r.Data)) == r.Length &&
		(r.Offset|r.Length)&d.mask == 0 && r.Offset >= 0 && r.Offset <= d.size-r.Length
}

// gate is the Device as the Completer of what went through it.
type gate Device

func (g *gate) Complete(r *block.Request, err error) {
	d := (*Device)(g)
	// Counted off before the submitter is told: what it does then, it may do for as long as it likes.
	d.leave(d.inflight.At(uint(r.Queue)))
	r.Complete(err)
}

// leave counts a request off.
func (d *Device) leave(in *counter) {
	in.n.Add(-1)
	if d.closed.Load() {
		d.mu.Lock()
		d.checkDrainedLocked()
		d.mu.Unlock()
	}
}

// checkDrainedLocked lets Suspend go on when nothing is in flight.
// +checklocks:d.mu
func (d *Device) checkDrainedLocked() {
	if d.drained == nil {
		return
	}
	var n int64
	for i := range d.inflight.Len() {
		n += d.inflight.Index(i).n.Load()
	}
	if n == 0 {
		close(d.drained)
		d.drained = nil
	}
}

// keep holds r back until Resume; if that was quicker, r goes in at once.
func (d *Device) keep(r *block.Request) {
	d.mu.Lock()
	if d.closed.Load() {
		d.kept.PushBack(r)
		d.mu.Unlock()
		return
	}
	d.mu.Unlock()
	d.Submit(r)
}

func (d *Device) gone(r *block.Request) error {
	return &block.Error{
		Op: r.Op, Offset: r.Offset, Length: r.Length, Errno: syscall.ESHUTDOWN,
		Err: fmt.Errorf("device %q was removed", d.name),
	}
}

// Suspend closes the gate and waits until nothing is in flight. New requests wait until Resume. If ctx ends first the
// gate is opened again and the error is ctx's. A device that is suspended, or is being suspended, gives EBUSY.
func (d *Device) Suspend(ctx context.Context) error {
	d.mu.Lock()
	if d.closed.Load() {
		d.mu.Unlock()
		return fmt.Errorf("suspend %q: already suspended: %w", d.name, syscall.EBUSY)
	}
	drained := make(chan struct{})
	d.drained, d.reopened = drained, make(chan struct{})
	d.closed.Store(true)
	d.checkDrainedLocked()
	d.mu.Unlock()
	select {
	case <-drained:
		return nil
	case <-ctx.Done():
	}
	d.mu.Lock()
	if d.drained == nil { // the last request ended at the same moment
		d.mu.Unlock()
		return nil
	}
	d.drained = nil
	kept := d.openLocked()
	d.mu.Unlock()
	d.submitAll(kept)
	return fmt.Errorf("suspend %q: requests in flight do not end: %w", d.name, ctx.Err())
}

// Resume opens the gate and submits what waited. It does nothing unless a Suspend has succeeded before.
func (d *Device) Resume() {
	d.mu.Lock()
	var kept block.List
	if d.suspendedLocked() {
		kept = d.openLocked()
	}
	d.mu.Unlock()
	d.submitAll(kept)
}

// SetTarget gives a suspended device another target, which takes the requests that come from Resume on; the old one
// stays the caller's. The device's size and limits are what its users have been told, and stay: a target of another
// size, or one that does not take all that these limits let in, is EINVAL. EBUSY: the device is not suspended.
func (d *Device) SetTarget(target Target) error {
	if err := d.checkFit(target); err != nil {
		return fmt.Errorf("new target of %q: %w", d.name, err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.suspendedLocked() {
		return fmt.Errorf("new target of %q: the device is not suspended: %w", d.name, syscall.EBUSY)
	}
	d.setTarget(target)
	return nil
}

// checkFit tells whether target takes all that the device's users may send.
func (d *Device) checkFit(target Target) error {
	if size := target.Size(); size != d.size {
		return fmt.Errorf("it has %d bytes, the device %d: %w", size, d.size, syscall.EINVAL)
	}
	l := target.Limits()
	for _, x := range []struct {
		what string
		fits bool
	}{
		{"its logical block is larger", l.LogicalBlock <= d.limits.LogicalBlock},
		{"it is read-only", d.limits.ReadOnly || !l.ReadOnly},
		{"its discards are smaller", l.DiscardMax >= d.limits.DiscardMax},
		{"its writes of zeroes are smaller", l.WriteZeroesMax >= d.limits.WriteZeroesMax},
		{"it needs flushes, which users were told to leave out", d.limits.NeedsFlush || !l.NeedsFlush},
	} {
		if !x.fits {
			return fmt.Errorf("%s: %w", x.what, syscall.EINVAL)
		}
	}
	return nil
}

// suspendedLocked tells whether a Suspend has succeeded, and no Resume since.
// +checklocks:d.mu
func (d *Device) suspendedLocked() bool { return d.closed.Load() && d.drained == nil }

// openLocked opens the gate. What was kept is the caller's to submit.
// +checklocks:d.mu
func (d *Device) openLocked() block.List {
	close(d.reopened)
	d.reopened = nil
	d.closed.Store(false)
	return d.kept.Take()
}

func (d *Device) submitAll(l block.List) {
	for r := l.PopFront(); r != nil; r = l.PopFront() {
		d.Submit(r)
	}
}

// Close removes the device: requests in flight are waited for, those kept and all later ones fail with ESHUTDOWN. A
// suspended device may be closed; one that is just being suspended gives EBUSY. If ctx ends first nothing has changed.
// The target stays the caller's.
func (d *Device) Close(ctx context.Context) error {
	for {
		d.mu.Lock()
		if d.suspendedLocked() {
			d.live.Store(nil)
			kept := d.openLocked()
			d.mu.Unlock()
			d.submitAll(kept)
			return nil
		}
		d.mu.Unlock()
		if err := d.Suspend(ctx); err != nil {
			return err
		}
	}
}

// Remap tells where the target leaves the bytes at offset, and counts the caller as a request in flight until Release,
// so that Suspend waits for what is done there (block.Remapper). It does not know what is done: who writes looks at
// Limits first. Not ok: the range is not within the device, the device is suspended or removed, or its target does more
// than remap.
func (d *Device) Remap(q block.Queue, offset, length int64) (to block.Device, at, n int64, ok bool) {
	in := d.inflight.At(uint(q))
	in.n.Add(1)
	if !d.closed.Load() && offset >= 0 && length > 0 && offset <= d.size-length {
		if l := d.live.Load(); l != nil && l.remapper != nil {
			if to, at, n, ok = l.remapper.Remap(offset, length); ok {
				return to, at, n, true
			}
		}
	}
	d.leave(in)
	return nil, 0, 0, false
}

// Release ends what one successful Remap on q began.
func (d *Device) Release(q block.Queue) { d.leave(d.inflight.At(uint(q))) }

// Extents are the target's; everything is data if it does not know. It waits while the device is suspended.
func (d *Device) Extents(offset, length int64, yield func(block.Extent) bool) error {
	in := d.inflight.At(0)
	for {
		in.n.Add(1)
		if !d.closed.Load() {
			break
		}
		d.leave(in)
		d.waitReopened()
	}
	defer d.leave(in)
	l := d.live.Load()
	if l == nil {
		return fmt.Errorf("device %q was removed: %w", d.name, syscall.ESHUTDOWN)
	}
	if l.extents == nil {
		yield(block.Extent{Offset: offset, Length: length})
		return nil
	}
	return l.extents.Extents(offset, length, yield)
}

func (d *Device) waitReopened() {
	d.mu.Lock()
	reopened := d.reopened
	d.mu.Unlock()
	if reopened != nil {
		<-reopened
	}
}
