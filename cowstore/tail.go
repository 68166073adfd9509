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
		return errReadOnly()
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
