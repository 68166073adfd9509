package transfer

import (
	"context"
	"fmt"
	"sync"
	"time"
)

const (
	// writeBackStep is how many bytes are copied before their write-back is started.
	writeBackStep = 16 << 20
	// journalInterval is how often the journal is brought up to date.
	journalInterval = time.Second
)

// writeBacker is a device that can be told to begin with making data durable. It is an optional power of a destination.
type writeBacker interface {
	// WriteBack starts to write a range to the disk, and does not wait for the end. It is no flush.
	WriteBack(offset, length int64) error
}

// keeper looks after what has been copied: write-back, and the journal.
type keeper struct {
	*planner
	device   writeBacker // nil: there is nothing to start
	started  int64       // the write-back of all before has been started
	recorded int64       // the mark in the journal
	doubt    bool        // a flush or write-back has failed: what it was to cover may be gone, whatever a later one says

	stop    chan struct{} // nil: it does not run
	running sync.WaitGroup
}

func newKeeper(p *planner) *keeper {
	k := &keeper{planner: p, started: p.Start, recorded: p.Start}
	if p.Flush {
		k.device, _ = p.Destination.(writeBacker)
	}
	return k
}

// begin has it run beside the workers, if it does not yet. An error of it is the cause that cancel is called with.
func (k *keeper) begin(cancel context.CancelCauseFunc) {
	if k.stop != nil {
		return
	}
	k.stop = make(chan struct{})
	k.running.Go(func() {
		if err := k.run(); err != nil {
			cancel(err)
		}
	})
}

// end stops it, and waits for it.
func (k *keeper) end() {
	if k.stop != nil {
		close(k.stop)
		k.running.Wait()
	}
}

// run works until stop is closed.
func (k *keeper) run() error {
	var tick <-chan time.Time
	if k.Journal != nil {
		ticker := time.NewTicker(journalInterval)
		defer ticker.Stop()
		tick = ticker.C
	}
	for {
		select {
		case <-k.stop:
			return nil
		case <-k.changed:
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
	mark := k.reached()
	if k.device == nil || mark < k.started+writeBackStep {
		return nil
	}
	if err := k.device.WriteBack(k.started, mark-k.started); err != nil {
		k.doubt = true
		return fmt.Errorf("destination: %w", err)
	}
	k.started = mark
	return nil
}

// record makes what has been copied durable, and then writes it down.
func (k *keeper) record() error {
	mark := k.reached() / PieceSizeMax * PieceSizeMax
	if mark <= k.recorded {
		return nil
	}
	if err := flush(k.Destination); err != nil {
		k.doubt = true
		return fmt.Errorf("destination: %w", err)
	}
	if err := k.Journal.Record(mark); err != nil {
		return err
	}
	k.recorded = mark
	return nil
}

// last writes down what had been copied when the transfer ended before its time. Where that fails the journal stays as it
// was, and what it says is still true; the transfer has an error of its own. After a flush that has failed there is no
// other: a server that passes fsync on would call it a success, although what was to be durable is lost.
func (k *keeper) last() {
	if k.Journal != nil && !k.doubt {
		_ = k.record()
	}
}
