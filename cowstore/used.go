package cowstore

import (
	"maps"
	"math/bits"
	"slices"
)

// ChunkSet is a set of chunks: a bit for each, in pages that appear where chunks lie, so that its memory is bounded by
// what is in it and not by the size of a device. The zero value is empty. Not safe for concurrent use.
type ChunkSet struct {
	pages map[Chunk]*chunkPage
	last  *chunkPage // the page used last, and
	at    Chunk      // its number
}

// chunkPageBits makes a page 64 bytes, so that even chunks that are far apart, as in a damaged table, take a few times
// what their records take on disk.
const chunkPageBits = 1 << 9

type chunkPage [chunkPageBits / 64]uint64

// Add puts c in the set; false: it was there.
func (s *ChunkSet) Add(c Chunk) bool {
	page := s.last
	if n := c / chunkPageBits; page == nil || s.at != n {
		if page = s.pages[n]; page == nil {
			if s.pages == nil {
				s.pages = map[Chunk]*chunkPage{}
			}
			page = new(chunkPage)
			s.pages[n] = page
		}
		s.last, s.at = page, n
	}
	word, bit := &page[c%chunkPageBits/64], uint64(1)<<(c%64)
	if *word&bit != 0 {
		return false
	}
	*word |= bit
	return true
}

// chunkRun is the chunks [first, end).
type chunkRun struct{ first, end Chunk }

// gaps calls yield for the runs of chunks in [first, end) that are not in the set, in ascending order.
func (s *ChunkSet) gaps(first, end Chunk, yield func(chunkRun)) {
	free := first // all chunks from here on to the one looked at are free
	for _, n := range slices.Sorted(maps.Keys(s.pages)) {
		for i, word := range s.pages[n] {
			for ; word != 0; word &= word - 1 {
				c := n*chunkPageBits + Chunk(i*64+bits.TrailingZeros64(word))
				if c >= end {
					break
				}
				if c > free {
					yield(chunkRun{free, c})
				}
				free = max(free, c+1)
			}
		}
	}
	if free < end {
		yield(chunkRun{free, end})
	}
}
