package clone

import (
	"math/bits"
	"sync"
	"sync/atomic"

	"cowherd/block"
	"cowherd/internal/percpu"
)

// Region is the number of a region: the unit of hydration.
type Region uint64

const (
	pageWords   = 512
	pageRegions = pageWords * 64
)

// table is the state of all regions: two bits for each, in pages that exist only where something is hydrated or claimed.
// A table belongs to one reading of the metadata; after an aborted transaction there is another one.
//
// The bits behind the last region are set, so that they are never found, and a page that is full is full.
type table struct {
	regions Region
	pages   []atomic.Pointer[page]
	// Pages with changes that no commit has taken, newest first.
	changed atomic.Pointer[page]
	counts  percpu.Shards[counter] // of hydrated regions
}

type counter struct{ n atomic.Int64 }

// word is the state of 64 regions.
type word struct{ hydrated, claimed atomic.Uint64 }

type page struct {
	words [pageWords]word
	// dirty has a bit for each word that has changed since a commit took it.
	dirty [pageWords / 64]atomic.Uint64
	// listed: the page is in the table's list of changed ones.
	listed atomic.Bool
	next   *page // in that list
	index  int
}

// fullPage stands for every page whose regions are all hydrated and committed. It is never written to: nothing of it
// can be claimed.
func fullPage() *page {
	full.once.Do(func() {
		for i := range full.page.words {
			full.page.words[i].hydrated.Store(^uint64(0))
		}
	})
	return &full.page
}

// full is what fullPage returns. It is filled at its first use, not at the start of every command.
var full struct {
	once sync.Once
	page page
}

func newTable(regions Region) *table {
	return &table{
		regions: regions,
		pages:   make([]atomic.Pointer[page], (regions+pageRegions-1)/pageRegions),
		counts:  percpu.New[counter](),
	}
}

// page is the page of region; nil: nothing in it is hydrated or claimed.
func (t *table) page(region Region) *page { return t.pages[region/pageRegions].Load() }

// touch is the page of region, which is made if need be.
func (t *table) touch(region Region) *page {
	at := &t.pages[region/pageRegions]
	if p := at.Load(); p != nil {
		return p
	}
	p := &page{index: int(region / pageRegions)}
	if first := Region(p.index) * pageRegions; t.regions-first < pageRegions {
		for i := range p.words {
			p.words[i].hydrated.Store(t.behind(first + Region(i)*64))
		}
	}
	if at.CompareAndSwap(nil, p) {
		return p
	}
	return at.Load()
}

// behind has the bits set that lie behind the last region, of the word whose first region is first.
func (t *table) behind(first Region) uint64 {
	switch {
	case first >= t.regions:
		return ^uint64(0)
	case t.regions-first >= 64:
		return 0
	}
	return ^uint64(0) << (t.regions - first)
}

func (p *page) word(region Region) *word { return &p.words[region%pageRegions/64] }

// hydrated tells whether reads of region go to the destination.
func (t *table) hydrated(region Region) bool {
	p := t.page(region)
	return p != nil && p.word(region).hydrated.Load()>>(region%64)&1 != 0
}

// claimed tells whether somebody owns region.
func (t *table) claimed(region Region) bool {
	p := t.page(region)
	return p != nil && p.word(region).claimed.Load()>>(region%64)&1 != 0
}

// settled has the bits of the settled regions. The order of the loads matters: what was hydrated when it was looked at
// and is not claimed later has been settled between.
func (w *word) settled() uint64 {
	hydrated := w.hydrated.Load()
	return hydrated &^ w.claimed.Load()
}

// kind is a property of regions that runs are made of.
type kind uint8

const (
	isHydrated kind = iota
	isSettled
	isTaken // hydrated or claimed
)

func (w *word) bits(k kind) uint64 {
	switch k {
	case isHydrated:
		return w.hydrated.Load()
	case isSettled:
		return w.settled()
	}
	return w.claimed.Load() | w.hydrated.Load()
}

// run tells whether the region start is of the kind, and the end, at most limit, of the run of regions from there on that
// are alike. start < limit.
func (t *table) run(start, limit Region, k kind) (is bool, end Region) {
	for at := start; at < limit; {
		p := t.page(at)
		if p == nil {
			if at == start {
				is = false
			} else if is {
				return is, at
			}
			at = (at/pageRegions + 1) * pageRegions
			continue
		}
		v := p.word(at).bits(k)
		if at == start {
			is = v>>(at%64)&1 != 0
		}
		if !is {
			v = ^v
		}
		n := Region(bits.TrailingZeros64(^(v >> (at % 64))))
		at += n
		if at%64 != 0 || n == 0 {
			return is, min(at, limit)
		}
	}
	return is, limit
}

// next is the first region from start on that is neither hydrated nor claimed; limit if there is none before that.
func (t *table) next(start, limit Region) Region {
	if start >= limit {
		return limit
	}
	taken, end := t.run(start, limit, isTaken)
	if taken {
		return end
	}
	return start
}

// mask has count bits set, from bit shift on.
func mask(shift, count Region) uint64 { return ^uint64(0) >> (64 - count) << shift }

// claim makes the caller the owner of as many regions as possible from start on, side by side, before limit, that are
// neither hydrated nor owned. disturbed: some were claimed for a moment only; who may wait for them is to be woken.
func (t *table) claim(start, limit Region) (count Region, disturbed bool) {
	for at := start; at < limit; {
		w := t.touch(at).word(at)
		shift := at % 64
		span := min(64-shift, limit-at)
		claimed := w.claimed.Load()
		free := ^(claimed | w.hydrated.Load()) >> shift
		n := min(Region(bits.TrailingZeros64(^free)), span)
		if n == 0 {
			return at - start, disturbed
		}
		got, ok := w.claim(claimed, mask(shift, n))
		switch {
		case !ok:
			continue
		case got != mask(shift, n):
			return at - start + Region(bits.OnesCount64(got)), true
		}
		at += n
		if n < span {
			return at - start, disturbed
		}
	}
	return limit - start, disturbed
}

// claim claims a run of regions, wanted, that were free: claimed is what was found before. It returns those of the run that
// it got, from its start on; false: somebody has changed the word. Between the look and the swap a region may have been
// claimed, hydrated and given back by somebody else; from the swap on it cannot.
func (w *word) claim(claimed, wanted uint64) (got uint64, ok bool) {
	if !w.claimed.CompareAndSwap(claimed, claimed|wanted) {
		return 0, false
	}
	late := w.hydrated.Load() & wanted
	if late == 0 {
		return wanted, true
	}
	got = wanted & (late&-late - 1)
	w.claimed.And(^(wanted &^ got))
	return got, true
}

// settle makes regions that the caller owns hydrated, notes them for the next commit, and gives them back. commit: there
// was nothing to commit before, or a commit has taken them already, but could not yet count them.
func (t *table) settle(start Region, count Region, queue block.Queue) (commit bool) {
	limit := start + count
	for at := start; at < limit; {
		p := t.page(at)
		w := p.word(at)
		n := min(64-at%64, limit-at)
		w.hydrated.Or(mask(at%64, n))
		if t.note(p, at) {
			commit = true
		}
		w.claimed.And(^mask(at%64, n))
		at += n
	}
	t.counts.At(uint(queue)).n.Add(int64(count))
	last := limit - 1
	return commit || !t.page(last).isDirty(last) && t.count() == t.regions
}

// isDirty tells whether no commit has taken the change of region yet.
func (p *page) isDirty(region Region) bool {
	index := region % pageRegions / 64
	return p.dirty[index/64].Load()>>(index%64)&1 != 0
}

// note puts the word of region on the list for the next commit. Whoever takes pages off the list clears listed first and
// dirty then, and only then looks at the words: what is found set here will be looked at.
func (t *table) note(p *page, region Region) (first bool) {
	index := region % pageRegions / 64
	d, bit := &p.dirty[index/64], uint64(1)<<(index%64)
	if d.Load()&bit == 0 {
		d.Or(bit)
	}
	if p.listed.Load() || !p.listed.CompareAndSwap(false, true) {
		return false
	}
	for {
		head := t.changed.Load()
		p.next = head
		if t.changed.CompareAndSwap(head, p) {
			return head == nil
		}
	}
}

// unclaim gives back regions that the caller owns and that were not hydrated.
func (t *table) unclaim(start, count Region) {
	for at, limit := start, start+count; at < limit; {
		n := min(64-at%64, limit-at)
		t.page(at).word(at).claimed.And(^mask(at%64, n))
		at += n
	}
}

// takeChanged empties the list of changed pages.
func (t *table) takeChanged() []*page {
	var taken []*page
	for p := t.changed.Swap(nil); p != nil; {
		next := p.next
		p.listed.Store(false) // from here on the page, and next, may be listed anew
		taken = append(taken, p)
		p = next
	}
	return taken
}

// takeWords calls yield with the number and the value of each word of p that has changed, in order, and forgets that it
// has; false: yield has stopped it.
func (t *table) takeWords(p *page, yield func(number, value uint64) bool) bool {
	first := uint64(p.index) * pageWords
	for i := range p.dirty {
		for dirty := p.dirty[i].Swap(0); dirty != 0; dirty &= dirty - 1 {
			n := uint64(i*64 + bits.TrailingZeros64(dirty))
			value := p.words[n].hydrated.Load() &^ t.behind(Region(first+n)*64)
			if !yield(first+n, value) {
				return false
			}
		}
	}
	return true
}

// load sets the regions whose bits are set in words that were read from the metadata. For a table nobody else uses yet.
func (t *table) load(first uint64, words []uint64) {
	for i, v := range words {
		region := Region(first+uint64(i)) * 64
		if region >= t.regions {
			return
		}
		if v &^= t.behind(region); v != 0 {
			t.touch(region).word(region).hydrated.Or(v)
			t.counts.At(0).n.Add(int64(bits.OnesCount64(v)))
		}
	}
}

// count is the number of hydrated regions; exact when nothing is in flight.
func (t *table) count() Region {
	var n int64
	for i := range t.counts.Len() {
		n += t.counts.Index(i).n.Load()
	}
	return Region(n)
}

// shrink drops a page if all its regions are hydrated, which cannot change any more. Its changes must be committed.
func (t *table) shrink(index int) {
	at := &t.pages[index]
	p := at.Load()
	if p == nil || p == fullPage() || p.listed.Load() {
		return
	}
	for i := range p.words {
		if p.words[i].settled() != ^uint64(0) {
			return
		}
	}
	if !p.listed.Load() {
		at.Store(fullPage())
	}
}

// bytes is the memory that the table takes.
func (t *table) bytes() int64 {
	n := int64(len(t.pages)) * 8
	for i := range t.pages {
		if p := t.pages[i].Load(); p != nil && p != fullPage() {
			n += pageRegions*2/8 + 128
		}
	}
	return n
}
