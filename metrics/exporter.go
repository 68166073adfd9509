package metrics

import (
	"maps"
	"net/http"
	"slices"
	"time"
)

// scrapesMax bounds the scrapes that run at the same time; one more is refused.
const scrapesMax = 4

// Sample is what an exporter shows: plain values, all of one moment as nearly as their owners can tell.
type Sample struct {
	Version, Engine string
	Events          uint64 // that have happened since the start
	Devices         []DeviceSample
	Snapshots       []SnapshotSample
	Clones          []CloneSample
	Remotes         []RemoteSample
	Engines         []EngineSample
	Throttles       []ThrottleSample
	Yields          uint64
}

// DeviceSample is a live device or a snapshot, as it is exported.
type DeviceSample struct {
	Name, Kind, State string
	Size              int64 // bytes
	Connections       uint64
	Open              int // connections
	InFlight          int64
	Commands          map[string]CommandSample // by name
}

// CommandSample counts one kind of command.
type CommandSample struct{ Requests, Bytes, Errors uint64 }

// SnapshotSample is what a snapshot has beside other devices.
type SnapshotSample struct {
	Name, Origin              string
	Valid                     bool
	Chunk                     int64 // bytes
	Used, Limit, Metadata     int64 // bytes of its store
	Copied, Overwritten       uint64
	Pending, Stalled          int
	Table                     int64 // bytes of memory
	Merging                   bool
	ChunksMerged, ChunksTotal uint64
}

// CloneSample is what a clone has beside other devices.
type CloneSample struct {
	Name                                 string
	Writable, SourceInUse                bool
	Region                               int64 // bytes
	Regions, Hydrated, Hydrating, Failed uint64
	Commits                              uint64
	Table                                int64 // bytes of memory
}

// RemoteSample is an NBD export that a device reads from.
type RemoteSample struct {
	Device       string
	Wanted, Open int // connections
	InFlight     int
	Reconnects   uint64
}

// EngineSample is the copy engine of a device.
type EngineSample struct {
	Device                                          string
	Jobs, BytesRead, BytesWritten, Errors           uint64
	InFlight, Waiting, BuffersInUse, BuffersCeiling int64
	BufferWaits                                     uint64
	Methods                                         []MethodSample
	Fallbacks                                       map[string]uint64 // by reason
}

// MethodSample is what an engine copied by one method for one class of jobs.
type MethodSample struct {
	Class, Method             string
	Operations, Bytes, Errors uint64
	Latency                   *Snapshot
}

// ThrottleSample is one class's limits.
type ThrottleSample struct {
	Class   string
	Rate    int64   // bytes a second; 0: no limit
	Share   float64 // from 0 to 1; 1: no limit
	Waiting int
	Waits   uint64
}

// known are all metrics of cowherd's own; docs/metrics.md lists them for people, and a test compares.
var known = []metric{
	{"cowherd_build_info", "1, with the program's version and the kind of copy engine.", gauge, []string{"version", "engine"}},
	{"cowherd_events_total", "Events that have happened, as cowherd events shows them.", counter, nil},

	{"cowherd_device_info", "1 for each live device and snapshot, with its kind and state.", gauge, []string{"device", "kind", "state"}},
	{"cowherd_device_size_bytes", "Length of the device.", gauge, []string{"device"}},
	{"cowherd_export_connections", "NBD connections that are open.", gauge, []string{"device"}},
	{"cowherd_export_connections_total", "NBD connections that were made.", counter, []string{"device"}},
	{"cowherd_export_in_flight_requests", "Requests of clients that the device works on.", gauge, []string{"device"}},
	{"cowherd_export_requests_total", "Requests of clients.", counter, []string{"device", "command"}},
	{"cowherd_export_bytes_total", "Sum of the lengths that clients asked for.", counter, []string{"device", "command"}},
	{"cowherd_export_errors_total", "Requests of clients that failed.", counter, []string{"device", "command"}},

	{"cowherd_snapshot_valid", "1 while the snapshot shows the frozen view, else 0.", gauge, []string{"device", "origin"}},
	{"cowherd_snapshot_chunk_bytes", "Unit of copy on write.", gauge, []string{"device"}},
	{"cowherd_snapshot_store_used_bytes", "COW space that is taken.", gauge, []string{"device"}},
	{"cowherd_snapshot_store_size_bytes", "COW space that may be taken.", gauge, []string{"device"}},
	{"cowherd_snapshot_store_metadata_bytes", "COW space that holds metadata.", gauge, []string{"device"}},
	{"cowherd_snapshot_copied_chunks_total", "Chunks copied from the origin.", counter, []string{"device"}},
	{"cowherd_snapshot_overwritten_chunks_total", "Chunks filled by writes to the snapshot, without a copy.", counter, []string{"device"}},
	{"cowherd_snapshot_pending_exceptions", "Chunks that are being copied.", gauge, []string{"device"}},
	{"cowherd_snapshot_stalled_requests", "Requests that wait for COW space.", gauge, []string{"device"}},
	{"cowherd_snapshot_table_bytes", "Memory of the exception table.", gauge, []string{"device"}},
	{"cowherd_snapshot_merge_chunks", "Chunks that the merge that runs has to do in all.", gauge, []string{"device"}},
	{"cowherd_snapshot_merged_chunks", "Chunks that the merge that runs has done.", gauge, []string{"device"}},

	{"cowherd_clone_writable", "1 while the clone's metadata can be written, else 0.", gauge, []string{"device"}},
	{"cowherd_clone_source_in_use", "1 while regions are left that only the source has, else 0.", gauge, []string{"device"}},
	{"cowherd_clone_region_bytes", "Unit of hydration.", gauge, []string{"device"}},
	{"cowherd_clone_regions", "Regions of the clone.", gauge, []string{"device"}},
	{"cowherd_clone_hydrated_regions", "Regions that the destination has.", gauge, []string{"device"}},
	{"cowherd_clone_hydrating_regions", "Regions that are being copied in the background.", gauge, []string{"device"}},
	{"cowherd_clone_failed_regions", "Regions that were given up in the background.", gauge, []string{"device"}},
	{"cowherd_clone_commits_total", "Commits of the clone's metadata.", counter, []string{"device"}},
	{"cowherd_clone_table_bytes", "Memory of the regions' state.", gauge, []string{"device"}},

	{"cowherd_remote_connections_wanted", "NBD connections that a clone wants to its source.", gauge, []string{"device"}},
	{"cowherd_remote_connections", "NBD connections that a clone has to its source.", gauge, []string{"device"}},
	{"cowherd_remote_in_flight_requests", "Requests that the server of a clone's source works on, or is to.", gauge, []string{"device"}},
	{"cowherd_remote_reconnects_total", "NBD connections to a clone's source that were made in place of lost ones.", counter, []string{"device"}},

	{"cowherd_copy_jobs_total", "Copies that have ended.", counter, []string{"device"}},
	{"cowherd_copy_job_errors_total", "Copies that have ended with an error.", counter, []string{"device"}},
	{"cowherd_copy_jobs_in_flight", "Copies that run.", gauge, []string{"device"}},
	{"cowherd_copy_read_bytes_total", "Bytes read from sources of copies.", counter, []string{"device"}},
	{"cowherd_copy_written_bytes_total", "Bytes written to destinations of copies.", counter, []string{"device"}},
	{"cowherd_copy_buffer_bytes", "Memory of copy buffers in use.", gauge, []string{"device"}},
	{"cowherd_copy_buffer_limit_bytes", "Memory that copy buffers may take.", gauge, []string{"device"}},
	{"cowherd_copy_buffer_waiting", "Pieces of copies that wait for a buffer.", gauge, []string{"device"}},
	{"cowherd_copy_buffer_waits_total", "Pieces of copies that had to wait for a buffer.", counter, []string{"device"}},
	{"cowherd_copy_operations_total", "Pieces copied, by class of copies and method.", counter, []string{"device", "class", "method"}},
	{"cowherd_copy_bytes_total", "Bytes copied, by class of copies and method.", counter, []string{"device", "class", "method"}},
	{"cowherd_copy_errors_total", "Pieces that could not be copied, by class of copies and method.", counter, []string{"device", "class", "method"}},
	{"cowherd_copy_duration_seconds", "Time that a piece took. Of small pieces one in 64 is timed and stands for 64.", histogram, []string{"device", "class", "method"}},
	{"cowherd_copy_fallbacks_total", "Pieces read and written that might have been offloaded, by reason.", counter, []string{"device", "reason"}},

	{"cowherd_throttle_rate_bytes_per_second", "Limit of a class of copies; 0: none.", gauge, []string{"class"}},
	{"cowherd_throttle_share_ratio", "Share of time in which a class may copy; 1: all.", gauge, []string{"class"}},
	{"cowherd_throttle_waiting", "Pieces of copies that wait for the limit of their class.", gauge, []string{"class"}},
	{"cowherd_throttle_waits_total", "Pieces of copies that had to wait for the limit of their class.", counter, []string{"class"}},
	{"cowherd_throttle_yields_total", "Pieces in the background that had to wait because clients were busy.", counter, nil},
}

// NewHandler answers scrapes in Prometheus's text format. source is called for each, by several goroutines at once
// possibly, and gives up its Sample. What Go's runtime and the process tell is added.
func NewHandler(source func() *Sample) http.Handler {
	slots := make(chan struct{}, scrapesMax)
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
		default:
			http.Error(w, "too many scrapes at the same time", http.StatusServiceUnavailable)
			return
		}
		p := newPage(known, ofRuntime, ofProcess)
		collect(p, source())
		collectRuntime(p)
		collectProcess(p)
		w.Header().Set("Content-Type", textType)
		p.writeTo(w)
	})
}

// collect puts all that a sample says on a page.
func collect(p *page, s *Sample) {
	put := p.put
	put("cowherd_build_info", 1, s.Version, s.Engine)
	put("cowherd_events_total", float64(s.Events))
	for i := range s.Devices {
		putDevice(put, &s.Devices[i])
	}
	for i := range s.Snapshots {
		putSnapshot(put, &s.Snapshots[i])
	}
	for i := range s.Clones {
		putClone(put, &s.Clones[i])
	}
	for _, r := range s.Remotes {
		put("cowherd_remote_connections_wanted", float64(r.Wanted), r.Device)
		put("cowherd_remote_connections", float64(r.Open), r.Device)
		put("cowherd_remote_in_flight_requests", float64(r.InFlight), r.Device)
		put("cowherd_remote_reconnects_total", float64(r.Reconnects), r.Device)
	}
	for i := range s.Engines {
		putEngine(put, &s.Engines[i])
		putDurations(p, &s.Engines[i])
	}
	for _, t := range s.Throttles {
		put("cowherd_throttle_rate_bytes_per_second", float64(t.Rate), t.Class)
		put("cowherd_throttle_share_ratio", t.Share, t.Class)
		put("cowherd_throttle_waiting", float64(t.Waiting), t.Class)
		put("cowherd_throttle_waits_total", float64(t.Waits), t.Class)
	}
	put("cowherd_throttle_yields_total", float64(s.Yields))
}

func putDevice(put func(string, float64, ...string), d *DeviceSample) {
	put("cowherd_device_info", 1, d.Name, d.Kind, d.State)
	put("cowherd_device_size_bytes", float64(d.Size), d.Name)
	put("cowherd_export_connections", float64(d.Open), d.Name)
	put("cowherd_export_connections_total", float64(d.Connections), d.Name)
	put("cowherd_export_in_flight_requests", float64(d.InFlight), d.Name)
	for _, command := range slices.Sorted(maps.Keys(d.Commands)) {
		n := d.Commands[command]
		put("cowherd_export_requests_total", float64(n.Requests), d.Name, command)
		put("cowherd_export_bytes_total", float64(n.Bytes), d.Name, command)
		put("cowherd_export_errors_total", float64(n.Errors), d.Name, command)
	}
}

func putSnapshot(put func(string, float64, ...string), s *SnapshotSample) {
	put("cowherd_snapshot_valid", truth(s.Valid), s.Name, s.Origin)
	put("cowherd_snapshot_chunk_bytes", float64(s.Chunk), s.Name)
	put("cowherd_snapshot_store_used_bytes", float64(s.Used), s.Name)
	put("cowherd_snapshot_store_size_bytes", float64(s.Limit), s.Name)
	put("cowherd_snapshot_store_metadata_bytes", float64(s.Metadata), s.Name)
	put("cowherd_snapshot_copied_chunks_total", float64(s.Copied), s.Name)
	put("cowherd_snapshot_overwritten_chunks_total", float64(s.Overwritten), s.Name)
	put("cowherd_snapshot_pending_exceptions", float64(s.Pending), s.Name)
	put("cowherd_snapshot_stalled_requests", float64(s.Stalled), s.Name)
	put("cowherd_snapshot_table_bytes", float64(s.Table), s.Name)
	if s.Merging {
		put("cowherd_snapshot_merge_chunks", float64(s.ChunksTotal), s.Name)
		put("cowherd_snapshot_merged_chunks", float64(s.ChunksMerged), s.Name)
	}
}

func putClone(put func(string, float64, ...string), c *CloneSample) {
	put("cowherd_clone_writable", truth(c.Writable), c.Name)
	put("cowherd_clone_source_in_use", truth(c.SourceInUse), c.Name)
	put("cowherd_clone_region_bytes", float64(c.Region), c.Name)
	put("cowherd_clone_regions", float64(c.Regions), c.Name)
	put("cowherd_clone_hydrated_regions", float64(c.Hydrated), c.Name)
	put("cowherd_clone_hydrating_regions", float64(c.Hydrating), c.Name)
	put("cowherd_clone_failed_regions", float64(c.Failed), c.Name)
	put("cowherd_clone_commits_total", float64(c.Commits), c.Name)
	put("cowherd_clone_table_bytes", float64(c.Table), c.Name)
}

// truth is how a metric shows a condition.
func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func putEngine(put func(string, float64, ...string), x *EngineSample) {
	put("cowherd_copy_jobs_total", float64(x.Jobs), x.Device)
	put("cowherd_copy_job_errors_total", float64(x.Errors), x.Device)
	put("cowherd_copy_jobs_in_flight", float64(x.InFlight), x.Device)
	put("cowherd_copy_read_bytes_total", float64(x.BytesRead), x.Device)
	put("cowherd_copy_written_bytes_total", float64(x.BytesWritten), x.Device)
	put("cowherd_copy_buffer_bytes", float64(x.BuffersInUse), x.Device)
	put("cowherd_copy_buffer_limit_bytes", float64(x.BuffersCeiling), x.Device)
	put("cowherd_copy_buffer_waiting", float64(x.Waiting), x.Device)
	put("cowherd_copy_buffer_waits_total", float64(x.BufferWaits), x.Device)
	for _, m := range x.Methods {
		put("cowherd_copy_operations_total", float64(m.Operations), x.Device, m.Class, m.Method)
		put("cowherd_copy_bytes_total", float64(m.Bytes), x.Device, m.Class, m.Method)
		put("cowherd_copy_errors_total", float64(m.Errors), x.Device, m.Class, m.Method)
	}
	for _, reason := range slices.Sorted(maps.Keys(x.Fallbacks)) {
		put("cowherd_copy_fallbacks_total", float64(x.Fallbacks[reason]), x.Device, reason)
	}
}

// putDurations puts the histograms of an engine on a page.
func putDurations(p *page, x *EngineSample) {
	for _, m := range x.Methods {
		if m.Latency != nil {
			p.putHistogram("cowherd_copy_duration_seconds", bounds(m.Latency), m.Latency.Count, m.Latency.Sum.Seconds(),
				x.Device, m.Class, m.Method)
		}
	}
}

// bounds are the buckets that Prometheus gets: how many took at most 1 us, 4 us and so on up to 17 s, in powers of two
// of nanoseconds, so that each is the end of a bucket of ours.
func bounds(s *Snapshot) []bound {
	var list []bound
	sum, next := uint64(0), time.Duration(1<<10)
	for i, n := range s.Buckets {
		sum += n
		if BucketEnd(i) == next {
			list = append(list, bound{next.Seconds(), sum})
			next <<= 2
		}
	}
	return list
}
