package clone

import (
	"syscall"

	"cowherd/block"
	"cowherd/kcopyd"
)

// writes is a Clone as the Waker of writes that waited for a region.
type writes Clone

func (w *writes) Wake(r *block.Request) { (*Clone)(w).write(r) }

// mapWrite remaps a write to the destination, or takes it (nil).
func (c *Clone) mapWrite(r *block.Request, t *table) block.Device {
	if r.Flags&(block.FUA|block.Fast) == 0 {
		if r.Length == 0 {
			return c.dest
		}
		start, end := c.regions(r.Offset, r.Length)
		if settled, until := t.run(start, end, isSettled); settled && until == end {
			return c.dest
		}
	}
	c.write(r)
	return nil
}

// write takes a write, or a write of zeroes.
//
//	several pieces             split: each goes its own way
//	settled                    to the destination
//	whole regions              claim, write to the destination in place of a copy
//	part of a region           claim, copy, write to the destination
//	claimed by another         wait, look again
func (c *Clone) write(r *block.Request) {
	if r.Length == 0 {
		r.Complete(nil)
		return
	}
	t := c.table.Load()
	if t == nil {
		c.writeSettled(t, r)
		return
	}
	if c.mode() == Fail {
		r.Complete(block.WrapError(r, c.modeError()))
		return
	}
	end, state := c.uniform(t, r.Offset, r.End())
	switch {
	case end < r.End():
		c.writeSplit(t, r)
	case state == settledPiece:
		c.writeSettled(t, r)
	case c.mode() != ReadWrite:
		r.Complete(block.WrapError(r, c.modeError()))
	case r.Flags&block.Fast != 0 && state == partPiece:
		r.Complete(block.NewError(r, syscall.ENOTSUP, "a region must be copied first"))
	default:
		c.writeNew(t, r, state)
	}
}

// piece is what can be done with a range in one go.
type piece uint8

const (
	settledPiece piece = iota // of settled regions
	wholePiece                // of regions that are not, all of which are covered
	partPiece                 // a part of one region that is not
)

// uniform is how far from offset on, at most to last, a write can be handled as one piece.
func (c *Clone) uniform(t *table, offset, last int64) (end int64, p piece) {
	start, limit := c.regions(offset, last-offset)
	settled, until := t.run(start, limit, isSettled)
	if settled {
		return min(c.end(until), last), settledPiece
	}
	if c.covers(start, offset, last) {
		if until == limit && !c.covers(until-1, offset, last) {
			until--
		}
		return c.end(until), wholePiece
	}
	return min(c.end(start+1), last), partPiece
}

// covers tells whether the bytes [offset, last) hold all of region. The last region may be shorter than the others: the
// kernel copies it even before a write that covers it.
func (c *Clone) covers(region Region, offset, last int64) bool {
	return offset <= c.offset(region) && last >= c.end(region+1)
}

// writeSplit writes each piece of r by itself.
func (c *Clone) writeSplit(t *table, r *block.Request) {
	f := block.NewFan(r)
	for offset, last := r.Offset, r.End(); offset < last; {
		end, _ := c.uniform(t, offset, last)
		p := f.Part(offset, end-offset)
		c.write(p)
		offset = end
	}
	f.Done(nil)
}

// writeNew handles a piece of regions that are not settled.
func (c *Clone) writeNew(t *table, r *block.Request, state piece) {
	start, end := c.regions(r.Offset, r.Length)
	h := c.pool.take(c, t, r.Queue)
	if h.claim(start, end) == 0 {
		c.pool.put(h)
		c.await(t, start, r, (*writes)(c))
		return
	}
	if c.table.Load() != t {
		// The transaction was aborted meanwhile.
		count := h.count
		t.unclaim(start, count)
		c.pool.put(h)
		c.wake(start, count)
		c.write(r)
		return
	}
	switch {
	case state == partPiece:
		h.request = r
		r.Mark(block.StageWaiting)
		h.copy(kcopyd.CopyOnWrite, false)
	case h.count < end-start:
		middle := c.offset(start + h.count)
		f := block.NewFan(r)
		head, rest := f.Part(r.Offset, middle-r.Offset), f.Part(middle, r.End()-middle)
		c.overwrite(h, head)
		c.write(rest)
		f.Done(nil)
	default:
		c.overwrite(h, r)
	}
}

// overwrite writes r, which covers the regions of h, to the destination in place of their copies.
func (c *Clone) overwrite(h *hydration, r *block.Request) {
	h.request = r
	c.commitAfter(r)
	r.Push((*overwriting)(h))
	r.Mark(block.StageIssued)
	c.dest.Submit(r)
}

// writeSettled writes r to regions that are all settled in t; nil: everything is hydrated.
func (c *Clone) writeSettled(t *table, r *block.Request) {
	if r.Flags&block.FUA != 0 && !c.durable(t) {
		c.commitAfter(r)
	}
	r.Mark(block.StageIssued)
	c.dest.Submit(r)
}

// commitAfter makes a write with FUA, to a region that may not be committed, end with a commit, whose flush covers it.
func (c *Clone) commitAfter(r *block.Request) {
	if r.Flags&block.FUA != 0 {
		r.Flags &^= block.FUA
		r.Push((*committing)(c))
	}
}

// committing is a Clone as the Completer of writes that end with a commit.
type committing Clone

func (x *committing) Complete(r *block.Request, err error) {
	if err != nil {
		r.Complete(err)
		return
	}
	(*Clone)(x).committer.add(r)
}
