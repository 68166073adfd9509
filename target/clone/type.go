package clone

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"cowherd/block"
	"cowherd/clonemeta"
	"cowherd/kcopyd"
	"cowherd/target"
)

// Tables is what the clones of tables know of each other: who has which metadata device. Two clones never use one at the
// same time. A clone that is loaded while another one has its metadata opens it when it is resumed, if that one is
// suspended then, which from there on fails all I/O: so a clone is reloaded.
type Tables struct {
	newEngine func() kcopyd.Engine

	mu sync.Mutex
	// By the metadata device.
	// +checklocks:mu
	owners map[block.Device]*tableClone
}

// NewTables makes what clones share whose engines newEngine makes.
func NewTables(newEngine func() kcopyd.Engine) *Tables {
	return &Tables{newEngine: newEngine, owners: map[block.Device]*tableClone{}}
}

// Type is made by
//
//	clone <metadata> <destination> <source> <region sectors> [<number of features> <feature>...
//	      [<number of words> <key> <value>...]]
//
// with the features no_hydration and no_discard_passdown, and the keys hydration_threshold and hydration_batch_size.
func (f *Tables) Type() *target.Type {
	return &target.Type{Name: "clone", Version: [3]int{1, 0, 0}, New: f.parse}
}

// tableClone is a Clone in a table.
type tableClone struct {
	tables    *Tables
	host      target.Host
	metaDev   target.Lower
	dest      target.Lower
	source    target.Lower
	options   Options
	arguments []string
	length    block.Sector
	limits    block.Limits

	// Set before the device is resumed, and while no request is in flight.
	clone    *Clone // nil: it is not open yet, or was taken over
	metadata *clonemeta.Metadata
	engine   kcopyd.Engine

	passer atomic.Pointer[Clone] // clone, for whoever asks too late

	// Under the lock of tables.
	suspended bool
}

// parse makes a target of a line of a table.
func (f *Tables) parse(b *target.Build) (target.Target, error) {
	if b.Args.Len() < 4 {
		return nil, target.Errorf("invalid number of arguments")
	}
	t := &tableClone{tables: f, host: b.Host, length: b.Length}
	for _, x := range []struct {
		lower *target.Lower
		what  string
	}{{&t.metaDev, "metadata"}, {&t.dest, "destination"}, {&t.source, "source"}} {
		var err error
		if *x.lower, err = b.Host.Open(b.Args.Next(), x.lower != &t.source); err != nil {
			return nil, fmt.Errorf("failed to open %s device: %w", x.what, err)
		}
	}
	for b.Args.Len() > 0 {
		t.arguments = append(t.arguments, b.Args.Next())
	}
	var err error
	if t.options, err = ParseOptions(t.arguments); err != nil {
		return nil, err
	}
	for _, x := range []struct {
		lower target.Lower
		what  string
	}{{t.dest, "destination"}, {t.source, "source"}} {
		if block.SectorFloor(x.lower.Size()) < b.Length {
			return nil, target.Errorf("device size larger than %s device", x.what)
		}
	}
	t.limits = makeLimits(t.dest.Device, t.source.Device, t.options.RegionSize.Bytes())
	if f.take(t) {
		if err := t.open(); err != nil {
			return nil, errors.Join(err, f.leave(t))
		}
	} else if err := t.fits(); err != nil {
		return nil, err
	}
	return t, nil
}

// fits tells whether metadata that another clone has is of t's sizes, which never change: what the resume would refuse is
// refused when the table is loaded.
func (t *tableClone) fits() error {
	s, err := clonemeta.ReadSuperblock(t.metaDev.Device)
	if err != nil {
		return fmt.Errorf("failed to load metadata: %w: %w", err, syscall.EINVAL)
	}
	if s.RegionSize != t.options.RegionSize || s.TargetSize != t.length {
		return target.Errorf("failed to load metadata: it is of regions of %d sectors and a length of %d, not of %d and %d",
			s.RegionSize, s.TargetSize, t.options.RegionSize, t.length)
	}
	return nil
}

// take makes t the owner of its metadata, if nobody is.
func (f *Tables) take(t *tableClone) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.owners[t.metaDev.Device] != nil {
		return false
	}
	f.owners[t.metaDev.Device] = t
	return true
}

// takeOver makes t the owner of its metadata, and closes it for the one that was.
func (f *Tables) takeOver(t *tableClone) error {
	f.mu.Lock()
	old := f.owners[t.metaDev.Device]
	if old != nil && old != t && !old.suspended {
		f.mu.Unlock()
		return fmt.Errorf("the metadata device %s is in use by another clone, which is not suspended: %w", t.metaDev.Name,
			syscall.EBUSY)
	}
	f.owners[t.metaDev.Device] = t
	f.mu.Unlock()
	if old == nil || old == t {
		return nil
	}
	return old.end()
}

// leave gives the metadata up, if t has it.
func (f *Tables) leave(t *tableClone) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.owners[t.metaDev.Device] == t {
		delete(f.owners, t.metaDev.Device)
	}
	return nil
}

// open opens the metadata, or makes it on a device that begins with zeroes, and the clone.
func (t *tableClone) open() error {
	p := clonemeta.Params{RegionSize: t.options.RegionSize, TargetSize: t.length}
	meta, err := clonemeta.Open(t.metaDev.Device, p)
	if errors.Is(err, clonemeta.ErrUnformatted) {
		meta, err = clonemeta.Format(t.metaDev.Device, p)
	}
	if err != nil {
		if errno := syscall.Errno(0); !errors.As(err, &errno) {
			err = fmt.Errorf("%w: %w", err, syscall.EINVAL)
		}
		return fmt.Errorf("failed to load metadata: %w", err)
	}
	engine := t.tables.newEngine()
	made, err := New(Config{
		Name: t.dest.Name.String(), Source: t.source.Device, Destination: t.dest.Device, Metadata: meta, Engine: engine,
		Hydration: t.options.Hydration, NoDiscardPassdown: t.options.NoDiscardPassdown, Arguments: t.arguments,
		Event: func(Event) { t.host.Event() },
	})
	if err != nil {
		return errors.Join(err, engine.Close(), meta.Close())
	}
	t.clone, t.metadata, t.engine = made, meta, engine
	t.passer.Store(made)
	return nil
}

// end closes the clone, whose device is suspended or gone.
func (t *tableClone) end() error {
	if t.clone == nil {
		return nil
	}
	t.passer.Store(nil)
	err := errors.Join(t.clone.Close(), t.engine.Close(), t.metadata.Close())
	t.clone = nil
	return err
}

// Preresume opens the clone, if another one had its metadata when it was loaded.
func (t *tableClone) Preresume() error {
	f := t.tables
	f.mu.Lock()
	isOwner, was := f.owners[t.metaDev.Device] == t, t.suspended
	f.mu.Unlock()
	if isOwner || was { // one that was taken over goes on, and fails all I/O
		return nil
	}
	if err := f.takeOver(t); err != nil {
		return err
	}
	return t.open()
}

// Resume lets hydration go on.
func (t *tableClone) Resume() {
	t.setSuspended(false)
	if t.clone != nil {
		t.clone.Resume()
	}
}

// Presuspend has nothing to do: what waits for a region goes on by itself.
func (t *tableClone) Presuspend() {}

// Postsuspend stops hydration and commits.
func (t *tableClone) Postsuspend() {
	if t.clone != nil {
		_ = t.clone.Suspend() // when the metadata cannot be written the mode tells
	}
	t.setSuspended(true)
}

func (t *tableClone) setSuspended(is bool) {
	t.tables.mu.Lock()
	defer t.tables.mu.Unlock()
	t.suspended = is
}

// Close ends the clone.
func (t *tableClone) Close() error { return errors.Join(t.end(), t.tables.leave(t)) }

// Map is the clone's; all fails in one whose metadata another has.
func (t *tableClone) Map(r *block.Request) block.Device {
	if t.clone == nil {
		r.Complete(block.NewError(r, syscall.EIO, "the clone's metadata was taken over by another clone"))
		return nil
	}
	return t.clone.Map(r)
}

// Passes is the clone's.
func (t *tableClone) Passes(r *block.Request) bool {
	c := t.passer.Load()
	return c != nil && c.Passes(r)
}

// Passage is the destination.
func (t *tableClone) Passage() (below block.Device, sure target.Passage) {
	return t.dest.Device, target.NoPassage()
}

// Size is the table's.
func (t *tableClone) Size() int64 { return t.length.Bytes() }

// Limits are the clone's.
func (t *tableClone) Limits() block.Limits { return t.limits }

// Extents are the clone's.
func (t *tableClone) Extents(offset, length int64, yield func(block.Extent) bool) error {
	if t.clone == nil {
		return fmt.Errorf("the clone's metadata was taken over by another clone: %w", syscall.EIO)
	}
	return t.clone.Extents(offset, length, yield)
}

// Message is the clone's.
func (t *tableClone) Message(words []string) (string, error) {
	if t.clone == nil {
		return "", target.Errorf("the clone is not live")
	}
	return "", t.clone.Message(words)
}

// TableLine is the devices, and the arguments as they were given.
func (t *tableClone) TableLine() string {
	return fmt.Sprintf("%s %s %s %s", t.metaDev.Name, t.dest.Name, t.source.Name, strings.Join(t.arguments, " "))
}

// StatusLine is the kernel's, after a commit.
func (t *tableClone) StatusLine() string {
	if t.clone == nil {
		return "Error"
	}
	return t.clone.Info()
}
