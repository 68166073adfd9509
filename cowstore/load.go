package cowstore

import (
	"fmt"
	"slices"
	"sync"

	"cowherd/block"
)

// Table is where LoadTable puts the records of a store.
type Table interface {
	// Expect is called first, with about as many records as will come.
	Expect(records uint64)
	// Insert adds those of the records that fall to a worker; all workers are given all records, each on a goroutine of
	// its own. It returns the index of one whose old chunk had been added before, or -1. The slice is the caller's again
	// when it returns.
	Insert(worker int, records []Record) (doubled int)
}

// Load is LoadTable with one worker and a function, which returns false for an old chunk that it has been given before.
func (p *Persistent) Load(origin Chunk, insert func(Record) bool) error {
	return p.LoadTable(origin, 1, eachRecord(insert))
}

// eachRecord is a function as a Table.
type eachRecord func(Record) bool

func (eachRecord) Expect(uint64) {}

func (f eachRecord) Insert(_ int, records []Record) int {
	for i, r := range records {
		if !f(r) {
			return i
		}
	}
	return -1
}

// LoadTable streams the table to t, finds the chunks that are free, and, unless the store is open for reading only,
// erases what lies behind the end of the table. origin is the number of chunks of the origin, 0 if it is not known.
// *CorruptError: the store breaks a rule of the format and must not be used. LoadTable is called once, before everything
// else.
func (p *Persistent) LoadTable(origin Chunk, workers int, t Table) error {
	l := newLoader(p, origin, workers, t)
	t.Expect(p.estimate())
	err := l.layout.Scan(p.device, l.piece)
	if err == nil {
		err = l.flush()
	}
	l.stop()
	if err != nil {
		return fmt.Errorf("load the exceptions: %w", err)
	}
	if !l.ended { // every area is full: the table ends where no area follows
		l.area, l.slot = l.layout.Areas(), 0
	}
	p.next.Store(uint64(l.layout.skipMetadata(max(2, l.highest+1))))
	p.findGaps(&l.used)
	if err := p.atTail(l); err != nil {
		return fmt.Errorf("load the exceptions: %w", err)
	}
	return nil
}

// estimateMax bounds what a table makes room for before it has seen a record.
const estimateMax = 1 << 24

// estimate is about the number of records, found by bisection: areas before the last are full. It is a hint, and errors
// of the device will be met again.
func (p *Persistent) estimate() uint64 {
	sector := make([]byte, max(block.SectorSize, p.device.Limits().LogicalBlock))
	used := func(area uint64) bool {
		return block.Read(p.device, sector, p.layout.place(area, 0)) == nil && recordAt(sector, 0).New != 0
	}
	first, end := uint64(0), p.layout.Areas() // the first area without records lies in [first, end]
	for first < end {
		if middle := (first + end) / 2; used(middle) {
			first = middle + 1
		} else {
			end = middle
		}
	}
	records := first * uint64(p.layout.AreaRecords())
	if first <= 1 {
		records = 0 // one area may be a gigabyte, and hold one record
	}
	return min(records, estimateMax)
}

// loadBatch is how many records are decoded and checked before the workers insert them, beside each other.
const loadBatch = 8 << 10

// loader is the state of one LoadTable. It checks records and gathers them in a batch; the workers insert a batch while
// it gathers the next.
//
//	loader      check, gather | check, gather | ...
//	workers                   | insert        | insert ...
type loader struct {
	p       *Persistent
	layout  Layout
	stride  Chunk
	origin  Chunk
	used    ChunkSet
	highest Chunk

	table   Table
	batches [2][]Record
	now     int    // which is gathered
	first   uint64 // number of its first record in the table
	workers []loadWorker
	all     sync.WaitGroup // goroutines of workers
	pending bool           // they insert the other batch, which begins with record
	since   uint64

	ended bool // the end of the table has been found:
	area  uint64
	slot  int
	rest  []byte // a copy of the piece with the end of the table
	base  int    // its first slot
}

// loadWorker is a goroutine that inserts its part of each batch.
type loadWorker struct {
	work    chan []Record
	doubled chan int
}

func newLoader(p *Persistent, origin Chunk, workers int, t Table) *loader {
	l := &loader{p: p, layout: p.now(), origin: origin, table: t, stride: p.layout.stride(), workers: make([]loadWorker, workers)}
	for i := range l.batches {
		l.batches[i] = make([]Record, 0, loadBatch)
	}
	for i := range l.workers {
		w := &l.workers[i]
		w.work, w.doubled = make(chan []Record, 1), make(chan int, 1)
		l.all.Go(func() {
			for records := range w.work {
				w.doubled <- t.Insert(i, records)
			}
		})
	}
	return l
}

// stop ends the workers.
func (l *loader) stop() {
	for i := range l.workers {
		close(l.workers[i].work)
	}
	l.all.Wait()
}

// piece checks and gathers the records of one piece.
func (l *loader) piece(p *Piece) (more bool, err error) {
	batch := l.batches[l.now]
	for i := range p.Len() {
		r := p.Record(i)
		if r.New == 0 {
			l.ended, l.area, l.slot = true, p.Area, p.Slot+i
			l.rest, l.base = append([]byte(nil), p.Bytes...), p.Slot
			l.batches[l.now] = batch
			return false, nil
		}
		if what := l.check(r); what != "" {
			return false, &CorruptError{Area: p.Area, Slot: p.Slot + i, Record: r, What: what}
		}
		l.highest = max(l.highest, r.New)
		if batch = append(batch, r); len(batch) == cap(batch) {
			l.batches[l.now] = batch
			if err := l.hand(); err != nil {
				return false, err
			}
			batch = l.batches[l.now]
		}
	}
	l.batches[l.now] = batch
	return true, nil
}

// check tells which rule a record breaks, alone or beside the new chunks of those before it; "" if none.
func (l *loader) check(r Record) string {
	sound := r.New < l.layout.Chunks && r.New%l.stride != 1 && (l.origin == 0 || r.Old < l.origin) && r.Old <= chunkMax
	if !sound { // Check, which is slower, finds the words
		return l.layout.Check(r, l.origin)
	}
	if !l.used.Add(r.New) {
		return "another record has the same new chunk"
	}
	return ""
}

// hand gives the batch to the workers, when they have done the one before.
func (l *loader) hand() error {
	if err := l.await(); err != nil {
		return err
	}
	batch := l.batches[l.now]
	for i := range l.workers {
		l.workers[i].work <- batch
	}
	l.pending, l.since = true, l.first
	l.first += uint64(len(batch))
	l.now = 1 - l.now
	l.batches[l.now] = l.batches[l.now][:0]
	return nil
}

// await waits for the workers, and tells of an old chunk that was there before.
func (l *loader) await() error {
	if !l.pending {
		return nil
	}
	l.pending = false
	first := -1
	for i := range l.workers {
		if at := <-l.workers[i].doubled; at >= 0 && (first < 0 || at < first) {
			first = at
		}
	}
	if first < 0 {
		return nil
	}
	number, perArea := l.since+uint64(first), uint64(l.layout.AreaRecords())
	return &CorruptError{
		Area: number / perArea, Slot: int(number % perArea), Record: l.batches[1-l.now][first],
		What: "another record has the same old chunk",
	}
}

// flush hands what is left, and waits.
func (l *loader) flush() error {
	if err := l.hand(); err != nil {
		return err
	}
	return l.await()
}

// findGaps collects the chunks below the highest that no record names, and puts the lowest last. Areas may lie in them.
func (p *Persistent) findGaps(used *ChunkSet) {
	var gaps []chunkRun
	used.gaps(2, Chunk(p.next.Load()), func(g chunkRun) { gaps = append(gaps, g) })
	slices.Reverse(gaps)
	p.gapMu.Lock()
	defer p.gapMu.Unlock()
	p.gaps = gaps
	p.hasGaps.Store(len(gaps) > 0)
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
