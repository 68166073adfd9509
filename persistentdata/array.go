package persistentdata

import (
	"errors"
	"fmt"
	"syscall"
)

// An array block: words of a big array, all blocks full but the last. All numbers are little-endian.
//
//	0      4             8         12           16          24
//	+------+-------------+---------+------------+-----------+---------------------+
//	| csum | entries max | entries | value size | own block | words: u64[entries] |
//	+------+-------------+---------+------------+-----------+---------------------+
const (
	arrayHeader = 24
	// ArrayWords is how many words an array block holds.
	ArrayWords = (BlockSize - arrayHeader) / 8
)

// Array is an array of words of 64 bits: a btree whose keys count array blocks and whose values are these blocks. Word i
// is in block i/ArrayWords. It does not shrink or grow. A bitset is one: bit b is bit b%64 of word b/64, and the bits of the
// last word that are none of the bitset's are zero.
type Array struct {
	m     *Manager
	tree  Tree
	words uint64
	// The array block that was set last, new in this transaction; at is its index, block its place while that is valid.
	at    uint64
	block uint64
}

// arrayBlocks is how many blocks hold so many words.
func arrayBlocks(words uint64) uint64 { return (words + ArrayWords - 1) / ArrayWords }

// wordsIn is how many of the words lie in block i of an array.
func wordsIn(words, i uint64) int { return int(min(words-i*ArrayWords, ArrayWords)) }

// NewArray makes an array of words, at least one. fill gives the words of one block after the other, of which it is
// handed zeroes to change; nil: all words are zero. The blocks are taken in ascending order, and written as the cache
// fills, neighbours together. ENOSPC: there is no room.
func NewArray(m *Manager, words uint64, fill func(first uint64, words []uint64) error) (*Array, error) {
	if words == 0 {
		return nil, fmt.Errorf("an array of no words: %w", syscall.EINVAL)
	}
	if need := ArrayTreeBlocks(words); need > m.space.blocks-m.space.allocated {
		return nil, fmt.Errorf("an array of %d words takes %d blocks, and %d of %d are free: %w", words, need,
			m.space.blocks-m.space.allocated, m.space.blocks, syscall.ENOSPC)
	}
	a := &Array{m: m, words: words, tree: Tree{m: m, valueSize: 8}}
	places := make([]uint64, arrayBlocks(words))
	buffer := make([]uint64, ArrayWords)
	for i := range places {
		err := m.do(func() (err error) {
			places[i], err = a.build(uint64(i), buffer, fill)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	root, err := a.buildTree(places)
	a.tree.root = root
	return a, err
}

// build makes array block i.
func (a *Array) build(i uint64, buffer []uint64, fill func(first uint64, words []uint64) error) (uint64, error) {
	f, err := a.m.allocate(KindArray)
	if err != nil {
		return 0, err
	}
	p := f.data[:]
	n := wordsIn(a.words, i)
	le.PutUint32(p[4:], ArrayWords)
	le.PutUint32(p[8:], uint32(n))
	le.PutUint32(p[12:], 8)
	if fill == nil {
		return f.n, nil
	}
	clear(buffer)
	if err := fill(i*ArrayWords, buffer[:n]); err != nil {
		return 0, err
	}
	for j, word := range buffer[:n] {
		le.PutUint64(p[arrayHeader+8*j:], word)
	}
	return f.n, nil
}

// ArrayTreeBlocks is how many blocks NewArray takes for so many words: array blocks and the nodes above them.
func ArrayTreeBlocks(words uint64) uint64 {
	level := arrayBlocks(words)
	sum := level
	for first := true; first || level > 1; first = false {
		level = nodesFor(level)
		sum += level
	}
	return sum
}

// nodesFor is how many nodes NewArray puts above so many blocks.
func nodesFor(blocks uint64) uint64 {
	most := uint64(entriesMax(8))
	return (blocks + most - 1) / most
}

// buildTree puts nodes above the array blocks, level by level. The entries of a level are shared out evenly, so that
// every node is at least half full, as if they had been inserted one by one.
func (a *Array) buildTree(children []uint64) (root uint64, err error) {
	keys := make([]uint64, len(children))
	for i := range keys {
		keys[i] = uint64(i)
	}
	for flags := uint32(flagLeaf); flags == flagLeaf || len(children) > 1; flags = flagInner {
		nodes := int(nodesFor(uint64(len(children))))
		next, nextKeys := make([]uint64, nodes), make([]uint64, nodes)
		for i := range nodes {
			start, end := i*len(children)/nodes, (i+1)*len(children)/nodes
			err := a.m.do(func() error {
				f, err := a.m.allocate(KindNode)
				if err != nil {
					return err
				}
				p := node(f.data[:])
				p.init(flags, 8)
				p.setLen(end - start)
				for j := start; j < end; j++ {
					p.setKey(j-start, keys[j])
					p.setValue(j-start, children[j])
				}
				next[i], nextKeys[i] = f.n, keys[start]
				return nil
			})
			if err != nil {
				return 0, err
			}
		}
		children, keys = next, nextKeys
	}
	return children[0], nil
}

// OpenArray is an array of words, at least one, whose tree begins with a block that the owner has kept.
func OpenArray(m *Manager, root, words uint64) (*Array, error) {
	t, err := OpenTree(m, root, 8)
	return &Array{m: m, tree: t, words: words}, err
}

// Root is the block that the array's tree begins with.
func (a *Array) Root() uint64 { return a.tree.root }

// Words is the number of words.
func (a *Array) Words() uint64 { return a.words }

// checkArray tells whether p, sealed as block n, can be array block i of an array of so many words.
func checkArray(n uint64, p []byte, words, i uint64) error {
	for _, field := range [...]struct {
		what string
		at   int
		want uint64
	}{
		{"its number of entries at most", 4, ArrayWords},
		{"its number of entries", 8, uint64(wordsIn(words, i))},
		{"its value size", 12, 8},
	} {
		if got := uint64(le.Uint32(p[field.at:])); got != field.want {
			return &CorruptError{Block: n, Kind: KindArray.Name, Rule: RuleArraySize, What: field.what, Expected: field.want, Found: got}
		}
	}
	return nil
}

// Get is word i.
func (a *Array) Get(i uint64) (word uint64, err error) {
	if i >= a.words {
		return 0, a.behindEnd(i)
	}
	if err := a.m.cache.trim(); err != nil {
		return 0, err
	}
	return a.get(i)
}

func (a *Array) behindEnd(i uint64) error {
	return fmt.Errorf("word %d of an array of %d: %w", i, a.words, syscall.EINVAL)
}

// get is Get within an operation.
func (a *Array) get(i uint64) (uint64, error) {
	n, err := a.find(i / ArrayWords)
	if err != nil {
		return 0, err
	}
	f, err := a.m.cache.read(n, KindArray, a.check(i/ArrayWords))
	if err != nil {
		return 0, err
	}
	return le.Uint64(f.data[arrayHeader+8*(i%ArrayWords):]), nil
}

// check is checkArray for block i of this array.
func (a *Array) check(i uint64) func(n uint64, p []byte) error {
	return func(n uint64, p []byte) error { return checkArray(n, p, a.words, i) }
}

// find is the place of array block i.
func (a *Array) find(i uint64) (uint64, error) {
	n, ok, err := a.tree.lookup(i)
	switch {
	case err != nil:
		return 0, err
	case !ok:
		return 0, &CorruptError{Block: a.tree.root, Kind: KindNode.Name, Rule: RuleArrayIndex, What: fmt.Sprintf("the number of array blocks with index %d in the tree", i),
			Expected: 1, Found: 0}
	}
	return n, a.m.checkPointer(a.tree.root, KindNode, n)
}

// Set gives word i a value. It is cheapest in ascending order: words of one block after the other cost one descent. A
// word that has this value already costs no new block. EINVAL: there is no such word. ENOSPC: there is no room. After
// an error the transaction can only be given up.
func (a *Array) Set(i, word uint64) error {
	if i >= a.words {
		return a.behindEnd(i)
	}
	return a.m.do(func() error {
		at := arrayHeader + 8*(i%ArrayWords)
		if a.block != 0 && a.at == i/ArrayWords && a.m.space.isNew(a.block) {
			f, err := a.m.cache.read(a.block, KindArray, a.check(a.at))
			if err == nil {
				le.PutUint64(f.data[at:], word)
				a.m.cache.change(f)
			}
			return err
		}
		if old, err := a.get(i); err != nil || old == word {
			return err
		}
		f, err := a.shadow(i / ArrayWords)
		if err == nil {
			le.PutUint64(f.data[at:], word)
		}
		return err
	})
}

// shadow is array block i such that it may be changed, and makes all above it new.
func (a *Array) shadow(i uint64) (*frame, error) {
	f, err := a.tree.shadow(a.tree.root)
	if err != nil {
		return nil, err
	}
	a.tree.root = f.n
	for range depthMax {
		p := node(f.data[:])
		at := p.child(i)
		n := p.value(at)
		if p.leaf() {
			if err := a.m.checkPointer(f.n, KindNode, n); err != nil {
				return nil, err
			}
			f, err = a.m.shadow(n, KindArray, a.check(i))
			if err == nil {
				p.setValue(at, f.n)
				a.at, a.block = i, f.n
			}
			return f, err
		}
		if f, err = a.tree.shadow(n); err != nil {
			return nil, err
		}
		p.setValue(at, f.n)
	}
	return nil, a.tree.tooDeep(f.n)
}

// Each calls yield for all words, those of one block at a time, in order, until it returns false. words is valid during the
// call, in which the array must not be used. What this transaction has set is seen. Neighbouring blocks are read at once.
// A *CorruptError says what cannot be believed; what came before it has been yielded.
func (a *Array) Each(yield func(first uint64, words []uint64) bool) error {
	reader := arrayReader{words: a.words, readMany: a.m.readMany, yield: yield}
	w := walker{blocks: a.m.space.blocks, valueSize: 8, seen: newBlockSet(a.m.space.blocks), leaf: reader.leaf, read: a.m.peek}
	err := w.walk(a.tree.root)
	if err == nil {
		err = reader.end(a.tree.root)
	}
	if err == errStopped {
		return nil
	}
	return err
}

// Blocks calls visit for every block of the array: nodes, and array blocks, of which nothing is read.
func (a *Array) Blocks(visit func(n uint64) error) error {
	seen := newBlockSet(a.m.space.blocks)
	w := walker{blocks: a.m.space.blocks, valueSize: 8, seen: seen, read: a.m.peek, node: visit}
	w.leaf = func(n uint64, p node) error {
		for i := range p.len() {
			child := p.value(i)
			if err := a.m.checkPointer(n, KindNode, child); err != nil {
				return err
			}
			if !seen.add(child) {
				return &CorruptError{Block: child, Kind: KindArray.Name, Rule: RuleReachedTwice, What: "the number of ways by which it is reached",
					Expected: 1, Found: 2}
			}
			if err := visit(child); err != nil {
				return err
			}
		}
		return nil
	}
	return w.walk(a.tree.root)
}

// peek fills p with block n as it is in memory, or on disk, and does not keep it.
func (m *Manager) peek(p []byte, n uint64, kind *Kind) error {
	if f := m.cache.frames[n]; f != nil && f.kind == kind {
		copy(p, f.data[:])
		return nil
	}
	return readBlock(m.device, p, n, kind)
}

// errStopped ends a walk that was told to stop.
var errStopped = errors.New("stopped")

// arrayReader reads array blocks in the order of a tree's leaves.
type arrayReader struct {
	words    uint64
	next     uint64 // index of the next block
	readMany func(places []uint64, kind *Kind, visit func(i int, p []byte) error) error
	yield    func(first uint64, words []uint64) bool
	places   []uint64
	buffer   [ArrayWords]uint64
}

// leaf reads what a leaf points to.
func (r *arrayReader) leaf(n uint64, p node) error {
	r.places = r.places[:0]
	first := r.next
	for i := range p.len() {
		if p.key(i) != r.next || r.next >= arrayBlocks(r.words) {
			return &CorruptError{Block: n, Kind: KindNode.Name, Rule: RuleArrayIndex, What: "the index of an array block", Expected: r.next, Found: p.key(i)}
		}
		r.places = append(r.places, p.value(i))
		r.next++
	}
	return r.readMany(r.places, KindArray, func(i int, p []byte) error {
		index := first + uint64(i)
		if err := checkArray(r.places[i], p, r.words, index); err != nil {
			return err
		}
		if !r.yield(index*ArrayWords, decodeWords(&r.buffer, p)) {
			return errStopped
		}
		return nil
	})
}

// decodeWords reads the words of an array block that has been checked.
func decodeWords(buffer *[ArrayWords]uint64, p []byte) []uint64 {
	words := buffer[:le.Uint32(p[8:])]
	for j := range words {
		words[j] = le.Uint64(p[arrayHeader+8*j:])
	}
	return words
}

// end tells whether all blocks have been there.
func (r *arrayReader) end(root uint64) error {
	if want := arrayBlocks(r.words); r.next != want {
		return &CorruptError{Block: root, Kind: KindNode.Name, Rule: RuleArrayIndex, What: "the number of array blocks in the tree", Expected: want, Found: r.next}
	}
	return nil
}
