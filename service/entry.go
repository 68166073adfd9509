package service

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"cowherd/api"
	"cowherd/dm"
)

// entryState is where a name is in its life. See the package comment.
type entryState uint8

const (
	opening entryState = iota
	live
	closing
	gone
)

// entry is a name that clients can open: what origins and snapshots have in common.
type entry struct {
	name   string
	device *dm.Device // set before the entry is live
	since  time.Time  // set before the entry is live
	bus    *bus
	paused atomic.Bool // somebody has suspended the device by itself

	mu sync.Mutex
	// +checklocks:mu
	state entryState
	// +checklocks:mu
	users []*user // in the order of their coming
	// +checklocks:mu
	empty chan struct{} // not nil: closed when the last user has gone
}

// user is a client that has an entry open.
type user struct {
	client string
}

// isGone tells whether the entry is at its end.
func (e *entry) isGone() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.state == gone
}

// isListed tells whether people are to see the entry.
func (e *entry) isListed() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.state == live || e.state == closing
}

// set moves the entry on.
func (e *entry) set(state entryState) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.state = state
}

// open counts client in. ENOENT: the entry is not live.
func (e *entry) open(client string) (*user, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.state != live {
		return nil, noDevice(e.name)
	}
	u := &user{client: client}
	e.users = append(e.users, u)
	e.bus.publish(api.Event{Type: api.EventClientConnected, Name: e.name, Client: client})
	return u, nil
}

// release counts u off.
func (e *entry) release(u *user) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.users = slices.DeleteFunc(e.users, func(x *user) bool { return x == u })
	e.bus.publish(api.Event{Type: api.EventClientDisconnected, Name: e.name, Client: u.client})
	if len(e.users) == 0 && e.empty != nil {
		close(e.empty)
		e.empty = nil
	}
}

// shut lets nobody in any more, unless there are users and force is not given: that is EBUSY, names them, and changes
// nothing. If there are users, empty is closed when the last of them has gone.
func (e *entry) shut(force bool) (empty <-chan struct{}, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.users) > 0 {
		if e.empty == nil {
			e.empty = make(chan struct{})
		}
		empty = e.empty
		if !force {
			return empty, api.Errorf(syscall.EBUSY, "%s is in use by %s", e.name, e.whoLocked())
		}
	}
	e.state = closing
	return empty, nil
}

// reopen undoes shut.
func (e *entry) reopen() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.state = live
}

// userCount is how many clients have the entry open.
func (e *entry) userCount() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.users)
}

// usersShown is how many users a message names.
const usersShown = 5

// whoLocked names the users.
// +checklocks:e.mu
func (e *entry) whoLocked() string {
	var who []string
	for _, u := range e.users[:min(len(e.users), usersShown)] {
		who = append(who, u.client)
	}
	if more := len(e.users) - len(who); more > 0 {
		who = append(who, fmt.Sprintf("%d more", more))
	}
	return strings.Join(who, ", ")
}

func noDevice(name string) error { return api.Errorf(syscall.ENOENT, "there is no device %q", name) }
