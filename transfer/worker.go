package transfer

import (
	"bytes"
	"context"
	"fmt"
	"unsafe"

	"cowherd/block"
	"cowherd/kcopyd"
)

// zeroRunMin is the shortest run of zeroes in bytes that is made zero by the destination where it holds something else:
// below it, writing the zeroes costs less than the operation.
const zeroRunMin = 64 << 10

// bufferAlign is the alignment in bytes of buffers, as direct I/O wants it.
const bufferAlign = 4096

// worker does what the planner has planned, one piece at a time.
type worker struct {
	*transfer
	queue   block.Queue
	call    call
	batch   batch  // the planner reads its start
	buffer  []byte // cut bytes; made at its first use, so that its pages belong to the worker's CPU
	other   []byte // the same, for what is compared
	job     kcopyd.Job
	to      [1]kcopyd.Region
	jobDone chan struct{}
	counted counts
	kept    counts // what counted was before the verification
}

// counts are bytes.
type counts struct {
	readWrite, zeroes, skipped, verified int64
	spliced                              int64 // by relays
	offloaded                            int64 // cloned, and by the engine
	cloned                               int64 // without the engine
}

func newWorker(t *transfer, queue block.Queue) *worker {
	w := &worker{transfer: t, queue: queue, call: call{done: make(chan error, 1)}, jobDone: make(chan struct{}, 1)}
	w.batch.pieces = make([]piece, 0, batchPiecesMax)
	w.job.Done = func(*kcopyd.Job) { w.jobDone <- struct{}{} }
	return w
}

// memory makes a buffer of n bytes.
func memory(n int64) []byte {
	p := make([]byte, n+bufferAlign)
	skip := int64(-uintptr(unsafe.Pointer(unsafe.SliceData(p))) % bufferAlign)
	return p[skip : skip+n : skip+n]
}

// needBuffer makes the buffer, if there is none.
func (w *worker) needBuffer() {
	if w.buffer == nil {
		w.buffer = memory(w.cut)
	}
}

// run does batches until there are no more, or until while, if there is one, is false: then there may be more.
func (w *worker) run(ctx context.Context, p *planner, do func(*worker, context.Context, piece) error, while func() bool) (more bool, err error) {
	for while == nil || while() {
		more, err := p.next(w)
		if !more || err != nil {
			return false, err
		}
		for _, x := range w.batch.pieces {
			if ctx.Err() != nil {
				return false, context.Cause(ctx)
			}
			if err := do(w, ctx, x); err != nil {
				return false, err
			}
		}
		w.counted.skipped += w.batch.skipped
		w.progress(Zeroing, w.batch.skipped)
	}
	return true, nil
}

// copy does one piece.
func (w *worker) copy(ctx context.Context, x piece) error {
	if x.zero {
		if err := w.zero(x.offset, x.length); err != nil {
			return err
		}
		w.progress(Zeroing, x.length)
		return nil
	}
	x, err := w.offloadPiece(ctx, x)
	if err == nil && x.length > 0 {
		x, err = w.relayPiece(ctx, x)
	}
	if err != nil || x.length == 0 {
		return err
	}
	w.needBuffer()
	for start, end := x.offset, x.offset+x.length; start < end; { // one turn, unless it was to be offloaded or relayed
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n := min(w.PieceSize-start%w.PieceSize, end-start)
		if err := w.readWrite(ctx, start, n, x.over); err != nil {
			return err
		}
		w.progress(ReadWriting, n)
		start += n
	}
	return nil
}

// readWrite copies n bytes at offset, at most a piece. over: the destination reads as zeroes there.
func (w *worker) readWrite(ctx context.Context, offset, n int64, over bool) error {
	if err := w.limiter.wait(ctx, n); err != nil {
		return err
	}
	p := w.buffer[:n]
	if err := w.read(w.Source, p, offset); err != nil {
		return fmt.Errorf("source: %w", err)
	}
	if w.Sparse == 0 || w.Allocated {
		return w.write(p, offset)
	}
	return w.writeSparse(p, offset, over)
}

// writeSparse writes p at offset, but for its zeroes: they are left out over zeroes, and made otherwise.
func (w *worker) writeSparse(p []byte, offset int64, over bool) error {
	least := int64(zeroRunMin)
	if over {
		least = w.Sparse
	}
	pending := int64(0) // where what has not been written begins
	for at, length := int64(0), int64(len(p)); at < length; {
		start, end := zeroRun(p, at, offset, w.Sparse)
		at = end
		if end-start < least && !(over && end == length && end > start) {
			continue
		}
		if err := w.write(p[pending:start], offset+pending); err != nil {
			return err
		}
		pending = end
		if over {
			w.counted.skipped += end - start
		} else if err := w.zero(offset+start, end-start); err != nil {
			return err
		}
	}
	return w.write(p[pending:], offset+pending)
}

// zeroRun finds the first run of zeroes in p from at on, in units that lie at multiples of unit on the device, where p
// is at offset. Without one it begins and ends at the end of p.
func zeroRun(p []byte, at, offset, unit int64) (start, end int64) {
	length := int64(len(p))
	start, end = length, length
	for at < length {
		next := min(at+unit-(offset+at)%unit, length)
		zero := isZero(p[at:next])
		if zero && start == length {
			start = at
		}
		if !zero && start < length {
			return start, at
		}
		at = next
	}
	return start, end
}

// zeroUnit is what is compared at a time by isZero.
var zeroUnit [4096]byte

// isZero tells whether p is all zero. Most of what is not is known by its first bytes.
func isZero(p []byte) bool {
	for len(p) > len(zeroUnit) {
		if !isZero(p[:len(zeroUnit)]) {
			return false
		}
		p = p[len(zeroUnit):]
	}
	return (len(p) == 0 || p[0] == 0) && bytes.Equal(p, zeroUnit[:len(p)])
}

// read fills p from d at offset.
func (w *worker) read(d block.Device, p []byte, offset int64) error {
	w.call.set(block.OpRead, 0, w.queue, offset, int64(len(p)), p)
	d.Submit(&w.call.r)
	return w.call.wait()
}

// write writes p to the destination at offset, if there is something.
func (w *worker) write(p []byte, offset int64) error {
	if len(p) == 0 {
		return nil
	}
	w.call.set(block.OpWrite, 0, w.queue, offset, int64(len(p)), p)
	w.Destination.Submit(&w.call.r)
	if err := w.call.wait(); err != nil {
		return fmt.Errorf("destination: %w", err)
	}
	w.counted.readWrite += int64(len(p))
	return nil
}

// zero makes a range of the destination zero.
func (w *worker) zero(offset, length int64) error {
	var flags block.Flags
	if w.Allocated {
		flags = block.NoUnmap
	}
	w.call.set(block.OpWriteZeroes, flags, w.queue, offset, length, nil)
	block.SubmitZeroes(w.Destination, &w.call.r)
	if err := w.call.wait(); err != nil {
		return fmt.Errorf("destination: %w", err)
	}
	w.counted.zeroes += length
	return nil
}

// call is a request that a worker waits for.
type call struct {
	r    block.Request
	done chan error
}

// syncer is a device that flushes on the caller's goroutine. It is an optional power of a destination.
type syncer interface{ Sync() error }

// flush makes durable what d has completed.
func flush(d block.Device) error {
	if s, ok := d.(syncer); ok {
		return s.Sync()
	}
	c := call{done: make(chan error, 1)}
	c.set(block.OpFlush, 0, 0, 0, 0, nil)
	d.Submit(&c.r)
	return c.wait()
}

// set prepares the request. The caller submits it, and waits.
func (c *call) set(op block.Op, flags block.Flags, queue block.Queue, offset, length int64, data []byte) {
	c.r.Op, c.r.Flags, c.r.Queue, c.r.Offset, c.r.Length, c.r.Data = op, flags, queue, offset, length, data
	c.r.Push(c)
}

// Complete is told of the end of the request. See block.Completer.
func (c *call) Complete(_ *block.Request, err error) { c.done <- err }

func (c *call) wait() error {
	err := <-c.done
	c.r.Data = nil
	return err
}

// copyTail copies what lies behind the last whole block of the destination. What the destination holds behind the end of
// the source stays.
func (t *transfer) copyTail() error {
	if t.end == t.size {
		return nil
	}
	w := t.workers[0]
	buffer := memory(int64(t.Destination.Limits().LogicalBlock))
	if err := w.read(t.Destination, buffer, t.end); err != nil {
		return fmt.Errorf("destination: %w", err)
	}
	if err := w.read(t.Source, buffer[:t.size-t.end], t.end); err != nil {
		return fmt.Errorf("source: %w", err)
	}
	if err := w.write(buffer, t.end); err != nil {
		return err
	}
	w.counted.readWrite -= int64(len(buffer)) - (t.size - t.end)
	t.progress(ReadWriting, t.size-t.end)
	return nil
}
