package clone

import (
	"cmp"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"cowherd/block"
)

// commitPeriod is how long a change waits for a commit that nobody asks for (the kernel's COMMIT_PERIOD).
const commitPeriod = time.Second

// committer is the group commit. Requests that must end with a commit gather; whoever finds nobody at work starts the
// runner, a goroutine that commits until nobody is left. See the package comment for what a commit is.
//
// Invariants:
//
//  1. running is true from the first that gathers until the runner has found nothing to do, with mu held.
//  2. The metadata is the runner's alone.
type committer struct {
	clone *Clone
	// busy: changes have been taken off the table that are not durable yet.
	busy atomic.Bool

	mu sync.Mutex
	// Flushes, and writes with FUA whose data is written.
	gathered block.List // +checklocks:mu
	// Others that wait for a commit.
	asked []chan<- error // +checklocks:mu
	// The timer has expired.
	due bool // +checklocks:mu
	// The timer runs.
	armed bool // +checklocks:mu
	// No timer is started any more.
	closed  bool // +checklocks:mu
	running bool // +checklocks:mu

	flush   block.Request // of the destination, the runner's
	flushed chan error
	timer   *time.Timer
	work    sync.WaitGroup // the runner, and goroutines that complete requests
	commits atomic.Uint64
	// lost: why a flush of the destination has failed that no commit has made.
	lost atomic.Pointer[error]
}

func (x *committer) init(c *Clone) {
	x.clone, x.flushed = c, make(chan error, 1)
	x.timer = time.AfterFunc(time.Hour, x.expire)
	x.timer.Stop()
}

// add makes r wait for a commit that has yet to begin.
func (x *committer) add(r *block.Request) {
	x.mu.Lock()
	x.gathered.PushBack(r)
	x.startLocked()
	x.mu.Unlock()
}

// Commit makes durable what is hydrated, and everything that was written before.
func (c *Clone) Commit() error {
	done := make(chan error, 1)
	x := &c.committer
	x.mu.Lock()
	x.asked = append(x.asked, done)
	x.startLocked()
	x.mu.Unlock()
	return <-done
}

// startLocked starts the runner if there is none.
//
// +checklocks:x.mu
func (x *committer) startLocked() {
	if !x.running {
		x.running = true
		x.work.Go(x.run)
	}
}

// arm makes the first change of a transaction be committed in a while.
func (x *committer) arm() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.armed && !x.closed {
		x.armed = true
		x.timer.Reset(commitPeriod)
	}
}

// now makes a commit begin at once, without waiting for it.
func (x *committer) now() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.closed {
		x.due = true
		x.startLocked()
	}
}

func (x *committer) expire() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.armed && !x.closed {
		x.armed, x.due = false, true
		x.startLocked()
	}
}

// run commits until nobody asks for it.
func (x *committer) run() {
	for {
		runtime.Gosched() // let those gather who are about to
		x.mu.Lock()
		list, asked := x.gathered.Take(), x.asked
		if list.Len() == 0 && len(asked) == 0 && !x.due {
			x.running = false
			x.mu.Unlock()
			return
		}
		x.asked, x.due, x.armed = nil, false, false
		x.timer.Stop()
		x.mu.Unlock()
		err := x.clone.commit()
		for _, done := range asked {
			done <- err
		}
		if list.Len() > 0 {
			// What follows is others' I/O; meanwhile the next commit may begin.
			x.work.Go(func() { complete(list, err) })
		}
	}
}

// complete ends requests that waited for a commit.
func complete(list block.List, err error) {
	for r := list.PopFront(); r != nil; r = list.PopFront() {
		if err != nil {
			r.Complete(block.WrapError(r, err))
			continue
		}
		r.Complete(nil)
	}
}

// flushing is a Clone as the Completer of flushes of the destination that no commit makes. When one fails, what was copied
// to regions that are not committed yet may be lost, even if the next flush succeeds: they must not be committed.
type flushing Clone

func (x *flushing) Complete(r *block.Request, err error) {
	if err != nil {
		(*Clone)(x).committer.lose(err)
	}
	r.Complete(err)
}

// lose makes the next commit, which begins at once, fail for this reason.
func (x *committer) lose(cause error) {
	x.lost.CompareAndSwap(nil, &cause)
	x.now()
}

// commit is one commit. The caller is the runner.
func (c *Clone) commit() error {
	if c.mode() != ReadWrite {
		return c.modeError() // what was hydrated last is lost, and with it perhaps what was written there
	}
	x := &c.committer
	x.busy.Store(true)
	defer x.busy.Store(false)
	t := c.table.Load()
	var changed []*page
	if t != nil {
		changed = t.takeChanged()
		slices.SortFunc(changed, func(a, b *page) int { return cmp.Compare(a.index, b.index) })
	}
	if len(changed) > 0 {
		if err := c.stage(t, changed); err != nil {
			return c.abort(fmt.Errorf("stage the hydrated regions: %w", err))
		}
	}
	err := x.flushDestination()
	if lost := x.lost.Load(); err == nil && lost != nil {
		err = *lost
	}
	if err != nil {
		err = fmt.Errorf("flush the destination: %w", err)
		if t != nil {
			return c.abort(err) // with no change too: what is being copied may be lost
		}
		return err
	}
	if len(changed) > 0 {
		if err := c.meta.Commit(); err != nil {
			return c.abort(fmt.Errorf("commit the metadata: %w", err))
		}
		x.commits.Add(1)
		for _, p := range changed {
			t.shrink(p.index)
		}
	}
	// Regions are counted after they have been noted as changed: that all are counted and none is noted means that all are
	// committed.
	if t != nil && t.count() == c.count && t.changed.Load() == nil {
		c.finished()
	}
	return nil
}

// flushDestination makes durable what was written to the destination before. The caller is the runner.
func (x *committer) flushDestination() error {
	x.flush.Reset()
	x.flush.Op = block.OpFlush
	x.flush.Push(x)
	x.clone.dest.Submit(&x.flush)
	return <-x.flushed
}

// Complete is told of the end of the destination's flush.
func (x *committer) Complete(_ *block.Request, err error) { x.flushed <- err }

// stage gives the metadata the words that have changed, as they are now.
func (c *Clone) stage(t *table, changed []*page) error {
	return c.meta.SetWords(func(yield func(uint64, uint64) bool) {
		for _, p := range changed {
			if !t.takeWords(p, yield) {
				return
			}
		}
	})
}

// finished is called when everything is hydrated and committed: nothing is looked up any more.
func (c *Clone) finished() {
	c.table.Store(nil)
	c.hydrator.finished()
	c.wakeAllWaiting()
	c.checkDetached()
}

// abort gives up the transaction after an error: the clone is read-only from now on, and what is hydrated is what the
// metadata says. Regions that were hydrated since the last commit are read from the source again.
func (c *Clone) abort(cause error) error {
	c.setMode(ReadOnly, cause)
	c.destZero.Store(false)
	var t *table
	err := c.meta.Abort()
	if err == nil {
		t, err = c.loadTable()
	}
	if err != nil {
		c.setMode(Fail, fmt.Errorf("%w; then: abort the transaction: %w", cause, err))
	} else {
		c.table.Store(t)
	}
	c.wakeAllWaiting()
	return c.modeError()
}

// setMode changes the mode for the worse.
func (c *Clone) setMode(m Mode, cause error) {
	err := fmt.Errorf("%w: %w", cause, syscall.EIO)
	c.cause.Store(&err)
	c.state.Store(int32(m))
	c.event(Event{Kind: EventMode, Mode: m, Err: cause})
}

// wakeAllWaiting lets all look again that wait for any region.
func (c *Clone) wakeAllWaiting() {
	for i := range c.waiting.buckets {
		c.wakeAll(&c.waiting.buckets[i].list)
	}
}

// close stops the timer and waits for the runner; commits may be asked for no more.
func (x *committer) close() {
	x.mu.Lock()
	x.closed = true
	x.timer.Stop()
	x.mu.Unlock()
	x.work.Wait()
}
