package snapshot

import (
	"sync/atomic"

	"cowherd/cowstore"
	"cowherd/target"
)

// knownCopied remembers which chunks have been copied, one bit each, so that a later write to the origin need not
// search the exception table: the bits of a device in use stay in the CPU's cache where the table does not. It is a
// cache and nothing else, in the form in which a mapped device can look into it (target.Passage). A set bit is always
// true, because a chunk that has been copied stays so; a clear one says nothing.
//
// Pages of bits are made for a sample of the chunks only: the one in a thousand whose number hashes to it. So a page
// appears where writes are dense enough to pay for it, and pages cost at most about four bytes for each exception
// however the writes are spread. Chunks that were copied before their page appeared get their bit when they are next
// looked up.
type knownCopied struct {
	pages []atomic.Pointer[knownPage] // none nil; unknown where there is none yet
}

const (
	knownPagesMax = 1 << 17
	knownSample   = 10 // one chunk in 2^knownSample makes its page
)

type knownPage = target.PassagePage

// unknown is a page without any bit. Nobody sets one.
var unknown knownPage

// newKnownCopied covers chunks [0, count), or as many as it can: the table knows the others.
func newKnownCopied(count cowstore.Chunk) knownCopied {
	k := knownCopied{pages: make([]atomic.Pointer[knownPage], min(knownPages(count), knownPagesMax))}
	for i := range k.pages {
		k.pages[i].Store(&unknown)
	}
	return k
}

// knownPages is how many pages count chunks have.
func knownPages(count cowstore.Chunk) cowstore.Chunk {
	return (count + target.PassageUnits - 1) / target.PassageUnits
}

// covers tells whether there is a page for each of count chunks.
func (k *knownCopied) covers(count cowstore.Chunk) bool {
	return cowstore.Chunk(len(k.pages)) == knownPages(count)
}

// has tells whether chunk is known to have been copied.
func (k *knownCopied) has(chunk cowstore.Chunk) bool {
	i := chunk / target.PassageUnits
	if i >= cowstore.Chunk(len(k.pages)) {
		return false
	}
	page := k.pages[i].Load()
	return page[chunk>>6%cowstore.Chunk(len(page))].Load()>>(chunk&63)&1 != 0
}

// add notes that chunk has been copied: no write to the origin need wait for it any more.
func (k *knownCopied) add(chunk cowstore.Chunk) {
	i := chunk / target.PassageUnits
	if i >= cowstore.Chunk(len(k.pages)) {
		return
	}
	page := k.pages[i].Load()
	if page == &unknown {
		if uint64(chunk)*0x9e3779b97f4a7c15>>(64-knownSample) != 0 {
			return
		}
		k.pages[i].CompareAndSwap(&unknown, new(knownPage))
		page = k.pages[i].Load()
	}
	page[chunk>>6%cowstore.Chunk(len(page))].Or(1 << (chunk & 63))
}

// bytes is the memory that the bits take.
func (k *knownCopied) bytes() int64 {
	n := int64(8 * len(k.pages))
	for i := range k.pages {
		if k.pages[i].Load() != &unknown {
			n += int64(len(knownPage{}) * 8)
		}
	}
	return n
}
