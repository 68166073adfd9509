package nbd

import (
	"sync/atomic"
	"time"
)

// The kinds of requests whose speed is judged apart.
const (
	paceRead = iota
	paceWrite
	paceSync // flush, and writes that must be durable
	paceCount
)

const (
	// slowAfter is the time in a device's Submit that makes a request slow, with slowBytes more for each byte: several
	// times what a hand-over to another goroutine costs.
	slowAfter     = 50 * time.Microsecond
	slowPerByteNs = 1

	paceSampleMask = 15 // one of 16 submissions is timed while nothing is slow

	paceUp    = 4  // a slow request counts for as much as
	paceDown  = 1  // that many fast ones
	paceSlow  = 32 // the score from which on requests go to the workers,
	paceFast  = 8  // and to which it must fall for them to come back
	paceLimit = 64
)

// A pace says whether the device keeps the goroutine that submits to it for long, as a disk does that is not in the
// page cache: then submitting one request after the other would leave all but one of a client's requests waiting, and
// they are better handed to several workers. It follows the share of slow requests (one in five is the limit), not
// their mean: a thread that lost its CPU now and then looks very slow, but seldom.
type pace struct {
	score atomic.Int32
	apart atomic.Bool
}

// slow tells whether requests go to the workers.
func (p *pace) slow() bool { return p.apart.Load() }

// sampled tells whether the submission numbered tick should be timed.
func (p *pace) sampled(tick uint) bool { return tick&paceSampleMask == 0 || p.score.Load() != 0 }

// note judges a submission of length bytes that took d. Two at a time may lose one of their votes, which is no harm.
func (p *pace) note(d time.Duration, length int64) {
	score := p.score.Load()
	if d > slowAfter+time.Duration(length*slowPerByteNs) {
		score = min(score+paceUp, paceLimit)
	} else {
		score = max(score-paceDown, 0)
	}
	p.score.Store(score)
	switch {
	case score >= paceSlow:
		p.apart.Store(true)
	case score <= paceFast:
		p.apart.Store(false)
	}
}
