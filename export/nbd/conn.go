package nbd

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"cowherd/block"
)

const (
	// inlineMax is the largest read or write in bytes that goes through the connection's own buffers, whole.
	inlineMax = 128 << 10
	inSize    = requestSize + inlineMax + 256<<10
	outSize   = 256 << 10
	// readSize is how many bytes are read at a time when nothing larger is known to come: enough requests to share the
	// call among, few enough to stay in a cache near the CPU until they have been worked off.
	readSize = 32 << 10

	// flushCount and flushBytes bound the replies kept back in the hope of more. A client that has got no reply for all
	// that it has in flight can do nothing meanwhile: half of a usual depth lets both sides work at the same time.
	flushCount = 16
	flushBytes = 64 << 10

	// workersMax bounds the goroutines of a connection that wait for slow devices and large requests.
	workersMax = 16

	// lateReadsMax bounds the reads after a stop: what has arrived by then is served, a busy client is not for ever.
	lateReadsMax = 64
)

var (
	errDisconnected = errors.New("nbd: the client disconnected")
	errStopped      = errors.New("nbd: the server ended the connection")
	errKilled       = errors.New("nbd: the server cut the connection")
	errBroken       = errors.New("nbd: the connection is broken")
	errOutOfStep    = errors.New("nbd: request with a wrong magic number")
)

// conn is the transmission phase of a connection. See the package comment for how it works.
type conn struct {
	server     *Server // +checklocksignore: set once
	id         uint64
	client     string
	since      time.Time
	encrypted  bool
	structured bool
	export     *Export
	contexts   []selectedContext
	device     block.Device
	queue      block.Queue
	foreground func(block.Queue) // nil: nobody is told of requests
	limits     block.Limits
	size       uint64 // bytes
	blockMask  uint64 // logical block - 1
	readOnly   bool
	allowed    [cmdCount]uint16 // flags of each command

	wire     wire
	stopping atomic.Bool // serve what has arrived, then end
	started  atomic.Int64
	pinned   atomic.Bool // a request apart uses memory of in or out
	pace     [paceCount]pace
	counters [cmdCount]counters
	// lookupBar is the time since the connection's start, in ns, before which no read looks for zeroes.
	lookupBar atomic.Int64

	// Of the connection's goroutine.
	in        []byte // in[head:tail] has been read and not been looked at
	head      int
	tail      int
	inHeld    bool   // the request that set pinned uses in
	inSpare   []byte // takes turns with in when it is held
	out       []byte // replies not sent yet
	outSpare  []byte
	unsent    int   // replies in out
	current   *slot // for the next request; may be nil
	lastApart bool  // the last small request was completed after Submit returned
	tick      uint  // submissions, for sampling
	lateReads int
	tallies   [cmdCount]tally
	idleFunc  func() error

	sendMu sync.Mutex // held while a reply is written: replies must not mix. Taken before mu, never after

	mu sync.Mutex
	// Told when: a slot or memory was given back, or broken was set.
	freed sync.Cond // +checklocksignore: its own methods lock
	// Told when: queued, or ended was set.
	todo sync.Cond // +checklocksignore: its own methods lock
	// Told when: finished, or ended was set.
	done   sync.Cond // +checklocksignore: its own methods lock
	broken bool      // +checklocks:mu
	// No helper is needed any more.
	ended bool // +checklocks:mu
	// Why broken was set.
	cause error // +checklocks:mu
	// Payload memory held.
	bytes int64 // +checklocks:mu
	// Free buffers.
	kept      [bufferClasses]*buffer // +checklocks:mu
	keptBytes int                    // +checklocks:mu
	free      slotList               // +checklocks:mu
	// Made so far.
	slots int // +checklocks:mu
	// Slots apart that were answered.
	retired int64 // +checklocks:mu
	// For the workers.
	queued  slotList // +checklocks:mu
	workers int      // +checklocks:mu
	// Workers without work.
	idlers int // +checklocks:mu
	// For the sender.
	finished slotList // +checklocks:mu

	helpers sync.WaitGroup // sender and workers
}

// newConn starts the transmission phase after the handshake n over first, the connection as it was accepted. On
// success it owns first and the export's reference, on failure neither.
func newConn(s *Server, n *negotiation, first net.Conn) (*conn, error) {
	e := n.export
	c := &conn{
		server: s, id: s.ids.Add(1), client: n.client, since: time.Now(), encrypted: n.encrypted,
		structured: n.structured, export: e, contexts: n.selectedContexts(),
		device: e.Device, queue: s.nextQueue(), foreground: s.config.Foreground, limits: e.Device.Limits(),
		size: uint64(e.size()), readOnly: e.readOnly(),
		in: make([]byte, inSize), out: make([]byte, 0, outSize),
	}
	c.blockMask = uint64(c.limits.LogicalBlock) - 1
	c.allowed = allowedFlags(n.structured)
	c.freed.L, c.todo.L, c.done.L = &c.mu, &c.mu, &c.mu
	c.idleFunc = c.idle
	sock, ok, err := takeSocket(first, c.idleFunc)
	if err != nil {
		return nil, err
	}
	c.wire = sock
	if !ok {
		c.wire = &stream{conn: first, idle: c.idleFunc}
	}
	if limit := s.config.WriteTimeout; limit > 0 {
		if err := c.wire.limitWrite(limit); err != nil {
			return nil, errors.Join(err, c.wire.Close())
		}
	}
	if n.relay != nil {
		n.relay.wire = c.wire
		c.wire = &session{wire: c.wire, tls: n.stream.(*tls.Conn)}
	}
	return c, nil
}

// run serves the connection to its end and gives back all that it holds. The error says why it ended; it is never nil.
func (c *conn) run() error {
	c.helpers.Add(1)
	go c.sendLoop()
	if _, ok := c.wire.(*socket); ok {
		// The goroutine waits in system calls: on a thread of its own it finds its way back to the same caches.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
	}
	err := c.serve()
	if c.stopping.Load() && !errors.Is(err, errOutOfStep) {
		err = errStopped
	}
	if flushErr := c.flush(); flushErr != nil {
		err = errors.Join(err, flushErr)
	}
	c.drain()
	c.mu.Lock()
	if c.cause != nil {
		err = c.cause
	}
	c.mu.Unlock()
	if closeErr := c.wire.Close(); closeErr != nil && !c.isBroken() && !errors.Is(closeErr, net.ErrClosed) {
		err = errors.Join(err, fmt.Errorf("close: %w", closeErr))
	}
	c.publish()
	c.export.release()
	return err
}

// drain waits until every request apart is answered, then ends the helpers.
func (c *conn) drain() {
	c.mu.Lock()
	for c.retired < c.started.Load() {
		c.freed.Wait()
	}
	c.ended = true
	c.todo.Broadcast()
	c.done.Broadcast()
	c.mu.Unlock()
	c.helpers.Wait()
}

// stop makes the connection end cleanly: what has arrived is served and answered.
func (c *conn) stop() {
	c.stopping.Store(true)
	c.wire.hangUp()
}

// kill ends the connection without waiting for the client.
func (c *conn) kill() { c.fail(errKilled) }

// fail marks the connection as broken: nothing more is sent, and who waits for the client or for memory stops to.
func (c *conn) fail(err error) {
	c.mu.Lock()
	if !c.broken {
		c.broken, c.cause = true, err
	}
	c.freed.Broadcast()
	c.mu.Unlock()
	c.wire.kill()
}

func (c *conn) isBroken() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.broken
}

// inFlight is the number of requests that went apart and have not been answered.
func (c *conn) inFlight() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return max(c.started.Load()-c.retired, 0)
}

// takeSlot gets a slot for the connection's goroutine; it waits for one while RequestsMax are in flight.
func (c *conn) takeSlot() (*slot, error) {
	if s := c.current; s != nil {
		c.current = nil
		return s, nil
	}
	if s := c.freeSlot(); s != nil {
		return s, nil
	}
	if err := c.flush(); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		if c.broken {
			return nil, errBroken
		}
		if s := c.free.pop(); s != nil {
			return s, nil
		}
		c.freed.Wait()
	}
}

// freeSlot is a slot if there is one now.
func (c *conn) freeSlot() *slot {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.free.pop()
	if s == nil && c.slots < max(c.server.config.RequestsMax, slotsMin) {
		c.slots++
		s = &slot{conn: c}
	}
	return s
}

// slotsMin is what a large write needs at least: one slot for itself, one for a piece.
const slotsMin = 2

// retire takes back what answered slots apart held.
func (c *conn) retire(l slotList) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := l.pop(); s != nil; s = l.pop() {
		if s.data != nil {
			c.releaseLocked(s.data)
		}
		if s.pinned {
			c.pinned.Store(false)
		}
		s.clear()
		c.free.push(s)
		c.retired++
	}
	c.freed.Broadcast()
}

// completed hands a slot apart to the sender.
func (c *conn) completed(s *slot) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.finished.empty() {
		c.done.Signal()
	}
	c.finished.push(s)
}

// dispatch hands a slot apart to the workers.
func (c *conn) dispatch(s *slot) {
	s.state.Store(slotApart)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queued.push(s)
	if c.idlers > 0 {
		c.todo.Signal()
	} else if c.workers < workersMax {
		c.workers++
		c.helpers.Add(1)
		go c.workLoop()
	}
}
