package service

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"cowherd/api"
	"cowherd/backend/nbd"
	"cowherd/block"
	"cowherd/internal/size"
)

const (
	// sourceTimeout bounds connecting to a server; sourceConns is how many connections there are to one.
	sourceTimeout = 30 * time.Second
	sourceConns   = 4
)

// source is what is cloned, while it is used.
type source struct {
	block.Device
	close  func() error // may be called again, and waits for the first call then
	remote *remote      // nil: it is no export of a server
	mapped bool         // it is a mapped device of this daemon
}

func newSource(d block.Device, close func() error) *source {
	return &source{Device: d, close: sync.OnceValue(close)}
}

// sourceDevice is the device of a source; nil: there is none.
func sourceDevice(s *source) block.Device {
	if s == nil {
		return nil
	}
	return s.Device
}

// currentSource is the source; nil: it is no longer used.
func (x *cloned) currentSource() *source {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.source
}

// closeSource lets go of the source, if that has not been done.
func (x *cloned) closeSource() error {
	src := x.currentSource()
	if src == nil {
		return nil
	}
	err := src.close()
	x.mu.Lock()
	defer x.mu.Unlock()
	x.source = nil
	return err
}

// sourceName is the name of a device or snapshot of this daemon that a source stands for, if it does.
func sourceName(text string) (string, bool) {
	return text, text != "" && !filepath.IsAbs(text) && !nbd.IsURI(text)
}

// openSource opens what is to be cloned.
func (d *Daemon) openSource(name string, x *cloned) error {
	var src *source
	var err error
	text := x.request.Source
	if device, named := sourceName(text); named {
		src, err = d.borrow(name, device)
	} else if nbd.IsURI(text) {
		src, err = d.openRemote(text)
	} else {
		var b *backing
		if b, err = d.openShared(text); err == nil {
			src = newSource(b.leaf, b.close)
		}
	}
	if err != nil {
		return fmt.Errorf("source: %w", err)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.source = src
	return nil
}

// ownName is the name of the device or snapshot that a source is, if that is the URI of an export of this daemon; any other
// source is returned as it is. Over a connection to itself a daemon that is started anew would wait for its own answer.
func (d *Daemon) ownName(source string) string {
	if !nbd.IsURI(source) {
		return source
	}
	c, err := nbd.ParseURI(source)
	if err != nil || c.Export == "" {
		return source // who opens it says what is wrong
	}
	for _, l := range d.nbd {
		if a := l.Addr(); a.Network() == c.Network && sameAddress(c.Network, a.String(), c.Address) {
			return c.Export
		}
	}
	return source
}

// sameAddress tells whether two addresses of a network are the same, as far as that can be seen.
func sameAddress(network, a, b string) bool {
	if network != "unix" {
		return a == b
	}
	x, err := os.Stat(a)
	if err != nil {
		return a == b
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

// remote is an export as the source of a clone. One that has failed, because its server was away for too long, can be opened
// anew, and then takes the place of the other.
type remote struct {
	config nbd.Config
	device atomic.Pointer[nbd.Device]
	closed atomic.Bool
}

// openRemote connects to an export. What becomes of its connections is in the log.
func (d *Daemon) openRemote(uri string) (*source, error) {
	c, err := nbd.ParseURI(uri)
	if err != nil {
		return nil, invalid(err)
	}
	c.Connections = sourceConns
	d.logRemote(&c)
	x := &remote{config: c}
	opened, err := x.connect(d.ending)
	if err != nil {
		return nil, err
	}
	x.device.Store(opened)
	s := newSource(x, x.close)
	s.remote = x
	return s, nil
}

func (x *remote) connect(ctx context.Context) (*nbd.Device, error) {
	ctx, cancel := context.WithTimeout(ctx, sourceTimeout)
	defer cancel()
	return nbd.Open(ctx, x.config)
}

// Submit sends r to the server. See block.Device.
func (x *remote) Submit(r *block.Request) { x.device.Load().Submit(r) }

// Size is the export's.
func (x *remote) Size() int64 { return x.device.Load().Size() }

// Limits are the export's.
func (x *remote) Limits() block.Limits { return x.device.Load().Limits() }

// Extents are the export's.
func (x *remote) Extents(offset, length int64, yield func(block.Extent) bool) error {
	return x.device.Load().Extents(offset, length, yield)
}

// close ends the connections; revive makes no new ones any more.
func (x *remote) close() error {
	x.closed.Store(true)
	return x.device.Load().Close()
}

// revive opens the export anew if it has failed. Only one call at a time is allowed.
func (x *remote) revive(ctx context.Context) error {
	dead := x.device.Load()
	if dead.Stats().Failed == nil {
		return nil
	}
	opened, err := x.connect(ctx)
	if err != nil {
		return err
	}
	if now, was := opened.Size(), dead.Size(); now != was || opened.Limits().LogicalBlock > dead.Limits().LogicalBlock {
		err := api.Errorf(syscall.ESTALE, "the export has %s in blocks of %d bytes now, and had %s in blocks of %d: it is another one",
			size.Exact(now), opened.Limits().LogicalBlock, size.Exact(was), dead.Limits().LogicalBlock)
		return errors.Join(err, opened.Close())
	}
	x.device.Store(opened)
	if x.closed.Load() { // close may have seen the dead one
		return opened.Close()
	}
	return dead.Close()
}

// revive opens a source anew that has failed. The operations on the clone are the caller's.
func (x *cloned) revive(ctx context.Context) error {
	src := x.currentSource()
	if src == nil || src.remote == nil {
		return nil
	}
	return src.remote.revive(ctx)
}

// breakOff ends copies from a server, before the clone is suspended, which waits for them: the server may be away, and be
// waited for for long. A server that is there gets time for what it is at. A mapped device is let go of likewise.
func (x *cloned) breakOff() error {
	src := x.currentSource()
	if src == nil || src.remote == nil && !src.mapped {
		return nil
	}
	x.SetHydration(false)
	return x.closeSource()
}

// borrow makes a clone the user of a device or snapshot of this daemon, which cannot be removed as long.
func (d *Daemon) borrow(name, device string) (*source, error) {
	origin, _, isSnapshot := strings.Cut(device, "@")
	o, err := d.names.origin(origin)
	if err != nil && !isSnapshot {
		return d.borrowMapped(name, device)
	}
	if err != nil {
		return nil, err
	}
	e := &o.entry
	if isSnapshot {
		s := o.snap(device)
		if s == nil {
			return nil, noDevice(device)
		}
		e = &s.entry
	}
	u, err := e.open(fmt.Sprintf("clone %q", name))
	if err != nil {
		return nil, err
	}
	if !isSnapshot && !e.device.Limits().ReadOnly {
		e.release(u)
		return nil, api.Errorf(syscall.EBUSY, "%s is written: take a snapshot of it, and clone that", device)
	}
	return newSource(e.device, func() error { e.release(u); return nil }), nil
}

// borrowMapped makes a clone the user of a mapped device. Its table may change all the same, as its source may not.
func (d *Daemon) borrowMapped(name, device string) (*source, error) {
	h, err := d.mapper.Open(device, fmt.Sprintf("clone %q", name))
	if err != nil {
		return nil, noDevice(device)
	}
	if !h.Device().Limits().ReadOnly {
		h.Close()
		return nil, api.Errorf(syscall.EBUSY, "%s can be written: load its table as read-only (cowherd dm create --readonly)", device)
	}
	s := newSource(h.Device(), func() error { h.Close(); return nil })
	s.mapped = true
	return s, nil
}

// mappedSource is whether an origin that is live is a clone that needs a mapped device, or a clone of one that does.
func (d *Daemon) mappedSource(o *origin) bool {
	if o.cloned == nil {
		return false
	}
	switch src := o.cloned.currentSource(); {
	case src == nil:
		return false
	case src.mapped:
		return true
	}
	text, named := sourceName(o.cloned.request.Source)
	below, _, _ := strings.Cut(text, "@")
	if !named {
		return false
	}
	lower, err := d.names.origin(below)
	return err == nil && d.mappedSource(lower)
}

// letMappedGo has a clone let go of a mapped device while the daemon stops, so that this can be removed.
func (d *Daemon) letMappedGo(ctx context.Context, o *origin) error {
	if _, named := sourceName(o.request.Clone.Source); !named {
		return nil
	}
	if err := o.lock(ctx); err != nil {
		return nil // it is gone, or somebody tells who closes it
	}
	defer o.unlock()
	if o.cloned == nil {
		return nil
	}
	if src := o.cloned.currentSource(); src == nil || !src.mapped {
		return nil
	}
	if s := o.merging(); s != nil {
		s.merge.Load().Stop()
	}
	return o.cloned.breakOff()
}
