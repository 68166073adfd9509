package metrics

import (
	"encoding/json"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"
)

// TestBuckets: the buckets are in order, without gaps, and an eighth wide at most.
func TestBuckets(t *testing.T) {
	start := time.Duration(0)
	for i := range BucketCount {
		end := BucketEnd(i)
		if got := BucketOf(start); got != i {
			t.Fatalf("bucket of %d is %d, want %d", start, got, i)
		}
		if got := BucketOf(end - 1); got != i {
			t.Fatalf("bucket of %d is %d, want %d", end-1, got, i)
		}
		if i >= steps && i < BucketCount-1 && (end-start)*steps > start {
			t.Fatalf("bucket %d of [%d, %d) is too wide", i, start, end)
		}
		start = end
	}
	for d, want := range map[time.Duration]int{-1: 0, math.MinInt64: 0, math.MaxInt64: BucketCount - 1} {
		if got := BucketOf(d); got != want {
			t.Errorf("bucket of %d is %d, want %d", d, got, want)
		}
	}
}

// TestQuantiles compares with the sorted list of what was recorded.
func TestQuantiles(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	var h, other Histogram
	var list []time.Duration
	for i := range 5000 {
		d := time.Duration(math.Exp(rng.Float64() * 24))
		list = append(list, d)
		if i%2 == 0 {
			h.Record(d, 1)
		} else {
			other.Record(d, 1)
		}
	}
	slices.Sort(list)
	s, o := h.Snapshot(), other.Snapshot()
	s.Merge(&o)
	if s.Count != uint64(len(list)) {
		t.Fatalf("count %d, want %d", s.Count, len(list))
	}
	for _, q := range []float64{0, 0.01, 0.5, 0.9, 0.99, 0.999, 1} {
		want := list[max(int(math.Ceil(q*float64(len(list))))-1, 0)]
		if got := s.Quantile(q); got < want || got > want+want/steps {
			t.Errorf("quantile %v is %d, want %d or a little more", q, got, want)
		}
	}
	var sum time.Duration
	for _, d := range list {
		sum += d
	}
	if s.Mean() != sum/time.Duration(len(list)) {
		t.Errorf("mean %v", s.Mean())
	}
}

func TestEmptyAndWeight(t *testing.T) {
	var s Snapshot
	if s.Mean() != 0 || s.Quantile(0.5) != 0 {
		t.Errorf("empty: %v %v", s.Mean(), s.Quantile(0.5))
	}
	var h Histogram
	h.Record(1000, 16)
	h.Record(-5, 1)
	h.Record(math.MaxInt64, 0)
	s = h.Snapshot()
	if s.Count != 17 || s.Sum != 16000 {
		t.Errorf("count %d, sum %d", s.Count, s.Sum)
	}
	out, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"count":17,"mean_us":0.941,"p50_us":1.023,"p90_us":1.023,"p99_us":1.023,"p999_us":1.023,"max_us":1.023}`
	if string(out) != want {
		t.Errorf("JSON %s, want %s", out, want)
	}
}

func TestConcurrent(t *testing.T) {
	var h Histogram
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range 1000 {
				h.Record(time.Duration(i), 1)
			}
		})
	}
	wg.Wait()
	if s := h.Snapshot(); s.Count != 4000 {
		t.Errorf("count %d", s.Count)
	}
}

func BenchmarkRecord(b *testing.B) {
	var h Histogram
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		h.Record(time.Duration(i), 1)
	}
}
