package transfer

import (
	"context"
	"sync"
	"time"
)

// burst is how much time a limiter that was not used makes good.
const burst = 100 * time.Millisecond

// limiter holds copying to a rate. A nil one does not.
type limiter struct {
	// rate is in bytes a second.
	rate float64 // +checklocksignore: it never changes

	mu sync.Mutex
	// +checklocks:mu
	next time.Time // when the next byte may be copied
}

func newLimiter(rate int64) *limiter { return &limiter{rate: float64(rate)} }

// wait returns when n more bytes may be copied, or when ctx ends, with its cause.
func (l *limiter) wait(ctx context.Context, n int64) error {
	if l == nil {
		return nil
	}
	delay := time.Until(l.reserve(n))
	if delay <= 0 {
		return nil
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// reserve is when n bytes may be copied that nobody else counts on.
func (l *limiter) reserve(n int64) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	if earliest := time.Now().Add(-burst); l.next.Before(earliest) {
		l.next = earliest
	}
	at := l.next
	l.next = at.Add(time.Duration(float64(n) / l.rate * float64(time.Second)))
	return at
}
