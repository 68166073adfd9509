package transfer

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"cowherd/block"
	"cowherd/kcopyd"
)

// A Method is how data may be copied.
type Method uint8

const (
	// Auto: by a clone or the device's own copy where both devices can, else read and written.
	Auto Method = iota
	// Clone: by block.CopyClone; what cannot be is an error with ENOTSUP.
	Clone
	// Offload: by any method of block.Copier, that of servers of file systems included; what cannot be is an error with
	// ENOTSUP.
	Offload
	// ReadWrite: read and written.
	ReadWrite
)

const (
	// offloadMin is the shortest piece in bytes that Auto offloads: a clone of less costs as much as reading and writing
	// it, and leaves an extent more.
	offloadMin = 64 << 10
	// absencesMax is how many pieces in a row Auto tries in vain to offload until it gives it up for all.
	absencesMax = 4
)

// offloading is what a transfer knows of offload.
type offloading struct {
	engine *kcopyd.Scaled // nil: everything is read and written
	policy kcopyd.Offload
	// clones: holes are copied as well as data, and cost nothing, so that the extents of the source do not matter.
	clones bool
	// cloner, if there is one, clones without the engine, on the worker's goroutine: with the engine's lanes and
	// counters, to clone an image takes twice as long. cloneMax is the most that it clones at a time, in bytes.
	cloner   block.Copier
	cloneMax int64
}

// insists tells whether nothing is to be read and written.
func (m Method) insists() bool { return m == Clone || m == Offload }

// prepareOffload finds out whether anything can be offloaded.
func (t *transfer) prepareOffload() error {
	if t.Method == ReadWrite || t.Allocated && t.Method == Auto {
		return nil
	}
	if t.Allocated && t.Method == Clone {
		return fmt.Errorf("a clone shares its blocks, and has no room of its own: %w", syscall.EINVAL)
	}
	ways := 0
	if c, ok := t.Destination.(block.Copier); ok {
		for _, offer := range c.CopyOffers(t.Source) {
			if !t.allows(offer.Method) {
				continue
			}
			if ways == 0 && offer.Method == block.CopyClone {
				t.offload.clones = true
				t.cloneBy(c, offer)
			}
			ways++
		}
	} else if _, ok := t.Destination.(block.Remapper); ok {
		ways = 1 // it turns out
	}
	if ways == 0 {
		if t.Method.insists() {
			return fmt.Errorf("the destination offers no such way to be filled from the source: %w", syscall.ENOTSUP)
		}
		return nil
	}
	t.coarse.Store(true)
	if t.offload.cloner != nil && ways == 1 {
		return nil
	}
	t.offload.policy = kcopyd.OffloadOnly
	if t.Method == Clone {
		t.offload.policy = kcopyd.CloneOnly
	}
	t.offload.engine = kcopyd.NewScaled(kcopyd.Config{CopyServer: t.Method == Offload})
	return nil
}

// cloneBy has c clone, if all that is copied can be cloned: the engine knows what to do with an end that cannot.
func (t *transfer) cloneBy(c block.Copier, offer block.CopyOffer) {
	atEnd := offer.TailAtEnd && t.end == t.size && t.Destination.Size() == t.size
	if t.end%offer.Granularity == 0 || atEnd {
		t.offload.cloner, t.offload.cloneMax = c, offer.LengthMax
	}
}

// allows tells whether a method of offload may be used.
func (t *transfer) allows(m block.CopyMethod) bool {
	return m == block.CopyClone || t.Method == Offload || t.Method == Auto && m == block.CopyDevice
}

// endOffload closes the engine, and counts what it has moved.
func (t *transfer) endOffload() error {
	o := &t.offload
	if o.engine == nil {
		return nil
	}
	for _, m := range o.engine.Stats().Methods {
		t.moved[m.Method] += int64(m.Bytes)
	}
	return o.engine.Close()
}

// offloadPiece clones x, or lets kcopyd copy it. What is left of it is to be read and written.
func (w *worker) offloadPiece(ctx context.Context, x piece) (rest piece, err error) {
	if !w.coarse.Load() || x.length < offloadMin && !w.offload.clones && !w.Method.insists() {
		return x, nil
	}
	if w.offload.cloner != nil {
		x, err = w.clonePiece(x)
	}
	if w.offload.engine != nil && x.length > 0 && (err == nil || errors.Is(err, syscall.ENOTSUP)) {
		x, err = w.submitPiece(ctx, x)
	}
	if x.length == 0 || err == nil {
		w.absences.Store(0)
		return x, err
	}
	if errors.Is(err, syscall.ENOTSUP) && !w.Method.insists() {
		if w.absences.Add(1) >= absencesMax || w.counted.offloaded == 0 {
			w.coarse.Store(false)
		}
		return x, nil
	}
	return x, err
}

// clonePiece clones x, and returns what could not be. A clone that is not possible is ENOTSUP.
func (w *worker) clonePiece(x piece) (rest piece, err error) {
	for x.length > 0 {
		n, err := w.offload.cloner.Copy(block.CopyClone, w.Source, x.offset, x.offset, min(x.length, w.offload.cloneMax))
		x.offset, x.length = x.offset+n, x.length-n
		w.counted.offloaded += n
		w.counted.cloned += n
		w.progress(Cloning, n)
		if err == nil && n == 0 {
			err = fmt.Errorf("nothing of %d bytes at %d was cloned: %w", x.length, x.offset, syscall.ENOTSUP)
		}
		if err != nil {
			return x, err
		}
	}
	return x, nil
}

// submitPiece lets kcopyd copy x, and returns what could not be: all of it, or nothing.
func (w *worker) submitPiece(ctx context.Context, x piece) (rest piece, err error) {
	if !w.offload.clones {
		if err := w.limiter.wait(ctx, x.length); err != nil {
			return x, err
		}
	}
	j := &w.job
	j.From = kcopyd.Region{Device: w.Source, Offset: x.offset}
	w.to[0] = kcopyd.Region{Device: w.Destination, Offset: x.offset}
	j.To, j.Length, j.Class, j.Offload, j.Queue = w.to[:], x.length, kcopyd.Bulk, w.offload.policy, w.queue
	w.offload.engine.Submit(j)
	<-w.jobDone
	if err := j.Err(); err != nil {
		return x, err
	}
	w.counted.offloaded += x.length
	how := Offloading
	if w.offload.clones || w.Method == Clone {
		how = Cloning
	}
	w.progress(how, x.length)
	return piece{}, nil
}
