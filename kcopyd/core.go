package kcopyd

import (
	"sync"
	"sync/atomic"
	"time"

	"cowherd/block"
)

// core is what both engines are made of: the buffers, the counters, and what is pooled.
type core struct {
	pool   pool
	driver driver
	splits sync.Pool // of *split
	fans   sync.Pool // of *fan

	epoch     time.Time // what the engine's clock counts from
	floor     int64     // bytes below which OffloadAuto never offloads
	threshold int64     // bytes from which on it does; 0: what is learnt
	methods   uint32    // that OffloadAuto may use, as bits
	inline    bool      // offloads are done by who plans them
	pairs     pairs
	passages  sync.Pool      // of *passage
	lanes     sync.WaitGroup // the goroutines of the lanes

	throttle *Throttle // may be nil
	watchers watchers
	helpers  sync.WaitGroup // goroutines for sub-jobs that have waited

	closing atomic.Bool   // Close wants to know when no job is in flight
	closed  atomic.Bool   // and there was none
	idle    chan struct{} // a job has finished since closing was set; room for one
}

// A driver is an engine as its sub-jobs see it.
type driver interface {
	// resume goes on with s, whose I/O has completed after the goroutine that submitted it left it.
	resume(s *subJob)
	// submitted is the number of jobs that were ever submitted, those that are in flight included.
	submitted() uint64
}

func (c *core) init(config Config, d driver) {
	c.pool.init(config.BufferCeiling)
	c.driver = d
	c.splits.New = func() any { return new(split) }
	c.fans.New = func() any { return new(fan) }
	c.passages.New = func() any { return new(passage) }
	c.idle = make(chan struct{}, 1)
	c.epoch = time.Now()
	c.floor = config.OffloadFloor
	if c.floor == 0 {
		c.floor = offloadFloor
	}
	c.throttle = config.Throttle
	c.threshold = config.OffloadThreshold
	c.methods = bit(block.CopyClone) | bit(block.CopyDevice)
	if config.CopyServer {
		c.methods |= bit(block.CopyServer)
	}
	c.pairs.core = c
}

// now is the engine's clock in ns.
func (c *core) now() int64 { return int64(time.Since(c.epoch)) }

// Forget drops what is known of a device. See Engine.
func (c *core) Forget(d block.Device) { c.pairs.forget(d) }

// inFlight is the number of jobs whose Done has not returned. When it is zero, there was a moment during the call
// when there were none: what has finished is counted before what was submitted.
func (c *core) inFlight() int64 {
	var finished uint64
	for i := range c.pool.shards.Len() {
		finished += c.pool.shards.Index(i).finished.Load()
	}
	return int64(c.driver.submitted() - finished)
}

// drain waits until no job is in flight.
func (c *core) drain() {
	c.closing.Store(true)
	if c.throttle != nil {
		c.throttle.lift(c)
	}
	for c.inFlight() != 0 {
		<-c.idle
	}
	c.closed.Store(true)
	c.wakeCloser() // another call of Close may wait as well
}

// wakeCloser tells drain that a job has finished.
func (c *core) wakeCloser() {
	select {
	case c.idle <- struct{}{}:
	default: // it has been told and has not looked yet
	}
}

// Stats are the engine's counters since it was made.
func (c *core) Stats() Stats {
	var sum tally
	var inUse int64
	for i := range c.pool.shards.Len() {
		sh := c.pool.shards.Index(i)
		sh.mu.Lock()
		sum.add(&sh.counted)
		inUse += sh.inUse
		sh.mu.Unlock()
	}
	c.pool.mu.Lock()
	waiting, waits := c.pool.waiters.count, c.pool.waits
	c.pool.mu.Unlock()
	stats := Stats{
		Jobs:          sum.jobs,
		BytesRead:     sum.bytesRead,
		BytesWritten:  sum.bytesWritten,
		Errors:        sum.errors,
		BuffersInUse:  inUse,
		JobsWaiting:   int64(waiting),
		BufferWaits:   waits,
		JobsInFlight:  c.inFlight(),
		BufferCeiling: c.pool.ceiling,
	}
	c.detail(&stats)
	return stats
}
