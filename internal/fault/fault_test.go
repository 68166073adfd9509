package fault_test

import (
	"errors"
	"sync/atomic"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"cowherd/block"
	"cowherd/internal/fault"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// recorder is a device that remembers the offsets of what it was asked, and completes at once.
type recorder struct{ order []int64 }

func (d *recorder) Size() int64          { return 1 << 20 }
func (d *recorder) Limits() block.Limits { return block.NoLimits() }

func (d *recorder) Submit(r *block.Request) {
	d.order = append(d.order, r.Offset)
	r.Complete(nil)
}

// lister is a recorder with a hole.
type lister struct{ recorder }

func (d *lister) Extents(offset, length int64, yield func(block.Extent) bool) error {
	yield(block.Extent{Offset: offset, Length: length, Hole: true})
	return nil
}

type call struct {
	r    block.Request
	done chan error
}

func (c *call) Complete(_ *block.Request, err error) { c.done <- err }

func start(d block.Device, op block.Op, offset int64) *call {
	c := &call{done: make(chan error, 1)}
	c.r.Op, c.r.Offset = op, offset
	c.r.Push(c)
	d.Submit(&c.r)
	return c
}

func TestHold(t *testing.T) {
	lower := &recorder{}
	d := fault.New(lower)
	d.Hold(func(r *block.Request) bool { return r.Offset >= 10 })
	first, second, other := start(d, block.OpRead, 10), start(d, block.OpWrite, 11), start(d, block.OpRead, 1)
	d.WaitHeld(2)
	if err := <-other.done; err != nil {
		t.Error(err)
	}
	d.Hold(nil) // holds no more, and keeps what it holds
	if err := <-start(d, block.OpRead, 12).done; err != nil {
		t.Error(err)
	}
	if len(first.done)+len(second.done) != 0 {
		t.Error("a held request is over")
	}
	d.Release()
	if err := errors.Join(<-first.done, <-second.done); err != nil {
		t.Error(err)
	}
	for i, want := range []int64{1, 12, 10, 11} {
		if lower.order[i] != want {
			t.Fatalf("order %v", lower.order)
		}
	}
	if reads, writes := d.Seen(block.OpRead), d.Seen(block.OpWrite); reads != 3 || writes != 1 {
		t.Errorf("%d reads and %d writes were seen", reads, writes)
	}
}

func TestWaitHeld(t *testing.T) {
	d := fault.New(&recorder{})
	d.Hold(func(*block.Request) bool { return true })
	calls := make(chan *call, 1)
	go func() { calls <- start(d, block.OpRead, 0) }()
	d.WaitHeld(1)
	d.Release()
	if err := <-(<-calls).done; err != nil {
		t.Error(err)
	}
}

func TestFail(t *testing.T) {
	lower := &recorder{}
	d := fault.New(lower)
	d.Fail(func(r *block.Request) error {
		if r.Op == block.OpWrite {
			return syscall.ENOSPC
		}
		return nil
	})
	if err := <-start(d, block.OpWrite, 5).done; !errors.Is(err, syscall.ENOSPC) || block.Errno(err) != syscall.ENOSPC {
		t.Errorf("got %v", err)
	}
	if err := <-start(d, block.OpRead, 6).done; err != nil {
		t.Error(err)
	}
	d.Fail(nil)
	if err := <-start(d, block.OpWrite, 7).done; err != nil {
		t.Error(err)
	}
	if len(lower.order) != 2 {
		t.Errorf("the device saw %v: what fails must not reach it", lower.order)
	}
}

func TestExtents(t *testing.T) {
	for _, lower := range []block.Device{&recorder{}, &lister{}} {
		_, knows := lower.(block.ExtentLister)
		var got []block.Extent
		err := fault.New(lower).Extents(5, 6, func(x block.Extent) bool { got = append(got, x); return true })
		if err != nil || len(got) != 1 || got[0] != (block.Extent{Offset: 5, Length: 6, Hole: knows}) {
			t.Errorf("got %v, %v", got, err)
		}
	}
}

// counting is a device that many goroutines may use.
type counting struct {
	recorder
	count atomic.Int64
}

func (d *counting) Submit(r *block.Request) {
	d.count.Add(1)
	r.Complete(nil)
}

func TestAsync(t *testing.T) {
	const count = 200
	lower := &counting{}
	d := fault.NewAsync(lower, 3, 1)
	if d.Size() != lower.Size() || d.Limits() != lower.Limits() {
		t.Error("size or limits differ")
	}
	var calls []*call
	for i := range int64(count) {
		calls = append(calls, start(d, block.OpRead, i))
	}
	for _, c := range calls[:count/2] {
		if err := <-c.done; err != nil {
			t.Error(err)
		}
	}
	d.Close() // waits for the others
	if n := lower.count.Load(); n != count {
		t.Errorf("%d of %d requests were served", n, count)
	}
}
