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
// A server that breaks the protocol or drops a connection ends the device: all that is in flight fails with EIO and
// the cause, on all connections, and so does every later request. A connection knows nothing of the Device but whom
// to tell of its end, and a request stays whole in its slot until it is answered: a Device that connects anew could
// give the slots' requests to the new connection instead of failing them.
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
// conn.mu is the only lock; nothing is called with it held.
package nbd

import (
	"context"
	"crypto/tls"
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
}

// A Device is an export of an NBD server. Requests of any length are taken and cut to what the server takes.
type Device struct {
	export  export
	limits  block.Limits
	conns   []*conn
	queries atomic.Uint32 // spreads block status over the connections
	running sync.WaitGroup
	closing time.Duration
}

var (
	_ block.Device       = (*Device)(nil)
	_ block.ExtentLister = (*Device)(nil)
)

// errClosed is what a request gets after Close.
var errClosed = fmt.Errorf("the NBD device is closed: %w", syscall.ESHUTDOWN)

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
	case len(c.Export) > stringMax:
		return nil, invalid("the export's name is longer than %d bytes", stringMax)
	case strings.ContainsRune(c.Export, 0):
		return nil, invalid("the export's name has a zero byte")
	}
	streams, exports, err := connect(ctx, c)
	if err != nil {
		return nil, err
	}
	d := &Device{export: exports[0], limits: exports[0].limits(), closing: closeLimit}
	for i, stream := range streams {
		d.conns = append(d.conns, newConn(stream, exports[i], d.ended))
	}
	for _, c := range d.conns {
		d.running.Go(c.run)
		d.running.Go(c.write)
	}
	return d, nil
}

// connect makes all connections, or none.
func connect(ctx context.Context, c *Config) (streams []net.Conn, exports []export, err error) {
	defer func() {
		if err != nil {
			for _, stream := range streams {
				hangUp(stream)
			}
		}
	}()
	for count := max(c.Connections, 1); len(streams) < count; {
		stream, e, err := dial(ctx, c)
		if err != nil {
			return streams, nil, err
		}
		streams, exports = append(streams, stream), append(exports, e)
		if !e.has(flagMultiConn) {
			count = 1
		}
		if first := exports[0]; e != first.with(e.context) {
			return streams, nil, violation("its connections disagree about the export")
		}
	}
	return streams, exports, nil
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

// ended is told when a connection has ended: the others follow it, unless that is what Close has asked for.
func (d *Device) ended(cause error) {
	if cause == errClosed {
		return
	}
	for _, c := range d.conns {
		c.follow(cause)
	}
}

// Size is the export's length in bytes, without a rest that is smaller than the server's minimum block.
func (d *Device) Size() int64 { return d.export.size }

// Limits are the server's, but for its maximum block: longer requests are cut.
func (d *Device) Limits() block.Limits { return d.limits }

// Connections is the number of connections.
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
	default:
		d.conns[int(r.Queue)%len(d.conns)].submit(r)
	}
}

// Close ends the connections and waits for all goroutines of the device. What is in flight is waited for, but no
// longer than ten seconds; then it fails with ESHUTDOWN, as requests do that are submitted later. It must not be
// called from a completion. It returns nil.
func (d *Device) Close() error {
	for _, c := range d.conns {
		c.retire(errClosed, d.closing)
	}
	d.running.Wait()
	return nil
}
