package clone

import (
	"cowherd/block"
)

// discards is a Clone as the Waker of discards that waited for a region.
type discards Clone

func (d *discards) Wake(r *block.Request) { (*Clone)(d).discard(r) }

// discard takes a discard: the regions that it covers are hydrated from then on, without a copy, and the destination is
// told, unless it was to be left out of it or cannot discard. Parts of regions, and a last region that is shorter, are
// left alone, as in the kernel.
func (c *Clone) discard(r *block.Request) {
	start := Region((r.Offset + c.regionSize - 1) >> c.shift)
	end := Region(r.End() >> c.shift)
	if start >= end {
		r.Complete(nil)
		return
	}
	if t := c.table.Load(); t != nil {
		if c.mode() != ReadWrite {
			if settled, until := t.run(start, end, isSettled); !settled || until < end {
				r.Complete(nil) // a discard is only a hint
				return
			}
		} else if wait, ok := c.forget(t, start, end, r.Queue); !ok {
			c.await(t, wait, r, (*discards)(c))
			return
		}
	}
	if !c.passdown {
		r.Complete(nil)
		return
	}
	c.discardBelow(r, c.offset(start), c.offset(end))
}

// forget settles the regions of [start, end) without a copy. false: somebody else owns the region wait.
func (c *Clone) forget(t *table, start, end Region, queue block.Queue) (wait Region, ok bool) {
	for start < end {
		settled, until := t.run(start, end, isSettled)
		if settled {
			start = until
			continue
		}
		h := c.pool.take(c, t, queue)
		n := h.claim(start, until)
		if n == 0 {
			c.pool.put(h)
			return start, false
		}
		if _, err := h.finish(nil, false); err != nil {
			return start, true // read-only since: the discard is without effect
		}
		start += n
	}
	return start, true
}

// discardBelow discards the bytes [offset, end) of the destination, for r, in pieces that it takes.
func (c *Clone) discardBelow(r *block.Request, offset, end int64) {
	most := c.dest.Limits().DiscardMax >> c.shift << c.shift
	if end-offset <= most {
		r.Offset, r.Length = offset, end-offset
		c.dest.Submit(r)
		return
	}
	f := block.NewFan(r)
	for offset < end {
		n := min(most, end-offset)
		c.dest.Submit(f.Part(offset, n))
		offset += n
	}
	f.Done(nil)
}
