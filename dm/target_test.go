package dm_test

import (
	"bytes"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"cowherd/block"
	"cowherd/dm"
)

// TestSetTarget: what was kept while the device was suspended goes to the new target, and so does all that follows.
func TestSetTarget(t *testing.T) {
	first, second := &ram{data: make([]byte, 4096)}, &ram{data: bytes.Repeat([]byte{2}, 4096)}
	d := dm.NewDevice("x", &window{lower: first, size: 4096}, false)
	other := &lister{window{lower: second, size: 4096}}
	if err := d.SetTarget(other); !errors.Is(err, syscall.EBUSY) || !strings.Contains(err.Error(), `"x"`) {
		t.Errorf("new target of a running device: %v", err)
	}
	if err := d.Suspend(inTime(t)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 512)
	kept := submit(d, block.OpRead, 0, 0, got)
	if err := d.SetTarget(other); err != nil {
		t.Fatal(err)
	}
	kept.pending(t, "the device is suspended")
	d.Resume()
	kept.want(t, nil)
	if got[0] != 2 {
		t.Errorf("what was kept reads %d from the old target", got[0])
	}
	var holes int
	if err := d.Extents(0, 4096, func(e block.Extent) bool {
		if e.Hole {
			holes++
		}
		return true
	}); err != nil || holes != 1 {
		t.Errorf("the new target's extents: %d holes, %v", holes, err)
	}
	if err := d.Close(inTime(t)); err != nil {
		t.Fatal(err)
	}
	if err := d.SetTarget(other); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("new target of a removed device: %v", err)
	}
}

// limited is a window with limits of its own.
type limited struct {
	window
	limits block.Limits
}

func (l *limited) Limits() block.Limits { return l.limits }

// TestSetTargetRefuses: a target that cannot do what users were told is refused.
func TestSetTargetRefuses(t *testing.T) {
	base := block.Limits{LogicalBlock: 512, PreferredIO: 4096, DiscardMax: 8192, WriteZeroesMax: 8192}
	target := func(size int64, change func(*block.Limits)) dm.Target {
		l := base
		change(&l)
		return &limited{window{lower: &ram{data: make([]byte, 4096)}, size: size}, l}
	}
	same := func(*block.Limits) {}
	d := dm.NewDevice("x", target(4096, same), false)
	if err := d.Suspend(inTime(t)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		text   string
		target dm.Target
	}{
		{"3584 bytes", target(3584, same)},
		{"logical block", target(4096, func(l *block.Limits) { l.LogicalBlock = 1024 })},
		{"read-only", target(4096, func(l *block.Limits) { l.ReadOnly = true })},
		{"discards", target(4096, func(l *block.Limits) { l.DiscardMax = 0 })},
		{"zeroes", target(4096, func(l *block.Limits) { l.WriteZeroesMax = 4096 })},
		{"flushes", target(4096, func(l *block.Limits) { l.NeedsFlush = true })},
	} {
		if err := d.SetTarget(c.target); !errors.Is(err, syscall.EINVAL) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", c.text, err)
		}
	}
	more := target(4096, func(l *block.Limits) { l.LogicalBlock, l.DiscardMax, l.WriteZeroesMax = 1, 1<<20, 1<<20 })
	if err := d.SetTarget(more); err != nil {
		t.Error(err)
	}
	if d.Limits() != base {
		t.Errorf("limits %+v are not what users were told", d.Limits())
	}
	d.Resume()

	readOnly := dm.NewDevice("r", target(4096, same), true)
	if err := readOnly.Suspend(inTime(t)); err != nil {
		t.Fatal(err)
	}
	if err := readOnly.SetTarget(target(4096, func(l *block.Limits) { l.ReadOnly = true })); err != nil {
		t.Error(err)
	}
	readOnly.Resume()
}

// tally is a window that counts what it maps.
type tally struct {
	window
	count atomic.Int64
}

func (w *tally) Map(r *block.Request) block.Device {
	w.count.Add(1)
	return w.window.Map(r)
}

// TestSetTargetUnderLoad: no request is lost or goes to two targets while they change, and each change is complete: a
// target whose turn is over sees no request any more.
func TestSetTargetUnderLoad(t *testing.T) {
	lower := &ram{data: make([]byte, 4096*4)}
	targets := []*tally{{window: window{lower: lower, size: 4096 * 4}}, {window: window{lower: lower, size: 4096 * 4}}}
	d := dm.NewDevice("x", targets[0], false)
	const each = 2000
	var writers sync.WaitGroup
	for w := range 4 {
		writers.Go(func() {
			p := make([]byte, 512)
			for range each {
				if err := block.Do(d, block.OpWrite, 0, int64(w)*4096, 512, p); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for turn := range 100 {
		if err := d.Suspend(inTime(t)); err != nil {
			t.Fatal(err)
		}
		old, next := targets[turn%2], targets[(turn+1)%2]
		if err := d.SetTarget(next); err != nil {
			t.Fatal(err)
		}
		seen := old.count.Load()
		d.Resume()
		if now := old.count.Load(); now != seen {
			t.Fatalf("the old target has seen %d requests after its turn", now-seen)
		}
	}
	writers.Wait()
	if n := targets[0].count.Load() + targets[1].count.Load(); n != 4*each {
		t.Errorf("%d requests were mapped, want %d", n, 4*each)
	}
}
