package service

import (
	"context"
	"errors"
	"fmt"
	"math"
	"syscall"
	"time"

	"cowherd/api"
	"cowherd/cowstore"
	"cowherd/dm"
	"cowherd/internal/size"
	"cowherd/kcopyd"
	"cowherd/target/snapshot"
)

// chunkDefault is the chunk size in bytes where none is given.
const chunkDefault = 4 << 10

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
	engine  kcopyd.Engine
	target  *snapshot.Snapshot
}

// TakeSnapshot freezes what an origin holds at this moment.
func (d *Daemon) TakeSnapshot(ctx context.Context, r api.SnapshotRequest) (api.SnapshotTaken, error) {
	name, _, err := splitName(r.Name)
	if err != nil {
		return api.SnapshotTaken{}, err
	}
	if r.ChunkBytes == 0 {
		r.ChunkBytes = chunkDefault
	}
	if r.Store == "" {
		r.Store = storeTemp
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
	if err := d.names.reserve(); err != nil {
		return api.SnapshotTaken{}, err
	}
	s, err := d.makeSnap(o, r)
	if err != nil {
		d.names.unreserve()
		return api.SnapshotTaken{}, err
	}
	stall, err := d.change(ctx, o, func() error {
		if err := o.target.Add(s.target); err != nil {
			return err
		}
		// Before the origin goes on: what becomes of the snapshot then comes after this event.
		o.bus.publish(api.Event{Type: api.EventSnapshotTaken, Name: s.name})
		return nil
	})
	if err != nil {
		d.names.unreserve()
		return api.SnapshotTaken{}, errors.Join(err, s.close())
	}
	o.snapsMu.Lock()
	o.snaps[s.name] = s
	o.snapsMu.Unlock()
	s.set(live)
	return api.SnapshotTaken{Device: d.describeSnap(s), StallMicroseconds: stall.Microseconds()}, nil
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

// makeSnap makes everything that a snapshot needs, but does not add it to its origin.
func (d *Daemon) makeSnap(o *origin, r api.SnapshotRequest) (*snap, error) {
	if err := cowstore.CheckNewChunkSize(r.ChunkBytes, o.target.Limits().LogicalBlock); err != nil {
		return nil, invalid(err)
	}
	chunk := cowstore.ChunkSize(r.ChunkBytes)
	length, err := cowLength(o.device.Size(), r.MaxCOWBytes, chunk)
	if err != nil {
		return nil, err
	}
	cow, err := d.openCOW(r, length)
	if err != nil {
		return nil, err
	}
	s := &snap{
		entry:   entry{name: r.Name, bus: d.bus, since: time.Now().UTC()},
		origin:  o,
		request: r,
		cow:     cow,
		engine:  d.newEngine(),
	}
	s.target, err = snapshot.New(snapshot.Config{
		Name:                  r.Name,
		Origin:                o.target,
		COW:                   cow.leaf,
		Store:                 cowstore.NewTransient(cow.Size(), r.MaxCOWBytes, chunk),
		ChunkSize:             chunk,
		Engine:                s.engine,
		ReadOnly:              r.ReadOnly,
		DiscardZeroesCOW:      r.DiscardZeroesCOW,
		DiscardPassdownOrigin: r.DiscardPassdownOrigin,
		Invalidated: func(cause error) {
			d.bus.publish(api.Event{Type: api.EventSnapshotInvalid, Name: r.Name, Cause: cause.Error()})
		},
	})
	if err == nil && cow.Size() < int64(chunk) {
		err = api.Errorf(syscall.EINVAL, "COW device %s has %d bytes: not even one chunk", r.Store, cow.Size())
	}
	if err != nil {
		return nil, errors.Join(invalid(err), s.close())
	}
	s.device = dm.NewDevice(r.Name, s.target, r.ReadOnly)
	return s, nil
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
	c := kcopyd.Config{BufferCeiling: d.config.BufferCeiling}
	if d.config.Engine == EngineSerialised {
		return kcopyd.NewSerialised(c)
	}
	return kcopyd.NewScaled(c)
}

// close ends a snapshot that is in no origin. Once the engine is closed nothing touches the COW device any more.
func (s *snap) close() error {
	return errors.Join(s.engine.Close(), s.cow.close())
}

// RemoveSnapshot drops a snapshot with all that it has copied. EBUSY: it has users; force disconnects them.
func (d *Daemon) RemoveSnapshot(ctx context.Context, name string, force bool) error {
	origin, _, err := splitName(name)
	if err != nil {
		return err
	}
	o, err := d.lockOrigin(ctx, origin)
	if err == nil {
		defer o.unlock()
		err = d.remove(ctx, o, name, force)
	}
	if err != nil {
		return fmt.Errorf("remove %q: %w", name, err)
	}
	return nil
}

// remove does it for an origin whose operations are the caller's.
func (d *Daemon) remove(ctx context.Context, o *origin, name string, force bool) error {
	s := o.snap(name)
	if s == nil {
		return api.Errorf(syscall.ENOENT, "there is no such snapshot")
	}
	ctx, cancel := context.WithTimeout(ctx, d.config.SuspendTimeout)
	defer cancel()
	if err := d.shut(ctx, &s.entry, force); err != nil {
		return err
	}
	if err := s.takeOut(ctx, d); err != nil {
		s.reopen()
		return err
	}
	s.set(gone)
	o.snapsMu.Lock()
	delete(o.snaps, name)
	o.snapsMu.Unlock()
	err := s.close()
	d.names.unreserve()
	o.bus.publish(api.Event{Type: api.EventSnapshotRemoved, Name: name, Cause: causeOf(err)})
	return err
}

// takeOut takes s out of its origin. If it fails s runs as before.
func (s *snap) takeOut(ctx context.Context, d *Daemon) error {
	if err := s.device.Suspend(ctx); err != nil {
		return err
	}
	_, err := d.change(ctx, s.origin, func() error {
		s.origin.target.Remove(s.target)
		return nil
	})
	if err != nil {
		s.device.Resume()
		return err
	}
	return s.device.Close(ctx)
}
