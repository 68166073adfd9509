package cowstore

import (
	"fmt"

	"cowherd/block"
)

// tail is the end of the table: where the next record goes, and an image of the segment around it. A segment is what is
// kept in memory of an area, all of it unless chunks are large. It belongs to the runner of the commits, or to the one
// who loads or merges.
//
// Invariants:
//
//  1. The image is what the device holds of the segment, or is about to: records up to slot, zeroes from there on. When
//     a segment has been filled, and is being written, it is the write's until the stage ends.
//  2. prepared <= zeroed <= area+1. Areas up to prepared are zero, durably, where they hold no records; those up to
//     zeroed will be with the next flush.
type tail struct {
	unit  int // bytes: writes are multiples of it
	area  uint64
	slot  int
	base  int // slot at which the segment begins
	image []byte
	spare []byte // the other image: of the segment that was filled last

	zeroed, prepared uint64
}

func (t *tail) init(p *Persistent) {
	t.unit = max(block.SectorSize, p.device.Limits().LogicalBlock)
	size := p.layout.pieceSize()
	t.image, t.spare = make([]byte, size), make([]byte, size)
}

// segment is the number of records of the image.
func (t *tail) segment() int { return len(t.image) / recordBytes }

// room is the number of records that may be put in the segment. The last slot of an area is left free as long as the
// next area is not prepared.
func (t *tail) room(l Layout, prepared bool) int {
	if t.area >= l.Areas() {
		return 0
	}
	end := t.base + t.segment()
	if end == l.AreaRecords() && !prepared {
		end--
	}
	return end - t.slot
}

// append puts a record in the image.
func (t *tail) append(r Record) {
	r.put(t.image, t.slot-t.base)
	t.slot++
}

// dirty is what must be written for the slots from first to the end of the table.
func (t *tail) dirty(l Layout, first int) (offset int64, data []byte) {
	from := (first - t.base) * recordBytes / t.unit * t.unit
	to := min(((t.slot-t.base)*recordBytes+t.unit-1)/t.unit*t.unit, len(t.image))
	return l.place(t.area, t.base) + int64(from), t.image[from:to]
}

// turn goes on to the next segment when the current one is full. The full image stays as it is until the next turn: it
// is being written.
func (t *tail) turn(l Layout) {
	if t.slot < t.base+t.segment() {
		return
	}
	t.image, t.spare = t.spare, t.image
	clear(t.image)
	t.base = t.slot
	if t.slot == l.AreaRecords() {
		t.area, t.slot, t.base = t.area+1, 0, 0
	}
}

// Load streams the table to insert, finds the chunks that are free, and, unless the store is open for reading only,
// erases what lies behind the end of the table. origin is the number of chunks of the origin, 0 if it is not known.
// insert returns false for an old chunk that it has been given before. *CorruptError: the store breaks a rule of the
// format and must not be used. Load is called once, before everything else.
func (p *Persistent) Load(origin Chunk, insert func(Record) bool) error {
	l := loader{p: p, layout: p.now(), origin: origin, insert: insert, stride: p.layout.stride()}
	if err := l.layout.Scan(p.device, l.piece); err != nil {
		return fmt.Errorf("load the exceptions: %w", err)
	}
	if !l.ended { // every area is full: the table ends where no area follows
		l.area, l.slot = l.layout.Areas(), 0
	}
	p.next.Store(uint64(l.layout.skipMetadata(max(2, l.highest+1))))
	p.findGaps(&l.used)
	if err := p.atTail(&l); err != nil {
		return fmt.Errorf("load the exceptions: %w", err)
	}
	return nil
}

// loader is the state of one Load.
type loader struct {
	p       *Persistent
	layout  Layout
	stride  Chunk
	origin  Chunk
	insert  func(Record) bool
	used    ChunkSet
	highest Chunk

	ended bool // the end of the table has been found:
	area  uint64
	slot  int
	rest  []byte // a copy of the piece with the end of the table
	base  int    // its first slot
}

// piece loads the records of one piece.
func (l *loader) piece(p *Piece) (more bool, err error) {
	for i := range p.Len() {
		r := p.Record(i)
		if r.New == 0 {
			l.ended, l.area, l.slot = true, p.Area, p.Slot+i
			l.rest, l.base = append([]byte(nil), p.Bytes...), p.Slot
			return false, nil
		}
		if what := l.check(r); what != "" {
			return false, &CorruptError{Area: p.Area, Slot: p.Slot + i, Record: r, What: what}
		}
		l.highest = max(l.highest, r.New)
	}
	return true, nil
}

// check tells which rule a record breaks, alone or beside those before it; "" if none.
func (l *loader) check(r Record) string {
	sound := r.New < l.layout.Chunks && r.New%l.stride != 1 && (l.origin == 0 || r.Old < l.origin) && r.Old <= chunkMax
	if !sound { // Check, which is slower, finds the words
		return l.layout.Check(r, l.origin)
	}
	if !l.used.Add(r.New) {
		return "another record has the same new chunk"
	}
	if !l.insert(r) {
		return "another record has the same old chunk"
	}
	return ""
}

// findGaps collects the chunks below the highest that no record names, and puts the lowest last.
func (p *Persistent) findGaps(used *ChunkSet) {
	p.gapMu.Lock()
	defer p.gapMu.Unlock()
	stride := p.layout.stride()
	used.gaps(2, Chunk(p.next.Load()), func(g chunkRun) {
		for g.first < g.end { // cut where areas lie
			end := min(g.end, g.first+stride-(g.first-1)%stride)
			if p.layout.IsMetadata(g.first) {
				g.first++
				continue
			}
			p.gaps = append(p.gaps, chunkRun{g.first, end})
			g.first = end
		}
	})
	for i, j := 0, len(p.gaps)-1; i < j; i, j = i+1, j-1 {
		p.gaps[i], p.gaps[j] = p.gaps[j], p.gaps[i]
	}
	p.hasGaps.Store(len(p.gaps) > 0)
}

// atTail takes over where the table ends, and cleans what lies behind it.
func (p *Persistent) atTail(l *loader) error {
	t := &p.table
	t.area, t.slot, t.base = l.area, l.slot, l.base
	p.current.Store(t.area)
	dirty := false
	if l.ended {
		copy(t.image, l.rest)
		behind := t.image[(t.slot-t.base)*recordBytes:]
		dirty = !isZero(behind)
		clear(behind)
	}
	if p.readOnly || !p.valid {
		return nil
	}
	return p.clean(dirty)
}

// clean erases what lies behind the end of the table, in its area and in the next. dirty: the image differs from the
// device.
func (p *Persistent) clean(dirty bool) error {
	t, layout := &p.table, p.now()
	wrote := dirty
	if dirty {
		offset, data := layout.place(t.area, t.base), t.image
		if err := block.Write(p.device, data, offset); err != nil {
			return fmt.Errorf("erase what lies behind the table: %w", err)
		}
	}
	type span struct{ offset, length int64 }
	var spans []span
	if end := t.base + t.segment(); t.area < layout.Areas() && end < layout.AreaRecords() {
		spans = append(spans, span{layout.place(t.area, end), int64(layout.AreaRecords()-end) * recordBytes})
	}
	if t.area+1 < layout.Areas() {
		spans = append(spans, span{layout.place(t.area+1, 0), int64(p.chunkSize)})
	}
	for _, s := range spans {
		if s.length <= pieceBytes {
			zeroed, err := readsZero(p.device, s.offset, s.length)
			if err != nil {
				return fmt.Errorf("look behind the table: %w", err)
			}
			if zeroed {
				continue
			}
		}
		if err := zero(p.device, s.offset, s.length); err != nil {
			return fmt.Errorf("erase what lies behind the table: %w", err)
		}
		wrote = true
	}
	if wrote {
		if err := block.Flush(p.device); err != nil {
			return fmt.Errorf("erase what lies behind the table: %w", err)
		}
	}
	if t.area+1 < layout.Areas() {
		t.zeroed, t.prepared = t.area+1, t.area+1
	} else {
		t.zeroed, t.prepared = t.area, t.area
	}
	return nil
}

// Last puts the last records of the table in p, the very last first, and tells how many: as many as p holds, or all that
// are left. For a merge: nothing may be committed from the first Last on.
func (p *Persistent) Last(records []Record) (int, error) {
	t := &p.table
	area, slot, base, image := t.area, t.slot, t.base, t.image
	n := 0
	for n < len(records) {
		if slot == base {
			if area == 0 && slot == 0 {
				break
			}
			area, slot, base = p.before(area, slot)
			image = t.spare
			if err := p.readSegment(image, area, base); err != nil {
				return 0, err
			}
		}
		for ; n < len(records) && slot > base; n++ {
			slot--
			records[n] = recordAt(image, slot-base)
		}
	}
	return n, nil
}

// before is the end and the first slot of the segment in front of the one that begins at a slot of an area.
func (p *Persistent) before(area uint64, base int) (areaBefore uint64, end, baseBefore int) {
	if base == 0 {
		area, base = area-1, p.layout.AreaRecords()
	}
	return area, base, base - p.table.segment()
}

// readSegment reads a segment of an area that is full.
func (p *Persistent) readSegment(image []byte, area uint64, base int) error {
	if err := block.Read(p.device, image, p.layout.place(area, base)); err != nil {
		return fmt.Errorf("read area %d: %w", area, err)
	}
	return nil
}

// Erase takes the last n records, which Last has told, off the table; when it returns nil that is durable. What they
// say must be durable elsewhere before: on the origin. Should a crash keep only a part of it, then records in front of
// others are gone, and those behind are no longer of the table; that is as good as if all were gone. After an error some
// may be off the table and some not, and Last goes on from there. The chunks are not given out again before the store is
// opened the next time.
func (p *Persistent) Erase(n int) error {
	if p.readOnly {
		return errReadOnly
	}
	t := &p.table
	for n > 0 {
		if t.slot == t.base {
			area, slot, base := p.before(t.area, t.slot)
			if err := p.readSegment(t.image, area, base); err != nil {
				return err
			}
			t.area, t.slot, t.base = area, slot, base
			t.zeroed, t.prepared = area, area // what is behind may come to be of use again
			p.current.Store(area)
		}
		count := min(n, t.slot-t.base)
		if err := p.eraseInSegment(count); err != nil {
			return fmt.Errorf("erase records of area %d: %w", t.area, err)
		}
		n -= count
	}
	if err := block.Flush(p.device); err != nil {
		return fmt.Errorf("erase records: %w", err)
	}
	return nil
}

// eraseInSegment writes zeroes over the last n records of the table, all of which lie in the segment.
func (p *Persistent) eraseInSegment(n int) error {
	t := &p.table
	copy(t.spare, t.image)
	from, end := (t.slot-n-t.base)*recordBytes, (t.slot-t.base)*recordBytes
	clear(t.spare[from:end])
	from, end = from/t.unit*t.unit, min((end+t.unit-1)/t.unit*t.unit, len(t.spare))
	if err := block.Write(p.device, t.spare[from:end], p.layout.place(t.area, t.base)+int64(from)); err != nil {
		return err
	}
	t.image, t.spare = t.spare, t.image
	t.slot -= n
	p.next.Store(uint64(p.layout.AreaChunk(t.area)) + uint64(t.slot) + 1)
	return nil
}

// Records is the number of records in the table. Nothing may be committed meanwhile.
func (p *Persistent) Records() uint64 {
	return p.table.area*uint64(p.layout.AreaRecords()) + uint64(p.table.slot)
}

// readsZero tells whether a range of at most pieceBytes is zero.
func readsZero(d block.Device, offset, length int64) (bool, error) {
	p := make([]byte, length)
	if err := block.Read(d, p, offset); err != nil {
		return false, err
	}
	return isZero(p), nil
}

// isZero tells whether p, whose length is a multiple of recordBytes, is all zero.
func isZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
