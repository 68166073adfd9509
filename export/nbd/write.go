package nbd

import (
	"cowherd/block"
)

// prepareWrite makes s write p at offset.
func (s *slot) prepareWrite(flags block.Flags, offset uint64, p []byte) {
	s.req.Op, s.req.Flags = block.OpWrite, flags
	s.req.Offset, s.req.Length, s.req.Data = int64(offset), int64(len(p)), p
}

// writeFlags are the flags of the device's requests for q.
func writeFlags(q *command) block.Flags {
	var flags block.Flags
	if q.flags&cmdFlagFUA != 0 {
		flags |= block.FUA
	}
	return flags
}

// write takes a write's payload from the stream and starts it, unless it is refused.
func (c *conn) write(q *command, refused error) error {
	length := int(q.length)
	if refused != nil || length == 0 {
		if err := c.skip(int64(q.length)); err != nil {
			return err
		}
		return c.answer(q, refused)
	}
	if length > inlineMax {
		return c.writeLarge(q)
	}
	if err := c.need(length); err != nil {
		return err
	}
	payload := c.in[c.head : c.head+length]
	c.head += length
	p := &c.pace[paceWrite]
	if q.flags&cmdFlagFUA != 0 {
		p = &c.pace[paceSync]
	}
	if c.inPlace(p) {
		return c.writeInPlace(q, p, payload)
	}
	return c.writeApart(q, p, payload)
}

// writeInPlace writes the payload from where it was received.
func (c *conn) writeInPlace(q *command, p *pace, payload []byte) error {
	s, err := c.takeSlot()
	if err != nil {
		return err
	}
	s.begin(q)
	s.pinned = true
	s.prepareWrite(writeFlags(q), q.offset, payload)
	if !c.submit(s, p) && c.letGo(s) {
		c.lastApart, c.inHeld = true, true
		return nil
	}
	c.current = s
	return c.answer(q, s.err)
}

// writeApart writes the payload from memory of the request's own.
func (c *conn) writeApart(q *command, p *pace, payload []byte) error {
	s, err := c.takeSlot()
	if err != nil {
		return err
	}
	s.begin(q)
	if s.data, err = c.acquire(len(payload), c.idleFunc); err != nil {
		return err
	}
	data := s.data.mem[:copy(s.data.mem, payload)]
	s.prepareWrite(writeFlags(q), q.offset, data)
	if c.startApart(s, p) {
		c.lastApart = true
		return nil
	}
	c.lastApart = false
	return c.answerSlot(s)
}

// writeLarge writes a payload of more than inlineMax piece by piece, as it comes in: whatever its length, the memory
// is that of the pieces the device works on. A piece is not durable by itself; when the client wants that, a flush
// follows the last one.
func (c *conn) writeLarge(q *command) error {
	parent, err := c.takeSlot()
	if err != nil {
		return err
	}
	parent.begin(q)
	parent.refs.Store(1)
	c.started.Add(1)
	offset, end := q.offset, q.offset+uint64(q.length)
	for offset < end && err == nil {
		length := min(end-offset, pieceSize)
		err = c.writePiece(parent, offset, int(length))
		offset += length
	}
	if err != nil {
		c.pieceFailed(parent, errTruncated)
	}
	c.unref(parent)
	return err
}

// writePiece receives one piece of parent and starts it. The error ends the connection; one of the device stays with
// the parent.
func (c *conn) writePiece(parent *slot, offset uint64, length int) error {
	b, err := c.acquire(length, c.idleFunc)
	if err != nil {
		return err
	}
	if err := c.receive(b.mem[:length]); err != nil {
		c.release(b)
		return err
	}
	s, err := c.takeSlot()
	if err != nil {
		c.release(b)
		return err
	}
	s.begin(&parent.cmd)
	s.parent, s.data = parent, b
	s.prepareWrite(0, offset, b.mem[:length])
	parent.refs.Add(1)
	if c.startApart(s, &c.pace[paceWrite]) {
		return nil
	}
	if s.err != nil {
		c.pieceFailed(parent, s.err)
	}
	c.keep(s)
	c.unref(parent)
	return nil
}

// pieceFailed keeps the first error of parent's pieces.
func (c *conn) pieceFailed(parent *slot, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if parent.err == nil {
		parent.err = err
	}
}

// unref drops a reference to parent. With the last one all pieces are written, and it is flushed if need be, then
// answered.
func (c *conn) unref(parent *slot) {
	if parent.refs.Add(-1) != 0 {
		return
	}
	if parent.err == nil && parent.cmd.flags&cmdFlagFUA != 0 {
		r := &parent.req
		r.Op, r.Flags, r.Offset, r.Length, r.Data = block.OpFlush, 0, 0, 0, nil
		c.dispatch(parent)
		return
	}
	c.completed(parent)
}
