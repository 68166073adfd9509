package crash

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"

	"cowherd/cowstore"
)

// The format, written down once more: what the kernel would read is not to depend on the code that is tested.
const (
	magic     = 0x70416e53
	sector    = 512
	recordLen = 16
)

// table is a store as the kernel finds it.
type table struct {
	there bool // there is a header
	valid bool
	chunk int64 // bytes
	old   []uint64
	new   []uint64
	rest  bool // there is something behind the end of the table, in its area
}

// parseTable reads a COW device. The error is about what the format forbids.
func parseTable(cow []byte) (*table, error) {
	le := binary.LittleEndian
	if le.Uint32(cow) == 0 {
		return &table{}, nil
	}
	if m, v := le.Uint32(cow), le.Uint32(cow[8:]); m != magic || v != 1 {
		return nil, fmt.Errorf("header: magic %#x, version %d", m, v)
	}
	t := &table{there: true, valid: le.Uint32(cow[4:]) == 1, chunk: int64(le.Uint32(cow[12:])) * sector}
	records := t.chunk / recordLen
	for area := int64(0); ; area++ {
		at := (1 + area*(records+1)) * t.chunk
		if at+t.chunk > int64(len(cow)) {
			return nil, fmt.Errorf("the table has no end: there is no area %d", area)
		}
		for slot := range records {
			p := cow[at+slot*recordLen:]
			r := [2]uint64{le.Uint64(p), le.Uint64(p[8:])}
			if r[1] == 0 {
				t.rest = len(bytes.Trim(cow[at+slot*recordLen:at+t.chunk], "\x00")) > 0
				return t, t.check(len(cow))
			}
			t.old, t.new = append(t.old, r[0]), append(t.new, r[1])
		}
	}
}

// check looks for records that are out of range or doubled.
func (t *table) check(size int) error {
	stride := uint64(t.chunk/recordLen) + 1
	olds, news := map[uint64]bool{}, make([]bool, int64(size)/t.chunk)
	for i, n := range t.new {
		switch old := t.old[i]; {
		case n%stride == 1 || (int64(n)+1)*t.chunk > int64(size):
			return fmt.Errorf("record %d: old %d, new %d: that is no chunk of data", i, old, n)
		case olds[old] || news[n]:
			return fmt.Errorf("record %d: old %d, new %d: one of them was there before", i, old, n)
		default:
			olds[old], news[n] = true, true
		}
	}
	return nil
}

// view is what the snapshot holds, over today's origin.
func (t *table) view(into, origin, cow []byte) error {
	copy(into, origin)
	for i, old := range t.old {
		start := int64(old) * t.chunk
		if start >= int64(len(into)) {
			return fmt.Errorf("record %d: old chunk %d lies behind the end of the origin", i, old)
		}
		copy(into[start:min(start+t.chunk, int64(len(into)))], cow[int64(t.new[i])*t.chunk:])
	}
	return nil
}

// stale is a COW device of an earlier life: everywhere where a new store may put an area lie records that look right.
func stale(random *rand.Rand, c *config) []byte {
	p := make([]byte, c.room*int64(c.chunk))
	fill(p, random.Uint64())
	le := binary.LittleEndian
	records := int64(c.chunk) / recordLen
	for chunk := int64(1); chunk < c.room; chunk += records + 1 {
		for slot := range records {
			r := p[chunk*int64(c.chunk)+slot*recordLen:]
			data := 2 + random.Int64N(c.room-2)
			if data%(records+1) == 1 {
				data++
			}
			le.PutUint64(r, uint64(random.Int64N(c.origin/int64(c.chunk))))
			le.PutUint64(r[8:], uint64(min(data, c.room-1)))
		}
	}
	putHeader(p, true, c.chunk)
	return p
}

// putHeader writes a header.
func putHeader(p []byte, valid bool, chunk cowstore.ChunkSize) {
	le := binary.LittleEndian
	clear(p[:sector])
	le.PutUint32(p, magic)
	if valid {
		le.PutUint32(p[4:], 1)
	}
	le.PutUint32(p[8:], 1)
	le.PutUint32(p[12:], uint32(chunk/sector))
}

// empty makes a store of p whose first area is zero and nothing else, as the kernel does.
func empty(p []byte, chunk cowstore.ChunkSize) {
	putHeader(p, true, chunk)
	clear(p[chunk : 2*chunk])
}
