package service

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"cowherd/api"
)

// RemoveSnapshot drops a snapshot with all that it has copied. EBUSY: it has users; force disconnects them. One that is
// lost is forgotten when its store has been made invalid, or with force in any case.
func (d *Daemon) RemoveSnapshot(ctx context.Context, name string, force bool) error {
	origin, _, err := splitName(name)
	if err != nil {
		return err
	}
	o, err := d.lockOrigin(ctx, origin)
	switch {
	case err == nil:
		defer o.unlock()
		err = d.remove(ctx, o, name, force)
	case d.lostDevice(origin) != nil:
		err = d.onLost(origin, func() error { return d.removeLost(name, force) })
	}
	if err != nil {
		return fmt.Errorf("remove %q: %w", name, err)
	}
	return nil
}

// remove does it for an origin whose operations are the caller's. A crash at any moment leaves the snapshot as it was,
// or one that the next daemon removes: the state file says so before the origin goes on without it.
func (d *Daemon) remove(ctx context.Context, o *origin, name string, force bool) error {
	s := o.snap(name)
	if s == nil {
		return d.removeLost(name, force)
	}
	if s.merge.Load() != nil {
		return api.Errorf(syscall.EBUSY, "it is being merged: its origin needs it until that is done")
	}
	ctx, cancel := context.WithTimeout(ctx, d.config.SuspendTimeout)
	defer cancel()
	if err := d.shut(ctx, &s.entry, force); err != nil {
		return err
	}
	if s.merged.Load() {
		d.endMerged(s)
		return nil
	}
	dropped, err := d.drop(ctx, s)
	if err != nil {
		s.reopen()
		return err
	}
	err = d.discard(s, dropped)
	d.endSnap(s)
	d.bus.publish(api.Event{Type: api.EventSnapshotRemoved, Name: s.name, Cause: causeOf(err)})
	return err
}

// drop takes s out of its origin, and lets the state file say so of a persistent one before.
func (d *Daemon) drop(ctx context.Context, s *snap) (dropped, err error) {
	s.target.Unstall()
	if s.store != nil {
		if err := d.remember(s, phaseRemoving); err != nil {
			return nil, err
		}
	}
	if dropped, err = s.takeOut(ctx, d); err != nil && s.store != nil {
		err = errors.Join(err, d.remember(s, phaseKept))
	}
	return dropped, err
}

// discard closes the store of a snapshot that is out of its origin, and lets the state file forget it. err is what went
// wrong so far: when the store may still be valid the snapshot stays there, as one that is lost.
func (d *Daemon) discard(s *snap, err error) error {
	err = errors.Join(err, s.close())
	if s.made {
		err = errors.Join(err, removeFile(s.request.Store))
	}
	return errors.Join(err, d.forgetSnapshot(s, err))
}

// forgetSnapshot takes a snapshot that is no more out of the state file, unless something is left to be done about its
// store: err.
func (d *Daemon) forgetSnapshot(s *snap, err error) error {
	if d.saved.now().snapshot(s.name) == nil {
		return nil
	}
	return d.saved.change(func(c *content) {
		if known := c.snapshot(s.name); err != nil && s.store != nil && known != nil {
			known.Phase, known.Lost = phaseRemoving, err.Error()
			return
		}
		c.forgetSnapshot(s.name)
	})
}

// endSnap gives the name of a closed snapshot up.
func (d *Daemon) endSnap(s *snap) {
	s.set(gone)
	s.origin.snapsMu.Lock()
	delete(s.origin.snaps, s.name)
	s.origin.snapsMu.Unlock()
	d.exports.server.ForgetTotals(s.name)
	d.names.unreserve()
}

// takeOut takes s out of its origin and, before that goes on, makes its store invalid: dropped tells whether that has
// failed. After an error s runs as before.
func (s *snap) takeOut(ctx context.Context, d *Daemon) (dropped, err error) {
	if err := s.device.Suspend(ctx); err != nil {
		return nil, err
	}
	_, err = d.change(ctx, s.origin, func() error {
		s.origin.target.Remove(s.target)
		dropped = s.target.Drop()
		return nil
	})
	if err != nil {
		s.device.Resume()
		return nil, err
	}
	return dropped, s.device.Close(ctx)
}

// abandon undoes a snapshot that is in no origin and that nobody has been told of. A store that was there before stays
// as it is.
func (d *Daemon) abandon(s *snap) error {
	var err error
	if s.store != nil && !s.request.Reopen {
		err = s.store.Invalidate()
	}
	return d.discard(s, err)
}
