package kcopyd

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"cowherd/block"
	"cowherd/internal/invariant"
)

// A price is what something costs: a fixed part, and one for each KiB.
type price struct{ base, kib float64 } // us

// of is the price of n bytes.
func (p price) of(n int64) time.Duration {
	return time.Duration((p.base + p.kib*float64(n)/1024) * 1000)
}

// A market is what copies between two devices cost.
type market struct {
	name  string
	rw    price // reading and writing
	back  price // writing back, later
	cow   price // more of it where blocks were shared
	clone price
	drop  price // more of it where pages are cached
	mark  price // of reading and writing, more of it once something was cloned
	keeps bool  // it keeps what was written in memory: back, cow and drop are paid
	noisy bool  // others have the processor every now and then

	prudent bool // up to 64 KiB nothing is to be cloned at all
	times   int  // as many jobs as elsewhere; 0: 1
}

const (
	dirtyMost = 300 // units

	quiet = time.Millisecond // of which others leave a noisy device so much at a time
	spike = 2 * time.Millisecond
)

// A mark is what is known of a unit of a priced device.
type mark int

const (
	dirty  mark = iota // written, not written back
	cached             // in the page cache
	shared             // with the source
	markCount
)

// priced is a device whose operations take time, in a bubble of synctest, and move nothing.
type priced struct {
	market
	size   int64 // bytes
	unit   int64 // +checklocksignore: never changes; bytes, of which there is a mark for each
	copies atomic.Int64

	mu sync.Mutex
	// +checklocks:mu
	marks [markCount][]bool
	// +checklocks:mu
	count [markCount]int // that are set
	// +checklocks:mu
	rest time.Duration // of quiet
	// +checklocks:mu
	marked bool
}

func newPriced(m market, size, unit int64) *priced {
	d := &priced{market: m, size: size, unit: unit}
	d.mu.Lock()
	defer d.mu.Unlock()
	for k := range d.marks {
		d.marks[k] = make([]bool, size/unit)
	}
	return d
}

func (d *priced) Size() int64          { return d.size }
func (d *priced) Limits() block.Limits { return block.Limits{LogicalBlock: 512} }

// spend takes time.
func (d *priced) spend(t time.Duration) {
	d.mu.Lock()
	if d.noisy {
		d.rest -= t
		for ; d.rest < 0; d.rest += quiet {
			t += spike
		}
	}
	d.mu.Unlock()
	time.Sleep(t)
}

// set sets or clears marks of a range, and tells how many bytes had them.
func (d *priced) set(k mark, at, length int64, to bool) (had int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := at / d.unit; i < (at+length)/d.unit; i++ {
		switch was := d.marks[k][i]; {
		case was && !to:
			d.count[k]--
		case !was && to:
			d.count[k]++
		}
		if d.marks[k][i] {
			had += d.unit
		}
		d.marks[k][i] = to
	}
	return had
}

func (d *priced) Submit(r *block.Request) {
	t := d.rw.of(r.Length)
	d.mu.Lock()
	if d.marked {
		t += d.mark.of(r.Length)
	}
	d.mu.Unlock()
	t /= 2
	if r.Op == block.OpWrite && d.keeps {
		d.set(cached, r.Offset, r.Length, true)
		if d.full() {
			t += d.back.of(r.Length)
		} else {
			d.set(dirty, r.Offset, r.Length, true)
		}
	}
	d.spend(t)
	r.Complete(nil)
}

// full tells whether so much is dirty that who writes has to wait for the disk.
func (d *priced) full() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.count[dirty] >= dirtyMost
}

func (d *priced) CopyOffers(block.Device) []block.CopyOffer {
	o := cloneOffer(4096)
	o.Lasting = d.mark != price{}
	return []block.CopyOffer{o}
}

func (d *priced) Copy(_ block.CopyMethod, _ block.Device, _, to, length int64) (int64, error) {
	t := d.clone.of(length)
	if d.keeps {
		_ = d.Settle(to, length)
		if n := d.set(cached, to, length, false); n > 0 {
			t += d.drop.of(n)
		}
		d.set(shared, to, length, true)
	}
	d.mu.Lock()
	d.marked = true
	d.copies.Add(1)
	d.mu.Unlock()
	d.spend(t)
	return length, nil
}

func (d *priced) WriteBack(int64, int64) error { return nil }

func (d *priced) Settle(at, length int64) error {
	if n := d.set(dirty, at, length, false); n > 0 {
		t := d.back.of(n)
		if n := d.set(shared, at, length, false); n > 0 {
			t += d.cow.of(n)
		}
		d.spend(t)
	}
	return nil
}

// forgetful is a device that has nothing to settle.
type forgetful struct {
	block.Device
	block.Copier
}

// markets are worlds to learn in. The first two have the prices that were measured on a disk in memory.
var markets = []market{
	{name: "xfs", rw: price{3, 0.12}, back: price{4, 0.2}, cow: price{30, 0}, clone: price{27, 0}, drop: price{5, 0.015},
		mark: price{4, 0}, keeps: true, prudent: true},
	{name: "btrfs", rw: price{6, 0.7}, back: price{10, 0.5}, clone: price{14, 0}, drop: price{1, 0.25}, keeps: true},
	{name: "noisy", rw: price{3, 0.12}, back: price{4, 0.2}, cow: price{30, 0}, clone: price{27, 0},
		mark: price{4, 0}, keeps: true, noisy: true},
	// What has to be known is known after some milliseconds, by which time the disk is dirtyMost behind.
	{name: "slow disk", rw: price{3, 0.12}, back: price{60, 5}, clone: price{40, 0}, mark: price{4, 0}, keeps: true, times: 6},
	{name: "slow clone", rw: price{3, 0.12}, back: price{4, 0.2}, clone: price{900, 1}, keeps: true},
	{name: "direct", rw: price{40, 0.5}, clone: price{30, 0}},
	{name: "command", rw: price{200, 2}, clone: price{250, 1.2}},
	{name: "bad command", rw: price{20, 0.3}, clone: price{2000, 10}},
	{name: "swift command", rw: price{20, 0.3}, clone: price{1, 0}},
}

// A bill is what copies cost.
type bill struct {
	total          time.Duration // the flush at the end included
	clones, others uint64        // jobs
}

// spree makes count copies of size bytes at random places, with a flush now and then and at the end.
func spree(t *testing.T, m market, how Offload, size int64, count int) (b bill) {
	synctest.Test(t, func(t *testing.T) {
		places := int64(count / 2)
		d := newPriced(m, places*size, min(size, SubJobSize))
		var source, target block.Device = newPriced(m, places*size, size), d
		if !m.keeps {
			target = &forgetful{d, d}
		}
		e := NewScaled(Config{})
		rng := rand.New(rand.NewPCG(uint64(size), 1))
		began := time.Now()
		for i := range count {
			j := &Job{From: Region{source, rng.Int64N(places) * size}, To: []Region{{target, rng.Int64N(places) * size}},
				Length: size, Offload: how, Class: Bulk}
			if run(e, j); j.Err() != nil {
				t.Fatal(j.Err())
			}
			if i%(count/16) == count/16-1 {
				for at := int64(0); at < d.size; at += size {
					_ = d.Settle(at, size)
				}
			}
		}
		b.total = time.Since(began)
		for _, s := range e.Stats().Methods {
			if s.Method == "clone" {
				b.clones += s.Operations
			}
		}
		b.others = uint64(count) - b.clones
		closeClean(t, e)
	})
	return b
}

// TestLearn: whatever copies cost, on the spot and later, what the engine chooses costs hardly more than the better way
// would have for all of them, what was tried included. Under the race detector it only runs.
func TestLearn(t *testing.T) {
	count, sizes := 10000, []int64{16 << 10, 64 << 10, 128 << 10, 1 << 20}
	if invariant.Enabled {
		count, sizes = 500, []int64{64 << 10, 1 << 20}
	}
	for _, m := range markets {
		sizes := sizes
		if m.prudent && !invariant.Enabled {
			sizes = append(slices.Clone(sizes), 32<<10, 256<<10, 512<<10, 2<<20, 4<<20)
		}
		for _, size := range sizes {
			t.Run(fmt.Sprintf("%s/%dk", m.name, size>>10), func(t *testing.T) { fare(t, m, size, count*max(m.times, 1)) })
		}
	}
}

// fare is TestLearn for one market and size.
func fare(t *testing.T, m market, size int64, count int) {
	rw, clone := spree(t, m, OffloadOff, size, count), spree(t, m, CloneOnly, size, count)
	auto := spree(t, m, OffloadAuto, size, count)
	each := func(b bill) time.Duration { return b.total / time.Duration(count) }
	better := min(rw.total, clone.total)
	t.Logf("read and write %v, clone %v, auto %v, %.2f; %d cloned, %d not", each(rw), each(clone), each(auto),
		float64(auto.total)/float64(better), auto.clones, auto.others)
	if auto.total > better*110/100 && !invariant.Enabled {
		t.Errorf("auto %v, the better %v", auto.total, better)
	}
	if m.prudent && size <= 64<<10 && auto.clones > 0 {
		t.Errorf("%d were cloned, which leaves a mark for good", auto.clones)
	}
}

// TestLearnChange: when the preferred way becomes many times slower, and later good again, the choice follows.
func TestLearnChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size, places = 256 << 10, 1000
		d := newPriced(markets[1], places*size, size)
		source := newPriced(market{}, places*size, size)
		e := NewScaled(Config{})
		copies := func(n int) (cloned int) {
			for range n {
				before := d.copies.Load()
				at := rand.Int64N(places) * size
				run(e, &Job{From: Region{source, at}, To: []Region{{d, at}}, Length: size})
				if d.copies.Load() > before {
					cloned++
				}
			}
			return cloned
		}
		if n := copies(1000); n < 990 {
			t.Errorf("%d of 1000 cloned at first", n)
		}
		swift := d.clone
		d.clone = price{5000, 0}
		copies(2000)
		if n := copies(1000); n > 50 {
			t.Errorf("%d of 1000 cloned while that is slow", n)
		}
		if invariant.Enabled {
			closeClean(t, e)
			return // the rest takes long under the race detector
		}
		d.clone = swift
		copies(150000) // it was so dear that it is seldom tried
		if n := copies(1000); n < 900 {
			t.Errorf("%d of 1000 cloned when that is quick again", n)
		}
		closeClean(t, e)
	})
}

// TestLearnParallel: jobs of several queues, some of which cannot be offloaded after all, leave no trial undone.
func TestLearnParallel(t *testing.T) {
	e := NewScaled(Config{})
	from, to := newLeaf(t, "a", 1<<20), newLeaf(t, "b", 1<<20, cloneOffer(4096))
	target := &settling{leaf: to}
	to.fault = func(_ block.CopyMethod, at, _, n int64) (int64, error) {
		if at == 0 {
			return 0, nil
		}
		return n, nil
	}
	var all sync.WaitGroup
	for g := range 4 {
		all.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(g)))
			for range 3000 {
				n := int64(16<<10) << rng.IntN(3)
				j := &Job{From: Region{from, rng.Int64N(1<<20/n) * n}, To: []Region{{target, int64(g) << 18}}, Length: n,
					Queue: block.Queue(g)}
				if run(e, j); j.Err() != nil {
					t.Error(j.Err())
				}
			}
		})
	}
	all.Wait()
	closeClean(t, e)
	r := e.pairs.list()[0].routes[0]
	r.mu.Lock()
	defer r.mu.Unlock()
	for k := range 3 {
		c, left := &r.classes[k], int(r.gates[k].trial.Load()>>32)
		if c.open != left {
			t.Errorf("class %d: %d jobs of a trial have not ended, %d are to be sent", k, c.open, left)
		}
		if c.took[readWritten].count+c.took[offloaded].count == 0 {
			t.Errorf("class %d: nothing was timed", k)
		}
	}
}

// settling is a leaf that settles.
type settling struct{ *leaf }

func (s *settling) WriteBack(int64, int64) error { return nil }
func (s *settling) Settle(int64, int64) error    { return nil }
