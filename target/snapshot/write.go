package snapshot

import (
	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/kcopyd"
)

// Wake maps a write to the snapshot anew that waited.
func (s *Snapshot) Wake(r *block.Request) { s.write(r) }

// write takes a write (or a write of zeroes) to the snapshot.
//
//	several pieces          split: each goes its own way
//	overflowed              fail
//	copied, draining        to the COW device
//	pending                 wait, look again
//	none, chunks covered    claim, write to the COW device in place of a copy
//	none, part of a chunk   claim, copy, wait, look again
//
// When the snapshot is invalid r fails, but not before a copy of its chunk has ended that r may have started: as long
// as I/O runs on the COW device, a request is in flight in the snapshot.
func (s *Snapshot) write(r *block.Request) {
	if r.Length == 0 {
		r.Complete(nil)
		return
	}
	for {
		invalid := s.invalidCause() != nil
		s.coarse.lock()
		end, v := s.uniform(r.Offset, r.End())
		s.coarse.unlock()
		switch {
		case invalid && v.state() != pending:
			r.Complete(s.invalidError(r))
			return
		case s.full.overflowed.Load():
			r.Complete(s.overflowError(r))
			return
		case end < r.End():
			s.writeSplit(r)
			return
		case v.readable():
			r.Offset = s.moveTo(r.Offset, v.chunk())
			r.Mark(block.StageIssued)
			s.cow.Submit(r)
			return
		case v.state() == pending:
			s.await(pendingChunk{s.table.find(s.chunkOf(r.Offset)), v}, r, s)
			return
		default:
			if s.writeNew(r) {
				return
			}
		}
	}
}

// uniform is how far from offset on, at most to last, a write can be handled as one piece, and the slot of its first
// chunk. A piece is a run on the COW device, a run of wholly covered chunks without exceptions, or part of a chunk.
func (s *Snapshot) uniform(offset, last int64) (end int64, first slot) {
	chunk := s.chunkOf(offset)
	first = s.lookup(chunk)
	if first.readable() {
		return s.runAt(offset, last).end, first
	}
	chunkEnd := s.chunkSize.Offset(chunk + 1)
	if first.state() == pending || !s.covers(chunk, offset, last) {
		return min(chunkEnd, last), first
	}
	end = min(chunkEnd, last)
	for most := offset + max(runMax, int64(s.chunkSize)); end < min(last, most); {
		chunk++
		if !s.covers(chunk, end, last) || s.lookup(chunk) != 0 {
			break
		}
		end = min(s.chunkSize.Offset(chunk+1), last)
	}
	return end, first
}

// covers tells whether the bytes [offset, last) hold all of chunk, but for what lies behind the end of the device.
func (s *Snapshot) covers(chunk cowstore.Chunk, offset, last int64) bool {
	start := s.chunkSize.Offset(chunk)
	return offset <= start && last >= min(start+int64(s.chunkSize), s.size)
}

// writeSplit writes each uniform piece of r by itself.
func (s *Snapshot) writeSplit(r *block.Request) {
	f := block.NewFan(r)
	for offset, last := r.Offset, r.End(); offset < last; {
		end, _ := s.uniform(offset, last)
		p := f.Part(offset, end-offset)
		s.write(p)
		offset = end
	}
	f.Done(nil)
}

// writeNew handles a piece whose chunks had no exception. false: r is still the caller's, to look again.
func (s *Snapshot) writeNew(r *block.Request) bool {
	start, end := s.chunksOf(r.Offset, r.Length)
	e := s.exceptions.get(r.Queue, start)
	if e == nil {
		s.hold(noException, r, s)
		return true
	}
	if s.claim(e, s.table.find(start), end) == 0 {
		s.release(e)
		return false
	}
	switch s.allocate(e, forSnapshot) {
	case roomFound:
	case roomLater:
		s.hold(stalled, r, s)
		return true
	case roomRefused:
		s.hold(refused, r, s)
		return true
	case roomNever:
		return false // the snapshot is invalid now, or has overflowed: look again
	}
	if !s.covers(start, r.Offset, r.End()) {
		r.Mark(block.StageWaiting)
		s.startCopy(e)
		return false
	}
	if start+cowstore.Chunk(e.count) < end {
		s.overwriteHead(e, r)
		return true
	}
	s.startOverwrite(e, r)
	return true
}

// overwriteHead writes the chunks of r that e got, and the rest by itself.
func (s *Snapshot) overwriteHead(e *exception, r *block.Request) {
	f := block.NewFan(r)
	middle := s.chunkSize.Offset(e.from + cowstore.Chunk(e.count))
	head, rest := f.Part(r.Offset, middle-r.Offset), f.Part(middle, r.End()-middle)
	s.startOverwrite(e, head)
	s.write(rest)
	f.Done(nil)
}

// startOverwrite writes r, which covers the chunks of e, to the COW device in place of their copies.
func (s *Snapshot) startOverwrite(e *exception, r *block.Request) {
	e.overwrite = r
	r.Offset = s.chunkSize.Offset(e.to)
	r.Push((*overwriting)(e))
	r.Mark(block.StageIssued)
	s.cow.Submit(r)
}

// overwriting is an exception whose chunks the snapshot's own write fills. Like the kernel it goes on by a job without
// I/O, so that with the serialised engine everything that follows runs on the worker.
type overwriting exception

func (o *overwriting) Complete(_ *block.Request, err error) {
	e := (*exception)(o)
	if err != nil {
		e.snapshot.invalidate(err)
		e.snapshot.fail(e)
		return
	}
	e.job.From, e.job.To, e.job.Length, e.job.Queue = kcopyd.Region{}, nil, 0, e.queue
	e.snapshot.engine.Submit(&e.job)
}
