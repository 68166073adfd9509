package service

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"cowherd/api"
	"cowherd/target/snapshot"
)

// A merge, from its beginning to its end:
//
//	state file: merging              from here on a daemon that is started goes on with it
//	suspend both devices, take the snapshot out of the origin, let both show the Merge, resume
//	the Merge works                  or is stopped, and goes on
//	it is finished: suspend both devices, let both show the origin, resume
//	state file: removing             the store holds nothing any more
//	make the store invalid, close it, remove it, forget the snapshot
//	the snapshot's device goes when its users have left
//
// A daemon that is started while the state file says "merging" begins with the Merge in its place before anybody can
// open the origin, which is of no use without it: a part of what it should show is on the COW device.

// MergeSnapshot lets the merge of a snapshot into its origin run, or stops it.
func (d *Daemon) MergeSnapshot(ctx context.Context, name string, running bool) (api.Device, error) {
	origin, _, err := splitName(name)
	if err != nil {
		return api.Device{}, err
	}
	o, err := d.lockOrigin(ctx, origin)
	if err == nil {
		defer o.unlock()
		var x api.Device
		if x, err = d.setMerge(ctx, o, name, running); err == nil {
			return x, nil
		}
	}
	return api.Device{}, fmt.Errorf("merge %q: %w", name, err)
}

// setMerge does it for an origin whose operations are the caller's.
func (d *Daemon) setMerge(ctx context.Context, o *origin, name string, running bool) (x api.Device, err error) {
	s := o.snap(name)
	switch {
	case s == nil:
		return x, api.Errorf(syscall.ENOENT, "there is no such snapshot")
	case s.merged.Load():
		return x, api.Errorf(syscall.EBUSY, "it has been merged, and waits for its users to leave")
	case s.merge.Load() == nil && !running:
		return x, api.Errorf(syscall.EINVAL, "it is not being merged")
	case s.merge.Load() == nil:
		err = d.beginMerge(ctx, s)
	case running:
		err = d.resumeMerge(s)
	default:
		err = d.stopMerge(s)
	}
	if err != nil {
		return x, err
	}
	return d.describeSnap(s), nil
}

// merging is the snapshot that is being merged; nil: there is none.
func (o *origin) merging() *snap {
	for _, s := range o.allSnaps() {
		if s.merge.Load() != nil {
			return s
		}
	}
	return nil
}

// beginMerge lets s and its origin show what the one becomes, and starts the work. If it fails nothing has changed.
func (d *Daemon) beginMerge(ctx context.Context, s *snap) error {
	if s.store == nil {
		return api.Errorf(syscall.EINVAL, "it is transient: only persistent snapshots can be merged")
	}
	if cause := s.target.Status().Invalid; cause != nil {
		return api.Errorf(syscall.EINVAL, "it is invalid: %v", cause)
	}
	if other := s.origin.merging(); other != nil {
		return api.Errorf(syscall.EBUSY, "%s is being merged", other.name)
	}
	if err := d.remember(s, phaseMerging); err != nil {
		return err
	}
	err := d.changeBoth(ctx, s, func() error {
		s.origin.target.Remove(s.target)
		err := d.showMerge(s)
		if err != nil {
			err = errors.Join(err, s.origin.target.Add(s.target))
		}
		return err
	})
	if err != nil {
		return errors.Join(err, d.remember(s, phaseKept))
	}
	d.startMerge(s)
	return nil
}

// showMerge makes a Merge of s, which is in no origin, and lets both devices, which are suspended, show it.
func (d *Daemon) showMerge(s *snap) error {
	m, err := snapshot.NewMerge(s.target, snapshot.MergeConfig{
		Failed: func(cause error) {
			d.bus.publish(api.Event{Type: api.EventMergeFailed, Name: s.name, Cause: cause.Error()})
		},
		Finished: func() { d.tasks.Go(func() { d.finishMerge(s) }) },
	})
	if err != nil {
		return err
	}
	if err := s.origin.device.SetTarget(m); err != nil {
		return err
	}
	if err := s.device.SetTarget(m); err != nil {
		return errors.Join(err, s.origin.device.SetTarget(s.origin.target))
	}
	s.merge.Store(m)
	return nil
}

// changeBoth runs what while s and its origin are suspended.
func (d *Daemon) changeBoth(ctx context.Context, s *snap, what func() error) error {
	ctx, cancel := context.WithTimeout(ctx, d.config.SuspendTimeout)
	defer cancel()
	if err := s.device.Suspend(ctx); err != nil {
		return err
	}
	defer s.device.Resume()
	_, err := d.change(ctx, s.origin, what)
	return err
}

// startMerge lets the work begin or go on.
func (d *Daemon) startMerge(s *snap) {
	d.bus.publish(api.Event{Type: api.EventMergeStarted, Name: s.name})
	s.merge.Load().Start()
}

// resumeMerge lets a merge go on that was stopped, or has failed.
func (d *Daemon) resumeMerge(s *snap) error {
	m := s.merge.Load()
	if m.Running() {
		return nil
	}
	if err := d.rememberStopped(s, false); err != nil {
		return err
	}
	if m.Finished() { // all but its end, which has failed
		d.tasks.Go(func() { d.finishMerge(s) })
		return nil
	}
	d.startMerge(s)
	return nil
}

// stopMerge stops a merge, and returns when it has.
func (d *Daemon) stopMerge(s *snap) error {
	if err := d.rememberStopped(s, true); err != nil {
		return err
	}
	m := s.merge.Load()
	ran := m.Running()
	if m.Stop(); ran && !m.Finished() {
		d.bus.publish(api.Event{Type: api.EventMergeStopped, Name: s.name})
	}
	return nil
}

// rememberStopped notes whether the next daemon is to go on with a merge by itself.
func (d *Daemon) rememberStopped(s *snap, stopped bool) error {
	return d.saved.change(func(c *content) {
		if known := c.snapshot(s.name); known != nil {
			known.Stopped = stopped
		}
	})
}

// finishMerge does what is left to be done when everything is on the origin.
func (d *Daemon) finishMerge(s *snap) {
	if err := s.origin.lock(d.ending); err != nil {
		return // the daemon stops; the next one comes here again
	}
	defer s.origin.unlock()
	m := s.merge.Load()
	if m == nil {
		return // somebody else was quicker
	}
	m.Stop() // its last batch has told that it is finished, and ends
	disconnect, err := d.showOrigin(s)
	if err == nil {
		err = d.remember(s, phaseRemoving)
	}
	if err != nil {
		if d.ending.Err() == nil { // else it was given up because the daemon stops
			d.bus.publish(api.Event{Type: api.EventMergeFailed, Name: s.name, Cause: err.Error()})
		}
		return
	}
	s.merged.Store(true)
	s.merge.Store(nil)
	err = d.discard(s, s.target.Drop())
	d.bus.publish(api.Event{Type: api.EventMergeFinished, Name: s.name, Cause: causeOf(err)})
	d.retire(s, disconnect)
}

// showOrigin lets both devices of a finished merge show the origin. If that does not have all that users of the
// snapshot were told of, they have to go: disconnect.
func (d *Daemon) showOrigin(s *snap) (disconnect bool, err error) {
	err = d.changeBoth(d.ending, s, func() error {
		if err := s.origin.device.SetTarget(s.origin.target); err != nil {
			return err
		}
		disconnect = s.device.SetTarget(s.origin.target) != nil
		return nil
	})
	return disconnect, err
}

// retire lets nobody open s any more, which has been merged, and removes its device when its users have left.
func (d *Daemon) retire(s *snap, disconnect bool) {
	empty, _ := s.shut(true) // with force there is no error
	if empty == nil {
		d.endMerged(s)
		return
	}
	d.tasks.Go(func() {
		if disconnect {
			_ = d.exports.disconnect(d.ending, s.name) // those who do not leave now leave later
		}
		select {
		case <-empty:
		case <-d.ending.Done():
			return
		}
		if err := s.origin.lock(d.ending); err != nil {
			return
		}
		defer s.origin.unlock()
		if !s.isGone() { // somebody may have removed it
			d.endMerged(s)
		}
	})
}

// endMerged removes the device of a snapshot that has been merged, and that nobody uses.
func (d *Daemon) endMerged(s *snap) {
	err := s.device.Close(d.ending)
	d.endSnap(s)
	d.bus.publish(api.Event{Type: api.EventSnapshotRemoved, Name: s.name, Cause: causeOf(err)})
}
