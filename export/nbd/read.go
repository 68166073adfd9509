package nbd

import (
	"cowherd/block"
)

// readHeader is what stands before the data of a read's reply in one piece, in bytes.
func (c *conn) readHeader() int {
	if c.structured {
		return dataHeaderSize
	}
	return simpleSize
}

// putReadHeader encodes it.
func (c *conn) putReadHeader(b []byte, q *command) {
	if c.structured {
		putData(b, chunkFlagDone, q.cookie, q.offset, q.length)
	} else {
		putSimple(b, q.cookie, 0)
	}
}

// prepareRead makes s read q's range to p.
func (s *slot) prepareRead(q *command, p []byte) {
	s.req.Op, s.req.Flags = block.OpRead, 0
	s.req.Offset, s.req.Length, s.req.Data = int64(q.offset), int64(len(p)), p
}

// read starts a read of at least one byte.
func (c *conn) read(q *command) error {
	p := &c.pace[paceRead]
	switch {
	case q.length > inlineMax:
		return c.toWorkers(q)
	case c.inPlace(p):
		return c.readInPlace(q, p)
	}
	return c.readApart(q, p)
}

// readInPlace reads to where the reply's data stand among the replies.
func (c *conn) readInPlace(q *command, p *pace) error {
	header := c.readHeader()
	total := header + int(q.length)
	if err := c.room(total); err != nil {
		return err
	}
	s, err := c.takeSlot()
	if err != nil {
		return err
	}
	at := len(c.out)
	reply := c.out[at : at+total]
	s.begin(q)
	s.reply, s.pinned = reply, true
	s.prepareRead(q, reply[header:])
	if !c.submit(s, p) && c.letGo(s) {
		c.lastApart = true
		return c.leaveOut()
	}
	c.current = s
	if s.err != nil {
		return c.answer(q, s.err)
	}
	c.putReadHeader(reply, q)
	c.out = c.out[:at+total]
	return c.answered()
}

// leaveOut sends the replies in out and leaves the rest of its memory to the request that reads to it.
func (c *conn) leaveOut() error {
	err := c.flush()
	if c.outSpare == nil {
		c.outSpare = make([]byte, 0, outSize)
	}
	c.out, c.outSpare = c.outSpare[:0], c.out
	return err
}

// readApart reads to memory of the request's own.
func (c *conn) readApart(q *command, p *pace) error {
	s, err := c.takeSlot()
	if err != nil {
		return err
	}
	s.begin(q)
	if s.data, err = c.acquire(int(q.length), c.idleFunc); err != nil {
		return err
	}
	data := s.data.mem[:q.length]
	s.prepareRead(q, data)
	if c.startApart(s, p) {
		c.lastApart = true
		return nil
	}
	c.lastApart = false
	if s.err != nil {
		return c.answerSlot(s)
	}
	header := c.readHeader()
	if err := c.room(header + len(data)); err != nil {
		return err
	}
	at := len(c.out)
	c.out = c.out[:at+header]
	c.putReadHeader(c.out[at:], q)
	c.out = append(c.out, data...)
	c.keep(s)
	return c.answered()
}

// readLarge is a worker's: a read of more than inlineMax. In pieces if the client takes them, which bounds the memory
// and lets the replies of other requests pass between them; else in one buffer.
func (c *conn) readLarge(s *slot, w *worker) {
	if c.structured && s.cmd.flags&cmdFlagDF == 0 {
		c.readPieces(s, w)
		return
	}
	length := int(s.cmd.length)
	if s.data, s.err = c.acquire(length, nil); s.err == nil {
		s.err = w.do(block.OpRead, 0, int64(s.cmd.offset), int64(length), s.data.mem[:length])
	}
	c.completed(s)
}

// holeMin is the smallest range of zeroes in bytes that is worth a chunk of its own.
const holeMin = 16 << 10

// readPieces answers a large read with a chunk for each piece of data and for each range of zeroes.
func (c *conn) readPieces(s *slot, w *worker) {
	q := &s.cmd
	b, err := c.acquire(pieceSize, nil)
	if err == nil {
		w.findZeroes(int64(q.offset), int64(q.length))
		offset, end := q.offset, q.offset+uint64(q.length)
		for offset < end && err == nil {
			offset, err = c.sendPiece(w, q, b, offset, end)
		}
		c.release(b)
	}
	if err != nil {
		c.countError(q)
		c.send(appendError(nil, q.cookie, wireErrno(err), err.Error()), nil)
	}
	s.answered = true
	c.completed(s)
}

// sendPiece sends the chunk at offset and tells where the next one starts.
func (c *conn) sendPiece(w *worker, q *command, b *buffer, offset, end uint64) (uint64, error) {
	next, zero := w.nextRange(offset, end)
	if !zero {
		next = min(next, offset+pieceSize)
	}
	flags := uint16(0)
	if next == end {
		flags = chunkFlagDone
	}
	length := uint32(next - offset)
	if zero {
		return next, c.send(appendHole(w.scratch[:0], flags, q.cookie, offset, length), nil)
	}
	data := b.mem[:length]
	if err := w.do(block.OpRead, 0, int64(offset), int64(length), data); err != nil {
		return offset, err
	}
	header := w.scratch[:dataHeaderSize]
	putData(header, flags, q.cookie, offset, length)
	return next, c.send(header, data)
}
