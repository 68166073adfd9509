package cowstore

import (
	"fmt"
	"math/bits"

	"cowherd/block"
)

// Chunk is the number of a chunk, the unit of copy-on-write: on an origin (and its snapshots) it counts chunks of the
// exposed data, on a COW device chunks of the device.
type Chunk uint64

// Limits of the size of a chunk, in bytes: a sector to 2097152 of them, as in the kernel, whose chunks must also be
// multiples of the logical blocks of their devices.
const (
	ChunkSizeMin = block.SectorSize
	ChunkSizeMax = 1 << 30
	// ChunkSizeNewMin is the least for a new snapshot: below a page, records cost more than the copies that they save.
	ChunkSizeNewMin = 4 << 10
)

// ChunkSize is the size of a chunk in bytes: a power of two from ChunkSizeMin to ChunkSizeMax.
type ChunkSize int64

// CheckChunkSize tells whether size may be the chunk size of a snapshot whose devices have the given logical block
// sizes, in bytes; the error says which rule it breaks.
func CheckChunkSize(size int64, logicalBlocks ...int) error {
	switch {
	case bits.OnesCount64(uint64(size)) != 1:
		return fmt.Errorf("chunk size %d is not a power of 2", size)
	case size < ChunkSizeMin:
		return fmt.Errorf("chunk size %d is too low: the least is %d", size, ChunkSizeMin)
	case size > ChunkSizeMax:
		return fmt.Errorf("chunk size %d is too high: the most is %d", size, ChunkSizeMax)
	}
	for _, block := range logicalBlocks {
		if size%int64(block) != 0 {
			return fmt.Errorf("chunk size %d is not a multiple of the logical block size %d", size, block)
		}
	}
	return nil
}

// CheckNewChunkSize is CheckChunkSize for a snapshot that is about to be taken.
func CheckNewChunkSize(size int64, logicalBlocks ...int) error {
	if size >= ChunkSizeMin && size < ChunkSizeNewMin {
		return fmt.Errorf("chunk size %d is too low: the least for a new snapshot is %d", size, ChunkSizeNewMin)
	}
	return CheckChunkSize(size, logicalBlocks...)
}

// Shift is the binary logarithm of the size.
func (c ChunkSize) Shift() uint { return uint(bits.TrailingZeros64(uint64(c))) }

// ChunkFloor is the chunk that holds byte offset.
func (c ChunkSize) ChunkFloor(offset int64) Chunk { return Chunk(offset >> c.Shift()) }

// ChunkCeil is the first chunk that starts at or behind byte offset.
func (c ChunkSize) ChunkCeil(offset int64) Chunk { return Chunk((offset + int64(c) - 1) >> c.Shift()) }

// Offset is the byte at which chunk starts.
func (c ChunkSize) Offset(chunk Chunk) int64 { return int64(chunk) << c.Shift() }
