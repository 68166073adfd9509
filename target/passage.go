package target

import (
	"sync/atomic"

	"cowherd/block"
)

// PassageUnits is how many units one PassagePage has.
const PassageUnits = 1 << passageShift

const passageShift = 15

// A PassagePage has a bit for each unit. Bits are set at any time, by anybody.
type PassagePage [PassageUnits / 64]atomic.Uint64

// A Passage is a set of units of a target, each of 1<<Shift bytes, that only grows: a write that lies in one of them passes
// (Passer). A mapped device looks a unit up for each write; that is a chain of three loads, and no call.
type Passage struct {
	Pages []atomic.Pointer[PassagePage] // as many as the target has, none nil
	Shift uint                          // 12 to 63
	Void  *atomic.Bool                  // when it is set, nothing is sure any more
	// Exact: there is no need to ask about a write that lies in one unit, and is not sure to pass.
	Exact bool
}

// NoPassage has nothing.
func NoPassage() Passage {
	p := Passage{Pages: make([]atomic.Pointer[PassagePage], 1), Shift: 63, Void: new(atomic.Bool)}
	p.Pages[0].Store(new(PassagePage))
	return p
}

// Has tells whether a write to the bytes [offset, offset+length), which lie in the target, surely passes. It is inlined.
func (p *Passage) Has(offset, length int64) bool {
	unit, last := uint64(offset)>>(p.Shift&63), uint64(offset+length-1)>>(p.Shift&63)
	return unit == last && p.Pages[unit>>passageShift].Load()[unit>>6%(PassageUnits/64)].Load()>>(unit&63)&1 != 0 && !p.Void.Load()
}

// Asks tells whether the target is to be asked about r, a read or a write that is not sure to pass.
func (p *Passage) Asks(r *block.Request) bool {
	return !p.Exact || r.Op == block.OpRead || r.Offset>>(p.Shift&63) != (r.End()-1)>>(p.Shift&63)
}
