package cowstore

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"syscall"

	"cowherd/block"
)

// Rule is the name of a rule of the persistent format, or of something worth a remark.
type Rule string

// What Check looks for. docs/formats/snapshot-store.md explains each.
const (
	// Violations: a store that breaks one of these rules is refused, or is not what it seems to be.
	RuleHeaderMagic     Rule = "header-magic"
	RuleHeaderVersion   Rule = "header-version"
	RuleHeaderChunkSize Rule = "header-chunk-size"
	RuleHeaderValid     Rule = "header-valid"
	RuleNextArea        Rule = "next-area"
	RuleNewBehindEnd    Rule = "new-behind-end"
	RuleNewMetadata     Rule = "new-metadata"
	RuleNewTwice        Rule = "new-twice"
	RuleOldBehindEnd    Rule = "old-behind-end"
	RuleOldTooLarge     Rule = "old-too-large"
	RuleOldTwice        Rule = "old-twice"
	// Remarks: the store means what it says all the same.
	RuleLeftover   Rule = "leftover"
	RuleHeaderTail Rule = "header-tail"
)

// A Finding is one thing that Check has to say of a store.
type Finding struct {
	Rule      Rule
	Violation bool // of a rule; false: a remark
	HasSlot   bool // Area and Slot are the place on disk
	HasRecord bool // Record is what was found there
	Area      uint64
	Slot      int
	Record    Record
	What      string // in words, with the values that are not in Record
}

// String tells place, values and rule.
func (f *Finding) String() string {
	switch {
	case f.HasRecord:
		return fmt.Sprintf("area %d, slot %d, old chunk %d, new chunk %d: %s", f.Area, f.Slot, f.Record.Old, f.Record.New, f.What)
	case f.HasSlot:
		return fmt.Sprintf("area %d, slot %d: %s", f.Area, f.Slot, f.What)
	}
	return f.What
}

// Survey is what a pass over a persistent store finds. When the header breaks a rule that leaves no chunk size the
// layout is zero, and nothing behind the header was looked at.
type Survey struct {
	Header  Header
	Layout  Layout
	Sectors block.Sector // of the COW device

	Exceptions uint64
	Area       uint64 // where the table ends: the place of the next record
	Slot       int
	Ended      bool   // the end of the table is on the device
	NewMax     Chunk  // the highest new chunk that lies on the device; 0: there is none
	Gaps       uint64 // data chunks below NewMax that no record names: they are free

	Violations, Remarks int
}

// Usage is in sectors as the kernel counts them when it has just opened the store: up to the chunk that it would
// allocate next, metadata included; all of the device; the header and the areas up to the last one.
func (s *Survey) Usage() (allocated, total, metadata block.Sector) {
	next := max(s.NewMax+1, 2)
	if s.Layout.IsMetadata(next) {
		next++
	}
	chunk := block.SectorFloor(int64(s.Layout.ChunkSize))
	return block.Sector(next) * chunk, s.Sectors, block.Sector(s.Area+2) * chunk
}

// Status is the kernel's status line when it has just opened the store.
func (s *Survey) Status() string {
	if !s.Header.Valid {
		return "Invalid"
	}
	allocated, total, metadata := s.Usage()
	return fmt.Sprintf("%d/%d %d", allocated, total, metadata)
}

// CheckConfig is what Check can be told.
type CheckConfig struct {
	// OriginSize is the size of the origin in bytes, against which old chunks are checked; 0: it is not known.
	OriginSize int64
	// Report is called for each finding, in the order of the device. May be nil.
	Report func(*Finding)
}

// Check looks at all of the store on d and reports every rule of the format that it breaks. It keeps a bit for each
// chunk that a record names, and nothing else of the table. The error is one of reading, or ErrNoStore; the survey is
// then what was found until there.
func Check(d block.Device, c CheckConfig) (*Survey, error) {
	k := &checker{config: c, device: d}
	k.survey.Sectors = block.SectorFloor(d.Size())
	ok, err := k.checkHeader()
	if err != nil || !ok {
		return &k.survey, err
	}
	if c.OriginSize > 0 {
		k.origin = k.survey.Layout.ChunkSize.ChunkCeil(c.OriginSize)
	}
	if err := k.checkHeaderTail(); err != nil {
		return &k.survey, err
	}
	if err := k.survey.Layout.Scan(d, k.visit); err != nil {
		return &k.survey, err
	}
	k.finish()
	return &k.survey, nil
}

// checker is the state of one Check.
type checker struct {
	config CheckConfig
	device block.Device
	origin Chunk // chunks of the origin; 0: not known
	survey Survey

	news, olds ChunkSet
	newCount   uint64 // chunks in news
	leftover   bool   // was reported
}

// report counts f and hands it on.
func (k *checker) report(f Finding) {
	switch f.Rule {
	case RuleLeftover, RuleHeaderTail:
		k.survey.Remarks++
	case RuleNextArea:
		// The table of an invalid store is not read, so that it does not matter where it ends. Becoming invalid is
		// what happens for want of room for the next area.
		if f.Violation = k.survey.Header.Valid; f.Violation {
			k.survey.Violations++
		} else {
			k.survey.Remarks++
		}
	default:
		f.Violation = true
		k.survey.Violations++
	}
	if k.config.Report != nil {
		k.config.Report(&f)
	}
}

// reportHeader reports what is wrong with the header.
func (k *checker) reportHeader(rule Rule, format string, args ...any) {
	k.report(Finding{Rule: rule, What: "header: " + fmt.Sprintf(format, args...)})
}

// checkHeader checks the fields of the header; false: there is no going on.
func (k *checker) checkHeader() (ok bool, err error) {
	p := make([]byte, max(block.SectorSize, k.device.Limits().LogicalBlock))
	if k.device.Size() < int64(len(p)) {
		return false, fmt.Errorf("the COW device has %d bytes: there is no room for a header: %w", k.device.Size(), syscall.EINVAL)
	}
	if err := block.Read(k.device, p, 0); err != nil {
		return false, fmt.Errorf("read the header: %w", err)
	}
	le := binary.LittleEndian
	magic, valid, version, sectors := le.Uint32(p), le.Uint32(p[4:]), le.Uint32(p[8:]), le.Uint32(p[12:])
	if magic == 0 {
		return false, ErrNoStore
	}
	if magic != headerMagic {
		k.reportHeader(RuleHeaderMagic, "magic %#08x, want %#08x", magic, uint32(headerMagic))
		return false, nil // it is something else: nothing that follows would mean anything
	}
	ok = true
	if version != headerVersion {
		k.reportHeader(RuleHeaderVersion, "version %d, want %d", version, headerVersion)
		ok = false
	}
	if valid > 1 {
		k.reportHeader(RuleHeaderValid, "valid is %d, want 0 or 1; it is taken for 1", valid)
	}
	size := ChunkSize(sectors) * block.SectorSize
	if err := CheckChunkSize(int64(size), k.device.Limits().LogicalBlock); err != nil {
		k.reportHeader(RuleHeaderChunkSize, "%v", err)
		ok = false
	}
	k.survey.Header = Header{Valid: valid != 0, ChunkSize: size}
	if ok {
		k.survey.Layout = NewLayout(k.device.Size(), size)
	}
	return ok, nil
}

// checkHeaderTail looks at what is behind the header in its chunk.
func (k *checker) checkHeaderTail() error {
	l := k.survey.Layout
	if l.Chunks == 0 {
		return nil
	}
	p := make([]byte, l.pieceSize())
	for offset := int64(0); offset < int64(l.ChunkSize); offset += int64(len(p)) {
		if err := block.Read(k.device, p, offset); err != nil {
			return fmt.Errorf("read the header: %w", err)
		}
		if offset == 0 {
			clear(p[:headerBytes])
		}
		if at := firstNonZero(p); at >= 0 {
			k.reportHeader(RuleHeaderTail, "byte %d is not zero: whatever it means, it is not heeded", offset+int64(at))
			return nil
		}
	}
	return nil
}

// visit checks a piece of an area, up to the end of the table and, in the area where that is, behind it.
func (k *checker) visit(p *Piece) (more bool, err error) {
	s := &k.survey
	if s.Ended && p.Area != s.Area {
		return false, nil
	}
	rest := p.Bytes
	for i := 0; i < p.Len() && !s.Ended; i++ {
		r := p.Record(i)
		if s.Ended = r.New == 0; s.Ended {
			break
		}
		k.checkRecord(p.Area, p.Slot+i, r)
		s.Exceptions++
		s.Area, s.Slot = p.Area, p.Slot+i+1
		if s.Slot == s.Layout.AreaRecords() {
			s.Area, s.Slot = p.Area+1, 0
		}
		rest = rest[recordBytes:]
	}
	if at := firstNonZero(rest); s.Ended && at >= 0 && !k.leftover {
		k.leftover = true
		slot := p.Slot + p.Len() - len(rest)/recordBytes + at/recordBytes
		k.report(Finding{Rule: RuleLeftover, Area: p.Area, Slot: slot, HasSlot: true, What: fmt.Sprintf(
			"bytes behind the end of the table, which is at slot %d, are not zero: it is erased when the store is opened here, "+
				"but by the kernel it is kept, and may become part of the table", s.Slot)})
	}
	return true, nil
}

// checkRecord checks one record, against those before it too.
func (k *checker) checkRecord(area uint64, slot int, r Record) {
	found := func(rule Rule, what string) {
		k.report(Finding{Rule: rule, Area: area, Slot: slot, HasSlot: true, Record: r, HasRecord: true, What: what})
	}
	s := &k.survey
	if rule, what := s.Layout.checkNew(r.New); what != "" {
		found(rule, what)
	} else if !k.news.Add(r.New) {
		found(RuleNewTwice, "a record before it has the same new chunk")
	} else {
		k.newCount++
	}
	if r.New < s.Layout.Chunks {
		s.NewMax = max(s.NewMax, r.New)
	}
	if rule, what := s.Layout.checkOld(r.Old, k.origin); what != "" {
		found(rule, what)
	} else if !k.olds.Add(r.Old) {
		found(RuleOldTwice, "a record before it has the same old chunk")
	}
}

// finish checks what is known only at the end.
func (k *checker) finish() {
	s := &k.survey
	if !s.Ended {
		k.report(Finding{Rule: RuleNextArea, Area: s.Area, What: fmt.Sprintf(
			"area %d is to be chunk %d, behind the end of the COW device, which has %d: the table has no end, and the kernel "+
				"does not open the store", s.Area, s.Layout.AreaChunk(s.Area), s.Layout.Chunks)})
	}
	if s.NewMax > 0 {
		s.Gaps = s.Layout.dataChunks(s.NewMax) - k.newCount
	}
}

// dataChunks is the number of chunks up to last, which is not the header, that are no metadata.
func (l Layout) dataChunks(last Chunk) uint64 {
	areas := (last-1)/l.stride() + 1
	return uint64(last - areas)
}

// Records calls visit for each record of the table on d, in order, until it returns an error. ended: the table's end
// was found; else it goes on behind the end of the device. Nothing is checked: records of a damaged store may hold
// anything.
func (l Layout) Records(d block.Device, visit func(area uint64, slot int, r Record) error) (ended bool, err error) {
	err = l.Scan(d, func(p *Piece) (more bool, err error) {
		for i := range p.Len() {
			r := p.Record(i)
			if r.New == 0 {
				ended = true
				return false, nil
			}
			if err := visit(p.Area, p.Slot+i, r); err != nil {
				return false, err
			}
		}
		return true, nil
	})
	return ended, err
}

// firstNonZero is the index of the first byte of p, at most a piece, that is not zero; -1: there is none.
func firstNonZero(p []byte) int {
	if bytes.Equal(p, zeroes[:len(p)]) {
		return -1
	}
	return slices.IndexFunc(p, func(b byte) bool { return b != 0 })
}
