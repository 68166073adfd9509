package kcopyd

import "sync/atomic"

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

// watcher is where an engine keeps its Watcher. A job is asked once whether there is one.
type watcher struct{ atomic.Pointer[watching] }

type watching struct{ by Watcher }

// watched is a job's part of it.
type watched struct {
	by    Watcher
	watch Watch
}

// Watch has w told of every job from now on. See Engine.
func (c *core) Watch(w Watcher) {
	if w == nil {
		c.watcher.Store(nil)
		return
	}
	c.watcher.Store(&watching{w})
}

// watch begins to watch j.
func (w *watching) watch(j *Job) *watched { return &watched{w.by, w.by.CopyBegan(j)} }

// end ends it.
func (w *watched) end(j *Job) {
	j.state.watched = nil
	w.by.CopyEnded(j, w.watch)
}
