package transfer

import (
	"bytes"
	"context"
	"fmt"
	"syscall"
)

// A MismatchError says where a destination differs from what was copied to it.
type MismatchError struct {
	Offset int64 // of the first byte that differs in some piece, in bytes
	Want   byte  // in the source
	Got    byte  // in the destination
}

// Error tells the place and both bytes.
func (e *MismatchError) Error() string {
	return fmt.Sprintf("verify: the destination differs from the source at byte %d: it holds %#02x there, and the source %#02x",
		e.Offset, e.Got, e.Want)
}

// Unwrap gives EIO: the destination does not hold what was written to it, or the source has changed.
func (e *MismatchError) Unwrap() error { return syscall.EIO }

// cacheDropper is a device whose reads can be made to come from where its data is kept. It is an optional power of a
// destination.
type cacheDropper interface{ DropCache() error }

// verify compares all of the destination with the source, with the same workers that have copied. The copy has been
// flushed. What the destination's extents call zeroes is believed, where the source has zeroes too.
func (t *transfer) verify(ctx context.Context) error {
	if d, ok := t.Destination.(cacheDropper); ok {
		if err := d.DropCache(); err != nil {
			return fmt.Errorf("destination: %w", err)
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	t.Allocated = false // zeroes over zeroes need no look
	for _, w := range t.workers {
		w.kept = w.counted
	}
	err := newPlanner(t, 0, false, false).each(ctx, cancel, (*worker).compare)
	for _, w := range t.workers {
		verified := w.counted.verified + w.counted.skipped - w.kept.skipped
		w.counted = w.kept
		w.counted.verified = verified
	}
	if err != nil {
		return err
	}
	return t.verifyTail()
}

// compare reads one piece of both devices.
func (w *worker) compare(ctx context.Context, x piece) error {
	w.needBuffer()
	if w.other == nil {
		w.other = memory(w.PieceSize)
	}
	for start, end := x.offset, x.offset+x.length; start < end; {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		n := min(w.PieceSize, end-start)
		if err := w.comparePart(ctx, start, n, x.zero); err != nil {
			return err
		}
		start += n
	}
	w.counted.verified += x.length
	w.progress(Verifying, x.length)
	return nil
}

// comparePart compares n bytes, at most a piece. zero: the source holds zeroes there.
func (w *worker) comparePart(ctx context.Context, offset, n int64, zero bool) error {
	if err := w.limiter.wait(ctx, n); err != nil {
		return err
	}
	got, want := w.buffer[:n], w.other[:n]
	if err := w.read(w.Destination, got, offset); err != nil {
		return fmt.Errorf("destination: %w", err)
	}
	if zero {
		if isZero(got) {
			return nil
		}
		clear(want)
	} else if err := w.read(w.Source, want, offset); err != nil {
		return fmt.Errorf("source: %w", err)
	}
	return mismatch(got, want, offset)
}

// mismatch is nil when got is want, which both begin at offset, else the first difference.
func mismatch(got, want []byte, offset int64) error {
	if bytes.Equal(got, want) {
		return nil
	}
	i := 0
	for got[i] == want[i] {
		i++
	}
	return &MismatchError{Offset: offset + int64(i), Want: want[i], Got: got[i]}
}

// verifyTail compares what copyTail has copied.
func (t *transfer) verifyTail() error {
	if t.end == t.size {
		return nil
	}
	w := t.workers[0]
	got := memory(int64(t.Destination.Limits().LogicalBlock))
	want := memory(t.size - t.end)
	if err := w.read(t.Destination, got, t.end); err != nil {
		return fmt.Errorf("destination: %w", err)
	}
	if err := w.read(t.Source, want, t.end); err != nil {
		return fmt.Errorf("source: %w", err)
	}
	if err := mismatch(got[:len(want)], want, t.end); err != nil {
		return err
	}
	w.counted.verified += int64(len(want))
	t.progress(Verifying, int64(len(want)))
	return nil
}
