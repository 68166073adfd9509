package nbd

import (
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// batchMax is the most requests that are written out at once.
	batchMax = 64
	// corkMax is how many requests the reader holds back at most while it delivers replies. It would be bad to send
	// each on its own, and bad to let the server wait until the last reply of a long batch has been dealt with.
	corkMax = 16
	// eagerRounds is how many batches who submits writes out before the writer has to take over.
	eagerRounds = 4
	// stageSize is the size in bytes of the buffer that joins headers and data for a stream without gathering.
	stageSize = 64 << 10
)

// output is what the owner of conn.sending works on.
type output struct {
	conn   *conn
	batch  []*slot   // being written out
	chunks [][]byte  // what is left to write of it
	early  []outcome // done by the time their batch was out
	bye    [requestSize]byte

	// One call of RawConn.Write; the function is made once so that none is made for each call.
	step    func(fd uintptr) bool
	patient bool
	err     error
	iovecs  [2 * batchMax]unix.Iovec

	stage []byte // for a stream without gathering
}

func (o *output) init(c *conn) {
	o.conn = c
	o.batch = make([]*slot, 0, batchMax)
	o.chunks = make([][]byte, 0, 2*batchMax)
	o.early = make([]outcome, 0, batchMax)
	if c.raw == nil {
		o.stage = make([]byte, 0, stageSize)
	}
	o.step = o.writeSome
	putRequest(&o.bye, 0, cmdDisconnect, 0, 0, 0)
}

// startLocked makes the caller the owner of the output if there is something to send and nobody is at it. When it is
// true, the caller calls kick as soon as it has let the lock go.
//
// +checklocks:c.mu
func (c *conn) startLocked() bool {
	nothing := c.queueLen == 0 && !c.goodbye
	if nothing || !c.up || c.sending || c.corked && c.queueLen < corkMax {
		return false
	}
	c.sending = true
	return true
}

// kick begins to send. The caller owns the output and gives it away.
func (c *conn) kick() {
	if c.raw == nil {
		c.wake <- struct{}{} // never waits: there is one output to hand over, and room for one
		return
	}
	c.send(false)
}

// write is the writer: it sends when who submits can not, because the socket is full or the stream is TLS.
func (c *conn) write() {
	for range c.wake {
		c.send(true)
	}
}

// send writes out what is queued. The caller owns the output and gives it away. If patient it waits for the peer, else
// it passes on to the writer what would take too long.
func (c *conn) send(patient bool) {
	o := &c.out
	for round := 0; ; round++ {
		if len(o.chunks) == 0 && !c.fill() {
			return
		}
		if !patient && round == eagerRounds {
			c.wake <- struct{}{}
			return
		}
		blocked, err := o.write(patient)
		if err != nil {
			c.giveUp(err)
			return
		}
		if blocked {
			c.wake <- struct{}{}
			return
		}
	}
}

// fill settles the batch that has been written out and makes the next one. It is false, and the output given back,
// when there is nothing to send.
func (c *conn) fill() bool {
	o := &c.out
	for {
		c.mu.Lock()
		bye := c.nextBatchLocked()
		if len(o.batch) == 0 && !bye && len(o.early) == 0 {
			c.releaseOutputLocked()
			c.mu.Unlock()
			return false
		}
		c.mu.Unlock()
		o.gather(bye)
		o.deliverEarly() // what the owners submit now finds the output taken: look again
		if len(o.chunks) > 0 {
			return true
		}
	}
}

// nextBatchLocked settles the batch that is out, listing what is done, and takes the next one from the queue. It tells
// whether it is time to say goodbye. The caller owns the output.
//
// +checklocks:c.mu
func (c *conn) nextBatchLocked() (bye bool) {
	o := &c.out
	for _, s := range o.batch {
		if s.state == slotAnswered && !c.tooLateLocked(s) {
			o.early = append(o.early, c.settleLocked(s))
		} else {
			s.state = slotSent
		}
	}
	o.batch = o.batch[:0]
	if !c.up {
		return false
	}
	for c.queueLen > 0 && len(o.batch) < batchMax {
		s := c.dequeueLocked()
		s.state = slotSending
		o.batch = append(o.batch, s)
	}
	bye = c.goodbye && len(o.batch) == 0
	c.goodbye = c.goodbye && !bye
	return bye
}

// deliverEarly delivers what the server had answered before its batch was out.
func (o *output) deliverEarly() {
	o.conn.device.announce(o.conn)
	for i, done := range o.early {
		o.early[i] = outcome{}
		done.deliver()
	}
	o.early = o.early[:0]
}

// gather lists the bytes of the batch.
func (o *output) gather(bye bool) {
	for _, s := range o.batch {
		putRequest(&s.header, s.flags, s.command, s.cookie(), uint64(s.offset), uint32(s.length))
		o.chunks = append(o.chunks, s.header[:])
		if s.command == cmdWrite {
			o.chunks = append(o.chunks, s.data())
		}
	}
	if bye {
		o.chunks = append(o.chunks, o.bye[:])
	}
}

// releaseOutputLocked gives the output back.
//
// +checklocks:c.mu
func (c *conn) releaseOutputLocked() {
	c.sending = false
	if !c.up {
		c.idle.Broadcast()
	}
}

// giveUp drops what is left to write after a write failed, and gives the output back. The reader ends the connection.
func (c *conn) giveUp(err error) {
	if c.lose(describe(err)) {
		_ = c.stream.Close() // the reader is to see it; a stream that lingers has its own limit
	}
	o := &c.out
	clear(o.chunks)
	o.chunks, o.batch, o.stage = o.chunks[:0], o.batch[:0], o.stage[:0]
	c.mu.Lock()
	c.releaseOutputLocked()
	c.mu.Unlock()
}

// write writes the chunks out, all of them unless it is blocked (never if patient) or fails.
func (o *output) write(patient bool) (blocked bool, err error) {
	if o.conn.raw == nil {
		return false, o.writeStaged()
	}
	o.patient, o.err = patient, nil
	if err := o.conn.raw.Write(o.step); err != nil {
		return false, err
	}
	return len(o.chunks) > 0, o.err
}

// writeSome writes as much as the socket takes. It is false when it is to be called again as soon as the socket takes
// more.
func (o *output) writeSome(fd uintptr) bool {
	for len(o.chunks) > 0 {
		n, errno := sendmsg(fd, o.chunks, &o.iovecs)
		switch {
		case errno == syscall.EINTR:
		case errno == syscall.EAGAIN:
			return !o.patient
		case errno != 0:
			o.err = errno
			return true
		default:
			o.chunks = consume(o.chunks, n)
			o.conn.sign()
		}
	}
	return true
}

// consume drops the first n bytes of chunks, keeping its memory.
func consume(chunks [][]byte, n int) [][]byte {
	whole := 0
	for whole < len(chunks) && n >= len(chunks[whole]) {
		n -= len(chunks[whole])
		whole++
	}
	rest := copy(chunks, chunks[whole:])
	clear(chunks[rest:])
	if rest > 0 {
		chunks[0] = chunks[0][n:]
	}
	return chunks[:rest]
}

// writeStaged writes the chunks out through the stage, so that a header and what follows it share a TLS record.
func (o *output) writeStaged() error {
	for i, part := range o.chunks {
		for len(part) > 0 {
			n := min(len(part), stageSize-len(o.stage))
			o.stage = append(o.stage, part[:n]...)
			part = part[n:]
			if len(o.stage) == stageSize {
				if err := o.flushStage(); err != nil {
					return err
				}
			}
		}
		o.chunks[i] = nil
	}
	o.chunks = o.chunks[:0]
	return o.flushStage()
}

func (o *output) flushStage() error {
	_, err := o.conn.stream.Write(o.stage)
	o.stage = o.stage[:0]
	o.conn.sign()
	return err
}
