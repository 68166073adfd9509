package crash

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"

	"cowherd/block"
)

// op is an operation of a list, and what the model knows of it.
type op struct {
	on             int
	kind           block.Op
	flags          block.Flags
	offset, length int64
	stamp          uint64 // what is written

	acknowledged bool
	covers       []*op // a flush: the writes that had been acknowledged before it was submitted
}

func (o *op) String() string {
	return fmt.Sprintf("%v on %s, %d bytes at %d, flags %#x, stamp %d", o.kind, deviceNames[o.on], o.length, o.offset,
		o.flags, o.stamp)
}

// fill puts in p what the operation writes: bytes that are different for each stamp and everywhere.
func (o *op) fill(p []byte) {
	if o.kind == block.OpWriteZeroes {
		clear(p)
		return
	}
	fill(p, o.stamp)
}

func fill(p []byte, stamp uint64) {
	random := rand.NewPCG(stamp, 0)
	for ; len(p) >= 8; p = p[8:] {
		binary.LittleEndian.PutUint64(p, random.Uint64())
	}
	last := random.Uint64()
	for i := range p {
		p[i] = byte(last >> (8 * i))
	}
}

// maker makes operations.
type maker struct {
	random  *rand.Rand
	c       *config
	stamp   *uint64
	devices []int // that operations are on
}

// step makes operations that are done at the same time: none touches a sector that another one writes.
func (m *maker) step() []*op {
	var step []*op
	for range 1 + m.random.IntN(m.c.width) {
		if o := m.op(); !disturbs(step, o) {
			step = append(step, o)
		}
	}
	return step
}

// disturbs tells whether o touches a sector of another operation on its device.
func disturbs(step []*op, o *op) bool {
	start, end := sectorsOf(o)
	for _, other := range step {
		if from, to := sectorsOf(other); other.on == o.on && start < to && from < end {
			return true
		}
	}
	return false
}

func (m *maker) op() *op {
	*m.stamp++
	o := &op{kind: block.OpWrite, stamp: *m.stamp, on: m.devices[m.random.IntN(len(m.devices))]}
	switch n := m.random.IntN(16); {
	case n < 2:
		return &op{on: o.on, kind: block.OpFlush}
	case n < 3 && !m.c.plain:
		o.kind = block.OpWriteZeroes
	case n < 5:
		o.flags = block.FUA
	}
	m.place(o)
	return o
}

// place gives o a range: one chunk, several, or bytes that have nothing to do with chunks.
func (m *maker) place(o *op) {
	chunk := int64(m.c.chunk)
	unit := int64(m.c.logical)
	o.offset = m.random.Int64N(m.c.origin/chunk) * chunk
	switch m.random.IntN(4) {
	case 0:
		o.length = chunk
	case 1:
		o.length = chunk * (1 + m.random.Int64N(max(6, m.c.longest)))
	default:
		o.offset = m.random.Int64N(m.c.origin/unit) * unit
		o.length = unit + m.random.Int64N(2*chunk/unit)*unit
	}
	o.length = min(o.length, m.c.origin-o.offset)
}
