package sparse

// Extents calls yield for consecutive ranges that cover [offset, offset+length), in order and without gaps, each as
// long as possible, until yield returns false. hole: the range has no memory and reads as zeroes.
func (s *Store) Extents(offset, length int64, yield func(offset, length int64, hole bool) bool) {
	if length <= 0 {
		return
	}
	end := offset + length
	last := (end - 1) >> pageShift
	for start := offset; start < end; {
		first := start >> pageShift
		next, hole := s.run(first, last)
		stop := end
		if next <= last {
			stop = next << pageShift
		}
		if !yield(start, stop-start, hole) {
			return
		}
		start = stop
	}
}

// run is the state of page first and the first page behind it that is in the other state, or a page behind last.
func (s *Store) run(first, last int64) (next int64, hole bool) {
	next, hole = s.step(first)
	for next <= last {
		after, same := s.step(next)
		if same != hole {
			break
		}
		next = after
	}
	return next, hole
}

// step is the state of page i and the first page behind it that may be in another state.
func (s *Store) step(i int64) (next int64, hole bool) {
	l := s.leaf(i)
	if l == nil {
		return s.nextLeaf(i), true
	}
	return i + 1, l[i&fanMask].Load() == nil
}
