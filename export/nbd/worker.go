package nbd

import (
	"time"

	"cowherd/block"
)

// A worker is a goroutine of a connection for what would keep the connection's own goroutine from its stream: requests
// to a slow device, and those that take several device requests or a look-up.
type worker struct {
	conn    *conn
	req     block.Request
	done    chan error
	scratch []byte // for headers
	zeroes  []span // of the range that is being read, in order
	passed  int    // of them lie behind
}

// span is a range of bytes, [start, end).
type span struct{ start, end int64 }

// workLoop takes queued requests until the connection has ended.
func (c *conn) workLoop() {
	defer c.helpers.Done()
	w := &worker{conn: c, done: make(chan error, 1), scratch: make([]byte, dataHeaderSize+4)}
	for {
		s := c.awaitQueued()
		if s == nil {
			return
		}
		w.perform(s)
	}
}

// awaitQueued waits for a request to work on; nil: the connection has ended.
func (c *conn) awaitQueued() *slot {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.idlers++
	for c.queued.empty() && !c.ended {
		c.todo.Wait()
	}
	c.idlers--
	return c.queued.pop()
}

// perform does what s asks for; afterwards s is the sender's.
func (w *worker) perform(s *slot) {
	c := w.conn
	switch s.cmd.number {
	case cmdRead:
		if s.data == nil {
			c.readLarge(s, w)
			return
		}
		w.submit(s, &c.pace[paceRead])
	case cmdWrite, cmdFlush:
		p := &c.pace[paceWrite]
		if s.req.Op == block.OpFlush || s.req.Flags&block.FUA != 0 {
			p = &c.pace[paceSync]
		}
		w.submit(s, p)
	default:
		s.err = w.task(s)
		c.completed(s)
	}
}

// submit submits the device request that the connection's goroutine has prepared.
func (w *worker) submit(s *slot, p *pace) {
	length := s.req.Length
	s.req.Queue = w.conn.queue
	s.req.Push(s)
	start := time.Now()
	w.conn.device.Submit(&s.req)
	p.note(time.Since(start), length)
}

// task does a request without payload.
func (w *worker) task(s *slot) error {
	q := &s.cmd
	switch q.number {
	case cmdTrim:
		return w.trim(q)
	case cmdWriteZeroes:
		return w.writeZeroes(q)
	case cmdCache:
		return w.cache(q)
	case cmdBlockStatus:
		var err error
		s.reply, err = w.conn.blockStatus(q)
		return err
	}
	return errUnknownCommand
}

// Complete is called by the device.
func (w *worker) Complete(_ *block.Request, err error) { w.done <- err }

// do submits one device request and waits for it.
func (w *worker) do(op block.Op, flags block.Flags, offset, length int64, data []byte) error {
	r := &w.req
	r.Op, r.Flags, r.Queue = op, flags, w.conn.queue
	r.Offset, r.Length, r.Data = offset, length, data
	r.Push(w)
	w.conn.device.Submit(r)
	err := <-w.done
	r.Reset()
	return err
}
