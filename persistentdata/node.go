package persistentdata

import "sort"

// A btree node: keys, and values of 4 or 8 bytes behind them; an inner node's values are blocks. All numbers are
// little-endian.
//
//	0      4       8           16        20          24           28    32                  32+8*max
//	+------+-------+-----------+---------+-----------+------------+-----+-------------------+--------------------------+
//	| csum | flags | own block | entries | max       | value size | pad | keys: u64[max]    | values: value size * max |
//	+------+-------+-----------+---------+-----------+------------+-----+-------------------+--------------------------+
const (
	nodeHeader = 32
	flagInner  = 1
	flagLeaf   = 2
)

// node is a btree node in a block.
type node []byte

// entriesMax is how many entries a node has room for: a multiple of three, which the kernel's splitting wants.
func entriesMax(valueSize int) int { return (BlockSize - nodeHeader) / (8 + valueSize) / 3 * 3 }

// init makes an all-zero block an empty node.
func (p node) init(flags uint32, valueSize int) {
	le.PutUint32(p[4:], flags)
	le.PutUint32(p[20:], uint32(entriesMax(valueSize)))
	le.PutUint32(p[24:], uint32(valueSize))
}

func (p node) leaf() bool             { return le.Uint32(p[4:]) == flagLeaf }
func (p node) len() int               { return int(le.Uint32(p[16:])) }
func (p node) setLen(n int)           { le.PutUint32(p[16:], uint32(n)) }
func (p node) max() int               { return int(le.Uint32(p[20:])) }
func (p node) valueSize() int         { return int(le.Uint32(p[24:])) }
func (p node) key(i int) uint64       { return le.Uint64(p[nodeHeader+8*i:]) }
func (p node) setKey(i int, k uint64) { le.PutUint64(p[nodeHeader+8*i:], k) }

func (p node) values() []byte { return p[nodeHeader+8*p.max():] }

func (p node) value(i int) uint64 {
	if p.valueSize() == 4 {
		return uint64(le.Uint32(p.values()[4*i:]))
	}
	return le.Uint64(p.values()[8*i:])
}

func (p node) setValue(i int, v uint64) {
	if p.valueSize() == 4 {
		le.PutUint32(p.values()[4*i:], uint32(v))
		return
	}
	le.PutUint64(p.values()[8*i:], v)
}

// search is the number of keys that are at most key.
func (p node) search(key uint64) int {
	return sort.Search(p.len(), func(i int) bool { return p.key(i) > key })
}

// child is the entry of an inner node under which a key lies, or would: the last whose key is at most that, or the first.
func (p node) child(key uint64) int { return max(p.search(key)-1, 0) }

// move moves n entries from place i of p to place j of q, which may be p. Lengths stay.
func (p node) move(i, n int, q node, j int) {
	size := p.valueSize()
	copy(q[nodeHeader+8*j:], p[nodeHeader+8*i:][:8*n])
	copy(q.values()[size*j:], p.values()[size*i:][:size*n])
}

// insert puts an entry at place i.
func (p node) insert(i int, key, value uint64) {
	p.move(i, p.len()-i, p, i+1)
	p.setLen(p.len() + 1)
	p.setKey(i, key)
	p.setValue(i, value)
}

// remove takes n entries at place i away. What lies behind the last entry is zero.
func (p node) remove(i, n int) {
	p.move(i+n, p.len()-i-n, p, i)
	p.cut(p.len() - n)
}

// cut shortens a node to n entries.
func (p node) cut(n int) {
	size := p.valueSize()
	clear(p[nodeHeader+8*n : nodeHeader+8*p.len()])
	clear(p.values()[size*n : size*p.len()])
	p.setLen(n)
}

// checkNode tells whether block n, which is sealed as a node, is one whose leaves have values of this size.
func checkNode(n uint64, p node, valueSize int) error {
	bad := func(rule Rule, what, want string, expected, found uint64) error {
		return &CorruptError{Block: n, Kind: KindNode.Name, Rule: rule, What: what, Want: want, Expected: expected, Found: found}
	}
	flags := le.Uint32(p[4:])
	if flags == flagInner {
		valueSize = 8
	} else if flags != flagLeaf {
		return bad(RuleNodeFlags, "its flags", "1 or", flagLeaf, uint64(flags))
	}
	if got := le.Uint32(p[24:]); got != uint32(valueSize) {
		return bad(RuleNodeSize, "its value size", "", uint64(valueSize), uint64(got))
	}
	most := entriesMax(valueSize)
	if got := le.Uint32(p[20:]); got != uint32(most) {
		return bad(RuleNodeSize, "its number of entries at most", "", uint64(most), uint64(got))
	}
	if got := le.Uint32(p[16:]); got > uint32(most) {
		return bad(RuleNodeSize, "its number of entries", atMost, uint64(most), uint64(got))
	}
	if flags == flagInner && p.len() == 0 {
		return bad(RuleNodeSize, "the number of entries of an inner node", atLeast, 1, 0)
	}
	for i := 1; i < p.len(); i++ {
		if p.key(i-1) >= p.key(i) {
			return bad(RuleNodeKeys, "a key", atLeast, p.key(i-1)+1, p.key(i))
		}
	}
	return nil
}
