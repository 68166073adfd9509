package snapshot

import (
	"cowherd/cowstore"
)

// A slot is what the exception table knows of one chunk, in one word:
//
//	63                         16 15            2 1    0
//	| COW chunk (48 bits)        | exception (14) | state |
//
// The exception is the index of the pending one (pending and draining); the COW chunk is valid in draining and copied.
type slot uint64

type slotState uint8

const (
	none slotState = iota
	pending
	draining
	copied
)

const (
	slotIndexBits = 14
	slotIndexMax  = 1<<slotIndexBits - 1
	slotChunkBits = 64 - 2 - slotIndexBits
)

func pendingSlot(index uint32) slot { return slot(index)<<2 | slot(pending) }

func drainingSlot(index uint32, to cowstore.Chunk) slot {
	return slot(to)<<(64-slotChunkBits) | slot(index)<<2 | slot(draining)
}

func copiedSlot(to cowstore.Chunk) slot { return slot(to)<<(64-slotChunkBits) | slot(copied) }

func (s slot) state() slotState { return slotState(s & 3) }

// readable tells whether the chunk's frozen data (and later writes to the snapshot) are found on the COW device.
func (s slot) readable() bool { return s.state() >= draining }

// index is that of the exception, for pending and draining.
func (s slot) index() uint32 { return uint32(s>>2) & slotIndexMax }

// chunk is the place on the COW device, for draining and copied.
func (s slot) chunk() cowstore.Chunk { return cowstore.Chunk(s >> (64 - slotChunkBits)) }
