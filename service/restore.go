package service

import (
	"errors"
	"fmt"
	"strings"
	"syscall"

	"cowherd/api"
)

// Restore brings back what the state file remembers, and attaches the devices of the configuration that are not among
// it. What is lost is said by events and stays in the file, for another try at the next start. An error is about the
// configuration only. Restore is called once, before Serve.
func (d *Daemon) Restore(configured []api.AttachRequest) error {
	for _, r := range configured {
		if err := d.reconcile(r); err != nil {
			return fmt.Errorf("attach %q: %w", r.Name, err)
		}
	}
	for _, saved := range inOrder(d.saved.now().Devices) {
		if err := d.restore(saved); err != nil {
			return err
		}
	}
	for _, r := range configured {
		if _, err := d.names.origin(r.Name); err == nil {
			continue
		}
		if _, err := d.Attach(r); err != nil {
			return err
		}
	}
	return nil
}

// inOrder puts clones of other devices, or of their snapshots, behind these.
func inOrder(devices []savedDevice) []savedDevice {
	var order []savedDevice
	placed := map[string]bool{}
	for left := devices; len(left) > 0; {
		var later []savedDevice
		for _, saved := range left {
			source, named := sourceName(saved.Request.Clone.Source)
			if origin, _, _ := strings.Cut(source, "@"); named && !placed[origin] {
				later = append(later, saved)
				continue
			}
			order = append(order, saved)
			placed[saved.Request.Name] = true
		}
		if len(later) == len(left) { // what they are clones of is not there
			return append(order, later...)
		}
		left = later
	}
	return order
}

// reconcile lets the configuration win over what is remembered of a device, unless that would cost a snapshot.
func (d *Daemon) reconcile(r api.AttachRequest) error {
	known := d.saved.now().device(r.Name)
	if known == nil || known.Request == r {
		return nil
	}
	if known.Request.Clone.Source != "" {
		return api.Errorf(syscall.EEXIST, "the configuration says %s, but the state file %s remembers the name as that of a clone "+
			"on %s: detach that first, without this line of the configuration", r.Device, d.saved.path(), known.Request.Device)
	}
	if known.Request.Device == r.Device {
		return d.saved.change(func(c *content) { c.device(r.Name).Request = r })
	}
	for i := range known.Snapshots {
		if s := &known.Snapshots[i]; s.Request.Persistent {
			return api.Errorf(syscall.EEXIST, "the configuration says %s, but the state file %s remembers the name as that of "+
				"%s, with the persistent snapshot %s: remove that first, without this line of the configuration", r.Device,
				d.saved.path(), known.Request.Device, s.Request.Name)
		}
	}
	return d.saved.change(func(c *content) { c.forget(r.Name) })
}

// restore brings back a device. An error means that the state file cannot be written.
func (d *Daemon) restore(saved savedDevice) error {
	name := saved.Request.Name
	if isVolatile(saved.Request.Device) {
		cause := "it was in memory: what it held ended with the daemon"
		d.bus.publish(api.Event{Type: api.EventDeviceLost, Name: name, Cause: cause})
		for i := range saved.Snapshots {
			d.bus.publish(api.Event{Type: api.EventSnapshotLost, Name: saved.Snapshots[i].Request.Name, Cause: cause})
		}
		return d.saved.change(func(c *content) { c.forget(name) })
	}
	_, err := d.attach(saved)
	if err == nil {
		return nil
	}
	d.bus.publish(api.Event{Type: api.EventDeviceLost, Name: name, Cause: err.Error(), Persistent: true})
	return d.saved.change(func(c *content) { c.device(name).Lost = err.Error() })
}

// isVolatile tells whether what a device holds ends with the daemon.
func isVolatile(device string) bool {
	kind, argument, _ := strings.Cut(device, ":")
	if kind == "null" {
		c, err := parseNull(argument)
		return err == nil && c.MemoryBacked
	}
	return kind == "mem"
}

// restoreSnaps brings back the snapshots of an origin that nobody can write yet, and tells in saved what has become of
// them. The events are for when that is durable. An error means that the origin cannot be used: it is half merged.
func (d *Daemon) restoreSnaps(o *origin, saved *savedDevice) (events []api.Event, err error) {
	var left []savedSnapshot
	for _, s := range saved.Snapshots {
		if s.Phase == phaseMerging {
			if err := d.restoreMerge(o, &s); err != nil {
				return nil, fmt.Errorf("%s cannot be merged any further, and a part of what %s holds is in its store: %w",
					s.Request.Name, o.name, err)
			}
		}
		e, keep := d.restoreSnap(o, &s)
		if keep {
			left = append(left, s)
		}
		if e.Type != "" {
			e.Name = s.Request.Name
			events = append(events, e)
		}
	}
	saved.Snapshots = left
	return events, nil
}

// restoreMerge lets an origin show what it becomes by a merge that was not finished.
func (d *Daemon) restoreMerge(o *origin, saved *savedSnapshot) error {
	s, err := d.reopen(o, saved)
	if err != nil {
		return err
	}
	o.snapsMu.Lock()
	o.snaps[s.name] = s
	o.snapsMu.Unlock()
	return d.changeBoth(d.ending, s, func() error { return d.showMerge(s) })
}

// restoreSnap does what a snapshot's phase asks for, and changes it to what it is then; keep tells whether it stays in
// the state file.
func (d *Daemon) restoreSnap(o *origin, saved *savedSnapshot) (e api.Event, keep bool) {
	switch {
	case saved.Phase == phaseMerging:
		return api.Event{Type: api.EventSnapshotReopened}, true // it is there already
	case !saved.Request.Persistent:
		return api.Event{Type: api.EventSnapshotLost, Cause: "it was transient: it ended with the daemon"}, false
	case saved.Phase == phaseTaking || saved.Phase == phaseRemoving:
		if err := d.destroyStore(saved); err != nil {
			saved.Lost = err.Error()
			return api.Event{Type: api.EventSnapshotLost, Cause: saved.Lost, Persistent: true}, true
		}
		if saved.Phase == phaseTaking {
			return api.Event{}, false // nobody has been told that it was there
		}
		return api.Event{Type: api.EventSnapshotRemoved}, false
	case saved.Phase == phaseLost:
		// Its store may be within reach by now. The cause stays the first one.
		_ = d.destroyStore(saved)
		return api.Event{Type: api.EventSnapshotLost, Cause: saved.Lost, Persistent: true}, true
	}
	s, err := d.reopen(o, saved)
	if err == nil {
		err = o.target.Add(s.target) // it is this origin's, and so there is no error
	}
	if err != nil {
		saved.Phase, saved.Lost = phaseLost, errors.Join(err, d.destroyStore(saved)).Error()
		return api.Event{Type: api.EventSnapshotLost, Cause: saved.Lost, Persistent: true}, true
	}
	o.snapsMu.Lock()
	o.snaps[s.name] = s
	o.snapsMu.Unlock()
	return api.Event{Type: api.EventSnapshotReopened, Cause: causeOf(s.target.Status().Invalid)}, true
}

// reopen opens a persistent snapshot again, whose origin nobody uses yet.
func (d *Daemon) reopen(o *origin, saved *savedSnapshot) (*snap, error) {
	if now := o.target.Size(); now != saved.OriginBytes {
		return nil, fmt.Errorf("its origin has %d bytes, and had %d when it was taken", now, saved.OriginBytes)
	}
	if err := d.names.reserve(); err != nil {
		return nil, err
	}
	s := d.newSnap(o, saved.Request, saved.Since)
	s.made = saved.Made
	err := d.openPersistent(s)
	if err != nil {
		err = fmt.Errorf("store %s: %w", saved.Request.Store, err)
	} else {
		err = s.build(d, s.store)
	}
	if err != nil {
		d.names.unreserve()
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// lostDevice is what is remembered of a device that is lost; nil if it is there, or was never.
func (d *Daemon) lostDevice(name string) *savedDevice {
	if _, err := d.names.origin(name); err == nil {
		return nil
	}
	return d.saved.now().device(name)
}

// onLost works on a device that is lost, while nobody else can.
func (d *Daemon) onLost(name string, work func() error) error {
	o := newOrigin(api.AttachRequest{Name: name}, d.bus)
	if err := d.names.add(o); err != nil {
		return err
	}
	defer d.names.remove(o)
	defer o.unlock()
	defer o.set(gone)
	return work()
}

// forgetDevice forgets a device that is lost, and its snapshots once their stores are invalid.
func (d *Daemon) forgetDevice(name string) error {
	return d.onLost(name, func() error {
		for _, s := range d.saved.now().device(name).Snapshots {
			if err := d.removeLost(s.Request.Name, false); err != nil {
				return fmt.Errorf("remove %q: %w", s.Request.Name, err)
			}
		}
		return d.saved.change(func(c *content) { c.forget(name) })
	})
}

// removeLost forgets a snapshot that is lost when its store has been made invalid, or with force in any case. The
// operations on its origin are the caller's.
func (d *Daemon) removeLost(name string, force bool) error {
	saved := d.saved.now().snapshot(name)
	if saved == nil {
		return api.Errorf(syscall.ENOENT, "there is no such snapshot")
	}
	switch {
	case saved.Phase == phaseMerging && !force:
		return api.Errorf(syscall.EBUSY, "it is half merged: its store %s holds a part of what its origin should",
			saved.Request.Store)
	case saved.Phase == phaseMerging: // the store is left as it is, for who may make something of it
	case saved.Request.Persistent:
		// Should the daemon die here, the next one must not open it.
		err := d.saved.change(func(c *content) { c.snapshot(name).Phase = phaseRemoving })
		if err == nil {
			err = d.destroyStore(saved)
		}
		if err != nil && !force {
			return err
		}
	}
	if err := d.saved.change(func(c *content) { c.forgetSnapshot(name) }); err != nil {
		return err
	}
	d.bus.publish(api.Event{Type: api.EventSnapshotRemoved, Name: name})
	return nil
}
