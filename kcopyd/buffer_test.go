package kcopyd

import (
	"runtime"
	"testing"

	"cowherd/block"
	"cowherd/internal/invariant"
)

func TestClassOf(t *testing.T) {
	cases := []struct {
		n    int64
		size int64
	}{{1, 4096}, {4095, 4096}, {4096, 4096}, {4097, 8192}, {8192, 8192}, {65536, 65536}, {65537, 131072},
		{SubJobSize/2 + 1, SubJobSize}, {SubJobSize, SubJobSize}}
	for _, c := range cases {
		b := buffer{class: classOf(c.n)}
		if b.size() != c.size {
			t.Errorf("%d bytes: buffer of %d, want %d", c.n, b.size(), c.size)
		}
		if m := b.bytes(c.n); int64(len(m)) != c.n || misalignment(m) != 0 {
			t.Errorf("%d bytes: %d bytes, %d off the alignment", c.n, len(m), misalignment(m))
		}
	}
	for skip := range 3 {
		m := alignedPart(make([]byte, 8192+bufferAlign+skip)[skip:], 8192)
		if misalignment(m) != 0 || len(m) != 8192 {
			t.Errorf("the aligned part is %d bytes, %d off the alignment", len(m), misalignment(m))
		}
	}
	if misalignment(zeroes()) != 0 || len(zeroes()) != SubJobSize {
		t.Error("the zero buffer is not aligned")
	}
}

// TestFind checks where a shard without a free buffer finds one: below the ceiling, in another shard, and in place of
// free buffers of other classes.
func TestFind(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(8))
	var p pool
	p.init(1)
	give := func(sh *shard, b *buffer) {
		sh.mu.Lock()
		defer sh.mu.Unlock()
		b.next, sh.free[b.class] = sh.free[b.class], b
	}
	one, two := p.shards.Index(1), p.shards.Index(2)
	large := p.find(one, classOf(SubJobSize))
	if large == nil || p.find(two, classOf(1)) != nil {
		t.Fatal("the first buffer does not take what there is")
	}
	give(one, large)
	if p.find(two, large.class) != large {
		t.Error("another shard's free buffer was not taken")
	}
	give(two, large)
	for i := range SubJobSize / 4096 {
		if p.find(one, classOf(4096)) == nil {
			t.Fatalf("%d buffers of 4 KiB found no room", i)
		}
	}
	if p.find(one, classOf(4096)) != nil {
		t.Error("a buffer above the ceiling")
	}
}

// TestBarrier checks all orders in which completions and the submitter can come, over the counter's overflow.
func TestBarrier(t *testing.T) {
	var b barrier
	b.arrived.Store(^uint32(0) - 20)
	b.expected = b.arrived.Load()
	for range 20 {
		for count := range DestinationsMax + 1 {
			for before := range count + 1 {
				b.open(count)
				for range before {
					if b.arrive() {
						t.Fatal("a completion before the submitter came last")
					}
				}
				if b.leave() != (before == count) {
					t.Fatalf("%d of %d completions came before the submitter, who is wrong about it", before, count)
				}
				for i := before; i < count; i++ {
					if b.arrive() != (i == count-1) {
						t.Fatalf("completion %d of %d is wrong about being the last", i, count)
					}
				}
			}
		}
	}
}

// TestQueueJobs checks where jobs are counted.
func TestQueueJobs(t *testing.T) {
	forEngines(t, Config{}, func(t *testing.T, e testEngine) {
		j := &Job{From: Region{null{}, 0}, To: []Region{{null{}, 0}}, Length: 4096}
		for q := range block.Queue(32) {
			j.Queue = q
			run(e, j)
		}
		jobs := e.QueueJobs()
		for i, n := range jobs {
			if n != uint64(32/len(jobs)) {
				t.Errorf("queue %d of %d: %d jobs of 32", i, len(jobs), n)
			}
		}
	})
}

// TestNoAllocations checks that the steady state needs no new memory.
func TestNoAllocations(t *testing.T) {
	cases := []struct {
		name         string
		length       int64
		destinations int
		pooled       bool
	}{
		{"4 KiB", 4096, 1, false},
		{"512 KiB", SubJobSize, 1, false},
		{"8 destinations", 4096, 8, true},
		{"several pieces", 3 * SubJobSize, 1, true},
		{"several pieces, 2 destinations", 3 * SubJobSize, 2, true},
	}
	forEngines(t, Config{}, func(t *testing.T, e testEngine) {
		for _, c := range cases {
			if c.pooled && invariant.Enabled {
				t.Logf("%s: not checked, the race detector makes sync.Pool forget", c.name)
				continue
			}
			done := make(chan struct{}, 1)
			j := &Job{From: Region{null{}, 0}, To: make([]Region, c.destinations), Length: c.length}
			j.Done = func(*Job) { done <- struct{}{} }
			for i := range j.To {
				j.To[i].Device = null{}
			}
			if n := testing.AllocsPerRun(1000, func() { e.Submit(j); <-done }); n != 0 {
				t.Errorf("%s: %v allocations", c.name, n)
			}
		}
	})
}
