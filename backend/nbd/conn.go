package nbd

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
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

// conn is one connection in its transmission phase, and all that follow it when it is lost: the reader puts a new stream
// in the old one's place while nobody sends. Of what its lock guards:
//
//	up        the stream is good, as far as is known; it never is while the reader looks for another
//	lost      why up became false
//	free      a stack of indices of free slots
//	queue     a ring of indices of slots to be sent, from queueAt on
//	waiting   requests without a slot; empty while one is free
//	inflight  requests and queries accepted and not yet delivered
//	sending   somebody owns the output
//	idle      tells that sending has become false after up did
//	corked    the reader delivers replies, and will send what is queued when it is through
//	cause     why no request is accepted any more; nil: they are
//	goodbye   nothing is in flight and never will be: the server is to be told
//	silent    how many times in a row the watch has found requests and no sign of life
type conn struct {
	device   *Device
	index    int
	export   export          // changes with the stream
	stream   net.Conn        // changes under mu while nobody sends; the reader and the sender need no lock to look at it
	raw      syscall.RawConn // of stream; nil: it can only be written to with waiting (TLS)
	in       *bufio.Reader   // the reader's
	held     bool            // the reader's copy of corked
	patience                 // the reader's
	out      output          // the sender's: who set sending
	wake     chan struct{}   // hands the output to the writer; closed when the connection has ended for good
	status   chan struct{}   // holds a token while statusSlot is taken

	heard atomic.Bool   // bytes have gone one way or the other since the watch has looked
	live  atomic.Bool   // new requests are welcome; lags behind up
	acked atomic.Uint64 // requests that wrote without FUA and were answered; changes under mu
	born  atomic.Uint64 // the count of all connections' when this one was made or lost its word; see durable.go
	age   atomic.Uint64 // the larger the younger; changes under Device.mu

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
	up       bool              // +checklocks:mu
	lost     error             // +checklocks:mu
	silent   int               // +checklocks:mu
}

// newConn makes a connection of a stream whose handshake is done. run makes it go.
func newConn(d *Device, index int, stream net.Conn, e export) *conn {
	c := &conn{
		device: d, index: index, export: e,
		wake: make(chan struct{}, 1), status: make(chan struct{}, 1), freeLen: depth, up: true,
	}
	c.idle.L = &c.mu
	c.in = bufio.NewReaderSize((*input)(c), inputSize)
	c.setStream(stream)
	c.live.Store(true)
	for i := range c.slots {
		c.slots[i].index = uint16(i)
	}
	for i := range c.free {
		c.free[i] = uint16(i)
	}
	c.out.init(c)
	return c
}

// setStream makes stream the connection's. Nobody sends, and the caller is the reader, or has the connection alone.
func (c *conn) setStream(stream net.Conn) {
	c.stream, c.raw = stream, nil
	if s, ok := stream.(syscall.Conn); ok {
		if raw, err := s.SyscallConn(); err == nil {
			c.raw = raw
		}
	}
}

// input is what the input buffer reads from: the stream, noting signs of life.
type input conn

func (c *input) Read(p []byte) (int, error) {
	n, err := c.stream.Read(p)
	if n > 0 {
		(*conn)(c).sign()
	}
	return n, err
}

// sign notes that the server has sent or taken something.
func (c *conn) sign() {
	if !c.heard.Load() {
		c.heard.Store(true)
	}
}

// submit takes a request of the device.
func (c *conn) submit(r *block.Request) {
	c.mu.Lock()
	if r.Op == block.OpFlush && c.device.reconnects.Load() > 0 {
		// Looked for under the lock, so that the oldest is still the oldest when the request is in its hands.
		if witness := c.device.witness(c); witness != c {
			c.mu.Unlock()
			witness.submit(r)
			return
		}
	}
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
	c.loadLocked(s, r)
	c.enqueueLocked(s)
	start := c.startLocked()
	c.mu.Unlock()
	if start {
		c.kick()
	}
}

// loadLocked puts a request in a slot.
//
// +checklocks:c.mu
func (c *conn) loadLocked(s *slot, r *block.Request) {
	s.load(&c.export, r)
	if r.Op == block.OpFlush {
		s.acked = c.device.acked()
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
	if s.request != nil && s.err == nil {
		s.err = c.accountLocked(s)
	}
	o := outcome{s.request, s.query, s.err}
	c.releaseLocked(s)
	if c.inflight == 0 && c.cause != nil {
		c.goodbye = true
	}
	return o
}

// releaseLocked empties a slot and gives it to the next request that waits for one.
//
// +checklocks:c.mu
func (c *conn) releaseLocked(s *slot) {
	s.request, s.query, s.err, s.state = nil, nil, nil, slotFree
	c.inflight--
	if s.index == statusSlot {
		return
	}
	if r := c.waiting.PopFront(); r != nil {
		c.loadLocked(s, r)
		c.enqueueLocked(s)
		return
	}
	c.free[c.freeLen] = s.index
	c.freeLen++
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
	start, stream := c.startLocked(), c.stream
	c.mu.Unlock()
	_ = stream.SetDeadline(time.Now().Add(limit)) // fails only if the stream is closed, and needs no limit then
	if start {
		c.kick()
	}
}

// follow makes the connection end at once and for good, with the cause of another connection, or this one's.
func (c *conn) follow(cause error) {
	c.mu.Lock()
	if c.cause == nil {
		c.cause = cause
	}
	stream := c.stream
	c.mu.Unlock()
	_ = stream.Close() // what it says about a stream that is given up matters to nobody
}

// lose notes that the stream is no good any more. It is false when that was known.
func (c *conn) lose(cause error) bool {
	c.mu.Lock()
	first := c.up
	if first {
		c.up, c.lost = false, cause
	}
	c.mu.Unlock()
	if first {
		c.device.forsake(c, cause)
	}
	return first
}

// linger loses the stream, but lets the server end what it is at: it finds that nothing more comes, and has lingerLimit
// to hang up. Replies to reads still count.
func (c *conn) linger(cause error) {
	if c.device.config.ReconnectTimeout == 0 {
		c.follow(broken(cause))
		return
	}
	if !c.lose(cause) {
		return
	}
	c.mu.Lock()
	stream := c.stream
	c.mu.Unlock()
	// What these say about a stream that is given up matters to nobody.
	_ = stream.SetWriteDeadline(time.Unix(1, 0)) // who is sending gives up
	_ = stream.SetReadDeadline(time.Now().Add(lingerLimit))
	if secure, ok := stream.(*tls.Conn); ok {
		stream = secure.NetConn()
	}
	if half, ok := stream.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
}

// broken is the error of every request of a connection that has ended before its time: EIO, whatever the cause.
func broken(cause error) error {
	return fmt.Errorf("the connection to the NBD server is lost: %w", &lost{cause})
}

// lost hides the errno of a cause behind EIO.
type lost struct{ cause error }

func (l *lost) Error() string   { return l.cause.Error() }
func (l *lost) Unwrap() []error { return []error{syscall.EIO, l.cause} }

// run is the reader: it owns the connection's streams and its end. It returns when no request is in flight and no
// goroutine of the connection is left but the writer, which ends by itself.
func (c *conn) run() {
	for {
		c.lose(describe(c.receive()))
		_ = c.stream.Close() // what it says about a stream that is given up matters to nobody
		c.mu.Lock()
		for c.sending {
			c.idle.Wait()
		}
		cause, lost := c.cause, c.lost
		c.mu.Unlock()
		if cause == nil {
			cause = c.reconnect(lost)
		}
		if cause != nil {
			c.end(cause)
			return
		}
	}
}

// end ends the connection for good. Nobody sends any more, as the stream is lost.
func (c *conn) end(cause error) {
	c.mu.Lock()
	if c.cause == nil {
		c.cause = cause // from here on no request is accepted
	}
	cause = c.cause
	c.mu.Unlock()
	close(c.wake)
	c.device.ended(c, cause)
	c.failAll(cause)
}

// failAll delivers cause to all that is in flight. The output is idle and the reader has stopped reading, so the
// requests' data is nobody's.
func (c *conn) failAll(cause error) {
	for i := range c.slots {
		c.mu.Lock()
		s := &c.slots[i]
		o := outcome{s.request, s.query, cause}
		if s.state != slotFree {
			c.inflight--
		}
		s.request, s.query, s.state = nil, nil, slotFree
		c.mu.Unlock()
		o.deliver()
	}
	c.mu.Lock()
	waiting := c.waiting.Take()
	c.inflight -= waiting.Len()
	c.mu.Unlock()
	for r := waiting.PopFront(); r != nil; r = waiting.PopFront() {
		r.Complete(block.WrapError(r, cause))
	}
}
