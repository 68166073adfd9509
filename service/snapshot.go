package service

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync/atomic"
	"syscall"
	"time"

	"cowherd/api"
	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/dm"
	"cowherd/internal/size"
	"cowherd/kcopyd"
	"cowherd/target/snapshot"
)

// chunkDefault is the chunk size in bytes where none is given.
const chunkDefault = 4 << 10

// stallDefault is how long a write waits for room where no time is given.
const stallDefault = 30 * time.Second

// Stores of a SnapshotRequest that are not paths.
const (
	storeTemp = "temp"
	storeMem  = "mem"
)

// snap is a snapshot that was taken.
type snap struct {
	entry
	origin  *origin
	request api.SnapshotRequest
	cow     *backing
	store   *cowstore.Persistent // nil: it is transient
	made    bool                 // the store is a file that the daemon made
	engine  kcopyd.Engine
	target  *snapshot.Snapshot

	merge  atomic.Pointer[snapshot.Merge] // nil: it is not being merged
	merged atomic.Bool                    // it shows its origin, and its store is gone
}

// TakeSnapshot freezes what an origin holds at this moment.
func (d *Daemon) TakeSnapshot(ctx context.Context, r api.SnapshotRequest) (api.SnapshotTaken, error) {
	name, _, err := splitName(r.Name)
	if err != nil {
		return api.SnapshotTaken{}, err
	}
	if err := d.normalize(&r); err != nil {
		return api.SnapshotTaken{}, fmt.Errorf("snapshot %q: %w", r.Name, err)
	}
	o, err := d.lockOrigin(ctx, name)
	if err == nil {
		defer o.unlock()
		var taken api.SnapshotTaken
		if taken, err = d.take(ctx, o, r); err == nil {
			return taken, nil
		}
	}
	return api.SnapshotTaken{}, fmt.Errorf("snapshot %q: %w", r.Name, err)
}

// take does it for an origin whose operations are the caller's.
func (d *Daemon) take(ctx context.Context, o *origin, r api.SnapshotRequest) (api.SnapshotTaken, error) {
	if o.snap(r.Name) != nil {
		return api.SnapshotTaken{}, api.Errorf(syscall.EEXIST, "there is a snapshot of this name already")
	}
	if d.saved.now().snapshot(r.Name) != nil {
		return api.SnapshotTaken{}, api.Errorf(syscall.EEXIST, "there is a snapshot of this name, which is lost: remove it")
	}
	if other := o.merging(); other != nil {
		return api.SnapshotTaken{}, api.Errorf(syscall.EBUSY, "%s is being merged into %s: what that holds changes by itself",
			other.name, o.name)
	}
	if err := d.names.reserve(); err != nil {
		return api.SnapshotTaken{}, err
	}
	s, err := d.makeSnap(o, r)
	if err != nil {
		d.names.unreserve()
		return api.SnapshotTaken{}, err
	}
	stall, err := d.add(ctx, s)
	if err != nil {
		d.names.unreserve()
		return api.SnapshotTaken{}, errors.Join(err, d.abandon(s))
	}
	o.snapsMu.Lock()
	o.snaps[s.name] = s
	o.snapsMu.Unlock()
	s.set(live)
	return api.SnapshotTaken{Device: d.describeSnap(s), StallMicroseconds: stall.Microseconds()}, nil
}

// add adds a new snapshot to its origin, and makes it durable that it is there. If it fails it is not.
func (d *Daemon) add(ctx context.Context, s *snap) (stall time.Duration, err error) {
	if err := s.flushOrigin(); err != nil { // most of it while requests go on
		return 0, err
	}
	stall, err = d.change(ctx, s.origin, func() error {
		if err := s.flushOrigin(); err != nil {
			return err
		}
		if err := s.origin.target.Add(s.target); err != nil {
			return err
		}
		// Before the origin goes on: what becomes of the snapshot then comes after this event.
		d.bus.publish(api.Event{Type: api.EventSnapshotTaken, Name: s.name})
		return nil
	})
	if err != nil || d.saved.now().snapshot(s.name).Phase == phaseKept {
		return stall, err
	}
	if err := d.remember(s, phaseKept); err != nil {
		dropped, undone := s.takeOut(ctx, d)
		d.bus.publish(api.Event{Type: api.EventSnapshotRemoved, Name: s.name, Cause: causeOf(err)})
		return 0, errors.Join(err, dropped, undone)
	}
	return stall, nil
}

// flushOrigin makes durable what a persistent snapshot shows of its origin: what the origin loses in a power failure the
// snapshot would lose with it, though it had shown it.
func (s *snap) flushOrigin() error {
	if s.store == nil {
		return nil
	}
	if err := block.Flush(s.origin.backing); err != nil {
		return fmt.Errorf("flush the origin: %w", err)
	}
	return nil
}

// remember puts s into the state file, in some phase.
func (d *Daemon) remember(s *snap, p phase) error {
	return d.saved.change(func(c *content) {
		c.putSnapshot(savedSnapshot{
			Request: s.request, Since: s.since, Phase: p, OriginBytes: s.origin.target.Size(), Made: s.made,
		})
	})
}

// change runs what changes the origin's snapshots while the origin is suspended, and tells for how long it was.
func (d *Daemon) change(ctx context.Context, o *origin, what func() error) (stall time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, d.config.SuspendTimeout)
	defer cancel()
	start := time.Now()
	if err := o.device.Suspend(ctx); err != nil {
		return 0, err
	}
	err = what()
	stall = time.Since(start)
	o.device.Resume()
	return stall, err
}

// makeSnap makes everything that a snapshot needs and notes it in the state file, but does not add it to its origin. If
// it fails nothing is left of it.
func (d *Daemon) makeSnap(o *origin, r api.SnapshotRequest) (*snap, error) {
	s := d.newSnap(o, r, time.Now().UTC())
	open := d.openTransient
	switch {
	case r.Reopen:
		open = d.reopenPersistent
	case r.Persistent:
		open = d.createPersistent
	}
	store, err := open(s)
	if err == nil {
		err = s.build(d, store)
	}
	if err == nil && d.saved.now().snapshot(s.name) == nil {
		err = d.remember(s, phaseKept)
	}
	if err != nil {
		return nil, errors.Join(invalid(err), d.abandon(s))
	}
	return s, nil
}

// newSnap begins a snapshot: its store is to be opened, then build follows.
func (d *Daemon) newSnap(o *origin, r api.SnapshotRequest, since time.Time) *snap {
	return &snap{
		entry:   entry{name: r.Name, bus: d.bus, since: since},
		origin:  o,
		request: r,
		engine:  d.newEngine(),
	}
}

// build makes the target and the mapped device of a snapshot whose store is open.
func (s *snap) build(d *Daemon, store snapshot.Store) error {
	r := &s.request
	full, err := onFull(r.OnFull)
	if err != nil {
		return err
	}
	s.target, err = snapshot.New(snapshot.Config{
		Name:                  r.Name,
		Origin:                s.origin.target,
		COW:                   s.cow.leaf,
		Store:                 store,
		ChunkSize:             cowstore.ChunkSize(r.ChunkBytes),
		Engine:                s.engine,
		ReadOnly:              r.ReadOnly,
		DiscardZeroesCOW:      r.DiscardZeroesCOW,
		DiscardPassdownOrigin: r.DiscardPassdownOrigin,
		OnFull:                full,
		COWMax:                r.MaxCOWBytes,
		StallMax:              time.Duration(r.StallMaxMicroseconds) * time.Microsecond,
		WarnAt:                s.warnAt(store),
		Warned: func(percent int) {
			d.bus.publish(api.Event{Type: api.EventSnapshotSpace, Name: r.Name, Percent: percent})
		},
		Stalled: func() { d.bus.publish(api.Event{Type: api.EventSnapshotStalled, Name: r.Name}) },
		Overflowed: func(cause error) {
			d.bus.publish(api.Event{Type: api.EventSnapshotOverflow, Name: r.Name, Cause: cause.Error()})
		},
		Invalidated: func(cause error) {
			d.bus.publish(api.Event{Type: api.EventSnapshotInvalid, Name: r.Name, Cause: cause.Error()})
		},
	})
	if err != nil {
		return err
	}
	s.device = dm.NewDevice(r.Name, s.target, r.ReadOnly)
	return nil
}

// warnDefault is the share of a store in percent at which there is a warning where none was asked for.
const warnDefault = 80

// warnAt is when to warn: as asked for, or at warnDefault if the store can run full at all.
func (s *snap) warnAt(store snapshot.Store) []int {
	if s.request.WarnAt != nil {
		return s.request.WarnAt
	}
	_, total, metadata := store.Usage()
	if (total - min(total, metadata)).Bytes() >= s.origin.target.Size() {
		return nil
	}
	return []int{warnDefault}
}

// cowLength is the COW space in bytes that a snapshot of an origin of the given size can need at most: a chunk for
// each chunk of the origin, within limit (0: none).
func cowLength(origin, limit int64, chunk cowstore.ChunkSize) (int64, error) {
	if limit < 0 || limit > 0 && limit < int64(chunk) {
		return 0, api.Errorf(syscall.EINVAL, "COW space of at most %d bytes does not hold a chunk of %s", limit,
			size.Exact(int64(chunk)))
	}
	chunks := max(1, origin/int64(chunk))
	if origin > chunks*int64(chunk) && chunks < math.MaxInt64/int64(chunk) {
		chunks++
	}
	if limit > 0 {
		chunks = min(chunks, limit/int64(chunk))
	}
	return chunks * int64(chunk), nil
}

// newEngine makes a copy engine of the kind that the daemon was told to use.
func (d *Daemon) newEngine() kcopyd.Engine {
	c := kcopyd.Config{BufferCeiling: d.config.BufferCeiling, Throttle: d.throttle}
	if d.config.Engine == EngineSerialised {
		return kcopyd.NewSerialised(c)
	}
	return kcopyd.NewScaled(c)
}

// close ends a snapshot that is in no origin. Once the engine is closed nothing is copied any more, and once the target
// is nothing touches the COW device.
func (s *snap) close() error {
	err := s.engine.Close()
	if s.target != nil {
		err = errors.Join(err, s.target.Close())
	}
	if s.cow != nil {
		err = errors.Join(err, s.cow.close())
	}
	return err
}

// ResizeSnapshot gives a snapshot's store another size in bytes: a file grows, a block device must have grown.
func (d *Daemon) ResizeSnapshot(ctx context.Context, name string, bytes int64) (api.Device, error) {
	origin, _, err := splitName(name)
	if err != nil {
		return api.Device{}, err
	}
	o, err := d.lockOrigin(ctx, origin)
	if err == nil {
		defer o.unlock()
		var x api.Device
		if x, err = d.resize(o, name, bytes); err == nil {
			return x, nil
		}
	}
	return api.Device{}, fmt.Errorf("resize %q: %w", name, err)
}

// resize does it for an origin whose operations are the caller's.
func (d *Daemon) resize(o *origin, name string, bytes int64) (api.Device, error) {
	s := o.snap(name)
	if s == nil {
		return api.Device{}, api.Errorf(syscall.ENOENT, "there is no such snapshot")
	}
	if err := s.target.Resize(bytes); err != nil {
		return api.Device{}, err
	}
	if most := s.request.MaxCOWBytes; most > 0 && most < bytes {
		if err := d.saved.change(func(c *content) { c.snapshot(name).Request.MaxCOWBytes = bytes }); err != nil {
			return api.Device{}, err
		}
		s.request.MaxCOWBytes = bytes
	}
	d.bus.publish(api.Event{Type: api.EventSnapshotResized, Name: name})
	return d.describeSnap(s), nil
}
