package service

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"cowherd/api"
	"cowherd/target/snapshot"
)

// Devices describes all that is live or lost: each origin before its snapshots, by name.
func (d *Daemon) Devices() []api.Device {
	devices := []api.Device{}
	for _, o := range d.names.all() {
		if !o.isListed() {
			continue
		}
		devices = append(devices, d.describeOrigin(o))
		for _, s := range o.allSnaps() {
			devices = append(devices, d.describeSnap(s))
		}
	}
	devices = append(devices, d.lost()...)
	slices.SortFunc(devices, func(a, b api.Device) int { return compareNames(a.Name, b.Name) })
	return devices
}

// compareNames orders names so that each origin comes right before its snapshots.
func compareNames(a, b string) int {
	aOrigin, aSnapshot, _ := strings.Cut(a, "@")
	bOrigin, bSnapshot, _ := strings.Cut(b, "@")
	return cmp.Or(strings.Compare(aOrigin, bOrigin), strings.Compare(aSnapshot, bSnapshot))
}

// Device describes one origin or snapshot.
func (d *Daemon) Device(name string) (api.Device, error) {
	origin, _, isSnapshot := strings.Cut(name, "@")
	if o, err := d.names.origin(origin); err == nil && o.isListed() {
		if !isSnapshot {
			return d.describeOrigin(o), nil
		}
		if s := o.snap(name); s != nil {
			return d.describeSnap(s), nil
		}
	}
	for _, x := range d.lost() {
		if x.Name == name {
			return x, nil
		}
	}
	return api.Device{}, noDevice(name)
}

// lost describes what is remembered but not there.
func (d *Daemon) lost() []api.Device {
	var devices []api.Device
	add := func(kind, name, cause string, since time.Time) *api.Device {
		devices = append(devices, api.Device{
			Name: name, Kind: kind, State: api.StateLost, Lost: cause, Since: since, Users: []api.User{},
		})
		return &devices[len(devices)-1]
	}
	for _, saved := range d.saved.now().Devices {
		_, err := d.names.origin(saved.Request.Name)
		away := err != nil && saved.Lost != ""
		if away {
			x := add(api.KindOrigin, saved.Request.Name, saved.Lost, saved.Since)
			x.Device, x.Direct, x.ReadOnly = saved.Request.Device, saved.Request.Direct, saved.Request.ReadOnly
		}
		for _, s := range saved.Snapshots {
			cause := s.Lost
			if away && cause == "" {
				cause = "its origin is lost"
			}
			if cause != "" {
				x := add(api.KindSnapshot, s.Request.Name, cause, s.Since)
				x.Snapshot = &api.Snapshot{
					Origin: saved.Request.Name, Store: s.Request.Store, Persistent: s.Request.Persistent, OnFull: s.Request.OnFull,
					ChunkBytes: s.Request.ChunkBytes,
				}
			}
		}
	}
	return devices
}

// Version tells who the daemon is.
func (d *Daemon) Version() api.Version {
	return api.Version{
		Version:   d.config.Version,
		PID:       os.Getpid(),
		StateDir:  d.state.path,
		Engine:    d.config.Engine,
		Started:   d.started,
		NBD:       d.exports.addresses(),
		LastEvent: d.bus.newest(),
	}
}

// describe is what origins and snapshots have in common.
func (d *Daemon) describe(e *entry) api.Device {
	limits := e.device.Limits()
	return api.Device{
		Name:              e.name,
		SizeBytes:         e.device.Size(),
		LogicalBlockBytes: limits.LogicalBlock,
		ReadOnly:          limits.ReadOnly,
		Since:             e.since,
		Users:             d.exports.users(e.name),
		URIs:              d.exports.uris(e.name),
	}
}

func (d *Daemon) describeOrigin(o *origin) api.Device {
	x := d.describe(&o.entry)
	x.Kind, x.State = api.KindOrigin, api.StateLive
	x.Device, x.Direct = o.request.Device, o.request.Direct
	x.Target, x.TargetTable = "snapshot-origin", o.request.Device
	if s := o.merging(); s != nil {
		if m := s.merge.Load(); m != nil {
			x.Target, x.TargetStatus, x.TargetTable = "snapshot-merge", m.Status(), s.tableLine()
		}
	}
	if o.cloned != nil {
		d.describeClone(o, &x)
	}
	for _, s := range o.allSnaps() {
		x.Snapshots = append(x.Snapshots, s.name)
	}
	return x
}

func (d *Daemon) describeSnap(s *snap) api.Device {
	x := d.describe(&s.entry)
	x.Kind, x.State = api.KindSnapshot, api.StateValid
	status := s.target.Status()
	m := s.merge.Load()
	x.Target, x.TargetStatus, x.TargetTable = "snapshot", status.String(), s.tableLine()
	switch {
	case s.merged.Load():
		x.State, x.Target, x.TargetStatus, x.TargetTable = api.StateMerged, "snapshot-origin", "", s.origin.request.Device
	case m != nil:
		x.State, x.Target, x.TargetStatus = api.StateMerging, "snapshot-merge", m.Status()
	case status.Invalid != nil:
		x.State = api.StateInvalid
	case status.Overflowed:
		x.State = api.StateOverflow
	}
	x.Snapshot = &api.Snapshot{
		Origin:                s.origin.name,
		Store:                 s.request.Store,
		Persistent:            status.Persistent,
		OnFull:                s.request.OnFull,
		ChunkBytes:            int64(status.ChunkSize),
		AllocatedBytes:        status.Allocated.Bytes(),
		TotalBytes:            status.Total.Bytes(),
		MetadataBytes:         status.Metadata.Bytes(),
		Invalid:               causeOf(status.Invalid),
		Overflowed:            status.Overflowed,
		StalledRequests:       status.Stalled,
		CopiedChunks:          status.Copied,
		OverwrittenChunks:     status.Overwritten,
		PendingExceptions:     status.Pending,
		TableBytes:            status.TableBytes,
		DiscardZeroesCOW:      s.request.DiscardZeroesCOW,
		DiscardPassdownOrigin: s.request.DiscardPassdownOrigin,
		Merge:                 describeMerge(m),
		Kcopyd:                d.describeEngine(s.engine),
	}
	return x
}

// tableLine is what the table of a snapshot shows behind the type.
func (s *snap) tableLine() string {
	return fmt.Sprintf("%s %s %s", s.origin.request.Device, s.request.Store, s.target.Table())
}

// describeMerge tells how far a merge is; nil: there is none.
func describeMerge(m *snapshot.Merge) *api.Merge {
	if m == nil {
		return nil
	}
	merged, total := m.Progress()
	return &api.Merge{Running: m.Running(), MergedChunks: merged, TotalChunks: total, Failed: causeOf(m.Err())}
}
