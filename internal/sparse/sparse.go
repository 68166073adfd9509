// Package sparse keeps a sparse array of bytes in memory: any size up to math.MaxInt64, memory only for what has been
// written.
//
// # Design
//
// The bytes lie in pages of 64 KiB, found through a table of atomic pointers:
//
//	up to 4 TiB     root (a slice as long as the size needs) -> leaf -> page
//	beyond          root -> branch -> branch -> leaf -> page
//
// A leaf or a branch is 1024 pointers, 8 KiB. Look-ups take no lock: two dependent loads for an ordinary size, cache
// hits beside the copy that follows. Pages hold no pointers, so that the garbage collector does not look into them, and
// they are plain Go memory on purpose: the race detector sees every access, so a test that runs under it proves that
// those who share a Store really keep to disjoint ranges.
//
// Invariants:
//
//  1. A page is dropped only by a request that covers it completely (for the last page: up to the end of the store).
//     Whoever writes a part of a page can therefore never lose it to a request for another part.
//  2. A dropped page is never used for another place: whoever still reads it sees bytes of the place it asked for.
//  3. Leaves and branches stay for good. They cost at most 24 KiB for each page that was ever written, 8 bytes when the
//     pages lie densely; the root takes up to 1 MiB from the start.
//
// Lock order: Store.mu is the only lock. It is taken to set and to drop a page, never to look one up.
package sparse

import (
	"sync"
	"sync/atomic"
	"syscall"
)

const (
	pageShift = 16
	pageMask  = PageSize - 1
	// PageSize is the unit in bytes in which memory is taken and given back.
	PageSize = 1 << pageShift

	fanShift = 10
	fanMask  = 1<<fanShift - 1

	// flatMax bounds the root of the short table: 2^16 leaves of 2^10 pages of 2^16 bytes are 4 TiB.
	flatMax = 1 << 16
)

// ErrNoSpace is the error of a write that would need more memory than the limit allows.
const ErrNoSpace = syscall.ENOSPC

type (
	page         [PageSize]byte
	table[T any] [1 << fanShift]atomic.Pointer[T]
	leaf         = table[page]
	lowBranch    = table[leaf]
	highBranch   = table[lowBranch]
)

// A Store is a sparse array of bytes that starts as zeroes. All methods are safe for concurrent use; concurrent
// accesses to the same bytes have no order when one of them writes. Ranges must lie within the size.
type Store struct {
	size  int64 // bytes
	limit int64 // bytes in pages; 0: none

	flat []atomic.Pointer[leaf]       // one for each 64 MiB; nil when deep is used
	deep []atomic.Pointer[highBranch] // one for each 64 TiB

	mu sync.Mutex
	// allocated is the memory of the pages in bytes.
	allocated int64 // +checklocks:mu
}

// New makes a store of size bytes that takes at most limit bytes for its pages (0: no limit).
func New(size, limit int64) *Store {
	s := &Store{size: size, limit: limit}
	if leaves := spans(size, pageShift+fanShift); leaves <= flatMax {
		s.flat = make([]atomic.Pointer[leaf], leaves)
	} else {
		s.deep = make([]atomic.Pointer[highBranch], spans(size, pageShift+3*fanShift))
	}
	return s
}

// spans is the number of spans of 1<<shift bytes that size bytes touch.
func spans(size int64, shift uint) int64 {
	if size == 0 {
		return 0
	}
	return (size-1)>>shift + 1
}

// Size is the store's length in bytes.
func (s *Store) Size() int64 { return s.size }

// Allocated is the memory in bytes that the pages take.
func (s *Store) Allocated() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.allocated
}

// Read fills p from offset.
func (s *Store) Read(p []byte, offset int64) {
	for len(p) > 0 {
		start := int(offset & pageMask)
		count := min(len(p), PageSize-start)
		if from := s.page(offset >> pageShift); from != nil {
			copy(p[:count], from[start:])
		} else {
			clear(p[:count])
		}
		p, offset = p[count:], offset+int64(count)
	}
}

// zeroPage is what is lent where there is no page. Nobody writes to it.
var zeroPage page

// Lend returns the bytes from offset on as they lie in memory, as many of length, at least 1, as are in one page. They are
// not to be written to. A page that is dropped meanwhile stays what it was for who refers to it (invariant 2).
func (s *Store) Lend(offset, length int64) []byte {
	p := s.page(offset >> pageShift)
	if p == nil {
		p = &zeroPage
	}
	start := offset & pageMask
	end := start + min(length, PageSize-start)
	return p[start:end:end]
}

// Write puts p at offset. It fails with ErrNoSpace at the limit; a part may have been written then.
func (s *Store) Write(p []byte, offset int64) error {
	for len(p) > 0 {
		start := int(offset & pageMask)
		count := min(len(p), PageSize-start)
		to, err := s.writablePage(offset >> pageShift)
		if err != nil {
			return err
		}
		copy(to[start:], p[:count])
		p, offset = p[count:], offset+int64(count)
	}
	return nil
}

// Zero makes a range read as zeroes and takes the memory for it, so that later writes there find room. It fails as
// Write does.
func (s *Store) Zero(offset, length int64) error {
	for length > 0 {
		start := offset & pageMask
		count := min(length, PageSize-start)
		to, err := s.writablePage(offset >> pageShift)
		if err != nil {
			return err
		}
		clear(to[start : start+count])
		offset, length = offset+count, length-count
	}
	return nil
}

// Discard makes a range read as zeroes and gives back the pages that it covers completely.
func (s *Store) Discard(offset, length int64) {
	if length <= 0 {
		return
	}
	end := offset + length
	first, last := offset>>pageShift, (end-1)>>pageShift
	for i := first; i <= last; {
		l := s.leaf(i)
		if l == nil {
			i = s.nextLeaf(i)
			continue
		}
		start, stop := int64(0), int64(PageSize)
		if i == first {
			start = offset & pageMask
		}
		if i == last && end < s.size {
			stop = (end-1)&pageMask + 1
		}
		s.discardPart(&l[i&fanMask], start, stop)
		i++
	}
}

// discardPart drops the page in slot when [start, stop) covers it, else clears that part of it.
func (s *Store) discardPart(slot *atomic.Pointer[page], start, stop int64) {
	p := slot.Load()
	if p == nil {
		return
	}
	if start > 0 || stop < PageSize {
		clear(p[start:stop])
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if slot.Swap(nil) != nil {
		s.allocated -= PageSize
	}
}
