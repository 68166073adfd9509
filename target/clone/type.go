package clone

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"

	"cowherd/block"
	"cowherd/clonemeta"
	"cowherd/kcopyd"
	"cowherd/target"
)

// Type is made by
//
//	clone <metadata> <destination> <source> <region size>
//	      [<number of features> [no_hydration] [no_discard_passdown]
//	      [<number of core arguments> [hydration_threshold <regions>] [hydration_batch_size <regions>]]]
//
// newEngine makes the copy engine of each.
func Type(newEngine func() kcopyd.Engine) *target.Type {
	return &target.Type{Name: "clone", Version: [3]int{1, 0, 0}, New: func(b *target.Build) (target.Target, error) {
		return newMapped(b, newEngine)
	}}
}

// mapped is a Clone in a table. The metadata is looked at when the table is loaded, and read when it goes live: until then
// another table may have a clone on it that goes on.
type mapped struct {
	meta      target.Lower
	dest      target.Lower
	source    target.Lower
	arguments []string // as given, from the region size on
	options   Options
	params    clonemeta.Params
	limits    block.Limits
	host      target.Host
	newEngine func() kcopyd.Engine

	live atomic.Pointer[live]
}

// live is what there is from the first Preresume on.
type live struct {
	*Clone
	meta   *clonemeta.Metadata
	engine kcopyd.Engine
}

// newMapped makes a clone of a line of a table.
func newMapped(b *target.Build, newEngine func() kcopyd.Engine) (target.Target, error) {
	if b.Args.Len() < 4 {
		return nil, target.Errorf("invalid number of arguments")
	}
	m := &mapped{host: b.Host, newEngine: newEngine}
	var err error
	if m.meta, err = b.OpenAs(b.Args.Next(), "metadata device"); err != nil {
		return nil, err
	}
	if m.dest, err = b.OpenAs(b.Args.Next(), "destination device"); err != nil {
		return nil, err
	}
	if m.dest.Size() < b.Size() {
		return nil, target.Errorf("device size larger than destination device")
	}
	if m.source, err = b.Host.Open(b.Args.Next(), false); err != nil {
		return nil, fmt.Errorf("source device lookup failed: %w", err)
	}
	if m.source.Size() < b.Size() {
		return nil, target.Errorf("device size larger than source device")
	}
	for b.Args.Len() > 0 {
		m.arguments = append(m.arguments, b.Args.Next())
	}
	if m.options, err = ParseOptions(m.arguments); err != nil {
		return nil, err
	}
	m.params = clonemeta.Params{RegionSize: m.options.RegionSize, TargetSize: b.Length}
	size := m.options.RegionSize.Bytes()
	for _, d := range []block.Device{m.dest.Device, m.source.Device} {
		if l := int64(d.Limits().LogicalBlock); size%l != 0 || b.Size()%l != 0 {
			return nil, target.Errorf("region size or length is not a multiple of the device's logical block size")
		}
	}
	m.limits = makeLimits(m.dest.Device, m.source.Device, size)
	if err := m.prepare(); err != nil {
		return nil, fmt.Errorf("error opening metadata: %w", err)
	}
	return m, nil
}

// prepare makes metadata where there is none, and checks what there is against the table.
func (m *mapped) prepare() error {
	meta, err := clonemeta.Open(m.meta.Device, m.params)
	if errors.Is(err, clonemeta.ErrUnformatted) {
		meta, err = clonemeta.Format(m.meta.Device, m.params)
	}
	if err != nil {
		return err
	}
	return meta.Close()
}

// Map maps r. The table is live.
func (m *mapped) Map(r *block.Request) block.Device { return m.live.Load().Map(r) }

// Size is the table's.
func (m *mapped) Size() int64 { return m.params.TargetSize.Bytes() }

// Limits are what a clone of these devices takes.
func (m *mapped) Limits() block.Limits { return m.limits }

// Extents are the clone's; everything is data before it is live.
func (m *mapped) Extents(offset, length int64, yield func(block.Extent) bool) error {
	if x := m.live.Load(); x != nil {
		return x.Extents(offset, length, yield)
	}
	yield(block.Extent{Offset: offset, Length: length})
	return nil
}

// TableLine is the devices, and the rest as it was given.
func (m *mapped) TableLine() string {
	return fmt.Sprintf("%s %s %s %s", m.meta.Name, m.dest.Name, m.source.Name, strings.Join(m.arguments, " "))
}

// StatusLine is the kernel's. What is hydrated is committed by the flush that comes before, unless noflush was asked for.
func (m *mapped) StatusLine() string {
	if x := m.live.Load(); x != nil {
		return x.Status().String()
	}
	return ""
}

// Message is the kernel's.
func (m *mapped) Message(words []string) (string, error) {
	x := m.live.Load()
	if x == nil {
		return "", target.Errorf("the clone has not been live")
	}
	return "", x.Message(words)
}

// Preresume reads the metadata, the first time.
func (m *mapped) Preresume() error {
	if m.live.Load() != nil {
		return nil
	}
	meta, err := clonemeta.Open(m.meta.Device, m.params)
	if err != nil {
		return err
	}
	x := &live{meta: meta, engine: m.newEngine()}
	x.Clone, err = New(Config{
		Name: m.dest.Name.String(), Source: m.source.Device, Destination: m.dest.Device, Metadata: meta, Engine: x.engine,
		Hydration: m.options.Hydration, NoDiscardPassdown: m.options.NoDiscardPassdown, Arguments: m.arguments,
		Event: func(Event) { m.host.Event() },
	})
	if err != nil {
		return errors.Join(err, x.engine.Close(), meta.Close())
	}
	m.live.Store(x)
	return nil
}

// Resume starts hydration.
func (m *mapped) Resume() { m.live.Load().Resume() }

// Presuspend does nothing: no request waits for ever.
func (m *mapped) Presuspend() {}

// Postsuspend stops hydration and commits. An error has changed the mode, which the status shows.
func (m *mapped) Postsuspend() { _ = m.live.Load().Suspend() }

// Close ends the clone.
func (m *mapped) Close() error {
	x := m.live.Load()
	if x == nil {
		return nil
	}
	return errors.Join(x.Clone.Close(), x.engine.Close(), x.meta.Close())
}
