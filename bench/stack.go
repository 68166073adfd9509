package bench

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"

	"cowherd/backend/mem"
	"cowherd/block"
	"cowherd/clonemeta"
	"cowherd/cowstore"
	"cowherd/dm"
	"cowherd/kcopyd"
	"cowherd/target"
	"cowherd/target/clone"
	"cowherd/target/linear"
	"cowherd/target/snapshot"
)

// engines make the engines that a plan can name.
func engines() map[string]func(kcopyd.Config) engine {
	return map[string]func(kcopyd.Config) engine{
		Scaled:     func(c kcopyd.Config) engine { return kcopyd.NewScaled(c) },
		Serialised: func(c kcopyd.Config) engine { return kcopyd.NewSerialised(c) },
		OneLock:    func(c kcopyd.Config) engine { return kcopyd.NewSerialised(c) },
	}
}

// OneLock is the serialised engine below snapshots whose exceptions are guarded by one lock, as the kernel's were before
// 2019. Stacks without snapshots do not know it.
const OneLock = "onelock"

// engineNames are the names of the engines, in order.
func engineNames() []string { return slices.Sorted(maps.Keys(engines())) }

// stack is what a cell's jobs run on. close undoes what was built, the last first.
type stack struct {
	device  block.Device
	copies  *copies // jobs are copies; nil: requests to device
	engines []engine
	// throttle is that of all engines; nil: there is none, and copies do not give way.
	throttle *kcopyd.Throttle
	started  func()       // called before the measured run
	check    func() error // what must hold after a run; nil: nothing
	closers  []func() error
}

func (s *stack) onClose(f func() error) { s.closers = append(s.closers, f) }

func (s *stack) close() error {
	var errs []error
	for i := len(s.closers) - 1; i >= 0; i-- {
		errs = append(errs, s.closers[i]())
	}
	return errors.Join(errs...)
}

// newEngine makes the engine of a cell, which the stack closes.
func (s *stack) newEngine(c *Cell) engine {
	if c.Yield && s.throttle == nil {
		s.throttle = kcopyd.NewThrottle()
	}
	config := kcopyd.Config{Throttle: s.throttle}
	switch c.Offload {
	case offloadOff:
		config.OffloadThreshold = math.MaxInt64
	case offloadOnly, offloadEmulated, offloadWorker:
		config.OffloadFloor, config.OffloadThreshold = 1, 1
		config.OffloadInWorker = c.Offload == offloadWorker
	}
	config.CopyServer = c.Offload != offloadOff && c.Device == deviceRemote
	e := engines()[c.Engine](config)
	s.engines = append(s.engines, e)
	s.onClose(e.Close)
	return e
}

// build makes the stack of a cell whose jobs submit requests. What was built is closed with the stack, also after an
// error.
func build(c *Cell, k *kit) (*stack, error) {
	s := &stack{}
	d, err := k.device(roleDevice, 0, c.Size)
	if err != nil {
		return s, err
	}
	switch c.Stack {
	case stackBare:
		s.device = d
	case stackMapped:
		s.mapped(c, d)
	case stackSnapshotOrigin, stackSnapshot:
		err = s.snapshots(c, k, d)
	case stackClone:
		var r *cloned
		if r, err = s.clone(c, k, d); err == nil && c.Hydration {
			s.started = func() { r.clone.SetHydration(true) }
		}
	case stackCopies:
		var to block.Device
		if to, err = k.device(roleOther, 0, c.Size); err == nil {
			s.copies = &copies{engine: s.newEngine(c), from: d, to: to, offload: offloadOf(c), class: kcopyd.Hydration}
		}
	default:
		err = fmt.Errorf("stack %q has no jobs", c.Stack)
	}
	return s, err
}

// offloadOf is what a job that is submitted to an engine asks for.
func offloadOf(c *Cell) kcopyd.Offload {
	switch c.Offload {
	case offloadOff:
		return kcopyd.OffloadOff
	case offloadOnly, offloadEmulated, offloadWorker:
		return kcopyd.OffloadOnly
	}
	return kcopyd.OffloadAuto
}

// mapped puts mapped devices of one linear target on each other.
func (s *stack) mapped(c *Cell, d block.Device) {
	for i := range c.Layers {
		name := fmt.Sprintf("bench%d", i)
		upper := dm.NewDevice(name, linear.New(target.Lower{Device: d, Name: target.Name(name)}, 0, c.Size), false)
		s.onClose(func() error { return upper.Close(context.Background()) })
		d = upper
	}
	s.device = d
}

// snapshots makes d an origin with snapshots, each with an engine of its own, as the daemon and the kernel have it. The
// jobs write to the origin or to the one snapshot.
func (s *stack) snapshots(c *Cell, k *kit, d block.Device) error {
	origin := snapshot.NewOrigin(d)
	count := c.Snapshots
	if c.Stack == stackSnapshot {
		count = 1
	}
	var all []*snapshot.Snapshot
	for i := range count {
		chunk := cowstore.ChunkSize(c.Chunk)
		// Twice the size: the queues take chunks in batches.
		length := 2 * c.Size
		if c.Store == Persistent {
			length = c.Size + c.Size/c.Chunk*16 + 1024*c.Chunk
		}
		cow, err := k.device(roleCOW, i, length)
		if err != nil {
			return err
		}
		var store snapshot.Store = cowstore.NewTransient(length, 0, chunk)
		if c.Store == Persistent {
			if store, err = cowstore.CreatePersistent(cow, chunk, cowstore.PersistentConfig{}); err != nil {
				return err
			}
		}
		taken, err := snapshot.New(snapshot.Config{
			Name: fmt.Sprintf("bench@%d", i), Origin: origin, COW: cow, ChunkSize: chunk, Engine: s.newEngine(c), Store: store,
			OneLock: c.Engine == OneLock,
		})
		if err != nil {
			return err
		}
		// It is closed after its engine.
		s.closers = slices.Insert(s.closers, len(s.closers)-1, taken.Close)
		if err := origin.Add(taken); err != nil {
			return err
		}
		all = append(all, taken)
	}
	s.check = func() error {
		for _, taken := range all {
			if cause := taken.Status().Invalid; cause != nil {
				return fmt.Errorf("the snapshot became invalid: %w", cause)
			}
		}
		return nil
	}
	top := dm.Target(origin)
	if c.Stack == stackSnapshot {
		top = all[0]
	}
	device := dm.NewDevice("bench", top, false)
	s.onClose(func() error { return device.Close(context.Background()) })
	s.device = device
	return nil
}

// cloned is a clone of a stack.
type cloned struct {
	clone    *clone.Clone
	hydrated chan struct{} // closed when everything is hydrated and committed
	stopped  chan struct{} // has an element when hydration has given up
}

// clone makes a clone of source, with its metadata in memory and without hydration.
func (s *stack) clone(c *Cell, k *kit, source block.Device) (*cloned, error) {
	dest, err := k.device(roleOther, 0, c.Size)
	if err != nil {
		return nil, err
	}
	params := clonemeta.Params{RegionSize: block.SectorFloor(c.Region), TargetSize: block.SectorFloor(c.Size)}
	store, err := mem.New(mem.Config{Size: clonemeta.Size(params)})
	if err != nil {
		return nil, err
	}
	s.onClose(store.Close)
	meta, err := clonemeta.Format(store, params)
	if err != nil {
		return nil, err
	}
	s.onClose(meta.Close)
	r := &cloned{hydrated: make(chan struct{}), stopped: make(chan struct{}, 1)}
	batch := uint32(max(1, (1<<20)/c.Region))
	r.clone, err = clone.New(clone.Config{
		Name: "bench", Source: source, Destination: dest, Metadata: meta, Engine: s.newEngine(c),
		Hydration: clone.Hydration{Disabled: true, Threshold: 16 * batch, Batch: batch},
		Event: func(e clone.Event) {
			switch e.Kind {
			case clone.EventHydrated:
				close(r.hydrated)
			case clone.EventStopped, clone.EventMode:
				select {
				case r.stopped <- struct{}{}:
				default:
				}
			}
		},
	})
	if err != nil {
		return nil, err
	}
	// The engine is closed after the clone.
	s.onClose(r.clone.Close)
	device := dm.NewDevice("bench", r.clone, false)
	s.onClose(func() error { return device.Close(context.Background()) })
	s.device = device
	s.check = func() error {
		if st := r.clone.Status(); st.Mode != clone.ReadWrite || st.Failed > 0 {
			return fmt.Errorf("the clone is %v, %d regions failed: %w", st.Mode, st.Failed, errors.Join(st.Cause, st.FirstError))
		}
		return nil
	}
	r.clone.Resume()
	return r, nil
}
