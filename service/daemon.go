package service

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"syscall"
	"time"

	"cowherd/api"
	"cowherd/block"
	"cowherd/dm"
	"cowherd/export/nbd"
	"cowherd/kcopyd"
)

// Kinds of copy engine.
const (
	EngineScaled     = "scaled"     // each copy runs on the queue of the request that needs it
	EngineSerialised = "serialised" // one worker for each snapshot makes all its copies, as in the kernel
)

// Config is what a daemon can be told. Only StateDir must be set.
type Config struct {
	// StateDir is a directory that the daemon has to itself. It is made if need be.
	StateDir string
	// Control is the path of the control socket; empty: there is none.
	Control string
	// NBD are the addresses that exports are served on: unix:PATH or tcp:HOST:PORT.
	NBD []string
	// Listeners are more of them, ready made. The daemon closes them, whether New succeeds or not.
	Listeners []net.Listener
	// TLS is used as TLSMode says, on every NBD listener.
	TLS     *tls.Config
	TLSMode nbd.TLSMode
	// Engine is EngineScaled (the default) or EngineSerialised.
	Engine string
	// BufferCeiling bounds the copy buffers of each snapshot, in bytes; 0: kcopyd's default.
	BufferCeiling int64
	// SuspendTimeout is how long an operation waits for requests in flight, or for users that are disconnected, before
	// it gives up; 0: 10 s.
	SuspendTimeout time.Duration
	// BusyGrace is how long an operation that finds a device in use waits for its users to leave; 0: 200 ms.
	BusyGrace time.Duration
	// Logger is told of events and failures; nil: nobody.
	Logger *slog.Logger
	// HTTP is the address, HOST:PORT, on which metrics are served; empty: nowhere.
	HTTP string
	// Throttle is what classes of copies are limited to at first, by the classes' names.
	Throttle map[string]api.ThrottleRequest
	// Version is what the control API tells.
	Version string
}

// withDefaults fills in what is not set.
func (c Config) withDefaults() Config {
	if c.Engine == "" {
		c.Engine = EngineScaled
	}
	if c.SuspendTimeout <= 0 {
		c.SuspendTimeout = 10 * time.Second
	}
	if c.BusyGrace <= 0 {
		c.BusyGrace = 200 * time.Millisecond
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// Daemon is devices with names, their snapshots, and who serves them. Make it with New, bring back by Restore what an
// earlier one has left, let clients in by Serve and end it by Stop. All methods are safe for concurrent use.
type Daemon struct {
	config     Config
	log        *slog.Logger
	started    time.Time
	bus        *bus
	names      registry
	mapper     *dm.Mapper
	logging    sync.WaitGroup
	tasks      sync.WaitGroup  // what is done without anybody waiting for it: ends of merges
	ending     context.Context // ends when the daemon begins to stop
	end        context.CancelFunc
	throttle   *kcopyd.Throttle // of all engines
	traces     traces
	throttling sync.Mutex // held while the throttle is changed

	// What New opens.
	state   *stateDir
	saved   *stateFile
	nbd     []net.Listener
	exports *exports
	socket  *unixListener // the control socket; nil: there is none
	control *control      // nil: there is none
	web     net.Listener  // for metrics; nil: there is none
	pages   *pages        // nil: they are not served
}

// New makes a daemon that has its state directory and its sockets, but does not serve them yet. EBUSY, EADDRINUSE:
// another daemon has one of them.
func New(c Config) (*Daemon, error) {
	c = c.withDefaults()
	d := &Daemon{config: c, log: c.Logger, started: time.Now().UTC(), bus: newBus(), nbd: c.Listeners,
		throttle: kcopyd.NewThrottle()}
	d.names.origins, d.names.held = map[string]*origin{}, map[fileID]string{}
	d.names.mapped, d.names.minors = map[string]bool{}, map[string]uint32{}
	d.mapper = dm.NewMapper(&mappedHost{daemon: d, leaves: map[fileID]*sharedLeaf{}}, targetTypes(d.newEngine))
	d.ending, d.end = context.WithCancel(context.Background())
	if err := d.open(); err != nil {
		d.end()
		return nil, errors.Join(err, d.release())
	}
	d.logging.Go(d.logEvents)
	return d, nil
}

// open takes what a daemon needs of the system. What it got before it failed is there for release.
func (d *Daemon) open() (err error) {
	if e := d.config.Engine; e != EngineScaled && e != EngineSerialised {
		return api.Errorf(syscall.EINVAL, "engine %q: %s or %s is wanted", e, EngineScaled, EngineSerialised)
	}
	for class, limits := range d.config.Throttle {
		if _, err := d.SetThrottle(class, limits); err != nil {
			return err
		}
	}
	if d.config.HTTP != "" {
		if d.web, err = net.Listen("tcp", d.config.HTTP); err != nil {
			return fmt.Errorf("HTTP: %w", err)
		}
	}
	if d.state, err = openStateDir(d.config.StateDir); err != nil {
		return err
	}
	if d.saved, err = openStateFile(d.state.path); err != nil {
		return err
	}
	for _, address := range d.config.NBD {
		l, err := listenNBD(address)
		if err != nil {
			return fmt.Errorf("NBD: %w", err)
		}
		d.nbd = append(d.nbd, l)
	}
	if d.exports, err = newExports(d); err != nil {
		return err
	}
	if d.config.Control == "" {
		return nil
	}
	if d.socket, err = listenUnix(d.config.Control); err != nil {
		return fmt.Errorf("control: %w", err)
	}
	d.control = newControl(d)
	return nil
}

// release gives back what open took.
func (d *Daemon) release() error {
	var err error
	if d.socket != nil {
		err = ignoreClosed(d.socket.Close())
	}
	if d.web != nil {
		err = errors.Join(err, ignoreClosed(d.web.Close()))
	}
	for _, l := range d.nbd {
		err = errors.Join(err, ignoreClosed(l.Close()))
	}
	if d.state != nil {
		err = errors.Join(err, d.state.close())
	}
	return err
}

// ignoreClosed is err, unless it says that something was closed before.
func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// listenNBD listens on an address of the form unix:PATH or tcp:HOST:PORT.
func listenNBD(address string) (net.Listener, error) {
	kind, where, _ := strings.Cut(address, ":")
	switch {
	case kind == "unix" && where != "":
		l, err := listenUnix(where)
		if err != nil {
			return nil, err // not l: a nil pointer is not a nil interface
		}
		return l, nil
	case kind == "tcp" && where != "":
		l, err := net.Listen("tcp", where)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", address, err)
		}
		return l, nil
	}
	return nil, api.Errorf(syscall.EINVAL, "address %q: unix:PATH or tcp:HOST:PORT is wanted", address)
}

// Serve lets clients in. It returns at once; it is called once, before Stop.
func (d *Daemon) Serve() {
	d.exports.serve()
	if d.control != nil {
		d.control.serve(d.socket)
	}
	if d.web != nil {
		d.pages = newPages(d)
		d.pages.serve(d.web)
	}
}

// Stop ends the daemon: nobody is let in any more, requests that have arrived are answered, clients are disconnected,
// devices are flushed and closed, sockets are removed. What there was stays in the state file, for Restore. Half of the
// time until ctx ends is for clients to end, so that one that hangs takes nothing from the rest. An error says what was
// not ended well. Stop is called once.
func (d *Daemon) Stop(ctx context.Context) error {
	d.names.close()
	d.end()
	d.endStalls()
	d.refuseSuspended()
	err := d.stopServing(ctx)
	if d.pages != nil {
		err = errors.Join(err, d.pages.shutdown(ctx))
	}
	ended := make(chan error, 1)
	go func() { ended <- d.releaseAll(ctx) }()
	select {
	case stopErr := <-ended:
		err = errors.Join(err, stopErr)
	case <-ctx.Done():
		// What a device that hangs holds up ends with the process; there is nothing to wait for.
		err = errors.Join(err, fmt.Errorf("devices do not end: %w", ctx.Err()))
	}
	d.bus.close()
	d.logging.Wait()
	return errors.Join(err, d.release())
}

// stopServing ends both front ends.
func (d *Daemon) stopServing(ctx context.Context) error {
	if deadline, ok := ctx.Deadline(); ok {
		half, cancel := context.WithTimeout(ctx, time.Until(deadline)/2)
		defer cancel()
		ctx = half
	}
	var controlErr error
	var control sync.WaitGroup
	if d.control != nil {
		control.Go(func() { controlErr = d.control.shutdown(ctx) })
	}
	err := d.exports.shutdown(ctx)
	control.Wait()
	return errors.Join(err, controlErr)
}

// endStalls ends the waiting for room, which those who stop wait for: with an error where the snapshot is to be there
// again for the next daemon, and at the price of the snapshot where it ends anyway.
func (d *Daemon) endStalls() {
	for _, o := range d.names.all() {
		for _, s := range o.allSnaps() {
			if s.store != nil {
				s.target.Refuse()
			} else {
				s.target.Unstall()
			}
		}
	}
}

// releaseAll closes the mapped devices, which may lie on others, and all origins with their snapshots, each origin by
// itself.
func (d *Daemon) releaseAll(ctx context.Context) error {
	origins := d.names.all()
	var mapped error
	for _, o := range origins {
		mapped = errors.Join(mapped, d.letMappedGo(ctx, o))
	}
	mapped = errors.Join(mapped, d.mapper.Close(ctx))
	errs := make([]error, len(origins))
	var wait sync.WaitGroup
	for i, o := range origins {
		wait.Go(func() { errs[i] = d.releaseOrigin(ctx, o) })
	}
	wait.Wait()
	d.tasks.Wait() // no merge runs any more that could begin one
	return errors.Join(append(errs, mapped)...)
}

// releaseOrigin closes an origin and its snapshots as they are: they stay in the state file. The origin comes first,
// so that no snapshot ever misses a write to it.
func (d *Daemon) releaseOrigin(ctx context.Context, o *origin) error {
	if err := o.lock(ctx); errors.Is(err, syscall.ENOENT) {
		return nil
	} else if err != nil {
		return err
	}
	defer o.unlock()
	if s := o.merging(); s != nil {
		s.merge.Load().Stop() // the next daemon goes on with it
	}
	if err := d.closeEntry(ctx, &o.entry); err != nil {
		return fmt.Errorf("detach %q: %w", o.name, err)
	}
	var errs []error
	for _, s := range o.allSnaps() {
		if err := d.releaseSnap(ctx, s); err != nil {
			errs = append(errs, fmt.Errorf("close %q: %w", s.name, err))
		}
	}
	lost := o.flush()
	if len(o.allSnaps()) > 0 { // what hangs there may be a read of the device
		return errors.Join(append(errs, lost)...)
	}
	if err := d.finishDetach(o, lost); err != nil {
		errs = append(errs, fmt.Errorf("detach %q: %w", o.name, err))
	}
	return errors.Join(errs...)
}

// releaseSnap closes a snapshot whose origin is closed.
func (d *Daemon) releaseSnap(ctx context.Context, s *snap) error {
	if err := d.closeEntry(ctx, &s.entry); err != nil {
		return err
	}
	var err error
	switch {
	case s.merged.Load():
		d.endSnap(s)
		return nil
	case s.store != nil:
		err = block.Flush(s.cow)
	}
	err = errors.Join(err, s.close())
	d.endSnap(s)
	if s.store == nil {
		d.bus.publish(api.Event{Type: api.EventSnapshotRemoved, Name: s.name, Cause: causeOf(err)})
	}
	return err
}

// closeEntry ends the users of e and closes its device. If it fails e is live as before.
func (d *Daemon) closeEntry(ctx context.Context, e *entry) error {
	ctx, cancel := context.WithTimeout(ctx, d.config.SuspendTimeout)
	defer cancel()
	if err := d.shut(ctx, e, true); err != nil {
		return err
	}
	if err := e.device.Close(ctx); err != nil {
		e.reopen()
		return err
	}
	return nil
}

// logEvents writes the events to the log.
func (d *Daemon) logEvents() {
	reader := eventReader{bus: d.bus, next: 1}
	for {
		events, err := reader.read(context.Background())
		if err != nil {
			return // the bus is closed
		}
		for i := range events {
			d.logEvent(&events[i])
		}
	}
}

func (d *Daemon) logEvent(e *api.Event) {
	level := slog.LevelInfo
	attrs := []slog.Attr{slog.Uint64("seq", e.Seq)}
	add := func(key, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(key, value))
		}
	}
	add("name", e.Name)
	add("client", e.Client)
	add("cause", e.Cause)
	switch {
	case e.Type == api.EventMissed:
		level = slog.LevelWarn
		attrs = append(attrs, slog.Uint64("missed", e.Missed))
	case e.Persistent && (e.Type == api.EventDeviceLost || e.Type == api.EventSnapshotLost):
		level = slog.LevelError
	case e.Type == api.EventSnapshotSpace:
		level = slog.LevelWarn
		attrs = append(attrs, slog.Int("percent", e.Percent))
	case e.Cause != "":
		level = slog.LevelWarn
	case e.Client != "":
		level = slog.LevelDebug // the NBD server tells more about connections
	}
	d.log.LogAttrs(context.Background(), level, e.Type, attrs...)
}
