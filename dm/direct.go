package dm

import (
	"context"

	"cowherd/block"
	"cowherd/target"
)

// A device whose target only moves all of it to one range of another device, which may be a mapped one that does the same in
// turn, goes past the target and past the gates between: while all of them are open, its reads and writes are submitted to
// what lies below the last one. Three linear targets then cost one gate instead of three.
//
//	U.redirect    finds out where U's bytes lie, and asks each gate on the way to admit U (a rider)
//	U.Submit      direct[queue]++; is the live target still the one that was looked at? then past the gates
//	              what lies below does it at once: then r is not told of it, direct[queue]-- follows
//	D closes      U.undirect, for each rider U: U goes by the gates from here on; what went past them is waited for
//	D opens       U.redirect, for each U that has asked D before
//
// What is past a gate is what would be in flight behind it, so that a suspend waits for the same requests with and without
// riders. A rider that was let in for one target of D never uses another: a target changes while the gate is closed.
//
// A target that can tell of a request that it would only pass it on (target.Passer: later writes to an origin with
// snapshots) is passed likewise by those of which it says so. What its answer stands on, as the list of an origin's
// snapshots, changes while the gate is closed, and then the live target is another one too: an answer that was given
// before the request was counted still holds when the live target is found to be the same. Nothing rides past such a
// target.
//
// Discards, writes of zeroes and flushes take the way through all targets.

// direct is where a live target's bytes lie, past the gates on the way.
type direct struct {
	to    block.Device    // nil: go by the target and the gates
	shift int64           // from an offset of the device to one of to
	doer  block.Immediate // to, if it does requests at once; else nil
	// passer is asked for each request whether it goes, but for writes that are sure to; nil: all go.
	passer target.Passer
	sure   target.Passage
}

// passes asks the target about a request that is not sure to pass.
func (x *direct) passes(r *block.Request) bool { return x.sure.Asks(r) && x.passer.Passes(r) }

// way is a gate on the way, and the live target that was found behind it.
type way struct {
	device *Device
	live   *live
}

// directGate is the Device as the Completer of what went past the gates below.
type directGate Device

// Complete counts r off.
func (g *directGate) Complete(r *block.Request, err error) {
	d := (*Device)(g)
	d.leaveDirect(d.inflight.At(uint(r.Queue)))
	r.Complete(err)
}

// leaveDirect counts a request off that went past the gates. It is inlined.
func (d *Device) leaveDirect(in *counter) {
	in.direct.Add(-1)
	if d.undirecting.Load() {
		d.checkDirect()
	}
}

// checkDirect is checkDirectLocked.
func (d *Device) checkDirect() {
	d.mu.Lock()
	d.checkDirectLocked()
	d.mu.Unlock()
}

// checkDirectLocked lets those go on who wait until nothing is past the gates.
//
// +checklocks:d.mu
func (d *Device) checkDirectLocked() {
	if d.undirected == nil {
		return
	}
	var n int64
	for i := range d.inflight.Len() {
		n += d.inflight.Index(i).direct.Load()
	}
	if n == 0 {
		close(d.undirected)
		d.undirected = nil
		d.undirecting.Store(false)
	}
}

// undirect makes the device go by the gates. What it returns is closed when nothing is past them any more; nil: nothing
// is.
func (d *Device) undirect() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.undirectLocked()
}

// undirectLocked is undirect.
//
// +checklocks:d.mu
func (d *Device) undirectLocked() <-chan struct{} {
	d.turn++ // a redirect that is under way comes to nothing
	if l := d.live.Load(); l.direct.to != nil {
		d.live.Store(l.base)
	}
	if d.undirected == nil {
		d.undirected = make(chan struct{})
	}
	undirected := d.undirected
	d.undirecting.Store(true)
	d.checkDirectLocked()
	if d.undirected == nil {
		return nil
	}
	return undirected
}

// dismiss makes the device and its riders go by the gates, and waits for what is past them.
func (d *Device) dismiss(ctx context.Context) error {
	d.mu.Lock()
	leaving := []*Device{d}
	for rider := range d.riders {
		leaving = append(leaving, rider)
	}
	d.mu.Unlock()
	for _, x := range leaving {
		if undirected := x.undirect(); undirected != nil {
			select {
			case <-undirected:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	return nil
}

// redirect lets the device go past its target and the gates below, if it can.
func (d *Device) redirect() {
	d.ways.Lock()
	defer d.ways.Unlock()
	d.mu.Lock()
	l, turn := d.live.Load(), d.turn
	ready := d.reasons == 0 && l.direct.to == nil && d.undirected == nil
	d.mu.Unlock()
	if !ready {
		return
	}
	d.forgetGates()
	to, gates := l.resolve()
	if to.to == nil {
		return
	}
	d.mu.Lock()
	for _, g := range gates {
		d.gates = append(d.gates, g.device)
	}
	d.mu.Unlock()
	for _, g := range gates {
		if !g.device.admit(d, g.live) {
			return
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.live.Load() == l && d.turn == turn && d.reasons == 0 {
		past := *l
		past.base, past.direct = l, to
		d.live.Store(&past)
	}
}

// admit makes u a rider, if the gate is open and l is still behind it. u is told in any case when the gate is opened.
func (d *Device) admit(u *Device, l *live) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.riders == nil {
		d.riders = map[*Device]struct{}{}
	}
	d.riders[u] = struct{}{}
	return d.reasons == 0 && d.live.Load().base == l
}

// forgetGates has no gate remember the device any more.
func (d *Device) forgetGates() {
	d.mu.Lock()
	gates := d.gates
	d.gates = nil
	d.mu.Unlock()
	for _, g := range gates {
		g.mu.Lock()
		delete(g.riders, d)
		g.mu.Unlock()
	}
}

// opened lets the device and those above it go past the gates that are open.
func (d *Device) opened() {
	d.redirect()
	d.mu.Lock()
	var riders []*Device
	for rider := range d.riders {
		riders = append(riders, rider)
	}
	d.mu.Unlock()
	for _, rider := range riders {
		rider.redirect()
	}
}

// resolve tells where all bytes of l lie, and which gates are on the way.
func (l *live) resolve() (to direct, gates []way) {
	if l.size == 0 || l.tracer != nil {
		return to, nil
	}
	if l.passer != nil {
		below, sure := l.passer.Passage()
		return direct{to: below, doer: doerOf(below), passer: l.passer, sure: sure}, nil
	}
	if l.remapper == nil {
		return to, nil
	}
	below, at, n, ok := l.remapper.Remap(0, l.size)
	for ok && n == l.size {
		to = direct{to: below, shift: at}
		d, isMapped := below.(*Device)
		if !isMapped {
			to.doer = doerOf(below)
			return to, gates
		}
		x := d.live.Load().base
		if x.remapper == nil || x.tracer != nil || at > x.size-l.size || x.limits.LogicalBlock > l.limits.LogicalBlock ||
			x.plain < l.plain {
			return to, gates
		}
		if below, at, n, ok = x.remapper.Remap(at, l.size); ok && n == l.size {
			gates = append(gates, way{d, x})
		}
	}
	return to, gates
}

// doerOf is d if it does requests at once; else nil.
func doerOf(d block.Device) block.Immediate {
	if doer, ok := d.(block.Immediate); ok && doer.IsImmediate() {
		return doer
	}
	return nil
}
