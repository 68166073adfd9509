package sparse

import "sync/atomic"

// leaf is the leaf that page number i belongs to; nil when none of its pages was ever written.
func (s *Store) leaf(i int64) *leaf {
	if s.flat != nil {
		return s.flat[i>>fanShift].Load()
	}
	high := s.deep[i>>(3*fanShift)].Load()
	if high == nil {
		return nil
	}
	low := high[i>>(2*fanShift)&fanMask].Load()
	if low == nil {
		return nil
	}
	return low[i>>fanShift&fanMask].Load()
}

// nextLeaf is the first page behind page i whose leaf may exist, given that the leaf of page i does not.
func (s *Store) nextLeaf(i int64) int64 {
	shift := fanShift
	if s.deep != nil {
		if high := s.deep[i>>(3*fanShift)].Load(); high == nil {
			shift = 3 * fanShift
		} else if high[i>>(2*fanShift)&fanMask].Load() == nil {
			shift = 2 * fanShift
		}
	}
	return (i>>shift + 1) << shift
}

// page is page number i; nil when it has no memory and reads as zeroes.
func (s *Store) page(i int64) *page {
	l := s.leaf(i)
	if l == nil {
		return nil
	}
	return l[i&fanMask].Load()
}

// writablePage is page number i, made when it is missing. It fails with ErrNoSpace at the limit.
func (s *Store) writablePage(i int64) (*page, error) {
	if p := s.page(i); p != nil {
		return p, nil
	}
	return s.addPage(&s.addLeaf(i)[i&fanMask])
}

// addLeaf is the leaf that page number i belongs to, made when it is missing.
func (s *Store) addLeaf(i int64) *leaf {
	if s.flat != nil {
		return child(&s.flat[i>>fanShift])
	}
	high := child(&s.deep[i>>(3*fanShift)])
	low := child(&high[i>>(2*fanShift)&fanMask])
	return child(&low[i>>fanShift&fanMask])
}

// child is what slot points to, made when it is missing.
func child[T any](slot *atomic.Pointer[T]) *T {
	if t := slot.Load(); t != nil {
		return t
	}
	slot.CompareAndSwap(nil, new(T))
	return slot.Load()
}

// addPage is the page in slot, made when it is missing. The lock makes the limit exact: of two writers of one page
// neither fails because both have taken room for it.
func (s *Store) addPage(slot *atomic.Pointer[page]) (*page, error) {
	if s.limit > 0 && s.isFull() {
		if p := slot.Load(); p != nil {
			return p, nil
		}
		return nil, ErrNoSpace
	}
	fresh := new(page) // cleared outside of the lock; lost when somebody else is faster, which is rare
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := slot.Load(); p != nil {
		return p, nil
	}
	if s.isFullLocked() {
		return nil, ErrNoSpace
	}
	s.allocated += PageSize
	slot.Store(fresh)
	return fresh, nil
}

// isFull tells whether the limit leaves no room for another page.
func (s *Store) isFull() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.isFullLocked()
}

// +checklocks:s.mu
func (s *Store) isFullLocked() bool {
	return s.limit > 0 && s.allocated > s.limit-PageSize
}
