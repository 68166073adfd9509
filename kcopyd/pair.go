package kcopyd

import (
	"fmt"
	"reflect"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"cowherd/block"
)

// pairsMax bounds how many pairs of devices an engine remembers. The oldest is forgotten first: what it had learnt is
// found out again within a few copies.
const pairsMax = 128

const (
	// stuckMost is how many calls in a row may copy nothing before the method counts as absent: a range that is in the page
	// cache, or that overlaps, says nothing about others.
	stuckMost = 8
	// absentFor is for how long a method that was absent is not asked for again: what forbade it (an attribute of a file, a
	// server that was updated) may have gone.
	absentFor = time.Minute
)

// absentErrno is how a device says that it has no such method for the two devices.
const absentErrno = syscall.ENOTSUP

// A pair is a source and a destination, both leaves, and the ways from one to the other.
type pair struct {
	source, target block.Device
	routes         []*route    // the best first; none: read and write
	forgotten      atomic.Bool // it may still be some shard's recent one
}

// A route is one method of offload between two devices.
type route struct {
	copier                 block.Copier
	offer                  block.CopyOffer
	lane                   *lane
	absent                 atomic.Uint32 // a reason: the method is not to be tried until again
	again                  atomic.Int64  // ns of the engine's clock; valid while absent
	stuck                  atomic.Int32  // calls in a row that copied nothing
	sourceSize, targetSize func() int64
	learnt
}

// pairKey finds a pair.
type pairKey struct{ source, target block.Device }

// pairs are the pairs that an engine knows. Look-ups take no lock: the map is replaced as a whole.
type pairs struct {
	core  *core
	known atomic.Pointer[map[pairKey]*pair]

	mu sync.Mutex
	// +checklocks:mu
	order []pairKey // oldest first
	// +checklocks:mu
	lanes map[block.Device]*lane // of the destinations of order
}

// noPair is between devices that cannot be looked up.
var noPair = &pair{}

// find is the pair of two leaves; nil when it is not known yet.
func (t *pairs) find(source, target block.Device) *pair {
	known := t.known.Load()
	if known == nil {
		return nil
	}
	return (*known)[pairKey{source, target}]
}

// between tells whether p is what a job from source to target is for. Most jobs are for the same pair as the one before,
// and a small one would notice a look-up in the map.
func (p *pair) between(source, target block.Device) bool {
	return p.source == source && p.target == target && !p.forgotten.Load()
}

// get is find, but it asks the devices when the pair is not known.
func (t *pairs) get(source, target block.Device) *pair {
	copier, ok := target.(block.Copier)
	if !ok || !reflect.TypeOf(target).Comparable() || !reflect.TypeOf(source).Comparable() {
		return noPair // a key that cannot be compared would panic
	}
	if p := t.find(source, target); p != nil {
		return p
	}
	offers := copier.CopyOffers(source) // may take its time, hence without the lock
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.find(source, target); p != nil {
		return p
	}
	return t.addLocked(source, target, copier, offers)
}

// addLocked remembers a pair.
//
// +checklocks:t.mu
func (t *pairs) addLocked(source, target block.Device, copier block.Copier, offers []block.CopyOffer) *pair {
	p := &pair{source: source, target: target}
	limit := 1
	for _, o := range offers {
		limit = max(limit, o.Concurrency)
	}
	for len(t.order) >= pairsMax {
		t.forgetLocked(t.order[0])
	}
	if t.lanes == nil {
		t.lanes = make(map[block.Device]*lane)
	}
	l := t.lanes[target]
	if l == nil && len(offers) > 0 {
		l = newLane(t.core, limit)
		t.lanes[target] = l
	}
	for _, o := range offers {
		if o.Granularity > 0 && o.Granularity&(o.Granularity-1) == 0 && o.LengthMax >= o.Granularity {
			r := &route{copier: copier, offer: o, lane: l, sourceSize: source.Size, targetSize: target.Size}
			r.learnt.init(target, o)
			p.routes = append(p.routes, r)
		}
	}
	t.order = append(t.order, pairKey{source, target})
	t.publishLocked(func(m map[pairKey]*pair) { m[pairKey{source, target}] = p })
	return p
}

// forgetLocked drops a pair, and the lane of its destination with the last of them. Copies in flight go on.
//
// +checklocks:t.mu
func (t *pairs) forgetLocked(key pairKey) {
	last := true
	kept := t.order[:0]
	for _, k := range t.order {
		if k != key {
			kept = append(kept, k)
			last = last && k.target != key.target
		}
	}
	clear(t.order[len(kept):])
	t.order = kept
	if last {
		delete(t.lanes, key.target)
	}
	if p := t.find(key.source, key.target); p != nil {
		p.forgotten.Store(true)
		for i := range t.core.pool.shards.Len() {
			t.core.pool.shards.Index(i).recent.CompareAndSwap(p, nil) // it keeps the devices in memory
		}
	}
	t.publishLocked(func(m map[pairKey]*pair) { delete(m, key) })
}

// publishLocked replaces the map by one that was changed.
//
// +checklocks:t.mu
func (t *pairs) publishLocked(change func(map[pairKey]*pair)) {
	next := make(map[pairKey]*pair)
	if known := t.known.Load(); known != nil {
		for k, p := range *known {
			next[k] = p
		}
	}
	change(next)
	t.known.Store(&next)
}

// forget drops all pairs of a device, which is about to be closed.
func (t *pairs) forget(d block.Device) {
	if !reflect.TypeOf(d).Comparable() {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := 0; i < len(t.order); {
		if k := t.order[i]; k.source == d || k.target == d {
			t.forgetLocked(k)
		} else {
			i++
		}
	}
}

// list is all pairs, the oldest first.
func (t *pairs) list() []*pair {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := make([]*pair, 0, len(t.order))
	for _, k := range t.order {
		list = append(list, t.find(k.source, k.target))
	}
	return list
}

// usable is the first route by one of the allowed methods that may still work; nil: there is none.
func (p *pair) usable(allowed uint32) *route {
	for _, r := range p.routes {
		if allowed&bit(r.offer.Method) != 0 && (r.absent.Load() == uint32(reasonNone) || r.due()) {
			return r
		}
	}
	return nil
}

// choose picks a route for the part of j that x leads to: the first that fits. The first head bytes of the part must be
// read and written before the route can be taken for the next body bytes. Without a route the reason tells why.
func (p *pair) choose(j *Job, allowed uint32, x *passage) (r *route, head, body int64, why reason) {
	why = reasonNoMethod
	for _, r := range p.routes {
		if allowed&bit(r.offer.Method) == 0 {
			continue
		}
		absent := reason(r.absent.Load())
		if absent != reasonNone && !r.due() {
			why = absent
			continue
		}
		head, body := r.fit(x.source.at, x.target.at, x.length)
		if body == 0 {
			why = reasonAlignment
			continue
		}
		if !j.insists() && !j.prefers(r, x.target.at+head, body) {
			return nil, 0, 0, reasonNone
		}
		if absent != reasonNone && !r.retry() {
			why = absent
			continue
		}
		return r, head, body, reasonNone
	}
	return nil, 0, 0, why
}

// fit tells how much of length bytes the route can take, in one call: body bytes behind the first head bytes.
func (r *route) fit(from, to, length int64) (head, body int64) {
	mask := r.offer.Granularity - 1
	if (from-to)&mask != 0 {
		return 0, 0
	}
	head = -to & mask
	if head >= length {
		return 0, 0
	}
	body = length - head
	ends := r.offer.TailAtEnd && from+length == r.sourceSize() && to+length == r.targetSize()
	if body > r.offer.LengthMax || !ends {
		body = min(body, r.offer.LengthMax) &^ mask
	}
	return head, body
}

// vanish notes that the method is of no use for these devices.
func (r *route) vanish(why reason) {
	r.again.Store(r.lane.core.now() + int64(absentFor)) // before absent, which makes it valid
	r.absent.Store(uint32(why))
}

// due tells whether a method that was absent may be asked for again.
func (r *route) due() bool { return r.lane.core.now() >= r.again.Load() }

// retry lets one caller ask again for a method that is due; the others have to wait for absentFor once more, unless he
// finds that it is there.
func (r *route) retry() bool {
	due := r.again.Load()
	now := r.lane.core.now()
	return now >= due && r.again.CompareAndSwap(due, now+int64(absentFor))
}

// found notes that the method has copied something.
func (r *route) found() {
	if !r.used.Load() {
		r.used.Store(true)
	}
	if r.stuck.Load() != 0 {
		r.stuck.Store(0)
	}
	if r.absent.Load() != uint32(reasonNone) {
		r.absent.Store(uint32(reasonNone))
	}
}

// stall notes that a call has copied nothing.
func (r *route) stall() {
	if r.stuck.Add(1) >= stuckMost {
		r.stuck.Store(0)
		r.vanish(reasonStuck)
	}
}

// nameOf is what a device calls itself.
func nameOf(d block.Device) string {
	if s, ok := d.(fmt.Stringer); ok {
		return s.String()
	}
	return fmt.Sprintf("%T", d)
}
