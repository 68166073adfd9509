package clone

import (
	"sync"
	"sync/atomic"

	"cowherd/block"
	"cowherd/internal/percpu"
)

// bucketCount is the number of lists that requests wait in; regions share them by their number.
const bucketCount = 256

// waiting is where requests wait for regions that another owns.
type waiting struct {
	// count is the number of requests in all buckets, so that who settles regions that nobody waits for, as nearly
	// always, looks at nothing else.
	count   atomic.Int64
	buckets [bucketCount]bucket
}

type bucket struct {
	list block.WaitList
	_    [56]byte // a cache line each
}

// await makes r wait for region, for waker; it may be woken at once, and for no reason.
func (c *Clone) await(t *table, region Region, r *block.Request, waker block.Waker) {
	w := &c.waiting
	list := &w.buckets[region%bucketCount].list
	w.count.Add(1)
	r.Mark(block.StageWaiting)
	list.Add(r, waker)
	// Only from here on is it certain that who gives the region back sees r.
	if !t.claimed(region) || c.table.Load() != t {
		c.wakeAll(list)
	}
}

// wakeAll lets all look again that wait in list.
func (c *Clone) wakeAll(list *block.WaitList) {
	if l := list.Take(); l.Len() > 0 {
		c.waiting.count.Add(-int64(l.Len()))
		c.retry.add(l)
	}
}

// wake lets all look again that wait for one of count regions from start on.
func (c *Clone) wake(start, count Region) {
	if c.waiting.count.Load() == 0 {
		return
	}
	for i := range min(count, bucketCount) {
		c.wakeAll(&c.waiting.buckets[(start+i)%bucketCount].list)
	}
}

// failWaiting fails the writes that wait for region, whose copy has failed: each would wait for its own failure, one
// after the other. Others who wait in the same bucket look again.
func (c *Clone) failWaiting(region Region, cause error) {
	if c.waiting.count.Load() == 0 {
		return
	}
	l := c.waiting.buckets[region%bucketCount].list.Take()
	c.waiting.count.Add(-int64(l.Len()))
	var others block.List
	for r := l.PopFront(); r != nil; r = l.PopFront() {
		if r.Op == block.OpDiscard || c.region(r.Offset) != region {
			others.PushBack(r)
			continue
		}
		r.Complete(block.WrapError(r, cause))
	}
	c.retry.add(others)
}

// retry lets requests look again that waited. Waking may start a copy that ends at once and wakes others, and so on
// without end; therefore a request is only queued, and whoever finds its queue's shard idle runs it dry, in a loop. A
// shard is run by one goroutine at a time, so that the depth of the stack is bounded by the number of shards.
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
