package snapshot

import (
	"sync"
	"sync/atomic"

	"cowherd/block"
)

// fan is a request split in parts; it completes when all parts have, with the first error. Fans and parts are pooled;
// how many are in use is bounded by the requests in flight, which whoever submits them bounds.
type fan struct {
	parent *block.Request
	left   atomic.Int32 // parts in flight, and one while parts are added
	err    atomic.Pointer[error]
}

// part is a piece of a fan's request.
type part struct {
	r block.Request
	f *fan
}

var (
	fans  = sync.Pool{New: func() any { return new(fan) }}
	parts = sync.Pool{New: func() any { return new(part) }}
)

// newFan takes r. The caller adds parts, submits each, and calls done once.
func newFan(r *block.Request) *fan {
	f := fans.Get().(*fan)
	f.parent = r
	f.left.Store(1)
	return f
}

// part is a new request for length bytes at offset, in the parent's coordinates, ready to be submitted.
func (f *fan) part(offset, length int64) *part {
	p := parts.Get().(*part)
	p.f = f
	p.r.Op, p.r.Flags, p.r.Queue = f.parent.Op, f.parent.Flags, f.parent.Queue
	p.r.Offset, p.r.Length = offset, length
	if f.parent.Data != nil {
		at := offset - f.parent.Offset
		p.r.Data = f.parent.Data[at : at+length : at+length]
	}
	p.r.Push(p)
	f.left.Add(1)
	return p
}

// Complete ends a part.
func (p *part) Complete(_ *block.Request, err error) {
	f := p.f
	p.f = nil
	p.r.Reset()
	parts.Put(p)
	f.done(err)
}

// fail keeps the first error. It is apart from done so that done allocates nothing.
func (f *fan) fail(err error) { f.err.CompareAndSwap(nil, &err) }

// done counts a part off, or the caller that added them.
func (f *fan) done(err error) {
	if err != nil {
		f.fail(err)
	}
	if f.left.Add(-1) > 0 {
		return
	}
	parent := f.parent
	var first error
	if p := f.err.Load(); p != nil {
		first = *p
	}
	f.parent = nil
	f.err.Store(nil)
	fans.Put(f)
	parent.Complete(first)
}
