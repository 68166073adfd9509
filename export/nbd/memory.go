package nbd

import (
	"math/bits"
	"time"
)

const (
	// pieceSize is the unit in bytes in which large requests move: what one of them holds at a time.
	pieceSize = 256 << 10

	bufferShiftMin = 12 // 4 KiB
	bufferShiftMax = 18 // pieceSize
	bufferClasses  = bufferShiftMax - bufferShiftMin + 1

	// keptMax bounds the free buffers that a connection keeps, in bytes.
	keptMax = 2 << 20

	// A buffer larger than pieceSize has no reserve; who needs one waits for this long at most.
	memoryWaitMax   = 10 * time.Second
	memoryWaitPause = 2 * time.Millisecond
)

// A buffer is payload memory of one request. It has one owner at a time: who acquired it, then the device, then who
// sends the reply and releases it. Memory of 4 KiB and more starts on a 4 KiB boundary, as direct I/O likes it.
type buffer struct {
	mem     []byte
	reserve bool // not taken from the server's memory
	next    *buffer
}

// classOf is the class of buffers that hold size bytes; bufferClasses or more: none.
func classOf(size int) int {
	return max(bits.Len(uint(max(size, 1)-1)), bufferShiftMin) - bufferShiftMin
}

// roundSize is the size in bytes of the buffer that size bytes get.
func roundSize(size int) int {
	if class := classOf(size); class < bufferClasses {
		return 1 << (class + bufferShiftMin)
	}
	return size
}

// takeMemory takes n bytes of the server's memory, if they are there.
func (s *Server) takeMemory(n int) bool {
	for {
		have := s.memory.Load()
		if have < int64(n) {
			return false
		}
		if s.memory.CompareAndSwap(have, have-int64(n)) {
			return true
		}
	}
}

// acquire gets a buffer of at least size bytes. When it has to wait it calls idle first (if not nil), and then waits
// for this connection's other requests; with nothing in flight a buffer of at most pieceSize is granted from the
// reserve, so that no other connection can starve this one. The error is that the connection is broken, or errNoMemory
// for a larger buffer when others held the memory for too long.
func (c *conn) acquire(size int, idle func() error) (*buffer, error) {
	if b := c.tryAcquire(size); b != nil {
		return b, nil
	}
	if idle != nil {
		if err := idle(); err != nil {
			return nil, err
		}
	}
	if size > pieceSize {
		return c.acquireLarge(size)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		if c.broken {
			return nil, errBroken
		}
		if b := c.grantLocked(size); b != nil {
			return b, nil
		}
		c.freed.Wait()
	}
}

// acquireLarge waits for a buffer without reserve. What it waits for may be held by other connections, which do not
// tell; hence the polling.
func (c *conn) acquireLarge(size int) (*buffer, error) {
	for waited := time.Duration(0); waited < memoryWaitMax; waited += memoryWaitPause {
		time.Sleep(memoryWaitPause)
		if c.isBroken() {
			return nil, errBroken
		}
		if b := c.tryAcquire(size); b != nil {
			return b, nil
		}
	}
	return nil, errNoMemory
}

// tryAcquire gets a buffer if there is one now.
func (c *conn) tryAcquire(size int) *buffer {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.grantLocked(size)
}

// grantLocked gets a buffer if the limits allow it now.
//
// +checklocks:c.mu
func (c *conn) grantLocked(size int) *buffer {
	n := roundSize(size)
	reserve := false
	switch {
	case c.bytes+int64(n) > c.server.config.BytesMax:
		return nil
	case c.server.takeMemory(n):
	case c.bytes == 0 && n <= pieceSize:
		reserve = true
	default:
		return nil
	}
	c.bytes += int64(n)
	class := classOf(size)
	if class >= bufferClasses {
		return &buffer{mem: make([]byte, n)}
	}
	b := c.kept[class]
	if b == nil {
		b = &buffer{mem: make([]byte, n)}
	} else {
		c.kept[class], b.next = b.next, nil
		c.keptBytes -= n
	}
	b.reserve = reserve
	return b
}

// release gives a buffer back.
func (c *conn) release(b *buffer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.releaseLocked(b)
	c.freed.Broadcast()
}

// +checklocks:c.mu
func (c *conn) releaseLocked(b *buffer) {
	n := len(b.mem)
	c.bytes -= int64(n)
	if !b.reserve {
		c.server.memory.Add(int64(n))
	}
	class := classOf(n)
	if class >= bufferClasses || c.keptBytes+n > keptMax {
		return
	}
	b.next, c.kept[class] = c.kept[class], b
	c.keptBytes += n
}
