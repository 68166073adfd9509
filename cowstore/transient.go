package cowstore

import (
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"

	"cowherd/block"
	"cowherd/internal/percpu"
)

// stripeBytes is what a queue takes from the store at a time.
const stripeBytes = 512 << 10

// StripeBytes is the size in bytes of the stripes in which queues take space, for chunks of the given size: half a
// megabyte, and at least a chunk. Stripe number n belongs to the queue shard n modulo Shards, so that a COW device that
// is itself spread over several files by such stripes gives each queue files of its own.
func StripeBytes(chunkSize ChunkSize) int64 { return max(stripeBytes, int64(chunkSize)) }

// Shards is the number of queue shards of a store, a power of two.
func Shards() int { return percpu.Count() }

// Transient allocates the chunks of a COW device for one transient snapshot. All chunks of the device are data: there
// is no header and no table (dm-snap-transient.c). Safe for concurrent use.
//
// The device is divided in stripes. A queue allocates from a stripe of its own, without a lock; when that is used up it
// takes the next of those that are its own, and when there is none left, what others have.
//
// Invariants:
//
//  1. Every chunk of a stripe that was taken is allocated or lies in exactly one queue's batch.
//  2. No chunk is handed out twice, and none that does not lie wholly on the device and within the limit.
//  3. Space is refused only when there is none: what one queue has taken is never lost to the others.
type Transient struct {
	chunkSize ChunkSize
	// Chunks of a stripe.
	stripe Chunk // +checklocksignore: set once

	batches percpu.Shards[batch] // +checklocksignore: set once
	warning warning

	mu sync.Mutex
	// Chunks that may be used: what fits the device and the limit.
	total Chunk // +checklocks:mu
	// The same in sectors, with what is too little for a chunk.
	sectors block.Sector // +checklocks:mu
	// Chunks of all stripes that were taken.
	given Chunk // +checklocks:mu
	// Ends of taken stripes that were cut off by a total that has grown since.
	ends []chunkRun // +checklocks:mu
}

// batch is the run of chunks that one queue allocates from, in one word, so that it is taken from without a lock:
//
//	63              16 15        0
//	| first chunk     | count     |
type batch struct {
	word atomic.Uint64
	// Stripes of the shard that were taken; guarded by Transient.mu.
	stripes Chunk
}

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
	t := &Transient{
		chunkSize: chunkSize,
		stripe:    min(chunkSize.ChunkFloor(StripeBytes(chunkSize)), batchCountMax),
		batches:   percpu.New[batch](),
	}
	t.mu.Lock()
	t.measureLocked(usable)
	t.mu.Unlock()
	return t
}

// measureLocked takes over how many bytes may be used.
// +checklocks:t.mu
func (t *Transient) measureLocked(usable int64) {
	t.total = min(t.chunkSize.ChunkFloor(usable), chunksMax)
	t.sectors = block.SectorFloor(usable)
	t.warning.measure(uint64(t.total))
}

// Resize lets the store use size bytes of its device, which is that large already. EINVAL: it may use as much or more.
func (t *Transient) Resize(size int64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if size <= t.sectors.Bytes() {
		return fmt.Errorf("resize to %d bytes: the store has %d, and cannot shrink: %w", size, t.sectors.Bytes(), syscall.EINVAL)
	}
	before := t.total
	t.measureLocked(size)
	last := before / t.stripe // the stripe that the old total has cut, if it has
	shards := Chunk(t.batches.Len())
	if end := min((last+1)*t.stripe, t.total); before%t.stripe != 0 && t.batches.Index(int(last%shards)).stripes > last/shards {
		t.ends = append(t.ends, chunkRun{before, end})
	}
	return nil
}

// Warn calls warned, with no lock of callers held, each time that one of the percentages of the room has been given out
// to queues for the first time. To be called before the first Allocate. warned must not block.
func (t *Transient) Warn(percents []int, warned func(percent int)) {
	t.warning.set(percents, warned)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.warning.measure(uint64(t.total))
}

// Allocate reserves a run of consecutive chunks on behalf of queue: at least one, at most want (want > 0). The error
// is ENOSPC when every chunk is taken.
func (t *Transient) Allocate(queue block.Queue, want int) (first Chunk, count int, err error) {
	b := t.batches.At(uint(queue))
	if first, count = b.take(want); count > 0 {
		return first, count, nil
	}
	t.mu.Lock()
	first, count, err = t.refillLocked(b, queue, want)
	given := t.given
	t.mu.Unlock()
	t.warning.check(uint64(given))
	return first, count, err
}

// refillLocked allocates for queue, whose batch b was empty, from a new stripe or from what others have.
// +checklocks:t.mu
func (t *Transient) refillLocked(b *batch, queue block.Queue, want int) (first Chunk, count int, err error) {
	if first, count = b.take(want); count > 0 {
		return first, count, nil // another goroutine of the queue has found a stripe meanwhile
	}
	own := int(queue) & (t.batches.Len() - 1)
	for i := range t.batches.Len() {
		if start, length := t.takeStripeLocked((own + i) % t.batches.Len()); length > 0 {
			count = min(want, int(length))
			b.word.Store(packBatch(start+Chunk(count), int(length)-count)) // it is empty, and filled with the lock held
			return start, count, nil
		}
	}
	if n := len(t.ends); n > 0 {
		end := t.ends[n-1]
		t.ends = t.ends[:n-1]
		t.given += end.end - end.first
		count = min(want, int(end.end-end.first))
		b.word.Store(packBatch(end.first+Chunk(count), int(end.end-end.first)-count))
		return end.first, count, nil
	}
	for i := range t.batches.Len() {
		if first, count = t.batches.Index(i).take(1); count > 0 {
			return first, count, nil
		}
	}
	return 0, 0, fmt.Errorf("no room: all %d chunks of %d bytes are in use: %w", t.total, t.chunkSize, syscall.ENOSPC)
}

// takeStripeLocked takes the next stripe of a shard; length 0: it has none left.
// +checklocks:t.mu
func (t *Transient) takeStripeLocked(shard int) (start, length Chunk) {
	b := t.batches.Index(shard)
	start = (b.stripes*Chunk(t.batches.Len()) + Chunk(shard)) * t.stripe
	if start >= t.total {
		return 0, 0
	}
	b.stripes++
	length = min(t.stripe, t.total-start)
	t.given += length
	return start, length
}

// Usage counts sectors as the kernel's status line does: allocated (chunks that hold an exception), total, metadata.
func (t *Transient) Usage() (allocated, total, metadata block.Sector) {
	t.mu.Lock()
	used, total := t.given, t.sectors
	for i := range t.batches.Len() {
		used -= Chunk(t.batches.Index(i).word.Load() & batchCountMax)
	}
	t.mu.Unlock()
	return block.SectorFloor(t.chunkSize.Offset(used)), total, 0
}
