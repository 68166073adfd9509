package service

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"cowherd/api"
	"cowherd/block"
	"cowherd/dm"
	"cowherd/target/snapshot"
)

// origin is a device that was attached.
type origin struct {
	entry
	request api.AttachRequest
	backing *backing         // set before the entry is live
	target  *snapshot.Origin // set before the entry is live
	cloned  *cloned          // nil: it is no clone. Set before the entry is live

	// operation holds one message while nobody works on the origin: who takes it out has the origin's operations.
	operation chan struct{}

	snapsMu sync.Mutex
	// +checklocks:snapsMu
	snaps map[string]*snap // by their whole names; they are live or closing
}

// newOrigin makes an origin that is opening, with its operations held by the caller.
func newOrigin(r api.AttachRequest, b *bus) *origin {
	return &origin{
		entry:     entry{name: r.Name, bus: b, since: time.Now().UTC()},
		request:   r,
		operation: make(chan struct{}, 1),
		snaps:     map[string]*snap{},
	}
}

// lock takes the origin's operations. ENOENT: the origin is gone.
func (o *origin) lock(ctx context.Context) error {
	select {
	case <-o.operation:
	case <-ctx.Done():
		return fmt.Errorf("another operation on %q is running: %w", o.name, ctx.Err())
	}
	if o.isGone() {
		o.unlock()
		return noDevice(o.name)
	}
	return nil
}

// unlock gives the operations back.
func (o *origin) unlock() { o.operation <- struct{}{} }

// lockOrigin finds an origin and takes its operations.
func (d *Daemon) lockOrigin(ctx context.Context, name string) (*origin, error) {
	o, err := d.names.origin(name)
	if err != nil {
		return nil, err
	}
	return o, o.lock(ctx)
}

// snap is the snapshot with a whole name; nil if there is none.
func (o *origin) snap(name string) *snap {
	o.snapsMu.Lock()
	defer o.snapsMu.Unlock()
	return o.snaps[name]
}

// allSnaps is the snapshots by name.
func (o *origin) allSnaps() []*snap {
	o.snapsMu.Lock()
	defer o.snapsMu.Unlock()
	return slices.SortedFunc(maps.Values(o.snaps), func(a, b *snap) int { return strings.Compare(a.name, b.name) })
}

// Attach opens a device and makes it live under a name. The name of a device that was lost takes the same device only,
// which then comes back with its snapshots.
func (d *Daemon) Attach(r api.AttachRequest) (api.Device, error) {
	if err := checkName("device", r.Name); err != nil {
		return api.Device{}, err
	}
	r.Clone.Source = d.ownName(r.Clone.Source)
	o, err := d.attach(savedDevice{Request: r, Since: time.Now().UTC()})
	if err != nil {
		return api.Device{}, fmt.Errorf("attach %q: %w", r.Name, err)
	}
	return d.describeOrigin(o), nil
}

// attach does it for what may have been remembered before.
func (d *Daemon) attach(saved savedDevice) (*origin, error) {
	o := newOrigin(saved.Request, d.bus)
	if err := d.names.add(o); err != nil {
		return nil, err
	}
	defer o.unlock()
	err := d.recall(&saved)
	if err == nil {
		err = d.openOrigin(o, &saved)
	}
	if err != nil {
		o.set(gone)
		d.names.remove(o)
		return nil, err
	}
	for _, s := range o.allSnaps() {
		s.set(live)
	}
	o.set(live)
	if s := o.merging(); s != nil && !d.saved.now().snapshot(s.name).Stopped {
		d.startMerge(s)
	}
	return o, nil
}

// recall adds what the state file knows of a device that is to be attached. EEXIST: it knows another one of this name.
func (d *Daemon) recall(saved *savedDevice) error {
	known := d.saved.now().device(saved.Request.Name)
	if known == nil {
		return nil
	}
	if known.Request.Device != saved.Request.Device {
		return api.Errorf(syscall.EEXIST, "the name is that of %s, which is lost: detach it to forget it",
			known.Request.Device)
	}
	if err := sameClone(&known.Request, &saved.Request); err != nil {
		return err
	}
	saved.Since, saved.Snapshots, saved.Cloned = known.Since, slices.Clone(known.Snapshots), known.Cloned
	return nil
}

// sameClone tells whether a device that is lost may come back by another request: as a clone of the same source, with the
// same metadata, or as none. What names them is only the state file: given others, the device would show what was copied
// from the one beside what is read from the other.
func sameClone(was, r *api.AttachRequest) error {
	x, y := &was.Clone, &r.Clone
	switch {
	case (x.Source == "") != (y.Source == ""):
		return api.Errorf(syscall.EEXIST, "the name is that of a device that is lost, and the one is a clone and the other is "+
			"not: detach it to forget it")
	case x.Source != y.Source:
		return api.Errorf(syscall.EEXIST, "the name is that of a clone of %s, which is lost, and not of %s. If that is the same, "+
			"moved, detach %s to forget it, and clone anew: its metadata is gone on with", x.Source, y.Source, r.Name)
	case cmp.Or(x.Metadata, metadataPath(was.Device)) != cmp.Or(y.Metadata, metadataPath(r.Device)):
		return api.Errorf(syscall.EEXIST, "the name is that of a clone with the metadata %s, which is lost: detach %s to forget it",
			cmp.Or(x.Metadata, metadataPath(was.Device)), r.Name)
	}
	return nil
}

// openOrigin opens an origin's device and brings back its snapshots, before anybody can write it. What has become of
// them is durable when it returns.
func (d *Daemon) openOrigin(o *origin, saved *savedDevice) error {
	made, err := d.openBacking(o, saved)
	if err != nil {
		return err
	}
	o.backing, o.since = made, saved.Since
	o.target = snapshot.NewOrigin(made.leaf) // not made, which has none of the leaf's optional powers
	o.device = dm.NewDevice(o.name, o.target, o.request.ReadOnly)
	saved.Lost = ""
	events, err := d.restoreSnaps(o, saved)
	if err == nil {
		err = d.saved.change(func(c *content) { c.put(*saved) })
	}
	if err != nil {
		for _, s := range o.allSnaps() {
			err = errors.Join(err, s.close())
			d.endSnap(s)
		}
		return errors.Join(err, made.close())
	}
	o.bus.publish(api.Event{Type: api.EventDeviceAttached, Name: o.name})
	for _, e := range events {
		o.bus.publish(e)
	}
	return nil
}

// Detach flushes an origin that has no snapshots and no users, and lets go of its device. When flushing or closing
// fails the error says so, and the device is let go of all the same; all other errors change nothing. A device that was
// lost is forgotten with its snapshots.
func (d *Daemon) Detach(ctx context.Context, name string) error {
	if strings.Contains(name, "@") {
		return api.Errorf(syscall.EINVAL, "detach %q: it is a snapshot: remove it", name)
	}
	o, err := d.lockOrigin(ctx, name)
	if err == nil {
		defer o.unlock()
		err = d.detach(ctx, o)
	} else if d.lostDevice(name) != nil {
		err = d.forgetDevice(name)
	}
	if err != nil {
		return fmt.Errorf("detach %q: %w", name, err)
	}
	return nil
}

// detach does it for an origin whose operations are the caller's.
func (d *Daemon) detach(ctx context.Context, o *origin) error {
	if names := d.snapshotNames(o); len(names) > 0 {
		return api.Errorf(syscall.EBUSY, "%s has snapshots: %s", o.name, strings.Join(names, ", "))
	}
	ctx, cancel := context.WithTimeout(ctx, d.config.SuspendTimeout)
	defer cancel()
	if err := d.shut(ctx, &o.entry, false); err != nil {
		return err
	}
	if err := o.device.Close(ctx); err != nil {
		o.reopen()
		return err
	}
	lost := o.flush()
	forgotten := d.saved.change(func(c *content) { c.forget(o.name) })
	return d.finishDetach(o, errors.Join(lost, forgotten))
}

// flush makes durable what was written to an origin whose mapped device is closed.
func (o *origin) flush() error {
	if err := block.Flush(o.backing); err != nil {
		return fmt.Errorf("the device is detached, but what was written last may be lost: %w", err)
	}
	return nil
}

// finishDetach lets go of an origin that nobody uses any more. err is what went wrong so far.
func (d *Daemon) finishDetach(o *origin, err error) error {
	err = errors.Join(err, o.backing.close())
	o.set(gone)
	d.exports.server.ForgetTotals(o.name)
	o.bus.publish(api.Event{Type: api.EventDeviceDetached, Name: o.name, Cause: causeOf(err)})
	d.names.remove(o) // last: who attaches another device of this name does so behind the event
	return err
}

// shut lets nobody use e any more; force disconnects those who do. If it fails e is live as before. A client that has
// just said goodbye may still be counted: it is waited for a moment before e is called busy.
func (d *Daemon) shut(ctx context.Context, e *entry, force bool) error {
	empty, err := e.shut(force)
	if err != nil && waitFor(ctx, empty, d.config.BusyGrace) {
		empty, err = e.shut(force)
	}
	if err != nil || empty == nil {
		return err
	}
	// Each turn cuts off those that have not ended by themselves, and finds those that were still negotiating before.
	for ctx.Err() == nil {
		turn, cancel := context.WithTimeout(ctx, d.config.SuspendTimeout/4)
		err := d.exports.disconnect(turn, e.name)
		cancel()
		if err == nil && waitFor(ctx, empty, d.config.BusyGrace) {
			return nil
		}
	}
	e.reopen()
	return fmt.Errorf("%s: its users do not end: %w", e.name, ctx.Err())
}

// waitFor waits until c is closed, but not for longer than atMost, nor than ctx lasts.
func waitFor(ctx context.Context, c <-chan struct{}, atMost time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, atMost)
	defer cancel()
	select {
	case <-c:
		return true
	case <-ctx.Done():
		return false
	}
}

// snapshotNames are the snapshots of an origin, those that are lost included, by name.
func (d *Daemon) snapshotNames(o *origin) []string {
	var names []string
	for _, s := range o.allSnaps() {
		names = append(names, s.name)
	}
	if saved := d.saved.now().device(o.name); saved != nil {
		for i := range saved.Snapshots {
			if s := &saved.Snapshots[i]; s.Phase == phaseLost {
				names = append(names, s.Request.Name+" (lost)")
			}
		}
	}
	slices.Sort(names)
	return names
}

// causeOf is err's message for an event.
func causeOf(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
