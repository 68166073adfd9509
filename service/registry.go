package service

import (
	"maps"
	"slices"
	"strings"
	"sync"
	"syscall"

	"cowherd/api"
)

// devicesMax bounds the origins and snapshots of a daemon together.
const devicesMax = 1024

// registry is all names, and the files in use.
type registry struct {
	mu sync.Mutex
	// +checklocks:mu
	origins map[string]*origin
	// +checklocks:mu
	held map[fileID]string // files in use, and the name of the device that has each
	// +checklocks:mu
	shared map[fileID]int // how many read a file that nobody writes
	// +checklocks:mu
	count int // origins and snapshots
	// +checklocks:mu
	closed bool // nothing is added any more
	// +checklocks:mu
	mapped map[string]bool // names of mapped devices
	// Minor numbers of what was attached and of snapshots, for the device mapper's tools.
	// +checklocks:mu
	minors map[string]uint32
	// +checklocks:mu
	lastMinor uint32
}

// add takes o's name. EEXIST: it is taken.
func (g *registry) add(o *origin) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.origins[o.name] != nil {
		return api.Errorf(syscall.EEXIST, "there is a device %q already", o.name)
	}
	if g.mapped[o.name] {
		return api.Errorf(syscall.EEXIST, "there is a mapped device %q", o.name)
	}
	if err := g.reserveLocked(); err != nil {
		return err
	}
	g.origins[o.name] = o
	return nil
}

// remove gives o's name up.
func (g *registry) remove(o *origin) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.origins, o.name)
	g.count--
}

// claim takes a name for a mapped device. EBUSY: it is taken.
func (g *registry) claim(name string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.origins[name] != nil || g.mapped[name] {
		return api.Errorf(syscall.EBUSY, "there is a device %q already", name)
	}
	if g.closed {
		return api.Errorf(syscall.ESHUTDOWN, "the daemon is stopping")
	}
	g.mapped[name] = true
	return nil
}

// unclaim gives it back.
func (g *registry) unclaim(name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.mapped, name)
}

// reserve counts one more snapshot, to be given back by unreserve.
func (g *registry) reserve() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.reserveLocked()
}

// +checklocks:g.mu
func (g *registry) reserveLocked() error {
	if g.closed {
		return api.Errorf(syscall.ESHUTDOWN, "the daemon is stopping")
	}
	if g.count >= devicesMax {
		return api.Errorf(syscall.ENOSPC, "there are %d devices and snapshots: more are not taken", g.count)
	}
	g.count++
	return nil
}

func (g *registry) unreserve() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.count--
}

// close lets nothing be added any more.
func (g *registry) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
}

// origin finds an origin, whatever its state.
func (g *registry) origin(name string) (*origin, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if o := g.origins[name]; o != nil {
		return o, nil
	}
	return nil, noDevice(name)
}

// all is every origin, by name, whatever its state.
func (g *registry) all() []*origin {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.SortedFunc(maps.Values(g.origins), func(a, b *origin) int { return strings.Compare(a.name, b.name) })
}

// hold notes that user has the file id. EBUSY: another one has.
func (g *registry) hold(id fileID, user, path string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if holder, ok := g.held[id]; ok {
		return api.Errorf(syscall.EBUSY, "%s is in use by device %q of this daemon", path, holder)
	}
	if g.shared[id] > 0 {
		return api.Errorf(syscall.EBUSY, "%s is in use by this daemon as the source of %d clones", path, g.shared[id])
	}
	g.held[id] = user
	return nil
}

// share notes that one more reads the file id, which nobody may write. EBUSY: somebody may.
func (g *registry) share(id fileID, path string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if holder, ok := g.held[id]; ok {
		return api.Errorf(syscall.EBUSY, "%s is in use by device %q of this daemon", path, holder)
	}
	if g.shared == nil {
		g.shared = map[fileID]int{}
	}
	g.shared[id]++
	return nil
}

// unshare undoes share.
func (g *registry) unshare(id fileID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.shared[id]--; g.shared[id] == 0 {
		delete(g.shared, id)
	}
}

// letGo undoes hold.
func (g *registry) letGo(id fileID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.held, id)
}
