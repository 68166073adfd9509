package service

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cowherd/api"
	"cowherd/backend/file"
	"cowherd/backend/mem"
	"cowherd/backend/nbd"
	"cowherd/dm"
	"cowherd/target"
)

// mappedHost is the daemon around its mapped devices (dm.Host): what their tables lie on.
//
// An argument of a table is the name of an attached device or a snapshot, which it then uses as a client would; the
// absolute path of a file or block device, or MAJOR:MINOR of one; mem:SIZE, null:SIZE or an NBD URI. A file or block
// device is opened once for all tables that name it, and to nobody else meanwhile.
type mappedHost struct {
	daemon *Daemon

	mu sync.Mutex
	// +checklocks:mu
	leaves map[fileID]*sharedLeaf
	// Numbers of devices that have none of their own.
	// +checklocks:mu
	last uint32
}

// sharedLeaf is a file or a block device that tables lie on.
type sharedLeaf struct {
	*backing
	count int // tables
	major uint32
	minor uint32
}

// nbdOpenMax is how long connecting to an NBD server may take.
const nbdOpenMax = 30 * time.Second

// isNumber tells whether s is decimal digits, as a block device's numbers are given.
func isNumber(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

// Open is dm.Host's.
func (h *mappedHost) Open(arg string, _ bool, user string) (dm.Lower, error) {
	kind, rest, special := strings.Cut(arg, ":")
	switch {
	case isNumber(kind) && isNumber(rest):
		return h.openShared("/dev/block/"+arg, arg)
	case special && kind == "mem":
		made, err := openMem(rest)
		return h.own(arg, made, err)
	case special && kind == "null":
		made, err := openNull(rest)
		return h.own(arg, made, err)
	case strings.HasPrefix(rest, "//") && strings.HasPrefix(kind, "nbd"):
		made, err := h.openNBD(arg)
		return h.own(arg, made, err)
	case filepath.IsAbs(arg):
		return h.openShared(arg, arg)
	}
	return h.openManaged(arg, user)
}

// openNBD connects to an NBD server. What becomes of its connections is in the log.
func (h *mappedHost) openNBD(uri string) (leaf, error) {
	c, err := nbd.ParseURI(uri)
	if err != nil {
		return nil, invalid(err)
	}
	c.Connections = nbdConnections
	h.daemon.logRemote(&c)
	ctx, cancel := context.WithTimeout(context.Background(), nbdOpenMax)
	defer cancel()
	return nbd.Open(ctx, c)
}

// logRemote has the log tell what becomes of connections to an NBD server.
func (d *Daemon) logRemote(c *nbd.Config) {
	where := c.URI()
	c.OnEvent = func(e nbd.Event) {
		d.log.Warn("NBD server: "+e.Kind.String(), "uri", where, "connection", e.Connection, "cause", causeOf(e.Err))
	}
}

// nbdConnections is how many connections a mapped device has to an NBD server, if that allows several.
const nbdConnections = 4

// own is a device that one table has to itself.
func (h *mappedHost) own(arg string, made leaf, err error) (dm.Lower, error) {
	if err != nil {
		return dm.Lower{}, fmt.Errorf("%s: %w", arg, err)
	}
	return dm.Lower{
		Lower: target.Lower{Device: made, Name: target.Name(arg)}, Minor: h.nextNumber(), Close: made.Close,
	}, nil
}

// nextNumber is a minor number of major 0.
func (h *mappedHost) nextNumber() uint32 {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.last++
	return h.last
}

// openShared opens a file or a block device, or counts one more table that lies on it.
func (h *mappedHost) openShared(path, arg string) (dm.Lower, error) {
	info, err := os.Stat(path)
	if err != nil {
		return dm.Lower{}, fmt.Errorf("device: %w", err)
	}
	id := idOf(info)
	h.mu.Lock()
	defer h.mu.Unlock() // held while the device is opened, so that it is opened once
	x := h.leaves[id]
	if x == nil {
		if x, err = h.openLeafLocked(path, id); err != nil {
			return dm.Lower{}, err
		}
		h.leaves[id] = x
	}
	x.count++
	return dm.Lower{
		Lower: target.Lower{Device: x.leaf, Name: target.Name(arg)}, Major: x.major, Minor: x.minor,
		Close: func() error { return h.closeShared(id, x) },
	}, nil
}

// openLeafLocked opens a file or a block device, for writing where that is allowed.
//
// +checklocks:h.mu
func (h *mappedHost) openLeafLocked(path string, id fileID) (*sharedLeaf, error) {
	made, err := h.daemon.openFile("mapped devices", path, file.Options{})
	if errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EROFS) {
		made, err = h.daemon.openFile("mapped devices", path, file.Options{ReadOnly: true})
	}
	if err != nil {
		return nil, err
	}
	x := &sharedLeaf{backing: made}
	if id.isDevice {
		x.major, x.minor = unix.Major(id.device), unix.Minor(id.device)
	} else {
		h.last++
		x.minor = h.last
	}
	return x, nil
}

// closeShared counts a table off.
func (h *mappedHost) closeShared(id fileID, x *sharedLeaf) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if x.count--; x.count > 0 {
		return nil
	}
	delete(h.leaves, id)
	return x.close()
}

// openManaged uses an attached device or a snapshot.
func (h *mappedHost) openManaged(name, user string) (dm.Lower, error) {
	e, err := h.daemon.entryOf(name)
	if err != nil {
		return dm.Lower{}, fmt.Errorf("%w; wanted is a name, an absolute path, MAJOR:MINOR, mem:SIZE, null:SIZE or an NBD URI", err)
	}
	u, err := e.open(user)
	if err != nil {
		return dm.Lower{}, err
	}
	origin, _, _ := strings.Cut(name, "@")
	if o, err := h.daemon.names.origin(origin); err == nil && h.daemon.mappedSource(o) {
		e.release(u)
		return dm.Lower{}, api.Errorf(syscall.ELOOP, "%s is a clone of a mapped device, and might lie on itself by way of a table: "+
			"detach its source first", origin)
	}
	return dm.Lower{
		Lower: target.Lower{Device: e.device, Name: target.Name(name)}, Major: dm.Major, Minor: h.daemon.managedMinor(name),
		Close: func() error { e.release(u); return nil },
	}, nil
}

// Claim is dm.Host's.
func (h *mappedHost) Claim(name string) error {
	if strings.Contains(name, "@") {
		return api.Errorf(syscall.EINVAL, "the name %q is one of a snapshot: it has an @", name)
	}
	return h.daemon.names.claim(name)
}

// Unclaim is dm.Host's.
func (h *mappedHost) Unclaim(name string) { h.daemon.names.unclaim(name) }

var (
	_ dm.Host = (*mappedHost)(nil)
	_ leaf    = (*nbd.Device)(nil)
	_ leaf    = (*mem.Device)(nil)
)
