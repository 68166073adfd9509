package service

import (
	"context"
	"errors"
	"fmt"
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
// waited for for long. A server that is there gets time for what it is at.
func (x *cloned) breakOff() error {
	src := x.currentSource()
	if src == nil || src.remote == nil {
		return nil
	}
	x.SetHydration(false)
	return x.closeSource()
}

// borrow makes a clone the user of a device or snapshot of this daemon, which cannot be removed as long.
func (d *Daemon) borrow(name, device string) (*source, error) {
	origin, _, isSnapshot := strings.Cut(device, "@")
	o, err := d.names.origin(origin)
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
