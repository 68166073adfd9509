package snapshot

import (
	"sync"
	"sync/atomic"
	"unsafe"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/internal/percpu"
)

// table is the exception table of one snapshot: chunk of the origin -> slot. A slot is one atomic word (see slot)
// that stays where it is for the life of the table, so that looking up is lock-free and claiming a chunk is one
// compare-and-swap on its slot.
//
// Chunks are kept in groups of four consecutive ones, because writes are clustered and a group of one costs as much
// to find as a group of four. Groups live in slabs that never move; each queue fills slabs of its own, so that queues
// which insert at the same time do not write to the same cache lines. An open-addressing hash index of 32-bit entries
// finds the groups. The index alone is rebuilt when it is half full; it is sharded by ranges of
// groups, and only the insertion of a group and the growth of an index take the shard's lock.
//
//	shard --> index    [tag:6 | group+1:26] ...                    linear probing, at most half full
//	directory --> page --> slab    [group group ... group]         group: number, 4 slots
//
// Memory: a group is 40 bytes and its entry 8 to 16. Random chunks that share no group cost 48 to 56 bytes each,
// dense ones 12 to 14. Eight consecutive groups hash to consecutive entries, so a sequential run of 32 chunks finds
// its entries in one cache line.
//
// Invariants:
//
//  1. A group, once in an index, is in every later index of its shard, and stays at the same address.
//  2. group.number is written before the group's entry and never after.
//  3. An entry, once written, does not change: a reader that misses a group in an old index sees what was true before
//     the group was inserted.
//
// Rejected: flat arrays (2 KiB for each random 4 KiB chunk of a large device); a radix tree (its lowest interior
// level alone costs 512 bytes for each); one hash entry per chunk (24 bytes and more when dense); runs as the
// kernel's (random writes make none, and each take-over of a neighbour needs its lock).
type table struct {
	shards    [tableShards]tableShard
	directory [pagesMax]atomic.Pointer[slabPage]
	slabs     atomic.Uint32 // given out
	fillers   percpu.Shards[slabFiller]
}

const (
	tableShards = 64
	groupShift  = 2
	groupChunks = 1 << groupShift
	slabGroups  = 512
	pageSlabs   = 512
	pagesMax    = 256
	indexMin    = 8  // entries of a new index
	runShift    = 3  // 2^runShift consecutive groups share a hash
	rangeShift  = 10 // 2^rangeShift consecutive groups share a shard

	// entryGroupBits bounds the table: 2^26 groups hold 2^28 chunks, in 3 to 14 GiB of memory.
	entryGroupBits = 26
	entryGroupMask = 1<<entryGroupBits - 1
	slabsMax       = pageSlabs*pagesMax - 1
)

type tableShard struct {
	index atomic.Pointer[tableIndex]
	mu    sync.Mutex
	// In the index.
	groups int // +checklocks:mu
	_      [104]byte
}

// tableIndex is a power of two of entries; zero is free.
type tableIndex []atomic.Uint32

type slab [slabGroups]group

type slabPage [pageSlabs]atomic.Pointer[slab]

type group struct {
	number uint64
	slots  [groupChunks]atomic.Uint64
}

// slabFiller is the slab that a queue puts new groups in.
type slabFiller struct {
	mu sync.Mutex
	// The groups still free are [next, last).
	next uint32 // +checklocks:mu
	last uint32 // +checklocks:mu
}

func newTable() *table {
	return &table{fillers: percpu.New[slabFiller]()}
}

// tableHash spreads the numbers of groups; groups that differ in the low runShift bits only share it.
func tableHash(number uint64) uint64 {
	h := (number >> runShift) * 0x9e3779b97f4a7c15
	h ^= h >> 32
	return h * 0xd6e8feb86659fd93
}

// shard is where a group is indexed: neighbours over 4096 chunks are indexed together, so that jobs which write to
// ranges of their own seldom meet in a shard.
func (t *table) shard(number uint64) *tableShard { return &t.shards[shardOf(number)] }

// shardOf is the number of that shard.
func shardOf(number uint64) int { return int(number >> rangeShift * 0x9e3779b97f4a7c15 >> 58) }

// entryTag is the part of an entry that tells most groups apart without a look at the group.
func entryTag(hash, number uint64) uint32 {
	return uint32(hash>>16+number*13) << entryGroupBits
}

// entryHome is where the search for a group starts, before masking.
func entryHome(hash, number uint64) uint64 {
	return (hash >> 24 << runShift) | number&(1<<runShift-1)
}

// find is the slot of chunk, or nil if no chunk of its group was ever inserted: the slot is then as good as empty.
func (t *table) find(chunk cowstore.Chunk) *atomic.Uint64 {
	number := uint64(chunk) >> groupShift
	hash := tableHash(number)
	index := t.shard(number).index.Load()
	if index == nil {
		return nil
	}
	g := t.search(*index, hash, number)
	if g == nil {
		return nil
	}
	return &g.slots[chunk%groupChunks]
}

func (t *table) search(index tableIndex, hash, number uint64) *group {
	mask := uint64(len(index) - 1)
	tag := entryTag(hash, number)
	for at := entryHome(hash, number); ; at++ {
		entry := index[at&mask].Load()
		if entry == 0 {
			return nil
		}
		if entry&^entryGroupMask == tag {
			if g := t.group(entry&entryGroupMask - 1); g.number == number {
				return g
			}
		}
	}
}

// group is the one numbered i, which has been given out.
func (t *table) group(i uint32) *group {
	n := i / slabGroups
	return &t.directory[n/pageSlabs%pagesMax].Load()[n%pageSlabs].Load()[i%slabGroups]
}

// insert is the slot of chunk, whose group find did not find a moment ago; it is made on behalf of queue. nil: the
// table is full.
func (t *table) insert(queue block.Queue, chunk cowstore.Chunk) *atomic.Uint64 {
	number := uint64(chunk) >> groupShift
	i, ok := t.newGroup(queue, number)
	if !ok {
		return nil
	}
	// A group that another goroutine has inserted meanwhile wins; ours is lost, which only costs its 40 bytes.
	g := t.shard(number).insert(t, tableHash(number), number, i)
	return &g.slots[chunk%groupChunks]
}

// newGroup gives out a group with its number set.
func (t *table) newGroup(queue block.Queue, number uint64) (i uint32, ok bool) {
	f := t.fillers.At(uint(queue))
	f.mu.Lock()
	if f.next < f.last || t.refillLocked(f) {
		i, ok = f.next, true
		f.next++
	}
	f.mu.Unlock()
	if ok {
		t.group(i).number = number
	}
	return i, ok
}

// refillLocked gives f a new slab; false: the table is full.
// +checklocks:f.mu
func (t *table) refillLocked(f *slabFiller) bool {
	n := t.slabs.Add(1) - 1
	if n >= slabsMax {
		t.slabs.Add(^uint32(0))
		return false
	}
	t.page(n / pageSlabs)[n%pageSlabs].Store(new(slab))
	f.next, f.last = n*slabGroups, (n+1)*slabGroups
	return true
}

// page is the directory's page i, made if need be.
func (t *table) page(i uint32) *slabPage {
	p := &t.directory[i]
	if p.Load() == nil {
		p.CompareAndSwap(nil, new(slabPage))
	}
	return p.Load()
}

// insert puts group i in the index, unless one of its number is there; it gives the one that is there afterwards.
func (s *tableShard) insert(t *table, hash, number uint64, i uint32) *group {
	s.mu.Lock()
	g := s.insertLocked(t, hash, number, i)
	s.mu.Unlock()
	return g
}

// insertLocked does it.
// +checklocks:s.mu
func (s *tableShard) insertLocked(t *table, hash, number uint64, i uint32) *group {
	var index tableIndex
	if p := s.index.Load(); p != nil {
		index = *p
		if g := t.search(index, hash, number); g != nil {
			return g
		}
	}
	s.groups++
	if 2*s.groups > len(index) {
		index = s.growLocked(t, index)
	}
	index.put(hash, number, i)
	return t.group(i)
}

// growLocked publishes an index of twice the size.
// +checklocks:s.mu
func (s *tableShard) growLocked(t *table, index tableIndex) tableIndex {
	next := make(tableIndex, max(indexMin, 2*len(index)))
	for at := range index {
		if entry := index[at].Load(); entry != 0 {
			i := entry&entryGroupMask - 1
			number := t.group(i).number
			next.put(tableHash(number), number, i)
		}
	}
	s.index.Store(&next)
	return next
}

// put writes the entry of group i in the first free place. There always is one.
func (x tableIndex) put(hash, number uint64, i uint32) {
	mask := uint64(len(x) - 1)
	at := entryHome(hash, number)
	for x[at&mask].Load() != 0 {
		at++
	}
	x[at&mask].Store(entryTag(hash, number) | (i + 1))
}

// bytes is the memory that the table takes.
func (t *table) bytes() int64 {
	n := int64(unsafe.Sizeof(*t)) + int64(t.slabs.Load())*int64(unsafe.Sizeof(slab{}))
	for i := range t.directory {
		if t.directory[i].Load() != nil {
			n += int64(unsafe.Sizeof(slabPage{}))
		}
	}
	for i := range t.shards {
		if index := t.shards[i].index.Load(); index != nil {
			n += int64(unsafe.Sizeof(*index)) + int64(4*len(*index))
		}
	}
	return n
}
