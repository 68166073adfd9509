package metamorphic

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"

	"cowherd/block"
)

// What an operation does, beside the operations of a device.
const (
	opTake    = block.Op(100) // a snapshot
	opDrop    = block.Op(101)
	opExtents = block.Op(102) // asks which ranges hold data
)

// op is an operation of a list.
type op struct {
	kind           block.Op
	on             int // 0: the origin; n: the snapshot that was taken as number n
	offset, length int64
	flags          block.Flags
	stamp          uint64 // what is written
	class          int    // opTake: chunks are this many times four times as large as the configuration's smallest
	discards       bool   // opTake: discard_zeroes_cow
}

func (o op) String() string {
	switch o.kind {
	case opTake:
		return fmt.Sprintf("take snapshot %d, class %d, discards %v", o.on, o.class, o.discards)
	case opDrop:
		return fmt.Sprintf("drop snapshot %d", o.on)
	case opExtents:
		return fmt.Sprintf("extents of %d bytes at %d of %d", o.length, o.offset, o.on)
	}
	return fmt.Sprintf("%v %d bytes at %d of %d, flags %#x, stamp %d", o.kind, o.length, o.offset, o.on, o.flags, o.stamp)
}

// data is what an operation writes: a sequence that depends on its stamp, so that data in a wrong place is found out.
func (o op) data() []byte {
	p := make([]byte, o.length)
	fill(p, o.stamp)
	return p
}

// fill fills p with the sequence of a stamp.
func fill(p []byte, stamp uint64) {
	x := stamp*0x9e3779b97f4a7c15 + 1
	next := func() uint64 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		return x
	}
	for ; len(p) >= 8; p = p[8:] {
		binary.LittleEndian.PutUint64(p, next())
	}
	for i, last := 0, next(); i < len(p); i++ {
		p[i] = byte(last >> (8 * i))
	}
}

const (
	stepMax      = 10 // operations in a step
	snapshotsMax = 4  // at the same time
	classes      = 3  // of chunk sizes
)

// list is what one seed stands for.
type list struct {
	seed  uint64
	size  int64 // of the origin in bytes
	grain int64 // offsets and lengths are multiples of it
	steps [][]op
}

// maker makes a list. It knows which snapshots there are.
type maker struct {
	*list
	random *rand.Rand
	stamp  uint64
	taken  int
	alive  []op // as they were taken
}

// newList makes the list of a seed.
func newList(seed uint64, steps int) *list {
	random := rand.New(rand.NewPCG(seed, 1))
	l := &list{seed: seed, grain: 512}
	if seed%2 == 0 {
		l.grain = 1
	}
	// Never a whole number of chunks.
	l.size = (200_000+random.Int64N(500_000))/l.grain*l.grain + l.grain
	m := &maker{list: l, random: random}
	for range steps {
		l.steps = append(l.steps, m.step())
	}
	return l
}

// step makes a step. What would disturb another operation in it is left out.
func (m *maker) step() []op {
	if m.random.IntN(20) == 0 {
		o := m.area(op{kind: opExtents, on: m.device()})
		return []op{o}
	}
	var step []op
	alive := len(m.alive)
	switch n := m.random.IntN(30); {
	case alive < snapshotsMax && n < 3 || alive == 0 && n < 10:
		m.taken++
		step = append(step, op{kind: opTake, on: m.taken, class: m.random.IntN(classes), discards: m.random.IntN(2) == 0})
	case alive > 0 && n > 28-alive:
		i := m.random.IntN(alive)
		step = append(step, op{kind: opDrop, on: m.alive[i].on})
		m.alive = append(m.alive[:i], m.alive[i+1:]...)
	}
	for range 1 + m.random.IntN(stepMax-1) {
		if o := m.io(); fits(step, o) {
			step = append(step, o)
		}
	}
	if step[0].kind == opTake { // only from the next step on is it there
		m.alive = append(m.alive, step[0])
	}
	return step
}

// fits tells whether o disturbs none of step's operations and is not disturbed by them.
func fits(step []op, o op) bool {
	for _, other := range step {
		switch {
		case other.kind == opTake && o.on == 0 && o.kind.Writes():
			return false
		case other.kind == opDrop && o.on == 0 && o.kind == block.OpDiscard: // it depends on there being snapshots
			return false
		case other.on == o.on && (other.kind.Writes() || o.kind.Writes()) &&
			o.offset < other.offset+other.length && other.offset < o.offset+o.length:
			return false
		}
	}
	return true
}

// device picks the origin or one of its snapshots.
func (m *maker) device() int {
	if len(m.alive) == 0 || m.random.IntN(2) == 0 {
		return 0
	}
	return m.alive[m.random.IntN(len(m.alive))].on
}

// io makes an operation on a device.
func (m *maker) io() op {
	o := op{on: m.device()}
	switch n := m.random.IntN(20); {
	case n < 8:
		o.kind = block.OpRead
	case n < 15:
		o.kind = block.OpWrite
		m.stamp++
		o.stamp = m.stamp
	case n < 17:
		o.kind = block.OpWriteZeroes
		if m.random.IntN(2) == 0 {
			o.flags |= block.NoUnmap
		}
	case n < 18 && m.takesDiscards(o.on):
		o.kind = block.OpDiscard
	case n < 19:
		o.kind = block.OpFlush
		return o
	default:
		o.kind = block.OpRead
	}
	if o.kind.Writes() && o.kind != block.OpDiscard && m.random.IntN(8) == 0 {
		o.flags |= block.FUA
	}
	return m.area(o)
}

// takesDiscards tells whether a device has them in every configuration.
func (m *maker) takesDiscards(on int) bool {
	for _, s := range m.alive {
		if s.on == on {
			return s.discards
		}
	}
	return true
}

// area gives o a range: anything, something like a chunk, or much; now and then the end of the device, or all of it.
func (m *maker) area(o op) op {
	unit := max(m.grain, []int64{1, 512, 4096, 65536}[m.random.IntN(4)])
	most := []int64{1000, 10_000, 70_000, 200_000}[m.random.IntN(4)]
	o.offset = m.random.Int64N(m.size/unit) * unit
	o.length = max(unit, m.random.Int64N(most)/unit*unit)
	if m.random.IntN(40) == 0 {
		o.offset, o.length = 0, m.size
	}
	if left := m.size - o.offset; o.length > left || m.random.IntN(30) == 0 {
		o.length = left
	}
	return o
}
