//go:build interop

package interop

import (
	"encoding/binary"
	"fmt"
)

// What follows reads as much of dm-clone's metadata as tells which regions are hydrated, and where its blocks are. It is
// written anew here, from the description of the format and beside package clonemeta, so that one can be held against
// the other.

const (
	metaBlock = 4 * kib
	// Places in the superblock, which is block 0.
	superSpaceMap = 44 + 16 // root of the space map: the number of its index block
	superBitset   = 188     // root of the bitset: the number of a block of a B-tree
	nodeInternal  = 1       // flag of a B-tree's block: its values are blocks of the tree
	nodeHeader    = 32      // bytes of a B-tree's block before the keys
	nodeEntries   = 252     // for which there is room in one whose values have 8 bytes
	arrayHeader   = 24      // bytes of a block of the bitset before its words
	metaDepth     = 8       // of any tree at most
)

// metaImage is the contents of a metadata device.
type metaImage []byte

// block returns block n.
func (m metaImage) block(n uint64) ([]byte, error) {
	if n >= uint64(len(m)/metaBlock) {
		return nil, fmt.Errorf("metadata: block %d is behind the end", n)
	}
	return m[n*metaBlock:][:metaBlock], nil
}

func (m metaImage) word(at int) uint64 { return binary.LittleEndian.Uint64(m[at:]) }

// arrays appends the numbers of the blocks that hold the bitset's words, in order, from the tree at block n.
func (m metaImage) arrays(found []uint64, n uint64, depth int) ([]uint64, error) {
	p, err := m.block(n)
	if err != nil {
		return nil, err
	}
	flags, count := binary.LittleEndian.Uint32(p[4:]), binary.LittleEndian.Uint32(p[16:])
	if count > nodeEntries || depth == 0 {
		return nil, fmt.Errorf("metadata: block %d is no block of a tree", n)
	}
	for i := range count {
		value := binary.LittleEndian.Uint64(p[nodeHeader+8*nodeEntries+8*i:])
		if flags&nodeInternal == 0 {
			found = append(found, value)
		} else if found, err = m.arrays(found, value, depth-1); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// hydratedRegions tells which regions are hydrated according to the metadata.
func hydratedRegions(contents []byte) (isHydrated func(region int64) bool, err error) {
	m := metaImage(contents)
	found, err := m.arrays(nil, m.word(superBitset), metaDepth)
	if err != nil {
		return nil, err
	}
	var words []uint64
	for _, n := range found {
		p, err := m.block(n)
		if err != nil {
			return nil, err
		}
		for i := range binary.LittleEndian.Uint32(p[8:]) {
			words = append(words, binary.LittleEndian.Uint64(p[arrayHeader+8*i:]))
		}
	}
	return func(region int64) bool {
		return region/64 < int64(len(words)) && words[region/64]>>(region%64)&1 == 1
	}, nil
}
