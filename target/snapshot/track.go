package snapshot

import (
	"sync"
	"sync/atomic"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/internal/percpu"
)

// trackedReads are the reads of a snapshot that go to the origin and are in flight (and, in a merge, the writes that go
// to the COW device). They are kept as ranges, in the shard of their queue; a look-up has to visit every shard, but one
// that holds no read costs it a single load of a line that nobody writes.
type trackedReads struct {
	shards percpu.Shards[trackShard]
}

type trackShard struct {
	count atomic.Int32 // reads in the list; changed with mu held, read without
	mu    sync.Mutex
	reads *trackedRead // +checklocks:mu
	free  *trackedRead // +checklocks:mu
}

// trackedRead is one such read, and the Completer that ends it.
type trackedRead struct {
	snapshot   *Snapshot
	shard      *trackShard
	start, end cowstore.Chunk // half-open
	blocked    []*drain       // that wait for this read
	prev, next *trackedRead
	_          percpu.Pad
}

// drain waits for tracked reads: done is called when all of those have ended that were in flight when it was made to
// wait for them. It has one count more while they are counted.
//
//	x.begin()
//	t.block(start, end, x)    for any number of ranges
//	x.end()                   done may be called from here on
type drain struct {
	left atomic.Int32
	done func() // set once
}

func (x *drain) begin() { x.left.Store(1) }

// end counts a read off, or the one who has counted them.
func (x *drain) end() {
	if x.left.Add(-1) == 0 {
		x.done()
	}
}

// begin tracks a read of the chunks [start, end).
func (t *trackedReads) begin(s *Snapshot, queue block.Queue, start, end cowstore.Chunk) *trackedRead {
	shard := t.shards.At(uint(queue))
	shard.mu.Lock()
	n := shard.free
	if n != nil {
		shard.free = n.next
	} else {
		n = &trackedRead{snapshot: s, shard: shard}
	}
	n.start, n.end = start, end
	n.prev, n.next = nil, shard.reads
	if n.next != nil {
		n.next.prev = n
	}
	shard.reads = n
	shard.count.Add(1)
	shard.mu.Unlock()
	return n
}

// finish takes n out; who waited for it alone goes on.
func (n *trackedRead) finish() {
	shard := n.shard
	shard.mu.Lock()
	if n.prev != nil {
		n.prev.next = n.next
	} else {
		shard.reads = n.next
	}
	if n.next != nil {
		n.next.prev = n.prev
	}
	shard.count.Add(-1)
	shard.mu.Unlock()
	// Nobody can find n any more: what it blocks is final.
	for i, x := range n.blocked {
		n.blocked[i] = nil
		x.end()
	}
	n.blocked = n.blocked[:0]
	shard.mu.Lock()
	n.prev, n.next = nil, shard.free
	shard.free = n
	shard.mu.Unlock()
}

// Complete ends a tracked read. The order matters: its data is right if the snapshot was still valid after the I/O
// and before the writes to the origin that waited for it are let through.
func (n *trackedRead) Complete(r *block.Request, err error) {
	if cause := n.snapshot.invalidCause(); cause != nil && err == nil {
		err = n.snapshot.invalidError(r)
	}
	n.finish()
	r.Complete(err)
}

// none tells whether no read is tracked at all.
func (t *trackedReads) none() bool {
	for i := range t.shards.Len() {
		if t.shards.Index(i).count.Load() != 0 {
			return false
		}
	}
	return true
}

// block makes x wait for every tracked read of the chunks [start, end).
func (t *trackedReads) block(start, end cowstore.Chunk, x *drain) {
	for i := range t.shards.Len() {
		shard := t.shards.Index(i)
		if shard.count.Load() == 0 {
			continue
		}
		shard.mu.Lock()
		for n := shard.reads; n != nil; n = n.next {
			if n.start < end && start < n.end {
				n.blocked = append(n.blocked, x)
				x.left.Add(1)
			}
		}
		shard.mu.Unlock()
	}
}
