package nbd

import (
	"fmt"

	"cowherd/block"
)

const (
	// extentsMax is the most descriptors that one query takes.
	extentsMax = 4096
	// queryFirst is the range in bytes that the first query asks for, and queryMax the longest that one does. A server
	// looks up all of what it is asked for, which takes long where there are many extents, and who asks may not want to
	// know more than the first of them: so it is asked for more only while it has little to say.
	queryFirst = 64 << 20
	queryMax   = 1 << 30
	// queryFew is how many extents are little.
	queryFew = 64
)

// query is a block status that is asked for.
type query struct {
	offset, length int64
	extents        []descriptor
	told           bool // the server has sent its extents
	done           chan error
}

// descriptor is an extent as the server describes it.
type descriptor struct {
	length int64 // bytes
	state  uint32
}

// assumeData answers q in place of a server that does not know block status.
func (q *query) assumeData() {
	q.extents, q.told = append(q.extents[:0], descriptor{length: q.length}), true
}

// blockStatus asks for the extents from q.offset on. One query runs on a connection at a time; others wait. A server that
// came back without block status is not asked.
func (c *conn) blockStatus(q *query) error {
	c.status <- struct{}{}
	defer func() { <-c.status }()
	q.extents, q.told = q.extents[:0], false
	c.mu.Lock()
	if err := c.cause; err != nil {
		c.mu.Unlock()
		return err
	}
	if !c.export.allocation {
		c.mu.Unlock()
		q.assumeData()
		return nil
	}
	c.inflight++
	s := &c.slots[statusSlot]
	s.loadQuery(q)
	c.enqueueLocked(s)
	start := c.startLocked()
	c.mu.Unlock()
	if start {
		c.kick()
	}
	return <-q.done
}

// Extents calls yield for the extents of [offset, offset+length), as block.ExtentLister says, asking the server for a
// part of them at a time. Without block status all is data. It waits for the server, so it must not be called from a
// completion; yield may call the device.
func (d *Device) Extents(offset, length int64, yield func(block.Extent) bool) error {
	if length <= 0 {
		return nil
	}
	if !d.export.allocation {
		yield(block.Extent{Offset: offset, Length: length})
		return nil
	}
	c := d.conns[int(d.queries.Add(1))%len(d.conns)]
	q, m, most := query{done: make(chan error, 1)}, merger{yield: yield}, int64(queryFirst)
	for at, end := offset, offset+length; at < end; {
		mask := int64(d.export.logicalBlock - 1)
		q.offset = at &^ mask
		q.length = min((end+mask)&^mask-q.offset, d.export.size-q.offset, most)
		if err := c.blockStatus(&q); err != nil {
			return fmt.Errorf("block status of %d bytes at offset %d: %w", q.length, q.offset, err)
		}
		from, told := q.offset, at
		for _, e := range q.extents {
			start, stop := max(from, at), min(from+e.length, end)
			from += e.length
			if start >= stop {
				continue // more than was asked for
			}
			at = stop
			if !m.add(start, stop, e.state) {
				return nil
			}
		}
		if at == told {
			return violationf("extents at offset %d that are smaller than its minimum block", q.offset)
		}
		if len(q.extents) <= queryFew {
			most = min(2*most, queryMax)
		}
	}
	m.flush()
	return nil
}

// merger yields extents, those that follow on each other in the same state as one.
type merger struct {
	yield   func(block.Extent) bool
	pending block.Extent // Length 0: none
}

// add takes the next extent, [start, end). It is false when yield wants no more.
func (m *merger) add(start, end int64, state uint32) bool {
	next := block.Extent{Offset: start, Length: end - start, Hole: state&stateHole != 0, Zero: state&stateZero != 0}
	p := &m.pending
	if p.Length > 0 && p.Hole == next.Hole && p.Zero == next.Zero {
		p.Length += next.Length
		return true
	}
	if p.Length > 0 && !m.yield(*p) {
		return false
	}
	*p = next
	return true
}

// flush yields the last one.
func (m *merger) flush() { m.yield(m.pending) }
