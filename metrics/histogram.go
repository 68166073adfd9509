// Package metrics counts. It lies below everything that is measured and knows nothing of devices.
//
// A Histogram is a fixed array of counters that many goroutines may add to; its Snapshot is a value that is merged with
// others, asked for quantiles and printed as JSON. The package has no locks.
package metrics

import (
	"encoding/json"
	"math"
	"math/bits"
	"sync/atomic"
	"time"
)

const (
	// stepShift: each octave is cut into 1<<stepShift buckets, so that a bucket is 12.5 % wide at most.
	stepShift = 3
	steps     = 1 << stepShift
	// topShift: all from 1<<topShift ns on, 69 s, is in the last bucket.
	topShift = 36

	// BucketCount is the number of buckets.
	BucketCount = (topShift-stepShift+1)*steps + 1
)

// A Histogram counts durations in log-linear buckets: exact to the nanosecond below 8 ns, to an eighth above. The zero
// value is empty. All methods are safe for concurrent use. It takes about 2 KiB and never allocates.
type Histogram struct {
	sum     atomic.Uint64 // ns
	buckets [BucketCount]atomic.Uint64
}

// BucketOf is the index of the bucket that d belongs to. What is negative counts as zero.
func BucketOf(d time.Duration) int {
	if d < steps {
		return int(max(d, 0))
	}
	if d >= 1<<topShift {
		return BucketCount - 1
	}
	shift := bits.Len64(uint64(d)) - 1 - stepShift
	return shift*steps + int(d>>shift)
}

// BucketEnd is the duration behind the last one of the bucket i. The last bucket has no end: it gives the longest
// duration there is.
func BucketEnd(i int) time.Duration {
	switch {
	case i >= BucketCount-1:
		return math.MaxInt64
	case i < steps:
		return time.Duration(i + 1)
	}
	shift := i/steps - 1
	return time.Duration(i%steps+steps+1) << shift
}

// Record counts d weight times: where only one of so many is measured, weight makes up for the others.
func (h *Histogram) Record(d time.Duration, weight uint64) {
	h.buckets[BucketOf(d)].Add(weight)
	h.sum.Add(uint64(max(d, 0)) * weight)
}

// Snapshot is what has been counted. While others record, it is only nearly of one moment.
func (h *Histogram) Snapshot() Snapshot {
	var s Snapshot
	h.AddTo(&s)
	return s
}

// AddTo adds what has been counted to s.
func (h *Histogram) AddTo(s *Snapshot) {
	s.Sum += time.Duration(h.sum.Load())
	for i := range h.buckets {
		n := h.buckets[i].Load()
		s.Buckets[i] += n
		s.Count += n
	}
}

// A Snapshot is what a Histogram had counted. It is a value of its own; the zero value is empty.
type Snapshot struct {
	Count   uint64
	Sum     time.Duration
	Buckets [BucketCount]uint64
}

// Record counts d. Unlike a Histogram's, it is for one goroutine at a time.
func (s *Snapshot) Record(d time.Duration) {
	s.Count++
	s.Sum += max(d, 0)
	s.Buckets[BucketOf(d)]++
}

// Merge adds what o counted.
func (s *Snapshot) Merge(o *Snapshot) {
	s.Count += o.Count
	s.Sum += o.Sum
	for i, n := range o.Buckets {
		s.Buckets[i] += n
	}
}

// Mean is the average; 0 when nothing was counted.
func (s *Snapshot) Mean() time.Duration {
	if s.Count == 0 {
		return 0
	}
	return s.Sum / time.Duration(s.Count)
}

// Quantile is a duration that the fraction q of all, from 0 to 1, did not exceed: the end of a bucket, so up to an eighth
// too long. It is 0 when nothing was counted.
func (s *Snapshot) Quantile(q float64) time.Duration {
	if s.Count == 0 {
		return 0
	}
	rank := uint64(math.Ceil(q * float64(s.Count)))
	rank = min(max(rank, 1), s.Count)
	var sum uint64
	for i, n := range s.Buckets {
		if sum += n; sum >= rank {
			return min(BucketEnd(i)-1, 1<<topShift)
		}
	}
	return 1 << topShift
}

// summary is a Snapshot as it stands in JSON.
type summary struct {
	Count uint64  `json:"count"`
	Mean  float64 `json:"mean_us"`
	P50   float64 `json:"p50_us"`
	P90   float64 `json:"p90_us"`
	P99   float64 `json:"p99_us"`
	P999  float64 `json:"p999_us"`
	Max   float64 `json:"max_us"`
}

// MarshalJSON gives the count and a few quantiles, in microseconds.
func (s Snapshot) MarshalJSON() ([]byte, error) {
	us := func(d time.Duration) float64 { return float64(d) / 1000 }
	return json.Marshal(summary{
		Count: s.Count, Mean: us(s.Mean()), P50: us(s.Quantile(0.5)), P90: us(s.Quantile(0.9)),
		P99: us(s.Quantile(0.99)), P999: us(s.Quantile(0.999)), Max: us(s.Quantile(1)),
	})
}
