package nbd

import (
	"bufio"
	"fmt"
	"net"
	"sync"
	"syscall"
	"time"

	"cowherd/block"
)

const (
	// depth is the number of requests that a connection has in flight; the others wait.
	depth = 128
	// statusSlot is the index of the slot that is kept for block status.
	statusSlot = depth
	// inputSize is the size of the input buffer in bytes: some dozen replies to reads of 4 KiB.
	inputSize = 128 << 10
)

// conn is one connection in its transmission phase. Of what its lock guards:
//
//	free      a stack of indices of free slots
//	queue     a ring of indices of slots to be sent, from queueAt on
//	waiting   requests without a slot; empty while one is free
//	inflight  requests and queries accepted and not yet delivered
//	sending   somebody owns the output
//	idle      tells that sending has become false after cause was set
//	corked    the reader delivers replies, and will send what is queued when it is through
//	cause     why no request is accepted any more; nil: they are
//	goodbye   nothing is in flight and never will be: the server is to be told
type conn struct {
	export export
	stream net.Conn
	raw    syscall.RawConn // nil: the stream can only be written to with waiting (TLS)
	in     *bufio.Reader   // the reader's
	held   bool            // the reader's copy of corked
	out    output          // the sender's: who set sending
	wake   chan struct{}   // hands the output to the writer; closed when the connection has ended
	status chan struct{}   // holds a token while statusSlot is taken
	ended  func(error)     // told once why the connection has ended, before the requests in flight are failed

	mu    sync.Mutex
	slots [depth + 1]slot // who owns what of a slot is told by its state
	idle  sync.Cond       // +checklocks:mu

	free     [depth]uint16     // +checklocks:mu
	freeLen  int               // +checklocks:mu
	queue    [depth + 1]uint16 // +checklocks:mu
	queueAt  int               // +checklocks:mu
	queueLen int               // +checklocks:mu
	waiting  block.List        // +checklocks:mu
	inflight int               // +checklocks:mu
	sending  bool              // +checklocks:mu
	corked   bool              // +checklocks:mu
	cause    error             // +checklocks:mu
	goodbye  bool              // +checklocks:mu
}

// newConn makes a connection of a stream whose handshake is done. run makes it go.
func newConn(stream net.Conn, e export, ended func(error)) *conn {
	c := &conn{
		export: e, stream: stream, ended: ended, in: bufio.NewReaderSize(stream, inputSize),
		wake: make(chan struct{}, 1), status: make(chan struct{}, 1), freeLen: depth,
	}
	c.idle.L = &c.mu
	for i := range c.slots {
		c.slots[i].index = uint16(i)
	}
	for i := range c.free {
		c.free[i] = uint16(i)
	}
	if s, ok := stream.(syscall.Conn); ok {
		if raw, err := s.SyscallConn(); err == nil {
			c.raw = raw
		}
	}
	c.out.init(c)
	return c
}

// submit takes a request of the device.
func (c *conn) submit(r *block.Request) {
	c.mu.Lock()
	if c.cause != nil {
		err := c.cause
		c.mu.Unlock()
		r.Complete(block.WrapError(r, err))
		return
	}
	c.inflight++
	if c.freeLen == 0 {
		c.waiting.PushBack(r)
		c.mu.Unlock()
		return
	}
	c.freeLen--
	s := &c.slots[c.free[c.freeLen]]
	s.load(&c.export, r)
	c.enqueueLocked(s)
	start := c.startLocked()
	c.mu.Unlock()
	if start {
		c.kick()
	}
}

// enqueueLocked puts a slot that is loaded in the queue of those to send.
//
// +checklocks:c.mu
func (c *conn) enqueueLocked(s *slot) {
	s.state = slotQueued
	c.queue[(c.queueAt+c.queueLen)%len(c.queue)] = s.index
	c.queueLen++
}

// dequeueLocked takes the oldest slot out of the queue, which is not empty.
//
// +checklocks:c.mu
func (c *conn) dequeueLocked() *slot {
	s := &c.slots[c.queue[c.queueAt]]
	c.queueAt = (c.queueAt + 1) % len(c.queue)
	c.queueLen--
	return s
}

// settleLocked goes on with a slot whose part has been answered, or failed: with the request's next part, or, when
// there is none, with the next request that waits for a slot. What is done is the outcome's.
//
// +checklocks:c.mu
func (c *conn) settleLocked(s *slot) outcome {
	if s.request != nil && s.err == nil && s.advance(&c.export) {
		c.enqueueLocked(s)
		return outcome{}
	}
	o := outcome{s.request, s.query, s.err}
	s.request, s.query, s.err, s.state = nil, nil, nil, slotFree
	c.inflight--
	if s.index != statusSlot {
		if r := c.waiting.PopFront(); r != nil {
			s.load(&c.export, r)
			c.enqueueLocked(s)
		} else {
			c.free[c.freeLen] = s.index
			c.freeLen++
		}
	}
	if c.inflight == 0 && c.cause != nil {
		c.goodbye = true
	}
	return o
}

// retire makes the connection end in good order: no request is accepted any more, and when all that were are done, the
// server is told. After the limit it ends at once.
func (c *conn) retire(cause error, limit time.Duration) {
	c.mu.Lock()
	if c.cause != nil {
		c.mu.Unlock()
		return
	}
	c.cause = cause
	c.goodbye = c.inflight == 0
	start := c.startLocked()
	c.mu.Unlock()
	_ = c.stream.SetDeadline(time.Now().Add(limit)) // fails only if the stream is closed, and needs no limit then
	if start {
		c.kick()
	}
}

// abort makes the connection end at once: the reader fails what is in flight.
func (c *conn) abort(cause error) { c.follow(broken(cause)) }

// follow is abort with the cause of another connection, or this one's.
func (c *conn) follow(cause error) {
	c.mu.Lock()
	if c.cause == nil {
		c.cause = cause
	}
	c.mu.Unlock()
	_ = c.stream.Close() // what it says about a stream that is given up matters to nobody
}

// broken is the error of every request of a connection that has ended before its time: EIO, whatever the cause.
func broken(cause error) error {
	return fmt.Errorf("the connection to the NBD server is lost: %w", &lost{cause})
}

// lost hides the errno of a cause behind EIO.
type lost struct{ cause error }

func (l *lost) Error() string   { return l.cause.Error() }
func (l *lost) Unwrap() []error { return []error{syscall.EIO, l.cause} }

// run is the reader: it owns the connection's end. It returns when no request is in flight and no goroutine of the
// connection is left but the writer, which ends by itself.
func (c *conn) run() {
	c.abort(describe(c.receive()))
	c.mu.Lock()
	for c.sending {
		c.idle.Wait()
	}
	cause := c.cause
	c.mu.Unlock()
	close(c.wake) // nobody begins to send any more: with a cause set, nothing is queued by submit
	c.ended(cause)
	c.failAll(cause)
}

// failAll delivers cause to all that is in flight. The output is idle and the reader has stopped reading, so the
// requests' data is nobody's.
func (c *conn) failAll(cause error) {
	for i := range c.slots {
		c.mu.Lock()
		s := &c.slots[i]
		o := outcome{s.request, s.query, cause}
		s.request, s.query, s.state = nil, nil, slotFree
		c.mu.Unlock()
		o.deliver()
	}
	c.mu.Lock()
	waiting := c.waiting.Take()
	c.inflight = 0
	c.mu.Unlock()
	for r := waiting.PopFront(); r != nil; r = waiting.PopFront() {
		r.Complete(block.WrapError(r, cause))
	}
}
