package persistentdata

import (
	"errors"
	"fmt"

	"cowherd/block"
)

// A Finding is one thing that a Checker has to say.
type Finding struct {
	Rule      Rule
	Violation bool   // of a rule; false: a remark
	Block     uint64 // that it is about: the first of Count
	Count     uint64 // blocks that it is about; 0: it is about none
	What      string // in words, with place and values
}

// Checker looks at metadata without changing or believing it, goes on behind what is damaged, and finds what no single
// block shows: blocks in use that the space map thinks free, and the reverse. Its memory is bounded by the size of the
// device: at most 3 MiB, and reference counts of three and more.
//
//	k := NewChecker(d, root, report)
//	k.SpaceMap()
//	k.Array(...)          for each array
//	k.Finish()
type Checker struct {
	device block.Device
	root   Root
	blocks uint64 // that can be looked at
	report func(*Finding)

	reached blockSet
	maps    [][]byte // bitmap blocks; nil: could not be read
	index   []byte   // nil: could not be read
	many    map[uint64]uint32
	counted bool // the btree of reference counts was read to its end
	// Reached counts blocks that something refers to; Leaked those that are counted as in use all the same.
	Reached, Leaked uint64
	// Damaged tells whether something could not be read or believed, so that what lies behind it was not reached.
	Damaged bool
}

// NewChecker is a Checker of the metadata on d whose superblock has this root. report is called for each finding.
func NewChecker(d block.Device, root Root, report func(*Finding)) *Checker {
	device := uint64(min(d.Size()/BlockSize, BlocksMax))
	k := &Checker{device: d, root: root, blocks: min(root.Blocks, device), report: report, many: make(map[uint64]uint32)}
	k.reached = newBlockSet(max(k.blocks, 1))
	if root.Blocks > device {
		k.violation(RuleSpaceMapSize, 0, "the space map covers %d blocks, and the device has %d", root.Blocks, device)
	}
	k.reached.add(0)
	return k
}

func (k *Checker) violation(rule Rule, n uint64, format string, args ...any) {
	k.report(&Finding{Rule: rule, Violation: true, Block: n, Count: 1, What: fmt.Sprintf(format, args...)})
}

// damage reports what keeps from going on.
func (k *Checker) damage(n uint64, err error) {
	k.Damaged = true
	if e, ok := errors.AsType[*CorruptError](err); ok {
		k.report(&Finding{Rule: e.Rule, Violation: true, Block: e.Block, Count: 1, What: e.Error()})
		return
	}
	k.violation(RuleUnreadable, n, "%v", err)
}

// reach enters block n, which another block refers to, and tells whether it is there and new.
func (k *Checker) reach(from, n uint64, kind *Kind) bool {
	switch {
	case n == 0 || n >= k.blocks:
		k.damage(from, &CorruptError{Block: from, Kind: "pointer to " + kind.Name, Rule: RuleBlockRange,
			What: "a block that it points to", Want: inRange, Expected: k.blocks, Found: n})
		return false
	case !k.reached.add(n):
		k.damage(n, &CorruptError{Block: n, Kind: kind.Name, Rule: RuleReachedTwice, What: "the number of ways by which it is reached",
			Expected: 1, Found: 2})
		return false
	}
	return true
}

// SpaceMap checks the blocks of the space map.
func (k *Checker) SpaceMap() {
	k.maps = make([][]byte, bitmaps(k.blocks))
	if k.reach(0, k.root.Index, KindIndex) {
		index := make([]byte, BlockSize)
		if err := readBlock(k.device, index, k.root.Index, KindIndex); err != nil {
			k.damage(k.root.Index, err)
		} else {
			k.index = index
		}
	}
	for i := range k.maps {
		if k.index == nil {
			break
		}
		n := le.Uint64(k.index[indexHeader+16*i:])
		if !k.reach(k.root.Index, n, KindBitmap) {
			continue
		}
		p := make([]byte, BlockSize)
		if err := readBlock(k.device, p, n, KindBitmap); err != nil {
			k.damage(n, err)
			continue
		}
		k.maps[i] = p
		k.checkEntry(i, n)
	}
	w := k.walker(4)
	k.counted = true
	lost := w.damaged
	w.damaged = func(err error, first, last uint64) error {
		k.counted = false
		return lost(err, first, last)
	}
	w.leaf = func(n uint64, p node) error {
		for i := range p.len() {
			if key := p.key(i); key < k.blocks {
				k.many[key] = uint32(p.value(i))
			} else {
				k.violation(RuleRefCount, n, "block %d (%s): a reference count of block %d, and there are %d", n, KindNode.Name, key, k.blocks)
			}
		}
		return nil
	}
	_ = w.walk(k.root.RefCounts) // damaged gives no error
}

// checkEntry checks what the index says of a bitmap block.
func (k *Checker) checkEntry(i int, n uint64) {
	p := (*[BlockSize]byte)(k.maps[i])
	e := k.index[indexHeader+16*i:]
	if got, want := le.Uint32(e[8:]), countFree(p); got != uint32(want) {
		k.violation(RuleFreeCount, n, "block %d (%s): the index says that %d of its counters are zero, and %d are", n, KindBitmap.Name, got, want)
	}
	if hint, first := le.Uint32(e[12:]), firstFree(p, 0); int64(hint) > int64(first) {
		k.violation(RuleFreeHint, n, "block %d (%s): the index says that no counter below %d is zero, and %d is", n, KindBitmap.Name, hint, first)
	}
	for j := firstBehind(k.blocks, i); j < bitmapEntries; j++ {
		if counter(p, j) != 0 {
			k.violation(RuleSpaceMapSize, n, "block %d (%s): counter %d is not zero, and belongs to no block of the device", n, KindBitmap.Name, j)
			return
		}
	}
}

// firstBehind is the first counter of bitmap i that belongs to no block.
func firstBehind(blocks uint64, i int) int {
	return int(min(blocks-uint64(i)*bitmapEntries, bitmapEntries))
}

// walker is one that enters what it reaches, and reports damage.
func (k *Checker) walker(valueSize int) *walker {
	return &walker{
		blocks: k.blocks, valueSize: valueSize, seen: k.reached,
		read: func(p []byte, n uint64, kind *Kind) error { return readBlock(k.device, p, n, kind) },
		damaged: func(err error, _, _ uint64) error {
			k.damage(0, err)
			return nil
		},
	}
}

// Array checks the array of words whose tree begins with root, and calls visit with the words of every block that can be
// believed, in order; they are valid during the call. lost is called with ranges of words that cannot be read, in order
// too. An error of visit ends the check, and is returned.
func (k *Checker) Array(root, words uint64, visit func(block, first uint64, words []uint64) error, lost func(first, count uint64) error) error {
	c := arrayChecker{k: k, words: words, visit: visit, lost: lost}
	w := k.walker(8)
	w.leaf = c.leaf
	if err := w.walk(root); err != nil {
		return err
	}
	return c.upTo(arrayBlocks(words))
}

// arrayChecker checks array blocks in the order of a tree's leaves.
type arrayChecker struct {
	k      *Checker
	words  uint64
	next   uint64 // index of the next block
	visit  func(block, first uint64, words []uint64) error
	lost   func(first, count uint64) error
	data   [BlockSize]byte
	buffer [ArrayWords]uint64
}

// upTo gives up all blocks before the one with this index.
func (c *arrayChecker) upTo(index uint64) error {
	if index == c.next {
		return nil
	}
	first := c.next * ArrayWords
	c.next = index
	return c.lost(first, min(index*ArrayWords, c.words)-first)
}

// leaf checks the array blocks of a leaf. The walker has seen that keys ascend.
func (c *arrayChecker) leaf(n uint64, p node) error {
	for i := range p.len() {
		index, child := p.key(i), p.value(i)
		if index >= arrayBlocks(c.words) {
			c.k.violation(RuleArrayIndex, n, "block %d (%s): index %d of an array of %d blocks", n, KindNode.Name, index, arrayBlocks(c.words))
			return nil
		}
		if err := c.upTo(index); err != nil {
			return err
		}
		if !c.k.reach(n, child, KindArray) {
			continue // c.next stays: the block is lost
		}
		err := readBlock(c.k.device, c.data[:], child, KindArray)
		if err == nil {
			err = checkArray(child, c.data[:], c.words, index)
		}
		if err != nil {
			c.k.damage(child, err)
			continue
		}
		c.next = index + 1
		if err := c.visit(child, index*ArrayWords, decodeWords(&c.buffer, c.data[:])); err != nil {
			return err
		}
	}
	return nil
}

// Finish compares what is referred to with what the space map counts, once all trees have been checked.
func (k *Checker) Finish() {
	var run Finding
	var allocated uint64
	whole := true
	for n := range k.blocks {
		p := k.maps[n/bitmapEntries]
		if p == nil {
			whole = false
			continue
		}
		count := uint64(counter((*[BlockSize]byte)(p), int(n%bitmapEntries)))
		if count > 0 {
			allocated++
		}
		if many, ok := k.many[n]; count == manyRefs && ok {
			count = uint64(many)
		} else if ok || count == manyRefs && k.counted {
			k.violation(RuleRefCount, n, "block %d: its counter is %d, and there is a count in the btree: %v", n, count, ok)
		}
		rule, violation := k.judge(n, count)
		if rule != run.Rule || run.Count > 0 && run.Block+run.Count != n {
			k.flush(&run)
			run = Finding{Rule: rule, Violation: violation, Block: n}
		}
		run.Count++
	}
	k.flush(&run)
	if whole && allocated != k.root.Allocated {
		k.violation(RuleFreeCount, 0, "the superblock says that %d blocks are in use, and by the space map %d are", k.root.Allocated, allocated)
	}
}

// judge compares the reference count of block n with what refers to it. "": they agree.
func (k *Checker) judge(n, count uint64) (rule Rule, violation bool) {
	reached := k.reached.has(n)
	if reached {
		k.Reached++
	}
	switch {
	case reached && count == 0:
		return RuleInUse, true
	case reached && count > 1:
		return RuleRefCount, true
	case !reached && count > 0:
		k.Leaked++
		return RuleLeak, false
	}
	return "", false
}

// flush reports a run of blocks.
func (k *Checker) flush(f *Finding) {
	blocks := fmt.Sprintf("block %d", f.Block)
	if f.Count > 1 {
		blocks = fmt.Sprintf("blocks %d to %d", f.Block, f.Block+f.Count-1)
	}
	switch f.Rule {
	case "":
		return
	case RuleInUse:
		f.What = blocks + ": in use, and free by the space map: the next commits would overwrite it"
	case RuleRefCount:
		f.What = blocks + ": referred to once, and counted more often: it would never be free again"
	case RuleLeak:
		f.What = blocks + ": in use by the space map, and nothing refers to it"
		if k.Damaged {
			f.What += " that could be read"
		}
	}
	k.report(f)
}
