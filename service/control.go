package service

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"syscall"
	"time"

	"cowherd/api"
)

// Limits of the control API.
const (
	controlConnsMax = 128 // connections; more wait to be accepted
	streamsMax      = 64  // event streams among them
	headerMax       = 16 << 10
	controlRead     = 10 * time.Second // until a request is there
	controlWrite    = 10 * time.Second // until an answer, or a batch of events, has been taken
	controlIdle     = time.Minute      // between two requests
)

// control serves the control API.
type control struct {
	daemon  *Daemon
	log     *slog.Logger
	server  http.Server
	streams chan struct{}      // holds one message for each event stream
	stop    context.CancelFunc // ends the event streams
	done    sync.WaitGroup
}

func newControl(d *Daemon) *control {
	c := &control{daemon: d, log: d.log, streams: make(chan struct{}, streamsMax)}
	streaming, stop := context.WithCancel(context.Background())
	c.stop = stop
	c.server = http.Server{
		Handler:        c.handler(streaming),
		ReadTimeout:    controlRead,
		IdleTimeout:    controlIdle,
		MaxHeaderBytes: headerMax,
		ErrorLog:       slog.NewLogLogger(d.log.Handler(), slog.LevelWarn),
	}
	return c
}

// operation does what a request asks for and returns the answer; nil: there is none to be sent.
type operation func(w http.ResponseWriter, r *http.Request) (any, error)

// handler is what serves the paths; event streams end with streaming.
func (c *control) handler(streaming context.Context) http.Handler {
	d, mux := c.daemon, http.NewServeMux()
	handle := func(pattern string, h operation) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { c.answer(w, r, h) })
	}
	handle("GET "+api.Prefix+"/version", func(http.ResponseWriter, *http.Request) (any, error) {
		return d.Version(), nil
	})
	c.handleDevices(handle)
	c.handleSnapshots(handle)
	c.handleMapped(handle, streaming)
	handle("GET "+api.Prefix+"/throttle", func(http.ResponseWriter, *http.Request) (any, error) {
		return d.Throttle(), nil
	})
	handle("PUT "+api.Prefix+"/throttle/{class}", body(api.BodyMax, func(r *http.Request, b api.ThrottleRequest) (any, error) {
		return d.SetThrottle(r.PathValue("class"), b)
	}))
	mux.HandleFunc("GET "+api.Prefix+"/events", func(w http.ResponseWriter, r *http.Request) {
		if err := c.serveEvents(w, r, streaming); err != nil {
			c.fail(w, r, err)
		}
	})
	mux.HandleFunc("GET "+api.Prefix+"/devices/{name}/trace", func(w http.ResponseWriter, r *http.Request) {
		if err := c.serveTrace(w, r, streaming); err != nil {
			c.fail(w, r, err)
		}
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		c.fail(w, r, api.Errorf(syscall.ENOENT, "the control API has no %s %s", r.Method, r.URL.Path))
	})
	return mux
}

// handleDevices serves what was attached.
func (c *control) handleDevices(handle func(pattern string, h operation)) {
	d := c.daemon
	const all, one = api.Prefix + "/devices", api.Prefix + "/devices/{name}"
	handle("GET "+all, func(http.ResponseWriter, *http.Request) (any, error) {
		return api.DeviceList{Devices: d.Devices()}, nil
	})
	handle("POST "+all, body(api.BodyMax, func(_ *http.Request, b api.AttachRequest) (any, error) { return d.Attach(b) }))
	handle("GET "+one, func(_ http.ResponseWriter, r *http.Request) (any, error) {
		return d.Device(r.PathValue("name"))
	})
	handle("DELETE "+one, func(_ http.ResponseWriter, r *http.Request) (any, error) {
		return nil, d.Detach(r.Context(), r.PathValue("name"))
	})
	handle("PUT "+one+"/hydration", body(api.BodyMax, func(r *http.Request, b api.HydrationRequest) (any, error) {
		return d.Hydrate(r.Context(), r.PathValue("name"), b)
	}))
	handle("DELETE "+one+"/source", func(_ http.ResponseWriter, r *http.Request) (any, error) {
		return d.DetachSource(r.Context(), r.PathValue("name"))
	})
}

// handleSnapshots serves snapshots.
func (c *control) handleSnapshots(handle func(pattern string, h operation)) {
	d := c.daemon
	const all, one = api.Prefix + "/snapshots", api.Prefix + "/snapshots/{name}"
	handle("POST "+all, body(api.BodyMax, func(r *http.Request, b api.SnapshotRequest) (any, error) {
		return d.TakeSnapshot(r.Context(), b)
	}))
	handle("DELETE "+one, func(_ http.ResponseWriter, r *http.Request) (any, error) {
		force, err := boolValue(r, "force", false)
		if err != nil {
			return nil, err
		}
		return nil, d.RemoveSnapshot(r.Context(), r.PathValue("name"), force)
	})
	handle("PUT "+one+"/size", body(api.BodyMax, func(r *http.Request, b api.ResizeRequest) (any, error) {
		return d.ResizeSnapshot(r.Context(), r.PathValue("name"), b.SizeBytes)
	}))
	handle("PUT "+one+"/merge", body(api.BodyMax, func(r *http.Request, b api.MergeRequest) (any, error) {
		return d.MergeSnapshot(r.Context(), r.PathValue("name"), b.Running)
	}))
}

// body is an operation with a body of at most so many bytes.
func body[T any](most int64, f func(r *http.Request, b T) (any, error)) operation {
	return func(w http.ResponseWriter, r *http.Request) (any, error) {
		var b T
		if err := api.ReadJSON(w, r, &b, most); err != nil {
			return nil, err
		}
		return f(r, b)
	}
}

// answer runs h and sends what it returns: 204 for nothing, 201 for what a POST has made, 200 for the rest.
func (c *control) answer(w http.ResponseWriter, r *http.Request, h operation) {
	value, err := h(w, r)
	if err != nil {
		c.fail(w, r, err)
		return
	}
	c.limitWrite(w)
	c.log.LogAttrs(r.Context(), slog.LevelDebug, "control request", slog.String("request", r.Method+" "+r.URL.Path))
	switch {
	case value == nil:
		w.WriteHeader(http.StatusNoContent)
		return
	case r.Method == http.MethodPost:
		err = api.WriteJSON(w, http.StatusCreated, value)
	default:
		err = api.WriteJSON(w, http.StatusOK, value)
	}
	c.logUnsent(err)
}

// fail answers with an error.
func (c *control) fail(w http.ResponseWriter, r *http.Request, err error) {
	c.log.LogAttrs(r.Context(), slog.LevelInfo, "control request failed",
		slog.String("request", r.Method+" "+r.URL.Path), slog.Any("error", err))
	c.limitWrite(w)
	c.logUnsent(api.WriteError(w, err))
}

// limitWrite bounds the time that an answer takes from now on.
func (c *control) limitWrite(w http.ResponseWriter) {
	c.logUnsent(http.NewResponseController(w).SetWriteDeadline(time.Now().Add(controlWrite)))
}

// logUnsent notes that a client has gone before its answer came.
func (c *control) logUnsent(err error) {
	if err != nil {
		c.log.Debug("control answer not sent", "error", err)
	}
}

// boolValue is a parameter of the query.
func boolValue(r *http.Request, key string, missing bool) (bool, error) {
	text := r.URL.Query().Get(key)
	if text == "" {
		return missing, nil
	}
	value, err := strconv.ParseBool(text)
	if err != nil {
		return false, api.Errorf(syscall.EINVAL, "%s=%q: true or false is wanted", key, text)
	}
	return value, nil
}

// serveEvents streams events as lines of JSON. An error means that nothing has been sent yet.
func (c *control) serveEvents(w http.ResponseWriter, r *http.Request, streaming context.Context) error {
	follow, err := boolValue(r, "follow", true)
	if err != nil {
		return err
	}
	since := uint64(0)
	if text := r.URL.Query().Get("since"); text != "" {
		if since, err = strconv.ParseUint(text, 10, 64); err != nil {
			return api.Errorf(syscall.EINVAL, "since=%q: the number of an event is wanted", text)
		}
	} else if follow {
		since = c.daemon.bus.newest()
	}
	reader, err := c.daemon.bus.after(since)
	if err != nil {
		return err
	}
	release, err := c.takeStream()
	if err != nil {
		return err
	}
	defer release()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(streaming, cancel)()
	if !follow {
		cancel() // what is there is read all the same
	}
	c.limitWrite(w)
	w.Header().Set("Content-Type", "application/x-ndjson")
	c.logUnsent(stream(ctx, w, reader))
	return nil
}

// takeStream counts one more stream, until release.
func (c *control) takeStream() (release func(), err error) {
	select {
	case c.streams <- struct{}{}:
		return func() { <-c.streams }, nil
	default:
		return nil, api.Errorf(syscall.EAGAIN, "%d event streams are open: more are not served", streamsMax)
	}
}

// stream sends events until there are none or ctx ends.
func stream(ctx context.Context, w http.ResponseWriter, reader *eventReader) error {
	rc, lines := http.NewResponseController(w), json.NewEncoder(w)
	for {
		if err := rc.Flush(); err != nil {
			return err
		}
		events, err := reader.read(ctx)
		if errors.Is(err, io.EOF) || errors.Is(err, context.Canceled) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := rc.SetWriteDeadline(time.Now().Add(controlWrite)); err != nil {
			return err
		}
		for i := range events {
			if err := lines.Encode(&events[i]); err != nil {
				return err
			}
		}
	}
}

// serve accepts connections of l on a goroutine of its own until shutdown.
func (c *control) serve(l net.Listener) {
	limited := &limitListener{Listener: l, slots: make(chan struct{}, controlConnsMax), closed: make(chan struct{})}
	c.done.Go(func() {
		if err := c.server.Serve(limited); !errors.Is(err, http.ErrServerClosed) {
			c.log.Error("the control socket has failed", "error", err)
		}
	})
}

// shutdown ends the event streams, lets other requests end until ctx does, and closes what is left.
func (c *control) shutdown(ctx context.Context) error {
	c.stop()
	err := c.server.Shutdown(ctx)
	if err != nil {
		err = errors.Join(err, c.server.Close())
	}
	c.done.Wait()
	return err
}

// limitListener accepts a bounded number of connections at a time; the others wait in the socket's backlog.
type limitListener struct {
	net.Listener
	slots  chan struct{} // holds one message for each connection
	closed chan struct{}
	once   sync.Once
}

// Accept waits for a slot, then for a connection.
func (l *limitListener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	conn, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &limitedConn{Conn: conn, release: func() { <-l.slots }}, nil
}

// Close ends Accept.
func (l *limitListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// limitedConn gives its slot back when it is closed.
type limitedConn struct {
	net.Conn
	once    sync.Once
	release func()
}

func (c *limitedConn) Close() error {
	err := c.Conn.Close()
	c.once.Do(c.release)
	return err
}
