package transfer

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"cowherd/block"
)

const (
	// relaySize is the longest piece in bytes that is relayed, and the usual one.
	relaySize = 1 << 20
	// relayMin is the shortest piece in bytes that is relayed: below it, reading and writing costs less.
	relayMin = 256 << 10
	// relayWait is how long workers wait for a relay to be opened: it takes a millisecond, as a rule, and what is done
	// meanwhile in the ordinary way takes memory that is not needed later.
	relayWait = 20 * time.Millisecond
)

// relaying is the block.Relay of a transfer, which all workers use. It is opened beside them when there is something for
// it to do. If that takes long, pieces are read and written until it is there. So are they again when it has broken.
type relaying struct {
	to   block.Relayer
	from block.Device

	start   sync.Once
	opening sync.WaitGroup
	cancel  context.CancelFunc          // of the opening, and of the relay
	opened  block.Relay                 // nil: it could not be
	usable  atomic.Pointer[block.Relay] // opened, until it breaks
	ready   chan struct{}               // closed when it has been opened, or could not be
	late    atomic.Bool                 // nobody waits for ready any more
}

// mayRelay tells whether there may be a relay, if nothing is to be offloaded.
func (t *transfer) mayRelay() bool {
	_, ok := t.Destination.(block.Relayer)
	return ok && t.Relay && t.Method == Auto
}

// prepareRelay finds out whether there may be a relay.
func (t *transfer) prepareRelay() {
	if !t.mayRelay() || t.coarse.Load() {
		return
	}
	to := t.Destination.(block.Relayer)
	t.relay = &relaying{to: to, from: t.Source, cancel: func() {}, ready: make(chan struct{})}
	t.cut = max(t.PieceSize, relaySize)
}

// get is the relay; nil: there is none, or not yet.
func (r *relaying) get(ctx context.Context) block.Relay {
	r.start.Do(func() {
		ctx, r.cancel = context.WithCancel(ctx)
		r.opening.Go(func() {
			defer close(r.ready)
			if x, err := r.to.OpenRelay(ctx, r.from, relaySize); err == nil { // else it is done without
				r.opened = x
				r.usable.Store(&x)
			}
		})
	})
	r.await()
	if x := r.usable.Load(); x != nil {
		return *x
	}
	return nil
}

// await waits until the relay is there, or could not be opened, but not long.
func (r *relaying) await() {
	if r.late.Load() {
		return
	}
	select {
	case <-r.ready:
	case <-time.After(relayWait):
	}
	r.late.Store(true)
}

// close ends the relay, which nobody uses any more.
func (r *relaying) close() {
	if r == nil {
		return
	}
	if r.usable.Load() == nil {
		r.cancel() // who knows how long the opening would take
	}
	r.opening.Wait()
	if r.opened != nil {
		_ = r.opened.Close() // all that went over it was acknowledged, or copied in another way
	}
	r.cancel()
}

// relayPiece has the relay move x, if there is one. What is left is to be read and written: all of it, or nothing. An
// error of the relay is of no interest: x is copied in another way, which has the same error if it has to.
func (w *worker) relayPiece(ctx context.Context, x piece) (rest piece, err error) {
	if w.relay == nil || x.length < relayMin || x.length > relaySize {
		return x, nil
	}
	r := w.relay.get(ctx)
	if r == nil {
		return x, nil
	}
	if err := w.limiter.wait(ctx, x.length); err != nil {
		return x, err
	}
	taken := false
	err = r.Move(x.offset, x.length, func(head []byte) []byte {
		if w.Sparse == 0 || w.Allocated || !isZero(head) {
			return nil
		}
		taken = true // there may be more of them
		w.needBuffer()
		return w.buffer[:x.length]
	})
	if err != nil {
		w.relay.usable.Store(nil)
		return x, nil
	}
	if taken {
		if err := w.writeSparse(w.buffer[:x.length], x.offset, x.over); err != nil {
			return x, err
		}
		w.progress(ReadWriting, x.length)
		return piece{}, nil
	}
	w.counted.spliced += x.length
	w.progress(Splicing, x.length)
	return piece{}, nil
}
