package crash

import (
	"bytes"
	"fmt"
	"slices"

	"cowherd/block"
)

// view is what a device may hold after a crash: of each sector the versions that may be there. Operations are told in
// the order of the recorder's marks; two writes to one sector are never in flight at the same time.
//
// Invariants:
//
//  1. newest is what the device holds if nothing is lost.
//  2. The versions of a sector are in order; the first is durable, and of the others none is known to be. A sector that
//     is not in sectors has one version, which is in newest.
type view struct {
	name      string
	newest    []byte
	sectors   map[int64][]version
	unflushed []*op // writes that are acknowledged and not known to be durable
}

// version is a sector after a write; op is nil for what was there at first.
type version struct {
	op   *op
	data []byte
	any  bool // a discard: it may hold anything
}

func newView(name string, content []byte) *view {
	return &view{name: name, newest: content, sectors: map[int64][]version{}}
}

// sectorsOf is the half-open range of sectors that an operation touches.
func sectorsOf(o *op) (start, end int64) {
	return int64(block.SectorFloor(o.offset)), int64(block.SectorCeil(o.offset + o.length))
}

// sector is the newest version of a sector.
func (v *view) sector(n int64) []byte {
	start := n * block.SectorSize
	return v.newest[start:min(start+block.SectorSize, int64(len(v.newest)))]
}

// begin tells that an operation is about to be submitted.
func (v *view) begin(o *op) {
	if o.kind == block.OpFlush {
		o.covers = slices.Clone(v.unflushed)
		return
	}
	start, end := sectorsOf(o)
	for n := start; n < end; n++ {
		if v.sectors[n] == nil {
			v.sectors[n] = []version{{data: slices.Clone(v.sector(n))}}
		}
	}
	if o.kind != block.OpDiscard {
		o.fill(v.newest[o.offset : o.offset+o.length])
	}
	for n := start; n < end; n++ {
		v.sectors[n] = append(v.sectors[n], version{op: o, data: slices.Clone(v.sector(n)), any: o.kind == block.OpDiscard})
	}
}

// end tells that an operation was acknowledged.
func (v *view) end(o *op) {
	o.acknowledged = true
	switch {
	case o.kind == block.OpFlush:
		for _, w := range o.covers {
			v.durable(w)
		}
		v.unflushed = slices.DeleteFunc(v.unflushed, func(w *op) bool { return slices.Contains(o.covers, w) })
	case o.flags&block.FUA != 0:
		v.durable(o)
	default:
		v.unflushed = append(v.unflushed, o)
	}
}

// durable drops the versions before o's.
func (v *view) durable(o *op) {
	start, end := sectorsOf(o)
	for n := start; n < end; n++ {
		at := slices.IndexFunc(v.sectors[n], func(x version) bool { return x.op == o })
		switch {
		case at < 0: // one that is newer is durable already
		case at == len(v.sectors[n])-1 && !v.sectors[n][at].any:
			delete(v.sectors, n)
		default:
			v.sectors[n] = v.sectors[n][at:]
		}
	}
}

// comparePiece is the number of bytes that are compared at once.
const comparePiece = 16 << 10

// check compares what was found with the model. killed: everything acknowledged must be there.
func (v *view) check(got []byte, killed bool) error {
	for at := 0; at < len(got); at += comparePiece {
		end := min(at+comparePiece, len(got))
		if bytes.Equal(got[at:end], v.newest[at:end]) {
			continue
		}
		for n := int64(block.SectorFloor(int64(at))); n*block.SectorSize < int64(end); n++ {
			if err := v.checkSector(n, got, killed); err != nil {
				return err
			}
		}
	}
	return nil
}

func (v *view) checkSector(n int64, content []byte, killed bool) error {
	newest := v.sector(n)
	got := content[n*block.SectorSize:][:len(newest)]
	if bytes.Equal(got, newest) {
		return nil
	}
	versions := v.sectors[n]
	for i := len(versions) - 1; i >= 0; i-- {
		if versions[i].any || bytes.Equal(got, versions[i].data) {
			return nil
		}
		if o := versions[i].op; killed && o != nil && o.acknowledged {
			return fmt.Errorf("%s: sector %d is not %v, which was acknowledged: it holds %x", v.name, n, o, got[:16])
		}
	}
	return fmt.Errorf("%s: sector %d is none of its %d versions: it holds %x, and the newest %x", v.name, n,
		max(1, len(versions)), got[:min(16, len(got))], newest[:min(16, len(got))])
}
