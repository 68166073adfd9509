package cowstore

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"cowherd/block"
	"cowherd/internal/percpu"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestCheckChunkSize(t *testing.T) {
	tests := []struct {
		size   int64
		blocks []int
		want   string // part of the error; "" for none
	}{
		{4 << 10, nil, ""},
		{4 << 10, []int{512, 4096}, ""},
		{1 << 30, []int{1, 65536}, ""},
		{16 << 10, []int{16 << 10}, ""},
		{0, nil, "not a power of 2"},
		{-4096, nil, "not a power of 2"},
		{math.MinInt64, nil, "too low"}, // one bit is set
		{4097, nil, "not a power of 2"},
		{12 << 10, nil, "not a power of 2"},
		{1, nil, "too low"},
		{256, nil, "too low"},
		{512, nil, ""},
		{2 << 10, []int{4096}, "not a multiple of the logical block size 4096"},
		{2 << 30, nil, "too high"},
		{1 << 62, nil, "too high"},
		{4 << 10, []int{512, 8192}, "not a multiple of the logical block size 8192"},
	}
	for _, test := range tests {
		err := CheckChunkSize(test.size, test.blocks...)
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%d over %v: got %v, want %q", test.size, test.blocks, err, test.want)
		}
	}
}

func TestCheckNewChunkSize(t *testing.T) {
	for size, ok := range map[int64]bool{0: false, 512: false, 2048: false, 4096: true, 6000: false, 1 << 30: true, 1 << 31: false} {
		if err := CheckNewChunkSize(size); (err == nil) != ok {
			t.Errorf("%d: got %v", size, err)
		}
	}
}

func TestChunkArithmetic(t *testing.T) {
	const size = ChunkSize(8 << 10)
	tests := []struct {
		offset      int64
		floor, ceil Chunk
	}{
		{0, 0, 0}, {1, 0, 1}, {8191, 0, 1}, {8192, 1, 1}, {8193, 1, 2},
		{1 << 60, 1 << 47, 1 << 47}, {1<<60 + 1, 1 << 47, 1<<47 + 1},
	}
	for _, test := range tests {
		if got := size.ChunkFloor(test.offset); got != test.floor {
			t.Errorf("floor of %d: %d", test.offset, got)
		}
		if got := size.ChunkCeil(test.offset); got != test.ceil {
			t.Errorf("ceil of %d: %d", test.offset, got)
		}
	}
	if got := size.Offset(3); got != 3*8192 {
		t.Errorf("chunk 3 starts at %d", got)
	}
	if got := size.Shift(); got != 13 {
		t.Errorf("shift %d", got)
	}
}

func TestTransientTotal(t *testing.T) {
	tests := []struct {
		size, limit int64
		chunk       ChunkSize
		chunks      int
		sectors     block.Sector
	}{
		{0, 0, 4096, 0, 0},
		{4095, 0, 4096, 0, 7},
		{4096, 0, 4096, 1, 8},
		{10*4096 + 777, 0, 4096, 10, 81},
		{10 * 4096, 3 * 4096, 4096, 3, 24},
		{10 * 4096, 4095, 4096, 0, 7},
		{10 * 4096, 100 * 4096, 4096, 10, 80},
		{1 << 30, 0, 1 << 30, 1, 1 << 21},
		{1<<30 - 1, 0, 1 << 30, 0, 1<<21 - 1},
	}
	for _, test := range tests {
		s := NewTransient(test.size, test.limit, test.chunk)
		got := 0
		for ; got <= test.chunks; got++ {
			if _, _, err := s.Allocate(0, 1); err != nil {
				break
			}
		}
		if got != test.chunks {
			t.Errorf("%+v: got %d chunks", test, got)
		}
		allocated, total, metadata := s.Usage()
		want := block.SectorFloor(int64(got) * int64(test.chunk))
		if allocated != want || total != test.sectors || metadata != 0 {
			t.Errorf("%+v: usage %d/%d %d", test, allocated, total, metadata)
		}
	}
}

// TestTransientModel allocates in one thread, from random queues, and expects each chunk once and all of them.
func TestTransientModel(t *testing.T) {
	for seed := range uint64(50) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		chunk := ChunkSize(ChunkSizeMin << rnd.IntN(10))
		total := rnd.IntN(2000)
		s := NewTransient(int64(total)*int64(chunk)+rnd.Int64N(int64(chunk)), 0, chunk)
		seen := make([]bool, total)
		used := 0
		for used < total {
			want := 1 + rnd.IntN(200)
			first, count, err := s.Allocate(block.Queue(rnd.Uint32()), want)
			if err != nil {
				t.Fatalf("seed %d: %d of %d chunks: %v", seed, used, total, err)
			}
			if count < 1 || count > want {
				t.Fatalf("seed %d: got %d chunks, want %d", seed, count, want)
			}
			for c := first; c < first+Chunk(count); c++ {
				if int(c) >= total || seen[c] {
					t.Fatalf("seed %d: chunk %d of %d, allocated before: %v", seed, c, total, int(c) < total)
				}
				seen[c] = true
			}
			used += count
			checkUsage(t, s, used, chunk)
		}
		for queue := range block.Queue(70) {
			if _, _, err := s.Allocate(queue, 1); !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("seed %d: full: %v", seed, err)
			}
		}
		checkUsage(t, s, used, chunk)
	}
}

func checkUsage(t *testing.T, s *Transient, used int, chunk ChunkSize) {
	t.Helper()
	if allocated, _, _ := s.Usage(); allocated != block.SectorFloor(int64(used)*int64(chunk)) {
		t.Fatalf("usage: %d sectors, %d chunks are in use", allocated, used)
	}
}

// TestTransientConcurrent allocates from many goroutines until they are refused. Space that another queue has taken
// and not used must be found: nobody is refused while a chunk is free.
func TestTransientConcurrent(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(8)) // for as many shards; each store has its own
	for _, total := range []int{1, 2, 7, 64, 65, 200, 5000} {
		for round := range max(5, 20000/(total+10)) {
			const workers = 8
			s := NewTransient(int64(total)*ChunkSizeMin, 0, ChunkSizeMin)
			owners := make([]atomic.Int32, total)
			var used atomic.Int64
			var refused, start atomic.Bool
			var all sync.WaitGroup
			for i := range workers {
				all.Go(func() {
					rnd := rand.New(rand.NewPCG(uint64(i), uint64(round)))
					for !start.Load() {
						runtime.Gosched()
					}
					for {
						before := refused.Load()
						first, count, err := s.Allocate(block.Queue(i), 1+rnd.IntN(8))
						if err == nil && before {
							t.Errorf("total %d: a chunk was free after another queue had been refused", total)
						}
						if err != nil {
							refused.Store(true)
							if !errors.Is(err, syscall.ENOSPC) {
								t.Error(err)
							}
							return
						}
						for c := first; c < first+Chunk(count); c++ {
							if int(c) >= total {
								t.Errorf("chunk %d of %d", c, total)
							} else if owners[c].Add(1) != 1 {
								t.Errorf("chunk %d was given out twice", c)
							}
						}
						used.Add(int64(count))
					}
				})
			}
			start.Store(true)
			all.Wait()
			if int(used.Load()) != total {
				t.Fatalf("round %d: refused with %d of %d chunks in use", round, used.Load(), total)
			}
			checkUsage(t, s, total, ChunkSizeMin)
		}
	}
}

// TestTransientSteal: what one queue has taken can be used by every other.
func TestTransientSteal(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4)) // for as many shards
	const total = 64
	s := NewTransient(total*ChunkSizeMin, 0, ChunkSizeMin)
	if _, count, err := s.Allocate(0, 1); err != nil || count != 1 {
		t.Fatal(count, err) // the rest lies in the batch of queue 0 now
	}
	for i := range total - 1 {
		if _, count, err := s.Allocate(1, 5); err != nil || count != 1 {
			t.Fatalf("chunk %d: got %d, %v", i, count, err)
		}
	}
	for queue := range block.Queue(3) {
		if _, _, err := s.Allocate(queue, 1); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("queue %d: %v", queue, err)
		}
	}
}

// TestTransientStripes: a queue takes consecutive chunks from stripes of its own, others' only when it has none left.
func TestTransientStripes(t *testing.T) {
	for _, chunkSize := range []ChunkSize{ChunkSizeMin, 64 << 10, 512 << 10, 1 << 20, ChunkSizeMax} {
		stripe := StripeBytes(chunkSize) / int64(chunkSize)
		shards := int64(Shards())
		const own = 3 // stripes of each queue
		s := NewTransient(own*shards*StripeBytes(chunkSize), 0, chunkSize)
		for queue := range shards {
			for n := range own * stripe {
				first, count, err := s.Allocate(block.Queue(queue+shards*n), 1)
				want := Chunk((n/stripe*shards+queue)*stripe + n%stripe)
				if err != nil || count != 1 || first != want {
					t.Fatalf("chunks of %d, queue %d: got %d at %d (%v), want one at %d", chunkSize, queue, count, first, err, want)
				}
			}
		}
		if _, _, err := s.Allocate(0, 1); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("chunks of %d: full: %v", chunkSize, err)
		}
	}
	tests := []struct {
		chunkSize ChunkSize
		want      int64
	}{{4 << 10, 512 << 10}, {512 << 10, 512 << 10}, {1 << 20, 1 << 20}, {1 << 30, 1 << 30}}
	for _, test := range tests {
		if got := StripeBytes(test.chunkSize); got != test.want {
			t.Errorf("chunks of %d: stripes of %d", test.chunkSize, got)
		}
	}
}

// TestTransientRuns: a request for many chunks gets what is left of a stripe.
func TestTransientRuns(t *testing.T) {
	s := NewTransient(1<<30, 0, 64<<10)
	next := Chunk(0)
	for i, want := range []int{1, 3, 100, 100} {
		first, count, err := s.Allocate(0, want)
		if expect := []int{1, 3, 4, 8}[i]; err != nil || count != expect || i < 3 && first != next {
			t.Fatalf("%d chunks: got %d at %d (%v), want %d at %d", want, count, first, err, expect, next)
		}
		next += Chunk(count)
	}
}

func TestTransientAllocations(t *testing.T) {
	s := NewTransient(1<<40, 0, ChunkSizeMin)
	if n := testing.AllocsPerRun(1000, func() { _, _, _ = s.Allocate(1, 3) }); n != 0 {
		t.Errorf("%v allocations for each call", n)
	}
}

func BenchmarkTransientAllocate(b *testing.B) {
	b.Run(fmt.Sprintf("shards=%d", percpu.Count()), func(b *testing.B) {
		s := NewTransient(math.MaxInt64, 0, ChunkSizeMin)
		var queues atomic.Uint32
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			queue := block.Queue(queues.Add(1))
			for pb.Next() {
				if _, _, err := s.Allocate(queue, 1); err != nil {
					b.Fatal(err)
				}
			}
		})
	})
}
