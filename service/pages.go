package service

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"cowherd/api"
	"cowherd/export/nbd"
	"cowherd/kcopyd"
	"cowherd/metrics"
	"cowherd/target/clone"
)

// Limits of the HTTP pages.
const (
	pagesConnsMax = 32 // connections; more wait to be accepted
	pagesTime     = 10 * time.Second
)

// index is the first page.
const index = `<!DOCTYPE html>
<html><head><title>cowherd</title></head><body><h1>cowherd</h1>
<ul><li><a href="/metrics">/metrics</a> for Prometheus</li><li><a href="/healthz">/healthz</a></li></ul>
</body></html>
`

// pages serves what may be read by anybody who reaches the address: nothing can be changed there.
type pages struct {
	daemon *Daemon
	server http.Server
	done   sync.WaitGroup
}

func newPages(d *Daemon) *pages {
	p, mux := &pages{daemon: d}, http.NewServeMux()
	mux.Handle("GET /metrics", metrics.NewHandler(d.sample))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { p.text(w, "text/plain", "ok\n") })
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) { p.text(w, "text/html", index) })
	p.server = http.Server{
		Handler: mux, ReadTimeout: pagesTime, WriteTimeout: pagesTime, IdleTimeout: controlIdle, MaxHeaderBytes: headerMax,
	}
	return p
}

// text answers with a page.
func (p *pages) text(w http.ResponseWriter, kind, text string) {
	w.Header().Set("Content-Type", kind+"; charset=utf-8")
	if _, err := io.WriteString(w, text); err != nil {
		p.daemon.log.Debug("page not sent", "error", err)
	}
}

// serve accepts connections of l on a goroutine of its own until shutdown.
func (p *pages) serve(l net.Listener) {
	limited := &limitListener{Listener: l, slots: make(chan struct{}, pagesConnsMax), closed: make(chan struct{})}
	p.done.Go(func() {
		if err := p.server.Serve(limited); !errors.Is(err, http.ErrServerClosed) {
			p.daemon.log.Error("the HTTP address has failed", "address", l.Addr().String(), "error", err)
		}
	})
}

// shutdown lets requests end until ctx does, and closes what is left.
func (p *pages) shutdown(ctx context.Context) error {
	err := p.server.Shutdown(ctx)
	if err != nil {
		err = errors.Join(err, p.server.Close())
	}
	p.done.Wait()
	return err
}

// sample is what the metrics show of the daemon.
func (d *Daemon) sample() *metrics.Sample {
	s := &metrics.Sample{
		Version: d.config.Version, Engine: d.config.Engine, Events: d.bus.newest(), Yields: d.throttle.Yields(),
	}
	totals := d.exports.server.Totals()
	for _, o := range d.names.all() {
		if !o.isListed() {
			continue
		}
		x := d.describeOrigin(o)
		s.Devices = append(s.Devices, sampleDevice(&x, totals))
		if o.cloned != nil {
			s.Clones = append(s.Clones, sampleClone(o.name, o.cloned))
			s.Engines = append(s.Engines, sampleEngine(o.name, o.cloned.engine))
			s.Remotes = append(s.Remotes, sampleRemote(o.name, o.cloned)...)
		}
		for _, snap := range o.allSnaps() {
			x := d.describeSnap(snap)
			s.Devices = append(s.Devices, sampleDevice(&x, totals))
			s.Snapshots = append(s.Snapshots, sampleSnapshot(&x))
			s.Engines = append(s.Engines, sampleEngine(snap.name, snap.engine))
		}
	}
	for _, x := range d.lost() {
		s.Devices = append(s.Devices, sampleDevice(&x, totals))
	}
	d.forgetTotals(totals)
	for _, t := range d.throttle.Stats() {
		share := 1.0
		if t.Limit.Share > 0 {
			share = float64(t.Limit.Share) / 100
		}
		s.Throttles = append(s.Throttles, metrics.ThrottleSample{
			Class: t.Class, Rate: t.Limit.Rate, Share: share, Waiting: t.Waiting, Waits: t.Waits,
		})
	}
	return s
}

// forgetTotals drops what was counted for devices that have gone: their last connection may have ended after they did.
func (d *Daemon) forgetTotals(totals map[string]nbd.ExportTotals) {
	for name := range totals {
		origin, _, isSnapshot := strings.Cut(name, "@")
		o, err := d.names.origin(origin)
		if err != nil || isSnapshot && o.snap(name) == nil {
			d.exports.server.ForgetTotals(name)
		}
	}
}

func sampleDevice(x *api.Device, totals map[string]nbd.ExportTotals) metrics.DeviceSample {
	n := totals[x.Name]
	s := metrics.DeviceSample{
		Name: x.Name, Kind: x.Kind, State: x.State, Size: x.SizeBytes,
		Connections: n.Connections, Open: n.Open, InFlight: n.InFlight, Commands: map[string]metrics.CommandSample{},
	}
	for command, c := range n.Commands {
		s.Commands[command] = metrics.CommandSample(c)
	}
	return s
}

func sampleSnapshot(x *api.Device) metrics.SnapshotSample {
	y := x.Snapshot
	s := metrics.SnapshotSample{
		Name: x.Name, Origin: y.Origin, Valid: y.Invalid == "", Chunk: y.ChunkBytes,
		Used: y.AllocatedBytes, Limit: y.TotalBytes, Metadata: y.MetadataBytes,
		Copied: y.CopiedChunks, Overwritten: y.OverwrittenChunks,
		Pending: y.PendingExceptions, Stalled: y.StalledRequests, Table: y.TableBytes,
	}
	if m := y.Merge; m != nil {
		s.Merging, s.ChunksMerged, s.ChunksTotal = true, m.MergedChunks, m.TotalChunks
	}
	return s
}

func sampleClone(device string, x *cloned) metrics.CloneSample {
	st := x.Status()
	return metrics.CloneSample{
		Name: device, Writable: st.Mode == clone.ReadWrite, SourceInUse: st.SourceInUse, Region: st.RegionSize.Bytes(),
		Regions: st.Regions, Hydrated: st.Hydrated, Hydrating: st.Hydrating, Failed: st.Failed, Commits: st.Commits,
		Table: st.TableBytes,
	}
}

// sampleRemote is the connections to a clone's source, if it is an NBD export and still used.
func sampleRemote(device string, x *cloned) []metrics.RemoteSample {
	src := x.currentSource()
	if src == nil || src.remote == nil {
		return nil
	}
	st := src.remote.device.Load().Stats()
	return []metrics.RemoteSample{{
		Device: device, Wanted: st.Connections, Open: st.Live, InFlight: st.InFlight, Reconnects: st.Reconnects,
	}}
}

// sampleEngine is the counters of the copy engine of a device.
func sampleEngine(device string, e kcopyd.Engine) metrics.EngineSample {
	stats := e.Stats()
	s := metrics.EngineSample{
		Device: device, Jobs: stats.Jobs, BytesRead: stats.BytesRead, BytesWritten: stats.BytesWritten,
		Errors: stats.Errors, InFlight: stats.JobsInFlight, Waiting: stats.JobsWaiting,
		BuffersInUse: stats.BuffersInUse, BuffersCeiling: stats.BufferCeiling, BufferWaits: stats.BufferWaits,
		Fallbacks: make(map[string]uint64, len(stats.Fallbacks)),
	}
	for i := range stats.Methods {
		m := &stats.Methods[i]
		s.Methods = append(s.Methods, metrics.MethodSample{
			Class: m.Class, Method: m.Method, Operations: m.Operations, Bytes: m.Bytes, Errors: m.Errors,
			Latency: &m.Latency,
		})
	}
	for _, f := range stats.Fallbacks {
		s.Fallbacks[f.Reason] = f.Count
	}
	return s
}
