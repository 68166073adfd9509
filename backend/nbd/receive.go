package nbd

import (
	"cowherd/internal/invariant"
	"encoding/binary"
	"errors"
	"io"
	"syscall"
	"time"
)

const (
	// errorPayloadMax is the largest payload of an error that is read: its fields and the longest message, with room
	// for fields to come.
	errorPayloadMax = 2 * stringMax
	// statusPayloadMax is the largest payload of a block status that is read, in bytes; more is a hostile server.
	statusPayloadMax = 64 << 20
	// lingerLimit is the time that a server that is shutting down, or that has been silent, has for what is in flight.
	lingerLimit = 10 * time.Second
)

// receive reads replies until the stream ends or the server breaks the protocol.
func (c *conn) receive() error {
	for {
		head, err := c.peek(simpleSize)
		if err != nil {
			return err
		}
		switch magic := binary.BigEndian.Uint32(head); {
		case magic == magicSimple:
			reply := parseSimple(head)
			if err := c.discard(simpleSize); err != nil {
				return err
			}
			err = c.simple(reply)
		case magic == magicStructured && c.export.structured:
			err = c.structured()
		default:
			err = violationf("a reply begins with %#x", magic)
		}
		if err != nil {
			return err
		}
	}
}

// beforeWait sends what has been held back if the next n bytes may have to be waited for.
func (c *conn) beforeWait(n int) {
	if !c.held || c.in.Buffered() >= n {
		return
	}
	c.held = false
	c.mu.Lock()
	c.corked = false
	start := c.startLocked()
	c.mu.Unlock()
	if start {
		c.kick()
	}
}

// peek gives the next n bytes without taking them.
func (c *conn) peek(n int) ([]byte, error) {
	c.beforeWait(n)
	b, err := c.in.Peek(n)
	if err == io.EOF && len(b) > 0 {
		err = io.ErrUnexpectedEOF
	}
	return b, err
}

func (c *conn) discard(n int) error {
	c.beforeWait(n)
	_, err := c.in.Discard(n)
	return err
}

func (c *conn) read(p []byte) error {
	c.beforeWait(len(p))
	_, err := io.ReadFull(c.in, p)
	invariant.Crossing()
	return err
}

// find is the slot of a part that is on the wire.
func (c *conn) find(cookie uint64) (*slot, error) {
	index := cookie & 0xffff
	if index >= uint64(len(c.slots)) {
		return nil, violationf("a reply to cookie %#x, which was never sent", cookie)
	}
	s := &c.slots[index]
	c.mu.Lock()
	good := (s.state == slotSent || s.state == slotSending) && s.cookie() == cookie
	c.mu.Unlock()
	if !good {
		return nil, violationf("a reply to cookie %#x, which is not in flight", cookie)
	}
	return s, nil
}

// answered ends the part of s, whose last reply has been read.
func (c *conn) answered(s *slot) {
	shutdown := errors.Is(s.err, syscall.ESHUTDOWN)
	again := c.device.config.ReconnectTimeout > 0
	c.held = true
	c.mu.Lock()
	c.corked = true
	var done outcome
	switch {
	case again && c.cause == nil && shutdown, c.tooLateLocked(s):
		// It goes over the next connection.
	case s.state == slotSending:
		s.state = slotAnswered // the sender still reads its memory
	default:
		done = c.settleLocked(s)
	}
	c.mu.Unlock()
	c.device.announce(c)
	done.deliver()
	c.productive = true
	switch {
	case shutdown && again:
		c.linger(errShuttingDown)
	case shutdown:
		c.retire(broken(errShuttingDown), lingerLimit)
	}
}

// tooLateLocked tells whether an answer to s is not listened to: an acknowledgement of a connection that is lost comes
// too late for durable.go, whoever settles it, and is done again over the next one.
//
// +checklocks:c.mu
func (c *conn) tooLateLocked(s *slot) bool {
	again := c.device.config.ReconnectTimeout > 0 && c.cause == nil
	return again && !c.up && s.command != cmdRead && s.command != cmdBlockStatus
}

// errShuttingDown is the end of a connection by a server that says so in time.
var errShuttingDown = errors.New("it is shutting down")

// simple deals with a simple reply, whose header has been taken.
func (c *conn) simple(reply simpleReply) error {
	s, err := c.find(reply.cookie)
	if err != nil {
		return err
	}
	isRead := s.command == cmdRead
	if s.command == cmdBlockStatus || isRead && c.export.structured {
		return violationf("a simple reply to command %d", s.command)
	}
	if reply.code != 0 {
		s.fail(reply.code, "")
	} else if isRead {
		if err := c.read(s.data()); err != nil {
			return err
		}
	}
	c.answered(s)
	return nil
}

// structured deals with a chunk of a structured reply, which is next in the input.
func (c *conn) structured() error {
	head, err := c.peek(structuredSize)
	if err != nil {
		return err
	}
	h := parseChunk(head)
	if err := c.discard(structuredSize); err != nil {
		return err
	}
	s, err := c.find(h.cookie)
	if err != nil {
		return err
	}
	switch {
	case h.kind == chunkNone && h.length == 0 && h.flags&replyFlagDone != 0:
	case h.kind == chunkData && s.command == cmdRead:
		err = c.dataChunk(s, h)
	case h.kind == chunkHole && s.command == cmdRead:
		err = c.holeChunk(s, h)
	case h.kind == chunkStatus && s.command == cmdBlockStatus:
		err = c.statusChunk(s.query, h)
	case h.kind&chunkErrorBit != 0:
		err = c.errorChunk(s, h)
	default:
		err = violationf("a chunk of type %d, flags %#x and %d bytes to command %d", h.kind, h.flags, h.length, s.command)
	}
	if err != nil || h.flags&replyFlagDone == 0 {
		return err
	}
	return c.finish(s)
}

// finish ends a structured reply: one without an error must be whole.
func (c *conn) finish(s *slot) error {
	switch {
	case s.err != nil:
	case s.command == cmdRead && !s.covered.full(s.length):
		return violationf("of a read of %d bytes some never came", s.length)
	case s.command == cmdBlockStatus && !s.query.told:
		return violation("a block status without an extent")
	}
	c.answered(s)
	return nil
}

// place takes the offset of a content chunk, in bytes from the start of the export, and notes that length bytes from
// there have come. It gives the place in the part's data where they belong.
func (s *slot) place(offset uint64, length uint32) ([]byte, error) {
	start := offset - uint64(s.offset) // wraps around for an offset that is too small, and is too large then
	if length == 0 || start > uint64(s.length) || uint64(length) > uint64(s.length)-start {
		return nil, violationf("%d bytes at offset %d in reply to a read of %d bytes at offset %d",
			length, offset, s.length, s.offset)
	}
	if !s.covered.add(int64(start), int64(start)+int64(length)) {
		return nil, violationf("bytes at offset %d came twice, or in more than %d pieces out of order", offset, scatteredMax)
	}
	return s.data()[start : start+uint64(length)], nil
}

// dataChunk: offset 8 | data.
func (c *conn) dataChunk(s *slot, h chunk) error {
	if h.length <= 8 {
		return violationf("a data chunk of %d bytes", h.length)
	}
	head, err := c.peek(8)
	if err != nil {
		return err
	}
	p, err := s.place(binary.BigEndian.Uint64(head), h.length-8)
	if err != nil {
		return err
	}
	if err := c.discard(8); err != nil {
		return err
	}
	return c.read(p)
}

// holeChunk: offset 8 | length 4.
func (c *conn) holeChunk(s *slot, h chunk) error {
	if h.length != 12 {
		return violationf("a hole chunk of %d bytes", h.length)
	}
	head, err := c.peek(12)
	if err != nil {
		return err
	}
	p, err := s.place(binary.BigEndian.Uint64(head), binary.BigEndian.Uint32(head[8:]))
	if err != nil {
		return err
	}
	clear(p)
	return c.discard(12)
}

// errorChunk: error 4 | message length 2 | message | whatever the type adds.
func (c *conn) errorChunk(s *slot, h chunk) error {
	if h.length < 6 || h.length > errorPayloadMax {
		return violationf("an error chunk of %d bytes", h.length)
	}
	b, err := c.peek(int(h.length))
	if err != nil {
		return err
	}
	code, length := binary.BigEndian.Uint32(b), uint32(binary.BigEndian.Uint16(b[4:]))
	if code == 0 || length > h.length-6 {
		return violationf("an error chunk with error %d and a message of %d bytes in %d", code, length, h.length)
	}
	s.fail(code, printable(b[6:6+length]))
	return c.discard(int(h.length))
}

// statusChunk: context 4 | descriptors: length 4 | state 4. More descriptors than a query takes are dropped: it asks
// again.
func (c *conn) statusChunk(q *query, h chunk) error {
	switch {
	case h.length < 4+descriptorSize || (h.length-4)%descriptorSize != 0 || h.length > statusPayloadMax:
		return violationf("a block status of %d bytes", h.length)
	case q.told:
		return violation("a second block status in one reply")
	}
	b, err := c.peek(4)
	if err != nil {
		return err
	}
	if id := binary.BigEndian.Uint32(b); id != c.export.context {
		return violationf("a block status of context %d, which was not asked for", id)
	}
	if err := c.discard(4); err != nil {
		return err
	}
	q.told = true
	for left := (h.length - 4) / descriptorSize; left > 0; left-- {
		if len(q.extents) == extentsMax {
			return c.discard(int(left) * descriptorSize)
		}
		b, err := c.peek(descriptorSize)
		if err != nil {
			return err
		}
		length, state := binary.BigEndian.Uint32(b), binary.BigEndian.Uint32(b[4:])
		if length == 0 {
			return violation("an extent of no bytes")
		}
		q.extents = append(q.extents, descriptor{int64(length), state})
		if err := c.discard(descriptorSize); err != nil {
			return err
		}
	}
	return nil
}

// describe makes the end of a stream a message.
func describe(err error) error {
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ECONNRESET):
		return errors.New("it hung up")
	case errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("it hung up in the middle of a reply")
	}
	return err
}
