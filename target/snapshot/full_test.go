package snapshot

import (
	"errors"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/internal/fault"
)

// growingRAM is a ram that grows, up to a limit.
type growingRAM struct {
	*ram
	most  int64
	grown atomic.Int64 // its size
}

func newGrowingRAM(size, most int64) *growingRAM {
	d := &growingRAM{ram: newRAM(most), most: most}
	d.grown.Store(size)
	return d
}

func (d *growingRAM) Size() int64 { return d.grown.Load() }

func (d *growingRAM) Grow(size int64) error {
	if size > d.most {
		return syscall.EFBIG
	}
	d.grown.Store(size)
	return nil
}

// stores makes a store of each kind on d.
func stores(t *testing.T, run func(t *testing.T, make func(d block.Device) Store)) {
	t.Run("transient", func(t *testing.T) {
		run(t, func(d block.Device) Store { return cowstore.NewTransient(d.Size(), 0, 4*kib) })
	})
	t.Run("persistent", func(t *testing.T) {
		run(t, func(d block.Device) Store { return worldConfig{persistent: true}.store(t, d, 0, 4*kib) })
	})
}

// TestGrow: the COW device grows as it is needed, up to the limit, and then the snapshot is invalid.
func TestGrow(t *testing.T) {
	stores(t, func(t *testing.T, make func(d block.Device) Store) {
		g := newRig(t, "scaled", 6<<20)
		d := newGrowingRAM(64*kib, 8<<20)
		x := g.take(Config{ChunkSize: 4 * kib, COW: d, Store: make(d), OnFull: FullGrow, COWMax: 4 << 20})
		x.full.step = 128 * kib
		for offset := int64(0); offset < 3<<20; offset += 20 * kib {
			g.write(offset, pattern(9, 20*kib)).want(t, nil)
		}
		g.wantFrozen(x)
		if n := d.Size(); n <= 3<<20 || n > 4<<20 {
			t.Errorf("the COW device has %d bytes", n)
		}
		for offset := int64(3 << 20); offset < 6<<20; offset += 16 * kib {
			g.write(offset, pattern(9, 16*kib)).want(t, nil)
		}
		g.wantInvalid(x, syscall.ENOSPC)
		if n := d.Size(); n != 4<<20 {
			t.Errorf("the COW device has %d bytes", n)
		}
	})
}

// throttled is a rig with a snapshot that has room for a few chunks, on a device that can grow.
func throttled(t *testing.T, make func(d block.Device) Store, stallMax time.Duration) (*rig, *rigSnap, *growingRAM) {
	g := newRig(t, "scaled", 1<<20)
	d := newGrowingRAM(8*4*kib, 1<<20)
	told := new(atomic.Int32)
	x := g.take(Config{
		ChunkSize: 4 * kib, COW: d, Store: make(d), OnFull: FullThrottle, StallMax: stallMax,
		Stalled: func() { told.Add(1) },
	})
	t.Cleanup(func() {
		if want := int32(min(1, stallMax)); told.Load() != want {
			t.Errorf("told %d times of waiting, want %d", told.Load(), want)
		}
	})
	return g, x, d
}

// fillUp writes to the origin, chunk by chunk, until a write waits.
func fillUp(t *testing.T, g *rig, x *rigSnap) (waiting *call, next int64) {
	t.Helper()
	for next = 0; ; next += 4 * kib {
		c := g.write(next, pattern(uint64(next), 4*kib))
		if x.Status().Stalled > 0 {
			c.pending(t, "a write that needs room")
			return c, next + 4*kib
		}
		c.want(t, nil)
	}
}

// TestThrottle: writes that need room wait for it, others do not.
func TestThrottle(t *testing.T) {
	stores(t, func(t *testing.T, make func(d block.Device) Store) {
		g, x, d := throttled(t, make, patience)
		first, next := fillUp(t, g, x)
		second := g.write(next, pattern(1, 4*kib))
		own := start(x.dev, block.OpWrite, 0, next+4*kib, pattern(2, 4*kib))
		g.write(0, pattern(3, 4*kib)).want(t, nil)
		start(x.dev, block.OpWrite, 0, 0, g.frozen[:4*kib]).want(t, nil)
		g.wantFrozen(x)
		if n := x.Status().Stalled; n != 3 {
			t.Errorf("%d requests wait, want 3", n)
		}
		if err := x.Resize(d.Size()); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("resize to what it has: %v", err)
		}
		if err := x.Resize(2 << 20); !errors.Is(err, syscall.EFBIG) {
			t.Errorf("resize to what cannot be: %v", err)
		}
		if err := x.Resize(d.Size() + 8*4*kib); err != nil {
			t.Fatal(err)
		}
		first.want(t, nil)
		second.want(t, nil)
		own.want(t, nil)
		start(x.dev, block.OpWrite, 0, next+4*kib, g.frozen[next+4*kib:][:4*kib]).want(t, nil)
		g.wantFrozen(x)
	})
}

// TestThrottleEnds: by Unstall, and by time.
func TestThrottleEnds(t *testing.T) {
	stores(t, func(t *testing.T, make func(d block.Device) Store) {
		for name, stallMax := range map[string]time.Duration{"unstalled": patience, "late": time.Millisecond, "at once": 0} {
			t.Run(name, func(t *testing.T) {
				g, x, _ := throttled(t, make, stallMax)
				switch name {
				case "unstalled":
					c, next := fillUp(t, g, x)
					x.Unstall()
					c.want(t, nil)
					g.write(next, pattern(1, 4*kib)).want(t, nil)
				default:
					for offset := int64(0); offset < 1<<20; offset += 4 * kib {
						g.write(offset, pattern(1, 4*kib)).want(t, nil)
					}
				}
				g.wantInvalid(x, syscall.ENOSPC)
			})
		}
	})
}

// TestRefuse: what waits for room fails, and so does what would; the snapshot stays.
func TestRefuse(t *testing.T) {
	stores(t, func(t *testing.T, make func(d block.Device) Store) {
		g, x, _ := throttled(t, make, patience)
		first, next := fillUp(t, g, x)
		own := start(x.dev, block.OpWrite, 0, next+4*kib, pattern(2, 4*kib))
		x.Refuse()
		first.want(t, syscall.ESHUTDOWN)
		own.want(t, syscall.ESHUTDOWN)
		g.write(next, []byte("x")).want(t, syscall.ESHUTDOWN)
		start(x.dev, block.OpWrite, 0, next, []byte("y")).want(t, syscall.ESHUTDOWN)
		g.write(0, []byte("z")).want(t, nil)
		g.wantFrozen(x)
	})
}

// TestOverflow: PO. A write to the snapshot that finds no room fails and so do later ones; reads go on; a resize ends it;
// a write to the origin that finds no room costs the snapshot.
func TestOverflow(t *testing.T) {
	stores(t, func(t *testing.T, make func(d block.Device) Store) {
		g := newRig(t, "scaled", 1<<20)
		d := newGrowingRAM(8*4*kib, 1<<20)
		told := 0
		x := g.take(Config{ChunkSize: 4 * kib, COW: d, Store: make(d), OnFull: FullOverflow, Overflowed: func(error) { told++ }})
		view := slices.Clone(g.frozen)
		next := int64(0)
		for ; ; next += 4 * kib {
			p := pattern(uint64(next), 4*kib)
			if err := block.Write(x.dev, p, next); err != nil {
				if !errors.Is(err, syscall.ENOSPC) {
					t.Fatal(err)
				}
				break
			}
			copy(view[next:], p)
		}
		start(x.dev, block.OpWrite, 0, 0, []byte("x")).want(t, syscall.ENOSPC) // even where there is room
		g.write(0, []byte("x")).want(t, nil)
		same(t, g.reads(x.dev, 0, 1<<20), view)
		if st := x.Status(); st.String() != "Overflow" || told != 1 {
			t.Errorf("status %q, told %d times", st, told)
		}
		if err := x.Resize(16 * 4 * kib); err != nil {
			t.Fatal(err)
		}
		start(x.dev, block.OpWrite, 0, next, view[next:][:4*kib]).want(t, nil)
		for offset := next; offset < 1<<20; offset += 4 * kib {
			g.write(offset, []byte("y")).want(t, nil)
		}
		g.wantInvalid(x, syscall.ENOSPC)
	})
}

// TestWriteWaitsForTheVerdict: while the store of an invalid snapshot is still valid on disk, the origin is not
// overwritten. If the store cannot be reached the origin goes on.
func TestWriteWaitsForTheVerdict(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		take := func() (*rig, *rigSnap, *fault.Device) {
			g := newRig(t, engine, 1<<20)
			cow := fault.New(newRAM(worldConfig{persistent: true}.room(256, 4*kib) * 4 * kib))
			store := worldConfig{persistent: true}.store(t, cow, 0, 4*kib)
			return g, g.take(Config{ChunkSize: 4 * kib, COW: cow, Store: store}), cow
		}
		t.Run("held", func(t *testing.T) {
			g, x, cow := take()
			g.write(0, []byte("copied before")).want(t, nil)
			header := matching(block.OpWrite, 0, 512)
			cow.Hold(header)
			cow.Fail(failing(func(r *block.Request) bool { return r.Op == block.OpWrite && !header(r) }, errInjected))
			first := g.write(8*kib, []byte("x"))
			cow.WaitHeld(1)
			second := g.write(64*kib, []byte("y"))
			first.pending(t, "the write whose copy failed")
			second.pending(t, "a write that is not preserved any more")
			g.write(1, []byte("z")).want(t, nil) // its chunk has an exception
			start(x.dev, block.OpRead, 0, 0, make([]byte, 1)).want(t, errEIO)
			same(t, g.reads(g.dev, 8*kib, 4*kib), g.frozen[8*kib:12*kib])
			same(t, g.reads(g.dev, 64*kib, 4*kib), g.frozen[64*kib:68*kib])
			cow.Release()
			first.want(t, nil)
			second.want(t, nil)
			g.wantInvalid(x, errInjected)
			h, err := cowstore.ReadHeader(cow)
			if err != nil || h.Valid {
				t.Errorf("header %+v, %v", h, err)
			}
		})
		t.Run("dead", func(t *testing.T) {
			g, x, cow := take()
			cow.Fail(failing(func(r *block.Request) bool { return r.Op != block.OpRead }, errInjected))
			g.write(8*kib, []byte("x")).want(t, nil)
			g.wantInvalid(x, errInjected)
			if err := x.Drop(); !errors.Is(err, errInjected) {
				t.Errorf("drop: %v", err)
			}
		})
	})
}

// TestReopened: a snapshot whose store was dropped is Invalid from the start, others go on where they were.
func TestReopened(t *testing.T) {
	g := newRig(t, "scaled", 1<<20)
	cow := fault.New(newRAM(worldConfig{persistent: true}.room(256, 16*kib) * 16 * kib))
	x := g.take(Config{ChunkSize: 16 * kib, COW: cow, Store: worldConfig{persistent: true}.store(t, cow, 0, 16*kib)})
	g.write(100*kib, pattern(5, 300*kib)).want(t, nil)
	if got := x.Table(); got != "P 32" {
		t.Errorf("table %q", got)
	}
	status := x.Status().String()
	g.drop(x)
	if err := x.Close(); err != nil {
		t.Error(err)
	}
	reopen := func() *rigSnap {
		p, err := cowstore.OpenPersistent(cow, cowstore.PersistentConfig{})
		if err != nil {
			t.Fatal(err)
		}
		return g.take(Config{COW: cow, Store: p, OnFull: FullOverflow})
	}
	y := reopen()
	g.wantFrozen(y)
	if got := y.Status().String(); got != status || y.Table() != "PO 32" {
		t.Errorf("status %q, was %q; table %q", got, status, y.Table())
	}
	g.drop(y)
	if err := errors.Join(y.Drop(), y.Close()); err != nil {
		t.Error(err)
	}
	g.snaps = nil
	z := reopen()
	if got := z.Status().String(); got != "Invalid" {
		t.Errorf("status %q", got)
	}
	start(z.dev, block.OpRead, 0, 0, make([]byte, 1)).want(t, errEIO)
	g.write(0, []byte("on it goes")).want(t, nil)
	g.snaps = nil
}
