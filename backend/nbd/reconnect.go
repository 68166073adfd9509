package nbd

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"syscall"
	"time"

	"cowherd/block"
)

const (
	// The first attempt to connect anew is made at once; before the second there is a pause of about pauseMin, and each
	// is twice as long as the one before, up to pauseMax.
	pauseMin = 10 * time.Millisecond
	pauseMax = time.Second
	// lossesMax is how many connections may be lost while one request is with the server. Then it fails: it may be what
	// the server dies of.
	lossesMax = 16

	// DefaultReconnectTimeout is what a URI gets that does not say how long the server may be away: longer than a
	// restart of a server takes.
	DefaultReconnectTimeout = 30 * time.Second
	// DefaultRequestTimeout is what a URI gets that does not say how long the server may be silent: longer than a disk
	// takes for a flush of what fits in its cache.
	DefaultRequestTimeout = 2 * time.Minute
)

// EventKind is what an Event is about.
type EventKind uint8

// The events of a device.
const (
	ConnectionLost EventKind = iota // it is being made anew
	ConnectionBack                  // what was in flight goes on
	WritesInDoubt                   // acknowledged writes may be gone: a flush has failed, and nothing is written any more
	DeviceFailed                    // all requests fail from here on
)

// String is the kind as it stands in logs.
func (k EventKind) String() string {
	switch k {
	case ConnectionLost:
		return "connection lost"
	case ConnectionBack:
		return "connection back"
	case WritesInDoubt:
		return "writes in doubt"
	case DeviceFailed:
		return "device failed"
	}
	return fmt.Sprintf("event %d", uint8(k))
}

// An Event is a turn in the life of a device's connections.
type Event struct {
	Kind       EventKind
	Connection int           // from 0 on
	Err        error         // the cause; nil for ConnectionBack
	Attempts   int           // of ConnectionBack: how many it took, at least 1
	Away       time.Duration // of ConnectionBack: how long it was lost
	Unflushed  uint64        // of ConnectionLost: writes that were acknowledged and that no flush has covered
}

func (d *Device) tell(e Event) {
	if d.config.OnEvent != nil {
		d.config.OnEvent(e)
	}
}

// Stats are a snapshot of a device's state.
type Stats struct {
	Connections int    // that the device wants
	Live        int    // of them, those that are there
	Reconnects  uint64 // connections made in place of lost ones
	InFlight    int    // requests and block status queries accepted and not completed, those that wait included
	Unflushed   uint64 // writes acknowledged and not known to be durable; counted only where a flush means something
	LastError   error  // why a connection was lost, or could not be made, last; nil: that has not happened
	Failed      error  // why all requests fail; nil: they do not
	Doubt       error  // why nothing is written any more; nil: it is
}

// Stats tells how the device is. It may be called at any time, and looks at one connection after the other.
func (d *Device) Stats() Stats {
	s := Stats{Connections: len(d.conns), Reconnects: d.reconnects.Load(), Unflushed: d.unflushed()}
	for _, c := range d.conns {
		if c.live.Load() {
			s.Live++
		}
		c.mu.Lock()
		s.InFlight += c.inflight
		if s.Failed == nil && c.cause != errClosed {
			s.Failed = c.cause
		}
		c.mu.Unlock()
	}
	if doubt := d.doubt.Load(); doubt != nil {
		s.Doubt = *doubt
	}
	d.mu.Lock()
	s.LastError = d.last
	d.mu.Unlock()
	return s
}

// note keeps the last error for Stats.
func (d *Device) note(err error) {
	d.mu.Lock()
	d.last = err
	d.mu.Unlock()
}

// patience is what a connection remembers of its last losses, so that one that is made and lost again at once does not
// go on for ever.
type patience struct {
	productive bool      // a request has been answered since the stream was made
	made       time.Time // when the stream was
	since      time.Time // when the first of the losses was
	attempts   int       // that were made since
}

// begun tells whether the loss of the stream is the first one: it was of use, or it lasted.
func (p *patience) begun() bool {
	return p.attempts == 0 || p.productive || time.Since(p.made) > pauseMax
}

// reconnect is the reader's: it makes a new stream in place of the one that was lost, and gives it what was in flight.
// It returns why that must not or can not be: the connection ends.
func (c *conn) reconnect(lost error) error {
	d := c.device
	if _, foul := errors.AsType[violation](lost); foul || d.config.ReconnectTimeout == 0 {
		return broken(lost)
	}
	begun := time.Now()
	if c.begun() {
		c.patience = patience{since: begun}
	}
	d.tell(Event{Kind: ConnectionLost, Connection: c.index, Err: lost, Unflushed: d.unflushed()})
	c.mu.Lock()
	out := c.requeueLocked()
	c.mu.Unlock()
	out.send(c)
	deadline := c.since.Add(d.config.ReconnectTimeout)
	ctx, cancel := context.WithDeadline(d.ctx, deadline)
	defer cancel()
	last, attempts := lost, 0
	for pause(ctx, c.attempts, d.pauseMax) {
		c.attempts++
		attempts++
		stream, e, err := dial(ctx, &d.config)
		if err != nil {
			// That time was up is a poor reason if there is another. The clock tells before the context does.
			if attempts == 1 || time.Now().Before(deadline) {
				last = err
				d.note(err)
			}
			continue
		}
		if err := e.replaces(&d.export, len(d.conns)); err != nil {
			hangUp(stream)
			return broken(err)
		}
		if cause := c.resume(stream, e); cause != nil {
			return cause
		}
		d.tell(Event{Kind: ConnectionBack, Connection: c.index, Attempts: attempts, Away: time.Since(begun)})
		c.begin()
		return nil
	}
	c.mu.Lock()
	cause := c.cause
	c.mu.Unlock()
	if cause != nil {
		return cause // the device is closed, or has failed
	}
	return broken(fmt.Errorf("%w; it did not come back in %v (%d attempts), at last: %w",
		lost, d.config.ReconnectTimeout, c.attempts, last))
}

// pause waits before the next attempt, the number of which counts from 0. It is false when ctx ends before.
func pause(ctx context.Context, attempt int, most time.Duration) bool {
	if attempt == 0 {
		return ctx.Err() == nil
	}
	length := min(pauseMin<<min(attempt-1, 16), most)
	timer := time.NewTimer(length/2 + rand.N(length)) // connections that were lost together do not come back together
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// replaces tells whether e can take the place of was in a device of some connections: nil, or what is in the way. What
// has become better does not matter, but for a flush that has become necessary: nobody would make one. Nor does it matter
// that block status has gone: all is data then.
func (e *export) replaces(was *export, connections int) error {
	lacks := was.flags &^ e.flags
	var why string
	switch {
	case e.size != was.size:
		why = fmt.Sprintf("it had %d bytes, and has %d now", was.size, e.size)
	case e.has(flagReadOnly) && !was.has(flagReadOnly):
		why = "it has become read-only"
	case e.logicalBlock > was.logicalBlock:
		why = fmt.Sprintf("its minimum block was %d, and is %d now", was.logicalBlock, e.logicalBlock)
	case e.has(flagFlush) != was.has(flagFlush):
		why = "what is written to it is made durable in another way"
	case lacks&flagFUA != 0 && !e.has(flagFlush):
		why = "it has lost FUA"
	case lacks&flagTrim != 0:
		why = "it has lost trim"
	case lacks&(flagWriteZeroes|flagFastZero) != 0:
		why = "it has lost the writing of zeroes"
	case lacks&flagMultiConn != 0 && connections > 1:
		why = "its connections no longer agree with each other"
	default:
		return nil
	}
	return fmt.Errorf("the server came back with another export: %s: %w", why, syscall.ESTALE)
}

// resume gives the connection a stream whose handshake is done, and queues all that was in flight. It returns why the
// connection is to end instead, and then the stream is closed. begin makes it go.
func (c *conn) resume(stream net.Conn, e export) error {
	c.device.adopt(c)
	c.mu.Lock()
	if cause := c.cause; cause != nil {
		c.mu.Unlock()
		c.live.Store(false)
		hangUp(stream)
		return cause
	}
	c.setStream(stream)
	c.in.Reset((*input)(c))
	c.export, c.held, c.corked, c.silent = e, false, false, 0
	c.up, c.lost = true, nil
	out := c.requeueLocked()
	c.mu.Unlock()
	c.made, c.productive = time.Now(), false
	out.send(c)
	return nil
}

// begin sends what is queued.
func (c *conn) begin() {
	c.mu.Lock()
	start := c.startLocked()
	c.mu.Unlock()
	if start {
		c.kick()
	}
}

// outgoing is what leaves a connection that was lost.
type outgoing struct {
	done    []outcome  // have been through too many losses, or need no answer any more
	flushes block.List // belong to the oldest connection
}

// send sees to all that leaves c, which is lost. A flush comes back if no connection is there.
func (o *outgoing) send(c *conn) {
	for _, done := range o.done {
		done.deliver()
	}
	for r := o.flushes.PopFront(); r != nil; r = o.flushes.PopFront() {
		c.device.pick(int(r.Queue)).submit(r)
	}
}

// requeueLocked makes the queue anew, of all slots that are loaded. The stream is lost and nobody sends.
//
// +checklocks:c.mu
func (c *conn) requeueLocked() (out outgoing) {
	waiting := c.waiting.Take()
	for r := waiting.PopFront(); r != nil; r = waiting.PopFront() {
		if r.Op == block.OpFlush {
			out.flushes.PushBack(r)
			c.inflight--
		} else {
			c.waiting.PushBack(r)
		}
	}
	c.queueAt, c.queueLen = 0, 0
	var leaving []*slot
	for i := range c.slots {
		s := &c.slots[i]
		if s.state == slotFree {
			continue
		}
		if s.state != slotQueued {
			s.losses++
		}
		if s.losses == lossesMax || s.request != nil && s.request.Op == block.OpFlush || s.query != nil && !c.export.allocation {
			leaving = append(leaving, s)
			continue
		}
		s.restart(&c.export)
		c.enqueueLocked(s)
	}
	for _, s := range leaving { // after the others, as the next request gets the slot
		switch {
		case s.losses == lossesMax:
			err := broken(fmt.Errorf("%d times while this request waited for its answer", lossesMax))
			out.done = append(out.done, outcome{s.request, s.query, err})
		case s.query != nil:
			s.query.assumeData()
			out.done = append(out.done, outcome{query: s.query})
		default:
			out.flushes.PushBack(s.request)
		}
		c.releaseLocked(s)
	}
	return out
}
