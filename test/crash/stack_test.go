package crash

import (
	"context"
	"errors"
	"time"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/dm"
	"cowherd/kcopyd"
	"cowherd/target/snapshot"
)

// patience bounds what must not take long.
const patience = 60 * time.Second

// stack is an origin and, from take on, its snapshot, as the daemon puts them together.
type stack struct {
	engine  kcopyd.Engine
	below   block.Device // the origin's
	target  *snapshot.Origin
	snap    *snapshot.Snapshot
	devices [2]*dm.Device
}

// openStack makes a stack over a device, without a snapshot.
func openStack(origin block.Device, engine kcopyd.Engine) *stack {
	s := &stack{engine: engine, below: origin, target: snapshot.NewOrigin(origin)}
	s.devices[onOrigin] = dm.NewDevice("origin", s.target, false)
	return s
}

// pendingMax is little, so that a snapshot is made quickly, and requests wait for exceptions.
const pendingMax = 64

// take adds a snapshot with the given store. flush flushes the origin's device while the origin is suspended: what the
// snapshot shows is not to be lost when the origin loses what was never flushed.
func (s *stack) take(cow block.Device, store *cowstore.Persistent, onFull snapshot.OnFull, flush func() error) error {
	var err error
	s.snap, err = snapshot.New(snapshot.Config{
		Name: "snapshot", Origin: s.target, COW: cow, Store: store, Engine: s.engine, OnFull: onFull, PendingMax: pendingMax,
	})
	if err != nil {
		return err
	}
	s.devices[onSnapshot] = dm.NewDevice("snapshot", s.snap, false)
	return s.whileSuspended(func() error { return errors.Join(flush(), s.target.Add(s.snap)) }, s.devices[onOrigin])
}

// whileSuspended runs what while devices are suspended.
func (s *stack) whileSuspended(what func() error, devices ...*dm.Device) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, d := range devices {
		if err := d.Suspend(ctx); err != nil {
			return err
		}
		defer d.Resume()
	}
	return what()
}

// drop removes the snapshot for good.
func (s *stack) drop() error {
	what := func() error {
		s.target.Remove(s.snap)
		return s.snap.Drop()
	}
	err := s.whileSuspended(what, s.devices[onOrigin], s.devices[onSnapshot])
	return errors.Join(err, s.closeSnapshot())
}

// closeSnapshot ends the snapshot; its store stays as it is.
func (s *stack) closeSnapshot() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := s.devices[onSnapshot].Close(ctx)
	err = errors.Join(err, s.snap.Close())
	s.snap, s.devices[onSnapshot] = nil, nil
	return err
}

// close ends everything; the engine stays.
func (s *stack) close() error {
	var err error
	if s.snap != nil {
		err = s.whileSuspended(func() error { s.target.Remove(s.snap); return nil }, s.devices[onOrigin], s.devices[onSnapshot])
		err = errors.Join(err, s.closeSnapshot())
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return errors.Join(err, s.devices[onOrigin].Close(ctx))
}

// read fills p with the start of a device.
func read(d block.Device, p []byte) error { return block.Read(d, p, 0) }
