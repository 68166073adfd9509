package bench

import (
	"cowherd/block"
	"cowherd/internal/percpu"
)

// ioCount counts requests of one leaf device on one queue.
type ioCount struct {
	Reads, ReadBytes, Writes, WriteBytes, Flushes, Copies, CopyBytes uint64
}

func (c *ioCount) add(o ioCount) {
	c.Reads += o.Reads
	c.ReadBytes += o.ReadBytes
	c.Writes += o.Writes
	c.WriteBytes += o.WriteBytes
	c.Flushes += o.Flushes
	c.Copies += o.Copies
	c.CopyBytes += o.CopyBytes
}

// sub is c less what had been counted before.
func (c ioCount) sub(o ioCount) ioCount {
	return ioCount{
		c.Reads - o.Reads, c.ReadBytes - o.ReadBytes, c.Writes - o.Writes, c.WriteBytes - o.WriteBytes, c.Flushes - o.Flushes,
		c.Copies - o.Copies, c.CopyBytes - o.CopyBytes,
	}
}

// ioCounts are the counters of one leaf device, in shards by queue.
type ioCounts struct {
	role   string
	shards percpu.Shards[ioShard]
}

type ioShard struct{ reads, readBytes, writes, writeBytes, flushes, copies, copyBytes counter }

// total is what has been counted.
func (c *ioCounts) total() ioCount {
	var sum ioCount
	for i := range c.shards.Len() {
		s := c.shards.Index(i)
		sum.add(ioCount{
			s.reads.Load(), s.readBytes.Load(), s.writes.Load(), s.writeBytes.Load(), s.flushes.Load(), s.copies.Load(),
			s.copyBytes.Load(),
		})
	}
	return sum
}

// counting passes everything on to a leaf device, and counts it. What the leaf can do besides it can do as well.
type counting struct {
	block.Device
	counts *ioCounts
}

// counted wraps d. Of the optional powers Lender is found by the type alone, so there are two types.
func (k *kit) counted(role string, d block.Device) block.Device {
	c := &ioCounts{role: role, shards: percpu.New[ioShard]()}
	k.counts = append(k.counts, c)
	if lender, ok := d.(block.Lender); ok {
		return &countingLender{counting{d, c}, lender}
	}
	return &counting{d, c}
}

// Submit counts r and passes it on.
func (d *counting) Submit(r *block.Request) {
	s := d.counts.shards.At(uint(r.Queue))
	switch r.Op {
	case block.OpRead:
		s.reads.Add(1)
		s.readBytes.Add(uint64(r.Length))
	case block.OpWrite, block.OpWriteZeroes:
		s.writes.Add(1)
		s.writeBytes.Add(uint64(r.Length))
	case block.OpFlush:
		s.flushes.Add(1)
	}
	d.Device.Submit(r)
}

// Extents are the leaf's.
func (d *counting) Extents(offset, length int64, yield func(block.Extent) bool) error {
	return block.ExtentsOf(d.Device, offset, length, yield)
}

// CopyOffers are the leaf's for the leaf below the source.
func (d *counting) CopyOffers(source block.Device) []block.CopyOffer {
	if c, ok := d.Device.(block.Copier); ok {
		return c.CopyOffers(uncounted(source))
	}
	return nil
}

// Copy is one call of the leaf.
func (d *counting) Copy(method block.CopyMethod, source block.Device, from, to, length int64) (int64, error) {
	n, err := d.Device.(block.Copier).Copy(method, uncounted(source), from, to, length)
	s := d.counts.shards.At(0)
	s.copies.Add(1)
	s.copyBytes.Add(uint64(n))
	return n, err
}

// uncounted is the leaf behind the counters.
func uncounted(d block.Device) block.Device {
	switch c := d.(type) {
	case *counting:
		return c.Device
	case *countingLender:
		return c.Device
	}
	return d
}

// countingLender is a counting device whose leaf lends its memory: a loan counts as a read.
type countingLender struct {
	counting
	lender block.Lender
}

// Lend shows bytes of the leaf.
func (d *countingLender) Lend(offset, length int64) []byte {
	p := d.lender.Lend(offset, length)
	s := d.counts.shards.At(0)
	s.reads.Add(1)
	s.readBytes.Add(uint64(len(p)))
	return p
}
