package snapshot

import (
	"fmt"
	"sync/atomic"
	"syscall"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/internal/invariant"
	"cowherd/kcopyd"
)

// hindrance is why a request cannot even begin to wait for an exception.
type hindrance uint8

const (
	unhindered  hindrance = iota
	noException           // as many as may be are in flight
	undecided             // the snapshot is invalid, but its store does not say so yet
	stalled               // there is no room, and the policy is to wait for some
	refused               // nor is anybody to wait any more
)

// hold keeps a hindered r until it is worth another look, for waker.
func (s *Snapshot) hold(h hindrance, r *block.Request, waker block.Waker) {
	r.Mark(block.StageWaiting)
	switch h {
	case noException:
		s.exceptions.wait(r, waker)
	case undecided:
		s.awaitVerdict(r, waker)
	case stalled:
		s.stall(r, waker)
	case refused:
		r.Complete(s.refusal(r))
	case unhindered:
		invariant.Check(false, "a request is held without a reason")
	}
}

// has tells whether all chunks that r, a write to the origin, touches are known to have been copied. With one lock for all
// exceptions that is nothing to be told without it.
func (s *Snapshot) has(r *block.Request) bool {
	if s.coarse.mu != nil {
		return false
	}
	if r.Offset >= s.size {
		return true
	}
	chunk, end := s.chunksOf(r.Offset, min(r.Length, s.size-r.Offset))
	for chunk < end && s.known.has(chunk) {
		chunk++
	}
	return chunk == end
}

// hasPassage tells whether what is known to have been copied can be looked up from above, for each byte of the origin.
func (s *Snapshot) hasPassage() bool {
	return s.coarse.mu == nil && s.known.covers(s.chunkSize.ChunkCeil(s.origin.Size()))
}

// preserve starts the copies of all chunks that r, a write to the origin, touches and that have no exception. It
// returns a chunk that r must wait for, if there is any left. A hindered r is to be held and mapped anew.
//
// An invalid snapshot starts nothing, but what is pending is still waited for: the copy reads what r would overwrite.
func (s *Snapshot) preserve(r *block.Request) (wait pendingChunk, h hindrance) {
	if r.Offset >= s.size {
		return wait, unhindered
	}
	chunk, end := s.chunksOf(r.Offset, min(r.Length, s.size-r.Offset))
	for chunk < end {
		s.coarse.lock()
		if s.known.has(chunk) {
			s.coarse.unlock()
			chunk++
			continue
		}
		at := s.table.find(chunk)
		var v slot
		if at != nil {
			v = slot(at.Load())
		}
		switch {
		case v.state() == copied:
			s.known.add(chunk)
			s.coarse.unlock()
			chunk++
		case v.state() != none:
			s.coarse.unlock()
			wait = pendingChunk{at, v}
			chunk++
		case s.invalidCause() != nil:
			s.coarse.unlock()
			if !s.verdict.known.Load() {
				return wait, undecided
			}
			chunk++
		default:
			e := s.exceptions.get(r.Queue, chunk)
			if e == nil {
				s.coarse.unlock()
				return wait, noException
			}
			claimed := s.claim(e, at, end)
			s.coarse.unlock()
			if claimed == 0 {
				s.release(e)
				continue // another request was quicker: look again
			}
			switch s.allocate(e, forOrigin) {
			case roomFound:
			case roomLater:
				return wait, stalled
			case roomRefused:
				return wait, refused
			case roomNever:
				continue // the snapshot is invalid now: look again
			}
			count := cowstore.Chunk(e.count)
			r.Mark(block.StageWaiting)
			if p := s.startCopy(e); p.at != nil {
				wait = p
			} else if s.invalidCause() != nil {
				continue // the copy has ended, perhaps with that: look again
			}
			chunk += count
		}
	}
	return wait, unhindered
}

// claim makes e the pending exception of as many chunks as possible from e.from on, up to end and to runMax bytes. at
// is what find gave for e.from. If it gets none the caller releases e.
func (s *Snapshot) claim(e *exception, at *atomic.Uint64, end cowstore.Chunk) int {
	most := max(1, int(runMax>>s.chunkShift))
	v := uint64(pendingSlot(e.index))
	for {
		chunk := e.from + cowstore.Chunk(e.count)
		if at == nil {
			at = s.table.insert(e.queue, chunk)
		}
		if at == nil {
			s.invalidate(fmt.Errorf("the exception table is full: %w", syscall.ENOMEM))
			break
		}
		if !at.CompareAndSwap(uint64(none), v) {
			break
		}
		if e.count == 0 {
			e.head = at
		}
		e.count++
		if e.count == most || chunk+1 == end {
			break
		}
		at = s.table.find(chunk + 1)
	}
	claimed := e.count
	return claimed
}

// allocate finds room for the chunks that e has claimed; those for which there is none in one run are given back. If
// there is none at all, e is idle again and the answer is what the policy makes of that.
func (s *Snapshot) allocate(e *exception, who claimant) room {
	for {
		round := s.full.rounds.Load()
		to, count, err := s.store.Allocate(e.queue, e.count)
		if err == nil {
			s.unclaim(e, count)
			e.to = to
			return roomFound
		}
		if got := s.noRoom(err, who, round); got != roomFound {
			s.abandon(e)
			return got
		}
	}
}

// unclaim gives back the chunks of e behind the first keep. Who waits on e for one of them looks again when e ends.
func (s *Snapshot) unclaim(e *exception, keep int) {
	for i := keep; i < e.count; i++ {
		s.slotAt(e, i).Store(uint64(none))
	}
	e.count = keep
}

// abandon ends e without a result: its chunks have no exception.
func (s *Snapshot) abandon(e *exception) {
	s.unclaim(e, 0)
	s.release(e)
}

// startCopy copies the chunks of e to the COW device. It returns the first of them to wait for, if the copy has not
// ended yet.
func (s *Snapshot) startCopy(e *exception) pendingChunk {
	p := pendingChunk{e.head, pendingSlot(e.index)}
	from := s.chunkSize.Offset(e.from)
	e.job.From = kcopyd.Region{Device: s.origin.device, Offset: from}
	e.job.To = e.dest[:]
	e.job.Length = min(int64(e.count)<<s.chunkShift, s.size-from)
	e.dest[0] = kcopyd.Region{Device: s.cow, Offset: s.chunkSize.Offset(e.to)}
	e.job.Queue = e.queue
	s.engine.Submit(&e.job)
	if p.over() {
		return pendingChunk{}
	}
	return p
}

// copied is the end of the copy.
func (e *exception) copied(j *kcopyd.Job) {
	s := e.snapshot
	if err := j.Err(); err != nil {
		s.invalidate(fmt.Errorf("copy chunk %d: %w", e.from, err))
		s.fail(e)
		return
	}
	if e.overwrite != nil {
		s.overwritten.At(uint(e.queue)).Add(uint64(e.count))
	}
	if s.persistent != nil {
		e.commit.Old, e.commit.New, e.commit.Count, e.commit.Queue = e.from, e.to, e.count, e.queue
		s.persistent.Commit(&e.commit)
		return
	}
	s.publish(e)
}

// publish makes the exceptions visible to readers, and finishes e when no read of the origin is in the way.
func (s *Snapshot) publish(e *exception) {
	s.coarse.lock()
	for i := range e.count {
		to := e.to + cowstore.Chunk(i)
		s.slotAt(e, i).Store(uint64(drainingSlot(e.index, to)))
	}
	s.coarse.unlock()
	if s.reads.none() {
		s.finish(e)
		return
	}
	e.readers.begin()
	s.reads.block(e.from, e.from+cowstore.Chunk(e.count), &e.readers)
	e.readers.end()
}

// slotAt is the slot of e's chunk number i.
func (s *Snapshot) slotAt(e *exception, i int) *atomic.Uint64 {
	at := e.head
	if i > 0 {
		at = s.table.find(e.from + cowstore.Chunk(i))
	}
	if invariant.Enabled {
		v := slot(at.Load())
		invariant.Check((v.state() == pending || v.state() == draining) && v.index() == e.index,
			"chunk %d: slot %#x does not belong to exception %d", e.from+cowstore.Chunk(i), uint64(v), e.index)
	}
	return at
}

// finish lets everybody go on who waited for e.
func (s *Snapshot) finish(e *exception) {
	s.coarse.lock()
	for i := range e.count {
		s.slotAt(e, i).Store(uint64(copiedSlot(e.to + cowstore.Chunk(i))))
		s.known.add(e.from + cowstore.Chunk(i))
	}
	s.coarse.unlock()
	full := e.overwrite
	s.release(e)
	if full != nil {
		full.Complete(nil)
	}
}

// fail ends e after an error; the snapshot is invalid by now. Writes to the origin go on, those to the snapshot find
// that it is invalid.
func (s *Snapshot) fail(e *exception) {
	full := e.overwrite
	s.abandon(e)
	if full != nil {
		full.Complete(s.invalidError(full))
	}
}

// release makes e idle and wakes who waited on it.
func (s *Snapshot) release(e *exception) {
	e.overwrite = nil
	waiting := e.waiters.Take()
	s.exceptions.put(e)
	s.origin.retry.add(waiting)
	s.exceptions.feedStarved() // they came later
}
