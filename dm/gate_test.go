package dm

import (
	"bytes"
	"context"
	"runtime"
	"testing"
	"time"

	"cowherd/block"
)

// done is a Completer that runs a function, then says so.
type done struct {
	f    func() error
	over chan error
}

func (d *done) Complete(_ *block.Request, err error) {
	if d.f != nil {
		err = d.f()
	}
	d.over <- err
}

// nothing is a target and a device that completes everything at once.
type nothing struct{}

func (nothing) Size() int64                       { return 512 }
func (nothing) Limits() block.Limits              { return block.NoLimits() }
func (n nothing) Map(*block.Request) block.Device { return n }
func (nothing) Submit(r *block.Request)           { r.Complete(nil) }

// TestKeepAfterResume: a request finds the gate closed, and before it is kept the gate is opened. Nobody would submit
// it later.
func TestKeepAfterResume(t *testing.T) {
	d := NewDevice("x", nothing{}, false)
	if err := d.Suspend(t.Context()); err != nil {
		t.Fatal(err)
	}
	d.mu.Lock()
	c := &done{over: make(chan error, 1)}
	go func() {
		r := &block.Request{Op: block.OpFlush}
		r.Push(c)
		d.Submit(r)
	}()
	deadline := time.Now().Add(time.Minute)
	for stacks := make([]byte, 1<<20); ; runtime.Gosched() {
		if bytes.Contains(stacks[:runtime.Stack(stacks, true)], []byte("(*Device).leave(")) {
			break // it waits for the lock
		}
		if time.Now().After(deadline) {
			t.Fatal("the request never came to the gate")
		}
	}
	d.openLocked()
	d.mu.Unlock()
	select {
	case err := <-c.over:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("the request was lost")
	}
}

// TestSuspendFromCompletion: a request is no longer in flight when its submitter is told, who may therefore do what
// he likes.
func TestSuspendFromCompletion(t *testing.T) {
	d := NewDevice("x", nothing{}, false)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c := &done{f: func() error { return d.Suspend(ctx) }, over: make(chan error, 1)}
	r := &block.Request{Op: block.OpFlush}
	r.Push(c)
	d.Submit(r)
	if err := <-c.over; err != nil {
		t.Error(err)
	}
	d.Resume()
}
