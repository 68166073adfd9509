package snapshot

import (
	"errors"
	"fmt"
	"strings"
	"syscall"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/target"
)

// Types are made by
//
//	snapshot-origin <origin>
//	snapshot        <origin> <COW device> <P|PO|N> <chunk sectors> [<number of features> <feature>...]
//	snapshot-merge  <origin> <COW device> <P|PO>   <chunk sectors> [<number of features> <feature>...]
//
// with the features discard_zeroes_cow and discard_passdown_origin.
func (f *Family) Types() []*target.Type {
	return []*target.Type{
		{Name: "snapshot-origin", Version: [3]int{1, 9, 0}, New: f.newOrigin},
		{Name: "snapshot", Version: [3]int{1, 16, 0}, New: f.newSnapshot},
		{Name: "snapshot-merge", Version: [3]int{1, 5, 0}, New: f.newMerge},
	}
}

// originTarget is an Origin in a table.
type originTarget struct {
	*sharedOrigin
	family *Family
	host   target.Host
	lower  target.Lower
	size   int64
}

// newOrigin makes a snapshot-origin.
func (f *Family) newOrigin(b *target.Build) (target.Target, error) {
	if b.Args.Len() != 1 {
		return nil, target.Errorf("origin: incorrect number of arguments")
	}
	lower, err := openAs(b, b.Args.Next(), "target device")
	if err != nil {
		return nil, err
	}
	if err := b.Within(lower, 0, b.Length); err != nil {
		return nil, err
	}
	return &originTarget{
		sharedOrigin: f.acquire(lower.Device, b.Host), family: f, host: b.Host, lower: lower, size: b.Size(),
	}, nil
}

// openAs opens a device, and says of an error what it was to be.
func openAs(b *target.Build, name, what string) (target.Lower, error) {
	l, err := b.Host.Open(name, !b.ReadOnly)
	if err != nil {
		return l, fmt.Errorf("cannot get %s: %w", what, err)
	}
	return l, nil
}

// Size is the table's.
func (t *originTarget) Size() int64 { return t.size }

// TableLine is the device.
func (t *originTarget) TableLine() string { return t.lower.Name.String() }

// StatusLine is empty.
func (t *originTarget) StatusLine() string { return "" }

// Close leaves the family.
func (t *originTarget) Close() error {
	t.family.release(t.sharedOrigin, t.host)
	return nil
}

// memberTarget is a snapshot or a merge in a table.
type memberTarget struct{ *member }

// newSnapshot makes a snapshot.
func (f *Family) newSnapshot(b *target.Build) (target.Target, error) { return f.newMember(b, false) }

// newMerge makes a snapshot-merge.
func (f *Family) newMerge(b *target.Build) (target.Target, error) { return f.newMember(b, true) }

// newMember makes either.
func (f *Family) newMember(b *target.Build, merges bool) (target.Target, error) {
	if b.Args.Len() < 4 {
		return nil, target.Errorf("requires 4 or more arguments")
	}
	originName, cowName, kind, chunk := b.Args.Next(), b.Args.Next(), b.Args.Next(), b.Args.Next()
	m := &member{family: f, host: b.Host, size: b.Size(), merges: merges}
	if err := m.policy.parseFeatures(&b.Args); err != nil {
		return nil, err
	}
	var err error
	if m.origin, err = openAs(b, originName, "origin device"); err != nil {
		return nil, err
	}
	if m.cow, err = openAs(b, cowName, "COW device"); err != nil {
		return nil, err
	}
	if m.cow.Device == m.origin.Device {
		return nil, target.Errorf("COW device cannot be the same as origin device")
	}
	if err := m.policy.parseStore(kind, chunk); err != nil {
		return nil, fmt.Errorf("couldn't create exception store: %w", err)
	}
	if m.policy.kind == 'N' && m.policy.chunk == 0 {
		return nil, target.Errorf("chunk size not set")
	}
	if merges && m.policy.kind == 'N' {
		return nil, target.Errorf("snapshot exception store does not support snapshot-merge")
	}
	if err := b.Within(m.origin, 0, b.Length); err != nil {
		return nil, err
	}
	return m.begin()
}

// begin makes a member one of the family and opens what it needs.
func (m *member) begin() (target.Target, error) {
	if err := m.family.join(m); err != nil {
		return nil, err
	}
	m.shared = m.family.acquire(m.origin.Device, nil)
	if m.source == nil {
		if err := m.open(); err != nil {
			m.family.leave(m)
			m.family.release(m.shared, nil)
			if errno := syscall.Errno(0); !errors.As(err, &errno) {
				err = fmt.Errorf("%w: %w", err, syscall.EINVAL)
			}
			return nil, fmt.Errorf("couldn't create exception store: %w", err)
		}
	}
	m.limits = m.limitsNow()
	return memberTarget{m}, nil
}

// limitsNow are the limits of what the member is to be.
func (m *member) limitsNow() block.Limits {
	c := m.current()
	if m.merges {
		x := Merge{snapshot: c.snapshot, device: m.origin.Device, cow: m.cow.Device}
		return x.Limits()
	}
	return c.snapshot.limitsWith(m.policy.zeroes, m.policy.passdown)
}

// parseStore reads the type of the store and the chunk size.
func (p *policy) parseStore(kind, chunk string) error {
	letter, option := strings.ToUpper(kind[:1])[0], kind[1:]
	switch {
	case letter != 'P' && letter != 'N':
		return target.Errorf("exception store type is not P or N")
	case letter == 'P' && option != "" && option[0] != 'O' && option[0] != 'o':
		return target.Errorf("unsupported persistent store option: %s", option)
	}
	p.kind, p.overflows = letter, letter == 'P' && option != ""
	words := target.NewArgs(chunk)
	sectors, err := words.Number(0, cowstore.ChunkSizeMax/block.SectorSize, "invalid chunk size")
	if err != nil {
		return err
	}
	p.chunk = cowstore.ChunkSize(sectors) * block.SectorSize
	if p.chunk == 0 {
		return nil
	}
	if err := cowstore.CheckChunkSize(int64(p.chunk)); err != nil {
		return fmt.Errorf("%w: %w", err, syscall.EINVAL)
	}
	return nil
}

// parseFeatures reads the features, if there are any.
func (p *policy) parseFeatures(a *target.Args) error {
	if a.Len() == 0 {
		return nil
	}
	words, err := a.Group(2, "invalid number of feature arguments")
	if err != nil {
		return err
	}
	for words.Len() > 0 {
		switch strings.ToLower(words.Next()) {
		case "discard_zeroes_cow":
			p.zeroes = true
		case "discard_passdown_origin":
			p.passdown = true
		default:
			return target.Errorf("unrecognised feature requested")
		}
	}
	if p.passdown && !p.zeroes {
		return target.Errorf("discard_passdown_origin feature depends on discard_zeroes_cow")
	}
	return nil
}

// Map is that of the snapshot or the merge; all fails in one whose exceptions were handed over.
func (t memberTarget) Map(r *block.Request) block.Device {
	switch c := t.core; { // which changes only while no request is in flight
	case c == nil:
		r.Complete(block.NewError(r, syscall.EIO, "the snapshot's exceptions were handed over"))
		return nil
	case c.merge != nil:
		return c.merge.Map(r)
	default:
		return c.snapshot.Map(r)
	}
}

// Size is the table's.
func (t memberTarget) Size() int64 { return t.size }

// Limits are those of the snapshot or the merge.
func (t memberTarget) Limits() block.Limits { return t.limits }

// Extents are those of the snapshot or the merge.
func (t memberTarget) Extents(offset, length int64, yield func(block.Extent) bool) error {
	switch c := t.current(); {
	case c == nil:
		return fmt.Errorf("the snapshot's exceptions were handed over: %w", syscall.EIO)
	case c.merge != nil:
		return c.merge.Extents(offset, length, yield)
	default:
		return c.snapshot.Extents(offset, length, yield)
	}
}

// TableLine is the kernel's.
func (t memberTarget) TableLine() string {
	kind, chunk := string(t.policy.kind), block.Sector(0)
	if t.policy.overflows {
		kind += "O"
	}
	if c := t.current(); c != nil {
		chunk = block.SectorFloor(int64(c.snapshot.chunkSize))
	}
	line := fmt.Sprintf("%s %s %s %d", t.origin.Name, t.cow.Name, kind, chunk)
	switch {
	case t.policy.passdown:
		line += " 2 discard_zeroes_cow discard_passdown_origin"
	case t.policy.zeroes:
		line += " 1 discard_zeroes_cow"
	}
	return line
}

// StatusLine is the kernel's.
func (t memberTarget) StatusLine() string {
	switch c := t.current(); {
	case c == nil:
		return "Invalid"
	case c.merge != nil:
		return c.merge.Status()
	default:
		return c.snapshot.Status().String()
	}
}
