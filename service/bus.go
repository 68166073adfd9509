package service

import (
	"context"
	"io"
	"sync"
	"syscall"
	"time"

	"cowherd/api"
)

// eventsKept is how many events are kept for readers, for all of them together.
const eventsKept = 1024

// bus numbers events and keeps the newest of them. A reader is a position in that sequence and costs nothing while it
// sleeps; one that falls behind what is kept is told how many events it has missed. Publishing never blocks.
type bus struct {
	mu sync.Mutex
	// +checklocks:mu
	kept []api.Event // a ring: event number n is at n % eventsKept
	// +checklocks:mu
	last uint64 // number of the newest event; 0: there was none
	// +checklocks:mu
	changed chan struct{} // closed by the next publish or by close; nil: nobody waits
	// +checklocks:mu
	closed bool
}

func newBus() *bus { return &bus{kept: make([]api.Event, eventsKept)} }

// publish adds e, with its number and time, for everybody to read. After close nothing is added.
func (b *bus) publish(e api.Event) {
	e.Time = time.Now().UTC()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return
	}
	b.last++
	e.Seq = b.last
	b.kept[e.Seq%eventsKept] = e
	b.wakeLocked()
}

// +checklocks:b.mu
func (b *bus) wakeLocked() {
	if b.changed != nil {
		close(b.changed)
		b.changed = nil
	}
}

// close ends all readers once they have read what is kept.
func (b *bus) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.wakeLocked()
}

// newest is the number of the newest event.
func (b *bus) newest() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.last
}

// after is a reader of the events behind number since. EINVAL: there has been no such event.
func (b *bus) after(since uint64) (*eventReader, error) {
	if newest := b.newest(); since > newest {
		return nil, api.Errorf(syscall.EINVAL, "there has been no event %d: the newest is %d", since, newest)
	}
	return &eventReader{bus: b, next: since + 1}, nil
}

// eventReader reads events in order. It is used by one goroutine at a time.
type eventReader struct {
	bus  *bus
	next uint64 // number of the next event to read
}

// eventBatch is how many events a reader copies at a time.
const eventBatch = 64

// read returns the next events, at least one and waiting for it if it must. io.EOF: the bus is closed and all is read.
func (r *eventReader) read(ctx context.Context) ([]api.Event, error) {
	for {
		events, changed := r.take()
		if len(events) > 0 {
			return events, nil
		}
		if changed == nil {
			return nil, io.EOF
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// take returns the next events; if there are none, what is closed when there may be; nil when there will be none.
func (r *eventReader) take() ([]api.Event, <-chan struct{}) {
	b := r.bus
	b.mu.Lock()
	defer b.mu.Unlock()
	if r.next > b.last {
		if b.closed {
			return nil, nil
		}
		if b.changed == nil {
			b.changed = make(chan struct{})
		}
		return nil, b.changed
	}
	var events []api.Event
	if b.last-r.next >= eventsKept {
		oldest := b.last - eventsKept + 1
		events = append(events, api.Event{
			Seq: oldest - 1, Time: b.kept[oldest%eventsKept].Time, Type: api.EventMissed, Missed: oldest - r.next,
		})
		r.next = oldest
	}
	for ; r.next <= b.last && len(events) < eventBatch; r.next++ {
		events = append(events, b.kept[r.next%eventsKept])
	}
	return events, nil
}
