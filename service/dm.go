package service

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"syscall"

	"cowherd/api"
	"cowherd/block"
	"cowherd/dm"
	"cowherd/kcopyd"
	"cowherd/target"
	"cowherd/target/clone"
	"cowherd/target/delay"
	"cowherd/target/errortarget"
	"cowherd/target/flakey"
	"cowherd/target/linear"
	"cowherd/target/logwrites"
	"cowherd/target/snapshot"
	"cowherd/target/striped"
	"cowherd/target/zero"
)

// targetTypes are the types of targets that tables may name. This is the place to add one.
func targetTypes(newEngine func() kcopyd.Engine) []*target.Type {
	return append([]*target.Type{
		clone.NewTables(newEngine).Type(), delay.Type(), errortarget.Type(), flakey.Type(), linear.Type(), logwrites.Type(),
		striped.Type(), zero.Type(),
	}, snapshot.NewFamily(newEngine).Types()...)
}

// managedMinorFirst is the first minor number of what was attached and of snapshots; those of mapped devices count
// from 0.
const managedMinorFirst = 1 << 20

// entryOf is the attached device or the snapshot of a name that clients may open.
func (d *Daemon) entryOf(name string) (*entry, error) {
	origin, _, isSnapshot := strings.Cut(name, "@")
	o, err := d.names.origin(origin)
	if err != nil {
		return nil, noDevice(name)
	}
	if !isSnapshot {
		return &o.entry, nil
	}
	if s := o.snap(name); s != nil {
		return &s.entry, nil
	}
	return nil, noDevice(name)
}

// managedMinor is the minor number of what was attached or is a snapshot.
func (d *Daemon) managedMinor(name string) uint32 {
	d.names.mu.Lock()
	defer d.names.mu.Unlock()
	if d.names.minors[name] == 0 {
		d.names.lastMinor++
		d.names.minors[name] = managedMinorFirst + d.names.lastMinor - 1
	}
	return d.names.minors[name]
}

// managed refuses what is for mapped devices only, if name is that of something else.
func (d *Daemon) managed(verb, name string) error {
	if e, err := d.entryOf(name); err == nil && e.isListed() {
		return api.Errorf(syscall.EBUSY, "%s %q: its table belongs to what has made it: only suspend and resume are for it",
			verb, name)
	}
	return nil
}

// MappedDevices describes all devices that have a table, by name.
func (d *Daemon) MappedDevices() []api.DMDevice {
	devices := []api.DMDevice{}
	for _, name := range d.mapper.Names() {
		if info, err := d.mapper.Info(name); err == nil {
			x := describeMapped(&info)
			x.URIs = d.exports.uris(name)
			devices = append(devices, x)
		}
	}
	for _, x := range d.Devices() {
		if e, err := d.entryOf(x.Name); err == nil && x.State != api.StateLost {
			devices = append(devices, d.describeManaged(e, &x))
		}
	}
	slices.SortFunc(devices, func(a, b api.DMDevice) int { return strings.Compare(a.Name, b.Name) })
	d.forgetMinors(devices)
	return devices
}

// forgetMinors forgets the minor numbers of what is not there any more.
func (d *Daemon) forgetMinors(devices []api.DMDevice) {
	there := map[string]bool{}
	for i := range devices {
		there[devices[i].Name] = true
		for _, dep := range devices[i].Dependencies {
			there[dep.Name] = true
		}
	}
	d.names.mu.Lock()
	defer d.names.mu.Unlock()
	maps.DeleteFunc(d.names.minors, func(name string, _ uint32) bool { return !there[name] })
}

// describeMapped describes a mapped device.
func describeMapped(info *dm.Info) api.DMDevice {
	x := api.DMDevice{
		Name: info.Name, UUID: info.UUID, Major: dm.Major, Minor: info.Minor, SizeBytes: info.SizeBytes,
		Suspended: info.Suspended, ReadOnly: info.ReadOnly, Live: info.Live, Inactive: info.Inactive, Deferred: info.Deferred,
		Open: info.Open, Event: info.Events,
		Table:         describeTable(info.LiveTable, info.LiveState),
		InactiveTable: describeTable(info.NextTable, info.NextState),
		Dependencies:  []api.DMDep{},
	}
	for _, dep := range info.Deps {
		x.Dependencies = append(x.Dependencies, api.DMDep(dep))
	}
	return x
}

// describeTable puts a table and its state together.
func describeTable(table, state []dm.Report) []api.DMTarget {
	targets := make([]api.DMTarget, len(table))
	for i, line := range table {
		targets[i] = api.DMTarget{
			Start: uint64(line.Start), Length: uint64(line.Length), Type: line.Type, Table: line.Args, Status: state[i].Args,
		}
	}
	return targets
}

// describeManaged describes an attached device or a snapshot as a mapped device.
func (d *Daemon) describeManaged(e *entry, x *api.Device) api.DMDevice {
	y := api.DMDevice{
		Name: x.Name, Major: dm.Major, Minor: d.managedMinor(x.Name), SizeBytes: x.SizeBytes,
		Suspended: e.device.Suspended(), ReadOnly: x.ReadOnly, Live: true, Managed: true, Open: e.userCount(),
		InactiveTable: []api.DMTarget{}, Dependencies: []api.DMDep{}, URIs: x.URIs,
	}
	words := strings.Fields(x.TargetTable)
	y.Table = []api.DMTarget{{
		Length: uint64(block.SectorFloor(x.SizeBytes)), Type: x.Target, Table: x.TargetTable, Status: x.TargetStatus,
	}}
	below := 1 // an origin lies on one device, all else on two
	if x.Target != "snapshot-origin" {
		below = 2
	}
	for _, name := range slices.Backward(words[:min(below, len(words))]) {
		y.Dependencies = append(y.Dependencies, api.DMDep{Name: name, Minor: d.managedMinor(name)})
	}
	return y
}

// MappedTypes are the types of targets.
func (d *Daemon) MappedTypes() []api.DMType {
	types := []api.DMType{}
	for _, t := range d.mapper.Types() {
		types = append(types, api.DMType{Name: t.Name, Version: t.Version})
	}
	return types
}

// CreateMapped makes a mapped device without a table.
func (d *Daemon) CreateMapped(r api.DMCreate) error {
	minor := -1
	if r.Minor != nil {
		if minor = *r.Minor; minor < 0 {
			return api.Errorf(syscall.EINVAL, "minor number %d is negative", minor)
		}
	}
	return d.mapper.Create(dm.CreateRequest{Name: r.Name, UUID: r.UUID, Minor: minor})
}

// LoadMapped puts a table in the inactive slot of a mapped device.
func (d *Daemon) LoadMapped(ctx context.Context, name string, r api.DMTable) error {
	if err := d.managed("load", name); err != nil {
		return err
	}
	lines, err := dm.Parse(r.Table)
	if err != nil {
		return fmt.Errorf("load %q: %w", name, err)
	}
	return d.mapper.Load(ctx, name, lines, r.ReadOnly)
}

// ClearMapped empties the inactive slot.
func (d *Daemon) ClearMapped(ctx context.Context, name string) error {
	if err := d.managed("clear", name); err != nil {
		return err
	}
	return d.mapper.Clear(ctx, name)
}

// SuspendMapped suspends or resumes a mapped device, an attached one or a snapshot.
func (d *Daemon) SuspendMapped(ctx context.Context, name string, r api.DMSuspend) error {
	ctx, cancel := context.WithTimeout(ctx, d.config.SuspendTimeout)
	defer cancel()
	if e, err := d.entryOf(name); err == nil && e.isListed() {
		return d.suspendManaged(ctx, e, r)
	}
	if r.Suspended {
		return d.mapper.Suspend(ctx, name, !r.NoFlush)
	}
	return d.mapper.Resume(ctx, name, !r.NoFlush)
}

// suspendManaged suspends or resumes an attached device or a snapshot, between other operations on it.
func (d *Daemon) suspendManaged(ctx context.Context, e *entry, r api.DMSuspend) error {
	origin, _, _ := strings.Cut(e.name, "@")
	o, err := d.lockOrigin(ctx, origin)
	if err != nil {
		return err
	}
	defer o.unlock()
	switch {
	case e.isGone():
		return noDevice(e.name)
	case !r.Suspended:
		e.device.Resume()
		e.paused.Store(false)
		return nil
	case e.device.Suspended():
		return nil
	}
	limits := e.device.Limits()
	flush := !r.NoFlush && limits.NeedsFlush && !limits.ReadOnly
	if flush { // most of it while requests go on
		if err := block.Flush(e.device); err != nil {
			return fmt.Errorf("suspend %q: %w", e.name, err)
		}
	}
	if err := e.device.Suspend(ctx); err != nil {
		return err
	}
	if flush {
		if err := e.device.Flush(ctx); err != nil {
			e.device.Resume()
			return fmt.Errorf("suspend %q: %w", e.name, err)
		}
	}
	e.paused.Store(true)
	return nil
}

// refuseSuspended fails what waits in devices that somebody has suspended, so that those who wait for answers can end.
func (d *Daemon) refuseSuspended() {
	d.mapper.Refuse()
	for _, o := range d.names.all() {
		entries := []*entry{&o.entry}
		for _, s := range o.allSnaps() {
			entries = append(entries, &s.entry)
		}
		for _, e := range entries {
			if e.paused.Load() {
				e.device.Refuse()
			}
		}
	}
}

// RemoveMapped removes a mapped device.
func (d *Daemon) RemoveMapped(ctx context.Context, name string, deferred bool) error {
	if err := d.managed("remove", name); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, d.config.SuspendTimeout)
	defer cancel()
	return d.mapper.Remove(ctx, name, deferred)
}

// RenameMapped gives a mapped device another name, or a UUID.
func (d *Daemon) RenameMapped(ctx context.Context, name string, r api.DMRename) error {
	if err := d.managed("rename", name); err != nil {
		return err
	}
	if r.Name != "" {
		return d.mapper.Rename(ctx, name, r.Name)
	}
	return d.mapper.SetUUID(ctx, name, r.UUID)
}

// MessageMapped hands a message to a target.
func (d *Daemon) MessageMapped(ctx context.Context, name string, r api.DMMessage) (api.DMAnswer, error) {
	if err := d.managed("message", name); err != nil {
		return api.DMAnswer{}, err
	}
	answer, err := d.mapper.Message(ctx, name, block.Sector(r.Sector), r.Words)
	return api.DMAnswer{Answer: answer}, err
}

// WaitMapped waits until the number of events of a mapped device is another than seen.
func (d *Daemon) WaitMapped(ctx context.Context, name string, seen uint32) (api.DMEvent, error) {
	event, err := d.mapper.Wait(ctx, name, seen)
	return api.DMEvent{Event: event}, err
}
