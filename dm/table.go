package dm

import (
	"fmt"
	"slices"
	"syscall"

	"cowherd/block"
	"cowherd/internal/invariant"
	"cowherd/target"
)

// Table is targets side by side: what the bytes of a mapped device are. It is a Target itself. A Table does not change.
//
// A request that crosses from one target to the next, or a boundary of the target that it lies in (target.Splitter),
// is cut; a flush goes to every target.
type Table struct {
	rows   []row
	size   int64
	limits block.Limits
}

// row is one target of a table.
type row struct {
	start, end int64 // bytes, half open
	target     Target
	split      int64 // no read or write crosses a multiple of it, counted from start
	remapper   target.Remapper
	extents    block.ExtentLister
}

// NewTable puts targets one behind the other, without gaps. EINVAL: there is none, or together they are too long.
func NewTable(targets []Target) (*Table, error) {
	if len(targets) == 0 {
		return nil, fmt.Errorf("a table without targets: %w", syscall.EINVAL)
	}
	t := &Table{limits: block.NoLimits()}
	for i, x := range targets {
		size := x.Size()
		if t.size+size < t.size {
			return nil, fmt.Errorf("target %d: the table is longer than 8 EiB: %w", i, syscall.EINVAL)
		}
		r := row{start: t.size, end: t.size + size, target: x}
		r.remapper, _ = x.(target.Remapper)
		r.extents, _ = x.(block.ExtentLister)
		if s, ok := x.(target.Splitter); ok {
			r.split = s.SplitAt()
		}
		t.rows = append(t.rows, r)
		t.size += size
		t.limits = t.limits.Stack(x.Limits())
	}
	return t, nil
}

// unwrap is t without a Table that adds nothing to it, or in one if it needs it.
func unwrap(t Target) Target {
	if x, ok := t.(*Table); ok {
		if len(x.rows) == 1 && x.rows[0].split == 0 {
			return x.rows[0].target
		}
		return t
	}
	if s, ok := t.(target.Splitter); ok && s.SplitAt() > 0 {
		x, err := NewTable([]Target{t})
		invariant.Check(err == nil, "a table of one target: %v", err)
		return x
	}
	return t
}

// Size is that of all targets together, in bytes.
func (t *Table) Size() int64 { return t.size }

// Limits are those of all targets together.
func (t *Table) Limits() block.Limits { return t.limits }

// find is the row of the byte at offset, which is in the table.
func (t *Table) find(offset int64) *row {
	i, _ := slices.BinarySearchFunc(t.rows, offset, func(r row, offset int64) int {
		if r.end <= offset {
			return -1
		}
		return 1
	})
	return &t.rows[min(i, len(t.rows)-1)] // an empty request may lie at the very end
}

// reach is how many bytes of [offset, offset+length) one request to r may have.
func (r *row) reach(op block.Op, offset, length int64) int64 {
	length = min(length, r.end-offset)
	if r.split > 0 && op <= block.OpWrite {
		length = min(length, r.split-(offset-r.start)%r.split)
	}
	return length
}

// Map hands r to the target that it lies in, or cuts it.
func (t *Table) Map(r *block.Request) block.Device {
	if r.Op == block.OpFlush {
		return t.flush(r)
	}
	x := t.find(r.Offset)
	if x.reach(r.Op, r.Offset, r.Length) < r.Length {
		t.cut(r)
		return nil
	}
	r.Offset -= x.start
	return x.target.Map(r)
}

// cut takes r and submits it in pieces.
func (t *Table) cut(r *block.Request) {
	f := block.NewFan(r)
	for offset, end := r.Offset, r.End(); offset < end; {
		x := t.find(offset)
		n := x.reach(r.Op, offset, end-offset)
		p := f.Part(offset, n)
		p.Offset -= x.start
		if to := x.target.Map(p); to != nil {
			to.Submit(p)
		}
		offset += n
	}
	f.Done(nil)
}

// flush hands a flush to every target.
func (t *Table) flush(r *block.Request) block.Device {
	if len(t.rows) == 1 {
		return t.rows[0].target.Map(r)
	}
	f := block.NewFan(r)
	for i := range t.rows {
		p := f.Part(0, 0)
		if to := t.rows[i].target.Map(p); to != nil {
			to.Submit(p)
		}
	}
	f.Done(nil)
	return nil
}

// Remap is that of the target at offset, to its end at most.
func (t *Table) Remap(offset, length int64) (to block.Device, at, n int64, ok bool) {
	x := t.find(offset)
	if x.remapper == nil {
		return nil, 0, 0, false
	}
	return x.remapper.Remap(offset-x.start, min(length, x.end-offset))
}

// Extents are those of the targets; everything is data in one that does not know.
func (t *Table) Extents(offset, length int64, yield func(block.Extent) bool) error {
	goOn := true
	for end := offset + length; offset < end && goOn; {
		x := t.find(offset)
		n := min(end, x.end) - offset
		if x.extents == nil {
			goOn = yield(block.Extent{Offset: offset, Length: n})
		} else if err := x.extents.Extents(offset-x.start, n, func(e block.Extent) bool {
			e.Offset += x.start
			goOn = yield(e)
			return goOn
		}); err != nil {
			return err
		}
		offset += n
	}
	return nil
}
