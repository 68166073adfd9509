package clone

import (
	"cowherd/block"
)

// mapRead remaps a read to the destination or the source, or splits it (nil) where its regions lie on different ones.
func (c *Clone) mapRead(r *block.Request, t *table) block.Device {
	if r.Length == 0 {
		return c.dest
	}
	start, end := c.regions(r.Offset, r.Length)
	hydrated, until := t.run(start, end, isHydrated)
	switch {
	case until < end:
		c.readSplit(t, r)
		return nil
	case hydrated:
		return c.dest
	case !c.enterSource(r.Queue):
		return c.dest
	}
	r.Push((*sourceRead)(c))
	c.hydrator.promote(start, end)
	return c.source
}

// readSplit reads several regions in as few pieces as possible.
func (c *Clone) readSplit(t *table, r *block.Request) {
	f := block.NewFan(r)
	for offset, last := r.Offset, r.End(); offset < last; {
		start, limit := c.regions(offset, last-offset)
		_, until := t.run(start, limit, isHydrated)
		end := min(c.end(until), last)
		p := f.Part(offset, end-offset)
		if d := c.mapRead(p, t); d != nil {
			p.Mark(block.StageIssued)
			d.Submit(p)
		}
		offset = end
	}
	f.Done(nil)
}

// enterSource counts a user of the source, until leaveSource; false: the source is not to be used any more, as all is
// hydrated. Who enters counts itself first and looks at the table then; who lets the source go drops the table first and
// sums the counts then: one of the two sees the other.
func (c *Clone) enterSource(queue block.Queue) bool {
	c.sourceUsers.At(uint(queue)).n.Add(1)
	if c.table.Load() != nil {
		return true
	}
	c.leaveSource(queue)
	return false
}

func (c *Clone) leaveSource(queue block.Queue) {
	c.sourceUsers.At(uint(queue)).n.Add(-1)
	if c.table.Load() == nil {
		c.checkDetached()
	}
}

// checkDetached tells, once, that the source is not used any more. The table has been dropped.
func (c *Clone) checkDetached() {
	var n int64
	for i := range c.sourceUsers.Len() {
		n += c.sourceUsers.Index(i).n.Load()
	}
	if n == 0 && c.detached.CompareAndSwap(false, true) {
		c.event(Event{Kind: EventHydrated})
	}
}

// sourceRead is a Clone as the Completer of reads of the source.
type sourceRead Clone

func (x *sourceRead) Complete(r *block.Request, err error) {
	(*Clone)(x).leaveSource(r.Queue)
	r.Complete(err)
}

// extentWindow is the most bytes of the source that one look-up of extents asks about.
const extentWindow = 1 << 30

// Extents are the destination's for regions that are hydrated and the source's for the others; everything is data where
// a device does not know.
func (c *Clone) Extents(offset, length int64, yield func(block.Extent) bool) error {
	for last := offset + length; offset < last; {
		d, end, entered := c.dest, last, false
		if t := c.table.Load(); t != nil {
			start, limit := c.regions(offset, last-offset)
			hydrated, until := t.run(start, limit, isHydrated)
			end = min(c.end(until), last)
			if !hydrated {
				if entered = c.enterSource(0); entered {
					d = c.source
				}
			}
		}
		more := true
		err := extentsOf(d, offset, end-offset, func(x block.Extent) bool {
			more = yield(x)
			return more
		})
		if entered {
			c.leaveSource(0)
		}
		if err != nil || !more {
			return err
		}
		offset = end
	}
	return nil
}

// extentsOf asks d for its extents; a device that does not know has data everywhere.
func extentsOf(d block.Device, offset, length int64, yield func(block.Extent) bool) error {
	if l, ok := d.(block.ExtentLister); ok {
		return l.Extents(offset, length, yield)
	}
	yield(block.Extent{Offset: offset, Length: length})
	return nil
}
