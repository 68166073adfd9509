package transfer

import (
	"fmt"
	"sync"
	"time"

	"cowherd/block"
)

const (
	// writeBackStep is how many bytes are copied before their write-back is started.
	writeBackStep = 16 << 20
	// journalInterval is how often the journal is brought up to date.
	journalInterval = time.Second
)

// tracker knows the low-water mark: all before it has been done.
type tracker struct {
	changed chan struct{} // the mark has risen; room for one

	mu sync.Mutex
	// +checklocks:mu
	mark int64
	// +checklocks:mu
	order []*batch // in the order of planning, those that are not done and all behind them
}

func (t *tracker) init(start int64) {
	t.changed = make(chan struct{}, 1)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.mark, t.order = start, nil
}

// begin takes note of b, which is behind all that came before.
func (t *tracker) begin(b *batch) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.order = append(t.order, b)
}

// finish takes note that b is done, and gives those that the mark has passed back to free, which has room for all.
func (t *tracker) finish(b *batch, free chan<- *batch) {
	t.mu.Lock()
	b.done = true
	passed := 0
	for passed < len(t.order) && t.order[passed].done {
		t.mark = t.order[passed].end
		free <- t.order[passed] // under the lock, because it never waits
		passed++
	}
	t.order = t.order[:copy(t.order, t.order[passed:])]
	t.mu.Unlock()
	if passed > 0 {
		select {
		case t.changed <- struct{}{}:
		default: // it has been told and has not looked yet
		}
	}
}

// reached is the mark.
func (t *tracker) reached() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.mark
}

// writeBacker is a device that can be told to begin with making data durable. It is an optional power of a destination.
type writeBacker interface {
	// WriteBack starts to write a range to the disk, and does not wait for the end. It is no flush.
	WriteBack(offset, length int64) error
}

// keeper looks after what has been copied: write-back, and the journal.
type keeper struct {
	*transfer
	device   writeBacker // nil: there is nothing to start
	started  int64       // the write-back of all before has been started
	recorded int64       // the mark in the journal
}

func newKeeper(t *transfer) *keeper {
	k := &keeper{transfer: t, started: t.Start, recorded: t.Start}
	if t.Flush {
		k.device, _ = t.Destination.(writeBacker)
	}
	return k
}

// run works until stop is closed.
func (k *keeper) run(stop <-chan struct{}) error {
	var tick <-chan time.Time
	if k.Journal != nil {
		ticker := time.NewTicker(journalInterval)
		defer ticker.Stop()
		tick = ticker.C
	}
	for {
		select {
		case <-stop:
			return nil
		case <-k.tracker.changed:
			if err := k.writeBack(); err != nil {
				return err
			}
		case <-tick:
			if err := k.record(); err != nil {
				return err
			}
		}
	}
}

// writeBack starts the write-back of what has been copied, if it is enough.
func (k *keeper) writeBack() error {
	mark := k.tracker.reached()
	if k.device == nil || mark < k.started+writeBackStep {
		return nil
	}
	if err := k.device.WriteBack(k.started, mark-k.started); err != nil {
		return fmt.Errorf("destination: %w", err)
	}
	k.started = mark
	return nil
}

// record makes what has been copied durable, and then writes it down.
func (k *keeper) record() error {
	mark := k.tracker.reached() / PieceSizeMax * PieceSizeMax
	if mark <= k.recorded {
		return nil
	}
	if err := block.Flush(k.Destination); err != nil {
		return fmt.Errorf("destination: %w", err)
	}
	if err := k.Journal.Record(mark); err != nil {
		return err
	}
	k.recorded = mark
	return nil
}

// last writes down what had been copied when the transfer ended before its time. Where that fails the journal stays as it
// was, and what it says is still true; the transfer has an error of its own.
func (k *keeper) last() {
	if k.Journal != nil {
		_ = k.record()
	}
}
