package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"cowherd/block"
)

const (
	// headSize is how many bytes of a range are looked at.
	headSize = block.RelayMin
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
//	Move           READ to the source, and waits
//	forwarder      the source has agreed on no structured replies, so an answer is 16 bytes and the data, the first bytes
//	               of which are received with the header
//	                 the caller wants it: the rest is received, the move is done
//	                 else WRITE and those first bytes to the destination, the rest by splice
//	acknowledger   reads the destination's answers; the move is done
//
// Several ranges are in flight, so that each server works on some while others are on the way. One relay is faster than
// several: two servers, the relay and its two sockets keep two CPUs busy, and what is on the way stays in their caches.
//
// It is an optimisation and nothing else. It knows no retries and does not come back: after any surprise it is broken,
// and all that is in flight goes the ordinary way, which knows what to do. That is told when both goroutines have ended,
// since they use the callers' memory, and when nothing is done late any more (see the package comment): writes that have
// been begun and not acknowledged are given up as a lost connection's are, the server hanging up first. A write that was
// acknowledged is accounted for with the ordinary ones: accountRelay in durable.go.
type relay struct {
	// device is the destination.
	device *Device // +checklocksignore: it never changes
	// made is how many reconnections of device there were before to was made.
	made    uint64 // +checklocksignore: it never changes
	from    relayEnd
	to      relayEnd
	ctx     context.Context
	stop    func() bool   // of what breaks it when ctx ends
	timeout time.Duration // for what is in flight; 0: for ever
	linger  time.Duration // the time that the destination has to hang up
	running sync.WaitGroup

	// The forwarder's.
	pipe    [2]int
	left    int64                       // bytes of the range that are still to come
	moved   int64                       // by one call of splice
	room    int64                       // for it
	head    [simpleSize + headSize]byte // an answer's header, and how the data begins
	request [requestSize + headSize]byte

	mu sync.Mutex
	// cookie is that of the last move.
	cookie uint64 // +checklocks:mu
	// moves are those in flight.
	moves map[uint64]*move // +checklocks:mu
	// broken is why nothing is moved any more; nil: it is.
	broken error // +checklocks:mu
}

// move is one range on its way. Its state changes under relay.mu.
type move struct {
	offset, length int64
	take           func(head []byte) []byte
	begun          bool // the destination has been sent some of it
	sent           bool // the destination has been sent all of it
	acknowledged   bool
	done           chan error
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
	r := &relay{
		device: d, ctx: ctx, made: d.reconnects.Load(), timeout: s.config.RequestTimeout, pipe: [2]int{-1, -1},
		linger: lingerLimit, moves: map[uint64]*move{},
	}
	if t := d.config.RequestTimeout; t > 0 && (r.timeout == 0 || t < r.timeout) {
		r.timeout = t
	}
	if err := r.open(ctx, s, d); err != nil {
		r.closeStreams()
		return nil, fmt.Errorf("relay from %s to %s: %w", s.config.URI(), d.config.URI(), err)
	}
	r.stop = context.AfterFunc(ctx, func() { r.fail(context.Cause(ctx)) })
	r.running.Go(r.run)
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

// errRelayClosed ends a relay in good order.
var errRelayClosed = errors.New("it is closed")

// run moves until the relay is broken, and ends it.
func (r *relay) run() {
	var both sync.WaitGroup
	both.Go(func() { r.fail(r.forwardAll()) })
	both.Go(func() { r.fail(r.acknowledgeAll()) })
	both.Wait()
	r.mu.Lock()
	moves, broken, begun := r.moves, r.broken, false
	r.moves = nil
	r.mu.Unlock()
	for _, m := range moves {
		begun = begun || m.begun
	}
	switch {
	case begun:
		r.abandon()
	case errors.Is(broken, errRelayClosed) && len(moves) == 0:
		hangUp(r.from.stream)
		hangUp(r.to.stream)
	}
	r.closeStreams()
	for _, m := range moves {
		m.done <- fmt.Errorf("relay: %w", broken)
	}
}

// fail breaks the relay, and ends all waiting for the servers.
func (r *relay) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.broken == nil {
		r.broken = err
		r.setDeadlineLocked(time.Unix(1, 0))
	}
}

// setDeadlineLocked sets a limit to all waiting for the servers. It fails only if a stream is closed, and nobody waits
// then.
//
// +checklocks:r.mu
func (r *relay) setDeadlineLocked(at time.Time) {
	_ = r.from.stream.SetDeadline(at)
	_ = r.to.stream.SetDeadline(at)
}

// Move moves a range. See block.Relay.
func (r *relay) Move(offset, length int64, take func(head []byte) []byte) error {
	if length < headSize {
		return fmt.Errorf("relay: a range of %d bytes: %w", length, syscall.EINVAL)
	}
	m := &move{offset: offset, length: length, take: take, done: make(chan error, 1)}
	r.mu.Lock()
	if err := r.broken; err != nil {
		r.mu.Unlock()
		return fmt.Errorf("relay: %w", err)
	}
	r.cookie++
	cookie := r.cookie
	r.moves[cookie] = m
	if r.timeout > 0 {
		r.setDeadlineLocked(time.Now().Add(r.timeout))
	}
	r.mu.Unlock()
	var b [requestSize]byte
	putRequest(&b, 0, cmdRead, cookie, uint64(offset), uint32(length))
	if _, err := r.from.stream.Write(b[:]); err != nil {
		r.fail(err)
	}
	return <-m.done
}

// idle tells whether err is only that the time is up that was set for moves that are done by now.
func (r *relay) idle(err error) bool {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.broken != nil || len(r.moves) > 0 {
		return false
	}
	r.setDeadlineLocked(time.Time{})
	return true
}

// answer reads the header of an answer, and as much of what follows as fits in b and is there. It returns how much it
// has read, and the move that is answered.
func (r *relay) answer(e *relayEnd, b []byte) (n int, cookie uint64, m *move, err error) {
	for {
		n, err = io.ReadAtLeast(e.stream, b, simpleSize) // an error comes without data
		if n > 0 || !r.idle(err) {
			break
		}
	}
	if err != nil {
		return n, 0, nil, err
	}
	if magic := binary.BigEndian.Uint32(b); magic != magicSimple {
		return n, 0, nil, violationf("a reply begins with %#x", magic)
	}
	reply := parseSimple(b)
	r.mu.Lock()
	m = r.moves[reply.cookie]
	good := m != nil && m.begun == (e == &r.to) && !m.acknowledged
	r.mu.Unlock()
	switch {
	case !good:
		return n, 0, nil, violationf("a reply to cookie %#x, which is not in flight", reply.cookie)
	case reply.code != 0:
		return n, 0, nil, &remoteError{errnoOf(reply.code), ""}
	}
	return n, reply.cookie, m, nil
}

// forwardAll is the forwarder.
func (r *relay) forwardAll() error {
	for {
		n, cookie, m, err := r.answer(&r.from, r.head[:])
		if err != nil {
			return err
		}
		if _, err := io.ReadFull(r.from.stream, r.head[n:]); err != nil {
			return err
		}
		if p := m.take(r.head[simpleSize:]); p != nil {
			copy(p, r.head[simpleSize:])
			if _, err := io.ReadFull(r.from.stream, p[headSize:m.length]); err != nil {
				return err
			}
			r.mu.Lock()
			delete(r.moves, cookie)
			r.mu.Unlock()
			m.done <- nil
			continue
		}
		if err := r.pass(cookie, m); err != nil {
			return err
		}
	}
}

// pass writes m, whose first bytes have come, to the destination.
func (r *relay) pass(cookie uint64, m *move) error {
	r.mu.Lock()
	m.begun = true
	r.mu.Unlock()
	putRequest((*[requestSize]byte)(r.request[:]), 0, cmdWrite, cookie, uint64(m.offset), uint32(m.length))
	copy(r.request[requestSize:], r.head[simpleSize:])
	if _, err := r.to.stream.Write(r.request[:]); err != nil {
		return err
	}
	r.left = m.length - headSize
	if err := r.forward(); err != nil {
		return err
	}
	r.mu.Lock()
	m.sent = true
	r.mu.Unlock()
	return r.settle(cookie, m)
}

// acknowledgeAll is the acknowledger.
func (r *relay) acknowledgeAll() error {
	var b [simpleSize]byte
	for {
		_, cookie, m, err := r.answer(&r.to, b[:])
		if err != nil {
			return err
		}
		r.mu.Lock()
		m.acknowledged = true
		r.mu.Unlock()
		if err := r.settle(cookie, m); err != nil {
			return err
		}
	}
}

// settle ends m if all of it has been sent and the destination has acknowledged it. It returns why that does not count.
func (r *relay) settle(cookie uint64, m *move) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.moves[cookie] != m || !m.sent || !m.acknowledged {
		return nil
	}
	if err := r.device.accountRelay(r.made); err != nil {
		return err
	}
	delete(r.moves, cookie)
	m.done <- nil // it has room
	return nil
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

// Close ends the relay. See block.Relay.
func (r *relay) Close() error {
	r.stop()
	r.fail(errRelayClosed)
	r.running.Wait()
	return nil
}

// closeStreams closes whatever is open. What a stream says that is given up matters to nobody.
func (r *relay) closeStreams() {
	for _, e := range []*relayEnd{&r.from, &r.to} {
		if e.stream != nil {
			_ = e.stream.Close()
		}
	}
	closePipe(r.pipe)
}

// abandon gives up writes that were begun. The server finds that nothing more comes, and has time to hang up, so that it
// does not do them after newer ones to the same ranges.
func (r *relay) abandon() {
	stream, limit := r.to.stream, r.linger
	if r.ctx.Err() != nil {
		limit = min(limit, abandonLimit)
	}
	_ = r.from.stream.Close()
	// What these say about a stream that is given up matters to nobody.
	if half, ok := stream.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
	}
	_ = stream.SetReadDeadline(time.Now().Add(limit))
	_, _ = io.Copy(io.Discard, stream)
}
