package mem

import (
	"errors"
	"math"
	"syscall"
	"testing"

	"cowherd/backend/devicetest"
	"cowherd/block"
	"cowherd/internal/sparse"
)

func newDevice(t testing.TB, c Config) *Device {
	t.Helper()
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if n := d.Allocated(); n != 0 {
			t.Errorf("%d bytes are held after Close", n)
		}
	})
	return d
}

func TestModel(t *testing.T) {
	devicetest.Leaks(t)
	devicetest.Model(t, newDevice(t, Config{Size: 1<<20 + 512}), 200)
}

func TestDisjoint(t *testing.T) {
	devicetest.Leaks(t)
	devicetest.Disjoint(t, newDevice(t, Config{Size: 1 << 20}), 8, 50)
}

func TestNewChecks(t *testing.T) {
	for _, c := range []Config{{Size: -512}, {Size: 1}, {Size: math.MaxInt64}, {Size: 512, Limit: -1}} {
		if _, err := New(c); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%+v: got %v, want EINVAL", c, err)
		}
	}
}

func TestEdges(t *testing.T) {
	for _, size := range []int64{0, 512, 1 << 40, math.MaxInt64 - 511} {
		d := newDevice(t, Config{Size: size})
		if d.Size() != size {
			t.Errorf("size %d, want %d", d.Size(), size)
		}
		err := errors.Join(
			block.Read(d, nil, size),
			block.Write(d, nil, size),
			block.Do(d, block.OpDiscard, 0, size, 0, nil),
			block.Do(d, block.OpDiscard, 0, 0, size, nil),
			block.Do(d, block.OpWriteZeroes, 0, 0, size, nil),
			block.Flush(d))
		if err != nil {
			t.Errorf("size %d: %v", size, err)
		}
		list := devicetest.Extents(t, d, 0, size)
		if size > 0 && (len(list) != 1 || !list[0].Hole || !list[0].Zero) {
			t.Errorf("size %d: extents of an untouched device: %v", size, list)
		}
		if size == 0 {
			continue
		}
		if err := block.Write(d, make([]byte, 512), size-512); err != nil {
			t.Errorf("size %d: write of the last block: %v", size, err)
		}
		if n := d.Allocated(); n != sparse.PageSize {
			t.Errorf("size %d: %d bytes allocated for one page", size, n)
		}
	}
}

func TestExtents(t *testing.T) {
	d := newDevice(t, Config{Size: 8 * sparse.PageSize})
	for _, offset := range []int64{0, 3*sparse.PageSize - 512} {
		if err := block.Write(d, make([]byte, 1024), offset); err != nil {
			t.Fatal(err)
		}
	}
	list := devicetest.Extents(t, d, 512, 6*sparse.PageSize)
	want := []block.Extent{
		{Offset: 512, Length: sparse.PageSize - 512},
		{Offset: sparse.PageSize, Length: sparse.PageSize, Hole: true, Zero: true},
		{Offset: 2 * sparse.PageSize, Length: 2 * sparse.PageSize},
		{Offset: 4 * sparse.PageSize, Length: 2*sparse.PageSize + 512, Hole: true, Zero: true},
	}
	if len(list) != len(want) {
		t.Fatalf("extents %v, want %v", list, want)
	}
	for i := range want {
		if list[i] != want[i] {
			t.Errorf("extent %d: %v, want %v", i, list[i], want[i])
		}
	}
}

func TestLimit(t *testing.T) {
	d := newDevice(t, Config{Size: 1 << 30, Limit: sparse.PageSize})
	if err := block.Write(d, make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"write":        block.Write(d, make([]byte, 4096), 1<<20),
		"write zeroes": block.Do(d, block.OpWriteZeroes, block.NoUnmap, 1<<20, 4096, nil),
	} {
		if block.Errno(err) != syscall.ENOSPC {
			t.Errorf("%s at the limit: %v, want ENOSPC", name, err)
		}
	}
	if err := block.Do(d, block.OpWriteZeroes, 0, 0, 1<<30, nil); err != nil {
		t.Errorf("write of zeroes that need no memory: %v", err)
	}
	if n := d.Allocated(); n != 0 {
		t.Errorf("%d bytes allocated after zeroing everything", n)
	}
	if err := block.Do(d, block.OpWriteZeroes, block.NoUnmap, 1<<20, 4096, nil); err != nil {
		t.Errorf("write of zeroes below the limit: %v", err)
	}
	if n := d.Allocated(); n != sparse.PageSize {
		t.Errorf("%d bytes allocated after a write of zeroes that must keep its room", n)
	}
}

// ignore is a Completer that does nothing.
type ignore struct{}

func (ignore) Complete(*block.Request, error) {}

func benchmark(b *testing.B, op block.Op) {
	const span = 64 << 20
	d := newDevice(b, Config{Size: span})
	p := make([]byte, 1<<20)
	for offset := int64(0); offset < span; offset += 1 << 20 {
		if err := block.Write(d, p, offset); err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(4096)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		r := block.Request{Op: op, Data: make([]byte, 4096), Length: 4096}
		for i := int64(1); pb.Next(); i++ {
			r.Offset = i * 7919 % (span / 4096) * 4096
			r.Push(ignore{})
			d.Submit(&r)
		}
	})
}

func BenchmarkRead4K(b *testing.B)  { benchmark(b, block.OpRead) }
func BenchmarkWrite4K(b *testing.B) { benchmark(b, block.OpWrite) }
