package dm_test

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"

	"cowherd/backend/mem"
	"cowherd/block"
	"cowherd/dm"
	"cowherd/target"
	"cowherd/target/linear"
	"cowherd/target/striped"
)

// newMem is a device of size bytes with blocks of 512.
func newMem(t testing.TB, size int64) *mem.Device {
	t.Helper()
	d, err := mem.New(mem.Config{Size: size})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// lower is a device for a target.
func lower(d block.Device) target.Lower { return target.Lower{Device: d, Name: target.Name("x")} }

// newTable is a table, which must be right.
func newTable(t testing.TB, targets ...dm.Target) *dm.Table {
	t.Helper()
	x, err := dm.NewTable(targets)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// place is where a byte of a table must lie.
type place struct {
	on block.Device
	at int64
}

// mixed is a table of a linear, a striped (three stripes of chunks of 1.5 KiB) and again a linear target, over devices
// of which nothing lies at their start, and where each of its sectors must lie.
func mixed(t testing.TB) (table *dm.Table, places []place) {
	a, b, c := newMem(t, 64<<10), newMem(t, 64<<10), newMem(t, 64<<10)
	const chunk = 3 * 512
	table = newTable(t,
		linear.New(lower(a), 1024, 2560),
		striped.New([]striped.Stripe{{Lower: lower(b), Start: 512}, {Lower: lower(c), Start: 4096}, {Lower: lower(a), Start: 8192}}, chunk, 6*3*chunk),
		linear.New(lower(c), 0, 1536),
	)
	for s := range int64(5) {
		places = append(places, place{a, 1024 + s*512})
	}
	for s := range int64(6 * 3 * 3) {
		column := s / 3 % 3
		on := []place{{b, 512}, {c, 4096}, {a, 8192}}[column]
		on.at += s/9*chunk + s%3*512
		places = append(places, on)
	}
	for s := range int64(3) {
		places = append(places, place{c, s * 512})
	}
	return table, places
}

// TestPlaces: each sector lies where it must, as far as Map, Remap and a request that is cut are concerned.
func TestPlaces(t *testing.T) {
	table, places := mixed(t)
	if want := int64(len(places)) * 512; table.Size() != want {
		t.Fatalf("size %d, want %d", table.Size(), want)
	}
	d := dm.NewDevice("x", table, false)
	want := make([]byte, d.Size())
	for s, p := range places {
		sector := want[s*512:][:512]
		copy(sector, bytes.Repeat([]byte{byte(s + 1)}, 512))
		if err := block.Write(p.on, sector, p.at); err != nil {
			t.Fatal(err)
		}
		to, at, n, ok := d.Remap(3, int64(s)*512, 512)
		if !ok || to != p.on || at != p.at || n != 512 {
			t.Errorf("sector %d: Remap gives %v, %d, %d, %v", s, to, at, n, ok)
			continue
		}
		d.Release(3)
	}
	got := make([]byte, d.Size())
	if err := block.Read(d, got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("one read of the whole device gives something else than the pieces hold")
	}
	for s := range places { // to the end from everywhere, which crosses all that there is to cross
		got = got[:len(want)-s*512]
		if err := block.Read(d, got, int64(s)*512); err != nil || !bytes.Equal(got, want[s*512:]) {
			t.Fatalf("from sector %d on: %v", s, err)
		}
	}
	if err := block.Flush(d); err != nil {
		t.Error(err)
	}
	if err := d.Close(inTime(t)); err != nil {
		t.Fatal(err)
	}
}

// TestTableModel: random operations on a table of several targets are those on a byte slice.
func TestTableModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	table, _ := mixed(t)
	d := dm.NewDevice("x", table, false)
	model := make([]byte, d.Size())
	for range 3000 {
		offset := rnd.Int64N(d.Size()/512) * 512
		length := min(rnd.Int64N(20)*512, d.Size()-offset)
		p := make([]byte, length)
		switch rnd.IntN(4) {
		case 0:
			if err := block.Do(d, block.OpWriteZeroes, 0, offset, length, nil); err != nil {
				t.Fatal(err)
			}
			clear(model[offset:][:length])
		case 1, 2:
			for i := range p {
				p[i] = byte(rnd.Uint32())
			}
			if err := block.Write(d, p, offset); err != nil {
				t.Fatal(err)
			}
			copy(model[offset:], p)
		default:
			if err := block.Read(d, p, offset); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(p, model[offset:][:length]) {
				t.Fatalf("read of %d bytes at %d differs", length, offset)
			}
		}
		checkExtents(t, d, model, offset, length)
	}
}

// checkExtents: extents cover their range in order, and what they call zero is.
func checkExtents(t *testing.T, d *dm.Device, model []byte, offset, length int64) {
	t.Helper()
	at := offset
	err := d.Extents(offset, length, func(e block.Extent) bool {
		if e.Offset != at || e.Length <= 0 || e.Offset+e.Length > offset+length {
			t.Fatalf("extent %+v in [%d, +%d) where %d is next", e, offset, length, at)
		}
		if e.Zero && slices.Max(model[e.Offset:][:e.Length]) != 0 {
			t.Fatalf("extent %+v is not zero", e)
		}
		at += e.Length
		return true
	})
	if err != nil || at != offset+length {
		t.Fatalf("extents of [%d, +%d) end at %d: %v", offset, length, at, err)
	}
}

func TestNewTableRefuses(t *testing.T) {
	if _, err := dm.NewTable(nil); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("no target: %v", err)
	}
	long := func() dm.Target { return linear.New(lower(newMem(t, 4096)), 0, math.MaxInt64) }
	if _, err := dm.NewTable([]dm.Target{long(), long()}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("too long: %v", err)
	}
}

// TestRemapHolds: who got an answer from Remap is in flight, and a suspended device gives none.
func TestRemapHolds(t *testing.T) {
	lower := newMem(t, 8192)
	d := dm.NewDevice("x", linear.New(target.Lower{Device: lower}, 4096, 4096), false)
	to, at, n, ok := d.Remap(1, 1000, 3096)
	if !ok || to != block.Device(lower) || at != 5096 || n != 3096 {
		t.Fatalf("Remap gives %v, %d, %d, %v", to, at, n, ok)
	}
	suspended := make(chan error)
	go func() { suspended <- d.Suspend(inTime(t)) }()
	for { // until the gate is seen to be closed
		if _, _, _, ok := d.Remap(0, 0, 512); !ok {
			break
		}
		d.Release(0)
	}
	select {
	case err := <-suspended:
		t.Fatalf("the device was suspended with a copy in flight: %v", err)
	default:
	}
	d.Release(1)
	if err := <-suspended; err != nil {
		t.Fatal(err)
	}
	d.Resume()
	for _, x := range []struct{ offset, length int64 }{{-1, 1}, {0, 0}, {0, 4097}, {4096, 1}, {1, math.MaxInt64}} {
		if _, _, _, ok := d.Remap(0, x.offset, x.length); ok {
			t.Errorf("[%d, +%d) was remapped", x.offset, x.length)
		}
	}
	if err := d.Close(inTime(t)); err != nil {
		t.Fatal(err)
	}
	if _, _, _, ok := d.Remap(0, 0, 512); ok {
		t.Error("a device that was removed was remapped")
	}
	opaque := dm.NewDevice("y", &window{lower: lower, size: 4096}, false)
	if _, _, _, ok := opaque.Remap(0, 0, 512); ok {
		t.Error("a target that does not remap was remapped")
	}
	for _, d := range []*dm.Device{d, opaque} {
		if err := d.Close(inTime(t)); err != nil && !errors.Is(err, syscall.ESHUTDOWN) {
			t.Errorf("a count is left over: %v", err)
		}
	}
}

func BenchmarkStack(b *testing.B) {
	for depth := range 4 {
		b.Run(fmt.Sprintf("%d", depth), func(b *testing.B) {
			var d block.Device = newMem(b, 1<<20)
			for i := range depth {
				d = dm.NewDevice(fmt.Sprint(i), linear.New(lower(d), 0, 1<<20), false)
			}
			p := make([]byte, 4096)
			b.ReportAllocs()
			for b.Loop() {
				if err := block.Read(d, p, 8192); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
