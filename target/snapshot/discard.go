package snapshot

import (
	"cowherd/block"
)

// discard takes a discard of the snapshot, with the kernel's rules (snapshot_map, features discard_zeroes_cow and
// discard_passdown_origin):
//
//	a whole chunk on the COW device     is zeroed there
//	a part of one                       is passed to the COW device as a discard
//	a chunk on the origin               stays as it is
//	with discard_passdown_origin        the origin's device is told as well, and no snapshot copies for it
func (s *Snapshot) discard(r *block.Request) {
	f := block.NewFan(r)
	if s.passdown && s.origin.device.Limits().DiscardMax > 0 {
		p := f.Part(r.Offset, r.Length)
		start, end := s.chunksOf(r.Offset, r.Length)
		p.Push(s.reads.begin(s, r.Queue, start, end))
		s.origin.device.Submit(p)
	}
	for offset, last := r.Offset, r.End(); offset < last; {
		chunk := s.chunkOf(offset)
		end := min(s.chunkSize.Offset(chunk+1), last)
		if v := s.lookup(chunk); v.readable() {
			s.discardCOW(f, offset, end, v)
		}
		offset = end
	}
	f.Done(nil)
}

// discardCOW discards the bytes [offset, end), which lie in one chunk that is on the COW device.
func (s *Snapshot) discardCOW(f *block.Fan, offset, end int64, v slot) {
	limits := s.cow.Limits()
	whole := s.covers(s.chunkOf(offset), offset, end)
	if whole && limits.WriteZeroesMax == 0 || !whole && limits.DiscardMax == 0 {
		return // the device has neither: a discard is only a hint
	}
	p := f.Part(offset, end-offset)
	p.Op = block.OpDiscard
	if whole {
		p.Op = block.OpWriteZeroes
	}
	p.Offset = s.moveTo(offset, v.chunk())
	s.cow.Submit(p)
}
