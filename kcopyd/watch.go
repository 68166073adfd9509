package kcopyd

import (
	"slices"
	"sync"
	"sync/atomic"
)

// A Watcher is told of jobs, on the goroutine that begins or ends them. It must not wait.
type Watcher interface {
	// CopyBegan is told of a job that begins.
	CopyBegan(j *Job) Watch
	// CopyEnded is told before the job's Done is called, with what CopyBegan gave.
	CopyEnded(j *Job, w Watch)
}

// Watch is what a Watcher remembers of a job.
type Watch struct {
	At  int64  // when it began, by the Watcher's clock
	CPU uint16 // where
}

// watchers are an engine's. A job is asked once, as it begins, whether there are any; a change makes a new list.
type watchers struct {
	list atomic.Pointer[[]Watcher] // nil: nobody watches
	mu   sync.Mutex                // of who changes list
}

// jobWatch is a job's part of it.
type jobWatch struct {
	by    []Watcher
	watch []Watch
}

// Watch has w told of every job that begins from now on. See Engine.
func (c *core) Watch(w Watcher) {
	c.watchers.change(func(list []Watcher) []Watcher { return append(list, w) })
}

// Unwatch undoes one Watch. See Engine.
func (c *core) Unwatch(w Watcher) {
	c.watchers.change(func(list []Watcher) []Watcher {
		if i := slices.Index(list, w); i >= 0 {
			return slices.Delete(list, i, i+1)
		}
		return list
	})
}

// change replaces the list.
func (x *watchers) change(change func([]Watcher) []Watcher) {
	x.mu.Lock()
	defer x.mu.Unlock()
	var list []Watcher
	if old := x.list.Load(); old != nil {
		list = slices.Clone(*old)
	}
	if list = change(list); len(list) == 0 {
		x.list.Store(nil)
		return
	}
	x.list.Store(&list)
}

// watch tells all of j, which begins.
func watch(list []Watcher, j *Job) *jobWatch {
	w := &jobWatch{by: list, watch: make([]Watch, len(list))}
	for i, by := range list {
		w.watch[i] = by.CopyBegan(j)
	}
	return w
}

// end tells them of its end.
func (w *jobWatch) end(j *Job) {
	j.state.watched = nil
	for i, by := range w.by {
		by.CopyEnded(j, w.watch[i])
	}
}
