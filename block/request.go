package block

// A Completer is told when a request that it was pushed on is done. Complete is called exactly once for each Push,
// with no lock held, possibly before Submit returns and possibly on another goroutine. From the call on the request
// belongs to the Completer, which either keeps it (the outermost one: the submitter) or passes the result on by
// r.Complete(err).
type Completer interface {
	Complete(r *Request, err error)
}

// A Request is one operation on its way through a stack of devices.
//
//	submitter:  r := {Op, Queue, Offset, Length, Data}
//	            r.Push(submitter)               who is told at the end
//	            dev.Submit(r)                   r belongs to dev now
//	layer:      r.Push(layer)                   only if it must see the completion
//	            r.Offset += start               remapping is in place
//	            lower.Submit(r)
//	leaf:       does the I/O
//	            r.Complete(err)                 pops layer:     layer.Complete(r, err)
//	                                            which calls r.Complete(err), and so on up to the submitter
//
// Invariants:
//
//  1. A request has one owner at a time: the submitter before Submit and after its Complete, the device between.
//     Who does not own it must not read it either.
//  2. Every Push is answered by exactly one Complete, in reverse order. A completion too many panics.
//  3. Data belongs to the submitter and is borrowed by the device until completion: a device must not keep it, and
//     must not write to it unless Op is OpRead.
//  4. Offset and Length may be changed by the layers below; a submitter that needs them later keeps its own.
//
// The stack of completers is kept in the request, or beside it where it grew beyond hooksInline, and keeps its capacity:
// a reused Request never allocates. A Request must not be copied once it has been used.
type Request struct {
	Op     Op
	Flags  Flags
	Queue  Queue
	Offset int64  // bytes from the start of the device
	Length int64  // bytes; for OpRead and OpWrite equal to len(Data)
	Data   []byte // OpRead and OpWrite only

	link  *Request    // of the List or WaitList that holds the request; its owner's
	waker Waker       // who goes on when the request has waited
	hooks []Completer // innermost last

	inline [hooksInline]Completer // what hooks uses at first

	span Span // who traces it
}

// hooksInline is the depth of a stack of devices that needs no memory besides the request.
const hooksInline = 4

// End is the offset behind the request's last byte.
func (r *Request) End() int64 { return r.Offset + r.Length }

// Push makes c the next to be told of the completion, before all that were pushed earlier.
func (r *Request) Push(c Completer) {
	if r.hooks == nil {
		r.hooks = r.inline[:0]
	}
	r.hooks = append(r.hooks, c)
}

// Complete ends the request for the layer that calls it: the Completer pushed last is popped and told. The caller
// no longer owns the request.
func (r *Request) Complete(err error) {
	n := len(r.hooks) - 1
	if n < 0 {
		panic("block: a request was completed twice: " + r.Op.String())
	}
	c := r.hooks[n]
	r.hooks[n] = nil
	r.hooks = r.hooks[:n]
	c.Complete(r, err)
}

// SetWaker says who goes on with r after it has waited, for a holder other than a WaitList.
func (r *Request) SetWaker(waker Waker) { r.waker = waker }

// Wake hands r to the Waker that was set when it began to wait. The caller no longer owns r.
func (r *Request) Wake() {
	waker := r.waker
	r.waker = nil
	waker.Wake(r)
}

// Reset makes a request that has been completed as good as new, keeping its memory. It drops the reference to Data.
func (r *Request) Reset() {
	if len(r.hooks) != 0 || r.link != nil {
		panic("block: reset of a request in flight: " + r.Op.String())
	}
	hooks := r.hooks
	*r = Request{hooks: hooks}
}
