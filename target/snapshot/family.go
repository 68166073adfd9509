package snapshot

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"time"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/kcopyd"
	"cowherd/target"
)

// Family is what the targets snapshot-origin, snapshot and snapshot-merge of tables know of each other: which of them
// are over the same origin, and which over the same COW device. They find each other by their devices, whatever mapped
// devices they belong to.
//
//	snapshot, loaded         its store is opened or made, its exceptions are read
//	         resumed         it becomes a snapshot of its origin: what it shows is frozen from here on
//	         closed          it is none any more; a persistent store stays as it is, and can be opened again
//
// # Handover
//
// A second snapshot or a merge with the COW device of one that is live takes over what that has: it opens nothing when it
// is loaded, and when it is resumed the first one, which must be suspended, is left without exceptions, and fails all
// I/O. So a snapshot is reloaded (its device is suspended, and both tables belong to it), and so a merge begins (the
// origin's device has snapshot-merge in its next table, and is resumed while the snapshot's device is suspended, or gone
// for good afterwards).
//
// Where the origin's writes must stand still, because a snapshot joins or leaves, the devices over the origin are held
// (target.Host.Hold): the one who resumes need not have suspended them. To have several snapshots of one moment, or one
// that a file system agrees to, suspend the origin first.
type Family struct {
	newEngine func() kcopyd.Engine

	mu sync.Mutex
	// By the device below.
	// +checklocks:mu
	origins map[block.Device]*sharedOrigin
	// All snapshots and merges.
	// +checklocks:mu
	members []*member
}

// holdMax is how long the requests in flight of an origin are waited for.
const holdMax = 10 * time.Second

// sharedOrigin is an Origin that targets share.
type sharedOrigin struct {
	*Origin
	count int           // targets
	hosts []target.Host // of the snapshot-origin targets among them
}

// member is a snapshot or a merge of a table.
type member struct {
	family *Family
	host   target.Host
	origin target.Lower
	cow    target.Lower
	shared *sharedOrigin
	size   int64
	merges bool
	policy policy
	limits block.Limits

	// Under the family's lock.
	core      *core   // nil: it is the source's still, or was handed over
	source    *member // whose core it will take over; nil: it has its own
	suspended bool    // between Postsuspend and Resume
	closed    bool
}

// policy is what a table says about a snapshot.
type policy struct {
	kind      byte // P or N
	overflows bool
	chunk     cowstore.ChunkSize // 0: not given
	zeroes    bool               // discard_zeroes_cow
	passdown  bool               // discard_passdown_origin
}

// core is what is handed over.
type core struct {
	snapshot *Snapshot
	merge    *Merge // nil: it is a snapshot
	engine   kcopyd.Engine
	added    bool // it is one of its origin's snapshots
	owner    target.Host
}

// NewFamily makes a family whose snapshots have engines that newEngine makes.
func NewFamily(newEngine func() kcopyd.Engine) *Family {
	return &Family{newEngine: newEngine, origins: map[block.Device]*sharedOrigin{}}
}

// acquire counts one more target over an origin.
func (f *Family) acquire(d block.Device, host target.Host) *sharedOrigin {
	f.mu.Lock()
	defer f.mu.Unlock()
	o := f.origins[d]
	if o == nil {
		o = &sharedOrigin{Origin: NewOrigin(d)}
		f.origins[d] = o
	}
	o.count++
	if host != nil {
		o.hosts = append(o.hosts, host)
	}
	return o
}

// release undoes acquire.
func (f *Family) release(o *sharedOrigin, host target.Host) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if i := slices.Index(o.hosts, host); host != nil && i >= 0 {
		o.hosts = slices.Delete(o.hosts, i, i+1)
	}
	if o.count--; o.count == 0 {
		delete(f.origins, o.device)
	}
}

// stillness runs what while no request is in flight in the devices over an origin.
func (f *Family) stillness(o *sharedOrigin, what func() error) error {
	ctx, cancel := context.WithTimeout(context.Background(), holdMax)
	defer cancel()
	f.mu.Lock()
	hosts := slices.Clone(o.hosts)
	f.mu.Unlock()
	for i, h := range hosts {
		if err := h.Hold(ctx); err != nil {
			for _, held := range hosts[:i] {
				held.Unhold()
			}
			return fmt.Errorf("the origin: %w", err)
		}
	}
	defer func() {
		for _, h := range hosts {
			h.Unhold()
		}
	}()
	return what()
}

// join makes a member one of the family, as the heir of the one that has its COW device, if there is one. EINVAL: that
// has an heir already, or was never live.
func (f *Family) join(m *member) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, x := range f.members {
		if x.cow.Device != m.cow.Device {
			continue
		}
		if m.source != nil || x.core == nil || !x.core.added && x.core.merge == nil || x.origin.Device != m.origin.Device {
			return target.Errorf("snapshot cow pairing for exception table handover failed")
		}
		m.source = x
	}
	f.members = append(f.members, m)
	return nil
}

// leave takes a member out.
func (f *Family) leave(m *member) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.members = slices.DeleteFunc(f.members, func(x *member) bool { return x == m })
}

// open makes the core of a member that has no source.
func (m *member) open() error {
	store, err := m.openStore()
	if err != nil {
		return err
	}
	c := &core{engine: m.family.newEngine(), owner: m.host}
	full := FullInvalidate
	if m.policy.overflows {
		full = FullOverflow
	}
	c.snapshot, err = New(Config{
		Name: m.cow.Name.String(), Origin: m.shared.Origin, COW: m.cow.Device, Store: store, ChunkSize: m.policy.chunk,
		Engine: c.engine, DiscardZeroesCOW: m.policy.zeroes, DiscardPassdownOrigin: m.policy.passdown, OnFull: full,
		Invalidated: func(error) { m.family.ownerOf(c).Event() },
	})
	if err != nil {
		return errors.Join(err, c.engine.Close())
	}
	m.core = c
	return nil
}

// ownerOf is the device that is told of what happens in a core.
func (f *Family) ownerOf(c *core) target.Host {
	f.mu.Lock()
	defer f.mu.Unlock()
	return c.owner
}

// defaultChunk is the chunk size of a new persistent store where none is given.
const defaultChunk = 16 << 10

// openStore opens the store on a COW device; a persistent one is made if the device begins with zeroes.
func (m *member) openStore() (Store, error) {
	p := &m.policy
	if p.kind == 'N' {
		if err := cowstore.CheckNewChunkSize(int64(p.chunk), m.origin.Limits().LogicalBlock, m.cow.Limits().LogicalBlock); err != nil {
			return nil, err
		}
		return cowstore.NewTransient(m.cow.Size(), 0, p.chunk), nil
	}
	_, err := cowstore.ReadHeader(m.cow.Device)
	if errors.Is(err, cowstore.ErrNoStore) {
		chunk := p.chunk
		if chunk == 0 {
			chunk = cowstore.ChunkSize(max(defaultChunk, m.cow.Limits().LogicalBlock))
		}
		p.chunk = 0 // from here on it is the store's
		return persistent(cowstore.CreatePersistent(m.cow.Device, chunk, cowstore.PersistentConfig{}))
	}
	if err != nil {
		return nil, err
	}
	p.chunk = 0
	return persistent(cowstore.OpenPersistent(m.cow.Device, cowstore.PersistentConfig{}))
}

// persistent is a store without the trap of an interface that holds a nil pointer.
func persistent(p *cowstore.Persistent, err error) (Store, error) {
	if err != nil {
		return nil, err
	}
	return p, nil
}

// current is the core, or that of the source.
func (m *member) current() *core {
	m.family.mu.Lock()
	defer m.family.mu.Unlock()
	if m.core == nil && m.source != nil {
		return m.source.core
	}
	return m.core
}

// Preresume takes over what another one has, and makes the snapshot one of its origin's, or the merge.
func (m *member) Preresume() error {
	if err := m.takeOver(); err != nil {
		return err
	}
	c := m.current()
	switch {
	case c == nil: // handed over: it goes on, and fails all I/O
		return nil
	case m.merges && c.merge == nil:
		return m.family.stillness(m.shared, func() error { return m.makeMerge(c) })
	case !m.merges && !c.added:
		return m.family.stillness(m.shared, func() error {
			c.added = true
			return m.shared.Add(c.snapshot)
		})
	}
	return nil
}

// takeOver makes the source's core the member's.
func (m *member) takeOver() error {
	f := m.family
	f.mu.Lock()
	defer f.mu.Unlock()
	source := m.source
	switch {
	case source == nil:
		return nil
	case source.core == nil:
		return fmt.Errorf("the snapshot on %s, whose exceptions it should take over, is gone: %w", m.cow.Name, syscall.EINVAL)
	case !source.suspended && !source.closed:
		return fmt.Errorf("unable to accept exceptions from a snapshot that is not suspended: %w", syscall.EINVAL)
	case source.core.merge != nil && !m.merges:
		return fmt.Errorf("the snapshot on %s is being merged: %w", m.cow.Name, syscall.EINVAL)
	}
	m.core, source.core, m.source = source.core, nil, nil
	m.core.owner = m.host
	m.core.snapshot.discards, m.core.snapshot.passdown = m.policy.zeroes, m.policy.passdown
	return nil
}

// makeMerge makes a merge of a snapshot. The devices over both are still.
func (m *member) makeMerge(c *core) error {
	if c.added {
		m.shared.Remove(c.snapshot)
	}
	merge, err := NewMerge(c.snapshot, MergeConfig{})
	if err != nil {
		if c.added {
			err = errors.Join(err, m.shared.Add(c.snapshot))
		}
		return err
	}
	c.merge, c.added = merge, false
	return nil
}

// Resume lets a merge go on.
func (m *member) Resume() {
	m.setSuspended(false)
	if c := m.current(); c != nil && c.merge != nil {
		c.merge.Start()
	}
}

// Presuspend stops a merge, and lets go what waits for room.
func (m *member) Presuspend() {
	if c := m.current(); c != nil && c.merge != nil {
		c.merge.Stop()
	}
}

// Postsuspend allows a handover.
func (m *member) Postsuspend() { m.setSuspended(true) }

func (m *member) setSuspended(is bool) {
	m.family.mu.Lock()
	defer m.family.mu.Unlock()
	m.suspended = is
}

// Close takes the snapshot out of its origin.
func (m *member) Close() error {
	m.family.mu.Lock()
	m.closed = true
	c := m.core
	m.core = nil
	m.family.mu.Unlock()
	m.family.leave(m)
	defer m.family.release(m.shared, nil)
	if c == nil {
		return nil
	}
	if c.merge != nil {
		c.merge.Stop()
	}
	var err error
	if c.added {
		c.snapshot.Unstall()
		err = m.family.stillness(m.shared, func() error {
			m.shared.Remove(c.snapshot)
			return nil
		})
	}
	return errors.Join(err, c.engine.Close(), c.snapshot.Close())
}
