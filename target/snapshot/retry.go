package snapshot

import (
	"sync"

	"cowherd/block"
	"cowherd/internal/percpu"
)

// retry maps anew the requests that waited. A request may start a copy that ends at once and wakes others, and so on
// without end; therefore waking only queues a request, and whoever finds its queue's shard idle runs it dry, in a
// loop. A shard is run by one goroutine at a time, so the depth of the stack is bounded by the number of shards. An
// origin and its snapshots share one.
type retry struct {
	shards percpu.Shards[retryShard]
}

type retryShard struct {
	mu   sync.Mutex
	list block.List // +checklocks:mu
	// Somebody runs the list dry.
	running bool // +checklocks:mu
}

// add takes the requests of l and runs them, or leaves them to who is running their shard.
func (x *retry) add(l block.List) {
	for r := l.PopFront(); r != nil; r = l.PopFront() {
		shard := x.shards.At(uint(r.Queue))
		shard.mu.Lock()
		shard.list.PushBack(r)
		idle := !shard.running
		shard.running = true
		shard.mu.Unlock()
		if idle {
			x.drain(shard)
		}
	}
}

// drain runs a shard dry. The caller has set running.
func (x *retry) drain(shard *retryShard) {
	for {
		shard.mu.Lock()
		r := shard.list.PopFront()
		shard.running = r != nil
		shard.mu.Unlock()
		if r == nil {
			return
		}
		r.Wake()
	}
}
