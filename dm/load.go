package dm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"

	"cowherd/block"
	"cowherd/target"
)

// loaded is a table with the targets that it was made of: what is in a slot of a mapped device.
type loaded struct {
	table    *Table // nil: without lines
	lines    []Line // as they were given
	targets  []target.Target
	lowers   []lower // in the order of their first mention
	readOnly bool
}

// lower is a device that a table has open.
type lower struct {
	arg    string // as the table has it
	lower  Lower
	mapped *Mapped // lower, if it is a mapped device; else nil
}

// Lower is a device that a Host has opened for a table.
type Lower struct {
	target.Lower
	Major, Minor uint32       // what stands for it in "deps"
	Close        func() error // gives it back; nil: there is nothing to do
}

// loader makes a loaded: it is the target.Host of its targets.
type loader struct {
	m *Mapped
	loaded
}

// load makes the targets of lines. After an error nothing is open.
func (m *Mapped) load(lines []Line, readOnly bool) (*loaded, error) {
	l := &loader{m: m, loaded: loaded{lines: lines, readOnly: readOnly}}
	end := block.Sector(0)
	for i, line := range lines {
		t, err := l.make(line, end)
		if err == nil {
			l.targets = append(l.targets, t)
			if end += line.Length; end > sectorMax {
				err = target.Errorf("the table is longer than 8 EiB")
			}
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("target %d: %s: %w", i+1, line.Type, err), l.close())
		}
	}
	if len(lines) > 0 {
		var err error
		if l.table, err = NewTable(l.targets); err == nil {
			err = l.checkAligned()
		}
		if err != nil {
			return nil, errors.Join(err, l.close())
		}
	}
	return &l.loaded, nil
}

// make makes the target of one line; the ones before it end at end.
func (l *loader) make(line Line, end block.Sector) (target.Target, error) {
	if line.Length == 0 {
		return nil, target.Errorf("zero-length target")
	}
	t := l.m.mapper.types[line.Type]
	if t == nil {
		return nil, target.Errorf("unknown target type")
	}
	if line.Start != end {
		return nil, target.Errorf("gap in table")
	}
	return t.New(&target.Build{
		Start: line.Start, Length: line.Length, Args: target.NewArgs(line.Args), ReadOnly: l.readOnly, Host: l,
	})
}

// checkAligned checks that every target consists of whole logical blocks of the table.
func (l *loader) checkAligned() error {
	unit := int64(l.table.Limits().LogicalBlock)
	for i, line := range l.lines {
		if line.Start.Bytes()%unit != 0 || line.Length.Bytes()%unit != 0 {
			return fmt.Errorf("target %d: %s: start=%d len=%d not aligned to the logical block size %d of the table: %w", i+1,
				line.Type, line.Start, line.Length, unit, syscall.EINVAL)
		}
	}
	return nil
}

// Open opens a device for a target. A device that the table has open already is the same one.
func (l *loader) Open(arg string, write bool) (target.Lower, error) {
	for i := range l.lowers {
		if l.lowers[i].arg == arg {
			return l.lowers[i].lower.Lower, checkWritable(l.lowers[i].lower.Lower, write)
		}
	}
	opened, err := l.m.mapper.openLower(l.m, arg, write)
	if err != nil {
		return target.Lower{}, err
	}
	l.lowers = append(l.lowers, opened)
	return opened.lower.Lower, checkWritable(opened.lower.Lower, write)
}

// checkWritable tells whether a device may be written, if it is to be.
func checkWritable(l target.Lower, write bool) error {
	if write && l.Limits().ReadOnly {
		return fmt.Errorf("%s is read-only: %w", l.Name, syscall.EACCES)
	}
	return nil
}

// Event is target.Host's.
func (l *loader) Event() { l.m.event() }

// Hold is target.Host's.
func (l *loader) Hold(ctx context.Context) error { return l.m.device.Hold(ctx) }

// Unhold is target.Host's.
func (l *loader) Unhold() { l.m.device.Unhold() }

// close ends the targets and gives their devices back. No request is in flight, and none comes any more.
func (l *loaded) close() error {
	var errs []error
	for _, t := range slices.Backward(l.targets) {
		if c, ok := t.(target.Closer); ok {
			errs = append(errs, c.Close())
		}
	}
	for _, x := range slices.Backward(l.lowers) {
		if x.lower.Close != nil {
			errs = append(errs, x.lower.Close())
		}
	}
	return errors.Join(errs...)
}

// hooks calls f for each target that wants to know when its device is suspended and resumed.
func (l *loaded) hooks(f func(target.Suspender)) {
	if l == nil {
		return
	}
	for _, t := range l.targets {
		if s, ok := t.(target.Suspender); ok {
			f(s)
		}
	}
}

// preresume asks each target whether it may go live.
func (l *loaded) preresume() error {
	if l == nil {
		return nil
	}
	for i, t := range l.targets {
		if s, ok := t.(target.Suspender); ok {
			if err := s.Preresume(); err != nil {
				return fmt.Errorf("target %d: %s: %w", i+1, l.lines[i].Type, err)
			}
		}
	}
	return nil
}

// Report is a line of what "table" or "status" show of a target.
type Report = Line

// report is the table or the status of each target.
func (l *loaded) report(what func(target.Reporter) string) []Report {
	if l == nil {
		return nil
	}
	reports := slices.Clone(l.lines)
	for i, t := range l.targets {
		reports[i].Args = ""
		if r, ok := t.(target.Reporter); ok {
			reports[i].Args = what(r)
		}
	}
	return reports
}
