package service

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"slices"
	"sync"
	"syscall"
	"time"

	"cowherd/api"
	"cowherd/dm"
	"cowherd/trace"
)

const (
	tracePoll     = 5 * time.Millisecond   // between two looks at what has been recorded
	traceEveryMin = 100 * time.Millisecond // between two summaries
	traceLeave    = 10 * time.Second       // for the requests in flight at the end of a trace
	traceBuffer   = 64 << 10
)

// traces are the devices that are traced, each by one client at a time.
type traces struct {
	mu sync.Mutex
	// +checklocks:mu
	devices map[*dm.Device]bool
}

// begin makes a device traced. EBUSY: it is.
func (x *traces) begin(d *dm.Device) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.devices[d] {
		return api.Errorf(syscall.EBUSY, "%s is being traced already", d.Name())
	}
	if x.devices == nil {
		x.devices = map[*dm.Device]bool{}
	}
	x.devices[d] = true
	return nil
}

func (x *traces) end(d *dm.Device) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.devices, d)
}

// mappedOf is the mapped device of whatever has a name.
func (d *Daemon) mappedOf(name string) (*dm.Device, error) {
	if e, err := d.entryOf(name); err == nil && e.isListed() {
		return e.device, nil
	}
	h, err := d.mapper.Open(name, "trace")
	if err != nil {
		return nil, noDevice(name)
	}
	defer h.Close()
	return h.Device(), nil
}

// serveTrace traces a device and streams what is seen as lines of JSON. An error means that nothing has been sent yet.
func (c *control) serveTrace(w http.ResponseWriter, r *http.Request, streaming context.Context) error {
	q, err := traceQuery(r)
	if err != nil {
		return err
	}
	device, err := c.daemon.mappedOf(r.PathValue("name"))
	if err != nil {
		return err
	}
	release, err := c.takeStream()
	if err != nil {
		return err
	}
	defer release()
	if err := c.daemon.traces.begin(device); err != nil {
		return err
	}
	defer c.daemon.traces.end(device)
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(streaming, cancel)()
	tracer := trace.New()
	if err := device.Trace(ctx, tracer); err != nil {
		return err
	}
	if q.For > 0 {
		defer time.AfterFunc(q.For, cancel).Stop()
	}
	c.limitWrite(w)
	w.Header().Set("Content-Type", "application/x-ndjson")
	t := &traceStream{
		query: q, analyzer: trace.NewAnalyzer(tracer), rc: http.NewResponseController(w), buffer: bufio.NewWriterSize(w, traceBuffer),
	}
	t.lines = json.NewEncoder(t.buffer)
	err = t.run(ctx)
	leave, done := context.WithTimeout(context.Background(), traceLeave)
	defer done()
	if e := device.Trace(leave, nil); e != nil {
		c.log.Warn("a trace does not end", "device", device.Name(), "error", e)
	}
	if err == nil {
		err = t.last()
	}
	c.logUnsent(err)
	return nil
}

// traceQuery reads what a client wants to know.
func traceQuery(r *http.Request) (q api.TraceQuery, err error) {
	for key, to := range map[string]*time.Duration{"for": &q.For, "every": &q.Every} {
		text := r.URL.Query().Get(key)
		if text == "" {
			continue
		}
		if *to, err = time.ParseDuration(text); err != nil || *to < 0 {
			return q, api.Errorf(syscall.EINVAL, "%s=%q: a time such as 10s is wanted", key, text)
		}
	}
	if q.Every > 0 && q.Every < traceEveryMin {
		return q, api.Errorf(syscall.EINVAL, "every=%v: %v is the least", q.Every, traceEveryMin)
	}
	q.Requests, err = boolValue(r, "requests", false)
	return q, err
}

// traceStream sends what an analyzer finds.
type traceStream struct {
	query    api.TraceQuery
	analyzer *trace.Analyzer
	rc       *http.ResponseController
	buffer   *bufio.Writer
	lines    *json.Encoder
	err      error // the first
}

// run sends until ctx ends.
func (t *traceStream) run(ctx context.Context) error {
	poll := time.NewTicker(tracePoll)
	defer poll.Stop()
	next := time.Now().Add(t.query.Every)
	for t.flush(); t.err == nil; {
		select {
		case <-ctx.Done():
			return nil
		case <-poll.C:
		}
		t.poll()
		if t.query.Every > 0 && !time.Now().Before(next) {
			next = time.Now().Add(t.query.Every)
			t.send(api.TraceLine{Summary: describeTrace(t.analyzer.Summary())})
			t.flush()
		} else if t.query.Requests {
			t.flush()
		}
	}
	return t.err
}

// last sends what has ended meanwhile, and the last summary.
func (t *traceStream) last() error {
	t.poll()
	s := describeTrace(t.analyzer.Summary())
	s.Last = true
	t.send(api.TraceLine{Summary: s})
	t.flush()
	return t.err
}

func (t *traceStream) poll() {
	if !t.query.Requests {
		t.analyzer.Poll(nil)
		return
	}
	t.analyzer.Poll(func(l *trace.Life) {
		if t.err == nil {
			t.send(api.TraceLine{Request: describeLife(l)})
		}
	})
}

func (t *traceStream) send(line api.TraceLine) { t.err = errors.Join(t.err, t.lines.Encode(line)) }

// flush has what was sent leave, in bounded time.
func (t *traceStream) flush() {
	if t.err != nil {
		return
	}
	t.err = errors.Join(t.rc.SetWriteDeadline(time.Now().Add(controlWrite)), t.buffer.Flush(), t.rc.Flush())
}

func microseconds(d time.Duration) float64 { return float64(d) / 1000 }

func describeLife(l *trace.Life) *api.TraceRequest {
	return &api.TraceRequest{
		AtUS: microseconds(l.At), Op: l.Op, Class: l.Class, Offset: l.Offset, Length: l.Length, Queue: l.Queue, CPU: l.CPU,
		Failed: l.Failed, HeldUS: microseconds(l.Held), MapUS: microseconds(l.Map), WaitUS: microseconds(l.Wait),
		DeviceUS: microseconds(l.Device), TotalUS: microseconds(l.Total),
	}
}

func describeTrace(s *trace.Summary) *api.TraceSummary {
	x := &api.TraceSummary{
		Seconds: s.Elapsed.Seconds(), Flows: []api.TraceFlow{}, CPUs: describeShares(s.CPUs), Queues: describeShares(s.Queues),
		Dropped: s.Dropped, Broken: s.Broken,
	}
	for _, f := range s.Flows {
		flow := api.TraceFlow{Op: f.Op, Class: f.Class, Count: f.Count, Bytes: f.Bytes, Failed: f.Failed}
		for i := range f.Parts {
			p := &f.Parts[i]
			if p.Count == 0 {
				continue
			}
			flow.Parts = append(flow.Parts, api.TracePart{
				Part: trace.PartNames[i], Count: p.Count, MeanUS: microseconds(p.Mean()), P50US: microseconds(p.Quantile(0.5)),
				P99US: microseconds(p.Quantile(0.99)), P999US: microseconds(p.Quantile(0.999)), MaxUS: microseconds(p.Quantile(1)),
			})
		}
		x.Flows = append(x.Flows, flow)
	}
	return x
}

// describeShares are the shares by number.
func describeShares(shares map[int]*trace.Share) []api.TraceShare {
	list := []api.TraceShare{}
	var all uint64
	for _, s := range shares {
		all += s.Requests + s.Copies
	}
	for _, n := range slices.SortedFunc(maps.Keys(shares), cmp.Compare) {
		s := shares[n]
		list = append(list, api.TraceShare{
			Number: n, Requests: s.Requests, RequestBytes: s.RequestBytes, Copies: s.Copies, CopyBytes: s.CopyBytes,
			Share: float64(s.Requests+s.Copies) / float64(max(all, 1)),
		})
	}
	return list
}
