package service

import (
	"os"
	"strings"

	"cowherd/api"
)

// Devices describes all that is live: each origin before its snapshots, by name.
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
	return devices
}

// Device describes one origin or snapshot.
func (d *Daemon) Device(name string) (api.Device, error) {
	origin, _, isSnapshot := strings.Cut(name, "@")
	o, err := d.names.origin(origin)
	if err != nil || !o.isListed() {
		return api.Device{}, noDevice(name)
	}
	if !isSnapshot {
		return d.describeOrigin(o), nil
	}
	if s := o.snap(name); s != nil {
		return d.describeSnap(s), nil
	}
	return api.Device{}, noDevice(name)
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
	for _, s := range o.allSnaps() {
		x.Snapshots = append(x.Snapshots, s.name)
	}
	return x
}

func (d *Daemon) describeSnap(s *snap) api.Device {
	x := d.describe(&s.entry)
	x.Kind, x.State = api.KindSnapshot, api.StateValid
	status, stats := s.target.Status(), s.engine.Stats()
	if status.Invalid != nil {
		x.State = api.StateInvalid
	}
	x.Snapshot = &api.Snapshot{
		Origin:                s.origin.name,
		Store:                 s.request.Store,
		ChunkBytes:            int64(status.ChunkSize),
		AllocatedBytes:        status.Allocated.Bytes(),
		TotalBytes:            status.Total.Bytes(),
		MetadataBytes:         status.Metadata.Bytes(),
		Invalid:               causeOf(status.Invalid),
		CopiedChunks:          status.Copied,
		OverwrittenChunks:     status.Overwritten,
		PendingExceptions:     status.Pending,
		TableBytes:            status.TableBytes,
		DiscardZeroesCOW:      s.request.DiscardZeroesCOW,
		DiscardPassdownOrigin: s.request.DiscardPassdownOrigin,
		Kcopyd: api.Kcopyd{
			Engine:          d.config.Engine,
			Jobs:            stats.Jobs,
			ReadBytes:       stats.BytesRead,
			WrittenBytes:    stats.BytesWritten,
			Errors:          stats.Errors,
			JobsInFlight:    stats.JobsInFlight,
			JobsWaiting:     stats.JobsWaiting,
			BufferWaits:     stats.BufferWaits,
			BuffersBytes:    stats.BuffersInUse,
			BuffersMaxBytes: stats.BufferCeiling,
		},
	}
	return x
}
