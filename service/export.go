package service

import (
	"context"
	"errors"
	"net"
	"net/url"
	"strings"
	"sync"
	"syscall"

	"cowherd/api"
	"cowherd/export/nbd"
)

// copiedContext is the metadata context of snapshots that tells which ranges have been copied from the origin.
const copiedContext = "cowherd:copied"

// copiedFlag is the flag of a range of copiedContext that is on the COW device.
const copiedFlag = 1

// exports serves all that is live over NBD.
type exports struct {
	daemon  *Daemon
	server  *nbd.Server
	serving sync.WaitGroup
}

func newExports(d *Daemon) (x *exports, err error) {
	x = &exports{daemon: d}
	c := d.config
	x.server, err = nbd.NewServer(nbd.Config{Exports: x, TLS: c.TLS, TLSMode: c.TLSMode, Logger: d.log,
		Foreground: d.throttle.Foreground})
	return x, err
}

// List names all that is live.
func (x *exports) List(context.Context) []nbd.Info {
	var list []nbd.Info
	for _, o := range x.daemon.names.all() {
		if !o.isListed() {
			continue
		}
		list = append(list, nbd.Info{Name: o.name, Description: describeExport(&o.entry)})
		for _, s := range o.allSnaps() {
			list = append(list, nbd.Info{Name: s.name, Description: describeExport(&s.entry)})
		}
	}
	for _, name := range x.daemon.mapper.Names() {
		list = append(list, nbd.Info{Name: name, Description: "mapped device"})
	}
	return list
}

// describeExport is the text that goes with an export.
func describeExport(e *entry) string {
	if origin, _, ok := strings.Cut(e.name, "@"); ok {
		return "snapshot of " + origin + " taken " + e.since.Format("2006-01-02 15:04:05 UTC")
	}
	return "live device"
}

// Open finds an export and counts client in as its user. The empty name is the attached device, if there is just one.
func (x *exports) Open(_ context.Context, name, client string) (*nbd.Export, error) {
	if name == "" {
		origins := x.daemon.names.all()
		if len(origins) != 1 {
			return nil, api.Errorf(syscall.ENOENT, "%d devices are attached: the export needs a name", len(origins))
		}
		name = origins[0].name
	}
	origin, _, isSnapshot := strings.Cut(name, "@")
	o, err := x.daemon.names.origin(origin)
	if err != nil {
		return x.openMapped(name, client)
	}
	if !isSnapshot {
		return openEntry(&o.entry, client, nil)
	}
	s := o.snap(name)
	if s == nil {
		return nil, noDevice(name)
	}
	return openEntry(&s.entry, client, []nbd.Context{{Name: copiedContext, Extents: s.copied}})
}

// openMapped counts client in as a user of a mapped device, and makes the export.
func (x *exports) openMapped(name, client string) (*nbd.Export, error) {
	h, err := x.daemon.mapper.Open(name, client)
	if err != nil {
		return nil, noDevice(name)
	}
	return &nbd.Export{
		Name: name, Description: "mapped device", Device: h.Device(), MultiConn: true, Release: h.Close,
	}, nil
}

// openEntry counts client in and makes the export. All connections write through the one descriptor of a backend, so
// that a flush on any of them covers what was written on all.
func openEntry(e *entry, client string, contexts []nbd.Context) (*nbd.Export, error) {
	u, err := e.open(client)
	if err != nil {
		return nil, err
	}
	return &nbd.Export{
		Name:        e.name,
		Description: describeExport(e),
		Device:      e.device,
		MultiConn:   true,
		Contexts:    contexts,
		Release:     func() { e.release(u) },
	}, nil
}

// copied is the metadata context copiedContext.
func (s *snap) copied(offset, length int64, yield func(length int64, flags uint32) bool) error {
	s.target.Copied(offset, length, func(_, length int64, copied bool) bool {
		if copied {
			return yield(length, copiedFlag)
		}
		return yield(length, 0)
	})
	return nil
}

// serve accepts connections on all listeners, each on a goroutine of its own, until shutdown.
func (x *exports) serve() {
	for _, l := range x.daemon.nbd {
		x.serving.Go(func() {
			if err := x.server.Serve(l); !errors.Is(err, nbd.ErrServerClosed) {
				x.daemon.log.Error("an NBD listener has failed", "address", addressOf(l), "error", err)
			}
		})
	}
}

// shutdown lets requests end until ctx does, and disconnects everybody.
func (x *exports) shutdown(ctx context.Context) error {
	err := x.server.Shutdown(ctx)
	x.serving.Wait()
	return err
}

// disconnect ends all connections of an export.
func (x *exports) disconnect(ctx context.Context, name string) error {
	return x.server.Disconnect(ctx, name)
}

// users are the connections of an export; never nil, so that JSON has an array.
func (x *exports) users(name string) []api.User {
	users := []api.User{}
	for _, c := range x.server.Connections() {
		if c.Export != name {
			continue
		}
		commands := make(map[string]api.Command, len(c.Commands))
		for kind, n := range c.Commands {
			commands[kind] = api.Command(n)
		}
		users = append(users, api.User{
			Client: c.Client, Since: c.Since.UTC(), TLS: c.TLS, Queue: uint16(c.Queue), InFlight: c.InFlight,
			Commands: commands,
		})
	}
	return users
}

// addresses are where the exports are served.
func (x *exports) addresses() []string {
	addresses := make([]string, len(x.daemon.nbd))
	for i, l := range x.daemon.nbd {
		addresses[i] = addressOf(l)
	}
	return addresses
}

// addressOf is unix:PATH or tcp:HOST:PORT.
func addressOf(l net.Listener) string {
	return l.Addr().Network() + ":" + l.Addr().String()
}

// uris are where an export is served, as NBD clients take them.
func (x *exports) uris(name string) []string {
	var uris []string
	for _, l := range x.daemon.nbd {
		u := url.URL{Scheme: "nbd", Path: "/" + name}
		if x.daemon.config.TLSMode == nbd.TLSRequire {
			u.Scheme = "nbds"
		}
		switch l.Addr().Network() {
		case "unix":
			u.Scheme += "+unix"
			// Clients of NBD do not take a plus for a space.
			u.RawQuery = "socket=" + strings.NewReplacer("+", "%20", "%2F", "/").Replace(url.QueryEscape(l.Addr().String()))
		case "tcp":
			u.Host = l.Addr().String()
		default:
			continue
		}
		uris = append(uris, u.String())
	}
	return uris
}

var _ nbd.Exports = (*exports)(nil)
