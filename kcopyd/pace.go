package kcopyd

import "time"

const (
	// apartFor is how many requests in the foreground come between one burst of whole pieces and the next. A burst delays
	// those that are in flight when it begins: with 16 at a time, one in 500. It has to be fewer than one in a hundred by
	// far, because on busy CPUs nearly as many are slow for other reasons: with 2048, p99 was that of the bursts.
	apartFor = 8192
	// apartMost bounds the time between two bursts, so that the background is never starved.
	apartMost = 50 * time.Millisecond
	// burstFor is for how long whole pieces follow each other in a burst. An interruption counts as one, however long it is,
	// and the background gains from long ones; but the slowest of a thousand requests see it.
	burstFor = 2 * time.Millisecond
	// gentleShare: pieces are gentle while one takes no more than one part in so many of the time from one request to the
	// next.
	gentleShare = 16
	// The rate is measured over rateOver requests or rateWithin, whichever comes first; rateDecay is how fast the largest
	// one is forgotten: by one part in so many with each measurement.
	rateOver   = 16
	rateWithin = 10 * time.Millisecond
	rateDecay  = 32
	// costShare is the part of a new measurement in the average of what a byte costs, and costTimes how many times the
	// average it counts for at most: a piece may have waited for a CPU itself.
	costShare, costTimes = 4, 4
)

// A pace says when the pieces in the background may begin while the foreground is busy, and how long they are. A piece
// holds up the requests that are in flight when it begins, and come while it is copied, on a CPU or at a device. There are
// two ways to hold up few of them, and little:
//
//	gentle   small pieces, one after the other, each followed by yielding the CPU: where requests are few, most meet none,
//	         and who meets one waits for no longer than it takes
//	apart    whole pieces in bursts of burstFor, and between these apartFor requests: where requests are many, a piece
//	         could not be made as short as they are, but so many pass between two bursts that the length of one does not
//	         matter
//
// Which it is follows from how long pieces take and how fast requests come, the largest rate of late, because the pieces
// themselves make it seem smaller.
//
// Tried before: gentle pieces always, with the CPU yielded after each. With two connections on two CPUs the copy took half
// of both all the same, and each request twice its time. A timer for as long as so many requests should take, in place of
// counting them, fired milliseconds late. The number in flight by what is taken and what has been served is no measure of
// how many a burst delays: what a client has sent and nobody has read yet is not in it.
//
// It is guarded by the Throttle's lock.
type pace struct {
	taken uint64        // requests in the foreground when the rate was measured
	at    time.Duration // when that was
	rate  float64       // requests a ns, the largest of late
	cost  float64       // ns a byte that pieces take, a moving average

	apart  bool
	bursts bool          // apart, and a burst has begun and not ended
	burst  time.Duration // when it began
	// The next piece may begin when so many requests have been taken, or at the latest then.
	due    uint64
	latest time.Duration
}

// opens tells whether the next piece may begin, so many requests having been taken until now.
func (p *pace) opens(now time.Duration, taken uint64) bool { return taken >= p.due || now >= p.latest }

// begun notes that a piece begins, and tells whether it is to be gentle.
func (p *pace) begun(now time.Duration) (gentle bool) {
	if p.apart && !p.bursts {
		p.bursts, p.burst = true, now
	}
	return !p.apart
}

// ended notes that a piece of n bytes has ended, which began at began. So many requests have been taken until now.
func (p *pace) ended(began, now time.Duration, n int64, taken uint64) {
	p.learn(began, now, n, taken)
	p.apart = p.cost*gentlePiece*p.rate*gentleShare > 1
	p.due, p.latest = taken, now
	if p.apart && (!p.bursts || now-p.burst >= burstFor) {
		p.due, p.latest = taken+apartFor, now+apartMost
	}
	p.bursts = p.bursts && p.due == taken
}

// learn brings the cost of pieces and the rate of requests up to date.
func (p *pace) learn(began, now time.Duration, n int64, taken uint64) {
	if n > 0 {
		cost := float64(now-began) / float64(n)
		if p.cost > 0 {
			cost = p.cost + (min(cost, costTimes*p.cost)-p.cost)/costShare
		}
		p.cost = cost
	}
	if requests, passed := taken-p.taken, now-p.at; passed > 0 && (requests >= rateOver || passed >= rateWithin) {
		p.rate = max(p.rate-p.rate/rateDecay, float64(requests)/float64(passed))
		p.taken, p.at = taken, now
	}
}
