package persistentdata

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"sync/atomic"
	"syscall"

	"cowherd/block"
)

// Manager is the metadata on a device in one transaction after the other: the kernel's transaction manager. See the
// package comment. Only Usage may be called concurrently with other methods.
type Manager struct {
	device block.Device
	cache  *cache
	space  spaceMap
	// What Usage tells.
	used, total atomic.Uint64
	// The first error of this transaction that leaves it half done; nothing more is done then.
	broken error
}

// Options of a Manager.
type Options struct {
	// CacheBlocks is how many blocks are kept in memory; 0: CacheBlocks.
	CacheBlocks int
}

// blocksOf is how many blocks of a device a space map covers.
func blocksOf(d block.Device) (uint64, error) {
	if lb := d.Limits().LogicalBlock; lb > BlockSize {
		return 0, fmt.Errorf("the metadata device has logical blocks of %d bytes, more than a metadata block of %d: %w",
			lb, BlockSize, syscall.EINVAL)
	}
	return uint64(min(d.Size()/BlockSize, BlocksMax)), nil
}

func newManager(d block.Device, o Options) *Manager {
	if o.CacheBlocks == 0 {
		o.CacheBlocks = CacheBlocks
	}
	m := &Manager{device: d, cache: newCache(d, o.CacheBlocks)}
	m.space.many = make(map[uint64]uint32)
	m.space.counts = Tree{m: m, valueSize: 4}
	return m
}

// Create begins the first transaction on d, in which block 0 is the superblock, block 1 the index, block 2 the root of the
// reference counts, and the bitmap blocks follow, as the kernel places them. Nothing is written until the cache is full or
// Commit is called, so that the caller erases an old superblock first. ENOSPC: the device is too small. EINVAL: its
// logical block is larger than a metadata block.
func Create(d block.Device, o Options) (*Manager, error) {
	blocks, err := blocksOf(d)
	if err != nil {
		return nil, err
	}
	m := newManager(d, o)
	s := &m.space
	s.blocks = blocks
	s.maps = make([]bitmap, bitmaps(blocks))
	if need := uint64(len(s.maps) + 3); blocks < need {
		return nil, fmt.Errorf("the metadata device has %d blocks of %d bytes, and a space map alone takes %d: %w",
			blocks, BlockSize, need, syscall.ENOSPC)
	}
	for i := range s.maps {
		s.maps[i].current, s.maps[i].free = new([BlockSize]byte), bitmapEntries
	}
	s.set(0, 0, 1)
	if s.index, err = s.take(); err != nil {
		return nil, err
	}
	s.moved = true
	if s.counts, err = NewTree(m, 4); err != nil {
		return nil, err
	}
	for i := range s.maps {
		if s.maps[i].place, err = s.take(); err != nil {
			return nil, err
		}
		s.maps[i].moved = true
	}
	return m, nil
}

// Open begins a transaction on what a superblock says. It reads the whole space map: at most 255 bitmap blocks, in runs.
// A *CorruptError says that it cannot be used.
func Open(d block.Device, r Root, o Options) (*Manager, error) {
	blocks, err := blocksOf(d)
	if err != nil {
		return nil, err
	}
	m := newManager(d, o)
	if err := r.check(blocks); err != nil {
		return nil, err
	}
	s := &m.space
	s.blocks, s.index, s.counts.root = r.Blocks, r.Index, r.RefCounts
	if err := m.loadSpaceMap(); err != nil {
		return nil, err
	}
	m.publish()
	return m, nil
}

// check tells whether a root can be right on a device of so many blocks.
func (r Root) check(blocks uint64) error {
	bad := func(rule Rule, what, want string, expected, found uint64) error {
		return &CorruptError{Block: 0, Kind: "superblock", Rule: rule, What: what, Want: want, Expected: expected, Found: found}
	}
	switch {
	case r.Blocks > blocks:
		return bad(RuleSpaceMapSize, "the number of blocks that the space map covers", atMost, blocks, r.Blocks)
	case r.Blocks < 4:
		return bad(RuleSpaceMapSize, "the number of blocks that the space map covers", atLeast, 4, r.Blocks)
	case r.Index == 0 || r.Index >= r.Blocks:
		return bad(RuleBlockRange, "the space map's index block", inRange, r.Blocks, r.Index)
	case r.RefCounts == 0 || r.RefCounts >= r.Blocks:
		return bad(RuleBlockRange, "the root of the reference counts", inRange, r.Blocks, r.RefCounts)
	}
	return nil
}

// loadSpaceMap reads index and bitmap blocks.
func (m *Manager) loadSpaceMap() error {
	s := &m.space
	var index [BlockSize]byte
	if err := readBlock(m.device, index[:], s.index, KindIndex); err != nil {
		return err
	}
	s.maps = make([]bitmap, bitmaps(s.blocks))
	places := make([]uint64, len(s.maps))
	for i := range s.maps {
		places[i] = le.Uint64(index[indexHeader+16*i:])
		if err := m.checkPointer(s.index, KindIndex, places[i]); err != nil {
			return err
		}
	}
	return m.readMany(places, KindBitmap, func(i int, p []byte) error {
		b := &s.maps[i]
		b.place, b.current = places[i], (*[BlockSize]byte)(slices.Clone(p))
		b.free = countFree(b.current)
		s.allocated += uint64(bitmapEntries - b.free)
		return nil
	})
}

// checkPointer tells whether a block may point to block n.
func (m *Manager) checkPointer(from uint64, kind *Kind, n uint64) error {
	if n == 0 || n >= m.space.blocks {
		return &CorruptError{Block: from, Kind: kind.Name, Rule: RuleBlockRange,
			What: "a block that it points to", Want: inRange, Expected: m.space.blocks, Found: n}
	}
	return nil
}

// readMany calls visit for each of the blocks, verified, in the order given: neighbours are read at once, and what is
// in memory is taken from there. p is valid during the call, in which nothing may be written.
func (m *Manager) readMany(places []uint64, kind *Kind, visit func(i int, p []byte) error) error {
	for i := 0; i < len(places); {
		if f := m.cache.look(places[i]); f != nil && f.kind == kind {
			if err := visit(i, f.data[:]); err != nil {
				return err
			}
			i++
			continue
		}
		n := m.runLen(places[i:])
		if err := checkRange(m.device, places[i]+uint64(n-1), kind); err != nil {
			return err
		}
		run := m.cache.buffer(n)
		if err := block.Read(m.device, run, int64(places[i])*BlockSize); err != nil {
			return fmt.Errorf("read %d blocks at block %d (%s): %w", n, places[i], kind.Name, err)
		}
		for ; n > 0; n-- {
			p := run[:BlockSize]
			run = run[BlockSize:]
			err := kind.Verify(p, places[i])
			if err == nil {
				err = visit(i, p)
			}
			if err != nil {
				return err
			}
			i++
		}
	}
	return nil
}

// runLen is how many blocks, from the first on, are neighbours that can be read at once.
func (m *Manager) runLen(places []uint64) int {
	n := 1
	for n < len(places) && n < runBlocks && places[n] == places[0]+uint64(n) && m.cache.frames[places[n]] == nil {
		n++
	}
	return n
}

// Blocks is how many blocks the space map covers.
func (m *Manager) Blocks() uint64 { return m.space.blocks }

// Usage is how many blocks the last commit has in use, of how many. It may be called at any time.
func (m *Manager) Usage() (used, total uint64) { return m.used.Load(), m.total.Load() }

func (m *Manager) publish() {
	m.used.Store(m.space.allocated)
	m.total.Store(m.space.blocks)
}

// RefCount is how often block n, smaller than Blocks, is referred to in this transaction.
func (m *Manager) RefCount(n uint64) (uint32, error) {
	if err := m.cache.trim(); err != nil {
		return 0, err
	}
	return m.space.count(n)
}

// Ref counts one more reference to block n, which is in use.
func (m *Manager) Ref(n uint64) error { return m.space.add(n, true) }

// Unref counts one reference to block n fewer. A block without any is free after the next commit, or at once if this
// transaction has taken it.
func (m *Manager) Unref(n uint64) error {
	if err := m.space.add(n, false); err != nil {
		return err
	}
	if count, err := m.space.count(n); err == nil && count == 0 {
		m.cache.drop(n)
	}
	return nil
}

// allocate is a new block of a kind, all zero.
func (m *Manager) allocate(kind *Kind) (*frame, error) {
	n, err := m.space.take()
	if err != nil {
		return nil, err
	}
	f := m.cache.add(n, kind)
	clear(f.data[:])
	m.cache.change(f)
	return f, nil
}

// shadow is block n such that it may be changed: itself, if this transaction has taken it and nothing else refers to it,
// or else a copy in a new block, in which case a reference to n is given up.
func (m *Manager) shadow(n uint64, kind *Kind, check func(n uint64, p []byte) error) (*frame, error) {
	old, err := m.cache.read(n, kind, check)
	if err != nil {
		return nil, err
	}
	count, err := m.space.count(n)
	if err != nil {
		return nil, err
	}
	if count == 1 && m.space.isNew(n) {
		m.cache.change(old)
		return old, nil
	}
	f, err := m.allocate(kind)
	if err != nil {
		return nil, err
	}
	f.data = old.data
	return f, m.Unref(n)
}

// do runs one operation of a transaction. An operation that fails may leave a tree half changed, so that nothing more is
// done after it.
func (m *Manager) do(operation func() error) error {
	if m.broken != nil {
		return fmt.Errorf("the transaction has failed before: %w", m.broken)
	}
	err := m.cache.trim()
	if err == nil {
		err = operation()
	}
	if err != nil {
		m.broken = err
	}
	return err
}

// Changed tells whether the transaction differs from the last commit.
func (m *Manager) Changed() bool { return m.space.changed }

// A Superblock says how the owner's superblock is written. It fills p, BlockSize bytes of zeroes, but for what Kind.Seal
// writes, in its first sector alone.
type Superblock struct {
	Kind *Kind
	Fill func(p []byte, space Root)
}

// Commit makes the transaction durable and begins the next one: dirty blocks, flush, superblock, flush. If nothing has
// changed nothing is written. ENOSPC: there is no room for the blocks of the space map. After an error nothing more can
// be done: what the last superblock on disk says is to be opened anew. SuperblockError tells whether that may be either.
func (m *Manager) Commit(super Superblock) error {
	if m.broken == nil && !m.space.changed {
		return nil
	}
	return m.do(func() error { return m.commit(super) })
}

// SuperblockError is an error of writing or flushing the superblock: the disk holds either the old one or the new one, and
// perhaps not for good.
type SuperblockError struct{ Err error }

func (e *SuperblockError) Error() string { return "write the superblock: " + e.Err.Error() }

// Unwrap gives the error of the device.
func (e *SuperblockError) Unwrap() error { return e.Err }

func (m *Manager) commit(super Superblock) error {
	s := &m.space
	if err := m.writeCounts(); err != nil {
		return fmt.Errorf("write the reference counts: %w", err)
	}
	if err := s.settle(); err != nil {
		return fmt.Errorf("write the space map: %w", err)
	}
	m.stageSpaceMap()
	if err := m.cache.writeDirty(); err != nil {
		return err
	}
	if err := block.Flush(m.device); err != nil {
		return fmt.Errorf("flush the metadata: %w", err)
	}
	var p [BlockSize]byte
	super.Fill(p[:], Root{Blocks: s.blocks, Allocated: s.allocated, Index: s.index, RefCounts: s.counts.root})
	super.Kind.Seal(p[:], 0)
	if err := WriteSuperblock(m.device, p[:]); err != nil {
		return &SuperblockError{err}
	}
	s.begun()
	m.publish()
	return nil
}

// WriteSuperblock writes a sealed superblock and flushes it.
func WriteSuperblock(d block.Device, p []byte) error {
	if err := block.Write(d, p, 0); err != nil {
		return err
	}
	return block.Flush(d)
}

// writeCounts brings the btree of reference counts up to date. The blocks of the tree itself are counted once or not at
// all, so that one round is enough; in damaged metadata another may follow, for each block that is moved.
func (m *Manager) writeCounts() error {
	s := &m.space
	for len(s.many) > 0 {
		for _, n := range slices.Sorted(maps.Keys(s.many)) {
			count := s.many[n]
			delete(s.many, n)
			var err error
			if count == 0 {
				_, err = s.counts.remove(n)
			} else {
				err = s.counts.insert(n, uint64(count))
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// settle finds new places for the index and all bitmap blocks that differ from the last commit, until no more do.
func (s *spaceMap) settle() error {
	if !s.moved {
		if err := s.move(&s.index); err != nil {
			return err
		}
		s.moved = true
	}
	for again := true; again; {
		again = false
		for i := range s.maps {
			b := &s.maps[i]
			if b.old == nil || b.moved {
				continue
			}
			if err := s.move(&b.place); err != nil {
				return err
			}
			b.moved, again = true, true
		}
	}
	return nil
}

// move gives a block of the space map a new place.
func (s *spaceMap) move(place *uint64) error {
	n, err := s.take()
	if err != nil {
		return err
	}
	old := *place
	*place = n
	return s.add(old, false)
}

// stageSpaceMap puts the blocks of the space map with those that are to be written.
func (m *Manager) stageSpaceMap() {
	s := &m.space
	for i := range s.maps {
		if b := &s.maps[i]; b.moved {
			f := m.cache.add(b.place, KindBitmap)
			f.data = *b.current
			m.cache.change(f)
		}
	}
	f := m.cache.add(s.index, KindIndex)
	s.putIndex(f.data[:])
	m.cache.change(f)
}

// begun makes what was committed the beginning of the next transaction.
func (s *spaceMap) begun() {
	for i := range s.maps {
		s.maps[i].old, s.maps[i].moved = nil, false
	}
	s.moved, s.changed, s.begin = false, false, 0
}

// valueMax is the largest value of a tree.
func valueMax(size int) uint64 {
	if size == 4 {
		return math.MaxUint32
	}
	return math.MaxUint64
}
