package snapshot

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/dm"
)

func TestNewErrors(t *testing.T) {
	origin := newRAM(1<<20 + 512)
	cow := newRAM(1 << 20)
	tests := []struct {
		name   string
		change func(c *Config, origin, cow *ram)
		want   string
	}{
		{"fine", func(*Config, *ram, *ram) {}, ""},
		{"chunk size 0", func(c *Config, _, _ *ram) { c.ChunkSize = 0 }, "not a power of 2"},
		{"chunk size 12 KiB", func(c *Config, _, _ *ram) { c.ChunkSize = 12 << 10 }, "not a power of 2"},
		{"chunk size 2 KiB", func(c *Config, _, _ *ram) { c.ChunkSize = 2 << 10 }, "too low"},
		{"chunk size 2 GiB", func(c *Config, _, _ *ram) { c.ChunkSize = 2 << 30 }, "too high"},
		{"origin's block", func(_ *Config, o, _ *ram) { o.limits.LogicalBlock = 8192 }, "logical block size 8192"},
		{"COW device's block", func(_ *Config, _, c *ram) { c.limits.LogicalBlock = 8192 }, "logical block size 8192"},
		{"block of the last chunk", func(_ *Config, o, c *ram) { o.limits.LogicalBlock, c.limits.LogicalBlock = 512, 4096 },
			"not a multiple of the COW device's logical block size 4096"},
		{"passdown alone", func(c *Config, _, _ *ram) { c.DiscardPassdownOrigin = true }, "needs discard_zeroes_cow"},
		{"read-only COW device", func(_ *Config, _, c *ram) { c.limits.ReadOnly = true }, "read-only"},
		{"read-only origin", func(_ *Config, o, _ *ram) { o.limits.ReadOnly = true }, ""},
	}
	for _, test := range tests {
		o, w := *origin, *cow
		c := Config{Name: "x", COW: &w, Store: cowstore.NewTransient(1<<20, 0, 4096), ChunkSize: 4096}
		test.change(&c, &o, &w)
		c.Origin = NewOrigin(&o)
		_, err := New(c)
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %q", test.name, err, test.want)
		}
	}
}

func TestAddOfAnotherOrigin(t *testing.T) {
	g := newRigWith(t, "scaled", 64*kib, 4*kib)
	if err := NewOrigin(g.ram).Add(g.snaps[0].Snapshot); err == nil {
		t.Error("a snapshot was added to an origin that it does not belong to")
	}
}

// TestOrderOfSnapshots: the largest chunks come first, as in the kernel.
func TestOrderOfSnapshots(t *testing.T) {
	g := newRigWith(t, "scaled", 64*kib, 4*kib, 32*kib, 8*kib, 32*kib)
	var got []string
	for _, s := range g.origin.Snapshots() {
		got = append(got, s.name)
	}
	if want := "snap1 snap3 snap2 snap0"; strings.Join(got, " ") != want {
		t.Errorf("got %v, want %s", got, want)
	}
	g.drop(g.snaps[3])
	g.drop(g.snaps[1])
	if list := g.origin.Snapshots(); len(list) != 2 || list[0] != g.snaps[2].Snapshot || list[1] != g.snaps[0].Snapshot {
		t.Errorf("after two drops: %v", list)
	}
}

func TestLimits(t *testing.T) {
	origin, cow := newRAM(1<<20), newRAM(1<<20)
	origin.limits.LogicalBlock, cow.limits.LogicalBlock = 512, 4096
	origin.limits.NeedsFlush, origin.limits.ReadOnly = false, true
	o := NewOrigin(origin)
	if l := o.Limits(); l.WriteZeroesMax != writeZeroesMax || l.DiscardMax != origin.limits.DiscardMax {
		t.Errorf("origin: %+v", l)
	}
	limits := func(c Config) block.Limits {
		c.Origin, c.COW, c.ChunkSize, c.Store = o, cow, 64*kib, cowstore.NewTransient(1<<20, 0, 64*kib)
		s, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		return s.Limits()
	}
	l := limits(Config{})
	if l.LogicalBlock != 4096 || l.ReadOnly || !l.NeedsFlush || l.DiscardMax != 0 || l.WriteZeroesMax != writeZeroesMax {
		t.Errorf("plain: %+v", l)
	}
	if l := limits(Config{ReadOnly: true}); !l.ReadOnly {
		t.Errorf("read-only: %+v", l)
	}
	l = limits(Config{DiscardZeroesCOW: true})
	if l.DiscardMax != writeZeroesMax || l.DiscardGranularity != 64*kib {
		t.Errorf("discard: %+v", l)
	}
	// A piece of a discard is at most as long as the devices below can take.
	cow.limits.WriteZeroesMax, cow.limits.DiscardMax = 128*kib, 96*kib
	if l := limits(Config{DiscardZeroesCOW: true}); l.DiscardMax != 96*kib || l.WriteZeroesMax != 128*kib {
		t.Errorf("short limits of the COW device: %+v", l)
	}
	cow.limits.DiscardMax = 0
	if l := limits(Config{DiscardZeroesCOW: true}); l.DiscardMax != 128*kib {
		t.Errorf("short write zeroes of the COW device: %+v", l)
	}
	origin.limits.DiscardMax = 32 * kib
	if l := limits(Config{DiscardZeroesCOW: true, DiscardPassdownOrigin: true}); l.DiscardMax != 32*kib {
		t.Errorf("short discard of the origin: %+v", l)
	}
}

func TestReadOnlySnapshot(t *testing.T) {
	g := newRig(t, "scaled", 64*kib)
	x := g.take(Config{ChunkSize: 4 * kib, ReadOnly: true, DiscardZeroesCOW: true})
	start(x.dev, block.OpWrite, 0, 0, []byte("x")).want(t, syscall.EROFS)
	startRange(x.dev, block.OpWriteZeroes, 0, 10).want(t, syscall.EROFS)
	startRange(x.dev, block.OpDiscard, 0, 10).want(t, syscall.EROFS)
	g.write(0, pattern(2, 10_000)).want(t, nil)
	g.wantFrozen(x)
	if err := block.Flush(x.dev); err != nil {
		t.Error(err)
	}
}

// TestFastZeroes: a write of zeroes that must be fast is refused rather than that it may break the snapshot, when the
// COW device has no fast way.
func TestFastZeroes(t *testing.T) {
	g := newRigWith(t, "scaled", 64*kib, 4*kib)
	x := g.snaps[0]
	x.upper.Fail(func(r *block.Request) error {
		if r.Op == block.OpWriteZeroes && r.Flags&block.Fast != 0 {
			return syscall.ENOTSUP
		}
		return nil
	})
	for _, length := range []int64{100, 4096, 20_000} {
		if err := block.Do(x.dev, block.OpWriteZeroes, block.Fast, 4096, length, nil); !errors.Is(err, syscall.ENOTSUP) {
			t.Errorf("%d bytes: got %v", length, err)
		}
	}
	g.wantFrozen(x)
}

// TestDiscard: the kernel's rules for discards of a snapshot.
func TestDiscard(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		for _, passdown := range []bool{false, true} {
			const size = 64*kib + 100
			g := newRig(t, engine, size)
			x := g.take(Config{ChunkSize: 4 * kib, DiscardZeroesCOW: true, DiscardPassdownOrigin: passdown})
			y := g.take(Config{ChunkSize: 8 * kib})
			g.write(8*kib, pattern(2, 8*kib)).want(t, nil) // chunks 2 and 3 of x are copied, 1 of y
			g.write(size-1, pattern(2, 1)).want(t, nil)    // and the last ones
			copies := x.upper.Seen(block.OpWrite)
			// Half of chunk 1, which is on the origin; chunk 2; half of chunk 3.
			startRange(x.dev, block.OpDiscard, 6*kib, 8*kib).want(t, nil)
			startRange(x.dev, block.OpDiscard, 64*kib, 100).want(t, nil) // the last one is discarded whole
			startRange(x.dev, block.OpDiscard, 0, 0).want(t, nil)

			wantX, wantY := bytes.Clone(g.frozen), bytes.Clone(g.frozen)
			clear(wantX[8*kib : 12*kib])
			fill(wantX[12*kib:14*kib], discards)
			clear(wantX[64*kib:])
			origin := g.reads(g.dev, 0, size)
			if passdown {
				fill(wantX[6*kib:8*kib], discards)
				fill(wantY[6*kib:8*kib], discards) // its chunk is on the origin; nothing was copied for the discard
				for _, b := range append(origin[6*kib:14*kib:14*kib], origin[64*kib:]...) {
					if b != discards {
						t.Fatal("the origin was not told")
					}
				}
			} else if n := g.upper.Seen(block.OpDiscard); n != 0 {
				t.Errorf("%d discards reached the origin", n)
			}
			same(t, g.reads(x.dev, 0, size), wantX)
			same(t, g.reads(y.dev, 0, size), wantY)
			if n := x.upper.Seen(block.OpWrite); n != copies {
				t.Errorf("a discard copied %d chunks", n-copies)
			}
			if z, d := x.upper.Seen(block.OpWriteZeroes), x.upper.Seen(block.OpDiscard); z != 2 || d != 1 {
				t.Errorf("the COW device saw %d writes of zeroes and %d discards, want 2 and 1", z, d)
			}
			startRange(y.dev, block.OpDiscard, 0, 100).want(t, syscall.ENOTSUP)
		}
	})
}

// TestDiscardWithoutPowers: a COW device that can neither discard nor write zeroes makes discards of no effect.
func TestDiscardWithoutPowers(t *testing.T) {
	g := newRig(t, "scaled", 64*kib)
	cow := newRAM(64 * kib)
	cow.limits.DiscardMax, cow.limits.WriteZeroesMax = 0, 0
	x := g.take(Config{ChunkSize: 4 * kib, COW: cow, DiscardZeroesCOW: true})
	g.write(0, pattern(2, 20_000)).want(t, nil)
	startRange(x.dev, block.OpDiscard, 100, 18_000).want(t, nil)
	startRange(x.dev, block.OpWriteZeroes, 0, 10).want(t, syscall.ENOTSUP)
	g.wantFrozen(x)
}

// TestOriginDiscard: while there are snapshots the origin drops discards, without a copy.
func TestOriginDiscard(t *testing.T) {
	g := newRigWith(t, "scaled", 64*kib, 4*kib)
	x := g.snaps[0]
	startRange(g.dev, block.OpDiscard, 0, 64*kib).want(t, nil)
	if n := g.upper.Seen(block.OpDiscard) + x.upper.Seen(block.OpWrite); n != 0 {
		t.Errorf("%d requests reached the devices", n)
	}
	g.wantFrozen(x)
	g.drop(x)
	startRange(g.dev, block.OpDiscard, 0, 64*kib).want(t, nil)
	if n := g.upper.Seen(block.OpDiscard); n != 1 {
		t.Errorf("without snapshots %d discards reached the device", n)
	}
}

// extents lists what a device knows.
func extents(d *dm.Device, offset, length int64) (found []block.Extent, err error) {
	err = d.Extents(offset, length, func(x block.Extent) bool { found = append(found, x); return true })
	return found, err
}

// TestExtents: holes are the origin's where nothing was copied, and what was copied is data.
func TestExtents(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRig(t, engine, 64*kib)
		startRange(g.dev, block.OpWriteZeroes, 8*kib, 40*kib).want(t, nil)
		g.frozen = g.reads(g.dev, 0, 64*kib)
		x := g.take(Config{ChunkSize: 4 * kib})
		g.write(20*kib, pattern(2, 10)).want(t, nil)
		startRange(g.dev, block.OpWriteZeroes, 48*kib, 10*kib).want(t, nil)
		g.wantFrozen(x)
		got, err := extents(x.dev, 1000, 60*kib)
		if err != nil {
			t.Fatal(err)
		}
		want := "0 1000-8192, 1 8192-20480, 0 20480-24576, 1 24576-49152, 0 49152-62440"
		if s := describe(got); s != want {
			t.Errorf("got  %s\nwant %s", s, want)
		}
		stopped := 0
		if err := x.dev.Extents(0, 64*kib, func(block.Extent) bool { stopped++; return false }); err != nil || stopped != 1 {
			t.Errorf("stopped after %d extents, %v", stopped, err)
		}
		if got, err := extents(x.dev, 5000, 0); len(got) != 0 || err != nil {
			t.Errorf("no bytes: %v, %v", got, err)
		}
	})
}

// describe merges neighbours that are alike: "zero start-end, ...".
func describe(list []block.Extent) string {
	var parts []string
	for i := 0; i < len(list); {
		j := i
		for j < len(list) && list[j].Zero == list[i].Zero {
			j++
		}
		zero := "0"
		if list[i].Zero {
			zero = "1"
		}
		parts = append(parts, zero+" "+fmt.Sprint(list[i].Offset)+"-"+fmt.Sprint(list[j-1].Offset+list[j-1].Length))
		i = j
	}
	return strings.Join(parts, ", ")
}

// TestExtentsOfAnInvalidSnapshot: they would be the origin's of today, and who skips what they call zeroes would get a
// view that never was.
func TestExtentsOfAnInvalidSnapshot(t *testing.T) {
	g := newRig(t, "scaled", 64*kib)
	x := g.take(Config{ChunkSize: 4 * kib, Store: cowstore.NewTransient(0, 0, 4*kib)})
	startRange(g.dev, block.OpWriteZeroes, 0, 8*kib).want(t, nil)
	if got, err := extents(x.dev, 0, 64*kib); !errors.Is(err, errEIO) || len(got) != 0 {
		t.Errorf("got %v, %v", got, err)
	}
}

// failingLister is a device that cannot tell its extents.
type failingLister struct{ block.Device }

func (failingLister) Extents(int64, int64, func(block.Extent) bool) error { return errInjected }

// TestExtentsOfTheOrigin: its error is the snapshot's, and one that knows nothing has data everywhere.
func TestExtentsOfTheOrigin(t *testing.T) {
	g := newRig(t, "scaled", 64*kib)
	g.origin.device = failingLister{g.upper}
	x := g.take(Config{ChunkSize: 4 * kib})
	if _, err := extents(x.dev, 0, 64*kib); !errors.Is(err, errInjected) {
		t.Errorf("got %v", err)
	}
	g.drop(x)
	g.origin.device = struct{ block.Device }{g.upper}
	x = g.take(Config{ChunkSize: 4 * kib})
	g.write(10_000, []byte("x")).want(t, nil)
	if got, err := extents(x.dev, 100, 60_000); err != nil || describe(got) != "0 100-60100" {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestCopiedStops(t *testing.T) {
	g := newRigWith(t, "scaled", 64*kib, 4*kib)
	g.write(10_000, []byte("x")).want(t, nil)
	count := 0
	g.snaps[0].Copied(0, 64*kib, func(int64, int64, bool) bool { count++; return count < 2 })
	if count != 2 {
		t.Errorf("%d ranges, want 2", count)
	}
}

// TestTableFull: no room for an exception costs the snapshot, as no room for its data does.
func TestTableFull(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRigWith(t, engine, 64*kib, 4*kib, 4*kib)
		for _, x := range g.snaps {
			x.table.slabs.Store(slabsMax)
		}
		g.write(0, []byte("x")).want(t, nil)
		g.wantInvalid(g.snaps[0], syscall.ENOMEM)
		g.wantInvalid(g.snaps[1], syscall.ENOMEM)
		g.write(0, []byte("y")).want(t, nil)
		y := g.take(Config{ChunkSize: 4 * kib})
		y.table.slabs.Store(slabsMax)
		start(y.dev, block.OpWrite, 0, 100, []byte("z")).want(t, errEIO)
		g.wantInvalid(y, syscall.ENOMEM)
	})
}

// slowLister is a device whose extents are looked up while a test watches.
type slowLister struct {
	block.Device
	during func()
}

func (l *slowLister) Extents(offset, length int64, yield func(block.Extent) bool) error {
	l.during()
	yield(block.Extent{Offset: offset, Length: length, Hole: true, Zero: true})
	return nil
}

// TestExtentsAgainstWrites: while the origin is asked, writes to what it is asked about wait; if the snapshot becomes
// invalid they do not, and the answer is an error.
func TestExtentsAgainstWrites(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		for _, invalid := range []bool{false, true} {
			g := newRig(t, engine, 64*kib)
			var x *rigSnap
			var write *call
			lister := &slowLister{Device: g.upper}
			g.origin.device = lister
			x = g.take(Config{ChunkSize: 4 * kib})
			lister.during = func() {
				if write = g.write(0, pattern(2, 8192)); invalid {
					x.waitState(t, 1, draining)
					x.upper.Fail(failing(matching(block.OpWrite, 0, 64*kib), errInjected))
					g.write(40_000, pattern(2, 1)).want(t, nil)
					return
				}
				x.waitState(t, 1, draining)
				write.pending(t, "write to a range whose extents are looked up")
			}
			got, err := extents(x.dev, 4096, 4096)
			if invalid && (!errors.Is(err, errEIO) || len(got) != 0) || !invalid && (err != nil || len(got) != 1 || !got[0].Zero) {
				t.Errorf("invalid=%v: got %v, %v", invalid, got, err)
			}
			write.want(t, nil)
		}
	})
}

func TestStatusString(t *testing.T) {
	g := newRigWith(t, "scaled", 64*kib, 4*kib)
	x := g.snaps[0]
	if s := x.Status().String(); s != "0/128 0" {
		t.Errorf("got %q", s)
	}
	g.write(4000, pattern(2, 200)).want(t, nil)
	start(x.dev, block.OpWrite, 0, 16*kib, pattern(2, 4096)).want(t, nil)
	st := x.Status()
	if st.String() != "24/128 0" || st.Copied != 2 || st.Overwritten != 1 || st.Pending != 0 || st.TableBytes <= 0 {
		t.Errorf("got %q, %+v", st, st)
	}
	if st.ChunkSize != 4*kib || st.Invalid != nil {
		t.Errorf("%+v", st)
	}
}

// TestWithoutSnapshots: an origin alone passes everything on, at any size.
func TestWithoutSnapshots(t *testing.T) {
	g := newRig(t, "scaled", 100_000)
	g.write(0, pattern(2, 100_000)).want(t, nil)
	same(t, g.reads(g.dev, 0, 100_000), pattern(2, 100_000))
	if got, err := extents(g.dev, 0, 100_000); err != nil || describe(got) != "0 0-100000" {
		t.Errorf("got %v, %v", got, err)
	}
}
