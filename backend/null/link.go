package null

import (
	"fmt"
	"sync"
	"syscall"
	"time"
)

// A Link is the network before a simulated remote device: each direction has its bandwidth, which all requests of all
// devices on the link share. Together with Config.Latency, the time of a round trip, it makes a null device remote; a
// Controller with block.CopyServer is a server that copies by itself, whose data does not cross the link.
type Link struct {
	up   timeline // to the device: writes
	down timeline // from it: reads
}

// NewLink makes a link of the given bandwidth for each direction, in bytes a second, at least 1.
func NewLink(bandwidth int64) (*Link, error) {
	if bandwidth < 1 {
		return nil, fmt.Errorf("bandwidth %d of a link is not positive: %w", bandwidth, syscall.EINVAL)
	}
	return &Link{up: newTimeline(bandwidth), down: newTimeline(bandwidth)}, nil
}

// Bytes is what has crossed the link in each direction.
func (l *Link) Bytes() (up, down int64) { return l.up.total(), l.down.total() }

// A timeline is something that moves one thing at a time, at a constant rate.
type timeline struct {
	start time.Time
	rate  int64 // +checklocksignore: never changes; bytes a second, 0: at once
	mu    sync.Mutex
	// +checklocks:mu
	busy time.Duration // since start: until then all time is taken
	// +checklocks:mu
	bytes int64
}

func newTimeline(rate int64) timeline { return timeline{start: time.Now(), rate: rate} }

// reserve takes the time for n bytes and tells when it is over.
func (t *timeline) reserve(n int64) time.Time {
	now := time.Since(t.start)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.bytes += n
	t.busy = max(t.busy, now)
	if t.rate > 0 {
		// In two parts, lest bytes times nanoseconds overflow.
		t.busy += time.Duration(n/t.rate)*time.Second + time.Duration(n%t.rate*1000/t.rate*1000000)
		t.busy += time.Duration(n % t.rate * 1000 % t.rate * 1000000 / t.rate)
	}
	return t.start.Add(t.busy)
}

// pass waits until n bytes have been moved, and for the latency.
func (t *timeline) pass(n int64, latency time.Duration) {
	if due := t.reserve(n).Add(latency); time.Until(due) > 0 {
		sleepUntil(due)
	}
}

// total is the number of bytes that were moved, or are to be.
func (t *timeline) total() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.bytes
}
