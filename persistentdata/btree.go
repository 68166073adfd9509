package persistentdata

import (
	"fmt"
	"syscall"
)

// depthMax bounds the depth of a tree. The smallest fan-out that splitting leaves is 84, so that the largest tree that a
// space map has room for is 4 deep.
const depthMax = 16

// Tree is a btree of one level in the kernel's sense: keys of 64 bits, values of 4 or 8 bytes. The root changes when the
// tree does: its owner keeps it.
type Tree struct {
	m         *Manager
	root      uint64
	valueSize int
}

// NewTree makes an empty tree. valueSize is 4 or 8.
func NewTree(m *Manager, valueSize int) (Tree, error) {
	f, err := m.allocate(KindNode)
	if err != nil {
		return Tree{}, err
	}
	node(f.data[:]).init(flagLeaf, valueSize)
	return Tree{m: m, root: f.n, valueSize: valueSize}, nil
}

// OpenTree is the tree whose root is a block that some other block or a superblock names.
func OpenTree(m *Manager, root uint64, valueSize int) (Tree, error) {
	t := Tree{m: m, root: root, valueSize: valueSize}
	if root == 0 || root >= m.space.blocks {
		return t, &CorruptError{Block: root, Kind: KindNode.Name, Rule: RuleBlockRange,
			What: "the root of a btree", Want: inRange, Expected: m.space.blocks, Found: root}
	}
	return t, nil
}

// Root is the block that the tree begins with.
func (t *Tree) Root() uint64 { return t.root }

// check is checkNode for this tree's nodes.
func (t *Tree) check(n uint64, p []byte) error {
	if err := checkNode(n, p, t.valueSize); err != nil {
		return err
	}
	if q := node(p); !q.leaf() {
		for i := range q.len() {
			if err := t.m.checkPointer(n, KindNode, q.value(i)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (t *Tree) read(n uint64) (node, error) {
	f, err := t.m.cache.read(n, KindNode, t.check)
	if err != nil {
		return nil, err
	}
	return f.data[:], t.own(f)
}

func (t *Tree) shadow(n uint64) (*frame, error) {
	f, err := t.m.shadow(n, KindNode, t.check)
	if err == nil {
		err = t.own(f)
	}
	return f, err
}

// own tells whether a node that was in memory, and perhaps came there as one of another tree, can be one of this tree.
func (t *Tree) own(f *frame) error {
	if p := node(f.data[:]); p.leaf() && p.valueSize() != t.valueSize {
		return &CorruptError{Block: f.n, Kind: KindNode.Name, Rule: RuleNodeSize, What: "its value size",
			Expected: uint64(t.valueSize), Found: uint64(p.valueSize())}
	}
	return nil
}

// tooDeep is the error of a tree that does not end.
func (t *Tree) tooDeep(n uint64) error {
	return &CorruptError{Block: n, Kind: KindNode.Name, Rule: RuleTreeDepth, What: "the depth at which it is found", Want: atMost, Expected: depthMax,
		Found: depthMax + 1}
}

// Lookup is the value of a key.
func (t *Tree) Lookup(key uint64) (value uint64, ok bool, err error) {
	if err := t.m.cache.trim(); err != nil {
		return 0, false, err
	}
	return t.lookup(key)
}

// lookup is Lookup within an operation.
func (t *Tree) lookup(key uint64) (value uint64, ok bool, err error) {
	n := t.root
	for range depthMax {
		p, err := t.read(n)
		if err != nil {
			return 0, false, err
		}
		if !p.leaf() {
			n = p.value(p.child(key))
			continue
		}
		i := p.search(key) - 1
		if i < 0 || p.key(i) != key {
			return 0, false, nil
		}
		return p.value(i), true, nil
	}
	return 0, false, t.tooDeep(n)
}

// Insert gives a key a value, whether it has one or not. Values of a tree with 4 bytes are below 2^32 (EINVAL). ENOSPC:
// there is no room. After an error the transaction can only be given up.
func (t *Tree) Insert(key, value uint64) error {
	if value > valueMax(t.valueSize) {
		return fmt.Errorf("btree: value %d has more than %d bytes: %w", value, t.valueSize, syscall.EINVAL)
	}
	return t.m.do(func() error { return t.insert(key, value) })
}

// insert is Insert within an operation. On the way down it splits every full node, so that there is room for one more
// entry in the node above whenever a child is split.
func (t *Tree) insert(key, value uint64) error {
	f, err := t.shadow(t.root)
	if err != nil {
		return err
	}
	t.root = f.n
	if p := node(f.data[:]); p.len() == p.max() {
		if err := t.splitRoot(f); err != nil {
			return err
		}
	}
	for range depthMax {
		p := node(f.data[:])
		if p.leaf() {
			i := p.search(key)
			if i > 0 && p.key(i-1) == key {
				p.setValue(i-1, value)
				return nil
			}
			p.insert(i, key, value)
			return nil
		}
		i := p.child(key)
		if key < p.key(i) {
			p.setKey(i, key)
		}
		child, err := t.shadow(p.value(i))
		if err != nil {
			return err
		}
		p.setValue(i, child.n)
		if c := node(child.data[:]); c.len() == c.max() {
			right, err := t.split(child)
			if err != nil {
				return err
			}
			r := node(right.data[:])
			p.insert(i+1, r.key(0), right.n)
			if key >= r.key(0) {
				child = right
			}
		}
		f = child
	}
	return t.tooDeep(f.n)
}

// split moves the upper half of a node to a new one.
func (t *Tree) split(f *frame) (*frame, error) {
	right, err := t.m.allocate(KindNode)
	if err != nil {
		return nil, err
	}
	p, r := node(f.data[:]), node(right.data[:])
	r.init(le.Uint32(p[4:]), p.valueSize())
	half := p.len() / 2
	p.move(half, p.len()-half, r, 0)
	r.setLen(p.len() - half)
	p.cut(half)
	return right, nil
}

// splitRoot puts a level below the root, which stays where it is.
func (t *Tree) splitRoot(f *frame) error {
	left, err := t.m.allocate(KindNode)
	if err != nil {
		return err
	}
	left.data = f.data
	right, err := t.split(left)
	if err != nil {
		return err
	}
	clear(f.data[:])
	p := node(f.data[:])
	p.init(flagInner, 8)
	p.insert(0, node(left.data[:]).key(0), left.n)
	p.insert(1, node(right.data[:]).key(0), right.n)
	return nil
}

// Delete takes a key away, and tells whether it was there.
func (t *Tree) Delete(key uint64) (was bool, err error) {
	err = t.m.do(func() error {
		was, err = t.remove(key)
		return err
	})
	return was, err
}

// remove is Delete within an operation. On the way down it fills every node that is a third full or less from a
// neighbour, so that one entry can be taken from whatever node it comes to.
func (t *Tree) remove(key uint64) (was bool, err error) {
	if _, ok, err := t.lookup(key); err != nil || !ok {
		return false, err
	}
	f, err := t.shadow(t.root)
	if err != nil {
		return false, err
	}
	t.root = f.n
	for range depthMax {
		p := node(f.data[:])
		if p.leaf() {
			p.remove(p.search(key)-1, 1)
			return true, nil
		}
		child, err := t.shadow(p.value(p.child(key)))
		if err != nil {
			return false, err
		}
		p.setValue(p.child(key), child.n)
		if c := node(child.data[:]); c.len() <= c.max()/3 && p.len() > 1 {
			if child, err = t.fill(p, p.child(key), child, key); err != nil {
				return false, err
			}
		}
		if f.n == t.root && p.len() == 1 {
			t.root = child.n // the root has one child left, which takes its place
			if err := t.m.Unref(f.n); err != nil {
				return false, err
			}
		}
		f = child
	}
	return false, t.tooDeep(f.n)
}

// fill evens out child i of p with a neighbour, or makes the two one, and returns the one under which key lies.
func (t *Tree) fill(p node, i int, child *frame, key uint64) (*frame, error) {
	at := i // of the left one of the two
	if i+1 == p.len() {
		at--
	}
	other, err := t.shadow(p.value(at + at + 1 - i))
	if err != nil {
		return nil, err
	}
	left, right := child, other
	if at < i {
		left, right = other, child
	}
	p.setValue(at, left.n)
	p.setValue(at+1, right.n)
	l, r := node(left.data[:]), node(right.data[:])
	if l.leaf() != r.leaf() {
		return nil, &CorruptError{Block: other.n, Kind: KindNode.Name, Rule: RuleNodeFlags, What: "its flags, beside a neighbour with others,",
			Expected: uint64(le.Uint32(child.data[4:])), Found: uint64(le.Uint32(other.data[4:]))}
	}
	sum := l.len() + r.len()
	if sum <= l.max() {
		r.move(0, r.len(), l, l.len())
		l.setLen(sum)
		p.remove(at+1, 1)
		return left, t.m.Unref(right.n)
	}
	if n := sum/2 - l.len(); n > 0 {
		r.move(0, n, l, l.len())
		l.setLen(l.len() + n)
		r.remove(0, n)
	} else if n = -n; n > 0 {
		r.move(0, r.len(), r, n)
		r.setLen(r.len() + n)
		l.move(l.len()-n, n, r, 0)
		l.cut(l.len() - n)
	}
	p.setKey(at+1, r.key(0))
	if key >= r.key(0) {
		return right, nil
	}
	return left, nil
}
