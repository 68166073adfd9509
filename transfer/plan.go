package transfer

import (
	"context"
	"fmt"

	"cowherd/block"
)

const (
	// windowSize is the part of the source in bytes whose extents are looked up at a time.
	windowSize = 64 << 20
	// zeroPieceMax is the longest range in bytes that is made zero at a time.
	zeroPieceMax = 64 << 20
	// batchPiecesMax is the most pieces that travel together.
	batchPiecesMax = 32
)

// A piece is a range that a worker deals with.
type piece struct {
	offset, length int64
	zero           bool // the source reads as zeroes
	over           bool // over zeroes: the destination reads as zeroes
}

// A batch is neighbouring pieces, in order, and all that lies between them and needs no work. It belongs to the
// planner, then to a worker, then to the tracker, which gives it back.
type batch struct {
	end     int64 // where the next batch begins
	pieces  []piece
	skipped int64 // bytes that need no work
	data    int64 // bytes of data
	done    bool  // the tracker's
}

// planner cuts a source into pieces.
type planner struct {
	*transfer
	at      int64       // all before it has been planned
	batch   *batch      // that is being filled; nil: none
	batches chan *batch // to the workers
	free    chan *batch // all batches that are not in use

	source, destination []block.Extent // of the window
}

func newPlanner(t *transfer, start int64) *planner {
	// As many as workers hold, and as many again that wait for the oldest, and to be taken.
	count := 4*len(t.workers) + 4
	p := &planner{transfer: t, at: start, batches: make(chan *batch, len(t.workers)), free: make(chan *batch, count)}
	for range count {
		p.free <- &batch{pieces: make([]piece, 0, batchPiecesMax)}
	}
	return p
}

// run plans everything. It closes batches.
func (p *planner) run(ctx context.Context) error {
	defer close(p.batches)
	for p.at < p.end {
		end := min(p.at+windowSize-p.at%windowSize, p.end)
		if err := p.window(ctx, end); err != nil {
			return err
		}
	}
	return p.send(ctx)
}

// window plans all up to end.
func (p *planner) window(ctx context.Context, end int64) (err error) {
	if p.source, err = extents(p.source[:0], p.Source, p.at, end); err != nil {
		return fmt.Errorf("source: %w", err)
	}
	p.destination = append(p.destination[:0], block.Extent{Offset: p.at, Length: end - p.at, Zero: p.Zeroed})
	if !p.Zeroed {
		p.destination, err = extents(p.destination[:0], p.Destination, p.at, end)
		if err != nil {
			return fmt.Errorf("destination: %w", err)
		}
	}
	p.source = aligned(p.source, p.unit)
	p.destination = aligned(p.destination, p.unit)
	for _, e := range p.source {
		if e.Zero {
			err = p.planZeroes(ctx, e)
		} else {
			err = p.planData(ctx, e)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// extents appends the extents of the range [start, end) of d to list: all is data where d does not know.
func extents(list []block.Extent, d block.Device, start, end int64) ([]block.Extent, error) {
	l, ok := d.(block.ExtentLister)
	if !ok {
		return append(list, block.Extent{Offset: start, Length: end - start}), nil
	}
	at := start
	err := l.Extents(start, end-start, func(e block.Extent) bool {
		if n := len(list); n > 0 && list[n-1].Zero == e.Zero {
			list[n-1].Length += e.Length
		} else {
			list = append(list, e)
		}
		at += e.Length
		return true
	})
	if err == nil && at < end { // an answer that is too short is no reason to leave something out
		list = append(list, block.Extent{Offset: at, Length: end - at})
	}
	return list, err
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

// planZeroes plans the zeroes of the source in e: nothing is to be done where the destination has them.
func (p *planner) planZeroes(ctx context.Context, e block.Extent) error {
	for start, end := e.Offset, e.Offset+e.Length; start < end; {
		x := p.holds(start)
		stop := min(end, x.Offset+x.Length, start+zeroPieceMax)
		if x.Zero && !p.Allocated {
			if err := p.skip(ctx, min(end, x.Offset+x.Length)); err != nil {
				return err
			}
			start = p.at
			continue
		}
		if err := p.add(ctx, piece{offset: start, length: stop - start, zero: true, over: x.Zero}); err != nil {
			return err
		}
		start = stop
	}
	return nil
}

// planData plans the data of the source in e, cut at multiples of the size of a piece.
func (p *planner) planData(ctx context.Context, e block.Extent) error {
	for start, end := e.Offset, e.Offset+e.Length; start < end; {
		stop := min(end, start+p.PieceSize-start%p.PieceSize)
		x := p.holds(start)
		over := x.Zero && x.Offset+x.Length >= stop
		if err := p.add(ctx, piece{offset: start, length: stop - start, over: over}); err != nil {
			return err
		}
		start = stop
	}
	return nil
}

// holds is the extent of the destination at offset. Offsets ascend, so what lies before is dropped.
func (p *planner) holds(offset int64) block.Extent {
	for len(p.destination) > 1 && p.destination[0].Offset+p.destination[0].Length <= offset {
		p.destination = p.destination[1:]
	}
	return p.destination[0]
}

// open sees to it that there is a batch.
func (p *planner) open(ctx context.Context) error {
	if p.batch != nil {
		return nil
	}
	select {
	case p.batch = <-p.free:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	p.batch.pieces, p.batch.skipped, p.batch.data, p.batch.done = p.batch.pieces[:0], 0, 0, false
	return nil
}

// skip notes that nothing is to be done up to end.
func (p *planner) skip(ctx context.Context, end int64) error {
	if err := p.open(ctx); err != nil {
		return err
	}
	p.batch.skipped += end - p.at
	p.at = end
	return nil
}

// add plans x, which begins where the piece before it has ended.
func (p *planner) add(ctx context.Context, x piece) error {
	if err := p.open(ctx); err != nil {
		return err
	}
	b := p.batch
	b.pieces = append(b.pieces, x)
	p.at = x.offset + x.length
	if !x.zero {
		b.data += x.length
	}
	if b.data < p.PieceSize && len(b.pieces) < batchPiecesMax && !x.zero {
		return nil
	}
	return p.send(ctx)
}

// send gives the batch, if there is one, to the workers.
func (p *planner) send(ctx context.Context) error {
	b := p.batch
	if b == nil {
		return nil
	}
	p.batch = nil
	b.end = p.at
	p.tracker.begin(b)
	select {
	case p.batches <- b:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
