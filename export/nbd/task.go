package nbd

import (
	"errors"
	"syscall"
	"time"

	"cowherd/block"
)

// split calls do for the pieces of q's range, each at most most bytes, until one fails.
func (w *worker) split(q *command, most int64, do func(offset, length int64) error) error {
	most = max(most&^int64(w.conn.blockMask), w.conn.blockSize())
	offset, end := int64(q.offset), int64(q.offset)+int64(q.length)
	for offset < end {
		length := min(end-offset, most)
		if err := do(offset, length); err != nil {
			return err
		}
		if offset += length; offset < end && w.conn.isBroken() {
			return errBroken
		}
	}
	return nil
}

// blockSize is the device's logical block in bytes.
func (c *conn) blockSize() int64 { return int64(c.blockMask) + 1 }

// settle makes what q has written durable if the client wants that.
func (w *worker) settle(q *command) error {
	if q.flags&cmdFlagFUA == 0 {
		return nil
	}
	return w.do(block.OpFlush, 0, 0, 0, nil)
}

// trim discards q's range. A device that finds out only now that it cannot has done no harm: a trim is a hint.
func (w *worker) trim(q *command) error {
	most := w.conn.limits.DiscardMax
	flags := block.Flags(0)
	whole := int64(q.length) <= most
	if whole {
		flags = writeFlags(q)
	}
	err := w.split(q, most, func(offset, length int64) error {
		return w.do(block.OpDiscard, flags, offset, length, nil)
	})
	switch {
	case errors.Is(err, syscall.ENOTSUP):
		return nil
	case err != nil || whole:
		return err
	}
	return w.settle(q)
}

// writeZeroes makes q's range read as zeroes: by the device's own means or, unless the client wants it fast or not at
// all, by writing them.
func (w *worker) writeZeroes(q *command) error {
	most := w.conn.limits.WriteZeroesMax
	fast := q.flags&cmdFlagFastZero != 0
	if most == 0 {
		if fast {
			return errNotFast
		}
		return w.zeroByWriting(q)
	}
	var flags block.Flags
	if q.flags&cmdFlagNoHole != 0 {
		flags |= block.NoUnmap
	}
	if fast {
		flags |= block.Fast
	}
	whole := int64(q.length) <= most
	if whole {
		flags |= writeFlags(q)
	}
	err := w.split(q, most, func(offset, length int64) error {
		return w.do(block.OpWriteZeroes, flags, offset, length, nil)
	})
	switch {
	case errors.Is(err, syscall.ENOTSUP) && !fast:
		return w.zeroByWriting(q)
	case err != nil || whole:
		return err
	}
	return w.settle(q)
}

// zeroes is what is written where a device has no other way. Nobody writes to it.
var zeroes [pieceSize]byte

// zeroByWriting writes zeroes to q's range.
func (w *worker) zeroByWriting(q *command) error {
	err := w.split(q, pieceSize, func(offset, length int64) error {
		return w.do(block.OpWrite, 0, offset, length, zeroes[:length])
	})
	if err != nil {
		return err
	}
	return w.settle(q)
}

// cache reads q's range and forgets it: what caches there are below have it then.
func (w *worker) cache(q *command) error {
	b, err := w.conn.acquire(int(min(q.length, pieceSize)), nil)
	if err != nil {
		return err
	}
	defer w.conn.release(b)
	return w.split(q, pieceSize, func(offset, length int64) error {
		return w.do(block.OpRead, 0, offset, length, b.mem[:length])
	})
}

// spansMax bounds the ranges of zeroes that a read looks for; what lies behind them is read.
const spansMax = 64

const (
	// zeroWorth is the time in ns that one byte of zeroes saves when it is not read and sent.
	zeroWorth = 0.25
	// lookupShare: fruitless look-ups may take one part in so many of the time.
	lookupShare = 50
)

// findZeroes looks for the ranges of [offset, offset+length) that read as zeroes. A look-up can cost more than the read
// (tmpfs walks all pages up to the next hole, however far): one that did not pay bars others for a while.
func (w *worker) findZeroes(offset, length int64) {
	c := w.conn
	w.zeroes, w.passed = w.zeroes[:0], 0
	lister, ok := c.device.(block.ExtentLister)
	start := time.Since(c.since)
	if !ok || int64(start) < c.lookupBar.Load() {
		return
	}
	found := int64(0)
	err := lister.Extents(offset, length, func(e block.Extent) bool {
		if e.Zero {
			w.addZeroes(e.Offset, e.Offset+e.Length)
			found += e.Length
		}
		return len(w.zeroes) < spansMax
	})
	if err != nil {
		w.zeroes = w.zeroes[:0] // a read of everything will tell what is wrong
		found = 0
	}
	end := time.Since(c.since)
	if lost := end - start - time.Duration(float64(found)*zeroWorth); lost > 0 {
		c.lookupBar.Store(int64(end + lookupShare*lost))
	}
}

// addZeroes adds [start, end), cut to whole logical blocks, to the ranges of zeroes.
func (w *worker) addZeroes(start, end int64) {
	mask := int64(w.conn.blockMask)
	start, end = (start+mask)&^mask, end&^mask
	if n := len(w.zeroes); n > 0 && w.zeroes[n-1].end == start {
		w.zeroes[n-1].end = max(end, start)
	} else if start < end {
		w.zeroes = append(w.zeroes, span{start, end})
	}
}

// nextRange tells where the range at offset ends, and whether it is one of zeroes worth a chunk of its own.
func (w *worker) nextRange(offset, end uint64) (next uint64, zero bool) {
	for w.passed < len(w.zeroes) {
		z := w.zeroes[w.passed]
		switch {
		case uint64(z.end) <= offset || z.end-z.start < holeMin:
			w.passed++
		case uint64(z.start) <= offset:
			return min(uint64(z.end), end), true
		default:
			return min(uint64(z.start), end), false
		}
	}
	return end, false
}
