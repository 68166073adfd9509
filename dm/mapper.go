package dm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"cowherd/target"
)

// Major is the major number that mapped devices have here. It means nothing outside.
const Major = 253

// Bounds of names, in bytes, as in the kernel.
const (
	nameMax = 127
	uuidMax = 128
)

// mappedMax bounds the devices of a Mapper.
const mappedMax = 1024

// A Host is what a Mapper has around it: whatever its devices lie on that is not a mapped device of its own, and the
// names that others have.
type Host interface {
	// Open opens what an argument of a table names, for the table of a mapped device. write is a wish: what cannot be
	// written says so in its Limits.
	Open(arg string, write bool, user string) (Lower, error)
	// Claim takes a name, or says who has it (EBUSY). Unclaim gives it back.
	Claim(name string) error
	Unclaim(name string)
}

// Mapper is mapped devices with names, which can lie on each other. All methods are safe for concurrent use.
type Mapper struct {
	types map[string]*target.Type
	host  Host
	tasks sync.WaitGroup // removals that were deferred

	mu sync.Mutex
	// +checklocks:mu
	devices map[string]*Mapped // by name
	// +checklocks:mu
	minors map[uint32]*Mapped
}

// NewMapper makes a Mapper of these types of targets.
func NewMapper(host Host, types []*target.Type) *Mapper {
	p := &Mapper{types: map[string]*target.Type{}, host: host, devices: map[string]*Mapped{}, minors: map[uint32]*Mapped{}}
	for _, t := range types {
		p.types[t.Name] = t
	}
	return p
}

// Types are the types of targets, by name.
func (p *Mapper) Types() []*target.Type {
	return slices.SortedFunc(maps.Values(p.types), func(a, b *target.Type) int { return cmp.Compare(a.Name, b.Name) })
}

// CreateRequest is what a new device is to be.
type CreateRequest struct {
	Name, UUID string
	Minor      int // -1: the lowest that is free
}

// Create makes a device without a table. EBUSY: the name, the UUID or the minor number is taken.
func (p *Mapper) Create(r CreateRequest) error {
	if err := checkName(r.Name, nameMax); err != nil {
		return fmt.Errorf("create: name %w", err)
	}
	if len(r.UUID) > uuidMax {
		return fmt.Errorf("create %q: UUID longer than %d bytes: %w", r.Name, uuidMax, syscall.EINVAL)
	}
	if err := p.host.Claim(r.Name); err != nil {
		return fmt.Errorf("create %q: %w", r.Name, err)
	}
	if err := p.add(newMapped(p, r), r.Minor); err != nil {
		p.host.Unclaim(r.Name)
		return fmt.Errorf("create %q: %w", r.Name, err)
	}
	return nil
}

// checkName tells why a name cannot be one.
func checkName(name string, most int) error {
	switch {
	case name == "":
		return fmt.Errorf("is empty: %w", syscall.EINVAL)
	case len(name) > most:
		return fmt.Errorf("%.20q... is longer than %d bytes: %w", name, most, syscall.EINVAL)
	case strings.ContainsAny(name, "/\x00"):
		return fmt.Errorf("%q contains a slash or a zero byte: %w", name, syscall.EINVAL)
	}
	return nil
}

// add takes a new device in, whose minor number is set.
func (p *Mapper) add(m *Mapped, minor int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.devices[m.name] != nil {
		return fmt.Errorf("there is a mapped device of this name: %w", syscall.EBUSY)
	}
	if m.uuid != "" && p.byUUIDLocked(m.uuid) != nil {
		return fmt.Errorf("there is a mapped device of the UUID %q: %w", m.uuid, syscall.EBUSY)
	}
	if len(p.devices) >= mappedMax {
		return fmt.Errorf("there are %d mapped devices: more are not taken: %w", mappedMax, syscall.ENOSPC)
	}
	switch {
	case minor < 0:
		for minor = 0; p.minors[uint32(minor)] != nil; minor++ {
		}
	case minor >= 1<<20:
		return fmt.Errorf("minor number %d is out of range: %w", minor, syscall.EINVAL)
	case p.minors[uint32(minor)] != nil:
		return fmt.Errorf("minor number %d is taken: %w", minor, syscall.EBUSY)
	}
	m.minor = uint32(minor)
	p.devices[m.name], p.minors[m.minor] = m, m
	return nil
}

// byUUIDLocked finds a device by its UUID.
//
// +checklocks:p.mu
func (p *Mapper) byUUIDLocked(uuid string) *Mapped {
	for _, m := range p.devices {
		if m.uuid == uuid {
			return m
		}
	}
	return nil
}

// noDevice is what a name that nobody has comes to.
func noDevice(name string) error {
	return fmt.Errorf("there is no mapped device %q: %w", name, syscall.ENXIO)
}

// find finds a device by its name.
func (p *Mapper) find(name string) (*Mapped, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if m := p.devices[name]; m != nil && !m.removing {
		return m, nil
	}
	return nil, noDevice(name)
}

// Lookup is the name of the device with a UUID or, if that is empty, a minor number.
func (p *Mapper) Lookup(uuid string, minor uint32) (string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.minors[minor]
	if uuid != "" {
		m = p.byUUIDLocked(uuid)
	}
	if m == nil || m.removing {
		return "", fmt.Errorf("there is no such mapped device: %w", syscall.ENXIO)
	}
	return m.name, nil
}

// Names are the names of all devices, in order.
func (p *Mapper) Names() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var names []string
	for name, m := range p.devices {
		if !m.removing {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// lock finds a device and takes its verbs, to be given back by m.unlock.
func (p *Mapper) lock(ctx context.Context, name string) (*Mapped, error) {
	for {
		m, err := p.find(name)
		if err != nil {
			return nil, err
		}
		select {
		case <-m.verb:
		case <-ctx.Done():
			return nil, fmt.Errorf("another operation on %q is running: %w", name, ctx.Err())
		}
		if again, err := p.find(name); err == nil && again == m {
			return m, nil
		}
		m.unlock() // it was removed, or renamed, meanwhile
	}
}

// mappedFor is the device that an argument of a table names: by its name, with or without the kernel's directory, or
// by its numbers. nil: none.
//
// +checklocks:p.mu
func (p *Mapper) mappedForLocked(arg string) *Mapped {
	m := p.devices[strings.TrimPrefix(arg, "/dev/mapper/")]
	if number, ok := strings.CutPrefix(arg, strconv.Itoa(Major)+":"); ok {
		if minor, err := strconv.ParseUint(number, 10, 32); err == nil {
			m = p.minors[uint32(minor)]
		}
	}
	if m == nil || m.removing {
		return nil
	}
	return m
}

// openLower opens what an argument of a table of m names.
func (p *Mapper) openLower(m *Mapped, arg string, write bool) (lower, error) {
	p.mu.Lock()
	if below := p.mappedForLocked(arg); below != nil {
		defer p.mu.Unlock()
		return p.stackLocked(m, below, arg)
	}
	p.mu.Unlock()
	opened, err := p.host.Open(arg, write, fmt.Sprintf("mapped device %q", m.Name()))
	if err != nil {
		return lower{}, err
	}
	return lower{arg: arg, lower: opened}, nil
}

// stackLocked lets a table of m lie on the device below. ELOOP: that lies on m, directly or not.
//
// +checklocks:p.mu
func (p *Mapper) stackLocked(m, below *Mapped, arg string) (lower, error) {
	if below.liesOnLocked(m) {
		return lower{}, fmt.Errorf("%q would lie on itself: %w", m.name, syscall.ELOOP)
	}
	below.uppers++
	m.below[below]++
	return lower{arg: arg, mapped: below, lower: Lower{
		Lower: target.Lower{Device: below.device, Name: below.device},
		Major: Major, Minor: below.minor,
		Close: func() error { p.unstack(m, below); return nil },
	}}, nil
}

// unstack undoes stackLocked.
func (p *Mapper) unstack(m, below *Mapped) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if m.below[below]--; m.below[below] == 0 {
		delete(m.below, below)
	}
	below.uppers--
	p.checkDeferredLocked(below)
}

// checkDeferredLocked removes a device whose removal waited for its last user, if it has none any more.
//
// +checklocks:p.mu
func (p *Mapper) checkDeferredLocked(m *Mapped) {
	if m.deferred && !m.removing && m.openCountLocked() == 0 {
		name := m.name
		p.tasks.Go(func() { _ = p.Remove(context.Background(), name, false) }) // somebody may have been quicker
	}
}

// Handle is somebody's use of a device, which keeps it from being removed.
type Handle struct {
	m    *Mapped
	user string
}

// Open counts user in, who is named to those that want the device removed.
func (p *Mapper) Open(name, user string) (*Handle, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	m := p.devices[name]
	if m == nil || m.removing {
		return nil, noDevice(name)
	}
	h := &Handle{m, user}
	m.users = append(m.users, h)
	return h, nil
}

// Device is the device, until Close.
func (h *Handle) Device() *Device { return h.m.device }

// Close counts the user off. It is called once.
func (h *Handle) Close() {
	p := h.m.mapper
	p.mu.Lock()
	defer p.mu.Unlock()
	h.m.users = slices.DeleteFunc(h.m.users, func(x *Handle) bool { return x == h })
	p.checkDeferredLocked(h.m)
}

// Remove removes a device: requests in flight are waited for, later ones fail. EBUSY: it has users, or others lie on it;
// deferred has it removed as soon as that is over.
func (p *Mapper) Remove(ctx context.Context, name string, deferred bool) error {
	m, err := p.lock(ctx, name)
	if err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	defer m.unlock()
	if done, err := p.beginRemoval(m, deferred); done || err != nil {
		return err
	}
	err = m.end(ctx)
	p.mu.Lock()
	defer p.mu.Unlock()
	if m.removing = m.isOver(); m.removing {
		delete(p.devices, m.name)
		delete(p.minors, m.minor)
		p.host.Unclaim(m.name)
	}
	if err != nil {
		return fmt.Errorf("remove %q: %w", name, err)
	}
	return nil
}

// usersShown is how many users a message names.
const usersShown = 5

// whoLocked names the users of a device.
//
// +checklocks:p.mu
func (p *Mapper) whoLocked(m *Mapped) string {
	var who []string
	for _, h := range m.users[:min(len(m.users), usersShown)] {
		who = append(who, h.user)
	}
	for _, x := range p.devices {
		if x.below[m] > 0 && len(who) < usersShown {
			who = append(who, fmt.Sprintf("mapped device %q", x.name))
		}
	}
	if more := len(m.users) - usersShown; more > 0 {
		who = append(who, fmt.Sprintf("%d more", more))
	}
	return strings.Join(who, ", ")
}

// beginRemoval keeps others from using m. done: the rest follows later.
func (p *Mapper) beginRemoval(m *Mapped, deferred bool) (done bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if m.openCountLocked() > 0 {
		if deferred {
			m.deferred = true
			return true, nil
		}
		return false, fmt.Errorf("remove %q: it is in use by %s: %w", m.name, p.whoLocked(m), syscall.EBUSY)
	}
	m.removing = true
	return false, nil
}

// RemoveAll removes what can be removed, and with deferred the rest later.
func (p *Mapper) RemoveAll(ctx context.Context, deferred bool) error {
	var failed []error
	for removed := true; removed && ctx.Err() == nil; {
		removed, failed = false, nil
		for _, name := range p.Names() {
			switch err := p.Remove(ctx, name, deferred); {
			case err == nil:
				removed = removed || !p.isThere(name)
			case !errors.Is(err, syscall.EBUSY) && !errors.Is(err, syscall.ENXIO):
				failed = append(failed, err)
			}
		}
	}
	return errors.Join(append(failed, ctx.Err())...)
}

func (p *Mapper) isThere(name string) bool {
	_, err := p.find(name)
	return err == nil
}

// Refuse fails requests that wait in suspended devices, and lets none wait any more: so that those who wait for their
// answers can end.
func (p *Mapper) Refuse() {
	p.mu.Lock()
	devices := slices.Collect(maps.Values(p.devices))
	p.mu.Unlock()
	for _, m := range devices {
		m.device.Refuse()
	}
}

// Close removes all devices that nobody uses, and waits for what was deferred.
func (p *Mapper) Close(ctx context.Context) error {
	err := p.RemoveAll(ctx, false)
	p.tasks.Wait()
	if left := p.Names(); len(left) > 0 {
		err = errors.Join(err, fmt.Errorf("mapped devices are still in use: %s", strings.Join(left, ", ")))
	}
	return err
}

// Rename gives a device another name. ENXIO: there is no such device; EBUSY: the name is taken.
func (p *Mapper) Rename(ctx context.Context, name, to string) error {
	if err := checkName(to, nameMax); err != nil {
		return fmt.Errorf("rename %q: new name %w", name, err)
	}
	m, err := p.lock(ctx, name)
	if err != nil {
		return fmt.Errorf("rename: %w", err)
	}
	defer m.unlock()
	if err := p.host.Claim(to); err != nil {
		return fmt.Errorf("rename %q: %w", name, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.devices[to] != nil {
		p.host.Unclaim(to)
		return fmt.Errorf("rename %q: there is a mapped device %q: %w", name, to, syscall.EBUSY)
	}
	delete(p.devices, name)
	p.devices[to], m.name = m, to
	m.device.rename(to)
	m.event()
	p.host.Unclaim(name)
	return nil
}

// SetUUID gives a device a UUID that has none yet.
func (p *Mapper) SetUUID(ctx context.Context, name, uuid string) error {
	m, err := p.lock(ctx, name)
	if err != nil {
		return fmt.Errorf("rename: %w", err)
	}
	defer m.unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case uuid == "" || len(uuid) > uuidMax:
		return fmt.Errorf("rename %q: a UUID of 1 to %d bytes is wanted: %w", name, uuidMax, syscall.EINVAL)
	case m.uuid != "":
		return fmt.Errorf("rename %q: its UUID is %q already: %w", name, m.uuid, syscall.EINVAL)
	case p.byUUIDLocked(uuid) != nil:
		return fmt.Errorf("rename %q: there is a mapped device of the UUID %q: %w", name, uuid, syscall.EBUSY)
	}
	m.uuid = uuid
	m.event()
	return nil
}
