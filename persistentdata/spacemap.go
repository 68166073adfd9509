package persistentdata

import (
	"fmt"
	"math/bits"
	"syscall"
)

const (
	indexEntries  = 255
	indexHeader   = 16
	bitmapHeader  = 16
	bitmapEntries = (BlockSize - bitmapHeader) * 4
	manyRefs      = 3 // a counter of two bits says: look it up in the btree
)

// Root is where a space map lies, as a superblock keeps it in 32 bytes.
type Root struct {
	Blocks    uint64 // that the space map covers
	Allocated uint64 // of them
	Index     uint64 // the index block
	RefCounts uint64 // the root of the btree of reference counts
}

// RootBytes is the size of a Root on disk.
const RootBytes = 32

// Put writes the root to p.
func (r Root) Put(p []byte) {
	le.PutUint64(p, r.Blocks)
	le.PutUint64(p[8:], r.Allocated)
	le.PutUint64(p[16:], r.Index)
	le.PutUint64(p[24:], r.RefCounts)
}

// ParseRoot is the root that Put has written to p. Nothing is checked.
func ParseRoot(p []byte) Root {
	return Root{Blocks: le.Uint64(p), Allocated: le.Uint64(p[8:]), Index: le.Uint64(p[16:]), RefCounts: le.Uint64(p[24:])}
}

// bitmaps is the number of bitmap blocks for so many blocks.
func bitmaps(blocks uint64) int { return int((blocks + bitmapEntries - 1) / bitmapEntries) }

// bitmap is a bitmap block in memory: counters of two bits for bitmapEntries blocks, as they lie on disk. Counter i
// is in byte i/4 of what follows the header, at bits 2*(i%4) and up; of the two the lower bit is worth 2.
type bitmap struct {
	place   uint64           // the block on disk; of the last commit, or new
	moved   bool             // place is a block of this transaction
	current *[BlockSize]byte // as it will be
	old     *[BlockSize]byte // as it was committed; nil: it does not differ
	free    int              // counters that are zero now, of all bitmapEntries
}

// counter is counter i of a bitmap block.
func counter(p *[BlockSize]byte, i int) uint32 {
	v := p[bitmapHeader+i/4] >> (2 * (i % 4)) & 3
	return uint32(v&1<<1 | v>>1)
}

// setCounter changes counter i.
func setCounter(p *[BlockSize]byte, i int, v uint32) {
	shift := 2 * (i % 4)
	b := &p[bitmapHeader+i/4]
	*b = *b&^(3<<shift) | byte(v>>1|v&1<<1)<<shift
}

// inUse has, for the 32 counters in word w of a bitmap block, the lower bit of each that is not zero.
func inUse(p *[BlockSize]byte, w int) uint64 {
	x := le.Uint64(p[bitmapHeader+8*w:])
	return (x | x>>1) & lowerBits
}

const lowerBits = 0x5555555555555555

// countFree counts the counters that are zero.
func countFree(p *[BlockSize]byte) int {
	free := bitmapEntries
	for w := range bitmapEntries / 32 {
		free -= bits.OnesCount64(inUse(p, w))
	}
	return free
}

// firstFree is the first counter from i on that is zero; bitmapEntries if there is none.
func firstFree(p *[BlockSize]byte, i int) int {
	for i < bitmapEntries {
		if free := ^inUse(p, i/32) & lowerBits >> (2 * (i % 32)) << (2 * (i % 32)); free != 0 {
			return i/32*32 + bits.TrailingZeros64(free)/2
		}
		i = (i/32 + 1) * 32
	}
	return bitmapEntries
}

// committed is what the last commit has left of a bitmap.
func (b *bitmap) committed() *[BlockSize]byte {
	if b.old != nil {
		return b.old
	}
	return b.current
}

// search finds the first counter from i to end that is zero, now and in the last commit.
func (b *bitmap) search(i, end int) (int, bool) {
	old := b.committed()
	for i < end {
		used := inUse(b.current, i/32) | inUse(old, i/32)
		free := ^used & lowerBits >> (2 * (i % 32)) << (2 * (i % 32))
		if free != 0 {
			i = i/32*32 + bits.TrailingZeros64(free)/2
			return i, i < end
		}
		i = (i/32 + 1) * 32
	}
	return 0, false
}

// spaceMap is a space map in memory, as the transaction that runs has changed it.
type spaceMap struct {
	blocks    uint64
	allocated uint64 // counters that are not zero
	index     uint64 // the index block, of the last commit or new
	moved     bool   // index is a block of this transaction
	changed   bool   // something differs from the last commit
	maps      []bitmap
	// Reference counts from 3 on that this transaction has changed: what goes to the btree. 0: the entry goes.
	many   map[uint64]uint32
	counts Tree   // reference counts from 3 on
	begin  uint64 // below it no block is free for this transaction, but for those that it has given up itself
}

// at is the bitmap of a block and the number of its counter.
func (s *spaceMap) at(n uint64) (*bitmap, int) {
	return &s.maps[n/bitmapEntries], int(n % bitmapEntries)
}

// isNew tells whether block n was taken by this transaction.
func (s *spaceMap) isNew(n uint64) bool {
	b, i := s.at(n)
	return b.old != nil && counter(b.current, i) != 0 && counter(b.old, i) == 0
}

// count is the reference count of block n.
func (s *spaceMap) count(n uint64) (uint32, error) {
	b, i := s.at(n)
	v := counter(b.current, i)
	if v < manyRefs {
		return v, nil
	}
	if many, ok := s.many[n]; ok {
		return many, nil
	}
	v64, ok, err := s.counts.lookup(n)
	if err == nil && (!ok || v64 < manyRefs) {
		err = &CorruptError{Block: n, Kind: KindNode.Name, Rule: RuleRefCount, What: "its count in the btree of reference counts", Want: atLeast,
			Expected: manyRefs, Found: v64}
	}
	return uint32(v64), err
}

// set changes the reference count of block n from old to count.
func (s *spaceMap) set(n uint64, old, count uint32) {
	b, i := s.at(n)
	if b.old == nil {
		before := *b.current
		b.old = &before
	}
	s.changed = true
	setCounter(b.current, i, min(count, manyRefs))
	if old >= manyRefs || count >= manyRefs {
		if count < manyRefs {
			s.many[n] = 0
		} else {
			s.many[n] = count
		}
	}
	switch {
	case old == 0 && count > 0:
		b.free--
		s.allocated++
	case old > 0 && count == 0:
		b.free++
		s.allocated--
	}
}

// take finds a block that is free now and in the last commit, the lowest one, and makes its count 1. ENOSPC: there is
// none.
func (s *spaceMap) take() (uint64, error) {
	n, ok := s.search(s.begin)
	if !ok {
		n, ok = s.search(0)
	}
	if !ok {
		return 0, fmt.Errorf("no free block among the %d of the metadata device, %d of them in use: %w",
			s.blocks, s.allocated, syscall.ENOSPC)
	}
	s.begin = n + 1
	s.set(n, 0, 1)
	return n, nil
}

// search is take without taking, from block n on.
func (s *spaceMap) search(n uint64) (uint64, bool) {
	for i := int(n / bitmapEntries); i < len(s.maps); i++ {
		first := uint64(i) * bitmapEntries
		if s.maps[i].free > 0 {
			at, ok := s.maps[i].search(int(max(n, first)-first), int(min(s.blocks-first, bitmapEntries)))
			if ok {
				return first + uint64(at), true
			}
		}
	}
	return 0, false
}

// add counts one more reference to block n, which is in use, or one fewer.
func (s *spaceMap) add(n uint64, more bool) error {
	count, err := s.count(n)
	switch {
	case err != nil:
		return err
	case more && (count == 0 || count == 1<<32-1), !more && count == 0:
		return &CorruptError{Block: n, Kind: "any kind", Rule: RuleInUse, What: "the reference count of a block that is in use",
			Expected: 1, Found: uint64(count)}
	case more:
		s.set(n, count, count+1)
	default:
		s.set(n, count, count-1)
	}
	return nil
}

// putIndex writes the index block.
func (s *spaceMap) putIndex(p []byte) {
	clear(p)
	for i := range s.maps {
		b := &s.maps[i]
		e := p[indexHeader+16*i:]
		le.PutUint64(e, b.place)
		le.PutUint32(e[8:], uint32(b.free))
		le.PutUint32(e[12:], uint32(firstFree(b.current, 0)))
	}
}

// SpaceMapBlocks is how many blocks a space map takes that covers so many, as long as none is referred to three times.
func SpaceMapBlocks(blocks uint64) uint64 { return 2 + uint64(bitmaps(blocks)) }
