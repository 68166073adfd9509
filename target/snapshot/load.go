package snapshot

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	"cowherd/cowstore"
	"cowherd/internal/percpu"
)

// tableLoader fills a new table that nobody else uses yet, with the exceptions of a persistent store. Each worker owns
// the table's shards whose number is its own modulo the number of workers, so that nothing is locked; and as nobody looks
// until all is done, words are stored without a barrier, which for a million random exceptions makes the difference
// between waiting for each cache miss and having several under way.
type tableLoader struct {
	table *table
	many  bool               // records are expected
	parts []loaderPart       // by worker
	owner [tableShards]uint8 // the worker of each shard
}

// loaderPart is one worker's.
type loaderPart struct {
	slab       *slab // that new groups are put in
	next, last uint32
	spare      []slab           // to be used next, made together
	groups     [tableShards]int // in the index of a shard that is this worker's
	near       *group           // the one used last
	touched    uint32           // what touch has read, so that it is read
	err        error
	_          percpu.Pad
}

func newTableLoader(t *table, workers int) *tableLoader {
	l := &tableLoader{table: t, parts: make([]loaderPart, workers)}
	for i := range l.owner {
		l.owner[i] = uint8(i % workers)
	}
	return l
}

// Expect makes room in the index for so many random chunks, and a few more, for little is grown then.
func (l *tableLoader) Expect(records uint64) {
	size := indexMin
	for want := 2 * (records + records/64) / tableShards; uint64(size) < want; {
		size *= 2
	}
	all := make(tableIndex, size*tableShards)
	l.many = records >= manyRecords
	if l.many {
		adviseHuge(unsafe.Pointer(unsafe.SliceData(all)), unsafe.Sizeof(all[0])*uintptr(len(all)))
	}
	for i := range l.table.shards {
		index := all[i*size : (i+1)*size : (i+1)*size]
		l.table.shards[i].index.Store(&index)
	}
}

const (
	// manyRecords is from where on a table is worth huge pages.
	manyRecords = 1 << 16
	// slabsTogether is the number of slabs that are made together then: 10 MiB.
	slabsTogether = 512
)

// adviseHuge asks for huge pages for memory that has not been touched. A million random exceptions take 12,000 small
// pages, and the faults for them may take longer than all the rest. It is a hint: whether it is taken does not matter,
// nor that what lies beside the memory in the first and the last huge page is advised as well. There may be nothing: the
// garbage collector takes a pointer to where the first page begins for a sign of corruption, so there must never be one.
func adviseHuge(p unsafe.Pointer, length uintptr) {
	const page = 2 << 20
	skip := uintptr(p) % page
	_, _, _ = syscall.Syscall(syscall.SYS_MADVISE, uintptr(p)-skip, (skip+length+page-1)/page*page, syscall.MADV_HUGEPAGE)
	runtime.KeepAlive(p)
}

// Insert adds those of the records that are the worker's.
func (l *tableLoader) Insert(worker int, records []cowstore.Record) (doubled int) {
	p := &l.parts[worker]
	for i, r := range records {
		if i%touchAhead == 0 {
			l.touch(p, worker, records[i:min(i+touchAhead, len(records))])
		}
		number := uint64(r.Old) >> groupShift
		shard := shardOf(number)
		if l.owner[shard] != uint8(worker) || p.err != nil {
			continue
		}
		g := p.near
		if g == nil || g.number != number {
			if g = l.group(p, shard, number); g == nil {
				continue
			}
			p.near = g
		}
		at := &g.slots[r.Old%groupChunks]
		if at.Load() != 0 {
			return i
		}
		if r.New >= 1<<slotChunkBits {
			p.err = fmt.Errorf("chunk %d of the COW device is beyond what is supported: %w", r.New, syscall.EFBIG)
		}
		setPlain(at, uint64(copiedSlot(r.New)))
	}
	return -1
}

// touchAhead is the number of records whose places in the index are looked at together.
const touchAhead = 32

// touch brings the places in the index of the records to the cache: these loads wait for nothing, and so run beside
// each other, where those of group each wait for a branch.
func (l *tableLoader) touch(p *loaderPart, worker int, records []cowstore.Record) {
	sum := uint32(0)
	for _, r := range records {
		number := uint64(r.Old) >> groupShift
		if shard := shardOf(number); l.owner[shard] == uint8(worker) {
			index := *l.table.shards[shard].index.Load()
			sum += index[entryHome(tableHash(number), number)&uint64(len(index)-1)].Load()
		}
	}
	p.touched = sum
}

// group finds or makes a group. nil: the table is full.
func (l *tableLoader) group(p *loaderPart, shard int, number uint64) *group {
	t := l.table
	s := &t.shards[shard]
	index := *s.index.Load()
	hash := tableHash(number)
	mask, tag := uint64(len(index)-1), entryTag(hash, number)
	at := entryHome(hash, number)
	for ; ; at++ {
		entry := index[at&mask].Load()
		if entry == 0 {
			break
		}
		if entry&^entryGroupMask == tag {
			if g := t.group(entry&entryGroupMask - 1); g.number == number {
				return g
			}
		}
	}
	if p.next == p.last && !l.refill(p) {
		return nil
	}
	i := p.next
	p.next++
	g := &p.slab[i%slabGroups]
	g.number = number
	if p.groups[shard]++; 2*p.groups[shard] > len(index) {
		s.mu.Lock()
		index = s.growLocked(t, index)
		s.mu.Unlock()
		index.put(hash, number, i)
		return g
	}
	setPlain32(&index[at&mask], tag|(i+1))
	return g
}

// refill gives a worker a new slab; false: the table is full.
func (l *tableLoader) refill(p *loaderPart) bool {
	t := l.table
	n := t.slabs.Add(1) - 1
	if n >= slabsMax {
		t.slabs.Add(^uint32(0))
		p.err = fmt.Errorf("the exception table is full: %w", syscall.ENOMEM)
		return false
	}
	p.slab = l.newSlab(p)
	t.page(n / pageSlabs)[n%pageSlabs].Store(p.slab)
	p.next, p.last = n*slabGroups, (n+1)*slabGroups
	return true
}

// newSlab makes a slab, or takes one of those that were made together.
func (l *tableLoader) newSlab(p *loaderPart) *slab {
	if !l.many {
		return new(slab)
	}
	if len(p.spare) == 0 {
		p.spare = make([]slab, slabsTogether)
		adviseHuge(unsafe.Pointer(unsafe.SliceData(p.spare)), unsafe.Sizeof(p.spare[0])*slabsTogether)
	}
	s := &p.spare[0]
	p.spare = p.spare[1:]
	return s
}

// finish makes the table ready for everybody.
func (l *tableLoader) finish() error {
	for i := range l.parts {
		if err := l.parts[i].err; err != nil {
			return err
		}
	}
	for i := range l.table.shards {
		s := &l.table.shards[i]
		s.mu.Lock()
		s.groups = l.parts[l.owner[i]].groups[i]
		s.mu.Unlock()
	}
	return nil
}

// setPlain stores v without a barrier. Nobody else may use the word before something that orders memory.
func setPlain(at *atomic.Uint64, v uint64) { *(*uint64)(unsafe.Pointer(at)) = v }

func setPlain32(at *atomic.Uint32, v uint32) { *(*uint32)(unsafe.Pointer(at)) = v }
