package nbd

import (
	"io"
	"time"

	"cowherd/block"
)

// serve reads requests and starts them until the stream ends, the client disconnects or the connection is stopped.
func (c *conn) serve() error {
	var q command
	for {
		if err := c.need(requestSize); err != nil {
			return err
		}
		if !decodeCommand(c.in[c.head:c.tail], &q) {
			return errOutOfStep
		}
		c.head += requestSize
		if c.foreground != nil {
			c.foreground(c.queue)
		}
		if err := c.request(&q); err != nil {
			return err
		}
	}
}

// request does what one command asks for. The error ends the connection.
func (c *conn) request(q *command) error {
	refused := c.check(q)
	if q.number < cmdCount {
		t := &c.tallies[q.number]
		t.requests++
		if refused == nil {
			t.bytes += uint64(q.length)
		}
	}
	switch {
	case q.number == cmdWrite:
		return c.write(q, refused)
	case q.number == cmdDisconnect:
		return errDisconnected
	case refused != nil || q.length == 0 && q.number != cmdFlush:
		return c.answer(q, refused)
	case q.number == cmdRead:
		return c.read(q)
	case q.number == cmdFlush:
		return c.flushDevice(q)
	}
	return c.toWorkers(q)
}

// allowedFlags are the flags that each command takes.
func allowedFlags(structured bool) [cmdCount]uint16 {
	var allowed [cmdCount]uint16
	for i := range allowed {
		allowed[i] = cmdFlagFUA
	}
	allowed[cmdWriteZeroes] |= cmdFlagNoHole | cmdFlagFastZero
	allowed[cmdBlockStatus] |= cmdFlagReqOne
	if structured {
		allowed[cmdRead] |= cmdFlagDF
	}
	return allowed
}

// check tells why q is refused; nil: it is not. It is the only place where numbers from the wire are compared with
// the export's bounds; what passes is passed on without another look.
func (c *conn) check(q *command) error {
	if q.number >= cmdCount {
		return errUnknownCommand
	}
	if q.flags&^c.allowed[q.number] != 0 {
		return errUnknownFlag
	}
	writes := false
	switch q.number {
	case cmdDisconnect:
		return nil
	case cmdFlush:
		if q.offset != 0 || q.length != 0 {
			return errReserved
		}
		return nil
	case cmdRead, cmdWrite:
		if q.length > LengthMax {
			return errTooLong
		}
		writes = q.number == cmdWrite
	case cmdTrim:
		writes = true
		if !c.readOnly && c.limits.DiscardMax == 0 {
			return errNoTrim
		}
	case cmdWriteZeroes:
		writes = true
	case cmdBlockStatus:
		if len(c.contexts) == 0 {
			return errNoContext
		}
		if q.length == 0 {
			return errEmptyStatus
		}
	}
	if writes && c.readOnly {
		return errReadOnly
	}
	return c.checkRange(q)
}

// checkRange tells whether q's range lies on the export and on its logical blocks.
func (c *conn) checkRange(q *command) error {
	length := uint64(q.length)
	if (q.offset|length)&c.blockMask != 0 {
		return errUnaligned
	}
	if q.offset > c.size || length > c.size-q.offset {
		if q.number == cmdWrite || q.number == cmdWriteZeroes {
			return errNoSpace
		}
		return errBeyondEnd
	}
	return nil
}

// need waits until n bytes, at most inSize-readSize, lie at in[head:].
func (c *conn) need(n int) error {
	if c.tail-c.head >= n {
		return nil
	}
	return c.fill(n)
}

// fill reads until n bytes lie at in[head:].
func (c *conn) fill(n int) error {
	c.makeRoom(n)
	for c.tail-c.head < n {
		if c.stopping.Load() {
			if c.lateReads++; c.lateReads > lateReadsMax {
				return errStopped
			}
		}
		end := min(max(c.head+n, c.tail+readSize), len(c.in))
		k, err := c.wire.Read(c.in[c.tail:end])
		c.tail += k
		if err != nil && c.tail-c.head < n {
			return err
		}
	}
	return nil
}

// makeRoom moves what has not been looked at to the front of in, so that n bytes fit behind head and the same few
// cache lines are used again and again. It leaves a buffer alone that a request apart still uses.
func (c *conn) makeRoom(n int) {
	rest := c.in[c.head:c.tail]
	if c.inHeld && c.pinned.Load() {
		if c.inSpare == nil {
			c.inSpare = make([]byte, inSize)
		}
		c.in, c.inSpare = c.inSpare, c.in
	}
	c.inHeld = false
	c.head, c.tail = 0, copy(c.in, rest)
}

// idle is called when the client has sent nothing more: the moment to send what has gathered for it.
func (c *conn) idle() error {
	c.publish() // also what went apart, and so left nothing to flush
	if err := c.flush(); err != nil {
		return err
	}
	if c.stopping.Load() {
		return errStopped
	}
	return nil
}

// skip throws away n bytes of payload.
func (c *conn) skip(n int64) error {
	for {
		k := min(n, int64(c.tail-c.head))
		c.head += int(k)
		if n -= k; n == 0 {
			return nil
		}
		if err := c.need(1); err != nil {
			return err
		}
	}
}

// receive fills p with payload.
func (c *conn) receive(p []byte) error {
	k := copy(p, c.in[c.head:c.tail])
	c.head += k
	if k == len(p) {
		return nil
	}
	_, err := io.ReadFull(c.wire, p[k:])
	return err
}

// submit submits s on this goroutine. It is true when s is completed; else letGo decides.
func (c *conn) submit(s *slot, p *pace) bool {
	s.req.Queue = c.queue
	s.req.Push(s)
	if c.tick++; p.sampled(c.tick) {
		length := s.req.Length
		start := time.Now()
		c.device.Submit(&s.req)
		p.note(time.Since(start), length)
	} else {
		c.device.Submit(&s.req)
	}
	return s.state.Load() == slotCompleted
}

// letGo gives up s, which is not completed yet, to its completion. It is false when s has been completed meanwhile.
func (c *conn) letGo(s *slot) bool {
	pinned := s.pinned
	c.started.Add(1)
	if pinned {
		c.pinned.Store(true)
	}
	if s.state.CompareAndSwap(slotSubmitting, slotApart) {
		return true
	}
	c.started.Add(-1)
	if pinned {
		c.pinned.Store(false)
	}
	return false
}

// inPlace tells whether the next small request may use the connection's buffers: it is likely to be completed in
// Submit, and no other one holds them.
func (c *conn) inPlace(p *pace) bool {
	return !c.lastApart && !p.slow() && !c.pinned.Load()
}

// flushDevice starts a flush.
func (c *conn) flushDevice(q *command) error {
	s, err := c.takeSlot()
	if err != nil {
		return err
	}
	s.begin(q)
	s.req.Op, s.req.Flags, s.req.Offset, s.req.Length, s.req.Data = block.OpFlush, 0, 0, 0, nil
	if c.startApart(s, &c.pace[paceSync]) {
		return nil
	}
	return c.answerSlot(s)
}

// startApart starts s, which does not use the connection's buffers: on this goroutine or, when the device is slow, on
// a worker. It is false when s is completed and this goroutine's again.
func (c *conn) startApart(s *slot, p *pace) bool {
	if p.slow() {
		c.started.Add(1)
		c.dispatch(s)
		return true
	}
	return !c.submit(s, p) && c.letGo(s)
}

// answerSlot answers a request without data that is completed and keeps its slot for the next one.
func (c *conn) answerSlot(s *slot) error {
	err := c.answer(&s.cmd, s.err)
	c.keep(s)
	return err
}

// keep takes a slot back that never went apart, with its memory.
func (c *conn) keep(s *slot) {
	if s.data != nil {
		c.release(s.data)
		s.data = nil
	}
	c.current = s
}

// toWorkers starts a request that needs more than one device request, or may take long.
func (c *conn) toWorkers(q *command) error {
	s, err := c.takeSlot()
	if err != nil {
		return err
	}
	s.begin(q)
	c.started.Add(1)
	c.dispatch(s)
	return nil
}
