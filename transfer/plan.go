package transfer

import (
	"fmt"
	"sync"

	"cowherd/block"
)

const (
	// windowSize is the part of the source in bytes whose extents are held in memory at a time.
	windowSize = 64 << 20
	// zeroPieceMax is the longest range in bytes that is made zero at a time.
	zeroPieceMax = 64 << 20
	// batchPiecesMax is the most pieces of a batch.
	batchPiecesMax = 32
)

// A piece is a range that a worker deals with.
type piece struct {
	offset, length int64
	zero           bool // the source reads as zeroes
	over           bool // over zeroes: the destination reads as zeroes
}

// A batch is what a worker deals with at a time: neighbouring pieces, in order, and all that lies between them and needs
// no work. It belongs to its worker.
type batch struct {
	start   int64 // where it begins on the source
	pieces  []piece
	skipped int64 // bytes that need no work
	data    int64 // bytes of data
}

// planner cuts a source into batches, and knows the low-water mark: all before it has been done.
type planner struct {
	*transfer
	// copies: what is planned is to be copied, not compared.
	copies  bool          // +checklocksignore: it never changes
	end     int64         // +checklocksignore: it never changes
	changed chan struct{} // the mark may have risen; room for one

	// mu is held while extents are looked up, which may take as long as a round trip: who waits for it wants to know
	// what comes next, and nobody does until the look-up is over.
	mu sync.Mutex
	// at: all before it has been given to workers.
	at int64 // +checklocks:mu
	// window is where the window ends.
	window int64 // +checklocks:mu
	// source and destination are the extents of the window, from at on.
	source      lookup // +checklocks:mu
	destination lookup // +checklocks:mu
	// busy are the workers that have a batch.
	busy map[*worker]struct{} // +checklocks:mu
	// failed: a look-up has failed.
	failed bool // +checklocks:mu
}

// newPlanner plans from start on. zeroed: the destination reads as zeroes. copies: what is planned is to be copied, not
// compared.
func newPlanner(t *transfer, start int64, zeroed, copies bool) *planner {
	p := &planner{transfer: t, copies: copies, end: t.end, changed: make(chan struct{}, 1), busy: make(map[*worker]struct{}, len(t.workers))}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.at, p.window = start, start
	p.source = newLookup(t.Source)
	p.destination = newLookup(t.Destination)
	if zeroed {
		p.destination = lookup{zero: true}
	}
	return p
}

// next gives w another batch, after it has done the one before. It is false when there is nothing left to do.
func (p *planner) next(w *worker) (more bool, err error) {
	p.mu.Lock()
	delete(p.busy, w)
	b := &w.batch
	b.start, b.pieces, b.skipped, b.data = p.at, b.pieces[:0], 0, 0
	for !p.failed && p.at < p.end && b.data < p.PieceSize && len(b.pieces) < batchPiecesMax {
		if err = p.planLocked(b); err != nil {
			p.failed = true
		}
	}
	if more = p.at > b.start && err == nil; more {
		p.busy[w] = struct{}{}
	}
	p.mu.Unlock()
	select {
	case p.changed <- struct{}{}:
	default: // the keeper has been told and has not looked yet
	}
	return more, err
}

// reached is the low-water mark.
func (p *planner) reached() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	mark := p.at
	for w := range p.busy {
		mark = min(mark, w.batch.start)
	}
	return mark
}

// planLocked adds a piece to b, or lets it pass over what needs no work.
//
// +checklocks:p.mu
func (p *planner) planLocked(b *batch) error {
	if p.at == p.window {
		if err := p.moveLocked(); err != nil {
			return err
		}
	}
	e, x := p.source.at(p.at), p.destination.at(p.at)
	end := min(e.Offset+e.Length, p.window)
	coarse := p.copies && p.coarse.Load()
	switch {
	case !e.Zero:
		if !coarse {
			end = min(end, p.at+p.cut-p.at%p.cut)
		}
		b.pieces = append(b.pieces, piece{offset: p.at, length: end - p.at, over: x.Zero && x.Offset+x.Length >= end})
		b.data += end - p.at
	case x.Zero && !p.Allocated:
		end = min(end, x.Offset+x.Length)
		b.skipped += end - p.at
	default:
		end = min(end, x.Offset+x.Length, p.at+zeroPieceMax)
		b.pieces = append(b.pieces, piece{offset: p.at, length: end - p.at, zero: true, over: x.Zero})
		b.data = p.PieceSize // it may take long: on its own
	}
	p.at = end
	return nil
}

// moveLocked looks up the extents of the next window.
//
// +checklocks:p.mu
func (p *planner) moveLocked() error {
	p.window = min(p.at+windowSize-p.at%windowSize, p.end)
	if p.copies && p.coarse.Load() && p.offload.clones { // whatever it is, it is cloned
		if p.at > p.Start { // the first one, of usual size, shows whether it works
			p.window = min(max(p.window, p.at+p.offload.cloneMax), p.end)
		}
		p.source.assume(p.at, p.window, false)
		p.destination.assume(p.at, p.window, false)
		return nil
	}
	if err := p.source.move(p.at, p.window, p.end, p.unit); err != nil {
		return fmt.Errorf("source: %w", err)
	}
	if err := p.destination.move(p.at, p.window, p.end, p.unit); err != nil {
		return fmt.Errorf("destination: %w", err)
	}
	return nil
}

// lookup is the extents of a device in a window that moves upwards.
type lookup struct {
	lister block.ExtentLister // nil: the device does not know
	zero   bool               // without a lister: all is zero, not data
	list   []block.Extent     // aligned; those that have been passed are dropped
	memory []block.Extent     // of list
	rest   block.Extent       // the last one, as far as it reaches beyond the window
}

func newLookup(d block.Device) lookup {
	l, _ := d.(block.ExtentLister)
	return lookup{lister: l}
}

// at is the extent that offset lies in. Offsets ascend.
func (l *lookup) at(offset int64) block.Extent {
	for len(l.list) > 1 && l.list[0].Offset+l.list[0].Length <= offset {
		l.list = l.list[1:]
	}
	return l.list[0]
}

// assume has the window [start, stop) all zero, or all data, without looking.
func (l *lookup) assume(start, stop int64, zero bool) {
	l.memory = append(l.memory[:0], block.Extent{Offset: start, Length: stop - start, Zero: zero})
	l.list, l.rest = l.memory, block.Extent{}
}

// move looks the window [start, stop) up. All up to end is asked for, and what is told beyond the window is kept: to
// find the end of a long extent takes long, and it would be looked for again and again.
func (l *lookup) move(start, stop, end, unit int64) error {
	list := l.memory[:0]
	at := start
	add := func(e block.Extent) bool {
		n := min(e.Offset+e.Length, stop) - at
		l.rest = block.Extent{Offset: at + n, Length: e.Offset + e.Length - at - n, Zero: e.Zero}
		if last := len(list) - 1; last >= 0 && list[last].Zero == e.Zero {
			list[last].Length += n
		} else {
			list = append(list, block.Extent{Offset: at, Length: n, Zero: e.Zero})
		}
		at += n
		return at < stop
	}
	if l.lister == nil {
		add(block.Extent{Offset: start, Length: stop - start, Zero: l.zero})
	} else if rest := l.rest; rest.Length > 0 {
		add(rest)
	}
	if at < stop {
		if err := l.lister.Extents(at, end-at, add); err != nil {
			return err
		}
	}
	if at < stop { // an answer that is too short is no reason to leave something out
		add(block.Extent{Offset: at, Length: stop - at})
	}
	l.memory = list
	l.list = aligned(list, unit)
	return nil
}

// aligned lets extents begin and end at multiples of unit, in place: a unit that is not all zero is data.
func aligned(list []block.Extent, unit int64) []block.Extent {
	if unit == 1 || len(list) == 0 {
		return list
	}
	kept := list[:0]
	at, end := list[0].Offset, list[len(list)-1].Offset+list[len(list)-1].Length
	add := func(stop int64, zero bool) {
		if stop <= at {
			return
		}
		if n := len(kept); n > 0 && kept[n-1].Zero == zero {
			kept[n-1].Length += stop - at
		} else {
			kept = append(kept, block.Extent{Offset: at, Length: stop - at, Zero: zero})
		}
		at = stop
	}
	for i := range list {
		e := list[i] // a copy: what is kept may take its place
		start, stop := e.Offset, e.Offset+e.Length
		if !e.Zero {
			continue
		}
		start = (start + unit - 1) / unit * unit
		if stop != end {
			stop = stop / unit * unit
		}
		if start >= stop {
			continue
		}
		add(start, false)
		add(stop, true)
	}
	add(end, false)
	return kept
}
