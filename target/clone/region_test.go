package clone

import (
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"cowherd/block"
)

// TestTable compares the table with one of plain booleans.
func TestTable(t *testing.T) {
	random := rand.New(rand.NewPCG(seed(t), 0))
	for _, regions := range []Region{1, 63, 64, 65, 1000, pageRegions - 1, pageRegions, pageRegions + 1, 2*pageRegions + 70} {
		x := newTable(regions)
		hydrated, claimed := make([]bool, regions), make([]bool, regions)
		is := func(k kind, r Region) bool {
			switch k {
			case isHydrated:
				return hydrated[r]
			case isSettled:
				return hydrated[r] && !claimed[r]
			}
			return hydrated[r] || claimed[r]
		}
		for range 400 {
			start := Region(random.Uint64N(uint64(regions)))
			limit := min(regions, start+1+Region(random.Uint64N(300)))
			switch random.IntN(5) {
			case 0, 1: // claim, and give back or settle
				n, disturbed := x.claim(start, limit)
				want := Region(0)
				for r := start; r < limit && !is(isTaken, r); r++ {
					want++
				}
				if n != want || disturbed {
					t.Fatalf("claim of [%d, %d): %d, %v; want %d", start, limit, n, disturbed, want)
				}
				for r := start; r < start+n; r++ {
					claimed[r] = true
				}
			case 2: // end a claim
				for start < limit && !claimed[start] {
					start++
				}
				end := start
				for end < limit && claimed[end] {
					claimed[end] = false
					end++
				}
				settle := random.IntN(2) == 0
				if end == start {
					continue
				}
				if settle {
					x.settle(start, end-start, 1)
				} else {
					x.unclaim(start, end-start)
				}
				for r := start; r < end; r++ {
					hydrated[r] = settle
				}
			default:
				for k := range isTaken + 1 {
					got, end := x.run(start, limit, k)
					want := start
					for want < limit && is(k, want) == is(k, start) {
						want++
					}
					if got != is(k, start) || end != want {
						t.Fatalf("run of kind %d of [%d, %d): %v up to %d, want %v up to %d", k, start, limit, got, end, is(k, start), want)
					}
				}
				if next := x.next(start, limit); next < limit && is(isTaken, next) {
					t.Fatalf("next of %d is %d, which is taken", start, next)
				}
			}
		}
		checkWords(t, x, hydrated)
	}
}

// checkWords: what a commit takes are all hydrated regions, and a table that loads them is the same.
func checkWords(t *testing.T, x *table, hydrated []bool) {
	t.Helper()
	count, again := Region(0), newTable(x.regions)
	for _, p := range x.takeChanged() {
		x.takeWords(p, func(number, value uint64) bool {
			again.load(number, []uint64{value})
			return true
		})
	}
	for r, is := range hydrated {
		if x.hydrated(Region(r)) != is || again.hydrated(Region(r)) != is {
			t.Fatalf("region %d: hydrated %v, loaded again %v, want %v", r, x.hydrated(Region(r)), again.hydrated(Region(r)), is)
		}
		if is {
			count++
		}
	}
	if x.count() != count || again.count() != count {
		t.Fatalf("%d hydrated regions, %d loaded again, want %d", x.count(), again.count(), count)
	}
	if len(x.takeChanged()) > 0 {
		t.Fatal("there are changes again")
	}
}

// TestTableLoadsNoMore: bits behind the last region are of no effect.
func TestTableLoadsNoMore(t *testing.T) {
	x := newTable(70)
	x.load(0, []uint64{^uint64(0), ^uint64(0), ^uint64(0)})
	if x.count() != 70 {
		t.Errorf("%d regions, want 70", x.count())
	}
	x.shrink(0)
	if x.pages[0].Load() != fullPage() {
		t.Error("a full page was kept")
	}
	if settled, end := x.run(0, 70, isSettled); !settled || end != 70 {
		t.Errorf("%v up to %d", settled, end)
	}
}

// TestShrink: a page is dropped only when nothing of it is claimed or uncommitted.
func TestShrink(t *testing.T) {
	x := newTable(3 * pageRegions)
	n, _ := x.claim(0, pageRegions)
	if n != pageRegions {
		t.Fatal(n)
	}
	x.shrink(0)
	x.settle(0, pageRegions, 0)
	x.shrink(0)
	if x.pages[0].Load() == fullPage() {
		t.Fatal("the page was dropped with changes")
	}
	for _, p := range x.takeChanged() {
		x.takeWords(p, func(_, _ uint64) bool { return true })
	}
	x.shrink(0)
	if x.pages[0].Load() != fullPage() || x.bytes() > 1000 {
		t.Errorf("the page was kept: %d bytes", x.bytes())
	}
	if n, _ := x.claim(pageRegions-1, 2*pageRegions); n != 0 {
		t.Errorf("%d regions of a full page were claimed", n)
	}
}

// TestClaimsExclude: goroutines that claim the same regions never own one together, and each region is hydrated once.
func TestClaimsExclude(t *testing.T) {
	const regions, goroutines = 3000, 4
	x := newTable(regions)
	owners := make([]atomic.Int32, regions)
	hydrated := make([]atomic.Int32, regions)
	var wg sync.WaitGroup
	s := seed(t)
	for g := range goroutines {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(s, uint64(g)))
			for x.count() < regions {
				start := x.next(Region(random.Uint64N(regions)), regions)
				if start == regions {
					start = Region(random.Uint64N(regions))
				}
				n, _ := x.claim(start, min(regions, start+1+Region(random.Uint64N(100))))
				if n == 0 {
					continue
				}
				for r := start; r < start+n; r++ {
					if owners[r].Add(1) != 1 || hydrated[r].Load() != 0 {
						t.Errorf("region %d is owned twice", r)
					}
				}
				for r := start; r < start+n; r++ {
					owners[r].Add(-1)
				}
				if random.IntN(3) == 0 {
					x.unclaim(start, n)
					continue
				}
				for r := start; r < start+n; r++ {
					hydrated[r].Add(1)
				}
				x.settle(start, n, 0)
			}
		})
	}
	wg.Wait()
}

// TestClaimIsLate: a region that was hydrated and given back after it was looked at is not claimed, and those behind it
// in a run neither.
func TestClaimIsLate(t *testing.T) {
	for _, test := range []struct{ hydrated, wanted, got uint64 }{
		{0b1, 0b1, 0}, {0b100, 0b1111, 0b11}, {0b1100, 0b11110, 0b10}, {0b1000, 0b111, 0b111}, {1 << 63, 1 << 63, 0},
		{1 << 63, ^uint64(0), 1<<63 - 1},
	} {
		w := new(word)
		w.hydrated.Store(test.hydrated)
		if got, ok := w.claim(0, test.wanted); !ok || got != test.got || w.claimed.Load() != test.got {
			t.Errorf("%+v: got %b, %v, claimed %b", test, got, ok, w.claimed.Load())
		}
		if _, ok := w.claim(^test.got, test.wanted); ok {
			t.Errorf("%+v: claimed although the word has changed", test)
		}
	}
}

// TestSettling: between hydrated and settled, reads go on and writes wait: a flush behind such a write must find that the
// region is to be committed.
func TestSettling(t *testing.T) {
	x := newRig(t, 256*kib, nil)
	defer x.end(t)
	table := x.table.Load()
	table.claim(0, 1)
	table.touch(0).word(0).hydrated.Or(1)
	want(t, "read", x.do(block.OpRead, 0, 0, 512).wait(t), nil)
	if x.source.Seen(block.OpRead) != 0 {
		t.Error("the source was read")
	}
	w, whole := x.do(block.OpWrite, 0, 0, 512), x.do(block.OpWrite, 0, 0, 64*kib)
	w.pending(t, "settling")
	whole.pending(t, "settling")
	table.settle(0, 1, 0)
	x.wake(0, 1)
	want(t, "write", w.wait(t), nil)
	want(t, "write", whole.wait(t), nil)
}

// TestSettleHydratesFirst: whoever finds a region not claimed, after it was, finds it hydrated or as it was before.
func TestSettleHydratesFirst(t *testing.T) {
	const regions = 1 << 14
	x := newTable(regions)
	for r := range Region(regions) {
		x.claim(r, r+1)
	}
	var wg sync.WaitGroup
	var looked atomic.Uint64 // at regions that are still claimed
	wg.Go(func() {
		for r := range Region(regions) {
			for looked.Load() <= uint64(r) {
				runtime.Gosched()
			}
			x.settle(r, 1, 0)
		}
	})
	for r := range Region(regions) {
		looked.Add(1)
		for x.claimed(r) {
			runtime.Gosched()
		}
		if !x.hydrated(r) {
			t.Fatalf("region %d was given back before it was hydrated", r)
		}
	}
	wg.Wait()
}

// TestAwaitLooksAgain: who begins to wait for a region just after it was given back is not forgotten.
func TestAwaitLooksAgain(t *testing.T) {
	x := newRig(t, 256*kib, nil)
	defer x.end(t)
	c := &call{done: make(chan error, 1)}
	c.r = block.Request{Op: block.OpWrite, Length: 512, Data: make([]byte, 512)}
	c.r.Push(c)
	x.await(x.table.Load(), 0, &c.r, (*writes)(x.Clone))
	want(t, "write", c.wait(t), nil)
}

// TestHugeTable: 2^32 regions cost nothing until they are touched, and two bits each then.
func TestHugeTable(t *testing.T) {
	const regions = 1 << 32
	x := newTable(regions)
	empty := x.bytes()
	if empty > 2<<20 {
		t.Errorf("%d bytes for an empty table", empty)
	}
	if is, end := x.run(0, regions, isSettled); is || end != regions {
		t.Errorf("%v up to %d", is, end)
	}
	n, _ := x.claim(regions-100, regions)
	x.settle(regions-100, n, 0)
	if n != 100 || x.count() != 100 || x.bytes()-empty > 2*pageRegions*2/8 {
		t.Errorf("%d regions, %d bytes", n, x.bytes())
	}
	if is, end := x.run(5, regions, isTaken); is || end != regions-100 {
		t.Errorf("%v up to %d", is, end)
	}
}

// TestAbortBeforeFUA: a write with FUA to a region that was found settled, whose commit then fails, fails too.
func TestAbortBeforeFUA(t *testing.T) {
	for _, fails := range []bool{false, true} {
		x := newRig(t, 256*kib, nil)
		found := x.table.Load()
		want(t, "write", x.do(block.OpWrite, 0, 0, 512).wait(t), nil)
		x.meta.failCommit.Store(true)
		x.meta.failAbort.Store(fails)
		want(t, "flush", x.do(block.OpFlush, 0, 0, 0).wait(t), syscall.EIO)
		c := &call{done: make(chan error, 1)}
		c.r = block.Request{Op: block.OpWrite, Flags: block.FUA, Length: 512, Data: make([]byte, 512)}
		c.r.Push(c)
		x.writeSettled(found, &c.r)
		want(t, "write with FUA", c.wait(t), syscall.EIO)
		x.end(t)
	}
}
