package snapshot

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"syscall"

	"cowherd/block"
	"cowherd/cowstore"
)

// verdict tells whether everybody will learn, after a crash too, that an invalid snapshot is invalid. As long as its
// store does not say so on disk, a write to the origin that it should have preserved must wait: after a crash the store
// would be taken for a valid one, and show what was written. A transient snapshot has no store to be misled by.
type verdict struct {
	known   atomic.Bool // the store says so, or cannot be made to; always for a transient one
	waiting block.WaitList
}

// load fills the table of a new snapshot with what its persistent store holds.
func (s *Snapshot) load() error {
	if !s.persistent.Valid() {
		err := error(fmt.Errorf("its store was made invalid before: %w", syscall.EIO))
		s.cause.Store(&err)
		s.verdict.known.Store(true)
		return nil
	}
	workers := min(runtime.GOMAXPROCS(0), loadWorkersMax)
	l := newTableLoader(s.table, workers)
	if err := s.persistent.LoadTable(s.chunkSize.ChunkCeil(s.size), workers, l); err != nil {
		return err
	}
	return l.finish()
}

// loadWorkersMax bounds the goroutines that fill the table.
const loadWorkersMax = 8

// committed goes on with e when its records are durable, or will never be.
func (e *exception) committed(c *cowstore.Commit) {
	s := e.snapshot
	if c.Err != nil {
		s.invalidate(fmt.Errorf("commit chunk %d: %w", e.from, c.Err))
		s.fail(e)
		return
	}
	s.publish(e)
}

// invalidate makes the snapshot invalid for good; the first cause is kept.
func (s *Snapshot) invalidate(cause error) {
	if !s.cause.CompareAndSwap(nil, &cause) {
		return
	}
	if s.persistent != nil {
		// Should the store not take it, writes to the origin go on all the same: the origin comes first.
		s.persistent.StartInvalidate(func(error) { s.passVerdict() })
	}
	if s.invalidated != nil {
		s.invalidated(cause)
	}
	s.wakeStalled()
}

// invalidCause is nil while the snapshot is valid.
func (s *Snapshot) invalidCause() error {
	if p := s.cause.Load(); p != nil {
		return *p
	}
	return nil
}

// awaitVerdict keeps r until the verdict is known, for waker.
func (s *Snapshot) awaitVerdict(r *block.Request, waker block.Waker) {
	s.verdict.waiting.Add(r, waker)
	if s.verdict.known.Load() {
		s.wakeJudged()
	}
}

// passVerdict lets those go on who waited for it.
func (s *Snapshot) passVerdict() {
	s.verdict.known.Store(true)
	s.wakeJudged()
}

func (s *Snapshot) wakeJudged() {
	if waiting := s.verdict.waiting.Take(); waiting.Len() > 0 {
		s.origin.retry.add(waiting)
	}
}

// Drop makes a persistent store invalid on its device, for good, and returns when that is durable: to be called when
// the snapshot is removed, before the origin goes on without it. It does nothing for a transient one.
func (s *Snapshot) Drop() error {
	if s.persistent == nil {
		return nil
	}
	if err := s.persistent.Invalidate(); err != nil {
		return fmt.Errorf("snapshot %q: %w", s.name, err)
	}
	return nil
}

// Close waits for the snapshot's own I/O on the COW device. It is called when the snapshot is out of its origin, no
// request is in flight in it and its engine is closed. A persistent store stays as it is, to be opened again.
func (s *Snapshot) Close() error {
	s.full.close()
	if s.persistent != nil {
		s.persistent.Wait()
	}
	return nil
}
