package dm

import (
	"context"

	"cowherd/block"
	"cowherd/target"
	"cowherd/trace"
)

// Trace has t told of the device's requests from now on; nil: nobody any more. It holds the device for as long as the
// requests in flight take, so that each request is traced from its beginning to its end or not at all; but one that a
// suspended device keeps when a trace ends is lost to it. If ctx ends first nothing has changed, and the error is ctx's.
// One caller at a time.
//
// A device that is not traced pays nothing: the target of one that is has a shell around it that is taken off again. A
// device that is traced does not let those above it past its gate, nor goes past the gates below.
func (d *Device) Trace(ctx context.Context, t *trace.Tracer) error {
	d.mu.Lock()
	before := d.tracer
	d.tracer = nil // what is held back from here on is traced only once it goes on
	d.mu.Unlock()
	if err := d.Hold(ctx); err != nil {
		d.mu.Lock()
		d.tracer = before
		d.mu.Unlock()
		return err
	}
	d.mu.Lock()
	l := d.live.Load().base
	l.watch(before, false)
	l.watch(t, true)
	d.tracer = t
	d.live.Store(l.tracedBy(t))
	d.mu.Unlock()
	d.Unhold()
	return nil
}

// watch has t told of the copies that the targets make, or no more. nil: nobody is.
func (l *live) watch(t *trace.Tracer, on bool) {
	if t == nil {
		return
	}
	each := func(x Target) {
		switch c, ok := x.(target.Copying); {
		case !ok:
		case on:
			c.Watch(t)
		default:
			c.Unwatch(t)
		}
	}
	x := l.target
	if shell, ok := x.(*traced); ok {
		x = shell.Target
	}
	if table, ok := x.(*Table); ok {
		for i := range table.rows {
			each(table.rows[i].target)
		}
		return
	}
	each(x)
}

// tracedBy is a live target as l, traced by t; nil: by nobody.
func (l *live) tracedBy(t *trace.Tracer) *live {
	x := *l
	x.base, x.direct, x.tracer = &x, direct{}, t
	if shell, ok := x.target.(*traced); ok {
		x.target = shell.Target
	}
	if t != nil {
		x.target = &traced{x.target, t}
	}
	return &x
}

// traced is a target in a shell that tells of its requests.
type traced struct {
	Target
	tracer *trace.Tracer
}

// Map tells of r, unless a device above is traced too, and tells of it.
func (x *traced) Map(r *block.Request) block.Device {
	switch r.Span().Tracer {
	case nil:
		x.tracer.Begin(r)
		r.Push((*traceEnd)(x.tracer))
	case x.tracer:
		r.Mark(block.StageAdmitted)
	default:
		return x.Target.Map(r)
	}
	to := x.Target.Map(r)
	if to != nil {
		r.Mark(block.StageIssued)
	}
	return to
}

// traceEnd is a Tracer as the Completer of the requests that it is told of.
type traceEnd trace.Tracer

// Complete tells of the end.
func (e *traceEnd) Complete(r *block.Request, err error) {
	(*trace.Tracer)(e).End(r, err)
	r.Complete(err)
}

// traceKept tells of a request that is held back.
//
// +checklocks:d.mu
func (d *Device) traceKept(r *block.Request) {
	if d.tracer != nil && r.Span().Tracer == nil {
		d.tracer.Begin(r)
		r.Push((*traceEnd)(d.tracer))
		r.Mark(block.StageHeld)
	}
}
