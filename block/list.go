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

// closed is what the head of a closed WaitList points to.
var closed = new(Request)

// WaitList is where requests wait for one thing that happens once: any number of goroutines Add, one closes. Lock
// free. The zero value is open and empty.
type WaitList struct {
	head atomic.Pointer[Request]
}

// Add hands r to the list. It is false, and r stays the caller's, when the list is closed: what the request would
// have waited for has happened.
func (w *WaitList) Add(r *Request) bool {
	for {
		head := w.head.Load()
		if head == closed {
			return false
		}
		r.link = head
		if w.head.CompareAndSwap(head, r) {
			return true
		}
		r.link = nil
	}
}

// Close closes the list and returns what waited in it, oldest first; the requests are the caller's.
func (w *WaitList) Close() List {
	r := w.head.Swap(closed)
	if r == closed {
		return List{}
	}
	return reversed(r)
}

// Open makes a closed list accept requests again. Nobody else may change the list meanwhile.
func (w *WaitList) Open() { w.head.Store(nil) }

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
