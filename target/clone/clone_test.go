package clone

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"cowherd/block"
	"cowherd/clonemeta"
	"cowherd/internal/fault"
	"cowherd/kcopyd"
)

var _ Metadata = (*clonemeta.Metadata)(nil)

// rig is a clone over devices whose requests a test can hold and fail.
type rig struct {
	*Clone
	source, dest *fault.Device
	from, to     *ram // below these
	meta         *memory
	events       events
	engine       kcopyd.Engine
}

// newRig makes a clone with 64 KiB regions.
func newRig(t *testing.T, size int64, change func(*Config)) *rig {
	t.Helper()
	x := &rig{from: newRAM(size), to: newRAM(size), meta: newMemory(64*kib, size), events: newEvents(), engine: newEngine("scaled")}
	fill(x.from.data, 0, 1)
	x.source, x.dest = fault.New(x.from), fault.New(x.to)
	c := Config{
		Name: "web", Source: x.source, Destination: x.dest, Metadata: x.meta, Engine: x.engine, Event: x.events.tell,
		Hydration: Hydration{Disabled: true, Threshold: 16, Batch: 4},
	}
	if change != nil {
		change(&c)
	}
	var err error
	if x.Clone, err = New(c); err != nil {
		t.Fatal(err)
	}
	x.Resume()
	return x
}

// end closes the clone and the engine.
func (x *rig) end(t *testing.T) {
	t.Helper()
	if err := x.Close(); err != nil && x.mode() == ReadWrite {
		t.Error(err)
	}
	if err := x.engine.Close(); err != nil {
		t.Error(err)
	}
}

func (x *rig) do(op block.Op, flags block.Flags, offset, length int64) *call {
	var data []byte
	if op == block.OpRead || op == block.OpWrite {
		data = bytes.Repeat([]byte{0xA5}, int(length))
	}
	return start(view{x.Clone}, op, flags, 0, offset, length, data)
}

func isWrite(r *block.Request) bool { return r.Op == block.OpWrite }
func isFlush(r *block.Request) bool { return r.Op == block.OpFlush }

// TestWhoReadsTheSource: what costs a copy and what does not.
func TestWhoReadsTheSource(t *testing.T) {
	const r = 64 << 10
	for _, test := range []struct {
		name           string
		op             block.Op
		flags          block.Flags
		offset, length int64
		reads, writes  int // of source and destination
		hydrated       uint64
	}{
		{"part", block.OpWrite, 0, 100, 200, 1, 2, 1},
		{"whole region", block.OpWrite, 0, r, r, 0, 1, 1},
		{"whole regions", block.OpWrite, 0, r, 3 * r, 0, 1, 3},
		{"region and a part", block.OpWrite, 0, r, r + 1, 1, 3, 2},
		{"parts and regions", block.OpWrite, 0, r - 1, 2*r + 2, 2, 5, 4},
		{"two parts", block.OpWrite, 0, r - 1, 2, 2, 4, 2},
		{"short last region", block.OpWrite, 0, 10 * r, 512, 0, 1, 1},
		{"part of the last region", block.OpWrite, 0, 10 * r, 511, 1, 2, 1},
		{"nothing", block.OpWrite, 0, 5, 0, 0, 1, 0},
		{"zeroes in a part", block.OpWriteZeroes, 0, 5, 5, 1, 1, 1},
		{"zeroes in a region", block.OpWriteZeroes, 0, r, r, 0, 0, 1},
		{"discard of a part", block.OpDiscard, 0, r, r - 1, 0, 0, 0},
		{"discard inside two regions", block.OpDiscard, 0, r + 1, 2*r - 2, 0, 0, 0},
		{"discard of regions and parts", block.OpDiscard, 0, r - 1, 2*r + 2, 0, 0, 2},
		{"discard of the last region", block.OpDiscard, 0, 10 * r, 512, 0, 0, 0},
		{"discard of everything", block.OpDiscard, 0, 0, 10*r + 512, 0, 0, 10},
		{"read", block.OpRead, 0, r - 1, 2 * r, 1, 0, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			x := newRig(t, 10*r+512, nil)
			defer x.end(t)
			want(t, test.name, x.do(test.op, test.flags, test.offset, test.length).wait(t), nil)
			if reads, writes := x.source.Seen(block.OpRead), x.dest.Seen(block.OpWrite); reads != test.reads || writes != test.writes {
				t.Errorf("%d reads of the source and %d writes to the destination, want %d and %d", reads, writes, test.reads, test.writes)
			}
			if st := x.Status(); st.Hydrated != test.hydrated {
				t.Errorf("%d regions are hydrated, want %d", st.Hydrated, test.hydrated)
			}
		})
	}
}

// TestDiscardPassdown: the destination is told of whole regions, in pieces that it takes, unless it is to be left out.
func TestDiscardPassdown(t *testing.T) {
	const r = 64 << 10
	for _, test := range []struct {
		name  string
		max   int64
		leave bool
		want  []int64 // offset, length, ...
		line  string
	}{
		{"at once", 1 << 30, false, []int64{r, 3 * r}, " 0 "},
		{"in pieces", 2*r + 5, false, []int64{r, 2 * r, 3 * r, r}, " 0 "},
		{"too small", r - 1, false, nil, " 1 no_discard_passdown "},
		{"none", 0, false, nil, " 1 no_discard_passdown "},
		{"left out", 1 << 30, true, nil, " 1 no_discard_passdown "},
	} {
		t.Run(test.name, func(t *testing.T) {
			size := int64(8 * r)
			to, engine := newRAM(size), newEngine("scaled")
			to.limits.DiscardMax = test.max
			var got []int64
			spy := fault.New(to)
			spy.Fail(func(r *block.Request) error {
				if r.Op == block.OpDiscard {
					got = append(got, r.Offset, r.Length)
				}
				return nil
			})
			c, err := New(Config{Source: newRAM(size), Destination: spy, Metadata: newMemory(r, size), Engine: engine,
				NoDiscardPassdown: test.leave})
			if err != nil {
				t.Fatal(err)
			}
			want(t, "discard", start(view{c}, block.OpDiscard, 0, 0, r-512, 3*r+1024, nil).wait(t), nil)
			if fmt.Sprint(got) != fmt.Sprint(test.want) {
				t.Errorf("the destination was told %v, want %v", got, test.want)
			}
			if s := c.Status().String(); !strings.Contains(s, test.line) {
				t.Errorf("status %q, want %q in it", s, test.line)
			}
			want(t, "close", errors.Join(c.Close(), engine.Close()), nil)
		})
	}
}

// TestReadsDoNotWait: a read of a region that is being hydrated goes to the source; a write waits.
func TestReadsDoNotWait(t *testing.T) {
	x := newRig(t, 256*kib, nil)
	defer x.end(t)
	x.dest.Hold(isWrite)
	first := x.do(block.OpWrite, 0, 0, 512)
	x.dest.WaitHeld(1)
	second := x.do(block.OpWrite, 0, 1024, 512)
	discard := x.do(block.OpDiscard, 0, 0, 64*kib)
	r := x.do(block.OpRead, 0, 0, 4096)
	want(t, "read", r.wait(t), nil)
	if !bytes.Equal(r.r.Data, x.from.data[:4096]) {
		t.Error("the read did not come from the source")
	}
	first.pending(t, "copying")
	second.pending(t, "copying")
	discard.pending(t, "copying")
	if x.Status().Waiting != 2 {
		t.Errorf("%d requests wait", x.Status().Waiting)
	}
	x.dest.Release()
	want(t, "first", first.wait(t), nil)
	want(t, "second", second.wait(t), nil)
	want(t, "discard", discard.wait(t), nil)
	if n := x.source.Seen(block.OpRead); n != 2 {
		t.Errorf("%d reads of the source", n)
	}
}

// TestFailedCopyFailsWhoWaits: who waits for a copy that fails is failed too, and does not try by itself.
func TestFailedCopyFailsWhoWaits(t *testing.T) {
	x := newRig(t, 256*kib, nil)
	defer x.end(t)
	x.dest.Hold(isWrite)
	calls := []*call{x.do(block.OpWrite, 0, 0, 512)}
	x.dest.WaitHeld(1)
	for i := range int64(5) {
		calls = append(calls, x.do(block.OpWrite, 0, 512*(i+1), 512))
	}
	x.to.limits.ReadOnly = true
	x.dest.Release()
	for i, c := range calls {
		if err := c.wait(t); !errors.Is(err, syscall.EROFS) {
			t.Errorf("write %d: %v", i, err)
		}
	}
	if n := x.source.Seen(block.OpRead); n != 1 {
		t.Errorf("%d copies were tried", n)
	}
	x.to.limits.ReadOnly = false
	want(t, "again", x.do(block.OpWrite, 0, 0, 512).wait(t), nil)
}

// TestFlush: a flush goes to the destination when nothing is to be committed, and else ends with a commit.
func TestFlush(t *testing.T) {
	x := newRig(t, 256*kib, nil)
	defer x.end(t)
	want(t, "flush", x.do(block.OpFlush, 0, 0, 0).wait(t), nil)
	if x.Status().Commits != 0 || x.dest.Seen(block.OpFlush) != 1 {
		t.Errorf("%d commits, %d flushes", x.Status().Commits, x.dest.Seen(block.OpFlush))
	}
	want(t, "write", x.do(block.OpWrite, 0, 0, 512).wait(t), nil)
	if x.meta.hydrated(0) {
		t.Error("committed without a reason")
	}
	want(t, "flush", x.do(block.OpFlush, 0, 0, 0).wait(t), nil)
	if !x.meta.hydrated(0) || x.Status().Commits != 1 || x.dest.Seen(block.OpFlush) != 2 {
		t.Errorf("%d commits, %d flushes", x.Status().Commits, x.dest.Seen(block.OpFlush))
	}
	want(t, "FUA, settled", x.do(block.OpWrite, block.FUA, 0, 512).wait(t), nil)
	if x.Status().Commits != 1 || x.dest.Seen(block.OpFlush) != 2 {
		t.Errorf("a write with FUA to a committed region made a commit, or a flush")
	}
	want(t, "FUA, part", x.do(block.OpWrite, block.FUA, 64*kib, 512).wait(t), nil)
	if !x.meta.hydrated(1) {
		t.Error("not committed after FUA")
	}
	want(t, "FUA, whole", x.do(block.OpWrite, block.FUA, 128*kib, 64*kib).wait(t), nil)
	if !x.meta.hydrated(2) {
		t.Error("not committed after FUA")
	}
}

// TestFlushesShareACommit: all flushes that come while one commits are served by the next one.
func TestFlushesShareACommit(t *testing.T) {
	x := newRig(t, 256*kib, nil)
	defer x.end(t)
	want(t, "write", x.do(block.OpWrite, 0, 0, 512).wait(t), nil)
	x.dest.Hold(isFlush)
	first := x.do(block.OpFlush, 0, 0, 0)
	x.dest.WaitHeld(1)
	want(t, "write", x.do(block.OpWrite, 0, 64*kib, 512).wait(t), nil)
	var calls []*call
	for range 10 {
		calls = append(calls, x.do(block.OpFlush, 0, 0, 0))
	}
	first.pending(t, "committing")
	x.dest.Release()
	want(t, "first flush", first.wait(t), nil)
	for _, c := range calls {
		want(t, "flush", c.wait(t), nil)
	}
	if st := x.Status(); st.Commits != 2 || !x.meta.hydrated(1) {
		t.Errorf("%d commits", st.Commits)
	}
}

// TestTwoPhases: a region that is hydrated while the destination is flushed is not committed with that flush.
func TestTwoPhases(t *testing.T) {
	x := newRig(t, 256*kib, nil)
	defer x.end(t)
	want(t, "write", x.do(block.OpWrite, 0, 0, 512).wait(t), nil)
	x.dest.Hold(isFlush)
	first := x.do(block.OpFlush, 0, 0, 0)
	x.dest.WaitHeld(1)
	want(t, "write", x.do(block.OpWrite, 0, 64*kib, 512).wait(t), nil)
	x.dest.Release()
	want(t, "flush", first.wait(t), nil)
	if !x.meta.hydrated(0) || x.meta.hydrated(1) {
		t.Errorf("region 0 is committed: %v, region 1: %v", x.meta.hydrated(0), x.meta.hydrated(1))
	}
}

// TestFlushDuringCommit: a flush, and a write with FUA, that come when the destination has been flushed and the metadata
// is just being committed wait for that.
func TestFlushDuringCommit(t *testing.T) {
	x := newRig(t, 256*kib, nil)
	defer x.end(t)
	want(t, "write", x.do(block.OpWrite, 0, 0, 512).wait(t), nil)
	x.meta.begun = make(chan chan struct{})
	first := x.do(block.OpFlush, 0, 0, 0)
	goOn := <-x.meta.begun
	second, fua := x.do(block.OpFlush, 0, 0, 0), x.do(block.OpWrite, block.FUA, 0, 512)
	first.pending(t, "committing")
	second.pending(t, "committing")
	fua.pending(t, "committing")
	close(goOn)
	for _, c := range []*call{first, second, fua} {
		want(t, "flush", c.wait(t), nil)
	}
}

// TestCommitTimer: what changes is committed after a second, once, and nothing runs while nothing changes.
func TestCommitTimer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newRig(t, 256*kib, nil)
		defer x.end(t)
		want(t, "write", x.do(block.OpWrite, 0, 0, 512).wait(t), nil)
		time.Sleep(commitPeriod - time.Millisecond)
		want(t, "write", x.do(block.OpWrite, 0, 64*kib, 512).wait(t), nil)
		if x.Status().Commits != 0 {
			t.Error("committed too early")
		}
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		if x.Status().Commits != 1 || !x.meta.hydrated(0) || !x.meta.hydrated(1) {
			t.Errorf("%d commits", x.Status().Commits)
		}
		time.Sleep(time.Hour)
		if x.Status().Commits != 1 {
			t.Errorf("%d commits without a change", x.Status().Commits)
		}
		want(t, "write", x.do(block.OpWrite, 0, 128*kib, 512).wait(t), nil)
		time.Sleep(2 * commitPeriod)
		synctest.Wait()
		if x.Status().Commits != 2 {
			t.Errorf("%d commits", x.Status().Commits)
		}
	})
}

// TestFailures: what a clone can still do when its metadata, or the destination's flush, has failed.
func TestFailures(t *testing.T) {
	for _, test := range []struct {
		name string
		fail func(x *rig)
		mode Mode
	}{
		{"staging", func(x *rig) { x.meta.failSet.Store(true) }, ReadOnly},
		{"commit", func(x *rig) { x.meta.failCommit.Store(true) }, ReadOnly},
		{"flush", func(x *rig) {
			x.dest.Fail(func(r *block.Request) error {
				if isFlush(r) {
					return syscall.EIO
				}
				return nil
			})
		}, ReadOnly},
		{"abort", func(x *rig) { x.meta.failCommit.Store(true); x.meta.failAbort.Store(true) }, Fail},
		{"load", func(x *rig) { x.meta.failCommit.Store(true); x.meta.failLoad.Store(true) }, Fail},
	} {
		t.Run(test.name, func(t *testing.T) {
			x := newRig(t, 256*kib, nil)
			defer x.end(t)
			want(t, "write", x.do(block.OpWrite, 0, 0, 512).wait(t), nil)
			want(t, "flush", x.do(block.OpFlush, 0, 0, 0).wait(t), nil)
			want(t, "write", x.do(block.OpWrite, 0, 64*kib, 512).wait(t), nil)
			test.fail(x)
			want(t, "flush", x.do(block.OpFlush, 0, 0, 0).wait(t), syscall.EIO)
			if e := x.events.wait(t, EventMode); e.Err == nil {
				t.Error("an event without a cause")
			}
			if test.mode == Fail {
				x.events.wait(t, EventMode)
				for _, op := range []block.Op{block.OpRead, block.OpWrite, block.OpFlush, block.OpDiscard} {
					want(t, op.String(), x.do(op, 0, 0, 64*kib).wait(t), syscall.EIO)
				}
				if s := x.Status().String(); s != "Fail" {
					t.Errorf("status %q", s)
				}
				return
			}
			readOnly(t, x)
		})
	}
}

// TestLostBeforeCommit: what was copied before a flush of the destination failed is not committed, though the flush was
// made when there was nothing to commit, or by a commit that had taken the changes before.
func TestLostBeforeCommit(t *testing.T) {
	// held holds the first flush on its way to a destination that fails it, and no other.
	held := func(t *testing.T) (*rig, *fault.Device) {
		var hold *fault.Device
		x := newRig(t, 256*kib, func(c *Config) {
			hold = fault.New(c.Destination)
			c.Destination = hold
		})
		var flushes atomic.Int32
		x.dest.Fail(func(r *block.Request) error {
			if isFlush(r) && flushes.Add(1) == 1 {
				return syscall.EIO
			}
			return nil
		})
		hold.Hold(isFlush)
		return x, hold
	}
	t.Run("a flush", func(t *testing.T) {
		x, hold := held(t)
		defer x.end(t)
		flush := x.do(block.OpFlush, 0, 0, 0)
		hold.WaitHeld(1)
		want(t, "write", x.do(block.OpWrite, 0, 0, 64*kib).wait(t), nil)
		hold.Release()
		want(t, "flush", flush.wait(t), syscall.EIO)
		x.events.wait(t, EventMode)
		want(t, "flush", x.do(block.OpFlush, 0, 0, 0).wait(t), syscall.EIO)
		if x.meta.hydrated(0) {
			t.Error("what may be lost is committed")
		}
	})
	t.Run("a commit", func(t *testing.T) {
		x, hold := held(t)
		defer x.end(t)
		done := make(chan error, 1)
		go func() { done <- x.Commit() }()
		hold.WaitHeld(1)
		want(t, "write", x.do(block.OpWrite, 0, 0, 64*kib).wait(t), nil)
		hold.Release()
		want(t, "commit", <-done, syscall.EIO)
		want(t, "flush", x.do(block.OpFlush, 0, 0, 0).wait(t), syscall.EIO)
		if x.meta.hydrated(0) {
			t.Error("what may be lost is committed")
		}
	})
}

// readOnly: region 0 was committed before the clone became read-only, region 1 was not.
func readOnly(t *testing.T, x *rig) {
	t.Helper()
	if st := x.Status(); st.Mode != ReadOnly || st.Cause == nil || st.Hydrated != 1 || !strings.HasSuffix(st.String(), " ro") {
		t.Errorf("status %+v: %v", st, st)
	}
	r := x.do(block.OpRead, 0, 0, 128*kib)
	want(t, "read", r.wait(t), nil)
	if !bytes.Equal(r.r.Data[:64*kib], x.to.data[:64*kib]) || !bytes.Equal(r.r.Data[64*kib:], x.from.data[64*kib:128*kib]) {
		t.Error("a read is wrong")
	}
	want(t, "write, hydrated", x.do(block.OpWrite, 0, 0, 512).wait(t), nil)
	want(t, "write, not hydrated", x.do(block.OpWrite, 0, 64*kib, 512).wait(t), syscall.EIO)
	want(t, "whole region", x.do(block.OpWrite, 0, 64*kib, 64*kib).wait(t), syscall.EIO)
	want(t, "discard", x.do(block.OpDiscard, 0, 64*kib, 64*kib).wait(t), nil)
	want(t, "flush", x.do(block.OpFlush, 0, 0, 0).wait(t), syscall.EIO)
	if n := x.Status().Hydrated; n != 1 {
		t.Errorf("%d regions are hydrated", n)
	}
}

// TestHydratesAll: in the end everything is hydrated and committed, the source is let go, and memory is given back.
func TestHydratesAll(t *testing.T) {
	for _, engine := range engineNames {
		t.Run(engine, func(t *testing.T) {
			x := newRig(t, 5*mib+512, func(c *Config) { c.Disabled = false })
			defer x.end(t)
			synced := make(chan error, 1)
			go func() { synced <- waitHydrated(x) }()
			x.events.wait(t, EventHydrated)
			want(t, "commit", <-synced, nil)
			if !bytes.Equal(x.from.data, x.to.data) {
				t.Error("the destination is no copy")
			}
			if st := x.Status(); st.Hydrated != st.Regions || st.TableBytes != 0 || st.SourceInUse || !x.Hydrated() {
				t.Errorf("status %+v", st)
			}
			seen := x.source.Seen(block.OpRead)
			want(t, "read", x.do(block.OpRead, 0, 0, 5*mib+512).wait(t), nil)
			want(t, "write", x.do(block.OpWrite, 0, 5, 5*mib).wait(t), nil)
			want(t, "discard", x.do(block.OpDiscard, 0, 0, 5*mib).wait(t), nil)
			want(t, "flush", x.do(block.OpFlush, 0, 0, 0).wait(t), nil)
			if x.source.Seen(block.OpRead) != seen {
				t.Error("the source was read")
			}
			// Opened again it needs no source.
			c, err := New(Config{Destination: x.dest, Metadata: x.meta, Engine: x.engine})
			if err != nil {
				t.Fatal(err)
			}
			if !c.Hydrated() {
				t.Error("not hydrated when opened again")
			}
			want(t, "read", block.Read(view{c}, make([]byte, 100), 0), nil)
			want(t, "close", c.Close(), nil)
		})
	}
}

// waitHydrated commits until everything is hydrated.
func waitHydrated(x *rig) error {
	for end := time.Now().Add(patience); !x.Hydrated(); {
		if err := x.Commit(); err != nil {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("hydration does not end: %v", x.Status())
		}
	}
	return nil
}

// TestSourceIsLetGoAfterReads: a read of the source that is in flight holds back the event.
func TestSourceIsLetGoAfterReads(t *testing.T) {
	x := newRig(t, 256*kib, nil)
	defer x.end(t)
	x.source.Hold(func(r *block.Request) bool { return r.Op == block.OpRead && r.Length == 777 })
	r := x.do(block.OpRead, 0, 1000, 777)
	x.source.WaitHeld(1)
	want(t, "write", x.do(block.OpWrite, 0, 0, 256*kib).wait(t), nil)
	want(t, "flush", x.do(block.OpFlush, 0, 0, 0).wait(t), nil)
	if x.Hydrated() || len(x.events.c) > 0 || x.Status().TableBytes != 0 {
		t.Error("the source was let go while it was read")
	}
	x.source.Release()
	want(t, "read", r.wait(t), nil)
	x.events.wait(t, EventHydrated)
	if !x.Hydrated() {
		t.Error("the source was not let go")
	}
}

// TestHolesAreNotRead: what the source knows to be zero costs no read; on a destination that is zero nothing at all.
func TestHolesAreNotRead(t *testing.T) {
	for _, zero := range []bool{false, true} {
		t.Run(fmt.Sprintf("zero=%v", zero), func(t *testing.T) {
			const size = 16 << 20
			var from *ram
			x := newRig(t, size, func(c *Config) {
				from = newRAM(size)
				fill(from.data[3*mib:3*mib+100*kib], 3*mib, 5)
				c.Source = fault.New(sparse{from})
				c.Disabled, c.DestinationIsZero = false, zero
			})
			defer x.end(t)
			if !zero {
				// It may be anything; only hydration is to look at it, and not the test before that.
				want(t, "hydrated", x.do(block.OpWriteZeroes, 0, 8*mib, 64*kib).wait(t), nil)
			}
			want(t, "hydration", waitHydrated(x), nil)
			if !bytes.Equal(from.data, x.to.data) {
				t.Error("the destination is no copy")
			}
			if n := x.engineReads(); n > 3 {
				t.Errorf("%d regions were read", n)
			}
			if n := x.dest.Seen(block.OpWriteZeroes); zero && n > 0 || !zero && n < 2 {
				t.Errorf("%d writes of zeroes", n)
			}
		})
	}
}

// engineReads is how many regions the engine has read.
func (x *rig) engineReads() int64 { return int64(x.engine.Stats().BytesRead) / (64 * kib) }

// TestHolesArePieces: a large hole is not made one write of zeroes that everybody else waits for.
func TestHolesArePieces(t *testing.T) {
	for _, none := range []bool{false, true} {
		size := 34 * mib
		if none {
			size = mib
		}
		x := newRig(t, size, func(c *Config) {
			c.Source = fault.New(sparse{newRAM(size)})
			c.Threshold = 4
		})
		most := int64(zeroBytes)
		if none {
			x.to.limits.WriteZeroesMax = 0
			most = 4 * 64 * kib
		}
		x.dest.Hold(func(r *block.Request) bool { return r.Op.Writes() })
		x.SetHydration(true)
		x.dest.WaitHeld(1)
		x.SetHydration(false)
		if n := int64(x.Status().Hydrating) * 64 * kib; n > most {
			t.Errorf("%d bytes are in flight, write zeroes is missing: %v", n, none)
		}
		x.dest.Release()
		x.SetHydration(true)
		want(t, "hydration", waitHydrated(x), nil)
		x.end(t)
	}
}

// TestZeroDestinationNoMore: once a copy has failed, what is not hydrated is not known to be zero any more.
func TestZeroDestinationNoMore(t *testing.T) {
	const size = 1 << 20
	x := newRig(t, size, func(c *Config) {
		c.Source = fault.New(sparse{newRAM(size)})
		c.DestinationIsZero = true
	})
	defer x.end(t)
	// The write of the region's data fails after it has reached the disk.
	x.dest.Fail(func(r *block.Request) error {
		if r.Op == block.OpWrite && r.Length == 64*kib {
			fill(x.to.data[r.Offset:r.End()], r.Offset, 99)
			return syscall.EIO
		}
		return nil
	})
	want(t, "write", x.do(block.OpWrite, 0, 64*kib, 64*kib).wait(t), syscall.EIO)
	x.dest.Fail(nil)
	x.SetHydration(true)
	want(t, "hydration", waitHydrated(x), nil)
	if len(bytes.Trim(x.to.data, "\x00")) != 0 {
		t.Error("the rest of a write that failed is seen")
	}
}

// TestRetries: a region that cannot be read is tried a few times, with pauses, and given up; the others go on; and it is
// tried again when somebody asks.
func TestRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newRig(t, 2*mib, nil)
		defer x.end(t)
		bad, tried := int64(5*64*kib), atomic.Int64{}
		x.source.Fail(func(r *block.Request) error {
			if r.Offset <= bad && bad < r.End() {
				if r.Length == 64*kib {
					tried.Add(1)
				}
				return syscall.EIO
			}
			return nil
		})
		began := time.Now()
		x.SetHydration(true)
		e := x.events.wait(t, EventRegionFailed)
		if took := time.Since(began); took < 2*time.Second || took > time.Minute {
			t.Errorf("given up after %v", took)
		}
		if n := tried.Load(); n < 4 || n > attemptsMax {
			t.Errorf("the region was tried %d times", n)
		}
		x.events.wait(t, EventStopped)
		synctest.Wait()
		st := x.Status()
		if st.Hydrated != st.Regions-1 || st.Failed != 1 || !errors.Is(st.FirstError, syscall.EIO) || e.Err == nil || st.Stopped {
			t.Errorf("status %+v", st)
		}
		before := tried.Load()
		time.Sleep(time.Hour)
		if tried.Load() != before {
			t.Error("it is tried for ever")
		}
		x.source.Fail(nil)
		want(t, "message", x.Message([]string{"retry_hydration"}), nil)
		time.Sleep(2 * time.Second)
		x.events.wait(t, EventHydrated)
		if st := x.Status(); st.Hydrated != st.Regions || st.Failed != 0 || !bytes.Equal(x.from.data, x.to.data) {
			t.Errorf("status %+v", st)
		}
	})
}

// TestRetriesAtDifferentTimes: when the first of two regions that have failed is copied at last, the other is not forgotten.
func TestRetriesAtDifferentTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newRig(t, 2*mib, func(c *Config) { c.Threshold, c.Batch = 1, 1 })
		defer x.end(t)
		var first, second atomic.Int64
		x.source.Fail(func(r *block.Request) error {
			switch {
			case r.Offset == 3*64*kib && first.Add(1) == 1:
				return syscall.EIO
			case r.Offset == 9*64*kib && second.Add(1) == 1:
				time.Sleep(pauseFirst / 2) // nobody else is at the source
				return syscall.EIO
			}
			return nil
		})
		x.SetHydration(true)
		time.Sleep(10 * pauseFirst)
		synctest.Wait()
		if first.Load() != 2 || second.Load() != 2 || x.Status().Hydrated != 32 {
			t.Errorf("tried %d and %d times; status %v", first.Load(), second.Load(), x.Status())
		}
	})
}

// TestSuspendBetweenRetries: a region that waits to be tried again when hydration is suspended is tried after it is resumed.
func TestSuspendBetweenRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newRig(t, 2*mib, nil)
		defer x.end(t)
		var tried atomic.Int64
		x.source.Fail(func(r *block.Request) error {
			if r.Offset <= 3*64*kib && 3*64*kib < r.End() && tried.Add(1) < 4 {
				return syscall.EIO
			}
			return nil
		})
		x.SetHydration(true)
		synctest.Wait()
		if n := x.Status().Hydrated; n != 31 {
			t.Fatalf("%d regions are hydrated at first", n)
		}
		want(t, "suspend", x.Suspend(), nil)
		before := tried.Load()
		time.Sleep(time.Hour)
		if tried.Load() != before {
			t.Error("tried while it is suspended")
		}
		x.Resume()
		synctest.Wait()
		want(t, "suspend", x.Suspend(), nil)
		x.Resume()
		time.Sleep(time.Minute)
		synctest.Wait()
		if st := x.Status(); st.Hydrated != st.Regions {
			t.Errorf("status %v", st)
		}
	})
}

// TestFailureBehindTheLastLook: a copy that fails when the only worker has just found nothing makes it look again.
func TestFailureBehindTheLastLook(t *testing.T) {
	x := newRig(t, 2*mib, nil)
	defer x.end(t)
	y := &x.hydrator
	h := x.pool.take(x.Clone, x.table.Load(), 0)
	if h.claim(0, 2) != 2 {
		t.Fatal("two regions are not to be had")
	}
	y.mu.Lock()
	y.enabled, y.alive, y.regions, y.copies, y.again = true, 1, 2, 1, false
	y.mu.Unlock()
	y.copied(h, syscall.EIO)
	y.mu.Lock()
	again, pending := y.again, y.pending
	y.alive, y.enabled = 0, false
	y.mu.Unlock()
	if !again || pending != 2 {
		t.Errorf("look again: %v, with %d runs to be tried again", again, pending)
	}
	x.SetHydration(true)
	want(t, "hydration", waitHydrated(x), nil)
}

// TestDeadSource: hydration stops when too many regions fail.
func TestDeadSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := newRig(t, 4097*2*4*kib, func(c *Config) { c.Metadata = newMemory(4*kib, 4097*2*4*kib) })
		defer x.end(t)
		var reads atomic.Int64
		x.source.Fail(func(*block.Request) error { reads.Add(1); return syscall.EIO })
		x.SetHydration(true)
		x.events.wait(t, EventStopped)
		synctest.Wait()
		// What is in flight when it stops fails as well: as many regions as the threshold at most.
		if st := x.Status(); !st.Stopped || st.Failed < failedMax || st.Failed > failedMax+16 || st.Hydrated != 0 {
			t.Errorf("status %+v", st)
		}
		if n := reads.Load(); n > failedMax*(attemptsMax+2)*2 {
			t.Errorf("%d reads", n)
		}
		before := reads.Load()
		time.Sleep(time.Hour)
		if reads.Load() != before {
			t.Error("it goes on")
		}
		x.source.Fail(nil)
		x.Retry()
		time.Sleep(time.Minute)
		x.events.wait(t, EventHydrated)
	})
}

// TestPromote: a region that was read is hydrated before those in front of it.
func TestPromote(t *testing.T) {
	for _, hottest := range []bool{false, true} {
		t.Run(fmt.Sprintf("hottest=%v", hottest), func(t *testing.T) {
			x := newRig(t, 64*mib, func(c *Config) {
				c.PromoteOnRead, c.Threshold, c.Batch = !hottest, 1, 1
				if hottest {
					c.Order = Hottest
				}
			})
			defer x.end(t)
			x.dest.Hold(isWrite)
			x.SetHydration(true)
			x.dest.WaitHeld(1)
			for range 3 {
				want(t, "read", x.do(block.OpRead, 0, 32*mib, 512).wait(t), nil)
			}
			order := make(chan int64, 2048)
			x.dest.Fail(func(r *block.Request) error {
				if isWrite(r) {
					order <- r.Offset
				}
				return nil
			})
			x.dest.Release()
			if first := <-order; first != 32*mib {
				t.Errorf("the next region is at %d", first)
			}
			want(t, "hydration", waitHydrated(x), nil)
			if !bytes.Equal(x.from.data, x.to.data) {
				t.Error("the destination is no copy")
			}
		})
	}
}

// TestMessages: enable, disable, threshold, batch.
func TestMessages(t *testing.T) {
	x := newRig(t, 256*kib, nil)
	defer x.end(t)
	for _, test := range []struct {
		words string
		ok    bool
		want  string
	}{
		{"hydration_threshold 7", true, "8 6/1024 128 0/4 0 1 no_hydration 4 hydration_threshold 7 hydration_batch_size 4 rw"},
		{"HYDRATION_batch_size 9", true, "8 6/1024 128 0/4 0 1 no_hydration 4 hydration_threshold 7 hydration_batch_size 9 rw"},
		{"hydration_threshold x", false, ""},
		{"hydration_threshold -1", false, ""},
		{"hydration_threshold", false, ""},
		{"hydrate", false, ""},
		{"", false, ""},
		{"enable_hydration now", false, ""},
		{"disable_hydration", true, "8 6/1024 128 0/4 0 1 no_hydration 4 hydration_threshold 7 hydration_batch_size 9 rw"},
	} {
		err := x.Message(strings.Fields(test.words))
		if test.ok != (err == nil) || err != nil && !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%q: %v", test.words, err)
		}
		if got := x.Status().String(); test.ok && got != test.want {
			t.Errorf("%q: status %q, want %q", test.words, got, test.want)
		}
	}
	want(t, "enable", x.Message([]string{"enable_hydration"}), nil)
	want(t, "hydration", waitHydrated(x), nil)
	if got, want := x.Info(), "8 6/1024 128 4/4 0 0 4 hydration_threshold 7 hydration_batch_size 9 rw"; got != want {
		t.Errorf("status %q, want %q", got, want)
	}
}

// TestOptions: table lines, good and bad.
func TestOptions(t *testing.T) {
	for _, test := range []struct{ in, out, err string }{
		{"8", "8", ""},
		{"128 1 no_hydration 2 hydration_threshold 1", "128 1 no_hydration", ""},
		{"2097152 2 NO_hydration no_discard_passdown", "2097152 2 no_hydration no_discard_passdown", ""},
		{"64 0 4 hydration_threshold 5 hydration_batch_size 6", "64 0 4 hydration_threshold 5 hydration_batch_size 6", ""},
		{"64 0 0", "64", ""},
		{"", "", "Invalid number of arguments"},
		{"4", "", "Invalid region size"},
		{"2097153", "", "Invalid region size"},
		{"4194304", "", "Invalid region size"},
		{"x", "", "Invalid region size"},
		{"24", "", "Region size is not a power of 2"},
		{"8 3 a b c", "", "Invalid number of feature arguments"},
		{"8 1", "", "Invalid number of feature arguments"},
		{"8 x", "", "Invalid number of feature arguments"},
		{"8 1 discard", "", "Invalid feature argument"},
		{"8 0 6 a b c d e f", "", "Invalid number of core arguments"},
		{"8 0 2 hydration_threshold", "", "Invalid number of core arguments"},
		{"8 0 1 hydration_threshold", "", "Number of core arguments must be even"},
		{"8 0 2 threshold 1", "", "Invalid core argument"},
		{"8 0 2 hydration_threshold x", "", "Invalid value"},
	} {
		o, err := ParseOptions(strings.Fields(test.in))
		if test.err == "" && (err != nil || o.String() != test.out) {
			t.Errorf("%q: %q, %v; want %q", test.in, o, err, test.out)
		}
		if test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err) || !errors.Is(err, syscall.EINVAL)) {
			t.Errorf("%q: %v, want %q", test.in, err, test.err)
		}
	}
}

// FuzzOptions: what is accepted means the same when it is printed and read again.
func FuzzOptions(f *testing.F) {
	f.Add("64 0 4 hydration_threshold 5 hydration_batch_size 6")
	f.Add("2097152 2 no_hydration no_discard_passdown")
	f.Add("8 1")
	f.Fuzz(func(t *testing.T, line string) {
		o, err := ParseOptions(strings.Fields(line))
		if err != nil {
			return
		}
		again, err := ParseOptions(strings.Fields(o.String()))
		again.Threshold, again.Batch = max(1, again.Threshold), max(1, again.Batch)
		o.Threshold, o.Batch = max(1, o.Threshold), max(1, o.Batch)
		if err != nil || again != o {
			t.Errorf("%q is %+v, printed and read again %+v: %v", line, o, again, err)
		}
	})
}

// TestNewRefuses: what a clone cannot be made of.
func TestNewRefuses(t *testing.T) {
	good := func() Config {
		return Config{Source: newRAM(1 * mib), Destination: newRAM(1 * mib), Metadata: newMemory(64*kib, 1*mib)}
	}
	for _, test := range []struct {
		name, want string
		change     func(*Config)
	}{
		{"source too small", "larger than source device", func(c *Config) { c.Source = newRAM(1*mib - 512) }},
		{"destination too small", "larger than destination device", func(c *Config) { c.Destination = newRAM(1*mib - 512) }},
		{"no length", "for a device of 0 bytes", func(c *Config) { c.Metadata = newMemory(64*kib, 0) }},
		{"regions too small", "invalid region size", func(c *Config) { c.Metadata = newMemory(2*kib, 1*mib) }},
		{"regions too large", "invalid region size", func(c *Config) { c.Metadata = newMemory(2048*mib, 1*mib) }},
		{"regions of an odd size", "not a power of 2", func(c *Config) { c.Metadata = newMemory(12*kib, 1*mib) }},
		{"no source", "there is no source", func(c *Config) { c.Source = nil }},
		{"read-only destination", "read-only", func(c *Config) { c.Destination.(*ram).limits.ReadOnly = true }},
		{"large blocks", "logical block", func(c *Config) { c.Source.(*ram).limits.LogicalBlock = 128 << 10 }},
		{"metadata that cannot be read", "read which regions", func(c *Config) { c.Metadata.(*memory).failLoad.Store(true) }},
	} {
		c := good()
		test.change(&c)
		if _, err := New(c); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
	}
}

// TestExtents: hydrated regions have the destination's extents, the others the source's.
func TestExtents(t *testing.T) {
	from, to := newRAM(256*kib), newRAM(256*kib)
	fill(from.data[64*kib:], 64*kib, 1)
	x := newRig(t, 256*kib, func(c *Config) {
		c.Source, c.Destination = sparse{from}, sparse{to}
	})
	defer x.end(t)
	want(t, "zeroes", x.do(block.OpWriteZeroes, 0, 128*kib, 64*kib).wait(t), nil)
	var got []block.Extent
	err := x.Extents(4*kib, 250*kib-4*kib, func(e block.Extent) bool {
		if n := len(got); n > 0 && got[n-1].Zero == e.Zero {
			got[n-1].Length += e.Length
			return true
		}
		got = append(got, e)
		return true
	})
	want(t, "extents", err, nil)
	wanted := []block.Extent{
		{Offset: 4 * kib, Length: 60 * kib, Hole: true, Zero: true}, {Offset: 64 * kib, Length: 64 * kib},
		{Offset: 128 * kib, Length: 64 * kib, Hole: true, Zero: true}, {Offset: 192 * kib, Length: 58 * kib},
	}
	if fmt.Sprint(got) != fmt.Sprint(wanted) {
		t.Errorf("got %v, want %v", got, wanted)
	}
}

// TestKernelsClones: clones that a kernel has made show what the kernel showed, and its status line.
func TestKernelsClones(t *testing.T) {
	found, err := filepath.Glob(filepath.Join(os.Getenv("COWHERD_FIXTURES"), "f-clone-*", "meta.img.zst"))
	if err != nil || os.Getenv("COWHERD_FIXTURES") == "" || len(found) == 0 {
		t.Skip("COWHERD_FIXTURES names no folder of fixtures")
	}
	for _, meta := range found {
		dir := filepath.Dir(meta)
		t.Run(filepath.Base(dir), func(t *testing.T) {
			engine := newEngine("scaled")
			m, err := clonemeta.Open(unpacked(t, meta), clonemeta.Params{})
			if err != nil {
				t.Fatal(err)
			}
			c, err := New(Config{
				Source: unpacked(t, filepath.Join(dir, "source.img.zst")), Destination: unpacked(t, filepath.Join(dir, "dest.img.zst")),
				Metadata: m, Engine: engine, Hydration: Hydration{Disabled: true},
			})
			if err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile(filepath.Join(dir, "status.txt"))
			want(t, "status.txt", err, nil)
			lines := regexp.MustCompile(`(?m)^clone: 0 \d+ clone (8 .*)$`).FindAllStringSubmatch(string(text), -1)
			if got, want := c.Info(), lines[len(lines)-1][1]; got != want {
				t.Errorf("status %q, want %q", got, want)
			}
			p := make([]byte, c.Size())
			want(t, "read", block.Read(view{c}, p, 0), nil)
			sums, err := os.ReadFile(filepath.Join(dir, "sums.txt"))
			want(t, "sums.txt", err, nil)
			if sum := fmt.Sprintf("clone %x ", sha256.Sum256(p)); !strings.Contains(string(sums), sum) {
				t.Errorf("the view is %s, want\n%s", sum, sums)
			}
			want(t, "close", errors.Join(c.Close(), engine.Close()), nil)
		})
	}
}

// unpacked is an image that was packed by zstd.
func unpacked(t *testing.T, path string) *ram {
	t.Helper()
	out, err := exec.Command("zstd", "-q", "-d", "--long=27", "-c", path).Output()
	if err != nil {
		t.Skipf("zstd: %v", err)
	}
	d := newRAM(0)
	d.data = out
	return d
}
