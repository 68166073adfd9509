package crash

import (
	"context"
	"errors"
	"fmt"
	"time"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/dm"
	"cowherd/kcopyd"
	"cowherd/target/snapshot"
)

// patience bounds what must not take long.
const patience = 60 * time.Second

// The devices of a stack.
const (
	onOrigin   = iota
	onSnapshot // it may be merged
	onOther    // another snapshot, which is there while the first one is merged
	deviceCount
)

var deviceNames = [deviceCount]string{"origin", "snapshot", "other"}

// stack is an origin and its snapshots, as the daemon puts them together.
type stack struct {
	engine  kcopyd.Engine
	target  *snapshot.Origin
	snaps   [deviceCount]*snapshot.Snapshot
	devices [deviceCount]*dm.Device
	merge   *snapshot.Merge // nil: nothing is merged
}

// openStack makes a stack over a device, without snapshots.
func openStack(origin block.Device, engine kcopyd.Engine) *stack {
	s := &stack{engine: engine, target: snapshot.NewOrigin(origin)}
	s.devices[onOrigin] = dm.NewDevice(deviceNames[onOrigin], s.target, false)
	return s
}

// pendingMax is little, so that a snapshot is made quickly, and requests wait for exceptions.
const pendingMax = 64

// take adds a snapshot with the given store. flush flushes the origin's device while the origin is suspended: what the
// snapshot shows is not to be lost when the origin loses what was never flushed.
func (s *stack) take(on int, cow block.Device, store *cowstore.Persistent, c *config, flush func() error) error {
	x, err := snapshot.New(snapshot.Config{
		Name: deviceNames[on], Origin: s.target, COW: cow, Store: store, Engine: s.engine, PendingMax: pendingMax,
		OnFull: c.onFull, COWMax: c.roomMax * int64(c.chunk),
	})
	if err != nil {
		return err
	}
	s.snaps[on], s.devices[on] = x, dm.NewDevice(deviceNames[on], x, false)
	return s.whileSuspended(func() error { return errors.Join(flush(), s.target.Add(x)) }, onOrigin)
}

// whileSuspended runs what while devices are suspended.
func (s *stack) whileSuspended(what func() error, on ...int) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, i := range on {
		if err := s.devices[i].Suspend(ctx); err != nil {
			return err
		}
		defer s.devices[i].Resume()
	}
	return what()
}

// drop removes a snapshot for good.
func (s *stack) drop(on int) error {
	what := func() error {
		s.target.Remove(s.snaps[on])
		return s.snaps[on].Drop()
	}
	return errors.Join(s.whileSuspended(what, onOrigin, on), s.closeSnapshot(on))
}

// closeSnapshot ends a snapshot that is out of its origin; its store stays as it is.
func (s *stack) closeSnapshot(on int) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := s.devices[on].Close(ctx)
	err = errors.Join(err, s.snaps[on].Close())
	s.snaps[on], s.devices[on] = nil, nil
	return err
}

// beginMerge puts a merge of the snapshot in the place of origin and snapshot. finished gets an error if it fails.
func (s *stack) beginMerge(finished chan<- error) error {
	return s.whileSuspended(func() error {
		s.target.Remove(s.snaps[onSnapshot])
		m, err := snapshot.NewMerge(s.snaps[onSnapshot], snapshot.MergeConfig{
			Failed:   func(err error) { finished <- err },
			Finished: func() { finished <- nil },
		})
		if err != nil {
			return err
		}
		s.merge = m
		return errors.Join(s.devices[onOrigin].SetTarget(m), s.devices[onSnapshot].SetTarget(m))
	}, onOrigin, onSnapshot)
}

// endMerge puts the origin back in place, and drops the snapshot, which has been merged.
func (s *stack) endMerge() error {
	err := s.whileSuspended(func() error {
		s.merge.Stop()
		if !s.merge.Finished() {
			return fmt.Errorf("the merge has not finished: %s", s.merge.Status())
		}
		s.merge = nil
		return errors.Join(s.devices[onOrigin].SetTarget(s.target), s.snaps[onSnapshot].Drop())
	}, onOrigin, onSnapshot)
	return errors.Join(err, s.closeSnapshot(onSnapshot))
}

// close ends everything; the engine stays.
func (s *stack) close() error {
	if s.merge != nil {
		s.merge.Stop()
	}
	var err error
	for on, x := range s.snaps {
		if x != nil {
			what := func() error { s.target.Remove(x); return nil }
			err = errors.Join(err, s.whileSuspended(what, onOrigin, on), s.closeSnapshot(on))
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return errors.Join(err, s.devices[onOrigin].Close(ctx))
}

// read fills p with the start of a device.
func read(d block.Device, p []byte) error { return block.Read(d, p, 0) }
