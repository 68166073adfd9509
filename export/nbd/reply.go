package nbd

import "fmt"

// smallReplyMax is the longest reply without data, in bytes.
const smallReplyMax = chunkSize + 6 + errorTextMax

// room makes sure that n bytes fit in out.
func (c *conn) room(n int) error {
	if cap(c.out)-len(c.out) >= n {
		return nil
	}
	return c.flush()
}

// answer adds the reply to a request without data, or to one that failed.
func (c *conn) answer(q *command, err error) error {
	if err := c.room(smallReplyMax); err != nil {
		return err
	}
	c.out = c.appendAnswer(c.out, q, err)
	return c.answered()
}

// answered counts a reply in out, and sends them when there are enough.
func (c *conn) answered() error {
	if c.unsent++; c.unsent >= flushCount || len(c.out) >= flushBytes {
		return c.flush()
	}
	return nil
}

// appendAnswer appends a reply without data: a failure, or the success of anything but a read of data.
func (c *conn) appendAnswer(b []byte, q *command, err error) []byte {
	if err != nil {
		c.countError(q)
		if c.structured {
			return appendError(b, q.cookie, wireErrno(err), err.Error())
		}
		return appendSimple(b, q.cookie, wireErrno(err))
	}
	if c.structured && q.number == cmdRead { // of nothing
		var h [chunkSize]byte
		putChunk(h[:], chunkFlagDone, chunkNone, q.cookie, 0)
		return append(b, h[:]...)
	}
	return appendSimple(b, q.cookie, 0)
}

func (c *conn) countError(q *command) {
	if q.number < cmdCount {
		c.counters[q.number].errors.Add(1)
	}
}

// flush sends what is in out.
func (c *conn) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	c.publish()
	err := c.send(c.out, nil)
	c.out, c.unsent = c.out[:0], 0
	return err
}

// send writes one reply, or several whole ones; data follow first if there are any. An error breaks the connection.
func (c *conn) send(first, data []byte) error {
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	return c.sendLocked(first, data)
}

// +checklocks:c.sendMu
func (c *conn) sendLocked(first, data []byte) error {
	_, err := c.wire.Write(first)
	if err == nil && len(data) > 0 {
		_, err = c.wire.Write(data)
	}
	if err != nil {
		err = fmt.Errorf("nbd: reply: %w", err)
		c.fail(err)
	}
	return err
}

const (
	// gatherSize is the size in bytes of the sender's buffer: so many replies go out with one call.
	gatherSize = 64 << 10
	// gatherMax is the longest payload in bytes that is copied to it rather than sent by itself.
	gatherMax = 16 << 10
)

// sendLoop is the sender: it answers the requests apart, as many together as are completed, so that neither the
// device's goroutine nor the connection's waits for a client that does not read.
func (c *conn) sendLoop() {
	defer c.helpers.Done()
	var gather []byte
	for {
		batch := c.awaitFinished()
		if batch.empty() {
			return
		}
		if gather == nil {
			gather = make([]byte, 0, gatherSize)
		}
		c.sendBatch(batch, gather)
		for s := batch.head; s != nil; s = s.next {
			if s.parent == nil {
				continue
			}
			if s.err != nil {
				c.pieceFailed(s.parent, s.err)
			}
			c.unref(s.parent)
		}
		c.retire(batch)
	}
}

// awaitFinished waits for requests to answer; none: the connection has ended.
func (c *conn) awaitFinished() slotList {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.finished.empty() && !c.ended {
		c.done.Wait()
	}
	return c.finished.take()
}

// sendBatch sends the replies of batch. An error has broken the connection, and the rest is not sent.
func (c *conn) sendBatch(batch slotList, gather []byte) {
	if c.isBroken() {
		return
	}
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	for s := batch.head; s != nil; s = s.next {
		if s.parent != nil {
			continue
		}
		header, data := c.replyOf(s, gather)
		gather = header
		switch {
		case len(data) == 0:
		case len(data) <= gatherMax && len(gather)+len(data) <= cap(gather):
			gather = append(gather, data...)
		default:
			if c.sendLocked(gather, data) != nil {
				return
			}
			gather = gather[:0]
		}
		if cap(gather)-len(gather) < smallReplyMax {
			if c.sendLocked(gather, nil) != nil {
				return
			}
			gather = gather[:0]
		}
	}
	if len(gather) > 0 {
		_ = c.sendLocked(gather, nil)
	}
}

// replyOf appends the reply of s to gather, but for the payload, which it returns.
func (c *conn) replyOf(s *slot, gather []byte) (header, data []byte) {
	q := &s.cmd
	switch {
	case s.answered:
		return gather, nil
	case s.err != nil || q.number != cmdRead && q.number != cmdBlockStatus:
		return c.appendAnswer(gather, q, s.err), nil
	case q.number == cmdBlockStatus:
		return gather, s.reply
	}
	size := c.readHeader()
	if s.data != nil {
		data = s.data.mem[:q.length]
	} else {
		data = s.reply[size:]
	}
	at := len(gather)
	gather = gather[:at+size]
	c.putReadHeader(gather[at:], q)
	return gather, data
}
