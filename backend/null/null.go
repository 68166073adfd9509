// Package null is a device that drops what is written and reads as zeroes, as null_blk is in the kernel: it measures
// what stands upon it, at sizes up to exabytes, with a completion latency if one is wanted.
//
// # Design
//
// Without a latency a request is completed before Submit returns, on the caller's goroutine, and the device shares
// nothing between CPUs. With one, the data is moved in Submit as well (a read has its zeroes, a write is in the
// backing memory), and the request then waits for its time in a queue:
//
//	Submit     place free: the request enters the queue's ring, due at now + latency
//	           no place:   it waits in the backlog, as a request waits for a tag of a hardware queue
//	goroutine  waits until the oldest request is due (all latencies are equal, so the ring is in order of time),
//	           completes all that are due, and lets one in from the backlog for each
//
// The ring is the device's depth and never grows. The backlog is linked through the requests themselves and takes no
// memory: it is as long as the submitters let it become. Submit never waits for a place in the ring, because a
// completion may submit: the queue's own goroutine would wait for itself.
//
// # Copy command and distance
//
// Devices that share a Controller are filled from each other by a copy command with the limits of NVMe's (copy.go), which
// moves data where there is memory and takes the time it is told. A device with a Link is far away (link.go): its
// requests share the link's bandwidth, reads one direction and writes the other, each direction through rings of its
// own, since only there the times of completion are in order.
//
// Lock order; nothing is called with them held:
//
//	queue.mu
//	    timeline.mu
package null

import (
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"syscall"
	"time"

	"cowherd/block"
	"cowherd/internal/invariant"
	"cowherd/internal/percpu"
	"cowherd/internal/sparse"
)

const (
	defaultLogicalBlock = 512
	logicalBlockMax     = 64 << 10
	defaultDepth        = 1024
	queuesMax           = 1 << 10
	depthMax            = 1 << 20
)

// Config describes a device.
type Config struct {
	// Size is the device's length in bytes, a multiple of LogicalBlock.
	Size int64
	// LogicalBlock is the unit in bytes of all requests, a power of two up to 64 KiB. 0: 512.
	LogicalBlock int
	// MemoryBacked makes the device keep what is written, in sparse memory.
	MemoryBacked bool
	// Latency is the time from Submit to completion. 0: requests are completed inside Submit.
	Latency time.Duration
	// Queues is the number of queues that complete requests when there is a latency, at most 1024; a request goes to
	// the one that its Queue gives modulo Queues. 0: one for each CPU.
	Queues int
	// Depth is the number of requests that one queue works on at a time, at most 1 Mi; the others wait. 0: 1024.
	Depth int
	// Name is what the device is called in counters.
	Name string
	// Controller gives the device a copy command, to be filled from devices with the same controller. nil: none.
	Controller *Controller
	// Link makes the device remote, together with a Latency, which must be given. nil: it is here.
	Link *Link
}

// A Device is a null device. It starts as zeroes.
type Device struct {
	size    int64
	limits  block.Limits
	store   *sparse.Store // nil: nothing is kept
	queues  []*queue      // none without a latency
	reads   []*queue      // where reads go: queues, or with a link others
	running sync.WaitGroup

	name       string
	controller *Controller
}

var (
	_ block.Device       = (*Device)(nil)
	_ block.ExtentLister = (*Device)(nil)
	_ block.Copier       = (*Device)(nil)
	_ block.Immediate    = (*Device)(nil)
)

// New makes a device. It fails with EINVAL when a field of the configuration is out of its range.
func New(c Config) (*Device, error) {
	if err := c.normalize(); err != nil {
		return nil, fmt.Errorf("null device: %w: %w", err, syscall.EINVAL)
	}
	d := &Device{size: c.Size, limits: block.NoLimits(), name: c.Name, controller: c.Controller}
	d.limits.LogicalBlock = c.LogicalBlock
	d.limits.PreferredIO = max(d.limits.PreferredIO, c.LogicalBlock)
	d.limits.DiscardGranularity = int64(c.LogicalBlock)
	if c.MemoryBacked {
		d.store = sparse.New(c.Size, 0)
		d.limits.DiscardGranularity = sparse.PageSize
	}
	if c.Latency > 0 {
		d.startQueues(c)
	}
	return d, nil
}

// startQueues makes the queues of a device with a latency.
func (d *Device) startQueues(c Config) {
	start := func(t *timeline) (queues []*queue) {
		for range c.Queues {
			q := newQueue(c.Latency, c.Depth, t)
			queues = append(queues, q)
			d.running.Go(q.run)
		}
		return queues
	}
	if c.Link == nil {
		d.queues = start(nil)
		d.reads = d.queues
		return
	}
	d.queues, d.reads = start(&c.Link.up), start(&c.Link.down)
}

// String is the device's name.
func (d *Device) String() string { return d.name }

// normalize puts the defaults in and checks the rest.
func (c *Config) normalize() error {
	if c.LogicalBlock == 0 {
		c.LogicalBlock = defaultLogicalBlock
	}
	if c.Queues == 0 {
		c.Queues = percpu.Count()
	}
	if c.Name == "" {
		c.Name = "null"
	}
	if c.Depth == 0 {
		c.Depth = defaultDepth
	}
	switch {
	case c.LogicalBlock < 1 || c.LogicalBlock > logicalBlockMax || bits.OnesCount(uint(c.LogicalBlock)) != 1:
		return fmt.Errorf("logical block %d is not a power of two from 1 to %d", c.LogicalBlock, logicalBlockMax)
	case c.Size < 0 || c.Size%int64(c.LogicalBlock) != 0:
		return fmt.Errorf("size %d is not a multiple of the logical block %d", c.Size, c.LogicalBlock)
	case c.Latency < 0:
		return fmt.Errorf("latency %v is negative", c.Latency)
	case c.Link != nil && c.Latency == 0:
		return errors.New("a link needs a latency, the time of a round trip")
	case c.Queues < 1 || c.Queues > queuesMax:
		return fmt.Errorf("%d queues are not from 1 to %d", c.Queues, queuesMax)
	case c.Depth < 1 || c.Depth > depthMax:
		return fmt.Errorf("depth %d is not from 1 to %d", c.Depth, depthMax)
	}
	return nil
}

// Size is the device's length in bytes.
func (d *Device) Size() int64 { return d.size }

// Limits say that the device takes everything in units of the logical block.
func (d *Device) Limits() block.Limits { return d.limits }

// Submit does r and completes it, after the latency if there is one. It never waits.
func (d *Device) Submit(r *block.Request) {
	if invariant.Enabled {
		err := block.CheckRange(r, d.size, d.limits)
		invariant.Check(err == nil, "null device: %v", err)
	}
	if d.store != nil {
		if err := d.keep(r); err != nil {
			r.Complete(block.WrapError(r, err))
			return
		}
	} else if r.Op == block.OpRead {
		clear(r.Data)
	}
	if len(d.queues) == 0 {
		r.Complete(nil)
		return
	}
	queues := d.queues
	if r.Op == block.OpRead {
		queues = d.reads
	}
	queues[int(r.Queue)%len(queues)].submit(r)
}

// IsImmediate tells whether there is no latency.
func (d *Device) IsImmediate() bool { return len(d.queues) == 0 }

// Perform does r, on a device without a latency.
func (d *Device) Perform(r *block.Request) error {
	if invariant.Enabled {
		err := block.CheckRange(r, d.size, d.limits)
		invariant.Check(err == nil, "null device: %v", err)
	}
	if d.store != nil {
		if err := d.keep(r); err != nil {
			return block.WrapError(r, err)
		}
	} else if r.Op == block.OpRead {
		clear(r.Data)
	}
	return nil
}

// keep does r on the backing memory.
func (d *Device) keep(r *block.Request) error {
	switch r.Op {
	case block.OpRead:
		d.store.Read(r.Data, r.Offset)
	case block.OpWrite:
		return d.store.Write(r.Data, r.Offset)
	case block.OpWriteZeroes:
		if r.Flags&block.NoUnmap != 0 {
			return d.store.Zero(r.Offset, r.Length)
		}
		d.store.Discard(r.Offset, r.Length)
	case block.OpDiscard:
		d.store.Discard(r.Offset, r.Length)
	}
	return nil
}

// Extents tells which ranges of a memory-backed device have been written, in steps of 64 KiB. Without memory all is
// data, so that a copy from a null device costs what a copy costs.
func (d *Device) Extents(offset, length int64, yield func(block.Extent) bool) error {
	if d.store == nil {
		if length > 0 {
			yield(block.Extent{Offset: offset, Length: length})
		}
		return nil
	}
	d.store.Extents(offset, length, func(offset, length int64, hole bool) bool {
		return yield(block.Extent{Offset: offset, Length: length, Hole: hole, Zero: hole})
	})
	return nil
}

// Close waits for the requests in flight and stops the queues' goroutines. It must not be called from a completion.
// With a latency, a request submitted afterwards fails with ESHUTDOWN.
func (d *Device) Close() error {
	for _, q := range d.queues {
		q.close()
	}
	for _, q := range d.reads {
		q.close()
	}
	d.running.Wait()
	return nil
}
