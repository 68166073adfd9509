package file

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"cowherd/block"
)

// flusher serves all flushes that wait by one fdatasync.
type flusher struct {
	mu      sync.Mutex
	waiting block.List // +checklocks:mu
	// running: there is a goroutine, and it will look at waiting again.
	running bool // +checklocks:mu
}

// flush hands r to the flusher.
func (d *Device) flush(r *block.Request) {
	f := &d.flusher
	f.mu.Lock()
	defer f.mu.Unlock()
	f.waiting.PushBack(r)
	if !f.running {
		f.running = true
		d.queues.Index(0).inflight.Add(1)
		go d.flushAll()
	}
}

// flushAll is the flusher's goroutine: it ends when no flush waits.
func (d *Device) flushAll() {
	for {
		batch := d.flusher.take()
		if batch.Len() == 0 {
			break
		}
		err := d.sync()
		for r := batch.PopFront(); r != nil; r = batch.PopFront() {
			d.finish(d.queues.At(uint(r.Queue)), r, err)
		}
	}
	d.leave(d.queues.Index(0))
}

// take returns the flushes that wait; when there is none, the goroutine no longer counts as running.
func (f *flusher) take() block.List {
	f.mu.Lock()
	defer f.mu.Unlock()
	batch := f.waiting.Take()
	f.running = batch.Len() > 0
	return batch
}

// Sync is a flush on the caller's goroutine, for those who would only wait for it. To have another one make it costs them
// a twentieth of a millisecond or more, which is what a flush takes where little is dirty. It fails as a request would,
// and is not to be called while another flush runs: which of the two the system tells of a failure would be chance.
func (d *Device) Sync() error {
	r, q := &block.Request{Op: block.OpFlush}, d.queues.Index(0)
	if !d.enter(q) {
		return &block.Error{Op: r.Op, Errno: unix.ESHUTDOWN, Err: errClosed}
	}
	defer d.leave(q)
	if err := d.perform(r); err != nil {
		return d.wrap(r, err)
	}
	return nil
}

// sync makes durable what was written before. An error lets the device fail for good.
func (d *Device) sync() error {
	if f := d.failure.Load(); f != nil {
		return f
	}
	if !d.isBlock {
		if err := d.checkEnd(); err != nil {
			return err
		}
	}
	if err := retry(func() error { return d.sys.fdatasync(d.fd) }); err != nil {
		return d.fail(fmt.Errorf("fdatasync: %w", err))
	}
	return nil
}
