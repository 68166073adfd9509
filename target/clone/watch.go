package clone

import (
	"cowherd/kcopyd"
	"cowherd/target"
)

var (
	_ target.Copying = (*Clone)(nil)
	_ target.Copying = (*tableClone)(nil)
	_ target.Passer  = (*Clone)(nil)
	_ target.Passer  = (*tableClone)(nil)
)

// Watch has w told of the copies that are made for the clone, hydration included.
func (c *Clone) Watch(w kcopyd.Watcher) { c.engine.Watch(w) }

// Unwatch undoes one Watch.
func (c *Clone) Unwatch(w kcopyd.Watcher) { c.engine.Unwatch(w) }

// Watch has w told of the copies of the clone in the table, if it is open.
func (t *tableClone) Watch(w kcopyd.Watcher) {
	if t.engine != nil {
		t.engine.Watch(w)
	}
}

// Unwatch undoes one Watch.
func (t *tableClone) Unwatch(w kcopyd.Watcher) {
	if t.engine != nil {
		t.engine.Unwatch(w)
	}
}
