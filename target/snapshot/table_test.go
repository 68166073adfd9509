package snapshot

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/internal/invariant"
)

// TestTableModel compares a table with a map, for chunks that lie densely, in runs, and anywhere.
func TestTableModel(t *testing.T) {
	from := seed(t)
	for i, within := range []uint64{1 << 6, 1 << 14, 1 << 28, 1 << 48} {
		rnd := rand.New(rand.NewPCG(from, uint64(i)))
		table, model := newTable(), map[cowstore.Chunk]uint64{}
		places := map[cowstore.Chunk]*atomic.Uint64{}
		for range 20_000 {
			chunk := cowstore.Chunk(rnd.Uint64N(within))
			for range 1 + rnd.IntN(5)*rnd.IntN(5) {
				got := table.find(chunk)
				if want, ok := model[chunk]; ok && (got == nil || got.Load() != want) {
					t.Fatalf("chunk %d is lost", chunk)
				} else if !ok && got != nil && got.Load() != 0 {
					t.Fatalf("chunk %d: found %d, it was never inserted", chunk, got.Load())
				}
				if rnd.IntN(2) == 0 {
					at := table.findOrInsert(block.Queue(rnd.Uint32()), chunk)
					if old := places[chunk]; old != nil && old != at {
						t.Fatalf("chunk %d has moved", chunk)
					}
					value := rnd.Uint64() | 1
					at.Store(value)
					model[chunk], places[chunk] = value, at
				}
				chunk++
			}
		}
		for chunk, want := range model {
			if got := table.find(chunk); got == nil || got.Load() != want {
				t.Fatalf("chunk %d is lost", chunk)
			}
		}
	}
}

func TestTableEdges(t *testing.T) {
	table := newTable()
	for _, chunk := range []cowstore.Chunk{0, 1, 3, 4, 1 << 47, 1<<48 - 1, 1<<64 - 1} {
		if at := table.find(chunk); at != nil && at.Load() != 0 {
			t.Errorf("chunk %d: found in an empty table", chunk)
		}
		table.findOrInsert(0, chunk).Store(uint64(chunk) + 7)
	}
	for _, chunk := range []cowstore.Chunk{0, 1, 3, 4, 1 << 47, 1<<48 - 1, 1<<64 - 1} {
		if at := table.find(chunk); at == nil || at.Load() != uint64(chunk)+7 {
			t.Errorf("chunk %d is lost", chunk)
		}
	}
	for _, chunk := range []cowstore.Chunk{2, 5, 8, 1<<47 + 1} {
		if at := table.find(chunk); at != nil && at.Load() != 0 {
			t.Errorf("chunk %d: found, it was never inserted", chunk)
		}
	}
}

// TestTableConcurrent claims chunks from many goroutines, which all want the same: each chunk is claimed exactly once,
// and nobody ever sees one disappear or change.
func TestTableConcurrent(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4))
	from := seed(t)
	const goroutines = 8
	tests := []struct {
		name   string
		count  int
		within uint64
	}{{"dense", 30_000, 30_000}, {"random", 20_000, 1 << 28}, {"fought over", 200, 200}}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			table := newTable()
			chunks := make([]cowstore.Chunk, test.count)
			rnd := rand.New(rand.NewPCG(from, 5))
			for i := range chunks {
				chunks[i] = cowstore.Chunk(i)
				if test.within > uint64(test.count) {
					chunks[i] = cowstore.Chunk(rnd.Uint64N(test.within))
				}
			}
			claims := make([]map[cowstore.Chunk]bool, goroutines)
			var all sync.WaitGroup
			for i := range goroutines {
				claims[i] = map[cowstore.Chunk]bool{}
				all.Go(func() { claimAll(t, table, chunks, uint64(i)+1, claims[i]) })
			}
			all.Wait()
			owners := map[cowstore.Chunk]int{}
			for i, mine := range claims {
				for chunk := range mine {
					if owner, ok := owners[chunk]; ok {
						t.Errorf("chunk %d was claimed by %d and %d", chunk, owner, i)
					}
					owners[chunk] = i
					if got := table.find(chunk).Load(); got != uint64(i)+1 {
						t.Errorf("chunk %d: claimed by %d, holds %d", chunk, i+1, got)
					}
				}
			}
			for _, chunk := range chunks {
				if _, ok := owners[chunk]; !ok {
					t.Errorf("chunk %d was claimed by nobody", chunk)
				}
			}
		})
	}
}

// claimAll tries to claim all chunks for owner, each goroutine in an order of its own, and looks back at what it saw.
func claimAll(t *testing.T, table *table, chunks []cowstore.Chunk, owner uint64, mine map[cowstore.Chunk]bool) {
	rnd := rand.New(rand.NewPCG(owner, 6))
	seen := map[cowstore.Chunk]uint64{}
	start := rnd.IntN(len(chunks))
	for i := range chunks {
		chunk := chunks[(start+i)%len(chunks)]
		at := table.findOrInsert(block.Queue(owner), chunk)
		if at.CompareAndSwap(0, owner) {
			mine[chunk] = true
		}
		seen[chunk] = at.Load()
		old := chunks[(start+rnd.IntN(i+1))%len(chunks)]
		if got := table.find(old); got == nil || got.Load() != seen[old] {
			t.Errorf("chunk %d: the claim of %d was lost", old, seen[old])
			return
		}
	}
}

// TestTableMemory holds the table, and what goes with it, to its figures: 64 bytes for each of a million random
// exceptions of 4 KiB over 1 TiB, 16 bytes when they are dense; by its own account and by the heap's.
func TestTableMemory(t *testing.T) {
	if invariant.Enabled {
		t.Skip("the race detector changes what memory takes")
	}
	const million = 1_000_000
	const device = 1 << 40 / 4096 // chunks
	rnd := rand.New(rand.NewPCG(1, 2))
	tests := []struct {
		name  string
		count int
		most  float64
		chunk func(i int) cowstore.Chunk
	}{
		{"random", million, 64, func(int) cowstore.Chunk { return cowstore.Chunk(rnd.Uint64N(device)) }},
		{"random, the indexes just doubled", million * 108 / 100, 64,
			func(int) cowstore.Chunk { return cowstore.Chunk(rnd.Uint64N(device)) }},
		{"dense", million, 16, func(i int) cowstore.Chunk { return cowstore.Chunk(i) }},
		{"dense, shuffled", million, 16, func(i int) cowstore.Chunk { return cowstore.Chunk(i * 7919 % million) }},
		{"dense, 2 queues", million, 16, func(i int) cowstore.Chunk { return cowstore.Chunk(i%2*million*10 + i/2) }},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			before := heapInUse()
			x := newTable()
			known := newKnownCopied(device)
			exceptions := 0
			for i := range test.count {
				chunk := test.chunk(i)
				if x.findOrInsert(block.Queue(i), chunk).CompareAndSwap(0, uint64(copied)) {
					exceptions++
					known.add(chunk)
				}
			}
			after := heapInUse()
			own := float64(x.bytes()+known.bytes()) / float64(exceptions)
			heap := float64(after-before) / float64(exceptions)
			runtime.KeepAlive(x)
			runtime.KeepAlive(known)
			t.Logf("%d exceptions: %.1f bytes each by the table's account, %.1f by the heap's", exceptions, own, heap)
			if own > test.most || heap > test.most {
				t.Errorf("%.1f bytes (heap: %.1f) for each exception, at most %.0f are allowed", own, heap, test.most)
			}
		})
	}
}

func heapInUse() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestSlot: what goes into a slot comes out of it.
func TestSlot(t *testing.T) {
	for _, index := range []uint32{0, 1, slotIndexMax} {
		for _, to := range []cowstore.Chunk{0, 1, 1<<slotChunkBits - 1} {
			tests := []struct {
				v     slot
				state slotState
			}{{pendingSlot(index), pending}, {drainingSlot(index, to), draining}, {copiedSlot(to), copied}}
			for _, test := range tests {
				v := test.v
				if v.state() != test.state || v.readable() != (test.state >= draining) {
					t.Errorf("%#x: state %d", uint64(v), v.state())
				}
				if test.state != copied && v.index() != index || test.state != pending && v.chunk() != to {
					t.Errorf("%#x: exception %d, chunk %d, want %d, %d", uint64(v), v.index(), v.chunk(), index, to)
				}
			}
		}
	}
	if slot(0).state() != none || slot(0).readable() {
		t.Error("an empty slot is not none")
	}
}

// TestKnownCopied: the bits never lie, whoever sets them, and cover dense chunks in the end.
func TestKnownCopied(t *testing.T) {
	const count = 100_000
	known := newKnownCopied(count)
	var all sync.WaitGroup
	for i := range 4 {
		all.Go(func() {
			for chunk := cowstore.Chunk(i); chunk < count; chunk += 4 {
				if chunk%3 != 0 {
					known.add(chunk)
				}
				if at := chunk - chunk%3; known.has(at) {
					t.Errorf("chunk %d is known, it was never added", at)
				}
			}
		})
	}
	all.Wait()
	for range 2 { // those that came before their page had one are added when they are met again
		for chunk := range cowstore.Chunk(count) {
			if chunk%3 != 0 {
				known.add(chunk)
			}
		}
	}
	found := 0
	for chunk := range cowstore.Chunk(count) {
		if known.has(chunk) {
			found++
			if chunk%3 == 0 {
				t.Fatalf("chunk %d is known, it was never added", chunk)
			}
		}
	}
	if found < count/2 {
		t.Errorf("%d of %d chunks are known", found, count*2/3)
	}
	for _, chunk := range []cowstore.Chunk{count + 1<<20, 1<<48 - 1} {
		known.add(chunk)
		if known.has(chunk) {
			t.Errorf("chunk %d lies behind the end and is known", chunk)
		}
	}
}

const million = 1 << 20

// filled is a table of a million random chunks, and the chunks.
var filled = sync.OnceValues(func() (*table, []cowstore.Chunk) {
	x, rnd := newTable(), rand.New(rand.NewPCG(1, 3))
	chunks := make([]cowstore.Chunk, million)
	for i := range chunks {
		chunks[i] = cowstore.Chunk(rnd.Uint64N(1<<28) * 2)
		x.findOrInsert(block.Queue(i), chunks[i]).Store(uint64(copied))
	}
	return x, chunks
})

func BenchmarkTable(b *testing.B) {
	for _, parallel := range []bool{false, true} {
		x, chunks := filled()
		b.Run(fmt.Sprintf("find hit/parallel=%v", parallel), func(b *testing.B) {
			benchEach(b, parallel, func(i int) bool { return x.find(chunks[i%million]) != nil })
		})
		b.Run(fmt.Sprintf("find miss/parallel=%v", parallel), func(b *testing.B) {
			benchEach(b, parallel, func(i int) bool { return x.find(chunks[i%million]+1<<40) == nil })
		})
		b.Run(fmt.Sprintf("claim/parallel=%v", parallel), func(b *testing.B) {
			// Emptied after every million, as nothing can be taken out.
			var current atomic.Pointer[table]
			current.Store(newTable())
			benchEach(b, parallel, func(i int) bool {
				if i%million == 0 {
					current.Store(newTable())
				}
				current.Load().findOrInsert(block.Queue(i>>32), chunks[i%million]).CompareAndSwap(0, 1)
				return true
			})
		})
	}
}

// benchEach calls f with numbers that goroutines do not share; bit 32 and up number the goroutines.
func benchEach(b *testing.B, parallel bool, f func(i int) bool) {
	b.ReportAllocs()
	if !parallel {
		for i := 0; b.Loop(); i++ {
			if !f(i) {
				b.Fatal("wrong")
			}
		}
		return
	}
	var goroutines atomic.Int64
	b.RunParallel(func(pb *testing.PB) {
		n := goroutines.Add(1)
		i := int(n<<32 + n*million/7)
		for ; pb.Next(); i++ {
			if !f(i) {
				b.Error("wrong")
			}
		}
	})
}

// findOrInsert is the slot of chunk, made if need be.
func (t *table) findOrInsert(queue block.Queue, chunk cowstore.Chunk) *atomic.Uint64 {
	if at := t.find(chunk); at != nil {
		return at
	}
	return t.insert(queue, chunk)
}
