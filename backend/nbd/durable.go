package nbd

import (
	"errors"
	"fmt"
	"syscall"

	"cowherd/block"
)

// What a flush is worth after a connection was lost. Everything is counted in acknowledgements: of requests that wrote
// without FUA, on all connections together. A flush takes the count when it is loaded; when it is answered all that it
// had counted is covered, if the connection can bear witness to it:
//
//	a connection knows that what was acknowledged since it was made is still there, as its server has not ended, and
//	servers that allow several connections promise that a flush of one covers all (MULTI_CONN)
//	it knows nothing of what was acknowledged before: born is the count when it was made
//	so what a flush is answered on it covers counts only if all up to born was covered before
//
// A connection that is lost takes with it what younger ones know of its acknowledgements: the two may have been with
// different servers, the loss of the older being noticed late. They are born again. Therefore a flush goes over the
// oldest connection there is, and what a lost connection acknowledges is no longer listened to: it is done again.

// Relays have connections of their own, which bear no witness. What they acknowledge is counted, too, unless one of the
// device's connections has been made anew since the relay's was: it may be with another server than the relay's. As both
// happens under Device.mu, that connection is born with what was acknowledged before, and knows nothing of it.

// acked is the count of all connections. What was acknowledged before the call is counted.
func (d *Device) acked() (sum uint64) {
	sum = d.relayed.Load()
	for _, c := range d.conns {
		sum += c.acked.Load()
	}
	return sum
}

// unflushed is how many acknowledgements are not covered.
func (d *Device) unflushed() uint64 {
	covered := d.covered.Load() // before the others, which only grow
	return d.acked() - covered
}

// accountLocked takes note of a request of s that the server has done. It returns why it counts as failed all the same.
//
// +checklocks:c.mu
func (c *conn) accountLocked(s *slot) error {
	d, r := c.device, s.request
	switch {
	case !c.export.has(flagFlush):
	case r.Op == block.OpFlush:
		return d.cover(c, s.acked)
	case r.Op.Writes() && r.Flags&block.FUA == 0:
		c.acked.Store(c.acked.Load() + 1)
	}
	return nil
}

// accountRelay takes note of a write that the server has acknowledged to a relay, which was made after so many
// reconnections. It returns why the write does not count.
func (d *Device) accountRelay(reconnects uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if doubt := d.doubt.Load(); doubt != nil {
		return *doubt
	}
	if d.reconnects.Load() != reconnects {
		return errors.New("a connection to the NBD server was lost meanwhile")
	}
	if d.export.has(flagFlush) {
		d.relayed.Add(1)
	}
	return nil
}

// cover notes a flush that was answered on c.
func (d *Device) cover(c *conn, acked uint64) error {
	for {
		covered := d.covered.Load()
		if born := c.born.Load(); covered < born && !d.config.KeepsWrites {
			return d.distrust(c, born-covered)
		}
		if covered >= acked || d.covered.CompareAndSwap(covered, acked) {
			return nil
		}
	}
}

// distrust ends all writing: count acknowledged requests may be gone.
func (d *Device) distrust(c *conn, count uint64) error {
	err := fmt.Errorf("%d writes that the NBD server acknowledged before a connection was lost had not been flushed, "+
		"and may be gone: %w", count, syscall.EIO)
	d.doubt.CompareAndSwap(nil, &err)
	return *d.doubt.Load()
}

// announce tells of the doubt, once, before the flush that found it fails.
func (d *Device) announce(c *conn) {
	if doubt := d.doubt.Load(); doubt != nil && d.announced.CompareAndSwap(false, true) {
		d.tell(Event{Kind: WritesInDoubt, Connection: c.index, Err: *doubt})
	}
}

// forsake takes note of a loss.
func (d *Device) forsake(c *conn, cause error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last = cause
	c.live.Store(false)
	acked := d.acked()
	for _, younger := range d.conns {
		if younger.live.Load() && younger.age.Load() > c.age.Load() {
			younger.born.Store(acked)
		}
	}
}

// adopt takes note of a new stream of c: it is the youngest.
func (d *Device) adopt(c *conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.age++
	c.age.Store(d.age)
	c.born.Store(d.acked())
	d.reconnects.Add(1) // before anything is sent to it: see conn.submit
	c.live.Store(true)
}

// witness is the connection for a flush: the oldest; c if there is none that is older.
func (d *Device) witness(c *conn) *conn {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, older := range d.conns {
		if older.live.Load() && (!c.live.Load() || older.age.Load() < c.age.Load()) {
			c = older
		}
	}
	return c
}
