package snapshot

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"cowherd/block"
	"cowherd/internal/percpu"
	"cowherd/kcopyd"
	"cowherd/target"
)

// Origin is the snapshot-origin target: a device that is written while snapshots of it keep what it held. Without
// snapshots it passes everything on.
//
// Snapshots are added and removed only while no request is in flight in the origin nor, for a removal, in the
// snapshot: the mapped devices above are suspended. Adding and removing are safe for concurrent use otherwise.
type Origin struct {
	device    block.Device
	snapshots atomic.Pointer[[]*Snapshot]
	retry     retry

	mu sync.Mutex // serialises changes of snapshots
	// Who is told of the copies for all snapshots.
	watchers []kcopyd.Watcher // +checklocks:mu
	// Makes the passages void that were given out; nil: there are none.
	void *atomic.Bool // +checklocks:mu
}

// NewOrigin makes device an origin. The device stays the caller's, to close when nothing uses it any more.
func NewOrigin(device block.Device) *Origin {
	o := &Origin{device: device, retry: retry{shards: percpu.New[retryShard]()}}
	o.snapshots.Store(new([]*Snapshot))
	return o
}

// Size is the device's, in bytes.
func (o *Origin) Size() int64 { return o.device.Size() }

// writeZeroesMax bounds one write of zeroes, in bytes, so that one request never asks for an unbounded number of
// copies before it may start.
const writeZeroesMax = 32 << 20

// Limits are the device's, with a bound on writes of zeroes.
func (o *Origin) Limits() block.Limits {
	l := o.device.Limits()
	l.WriteZeroesMax = min(l.WriteZeroesMax, writeZeroesMax)
	return l
}

// Extents are the device's; everything is data when it does not know.
func (o *Origin) Extents(offset, length int64, yield func(block.Extent) bool) error {
	return block.ExtentsOf(o.device, offset, length, yield)
}

// Snapshots are the origin's snapshots, the largest chunks first. The slice must not be changed.
func (o *Origin) Snapshots() []*Snapshot { return *o.snapshots.Load() }

// Add makes s a snapshot of the origin as it is now. The origin must be suspended: no write may be in flight.
func (o *Origin) Add(s *Snapshot) error {
	if s.origin != o {
		return fmt.Errorf("snapshot %q belongs to another origin", s.name)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	list := append(slices.Clone(o.Snapshots()), s)
	slices.SortStableFunc(list, func(a, b *Snapshot) int { return int(b.chunkSize - a.chunkSize) })
	o.setLocked(list)
	for _, w := range o.watchers {
		s.Watch(w)
	}
	return nil
}

// Remove takes s out. Both the origin and the snapshot must be suspended.
func (o *Origin) Remove(s *Snapshot) {
	o.mu.Lock()
	defer o.mu.Unlock()
	list := slices.DeleteFunc(slices.Clone(o.Snapshots()), func(x *Snapshot) bool { return x == s })
	o.setLocked(list)
	for _, w := range o.watchers {
		s.Unwatch(w)
	}
}

// Map remaps r to the device below, or takes it (nil) when chunks must be copied first.
//
// A discard is dropped while there are snapshots, as the kernel's origin never passes one on: to copy everything that
// is trimmed would fill the COW devices with what nobody needs.
func (o *Origin) Map(r *block.Request) block.Device {
	snapshots := o.Snapshots()
	if len(snapshots) == 0 || !r.Op.Writes() {
		return o.device
	}
	if r.Op == block.OpDiscard {
		r.Complete(nil)
		return nil
	}
	if !preserved(r, snapshots, o) {
		return nil
	}
	return o.device
}

// Passes tells whether Map would do nothing with r, a read or a write: it is a read, or every snapshot is known to have all
// that it overwrites. What is known to have been copied is no matter of a snapshot any more, be it full, invalid or read:
// preserve asks for nothing else either.
func (o *Origin) Passes(r *block.Request) bool {
	if r.Op == block.OpRead {
		return true
	}
	for _, s := range *o.snapshots.Load() {
		if !s.has(r) {
			return false
		}
	}
	return true
}

// Passage is the device below, and what the snapshot, if there is just one, is known to have.
func (o *Origin) Passage() (below block.Device, sure target.Passage) {
	o.mu.Lock()
	defer o.mu.Unlock()
	list := o.Snapshots()
	if len(list) != 1 || !list[0].hasPassage() {
		return o.device, target.NoPassage()
	}
	s := list[0]
	if o.void == nil {
		o.void = new(atomic.Bool)
	}
	return o.device, target.Passage{Pages: s.known.pages, Shift: s.chunkShift, Void: o.void, Exact: true}
}

// setLocked makes list the snapshots. No passage that was given out before holds any more: should a device above not have
// been suspended, though it takes no requests, it is none the worse for it.
//
// +checklocks:o.mu
func (o *Origin) setLocked(list []*Snapshot) {
	if o.void != nil {
		o.void.Store(true)
		o.void = nil
	}
	o.snapshots.Store(&list)
}

// preserved makes every snapshot keep what r is about to overwrite. All copies are started before the first is waited
// for. false: r waits, and waker is to try anew.
func preserved(r *block.Request, snapshots []*Snapshot, waker block.Waker) bool {
	var wait pendingChunk
	var on *Snapshot
	for _, s := range snapshots {
		p, h := s.preserve(r)
		if h != unhindered {
			s.hold(h, r, waker)
			return false
		}
		if p.at != nil {
			wait, on = p, s
		}
	}
	if on == nil {
		return true
	}
	on.await(wait, r, waker)
	return false
}

// Wake maps a write anew that waited.
func (o *Origin) Wake(r *block.Request) {
	if preserved(r, o.Snapshots(), o) {
		r.Mark(block.StageIssued)
		o.device.Submit(r)
	}
}
