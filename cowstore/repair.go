package cowstore

import (
	"encoding/binary"
	"errors"
	"fmt"

	"cowherd/block"
)

// Repair is what can be done for a persistent store without inventing anything: afterwards the snapshot is exactly
// right, as far as it was before, or cleanly invalid.
//
//   - What lies behind the end of the table within its area was never part of the snapshot: a record becomes part of it
//     with the area write that also holds all before it. It is erased, because whoever fills the gap without having
//     erased it (the kernel does so) would bring it to life. This is always right and needs no leave.
//   - An invalid store can be made valid again (SetValid), but only by someone who knows what the store does not: that
//     no write has reached the origin since, the write for which there was no room included. Else chunks that nobody
//     copied read as what was written over them. It is refused for a table that breaks a rule, since the copies are
//     then not all where they are said to be.
//   - A store whose table breaks a rule cannot be mended. Of two records with one new chunk, which one is right? A record
//     whose chunk lies behind the end of a device that was truncated names data that is gone; without the record the
//     chunk would be read from the origin, which has been overwritten: quietly wrong. So no record is ever cut off or
//     changed. Nor is a device made longer for an area that it has lost, which may have held records. Such a store can
//     be made cleanly invalid (Invalidate), so that neither cowherd nor the kernel shows a wrong view of it; its
//     records can still be listed.
type Repair struct {
	Survey *Survey  // as it was before
	Steps  []string // what Apply does, in words; empty: nothing
	// Broken is the number of violations that the repair leaves.
	Broken int

	device      block.Device
	erase       bool
	valid       uint32
	headerFirst bool
	header      bool
}

// RepairConfig says what a repair may do beyond what is always right.
type RepairConfig struct {
	OriginSize int64 // as for Check
	SetValid   bool
	Invalidate bool
	// Report is called for each finding, as by Check. May be nil.
	Report func(*Finding)
}

// PlanRepair looks at the store on d and finds what can be done. Nothing is written.
func PlanRepair(d block.Device, c RepairConfig) (*Repair, error) {
	if c.SetValid && c.Invalidate {
		return nil, errors.New("a store cannot be made valid and invalid at once")
	}
	r := &Repair{device: d}
	var validField bool // is something else than 0 or 1
	s, err := Check(d, CheckConfig{OriginSize: c.OriginSize, Report: func(f *Finding) {
		r.erase = r.erase || f.Rule == RuleLeftover
		if validField = validField || f.Rule == RuleHeaderValid; f.Violation && f.Rule != RuleHeaderValid {
			r.Broken++
		}
		if c.Report != nil {
			c.Report(f)
		}
	}})
	if err != nil {
		return nil, err
	}
	r.Survey = s
	if s.Layout == (Layout{}) {
		if c.SetValid || c.Invalidate {
			return nil, errors.New("the header is damaged: nothing behind it can be found")
		}
		return r, nil
	}
	if c.SetValid && (r.Broken > 0 || !s.Ended) {
		return nil, fmt.Errorf("the table breaks rules of the format (%d violations): the store cannot be made valid",
			max(r.Broken, 1))
	}
	r.plan(c, validField)
	return r, nil
}

// plan decides on the steps.
func (r *Repair) plan(c RepairConfig, validField bool) {
	s := r.Survey
	if c.Invalidate && (s.Header.Valid || validField) {
		r.header, r.headerFirst, r.valid = true, true, 0
		r.Steps = append(r.Steps, "make the store invalid in the header")
	}
	if r.erase {
		r.Steps = append(r.Steps, fmt.Sprintf("erase what lies behind the end of the table: area %d from slot %d on", s.Area, s.Slot))
	}
	if c.SetValid && (!s.Header.Valid || validField) {
		r.header, r.valid = true, 1
		r.Steps = append(r.Steps, "make the store valid in the header")
	}
	if validField && !r.header {
		r.Broken++
	}
}

// Apply does the steps, and returns when they are durable.
func (r *Repair) Apply() error {
	if r.header && r.headerFirst {
		if err := r.writeValid(); err != nil {
			return err
		}
	}
	if r.erase {
		if err := r.eraseLeftover(); err != nil {
			return fmt.Errorf("erase behind the end of the table: %w", err)
		}
	}
	if r.header && !r.headerFirst {
		return r.writeValid()
	}
	return nil
}

// writeValid changes the header's field, and nothing else of its sector.
func (r *Repair) writeValid() error {
	p := make([]byte, max(block.SectorSize, r.device.Limits().LogicalBlock))
	if err := block.Read(r.device, p, 0); err != nil {
		return fmt.Errorf("read the header: %w", err)
	}
	binary.LittleEndian.PutUint32(p[4:], r.valid)
	if err := block.Write(r.device, p, 0); err != nil {
		return fmt.Errorf("write the header: %w", err)
	}
	if err := block.Flush(r.device); err != nil {
		return fmt.Errorf("write the header: %w", err)
	}
	return nil
}

// eraseLeftover zeroes the last area from the end of the table on. A sector is written whole or not at all, and the
// records in the first one do not change, so that a crash leaves more or less of the leftover.
func (r *Repair) eraseLeftover() error {
	s := r.Survey
	l := s.Layout
	p := make([]byte, l.pieceSize())
	start := l.place(s.Area, 0)
	end := start + int64(l.ChunkSize)
	table := l.place(s.Area, s.Slot)
	for offset := start + (table-start)/int64(len(p))*int64(len(p)); offset < end; offset += int64(len(p)) {
		if err := block.Read(r.device, p, offset); err != nil {
			return err
		}
		rest := p[max(table-offset, 0):]
		if firstNonZero(rest) < 0 {
			continue
		}
		clear(rest)
		if err := block.Write(r.device, p, offset); err != nil {
			return err
		}
	}
	return block.Flush(r.device)
}
