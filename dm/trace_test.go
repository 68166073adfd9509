package dm_test

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"cowherd/block"
	"cowherd/dm"
	"cowherd/target"
	"cowherd/target/linear"
	"cowherd/trace"
)

// lives are all that a has seen end since the last call.
func lives(a *trace.Analyzer) (all []trace.Life) {
	a.Poll(func(l *trace.Life) { all = append(all, *l) })
	return all
}

// TestTrace traces an origin with a snapshot: a write that copies, one that need not, one that is held, a read.
func TestTrace(t *testing.T) {
	x := newRig(t, map[string]block.Device{"o": memory(t, 1<<20), "c": memory(t, 1<<20)})
	x.mustCreate("base", "0 2048 snapshot-origin o")
	x.mustCreate("snap", "0 2048 snapshot o c N 8")
	d := x.open("base")
	tracer := trace.New()
	a := trace.NewAnalyzer(tracer)
	write := func(offset int64) *call { return submit(d, block.OpWrite, 1, offset, make([]byte, 4096)) }
	do(t, write(0).wait(t)) // not traced yet
	do(t, d.Trace(t.Context(), tracer))
	do(t, write(4096).wait(t))
	do(t, write(4096).wait(t))
	do(t, submit(d, block.OpRead, 0, 0, make([]byte, 4096)).wait(t))
	do(t, d.Suspend(t.Context()))
	held := write(0)
	held.pending(t, "suspended")
	d.Resume()
	do(t, held.wait(t))
	do(t, d.Trace(t.Context(), nil))
	do(t, write(8192).wait(t)) // not traced any more

	all := lives(a)
	copies := slices.DeleteFunc(slices.Clone(all), func(l trace.Life) bool { return l.Class == "" })
	if len(copies) != 1 || copies[0].Class != "cow" || copies[0].Length != 4096 || copies[0].Queue != 1 {
		t.Errorf("copies: %+v", copies)
	}
	all = slices.DeleteFunc(all, func(l trace.Life) bool { return l.Class != "" })
	if len(all) != 4 {
		t.Fatalf("%d lives, want 4: %+v", len(all), all)
	}
	for i, l := range all {
		what := fmt.Sprintf("life %d: %+v", i, l)
		if (l.Op == "read") != (l.Queue == 0) {
			t.Error(what)
		}
		if l.Length != 4096 || l.CPU < 0 || l.Device == 0 || l.Held+l.Map+l.Wait+l.Device != l.Total {
			t.Error(what)
		}
	}
	waits, holds := 0, 0
	for _, l := range all {
		if l.Wait > 0 {
			waits++
		}
		if l.Held > 0 {
			holds++
		}
	}
	if waits != 1 || holds != 1 {
		t.Errorf("%d have waited and %d were held, want 1 and 1: %+v", waits, holds, all)
	}
}

// TestTraceStack: of two devices that lie upon one another both are traced; the upper one tells of what came through it.
func TestTraceStack(t *testing.T) {
	leaf := memory(t, 1<<20)
	lower := dm.NewDevice("lower", linear.New(target.Lower{Device: leaf, Name: target.Name("x")}, 0, 1<<20), false)
	upper := dm.NewDevice("upper", linear.New(target.Lower{Device: lower, Name: target.Name("y")}, 0, 1<<20), false)
	tracers := [2]*trace.Tracer{trace.New(), trace.New()}
	analyzers := [2]*trace.Analyzer{trace.NewAnalyzer(tracers[0]), trace.NewAnalyzer(tracers[1])}
	through := func(want0, want1 int) {
		t.Helper()
		do(t, submit(upper, block.OpRead, 0, 0, make([]byte, 512)).wait(t))
		if got0, got1 := len(lives(analyzers[0])), len(lives(analyzers[1])); got0 != want0 || got1 != want1 {
			t.Errorf("lower has told of %d, upper of %d, want %d and %d", got0, got1, want0, want1)
		}
	}
	through(0, 0)
	do(t, lower.Trace(t.Context(), tracers[0]))
	through(1, 0)
	do(t, upper.Trace(t.Context(), tracers[1]))
	through(0, 1)
	do(t, lower.Trace(t.Context(), nil))
	through(0, 1)
	do(t, upper.Trace(t.Context(), nil))
	through(0, 0)
}

// TestTraceSwitched switches tracing on and off while requests run, and devices are suspended: none is lost, and all that
// are told of are whole.
func TestTraceSwitched(t *testing.T) {
	leaf := memory(t, 1<<20)
	d := dm.NewDevice("d", linear.New(target.Lower{Device: leaf, Name: target.Name("x")}, 0, 1<<20), false)
	tracer := trace.New()
	a := trace.NewAnalyzer(tracer)
	var over atomic.Bool
	var users sync.WaitGroup
	for q := range 4 {
		users.Go(func() {
			for !over.Load() {
				if err := submit(d, block.OpWrite, block.Queue(q), int64(q)*512, make([]byte, 512)).wait(t); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for i := range 50 {
		if i%2 == 0 {
			do(t, d.Trace(t.Context(), tracer))
		} else {
			do(t, d.Trace(t.Context(), nil))
		}
		if i%5 == 0 {
			do(t, d.Suspend(t.Context()))
			d.Resume()
		}
		for _, l := range lives(a) {
			if l.Total < l.Device || l.CPU < 0 && tracer.Dropped() == 0 {
				t.Fatalf("life %+v", l)
			}
		}
	}
	over.Store(true)
	users.Wait()
	a.Poll(nil)
	if s := a.Summary(); s.Dropped == 0 && s.Broken > 4*50/5 { // those that were kept when a trace ended
		t.Errorf("%d lives are broken, though no record was dropped", s.Broken)
	}
}
