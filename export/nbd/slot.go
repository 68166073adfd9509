package nbd

import (
	"sync/atomic"

	"cowherd/block"
)

// The states of a slot whose request has been submitted by the connection's goroutine.
const (
	slotSubmitting uint32 = iota // the device's; the connection's goroutine is in Submit or has just left it
	slotApart                    // the device's; its completion goes to the sender
	slotCompleted                // done
)

// A slot is a request of a client on its way through the server.
//
// Who owns it:
//
//	connection's goroutine   from takeSlot to Submit
//	the device               from Submit to Complete
//	  completed in Submit    then the connection's goroutine again, which answers and uses the slot for the next one
//	  completed later        then the sender, which answers and retires it
//	a worker                 from dispatch on, if the device is slow or the request needs more than one device request;
//	                         then the device and the sender as above
//
// state decides between the two ways of a completion: the connection's goroutine, back from Submit, swaps
// submitting for apart, Complete swaps whatever is there for completed, and who comes second goes on with the slot.
type slot struct {
	req  block.Request
	conn *conn
	cmd  command
	next *slot // in a slotList

	state atomic.Uint32
	err   error // valid when completed

	data     *buffer // own payload memory; nil: none, or in place
	reply    []byte  // room for the reply in place, its header in front; or a whole reply made by a worker
	pinned   bool    // the payload lies in a buffer of the connection that must stay as it is
	answered bool    // by a worker, piece by piece

	// A large write is one slot, the parent, and one for each piece. The parent goes on when refs is zero: the goroutine
	// that makes the pieces holds one reference, each piece apart another.
	parent *slot
	refs   atomic.Int32
}

// Complete is called by the device.
func (s *slot) Complete(_ *block.Request, err error) {
	s.err = err
	if s.state.Swap(slotCompleted) == slotApart {
		s.conn.completed(s)
	}
}

// begin makes s stand for q, whatever it stood for before.
func (s *slot) begin(q *command) {
	s.cmd = *q
	s.state.Store(slotSubmitting)
	s.forget()
}

// clear makes s as good as new, so that nothing hangs on it while it is free.
func (s *slot) clear() {
	s.req.Reset()
	s.forget()
}

func (s *slot) forget() {
	s.err, s.data, s.reply, s.pinned, s.answered, s.parent = nil, nil, nil, false, false, nil
}

// slotList is a queue of slots, first in first out. A slot is in at most one.
type slotList struct {
	head, tail *slot
}

func (l *slotList) empty() bool { return l.head == nil }

func (l *slotList) push(s *slot) {
	s.next = nil
	if l.tail == nil {
		l.head = s
	} else {
		l.tail.next = s
	}
	l.tail = s
}

func (l *slotList) pop() *slot {
	s := l.head
	if s == nil {
		return nil
	}
	if l.head = s.next; l.head == nil {
		l.tail = nil
	}
	s.next = nil
	return s
}

// take returns all that l holds and leaves it empty.
func (l *slotList) take() slotList {
	t := *l
	*l = slotList{}
	return t
}
