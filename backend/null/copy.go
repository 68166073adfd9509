package null

import (
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"cowherd/block"
	"cowherd/internal/invariant"
	"cowherd/internal/sparse"
)

// ControllerConfig describes a Controller. The limits are NVMe's, in bytes rather than logical blocks; since
// block.Copier copies one range at a time, the number of ranges of a command (MSRC) has no part in it.
type ControllerConfig struct {
	// Method is what the copy command counts as: block.CopyDevice, or block.CopyServer for a remote device whose server
	// copies. 0: CopyDevice.
	Method block.CopyMethod
	// RangeMax is the most that one range may have, in bytes (MSSRL). 0: 1 MiB.
	RangeMax int64
	// CommandMax is the most that one command may copy, in bytes (MCL). 0: RangeMax.
	CommandMax int64
	// Granularity is the unit of offsets and lengths in bytes, a power of two; 0: the logical block of the destination.
	Granularity int64
	// Latency is what a command takes besides the moving of the data.
	Latency time.Duration
	// Bandwidth is how fast data moves within the controller, in bytes a second, for all commands together; 0: at once.
	Bandwidth int64
	// Concurrency is how many commands at a time are said to be of use. 0: 4.
	Concurrency int
	// Faults are for tests.
	Faults CopyFaults
}

// CopyFaults are the ways in which copy commands fail. Commands are counted from 0, over all devices of a controller.
type CopyFaults struct {
	// Absent makes commands from number AbsentFrom on fail with ENOTSUP: from the first on, or in the middle of the work.
	Absent     bool
	AbsentFrom int64
	// ShortMax is the most that a command copies, in bytes; 0: all of it.
	ShortMax int64
	// FailAt and FailLength are a range of the destination, in bytes, that cannot be written: a command that touches it
	// copies what lies before and fails with EIO.
	FailAt, FailLength int64
}

// A Controller moves data between the devices that have it, without the data passing through the caller. It may be shared by
// any number of devices, and is safe for concurrent use.
type Controller struct {
	config   ControllerConfig
	commands atomic.Int64
	bytes    atomic.Int64
	medium   timeline
}

// NewController makes a controller. It fails with EINVAL when a field of the configuration is out of its range.
func NewController(c ControllerConfig) (*Controller, error) {
	if c.Method == 0 {
		c.Method = block.CopyDevice
	}
	if c.RangeMax == 0 {
		c.RangeMax = 1 << 20
	}
	if c.CommandMax == 0 {
		c.CommandMax = c.RangeMax
	}
	if c.Concurrency == 0 {
		c.Concurrency = 4
	}
	lengthMax := min(c.RangeMax, c.CommandMax)
	switch {
	case c.Granularity < 0 || bits.OnesCount64(uint64(c.Granularity)) > 1:
		return nil, fmt.Errorf("copy granularity %d is not a power of two: %w", c.Granularity, syscall.EINVAL)
	case lengthMax < max(c.Granularity, 1):
		return nil, fmt.Errorf("copy limits %d and %d are below the granularity: %w", c.RangeMax, c.CommandMax, syscall.EINVAL)
	case c.Latency < 0 || c.Bandwidth < 0 || c.Concurrency < 1:
		return nil, fmt.Errorf("copy latency %v, bandwidth %d or concurrency %d out of range: %w", c.Latency, c.Bandwidth,
			c.Concurrency, syscall.EINVAL)
	}
	return &Controller{config: c, medium: newTimeline(c.Bandwidth)}, nil
}

// Commands is the number of copy commands that were given, and of the bytes that they copied.
func (c *Controller) Commands() (commands, bytes int64) { return c.commands.Load(), c.bytes.Load() }

// CopyOffers are the copy command, if source is a null device with the same controller. See block.Copier.
func (d *Device) CopyOffers(source block.Device) []block.CopyOffer {
	s, ok := source.(*Device)
	if !ok || d.controller == nil || s.controller != d.controller {
		return nil
	}
	c := &d.controller.config
	unit := c.Granularity
	if unit == 0 {
		unit = int64(max(d.limits.LogicalBlock, s.limits.LogicalBlock))
	}
	lengthMax := min(c.RangeMax, c.CommandMax) &^ (unit - 1)
	if lengthMax == 0 {
		return nil
	}
	return []block.CopyOffer{{Method: c.Method, Granularity: unit, LengthMax: lengthMax, Concurrency: c.Concurrency}}
}

// Copy is one copy command. See block.Copier. Between devices with memory it moves the data.
func (d *Device) Copy(_ block.CopyMethod, source block.Device, from, to, length int64) (int64, error) {
	s, ok := source.(*Device)
	if !ok || d.controller == nil || s.controller != d.controller {
		return 0, syscall.ENOTSUP
	}
	if invariant.Enabled {
		invariant.Check(from >= 0 && to >= 0 && length > 0 && from <= s.size-length && to <= d.size-length,
			"null device: copy of %d bytes from %d to %d", length, from, to)
	}
	c := d.controller
	length, err := c.begin(to, length)
	if length > 0 {
		if err := d.move(s, from, to, length); err != nil {
			return 0, err
		}
	}
	c.medium.pass(length, c.config.Latency)
	c.bytes.Add(length)
	return length, err
}

// begin counts a command and tells how much of it is to be copied, and what it fails with behind that.
func (c *Controller) begin(to, length int64) (int64, error) {
	index := c.commands.Add(1) - 1
	f := &c.config.Faults
	if f.Absent && index >= f.AbsentFrom {
		return 0, syscall.ENOTSUP
	}
	if f.ShortMax > 0 {
		length = min(length, f.ShortMax)
	}
	if f.FailLength > 0 && to < f.FailAt+f.FailLength && to+length > f.FailAt {
		return max(f.FailAt-to, 0), syscall.EIO
	}
	return length, nil
}

// copyBuffers are for moving data between sparse stores.
var copyBuffers = sync.Pool{New: func() any { return new([sparse.PageSize]byte) }}

// move copies between the backing memories.
func (d *Device) move(s *Device, from, to, length int64) error {
	switch {
	case d.store == nil:
		return nil
	case s.store == nil: // it reads as zeroes
		d.store.Discard(to, length)
		return nil
	}
	buffer := copyBuffers.Get().(*[sparse.PageSize]byte)
	defer copyBuffers.Put(buffer)
	for done := int64(0); done < length; {
		p := buffer[:min(length-done, sparse.PageSize)]
		s.store.Read(p, from+done)
		if err := d.store.Write(p, to+done); err != nil {
			return err
		}
		done += int64(len(p))
	}
	return nil
}
