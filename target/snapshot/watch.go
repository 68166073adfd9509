package snapshot

import (
	"slices"

	"cowherd/kcopyd"
	"cowherd/target"
)

var (
	_ target.Copying = (*Origin)(nil)
	_ target.Copying = (*Snapshot)(nil)
	_ target.Copying = (*Merge)(nil)
	_ target.Copying = memberTarget{}
	_ target.Passer  = (*Origin)(nil)
)

// Watch has w told of the copies that are made for the origin's snapshots, those to come included.
func (o *Origin) Watch(w kcopyd.Watcher) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.watchers = append(o.watchers, w)
	for _, s := range o.Snapshots() {
		s.Watch(w)
	}
}

// Unwatch undoes one Watch.
func (o *Origin) Unwatch(w kcopyd.Watcher) {
	o.mu.Lock()
	defer o.mu.Unlock()
	i := slices.Index(o.watchers, w)
	if i < 0 {
		return
	}
	o.watchers = slices.Delete(o.watchers, i, i+1)
	for _, s := range o.Snapshots() {
		s.Unwatch(w)
	}
}

// Watch has w told of the copies that are made for the snapshot.
func (s *Snapshot) Watch(w kcopyd.Watcher) { s.engine.Watch(w) }

// Unwatch undoes one Watch.
func (s *Snapshot) Unwatch(w kcopyd.Watcher) { s.engine.Unwatch(w) }

// Watch has w told of the copies that are made for the snapshot that is merged, the merge's own included.
func (m *Merge) Watch(w kcopyd.Watcher) { m.snapshot.Watch(w) }

// Unwatch undoes one Watch.
func (m *Merge) Unwatch(w kcopyd.Watcher) { m.snapshot.Unwatch(w) }

// Watch has w told of the copies for the snapshot in the table.
func (t memberTarget) Watch(w kcopyd.Watcher) {
	if e := t.engine(); e != nil {
		e.Watch(w)
	}
}

// Unwatch undoes one Watch, unless the snapshot has been handed over since.
func (t memberTarget) Unwatch(w kcopyd.Watcher) {
	if e := t.engine(); e != nil {
		e.Unwatch(w)
	}
}

// engine is the member's; nil: it has none yet, or it was handed over.
func (m *member) engine() kcopyd.Engine {
	m.family.mu.Lock()
	defer m.family.mu.Unlock()
	if m.core == nil {
		return nil
	}
	return m.core.engine
}
