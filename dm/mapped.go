package dm

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"

	"cowherd/block"
	"cowherd/target"
)

// Mapped is a device of a Mapper: a Device whose target is a table, with a slot for a second table beside it.
//
//	load      lines -> inactive table               requests go on
//	resume    suspended, unless it was;             requests wait
//	          inactive table -> live table;
//	          the old one is closed                 requests go on
//	clear     the inactive table is closed
//
// What is done to it, the verbs, is done one at a time.
type Mapped struct {
	mapper *Mapper
	device *Device
	// verb holds one message while no verb is at work: who takes it out may work.
	verb chan struct{}

	// What the Mapper knows of it, under its lock.
	name     string
	uuid     string
	minor    uint32
	users    []*Handle
	uppers   int             // tables that lie on it
	below    map[*Mapped]int // that its tables lie on, and how many of them
	deferred bool            // it is removed when nobody uses it
	removing bool            // nobody may use it any more

	// reports is held for reading while tables are described; a table is closed when those have ended who saw it.
	reports sync.RWMutex

	mu sync.Mutex
	// +checklocks:mu
	active *loaded // nil: none
	// +checklocks:mu
	inactive *loaded // nil: none
	// +checklocks:mu
	suspended bool
	// +checklocks:mu
	over bool // its device is closed
	// +checklocks:mu
	events uint32 // counted
	// +checklocks:mu
	happened chan struct{} // closed by the next event
}

// noTable is the target of a device that has no table.
type noTable struct{}

func (noTable) Size() int64          { return 0 }
func (noTable) Limits() block.Limits { return block.NoLimits() }
func (noTable) Map(r *block.Request) block.Device {
	r.Complete(block.NewError(r, syscall.EIO, "the device has no table"))
	return nil
}

// newMapped makes a device without tables.
func newMapped(p *Mapper, r CreateRequest) *Mapped {
	m := &Mapped{
		mapper: p, device: NewDevice(r.Name, noTable{}, false), verb: make(chan struct{}, 1), name: r.Name, uuid: r.UUID,
		below: map[*Mapped]int{}, happened: make(chan struct{}),
	}
	m.unlock()
	return m
}

// String is the name, as it is in tables of devices above.
func (d *Device) String() string { return d.Name() }

// Name is the device's name at this moment.
func (m *Mapped) Name() string { return m.device.Name() }

// unlock gives the verbs back.
func (m *Mapped) unlock() { m.verb <- struct{}{} }

// liesOnLocked tells whether m is other, or lies on it. The caller has the Mapper's lock.
func (m *Mapped) liesOnLocked(other *Mapped) bool {
	if m == other {
		return true
	}
	for below := range m.below {
		if below.liesOnLocked(other) {
			return true
		}
	}
	return false
}

// openCountLocked is by how much the device is used. The caller has the Mapper's lock.
func (m *Mapped) openCountLocked() int { return len(m.users) + m.uppers }

// slots are both tables at this moment.
func (m *Mapped) slots() (active, inactive *loaded, suspended bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.active, m.inactive, m.suspended
}

// isOver tells whether the device is closed.
func (m *Mapped) isOver() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.over
}

// Load puts a table in the inactive slot of a device; what was there is closed.
func (p *Mapper) Load(ctx context.Context, name string, lines []Line, readOnly bool) error {
	m, err := p.lock(ctx, name)
	if err != nil {
		return fmt.Errorf("load: %w", err)
	}
	defer m.unlock()
	if len(lines) == 0 {
		return fmt.Errorf("load %q: no targets specified: %w", name, syscall.EINVAL)
	}
	next, err := m.load(lines, readOnly)
	if err == nil {
		err = m.setInactive(next)
	}
	if err != nil {
		return fmt.Errorf("load %q: %w", name, err)
	}
	return nil
}

// setInactive fills or empties the inactive slot and closes what was there.
func (m *Mapped) setInactive(next *loaded) error {
	m.mu.Lock()
	old := m.inactive
	m.inactive = next
	m.mu.Unlock()
	return m.closeTable(old)
}

// closeTable closes a table that is in no slot any more.
func (m *Mapped) closeTable(l *loaded) error {
	if l == nil {
		return nil
	}
	m.reports.Lock()   // no report that saw it is left behind this line
	m.reports.Unlock() //lint:ignore SA2001 it is waited for them, and nothing else
	return l.close()
}

// Clear empties the inactive slot.
func (p *Mapper) Clear(ctx context.Context, name string) error {
	m, err := p.lock(ctx, name)
	if err != nil {
		return fmt.Errorf("clear: %w", err)
	}
	defer m.unlock()
	if err := m.setInactive(nil); err != nil {
		return fmt.Errorf("clear %q: %w", name, err)
	}
	return nil
}

// Suspend keeps new requests waiting and waits for those in flight, until ctx ends: then nothing has changed. flush
// makes durable what was written. A device that is suspended stays so.
func (p *Mapper) Suspend(ctx context.Context, name string, flush bool) error {
	m, err := p.lock(ctx, name)
	if err != nil {
		return fmt.Errorf("suspend: %w", err)
	}
	defer m.unlock()
	if _, _, suspended := m.slots(); suspended {
		return nil
	}
	return m.suspend(ctx, flush)
}

// suspend does it for a device that runs. Most of what is to be flushed is flushed while requests go on.
func (m *Mapped) suspend(ctx context.Context, flush bool) error {
	active, _, _ := m.slots()
	flush = flush && active != nil && m.device.Limits().NeedsFlush && !m.device.Limits().ReadOnly
	if flush {
		if err := flushUntil(ctx, m.device.Submit); err != nil {
			return fmt.Errorf("suspend %q: %w", m.Name(), err)
		}
	}
	active.hooks(target.Suspender.Presuspend)
	err := m.device.Suspend(ctx)
	if err == nil && flush {
		if err = m.device.Flush(ctx); err != nil {
			err = fmt.Errorf("suspend %q: %w", m.Name(), err)
			m.device.Resume()
		}
	}
	if err != nil {
		active.hooks(target.Suspender.Resume)
		return err
	}
	active.hooks(target.Suspender.Postsuspend)
	m.mu.Lock()
	m.suspended = true
	m.mu.Unlock()
	return nil
}

// flushing is the Completer of a flush that somebody may stop waiting for.
type flushing struct {
	r    block.Request
	done chan error
}

func (f *flushing) Complete(_ *block.Request, err error) { f.done <- err }

// flushUntil submits a flush and waits for it, but not for longer than ctx lasts.
func flushUntil(ctx context.Context, submit func(*block.Request)) error {
	f := &flushing{r: block.Request{Op: block.OpFlush}, done: make(chan error, 1)}
	f.r.Push(f)
	submit(&f.r)
	select {
	case err := <-f.done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("a flush does not end: %w", ctx.Err())
	}
}

// Resume lets requests go on. If there is an inactive table, it takes the live one's place before; a device that is not
// suspended is, for that. If ctx ends while requests in flight are waited for, nothing has changed. If a target of the
// new table refuses to go live, the device stays suspended with it.
func (p *Mapper) Resume(ctx context.Context, name string, flush bool) error {
	m, err := p.lock(ctx, name)
	if err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	defer m.unlock()
	_, next, suspended := m.slots()
	if next == nil {
		if !suspended {
			return nil
		}
		return m.resume()
	}
	if !suspended {
		if err := m.suspend(ctx, flush); err != nil {
			return fmt.Errorf("resume: %w", err)
		}
	}
	return m.swap(next)
}

// swap makes the inactive table of a suspended device the live one, and resumes it.
func (m *Mapped) swap(next *loaded) error {
	if err := m.device.Replace(next.table, next.readOnly); err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	m.mu.Lock()
	old := m.active
	m.active, m.inactive = next, nil
	m.mu.Unlock()
	err := m.resume()
	if closed := m.closeTable(old); closed != nil {
		err = errors.Join(err, fmt.Errorf("the old table of %q: %w", m.Name(), closed))
	}
	return err
}

// resume lets requests of a suspended device go on.
func (m *Mapped) resume() error {
	active, _, _ := m.slots()
	if err := active.preresume(); err != nil {
		return fmt.Errorf("resume %q: %w", m.Name(), err)
	}
	active.hooks(target.Suspender.Resume)
	m.mu.Lock()
	m.suspended = false
	m.mu.Unlock()
	m.device.Resume()
	return nil
}

// end closes a device that nobody uses. What was written to it is as durable as those made it who wrote it.
func (m *Mapped) end(ctx context.Context) error {
	active, inactive, suspended := m.slots()
	if !suspended {
		if err := m.suspend(ctx, false); err != nil {
			return err
		}
	}
	err := m.device.Close(ctx)
	m.mu.Lock()
	m.active, m.inactive, m.over = nil, nil, true
	m.mu.Unlock()
	m.event()
	return errors.Join(err, m.closeTable(inactive), m.closeTable(active))
}

// event counts an event and tells those who wait.
func (m *Mapped) event() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.events++
	close(m.happened)
	m.happened = make(chan struct{})
}

// Wait waits until the number of events is another than seen, and tells it.
func (p *Mapper) Wait(ctx context.Context, name string, seen uint32) (uint32, error) {
	m, err := p.find(name)
	if err != nil {
		return 0, fmt.Errorf("wait: %w", err)
	}
	for {
		m.mu.Lock()
		events, happened, over := m.events, m.happened, m.over
		m.mu.Unlock()
		if events != seen || over {
			return events, nil
		}
		select {
		case <-happened:
		case <-ctx.Done():
			return events, fmt.Errorf("wait for an event of %q: %w", name, ctx.Err())
		}
	}
}

// Message hands words to the target at a sector of the live table.
func (p *Mapper) Message(ctx context.Context, name string, sector block.Sector, words []string) (string, error) {
	m, err := p.lock(ctx, name)
	if err != nil {
		return "", fmt.Errorf("message: %w", err)
	}
	defer m.unlock()
	active, _, _ := m.slots()
	answer, err := active.message(sector, words)
	if err != nil {
		return "", fmt.Errorf("message to %q: %w", name, err)
	}
	return answer, nil
}

// message hands words to the target at a sector.
func (l *loaded) message(sector block.Sector, words []string) (string, error) {
	if l == nil {
		return "", target.Errorf("the device has no table")
	}
	if len(words) == 0 {
		return "", target.Errorf("empty message")
	}
	for i, line := range l.lines {
		if sector-line.Start >= line.Length {
			continue
		}
		if x, ok := l.targets[i].(target.Messenger); ok {
			return x.Message(words)
		}
		return "", target.Errorf("target type %s does not support messages", line.Type)
	}
	return "", target.Errorf("target message sector outside device")
}

// Info is the state of a device at one moment.
type Info struct {
	Name, UUID           string
	Minor                uint32
	Suspended            bool
	ReadOnly             bool
	Live, Inactive       bool // which tables there are
	Deferred             bool // it is removed when nobody uses it any more
	Open                 int  // how many use it
	Events               uint32
	SizeBytes            int64
	LiveTable, LiveState []Report // what table and status show
	NextTable, NextState []Report // of the inactive table
	Deps                 []Dep    // what the live table lies on, the last mentioned first
}

// Dep is a device that a table lies on.
type Dep struct {
	Name         string
	Major, Minor uint32
}

// Info describes a device.
func (p *Mapper) Info(name string) (Info, error) {
	m, err := p.find(name)
	if err != nil {
		return Info{}, err
	}
	m.reports.RLock()
	defer m.reports.RUnlock()
	p.mu.Lock()
	info := Info{Name: m.name, UUID: m.uuid, Minor: m.minor, Deferred: m.deferred, Open: m.openCountLocked()}
	p.mu.Unlock()
	m.mu.Lock()
	active, inactive := m.active, m.inactive
	info.Suspended, info.Events = m.suspended, m.events
	m.mu.Unlock()
	info.Live, info.Inactive = active != nil, inactive != nil
	info.SizeBytes, info.ReadOnly = m.device.Size(), active != nil && active.readOnly
	info.LiveTable, info.LiveState = active.report(target.Reporter.TableLine), active.report(target.Reporter.StatusLine)
	info.NextTable, info.NextState = inactive.report(target.Reporter.TableLine), inactive.report(target.Reporter.StatusLine)
	if active != nil {
		for _, x := range slices.Backward(active.lowers) {
			info.Deps = append(info.Deps, Dep{Name: x.lower.Name.String(), Major: x.lower.Major, Minor: x.lower.Minor})
		}
	}
	return info, nil
}
