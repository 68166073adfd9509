package block

import (
	"bytes"
	"sync"
	"syscall"
	"testing"

	"cowherd/internal/invariant"
)

// keeper is a Device that keeps what is submitted.
type keeper struct{ kept []*Request }

func (k *keeper) Submit(r *Request) { k.kept = append(k.kept, r) }
func (k *keeper) Size() int64       { return 1 << 30 }
func (k *keeper) Limits() Limits    { return NoLimits() }

// outcome is a Completer that notes the result.
type outcome struct {
	calls int
	err   error
}

func (o *outcome) Complete(_ *Request, err error) { o.calls++; o.err = err }

func TestFan(t *testing.T) {
	var k keeper
	var o outcome
	r := &Request{Op: OpWrite, Flags: FUA, Queue: 3, Offset: 100, Length: 10, Data: []byte("0123456789")}
	r.Push(&o)
	f := NewFan(r)
	k.Submit(f.Part(100, 4))
	k.Submit(f.Part(104, 6))
	f.Done(nil)
	for i, want := range []string{"0123", "456789"} {
		p := k.kept[i]
		if p.Op != OpWrite || p.Flags != FUA || p.Queue != 3 || !bytes.Equal(p.Data, []byte(want)) || cap(p.Data) != len(want) {
			t.Errorf("part %d is %+v", i, p)
		}
	}
	k.kept[1].Complete(syscall.ENOSPC)
	if o.calls != 0 {
		t.Fatal("completed before its last part")
	}
	k.kept[0].Complete(syscall.EIO)
	if o.calls != 1 || o.err != syscall.ENOSPC {
		t.Errorf("%d completions, error %v; want one with the first error", o.calls, o.err)
	}
}

func TestFanOfNothing(t *testing.T) {
	var o outcome
	r := &Request{Op: OpFlush}
	r.Push(&o)
	NewFan(r).Done(nil)
	if o.calls != 1 || o.err != nil {
		t.Errorf("%d completions, error %v", o.calls, o.err)
	}
}

// TestFanInParallel completes the parts of many fans on other goroutines.
func TestFanInParallel(t *testing.T) {
	const parts = 16
	for range 200 {
		var k keeper
		done := make(chan error, 2)
		r := &Request{Op: OpDiscard, Length: parts}
		r.Push(completerFunc(func(_ *Request, err error) { done <- err }))
		f := NewFan(r)
		for i := range int64(parts) {
			k.Submit(f.Part(i, 1))
		}
		f.Done(nil)
		var wg sync.WaitGroup
		for _, p := range k.kept {
			wg.Go(func() { p.Complete(nil) })
		}
		wg.Wait()
		if err := <-done; err != nil || len(done) > 0 {
			t.Fatalf("error %v, %d completions too many", err, len(done))
		}
	}
}

type completerFunc func(*Request, error)

func (f completerFunc) Complete(r *Request, err error) { f(r, err) }

func TestFanDoesNotAllocate(t *testing.T) {
	if invariant.Enabled {
		t.Skip("under the race detector a sync.Pool drops what it is given at random")
	}
	var k keeper
	k.kept = make([]*Request, 0, 2)
	var o outcome
	var r Request
	allocs := testing.AllocsPerRun(100, func() {
		k.kept = k.kept[:0]
		r.Op, r.Length = OpDiscard, 8
		r.Push(&o)
		f := NewFan(&r)
		k.Submit(f.Part(0, 4))
		k.Submit(f.Part(4, 4))
		f.Done(nil)
		k.kept[0].Complete(nil)
		k.kept[1].Complete(nil)
		r.Reset()
	})
	if allocs != 0 {
		t.Errorf("%v allocations for each request", allocs)
	}
}
