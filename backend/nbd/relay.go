package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
	"time"

	"cowherd/block"
)

const (
	// headSize is how many bytes of a range are looked at, in bytes.
	headSize = 4096
	// pipeSize is the size of a relay's pipe that is asked for, in bytes. What the kernel gives does.
	pipeSize = 256 << 10
	// relayDialLimit is the time that a server has to let another connection in. One that is out of connections does not
	// say so: it leaves it waiting.
	relayDialLimit = time.Second
	// abandonLimit is the time that a server has to hang up when nobody wants to wait any more.
	abandonLimit = time.Second
)

// A relay moves data from one server to another through the kernel: from a socket to a pipe, and on to a socket, by
// splice(2), which hands pages on where reading and writing would copy them twice. It has a connection of its own to
// each server, so that what comes is known without being looked for:
//
//	Begin      READ to the source. It has agreed on no structured replies, so the answer is 16 bytes and the data,
//	           the first bytes of which are received with the header
//	Pass       WRITE and those first bytes to the destination, then the rest by splice; the acknowledgement is read
//	Take       the rest is received, for who wants to have it in memory
//
// One range at a time: while a server works on one, others are on the way in other relays. That is simpler than to have
// several in flight here, and was as fast.
//
// It is an optimisation and nothing else. It knows no retries and does not come back: after any surprise it is broken,
// and the range goes the ordinary way, which knows what to do. Nothing is done late (see the package comment): a write
// that has been begun and not acknowledged is given up as a lost connection's is, the server hanging up first. A write
// that was acknowledged is accounted for with the ordinary ones: accountRelay in durable.go.
type relay struct {
	from, to relayEnd
	device   *Device // the destination
	made     uint64  // how many reconnections of device there were before to was made
	ctx      context.Context
	stop     func() bool // of what breaks it when ctx ends
	pipe     [2]int
	timeout  time.Duration // of a range; 0: none

	cookie  uint64
	offset  int64
	left    int64                       // bytes of the range behind the head
	head    [simpleSize + headSize]byte // the answer's header and how the data begins
	headLen int                         // of the data
	request [requestSize + headSize]byte
	written bool // a write has been begun, and not been acknowledged
	broken  bool
	closed  bool
	moved   int64 // by one call of splice
	room    int64 // for it
}

// relayEnd is one connection of a relay.
type relayEnd struct {
	stream net.Conn
	raw    syscall.RawConn
	err    error                 // of the last call of step
	step   func(fd uintptr) bool // made once, so that none is made for each call
}

var _ block.Relayer = (*Device)(nil)

// OpenRelay makes a relay from source, an export of some server, over connections of its own. It fails with ENOTSUP unless
// both servers say that several connections agree with each other, both are reached by plain sockets, and both take so
// long requests. A server that does not let another connection in within a second is given up.
func (d *Device) OpenRelay(ctx context.Context, source block.Device, length int64) (block.Relay, error) {
	s, ok := source.(*Device)
	if !ok || !s.relays(length) || !d.relays(length) || d.limits.ReadOnly {
		return nil, fmt.Errorf("no relay for this pair: %w", syscall.ENOTSUP)
	}
	r := &relay{device: d, ctx: ctx, made: d.reconnects.Load(), timeout: s.config.RequestTimeout, pipe: [2]int{-1, -1}}
	if t := d.config.RequestTimeout; t > 0 && (r.timeout == 0 || t < r.timeout) {
		r.timeout = t
	}
	if err := r.open(ctx, s, d); err != nil {
		return nil, errors.Join(fmt.Errorf("relay from %s to %s: %w", s.config.URI(), d.config.URI(), err), r.Close())
	}
	return r, nil
}

// relays tells whether d may be an end of a relay of ranges of length bytes.
func (d *Device) relays(length int64) bool {
	return d.config.TLS == nil && d.export.has(flagMultiConn) && d.export.partMax >= length
}

func (r *relay) open(ctx context.Context, s, d *Device) (err error) {
	dialling, cancel := context.WithTimeout(ctx, relayDialLimit)
	defer cancel()
	if err = r.from.dial(dialling, s, true); err == nil {
		err = r.to.dial(dialling, d, false)
	}
	if err == nil {
		r.pipe, err = newPipe(pipeSize)
	}
	if err != nil {
		return err
	}
	r.from.step, r.to.step = r.spliceIn, r.spliceOut
	r.stop = context.AfterFunc(ctx, r.interrupt)
	return nil
}

// dial connects to the server of d. simple: no structured replies are agreed on.
func (e *relayEnd) dial(ctx context.Context, d *Device, simple bool) error {
	stream, export, err := dialAs(ctx, &d.config, simple)
	if err != nil {
		return err
	}
	e.stream = stream
	if err := export.replaces(&d.export, 2); err != nil {
		return err
	}
	plain, ok := stream.(syscall.Conn)
	if !ok {
		return fmt.Errorf("no plain socket: %w", syscall.ENOTSUP)
	}
	e.raw, err = plain.SyscallConn()
	return err
}

// interrupt ends all waiting, for good.
func (r *relay) interrupt() {
	past := time.Unix(1, 0)
	_ = r.from.stream.SetDeadline(past) // it fails only if the stream is closed, and nobody waits then
	_ = r.to.stream.SetDeadline(past)
}

// limit gives both servers the time of a range from now on.
func (r *relay) limit() error {
	if r.timeout > 0 {
		deadline := time.Now().Add(r.timeout)
		if err := errors.Join(r.from.stream.SetDeadline(deadline), r.to.stream.SetDeadline(deadline)); err != nil {
			return err
		}
	}
	if r.ctx.Err() != nil { // perhaps the deadlines have undone what interrupt has done
		return context.Cause(r.ctx)
	}
	return nil
}

// failed breaks the relay if err is an error.
func (r *relay) failed(err error) error {
	if err == nil {
		return nil
	}
	r.broken = true
	return fmt.Errorf("relay: %w", err)
}

// Begin asks for a range. See block.Relay.
func (r *relay) Begin(offset, length int64) (head []byte, err error) {
	return r.head[simpleSize : simpleSize+min(length, headSize)], r.failed(r.begin(offset, length))
}

func (r *relay) begin(offset, length int64) error {
	if err := r.limit(); err != nil {
		return err
	}
	r.cookie++
	r.offset, r.headLen = offset, int(min(length, headSize))
	r.left = length - int64(r.headLen)
	header := (*[requestSize]byte)(r.request[:])
	putRequest(header, 0, cmdRead, r.cookie, uint64(offset), uint32(length))
	if _, err := r.from.stream.Write(header[:]); err != nil {
		return err
	}
	want := r.head[:simpleSize+r.headLen]
	n, err := io.ReadAtLeast(r.from.stream, want, simpleSize) // an error comes without data
	if err != nil {
		return err
	}
	if err := r.check(want); err != nil {
		return err
	}
	_, err = io.ReadFull(r.from.stream, want[n:])
	return err
}

// check looks at the header of an answer.
func (r *relay) check(b []byte) error {
	if magic := binary.BigEndian.Uint32(b); magic != magicSimple {
		return violationf("a reply begins with %#x", magic)
	}
	reply := parseSimple(b)
	switch {
	case reply.cookie != r.cookie:
		return violationf("a reply to cookie %#x, which is not in flight", reply.cookie)
	case reply.code != 0:
		return &remoteError{errnoOf(reply.code), ""}
	}
	return nil
}

// Take receives the range. See block.Relay.
func (r *relay) Take(p []byte) error {
	n := copy(p, r.head[simpleSize:simpleSize+r.headLen])
	_, err := io.ReadFull(r.from.stream, p[n:])
	r.left = 0
	return r.failed(err)
}

// Pass writes the range. See block.Relay.
func (r *relay) Pass() error { return r.failed(r.pass()) }

func (r *relay) pass() error {
	length := r.left + int64(r.headLen)
	putRequest((*[requestSize]byte)(r.request[:]), 0, cmdWrite, r.cookie, uint64(r.offset), uint32(length))
	copy(r.request[requestSize:], r.head[simpleSize:simpleSize+r.headLen])
	r.written = true
	if _, err := r.to.stream.Write(r.request[:requestSize+r.headLen]); err != nil {
		return err
	}
	if err := r.forward(); err != nil {
		return err
	}
	answer := r.head[:simpleSize]
	if _, err := io.ReadFull(r.to.stream, answer); err != nil {
		return err
	}
	if err := r.check(answer); err != nil {
		return err
	}
	r.written = false
	return r.device.accountRelay(r.made)
}

// forward moves what is left of the range.
func (r *relay) forward() error {
	for r.left > 0 {
		if err := r.from.raw.Read(r.from.step); err != nil {
			return err
		}
		if r.from.err != nil {
			return r.from.err
		}
		r.left -= r.moved
		for r.room = r.moved; r.room > 0; r.room -= r.moved {
			if err := r.to.raw.Write(r.to.step); err != nil {
				return err
			}
			if r.to.err != nil {
				return r.to.err
			}
		}
	}
	return nil
}

// spliceIn fills the pipe, which is empty. It is false when it is to be called again as soon as there is something.
func (r *relay) spliceIn(fd uintptr) bool {
	r.moved, r.from.err = splice(int(fd), r.pipe[1], r.left, false)
	if r.moved == 0 && r.from.err == nil {
		r.from.err = io.ErrUnexpectedEOF
	}
	return !errors.Is(r.from.err, syscall.EAGAIN)
}

// spliceOut empties the pipe, which holds room bytes. It is false when it is to be called again as soon as the socket
// takes more.
func (r *relay) spliceOut(fd uintptr) bool {
	r.moved, r.to.err = splice(r.pipe[0], int(fd), r.room, r.left > 0)
	if r.moved == 0 && r.to.err == nil {
		r.to.err = io.ErrUnexpectedEOF
	}
	return !errors.Is(r.to.err, syscall.EAGAIN)
}

// Close ends the relay: in good order, unless it is broken. See block.Relay.
func (r *relay) Close() error {
	if r.closed {
		return nil
	}
	r.closed = true
	if r.stop != nil {
		r.stop() // what it stops may be running
	}
	for _, e := range []*relayEnd{&r.from, &r.to} {
		switch {
		case e.stream == nil:
		case !r.broken:
			hangUp(e.stream)
		case e == &r.to && r.written:
			r.abandon()
		default:
			_ = e.stream.Close() // what it says about a stream that is given up matters to nobody
		}
	}
	closePipe(r.pipe)
	return nil
}

// abandon gives up a write that was begun. The server finds that nothing more comes, and has time to hang up, so that it
// does not do the write after a newer one to the same range.
func (r *relay) abandon() {
	stream, limit := r.to.stream, lingerLimit
	if r.ctx.Err() != nil {
		limit = abandonLimit
	}
	// What these say about a stream that is given up matters to nobody.
	if half, ok := stream.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
	_ = stream.SetReadDeadline(time.Now().Add(limit))
	_, _ = io.Copy(io.Discard, stream)
	_ = stream.Close()
}
