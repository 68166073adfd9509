package persistentdata

import "math"

// blockSet is a set of blocks of a device: a bit for each.
type blockSet []uint64

func newBlockSet(blocks uint64) blockSet { return make(blockSet, (blocks+63)/64) }

func (s blockSet) has(n uint64) bool { return s[n/64]>>(n%64)&1 != 0 }

// add tells whether n is new.
func (s blockSet) add(n uint64) bool {
	was := s.has(n)
	s[n/64] |= 1 << (n % 64)
	return !was
}

// walker goes through all of a btree, in the order of its keys. It believes nothing: a tree that points back into itself
// is as finite for it as any other, because no block is entered twice.
type walker struct {
	blocks    uint64 // blocks beyond that there are none
	valueSize int
	// read fills p with block n, verified.
	read func(p []byte, n uint64, kind *Kind) error
	seen blockSet // the blocks entered, of this tree and of others
	// node is told of each node that was checked, before what lies below it; may be nil.
	node func(n uint64) error
	// leaf is told of each leaf, which is checked, and valid during the call.
	leaf func(n uint64, p node) error
	// damaged is told of a node that cannot be entered, and what keys it would have; nil: that ends the walk. It gives
	// the error that ends the walk, or nil to go on behind the node.
	damaged func(err error, first, last uint64) error
}

// walk goes through the tree with this root.
func (w *walker) walk(root uint64) error {
	return w.enter(0, root, 0, math.MaxUint64, 1)
}

// enter goes through the node n, which the node from points to, for keys from first to last.
func (w *walker) enter(from, n, first, last uint64, depth int) error {
	var space [BlockSize]byte
	p := node(space[:])
	if err := w.load(p, from, n, first, last, depth); err != nil {
		if w.damaged == nil {
			return err
		}
		return w.damaged(err, first, last)
	}
	if w.node != nil {
		if err := w.node(n); err != nil {
			return err
		}
	}
	if p.leaf() {
		return w.leaf(n, p)
	}
	for i := range p.len() {
		end := last
		if i+1 < p.len() {
			end = p.key(i+1) - 1
		}
		if err := w.enter(n, p.value(i), p.key(i), end, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// load reads and checks a node.
func (w *walker) load(p node, from, n, first, last uint64, depth int) error {
	bad := func(block uint64, rule Rule, what, want string, expected, found uint64) error {
		return &CorruptError{Block: block, Kind: KindNode.Name, Rule: rule, What: what, Want: want, Expected: expected, Found: found}
	}
	switch {
	case n == 0 || n >= w.blocks:
		return bad(from, RuleBlockRange, "a block that it points to", inRange, w.blocks, n)
	case depth > depthMax:
		return bad(n, RuleTreeDepth, "the depth at which it is found", atMost, depthMax, uint64(depth))
	case !w.seen.add(n):
		return bad(n, RuleReachedTwice, "the number of ways by which it is reached", "", 1, 2)
	}
	if err := w.read(p, n, KindNode); err != nil {
		return err
	}
	if err := checkNode(n, p, w.valueSize); err != nil {
		return err
	}
	switch {
	case p.len() == 0:
		return nil
	case p.key(0) < first:
		return bad(n, RuleNodeKeys, "its first key, by the node above,", atLeast, first, p.key(0))
	case p.key(p.len()-1) > last:
		return bad(n, RuleNodeKeys, "its last key, by the node above,", atMost, last, p.key(p.len()-1))
	}
	return nil
}
