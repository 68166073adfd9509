package dm

import (
	"context"

	"cowherd/block"
	"cowherd/trace"
)

// Trace has t told of the device's requests from now on; nil: nobody any more. It holds the device for as long as the
// requests in flight take, so that each request is traced from its beginning to its end or not at all. If ctx ends first
// nothing has changed, and the error is ctx's.
//
// A device that is not traced pays nothing: the target of one that is has a shell around it that is taken off again. A
// device that is traced does not let those above it past its gate, nor goes past the gates below.
func (d *Device) Trace(ctx context.Context, t *trace.Tracer) error {
	if err := d.Hold(ctx); err != nil {
		return err
	}
	d.mu.Lock()
	d.tracer = t
	d.live.Store(d.live.Load().base.tracedBy(t))
	d.mu.Unlock()
	d.Unhold()
	return nil
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
