package block

import "sync/atomic"

// List is a queue of requests, first in first out, linked through the requests themselves: it never allocates. A
// request is in at most one list, and the list's holder owns it. The zero value is empty. Not safe for concurrent use.
type List struct {
	head, tail *Request
	count      int
}

// Len is the number of requests in the list.
func (l *List) Len() int { return l.count }

// PushBack appends r.
func (l *List) PushBack(r *Request) {
	r.link = nil
	if l.tail == nil {
		l.head = r
	} else {
		l.tail.link = r
	}
	l.tail = r
	l.count++
}

// PopFront removes the oldest request; nil when the list is empty.
func (l *List) PopFront() *Request {
	r := l.head
	if r == nil {
		return nil
	}
	l.head = r.link
	if l.head == nil {
		l.tail = nil
	}
	r.link = nil
	l.count--
	return r
}

// Take returns all that l holds and leaves it empty.
func (l *List) Take() List {
	t := *l
	*l = List{}
	return t
}

// A Waker goes on with a request that has waited for something: the layer that made it wait.
type Waker interface {
	Wake(r *Request)
}

// WaitList is where requests wait for something to happen: any number of goroutines add, and whoever makes it happen
// takes them all. Lock-free. The zero value is empty.
//
// Who adds must look once more, afterwards, whether it has happened meanwhile, and if so take the list itself; who
// makes it happen must do so before it takes the list. One of the two then finds the request.
type WaitList struct {
	head atomic.Pointer[Request] // newest first
}

// Add hands r to the list; who takes it is to call r.Wake, which goes on with waker.
func (w *WaitList) Add(r *Request, waker Waker) {
	r.waker = waker
	for {
		head := w.head.Load()
		r.link = head
		if w.head.CompareAndSwap(head, r) {
			return
		}
	}
}

// Take empties the list and returns what was in it, oldest first; the requests are the caller's.
func (w *WaitList) Take() List {
	if w.head.Load() == nil {
		return List{}
	}
	return reversed(w.head.Swap(nil))
}

// reversed turns a chain, newest first, into a List, oldest first.
func reversed(r *Request) List {
	var l List
	l.tail = r
	var newer *Request
	for r != nil {
		older := r.link
		r.link = newer
		newer, r = r, older
		l.count++
	}
	l.head = newer
	return l
}
