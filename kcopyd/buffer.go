package kcopyd

import (
	"math/bits"
	"sync"
	"sync/atomic"
	"unsafe"

	"cowherd/internal/percpu"
)

const (
	// bufferAlign is the alignment in bytes of every buffer, as direct I/O wants it.
	bufferAlign = 4096
	// classShift is the binary logarithm of the smallest class of buffers; each class is twice the one before.
	classShift = 12
	classCount = 8
)

// The largest class is a sub-job's piece.
var _ [0]struct{} = [SubJobSize - 1<<(classShift+classCount-1)]struct{}{}

// zeroes is what zeroing writes to devices that cannot write zeroes by themselves. Nobody writes to it. It is made at its
// first use: few commands of the program have one.
func zeroes() []byte {
	zeroMemory.once.Do(func() { zeroMemory.bytes = alignedMemory(SubJobSize) })
	return zeroMemory.bytes
}

// zeroMemory is what zeroes returns. A sync.OnceValue would be made at the start of every command.
var zeroMemory struct {
	once  sync.Once
	bytes []byte
}

// A buffer has one owner: the sub-job that uses it, or the shard in whose list it is free.
type buffer struct {
	next   *buffer
	class  int
	memory []byte // nil until it is used for the first time
	_      percpu.Pad
}

// classOf is the class of the smallest buffer of at least n bytes, 1 <= n <= SubJobSize.
func classOf(n int64) int { return max(bits.Len64(uint64(n-1))-classShift, 0) }

// size is what the buffer takes, in bytes.
func (b *buffer) size() int64 { return 1 << (classShift + b.class) }

// bytes are the buffer's first n bytes. They are allocated here rather than by the pool, which holds a lock.
func (b *buffer) bytes(n int64) []byte {
	if b.memory == nil {
		b.memory = alignedMemory(int(b.size()))
	}
	return b.memory[:n]
}

// alignedMemory allocates n bytes at a multiple of bufferAlign. The runtime aligns powers of two of that size by
// itself, but does not promise to.
func alignedMemory(n int) []byte {
	m := make([]byte, n)
	if misalignment(m) == 0 {
		return m
	}
	return alignedPart(make([]byte, n+bufferAlign), n)
}

// alignedPart is the aligned part of m, which is bufferAlign longer than n.
func alignedPart(m []byte, n int) []byte {
	skip := (bufferAlign - misalignment(m)) % bufferAlign
	return m[skip : skip+n : skip+n]
}

func misalignment(m []byte) int {
	return int(uintptr(unsafe.Pointer(unsafe.SliceData(m))) % bufferAlign)
}

// tally is what a shard counts under its lock.
type tally struct {
	jobs, errors            uint64
	bytesRead, bytesWritten uint64
}

func (t *tally) add(u *tally) {
	t.jobs += u.jobs
	t.errors += u.errors
	t.bytesRead += u.bytesRead
	t.bytesWritten += u.bytesWritten
}

// A shard is a queue's part of an engine: its free buffers and its counters. The counters that a job moves together
// with a buffer lie under the same lock, which is cheaper than an atomic for each.
type shard struct {
	submitted atomic.Uint64        // jobs, but for those that entered; scaled only
	finished  atomic.Uint64        // jobs whose Done has returned
	recent    atomic.Pointer[pair] // of the devices of the last job that might have been offloaded

	mu sync.Mutex
	// +checklocks:mu
	entered uint64 // jobs that were submitted, and counted under the lock
	// +checklocks:mu
	free [classCount]*buffer // stacks: the one used last has its bytes in the CPU's cache
	// +checklocks:mu
	inUse int64 // bytes; negative where buffers of another shard's were given back
	// +checklocks:mu
	counted tally
	// +checklocks:mu
	counters
}

// take removes a free buffer; nil if there is none.
func (sh *shard) take(class int) *buffer {
	sh.mu.Lock()
	b := sh.takeLocked(class)
	sh.mu.Unlock()
	return b
}

// enter is take for the buffer of a job that it counts as submitted.
func (sh *shard) enter(class int) *buffer {
	sh.mu.Lock()
	sh.entered++
	b := sh.takeLocked(class)
	sh.mu.Unlock()
	return b
}

// jobs is the number of jobs submitted on the queue to a scaled engine.
func (sh *shard) jobs() uint64 {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	return sh.submitted.Load() + sh.entered
}

// takeLocked is take for a caller who holds the lock.
//
// +checklocks:sh.mu
func (sh *shard) takeLocked(class int) *buffer {
	b := sh.free[class]
	if b != nil {
		sh.free[class], b.next = b.next, nil
		sh.inUse += b.size()
	}
	return b
}

// give takes the buffer of s, if it has one, back to the free ones, and counts what s did with it.
func (sh *shard) give(s *subJob) {
	sh.mu.Lock()
	sh.giveLocked(s)
	sh.mu.Unlock()
}

// giveLocked is give for a caller who holds the lock.
//
// +checklocks:sh.mu
func (sh *shard) giveLocked(s *subJob) {
	if b := s.buf; b != nil {
		s.buf = nil
		b.next, sh.free[b.class] = sh.free[b.class], b
		sh.inUse -= b.size()
	}
	sh.countLocked(s)
}

// count adds t to the counters.
func (sh *shard) count(t tally) {
	sh.mu.Lock()
	sh.counted.add(&t)
	sh.mu.Unlock()
}

// lend adds to the bytes in use what a buffer takes that did not come from the shard's own list.
func (sh *shard) lend(n int64) {
	sh.mu.Lock()
	sh.inUse += n
	sh.mu.Unlock()
}

// drop forgets all free buffers and returns what they took, in bytes. The memory is the garbage collector's.
func (sh *shard) drop() int64 {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	var n int64
	for class := range sh.free {
		for b := sh.free[class]; b != nil; b = b.next {
			n += b.size()
		}
		sh.free[class] = nil
	}
	return n
}

// A pool holds an engine's shards, the room that is left below the ceiling, and the sub-jobs that found none. Its lock
// is taken only when a shard has no buffer, and by everybody who gives one back while sub-jobs wait.
type pool struct {
	shards  percpu.Shards[shard]
	ceiling int64 // bytes

	// waiting is the length of waiters, raised before the last look for a buffer, so that either this look finds
	// what somebody gives back, or that somebody sees waiting above zero and looks at the list. In its own cache
	// lines because everybody reads it and it hardly ever changes.
	_       [128]byte
	waiting atomic.Int64
	_       [128]byte

	mu sync.Mutex
	// +checklocks:mu
	room int64 // bytes below the ceiling that no buffer takes
	// +checklocks:mu
	waiters subJobs
	// +checklocks:mu
	waits uint64 // sub-jobs that had to wait
}

// init makes an empty pool of at most ceiling bytes.
func (p *pool) init(ceiling int64) {
	if ceiling == 0 {
		ceiling = BufferCeilingDefault
	}
	p.shards = percpu.New[shard]()
	p.ceiling = max(ceiling, SubJobSize)
	p.mu.Lock()
	p.room = p.ceiling
	p.mu.Unlock()
}

// acquire finds a buffer for s, which is in phaseStart. Without one it is false: s waits, is no longer the caller's,
// and will be in a list that restart fills.
func (p *pool) acquire(s *subJob) bool {
	if !s.wantsBuffer() {
		s.phase = phaseTake
		return true
	}
	sh, class := s.job.state.shard, s.bufferClass()
	if p.waiting.Load() == 0 {
		if b := sh.take(class); b != nil {
			s.buf, s.phase = b, phaseTake
			return true
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waiting.Add(1)
	if p.waiters.count == 0 {
		if b := p.findLocked(sh, class); b != nil {
			p.waiting.Add(-1)
			s.buf, s.phase = b, phaseTake
			return true
		}
	}
	p.waiters.push(s)
	p.waits++
	return false
}

// restart gives buffers to those that wait, in order, as far as there are any, and appends them to todo. It is called
// whenever a buffer has been given back. It returns how many it restarted.
func (p *pool) restart(todo *subJobs) int {
	if p.waiting.Load() == 0 {
		return 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	count := 0
	for p.waiters.count > 0 {
		s := p.waiters.head
		b := p.findLocked(s.job.state.shard, s.bufferClass())
		if b == nil {
			break
		}
		p.waiters.pop()
		p.waiting.Add(-1)
		s.buf, s.phase = b, phaseTake
		todo.push(s)
		count++
	}
	return count
}

// find is findLocked for a caller without the lock.
func (p *pool) find(sh *shard, class int) *buffer {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.findLocked(sh, class)
}

// findLocked finds a buffer for a job of the shard sh: its own, a new one, another shard's, or a new one in place of
// whatever is free. It is nil when all that would make room is in use.
//
// +checklocks:p.mu
func (p *pool) findLocked(sh *shard, class int) *buffer {
	if b := sh.take(class); b != nil {
		return b
	}
	b := &buffer{class: class}
	if p.room < b.size() {
		for i := range p.shards.Len() {
			if b := p.shards.Index(i).take(class); b != nil {
				return b
			}
		}
		for i := 0; p.room < b.size() && i < p.shards.Len(); i++ {
			p.room += p.shards.Index(i).drop()
		}
	}
	if p.room < b.size() {
		return nil
	}
	p.room -= b.size()
	sh.lend(b.size())
	return b
}
