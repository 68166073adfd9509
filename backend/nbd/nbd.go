// Package nbd is a leaf device that is an export of an NBD server: a client of the protocol in pure Go.
//
// # Design
//
// A Device has one or more connections; a request goes over the one that its Queue picks, and its completion runs
// there. A connection has a table of 128 slots. A request in flight has a slot, and its cookie on the wire is the
// slot's index and a generation, so that a reply that nobody waits for is found out. Requests that find no slot wait
// in a list that is linked through them: it takes no memory and is as long as the submitters let it become.
//
//	Submit       slot free: load it, queue it to be sent;  none: the request waits
//	             nobody sends, and the reader is not busy: send
//	sender       takes up to 64 slots from the queue, writes headers and data with one sendmsg
//	             the socket is full: the writer goes on
//	reader       reads replies, data straight into the request's memory; an answered slot is settled:
//	             a next part is left (the request is longer than the server takes): queue it
//	             else the request is completed, and the slot goes to the next that waits
//	             before it waits for the server, it sends what its completions have submitted
//
// So in the steady state the reader does everything, with a read and a sendmsg for a batch of requests. Submit never
// waits for the server: it may be called by a completion, on the reader, which would wait for itself. Writing without
// waiting needs the socket; under TLS all writing is the writer's.
//
// A reply may come while the request is still being written out, as the server reads while the kernel takes the rest
// of the batch. The memory belongs to the sender until the batch is out, so the sender settles such a slot.
//
// # A connection is lost
//
// A request stays whole in its slot until it is answered, so what is in flight when a connection is lost goes over the
// next one, which the reader makes (reconnect.go):
//
//	lost         by an error of reading or writing, by silence (watch.go), by a server that says it shuts down
//	             new requests take the other connections; without one they wait in slots and list as ever
//	             silent or shutting down: only our half is closed, and what the server is at may end (linger)
//	reader       waits until nobody sends, connects with growing pauses, negotiates, compares the export with before
//	             every loaded slot begins again: a write with its first byte, a read where it was
//	the end      after Config.ReconnectTimeout, with another export, or by a broken protocol: all that is in flight
//	             fails with EIO and the cause, on all connections, and so does every later request
//
// Reads, writes, zeroes and trims may be done twice. What may not is to be done late: a server that is still at work on
// a request of a connection that it was told is closed, and does it after a newer one to the same range. The protocol
// has no word against it. That is why a silent server gets time to hang up by itself, which servers do when they are
// through; one that does not, and comes back to life later, is beyond help.
//
// # What a flush promises after a connection was lost
//
// A write that was acknowledged and not flushed may be gone if the server was killed, and a flush over the next
// connection does not bring it back. So such a flush fails with EIO, like an fsync, and so does every later write and
// flush (reads do not, and may show what was before), unless it is proven that the server kept its state
// (durable.go): nothing was unflushed, or the flush was answered on a connection that had been there all the time.
// Who knows better says so with Config.KeepsWrites.
//
// # Invariants
//
//  1. A request's memory is touched only while the request is in a slot: by the sender while the slot is in its batch,
//     by the reader while it is on the wire.
//  2. There is one sender at a time: who set conn.sending, or whom the output was handed to.
//  3. All lengths of the wire are checked before they are used. Nothing is allocated for a length that comes from the
//     wire but an answer to an option (64 KiB at most), error messages and extents (bounded lists).
//  4. A request is completed once: settled, or failed by the reader after the sender has stopped.
//
// # Lock order
//
//	conn.mu, relay.mu    never together
//	  Device.mu          is taken without the others, too
//
// Nothing is called with one of them held.
package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"cowherd/block"
	"cowherd/internal/invariant"
)

const (
	// connectionsMax bounds Config.Connections.
	connectionsMax = 64
	// closeLimit is the time that Close gives the server for what is in flight and for hanging up.
	closeLimit = 10 * time.Second
)

// Config says which export to open.
type Config struct {
	// Network and Address are what net.Dial takes: "tcp" and "host:port", or "unix" and a path.
	Network, Address string
	// Export is the export's name, at most 4096 bytes; "" is the server's default export.
	Export string
	// Connections is how many connections to open, at most 64. 0: one. Only one is opened when the server does not
	// say that several agree with each other.
	Connections int
	// TLS makes the client insist on TLS; nil: the connection is plain. It needs a ServerName, or InsecureSkipVerify.
	TLS *tls.Config

	// ReconnectTimeout is how long the server may be away, counted from the loss of a connection that had been of use,
	// before the device fails. 0: the first connection that is lost ends the device.
	ReconnectTimeout time.Duration
	// RequestTimeout is how long the server may let requests wait without a byte going either way; then the connection
	// counts as lost. It is kept to within a quarter. 0: for ever.
	RequestTimeout time.Duration
	// KeepsWrites says that what the server has acknowledged survives its end, flushed or not: it writes to the page
	// cache of a machine that stays up, say. Without it a flush fails when that is not certain.
	KeepsWrites bool
	// OnEvent, if not nil, is told what becomes of the connections. It is called by one of the device's goroutines with
	// no lock held, possibly by several at once; the connection in question waits for it. It must not call Close.
	OnEvent func(Event)
}

// A Device is an export of an NBD server. Requests of any length are taken and cut to what the server takes.
type Device struct {
	config   Config
	export   export // as it was at first
	limits   block.Limits
	conns    []*conn
	queries  atomic.Uint32 // spreads block status over the connections
	running  sync.WaitGroup
	closing  time.Duration
	pauseMax time.Duration
	ctx      context.Context // ends when no connection is to be made any more
	stop     context.CancelFunc

	reconnects atomic.Uint64
	relayed    atomic.Uint64         // acknowledgements to relays; changes under mu
	covered    atomic.Uint64         // acknowledgements that a flush has covered
	doubt      atomic.Pointer[error] // why nothing is written any more; nil: it is
	announced  atomic.Bool           // Config.OnEvent has been told of the doubt

	mu   sync.Mutex
	age  uint64 // +checklocks:mu
	last error  // +checklocks:mu
}

var (
	_ block.Device       = (*Device)(nil)
	_ block.ExtentLister = (*Device)(nil)
)

// errClosed is what a request gets after Close.
var errClosed error = closedError{}

type closedError struct{}

func (closedError) Error() string { return "the NBD device is closed: " + syscall.ESHUTDOWN.Error() }
func (closedError) Unwrap() error { return syscall.ESHUTDOWN }

// Open connects to a server and chooses the export. It fails with EINVAL for a bad configuration, ENOENT when there is
// no such export, EACCES when the server wants TLS and is not given it, the network's error, or one about a server
// that does not speak the protocol. ctx bounds connecting and the handshake, beside 30 seconds for each connection;
// the device does not depend on it afterwards.
func Open(ctx context.Context, c Config) (*Device, error) {
	d, err := open(ctx, &c)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", c.URI(), err)
	}
	return d, nil
}

func open(ctx context.Context, c *Config) (*Device, error) {
	switch {
	case c.Connections < 0 || c.Connections > connectionsMax:
		return nil, invalid("%d connections are not from 0 to %d", c.Connections, connectionsMax)
	case c.ReconnectTimeout < 0 || c.RequestTimeout < 0:
		return nil, invalid("a time limit is negative")
	case len(c.Export) > stringMax:
		return nil, invalid("the export's name is longer than %d bytes", stringMax)
	case strings.ContainsRune(c.Export, 0):
		return nil, invalid("the export's name has a zero byte")
	}
	streams, exports, err := connect(ctx, c)
	if err != nil {
		return nil, err
	}
	return newDevice(*c, streams, exports), nil
}

// newDevice makes a device of connections whose handshakes are done, and makes it go.
func newDevice(c Config, streams []net.Conn, exports []export) *Device {
	d := &Device{config: c, export: exports[0], limits: exports[0].limits(), closing: closeLimit, pauseMax: pauseMax}
	d.ctx, d.stop = context.WithCancel(context.Background())
	for i, stream := range streams {
		d.conns = append(d.conns, newConn(d, i, stream, exports[i]))
	}
	for _, c := range d.conns {
		d.running.Go(c.run)
		d.running.Go(c.write)
	}
	if c.RequestTimeout > 0 {
		d.running.Go(d.watch)
	}
	return d
}

// connect makes all connections, or none: the first one tells whether there may be more, which are made side by side then,
// so that it takes the time of two.
func connect(ctx context.Context, c *Config) (streams []net.Conn, exports []export, err error) {
	stream, first, err := dial(ctx, c)
	if err != nil {
		return nil, nil, err
	}
	count := 1
	if first.has(flagMultiConn) {
		count = max(c.Connections, 1)
	}
	streams, exports = make([]net.Conn, count), make([]export, count)
	streams[0], exports[0] = stream, first
	errs := make([]error, count)
	ctx, cancel := context.WithCancel(ctx) // one that fails ends the others
	defer cancel()
	var dialling sync.WaitGroup
	for i := 1; i < count; i++ {
		dialling.Go(func() {
			streams[i], exports[i], errs[i] = dial(ctx, c)
			if errs[i] == nil && first != exports[i].with(first.context) {
				errs[i] = violation("its connections disagree about the export")
			}
			if errs[i] != nil {
				cancel()
			}
		})
	}
	dialling.Wait()
	if err := firstCause(errs); err != nil {
		for _, stream := range streams {
			if stream != nil {
				hangUp(stream)
			}
		}
		return nil, nil, err
	}
	return streams, exports, nil
}

// firstCause is an error of errs that is not only the consequence of another; nil: there is none.
func firstCause(errs []error) (found error) {
	for _, err := range errs {
		if err != nil && (found == nil || errors.Is(found, context.Canceled)) {
			found = err
		}
	}
	return found
}

// hangUp ends a connection that no request has gone over. What comes of it matters to nobody.
func hangUp(stream net.Conn) {
	var bye [requestSize]byte
	putRequest(&bye, 0, cmdDisconnect, 0, 0, 0)
	_ = stream.SetDeadline(time.Now().Add(closeLimit))
	_, _ = stream.Write(bye[:])
	_ = stream.Close()
}

// with is e with another number for its context: each connection has its own.
func (e export) with(context uint32) export {
	e.context = context
	return e
}

func (e *export) limits() block.Limits {
	l := block.Limits{
		LogicalBlock: e.logicalBlock, PreferredIO: e.preferredIO, DiscardGranularity: int64(e.preferredIO),
		ReadOnly: e.has(flagReadOnly), NeedsFlush: e.has(flagFlush),
	}
	if e.has(flagTrim) {
		l.DiscardMax = math.MaxInt64
	}
	if e.has(flagWriteZeroes) {
		l.WriteZeroesMax = math.MaxInt64
	}
	return l
}

// ended is told when a connection has ended for good: the others follow it, unless that is what Close has asked for.
func (d *Device) ended(c *conn, cause error) {
	if cause == errClosed {
		return
	}
	first := d.ctx.Err() == nil
	for _, c := range d.conns {
		c.follow(cause)
	}
	d.stop()
	if first {
		d.tell(Event{Kind: DeviceFailed, Connection: c.index, Err: cause})
	}
}

// Size is the export's length in bytes, without a rest that is smaller than the server's minimum block.
func (d *Device) Size() int64 { return d.export.size }

// Limits are the server's, but for its maximum block: longer requests are cut.
func (d *Device) Limits() block.Limits { return d.limits }

// Connections is the number of connections, whether they are there at the moment or not.
func (d *Device) Connections() int { return len(d.conns) }

// Submit sends r to the server. It does not wait: r is completed by the goroutine that reads from its connection, as a
// rule. A write with FUA is followed by a flush where the server has no FUA.
func (d *Device) Submit(r *block.Request) {
	if invariant.Enabled {
		err := block.CheckRange(r, d.Size(), d.limits)
		invariant.Check(err == nil, "NBD device: %v", err)
	}
	e := &d.export
	switch {
	case r.Op == block.OpFlush && !e.has(flagFlush), r.Op != block.OpFlush && r.Length == 0:
		r.Complete(nil)
	case r.Op == block.OpWriteZeroes && r.Flags&block.Fast != 0 && !e.has(flagFastZero):
		r.Complete(block.NewError(r, syscall.ENOTSUP, "the NBD server does not tell whether it is fast"))
	case r.Op != block.OpRead && d.doubt.Load() != nil:
		r.Complete(block.WrapError(r, *d.doubt.Load()))
	default:
		d.pick(int(r.Queue)).submit(r)
	}
}

// pick chooses a connection: the same for the same number as long as that is there.
func (d *Device) pick(number int) *conn {
	first := number % len(d.conns)
	if c := d.conns[first]; c.live.Load() || len(d.conns) == 1 {
		return c
	}
	for i := range d.conns {
		if c := d.conns[(first+i)%len(d.conns)]; c.live.Load() {
			return c
		}
	}
	return d.conns[first]
}

// Close ends the connections and waits for all goroutines of the device. What is in flight is waited for, but no
// longer than ten seconds, and not at all while the server is away; then it fails with ESHUTDOWN, as requests do that
// are submitted later. It must not be called from a completion. It returns nil.
func (d *Device) Close() error {
	for _, c := range d.conns {
		c.retire(errClosed, d.closing)
	}
	d.stop()
	d.running.Wait()
	return nil
}
