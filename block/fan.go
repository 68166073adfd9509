package block

import (
	"sync"
	"sync/atomic"
)

// Fan is a request split in parts: it completes when all parts have, with the first error that one of them met. Fans
// and parts are pooled; how many are in use is bounded by the requests in flight, which whoever submits them bounds.
//
//	f := NewFan(r)                    r is the fan's
//	d.Submit(f.Part(offset, length))  any number of times; each part may complete at once
//	f.Done(nil)                       no part follows
type Fan struct {
	parent *Request
	left   atomic.Int32 // parts in flight, and one while parts are added
	err    atomic.Pointer[error]
}

// part is a piece of a fan's request.
type part struct {
	r Request
	f *Fan
}

var (
	fans  = sync.Pool{New: func() any { return new(Fan) }}
	parts = sync.Pool{New: func() any { return new(part) }}
)

// NewFan takes r. The caller adds parts, submits each, and calls Done once.
func NewFan(r *Request) *Fan {
	f := fans.Get().(*Fan)
	f.parent = r
	f.left.Store(1)
	return f
}

// Part is a new request for length bytes at offset, in the parent's coordinates, with the parent's operation, flags,
// queue, span and piece of Data. The caller may change it, and submits it once.
func (f *Fan) Part(offset, length int64) *Request {
	p := parts.Get().(*part)
	p.f = f
	p.r.Op, p.r.Flags, p.r.Queue = f.parent.Op, f.parent.Flags, f.parent.Queue
	p.r.Offset, p.r.Length = offset, length
	p.r.span = f.parent.span
	if f.parent.Data != nil {
		at := offset - f.parent.Offset
		p.r.Data = f.parent.Data[at : at+length : at+length]
	}
	p.r.Push(p)
	f.left.Add(1)
	return &p.r
}

// Complete ends a part.
func (p *part) Complete(_ *Request, err error) {
	f := p.f
	p.f = nil
	p.r.Reset()
	parts.Put(p)
	f.Done(err)
}

// Done counts a part off, or the caller that added them. After that the caller must not use the fan.
func (f *Fan) Done(err error) {
	if err != nil {
		first := err // a copy: err itself would be allocated in every call
		f.err.CompareAndSwap(nil, &first)
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
