package snapshot

import (
	"cowherd/block"
	"cowherd/cowstore"
)

// mapRead remaps a read of the snapshot, or splits it (nil) where its chunks lie in different places.
func (s *Snapshot) mapRead(r *block.Request) block.Device {
	chunk := s.chunkOf(r.Offset)
	if r.Length == 0 {
		return s.origin.device
	}
	if r.End() > s.chunkSize.Offset(chunk+1) {
		s.readSplit(r)
		return nil
	}
	s.coarse.lock()
	v := s.lookup(chunk)
	s.coarse.unlock()
	if v.readable() {
		r.Offset = s.moveTo(r.Offset, v.chunk())
		return s.cow
	}
	n := s.reads.begin(s, r.Queue, chunk, chunk+1)
	// Only from here on is it certain that a copy which ends now waits for this read.
	if v := s.lookup(chunk); v.readable() {
		n.finish()
		r.Offset = s.moveTo(r.Offset, v.chunk())
		return s.cow
	}
	r.Push(n)
	return s.origin.device
}

// readSplit reads several chunks in as few pieces as possible: neighbours that lie behind one another on the same
// device are one piece.
func (s *Snapshot) readSplit(r *block.Request) {
	start, end := s.chunksOf(r.Offset, r.Length)
	r.Push(s.reads.begin(s, r.Queue, start, end))
	f := block.NewFan(r)
	offset, last := r.Offset, r.End()
	for offset < last {
		run := s.runAt(offset, last)
		p := f.Part(offset, run.end-offset)
		if run.readable {
			p.Offset = s.moveTo(offset, run.to)
			p.Mark(block.StageIssued)
			s.cow.Submit(p)
		} else {
			p.Mark(block.StageIssued)
			s.origin.device.Submit(p)
		}
		offset = run.end
	}
	f.Done(nil)
}

// run is a range of the snapshot that lies in one piece on one device.
type run struct {
	end      int64 // byte of the snapshot behind the run
	readable bool  // it is on the COW device, from chunk to on; else on the origin
	to       cowstore.Chunk
}

// runAt is the run that starts at byte offset, cut at last.
func (s *Snapshot) runAt(offset, last int64) run {
	chunk := s.chunkOf(offset)
	first := s.lookup(chunk)
	x := run{readable: first.readable(), to: first.chunk()}
	for n := cowstore.Chunk(1); ; n++ {
		x.end = min(s.chunkSize.Offset(chunk+n), last)
		if x.end == last {
			return x
		}
		v := s.lookup(chunk + n)
		if v.readable() != x.readable || x.readable && v.chunk() != x.to+n {
			return x
		}
	}
}

// extentWindow is the most bytes that Extents looks at while it holds writes to the origin back.
const extentWindow = 16 << 20

// Extents are those of the snapshot's view: chunks on the COW device are data, elsewhere the origin knows. While the
// origin is asked, the range is tracked like a read, so that the answer cannot mix the frozen view with what is
// written now.
func (s *Snapshot) Extents(offset, length int64, yield func(block.Extent) bool) error {
	var found []block.Extent
	for end := offset + length; offset < end; {
		next := min(end, offset+extentWindow)
		var err error
		if found, err = s.windowExtents(found[:0], offset, next); err != nil {
			return err
		}
		for _, x := range found {
			if !yield(x) {
				return nil
			}
		}
		offset = next
	}
	return nil
}

// windowExtents appends the extents of the bytes [offset, end) to found. The error is EIO when the snapshot is invalid.
func (s *Snapshot) windowExtents(found []block.Extent, offset, end int64) ([]block.Extent, error) {
	start, behind := s.chunksOf(offset, end-offset)
	n := s.reads.begin(s, 0, start, behind)
	defer n.finish()
	for at := offset; at < end; {
		run := s.runAt(at, end)
		if run.readable {
			found = append(found, block.Extent{Offset: at, Length: run.end - at})
		} else {
			err := block.ExtentsOf(s.origin.device, at, run.end-at, func(x block.Extent) bool {
				found = append(found, x)
				return true
			})
			if err != nil {
				return found, err
			}
		}
		at = run.end
	}
	if s.invalidCause() != nil {
		// Writes did not wait: what the origin told may be of today.
		return nil, s.invalidError(&block.Request{Op: block.OpRead, Offset: offset, Length: end - offset})
	}
	return found, nil
}

// Copied calls yield for consecutive ranges that cover [offset, offset+length): which of them are on the COW device.
// It stops when yield returns false.
func (s *Snapshot) Copied(offset, length int64, yield func(offset, length int64, copied bool) bool) {
	for end := offset + length; offset < end; {
		x := s.copiedRun(offset, end)
		if !yield(offset, x.end-offset, x.readable) {
			return
		}
		offset = x.end
	}
}

// copiedRun is the longest range from offset on in which all or no chunks are on the COW device.
func (s *Snapshot) copiedRun(offset, last int64) run {
	x := s.runAt(offset, last)
	for x.end < last {
		more := s.runAt(x.end, last)
		if more.readable != x.readable {
			break
		}
		x.end = more.end
	}
	return x
}
