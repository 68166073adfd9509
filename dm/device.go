package dm

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"cowherd/block"
	"cowherd/internal/percpu"
	"cowherd/target"
	"cowherd/trace"
)

// A Target is what a mapped device is made of; see package target.
type Target = target.Target

// Device is a mapped device: a name and a live target behind a gate that can be closed.
//
//	Submit(r):  inflight[queue]++
//	            gate closed?  inflight[queue]--, r is kept until the gate is opened
//	            target.Map(r), and what follows
//	r is done:  inflight[queue]--; gate closed and nothing left in flight: who closed it goes on
//
// The counters are per queue and the gate is a word that is only read, so requests on different queues share no
// cache line that is written. Who enters counts itself first and looks at the gate then; who closes it does that first
// and sums the counters then: one of the two sees the other.
//
// The gate may be closed for several reasons at a time: because the device is suspended, and by any number of Holds.
//
// Invariants:
//
//  1. While the gate is closed, and whoever closed it has been told so, no request is between Submit and its completion
//     in the target.
//  2. No request is lost: what Submit kept is submitted when the gate is opened, in the order of each queue, or failed
//     with ESHUTDOWN when the device is closed.
type Device struct {
	// What every request looks at lies together, in one cache line: a copy of a few KiB later none of it is in the
	// innermost cache any more.
	inflight percpu.Shards[counter]
	live     atomic.Pointer[live] // never nil
	closed   atomic.Bool          // the gate

	// ways is held while the device finds its way past the gates below: before the mutex of any device.
	ways sync.Mutex
	// Somebody waits until nothing is past the gates below: see direct.go, also for what follows.
	undirecting atomic.Bool

	name atomic.Pointer[string]

	mu sync.Mutex
	// Requests that came while the gate was closed.
	kept block.List // +checklocks:mu
	// Why the gate is closed: how many reasons there are. 0: it is open.
	reasons int // +checklocks:mu
	// Closed when nothing is in flight (quiet); nil while the gate is open.
	drained chan struct{} // +checklocks:mu
	quiet   bool          // +checklocks:mu
	// Closed when the gate is opened; nil while it is open.
	reopened chan struct{} // +checklocks:mu
	// One of the reasons is that the device is suspended, or is being suspended.
	suspension suspension // +checklocks:mu
	// Requests that come while the gate is closed fail.
	refusing bool // +checklocks:mu
	// Closed when nothing is past the gates below; nil while nobody waits for that.
	undirected chan struct{} // +checklocks:mu
	// Counts what makes a redirect that is under way worthless.
	turn uint64 // +checklocks:mu
	// Devices above that go past this gate, or would; and the gates on the way of this one.
	riders map[*Device]struct{} // +checklocks:mu
	gates  []*Device            // +checklocks:mu
	// Who is told of the requests; nil: nobody. The live target knows it as well.
	tracer *trace.Tracer // +checklocks:mu
}

// counter counts requests in flight: those that are in the target, and those past the gates below (direct.go).
type counter struct {
	n      atomic.Int64
	direct atomic.Int64
}

// suspension is how far a Suspend is.
type suspension uint8

const (
	running suspension = iota
	suspending
	suspended
)

// live is a target with its optional powers, and what users of the device have been told. It does not change.
type live struct {
	// What a request that goes past the gates looks at lies together.
	size   int64
	mask   int64    // logical block - 1
	plain  block.Op // the last operation that needs no more than its range checked: OpWrite, or OpRead if writes are refused
	direct direct

	target   Target
	limits   block.Limits
	extents  block.ExtentLister // nil: it has none
	remapper target.Remapper    // nil: it is none
	passer   target.Passer      // nil: it is none
	base     *live              // the same without direct
	tracer   *trace.Tracer      // nil: it is not traced
}

// newLive prepares a target for a device of some limits.
func newLive(t Target, limits block.Limits) *live {
	l := &live{target: unwrap(t), size: t.Size(), limits: limits, mask: int64(limits.LogicalBlock) - 1, plain: block.OpWrite}
	if limits.ReadOnly {
		l.plain = block.OpRead
	}
	l.extents, _ = l.target.(block.ExtentLister)
	l.remapper, _ = l.target.(target.Remapper)
	l.passer, _ = l.target.(target.Passer)
	l.base = l
	return l
}

// NewDevice makes a running device of one target. readOnly makes every write fail with EROFS.
func NewDevice(name string, target Target, readOnly bool) *Device {
	d := &Device{inflight: percpu.New[counter]()}
	d.name.Store(&name)
	d.live.Store(newLive(target, limitsOf(target, readOnly)))
	d.redirect()
	return d
}

// limitsOf are the limits of a device of a target.
func limitsOf(t Target, readOnly bool) block.Limits {
	l := t.Limits()
	l.ReadOnly = l.ReadOnly || readOnly
	return l
}

// Name is the device's name.
func (d *Device) Name() string { return *d.name.Load() }

// rename gives the device another name, for what it says from now on.
func (d *Device) rename(name string) { d.name.Store(&name) }

// Size is the target's, in bytes.
func (d *Device) Size() int64 { return d.live.Load().size }

// Limits are the target's.
func (d *Device) Limits() block.Limits { return d.live.Load().limits }

// Submit checks r and maps it. While the gate is closed it keeps r for later.
//
// The way past the gates (direct.go) is written out here: as a function of its own it took 2 of the 8 ns.
func (d *Device) Submit(r *block.Request) {
	l := d.live.Load()
	if !l.isPlain(r) {
		d.submitGated(r, nil)
		return
	}
	if l.direct.to == nil || l.direct.passer != nil &&
		(r.Op == block.OpRead || !l.direct.sure.Has(r.Offset, r.Length)) && !l.direct.passes(r) {
		d.submitGated(r, l)
		return
	}
	in := d.inflight.At(uint(r.Queue))
	in.direct.Add(1)
	if d.live.Load() != l {
		d.leaveDirect(in)
		d.submitGated(r, l)
		return
	}
	r.Offset += l.direct.shift
	if l.direct.doer == nil {
		r.Push((*directGate)(d))
		l.direct.to.Submit(r)
		return
	}
	err := l.direct.doer.Perform(r)
	d.leaveDirect(in) // before the submitter is told, as in gate.Complete
	r.Complete(err)
}

// submitGated is Submit through the gate and the target. fits is a live target in which check found nothing wrong with r;
// nil: none was looked at.
func (d *Device) submitGated(r *block.Request, fits *live) {
	in := d.inflight.At(uint(r.Queue))
	in.n.Add(1)
	if d.closed.Load() {
		d.leave(in)
		d.keep(r)
		return
	}
	l := d.live.Load()
	if l != fits && !l.isPlain(r) {
		if err := block.CheckRange(r, l.size, l.limits); err != nil {
			d.leave(in)
			r.Complete(err)
			return
		}
	}
	r.Push((*gate)(d))
	if to := l.target.Map(r); to != nil {
		to.Submit(r)
	}
}

// isPlain tells whether r is a read or a write in which check would find nothing wrong.
func (l *live) isPlain(r *block.Request) bool {
	return r.Op <= l.plain && int64(len(r.Data)) == r.Length && (r.Offset|r.Length)&l.mask == 0 && r.Offset >= 0 &&
		r.Offset <= l.size-r.Length
}

// removed is the target of a device that was removed.
type removed struct {
	Target // the last one, for Size and Limits
	name   string
}

// Map fails everything.
func (x removed) Map(r *block.Request) block.Device {
	r.Complete(&block.Error{
		Op: r.Op, Offset: r.Offset, Length: r.Length, Errno: syscall.ESHUTDOWN,
		Err: fmt.Errorf("device %q was removed", x.name),
	})
	return nil
}

// Extents fails as well.
func (x removed) Extents(int64, int64, func(block.Extent) bool) error {
	return fmt.Errorf("device %q was removed: %w", x.name, syscall.ESHUTDOWN)
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

// checkDrainedLocked lets those go on who wait until nothing is in flight, if so it is.
// +checklocks:d.mu
func (d *Device) checkDrainedLocked() {
	if d.reasons == 0 || d.quiet {
		return
	}
	var n int64
	for i := range d.inflight.Len() {
		n += d.inflight.Index(i).n.Load()
	}
	if n == 0 {
		d.quiet = true
		close(d.drained)
	}
}

// keep holds r back until the gate is opened; if that was quicker, r goes in at once. What does not fit the device now
// is not kept.
func (d *Device) keep(r *block.Request) {
	if l := d.live.Load(); !l.isPlain(r) {
		if err := block.CheckRange(r, l.size, l.limits); err != nil {
			r.Complete(err)
			return
		}
	}
	d.mu.Lock()
	closed, refusing := d.closed.Load(), d.refusing
	if closed && !refusing {
		d.traceKept(r)
		d.kept.PushBack(r)
	}
	d.mu.Unlock()
	switch {
	case !closed:
		d.Submit(r)
	case refusing:
		d.refuse(r)
	}
}

// Suspend closes the gate and waits until nothing is in flight. New requests wait until Resume. If ctx ends first the
// gate is opened again and the error is ctx's. A device that is suspended, or is being suspended, gives EBUSY.
func (d *Device) Suspend(ctx context.Context) error {
	d.mu.Lock()
	if d.suspension != running {
		d.mu.Unlock()
		return fmt.Errorf("suspend %q: already suspended: %w", d.Name(), syscall.EBUSY)
	}
	d.suspension = suspending
	d.shutLocked()
	err := d.drainLocked(ctx)
	d.suspension = suspended
	if err == nil {
		d.mu.Unlock()
		return nil
	}
	d.suspension = running
	kept := d.openLocked()
	d.mu.Unlock()
	d.goOn(kept)
	return fmt.Errorf("suspend %q: requests in flight do not end: %w", d.Name(), err)
}

// Hold closes the gate for one more reason and waits until nothing is in flight, whether the device is suspended or
// not. If ctx ends first the reason is none any more, and the error is ctx's.
func (d *Device) Hold(ctx context.Context) error {
	d.mu.Lock()
	d.shutLocked()
	err := d.drainLocked(ctx)
	if err == nil {
		d.mu.Unlock()
		return nil
	}
	kept := d.openLocked()
	d.mu.Unlock()
	d.goOn(kept)
	return fmt.Errorf("hold %q: requests in flight do not end: %w", d.Name(), err)
}

// Unhold ends what one successful Hold began.
func (d *Device) Unhold() {
	d.mu.Lock()
	kept := d.openLocked()
	d.mu.Unlock()
	d.goOn(kept)
}

// shutLocked closes the gate for one more reason.
// +checklocks:d.mu
func (d *Device) shutLocked() {
	if d.reasons++; d.reasons > 1 {
		return
	}
	d.drained, d.reopened, d.quiet = make(chan struct{}), make(chan struct{}), false
	d.closed.Store(true)
	d.checkDrainedLocked()
}

// drainLocked waits, without the lock, until nothing is in flight or ctx ends. The caller is one of the reasons for which
// the gate is closed.
// +checklocks:d.mu
func (d *Device) drainLocked(ctx context.Context) error {
	drained := d.drained
	d.mu.Unlock()
	err := d.dismiss(ctx)
	dismissed := err == nil
	if dismissed {
		select {
		case <-drained:
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	d.mu.Lock()
	if dismissed && d.quiet { // perhaps at the same moment
		return nil
	}
	return err
}

// openLocked takes one reason away and opens the gate if it was the last. What was kept is then the caller's to submit.
// +checklocks:d.mu
func (d *Device) openLocked() (kept block.List) {
	if d.reasons--; d.reasons > 0 {
		return kept
	}
	close(d.reopened)
	d.drained, d.reopened = nil, nil
	d.closed.Store(false)
	return d.kept.Take()
}

// Resume undoes Suspend. It does nothing unless a Suspend has succeeded before.
func (d *Device) Resume() {
	d.mu.Lock()
	var kept block.List
	if d.suspension == suspended {
		d.suspension = running
		kept = d.openLocked()
	}
	d.mu.Unlock()
	d.goOn(kept)
}

// Flush makes durable what a suspended device has written, past its gate. If ctx ends first the error is ctx's, and the
// flush is in flight like a request: the next Suspend waits for it. EBUSY: the device is not suspended.
func (d *Device) Flush(ctx context.Context) error {
	in := d.inflight.At(0)
	d.mu.Lock()
	isSuspended := d.suspension == suspended
	if isSuspended { // so that whoever closes the gate for one more reason, or anew, waits for the flush
		in.n.Add(1)
		if d.quiet {
			d.quiet, d.drained = false, make(chan struct{})
		}
	}
	d.mu.Unlock()
	if !isSuspended {
		return fmt.Errorf("flush %q: the device is not suspended: %w", d.Name(), syscall.EBUSY)
	}
	return flushUntil(ctx, func(r *block.Request) {
		r.Push((*gate)(d))
		if to := d.live.Load().target.Map(r); to != nil {
			to.Submit(r)
		}
	})
}

// Suspended tells whether a Suspend has succeeded, and no Resume since.
func (d *Device) Suspended() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.suspension == suspended
}

// Refuse fails what waits for the gate to be opened, and from here on what comes while it is closed, with ESHUTDOWN.
func (d *Device) Refuse() {
	d.mu.Lock()
	d.refusing = true
	kept := d.kept.Take()
	d.mu.Unlock()
	for r := kept.PopFront(); r != nil; r = kept.PopFront() {
		d.refuse(r)
	}
}

// refuse fails a request.
func (d *Device) refuse(r *block.Request) {
	r.Complete(&block.Error{
		Op: r.Op, Offset: r.Offset, Length: r.Length, Errno: syscall.ESHUTDOWN,
		Err: fmt.Errorf("device %q is suspended, and requests are not kept any more", d.Name()),
	})
}

// SetTarget gives a suspended device another target, which takes the requests that come from Resume on; the old one
// stays the caller's. The device's size and limits are what its users have been told, and stay: a target of another
// size, or one that does not take all that these limits let in, is EINVAL. EBUSY: the device is not suspended.
func (d *Device) SetTarget(target Target) error {
	told := d.live.Load()
	if err := told.checkFit(target); err != nil {
		return fmt.Errorf("new target of %q: %w", d.Name(), err)
	}
	return d.replace(newLive(target, told.limits))
}

// Replace is SetTarget with the size and the limits of the new target. Who has the device open, and was told others,
// has requests fail that do not fit these.
func (d *Device) Replace(target Target, readOnly bool) error {
	return d.replace(newLive(target, limitsOf(target, readOnly)))
}

func (d *Device) replace(l *live) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.suspension != suspended {
		return fmt.Errorf("new target of %q: the device is not suspended: %w", d.Name(), syscall.EBUSY)
	}
	if d.tracer != nil {
		d.live.Load().watch(d.tracer, false)
		l.watch(d.tracer, true)
		l = l.tracedBy(d.tracer)
	}
	d.live.Store(l)
	return nil
}

// checkFit tells whether target takes all that the device's users may send.
func (l *live) checkFit(target Target) error {
	if size := target.Size(); size != l.size {
		return fmt.Errorf("it has %d bytes, the device %d: %w", size, l.size, syscall.EINVAL)
	}
	limits := target.Limits()
	for _, x := range []struct {
		what string
		fits bool
	}{
		{"its logical block is larger", limits.LogicalBlock <= l.limits.LogicalBlock},
		{"it is read-only", l.limits.ReadOnly || !limits.ReadOnly},
		{"its discards are smaller", limits.DiscardMax >= l.limits.DiscardMax},
		{"its writes of zeroes are smaller", limits.WriteZeroesMax >= l.limits.WriteZeroesMax},
		{"it needs flushes, which users were told to leave out", l.limits.NeedsFlush || !limits.NeedsFlush},
	} {
		if !x.fits {
			return fmt.Errorf("%s: %w", x.what, syscall.EINVAL)
		}
	}
	return nil
}

// goOn submits what was kept, once the gate is open. The caller does it, and as many goroutines as there is work for help
// him, each with the requests of one shard of queues at a time, so that no request waits for the copies that one of
// another queue makes. A helper ends when no shard is left. Close need not wait for it: what it has submitted is in flight,
// and waited for as such, and what it has not yet will be refused.
func (d *Device) goOn(kept block.List) {
	d.opened()
	shards := make([]block.List, d.inflight.Len())
	for r := kept.PopFront(); r != nil; r = kept.PopFront() {
		shards[int(r.Queue)%len(shards)].PushBack(r)
	}
	shards = slices.DeleteFunc(shards, func(l block.List) bool { return l.Len() == 0 })
	var taken atomic.Int64
	work := func() {
		for i := taken.Add(1); i <= int64(len(shards)); i = taken.Add(1) {
			d.submitAll(shards[i-1])
		}
	}
	for i := 1; i < len(shards); i++ {
		go work()
	}
	work()
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
		if d.suspension == suspended {
			told := d.live.Load()
			d.live.Store(newLive(removed{told.target, d.Name()}, told.limits))
			d.suspension = running
			kept := d.openLocked()
			d.mu.Unlock()
			d.forgetGates()
			d.opened()
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
	if !d.closed.Load() {
		l := d.live.Load()
		if l.remapper != nil && offset >= 0 && length > 0 && offset <= l.size-length {
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

// Extents are the target's; everything is data if it does not know. It waits while the gate is closed.
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
	switch {
	case offset < 0 || length < 0 || offset > l.size-length: // it has become smaller
		return fmt.Errorf("device %q: extents of %d bytes at %d are beyond its end: %w", d.Name(), length, offset, syscall.EINVAL)
	case l.extents == nil:
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
