package cowstore

import (
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"

	"cowherd/block"
	"cowherd/internal/percpu"
)

// batchSize is the most bytes that a queue takes from the store at a time, so that the lock over the whole store is
// taken once for many chunks; a queue takes at least one chunk.
const batchSize = 256 << 10

// Transient allocates the chunks of a COW device for one transient snapshot. All chunks of the device are data: there
// is no header and no table (dm-snap-transient.c). Safe for concurrent use.
//
// Invariants:
//
//  1. Every chunk below next is allocated or lies in exactly one queue's batch.
//  2. No chunk is handed out twice, and none that does not lie wholly on the device and within the limit.
//  3. Space is refused only when no queue's batch holds a chunk: what one queue has taken is never lost to the others.
type Transient struct {
	chunkSize ChunkSize
	// Chunks that may be used: what fits the device and the limit.
	total   Chunk // +checklocksignore: set once.
	sectors block.Sector

	batches percpu.Shards[batch]

	mu sync.Mutex
	// First chunk never given to a batch.
	next Chunk // +checklocks:mu
}

// batch is the run of chunks that one queue allocates from, in one word, so that it is taken from without a lock:
//
//	63              16 15        0
//	| first chunk     | count     |
type batch struct{ word atomic.Uint64 }

// batchCountBits bounds a batch to 65535 chunks, and the store to 2^48.
const (
	batchCountBits = 16
	batchCountMax  = 1<<batchCountBits - 1
	chunksMax      = 1 << (64 - batchCountBits)
)

func packBatch(first Chunk, count int) uint64 { return uint64(first)<<batchCountBits | uint64(count) }

// take removes up to want chunks from the front of the batch; 0: it is empty.
func (b *batch) take(want int) (first Chunk, count int) {
	for {
		old := b.word.Load()
		first, left := Chunk(old>>batchCountBits), int(old&batchCountMax)
		if left == 0 {
			return 0, 0
		}
		count = min(want, left)
		if b.word.CompareAndSwap(old, packBatch(first+Chunk(count), left-count)) {
			return first, count
		}
	}
}

// NewTransient is a store over a COW device of size bytes of which it may use at most limit (0: all).
func NewTransient(size, limit int64, chunkSize ChunkSize) *Transient {
	usable := size
	if limit > 0 {
		usable = min(size, limit)
	}
	return &Transient{
		chunkSize: chunkSize,
		total:     min(chunkSize.ChunkFloor(usable), chunksMax),
		sectors:   block.SectorFloor(usable),
		batches:   percpu.New[batch](),
	}
}

// Allocate reserves a run of consecutive chunks on behalf of queue: at least one, at most want (want > 0). The error
// is ENOSPC when every chunk is taken.
func (t *Transient) Allocate(queue block.Queue, want int) (first Chunk, count int, err error) {
	b := t.batches.At(uint(queue))
	if first, count = b.take(want); count > 0 {
		return first, count, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if first, count = t.refillLocked(b, want); count > 0 {
		return first, count, nil
	}
	for i := range t.batches.Len() {
		if first, count = t.batches.Index(i).take(1); count > 0 {
			return first, count, nil
		}
	}
	return 0, 0, fmt.Errorf("no room: all %d chunks of %d bytes are in use: %w", t.total, t.chunkSize, syscall.ENOSPC)
}

// refillLocked takes up to want chunks for the caller, and more for the batch b if it is still empty.
// +checklocks:t.mu
func (t *Transient) refillLocked(b *batch, want int) (first Chunk, count int) {
	if first, count = b.take(want); count > 0 {
		return first, count // another goroutine of the queue was here first
	}
	left := t.total - t.next
	first, count = t.next, int(min(Chunk(want), left))
	extra := int(min(Chunk(batchSize/int64(t.chunkSize)), left-Chunk(count), batchCountMax))
	t.next += Chunk(count + extra)
	b.word.Store(packBatch(first+Chunk(count), extra)) // empty, and only filled with the lock held
	return first, count
}

// Usage counts sectors as the kernel's status line does: allocated (chunks that hold an exception), total, metadata.
func (t *Transient) Usage() (allocated, total, metadata block.Sector) {
	t.mu.Lock()
	used := t.next
	for i := range t.batches.Len() {
		used -= Chunk(t.batches.Index(i).word.Load() & batchCountMax)
	}
	t.mu.Unlock()
	return block.SectorFloor(t.chunkSize.Offset(used)), t.sectors, 0
}
