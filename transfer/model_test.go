package transfer

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"cowherd/backend/file"
	"cowherd/backend/mem"
	"cowherd/backend/nbd"
	"cowherd/block"
	exportnbd "cowherd/export/nbd"
	"cowherd/internal/fault"
	"cowherd/internal/invariant"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var seedFlag = flag.Uint64("seed", 0, "run the model test with this seed only")

// image is what a device holds in a model: data, zeroes that are data to a device, and holes.
type image struct {
	content []byte
	holes   []block.Extent
}

// newImage makes an image of n bytes, in parts of random kinds and sizes that are multiples of unit.
func newImage(r *rand.Rand, n, unit int64) image {
	x := image{content: make([]byte, n)}
	var seed [32]byte
	for at := int64(0); at < n; {
		length := min((1+r.Int64N(8<<r.IntN(9)))*unit, n-at)
		part := x.content[at : at+length]
		switch r.IntN(5) {
		case 0, 1:
			x.holes = append(x.holes, block.Extent{Offset: at, Length: length})
		case 2: // zeroes that are written
		case 3: // a byte here and there
			for range 1 + len(part)/20000 {
				part[r.IntN(len(part))] = byte(1 + r.IntN(255))
			}
		default:
			binary.LittleEndian.PutUint64(seed[:], r.Uint64())
			_, _ = rand.NewChaCha8(seed).Read(part) // never fails
		}
		at += length
	}
	return x
}

// writeTo puts what is no hole on d.
func (x *image) writeTo(t testing.TB, d block.Device) {
	t.Helper()
	at := int64(0)
	for _, h := range append(x.holes, block.Extent{Offset: int64(len(x.content))}) {
		if h.Offset > at {
			if err := block.Write(d, x.content[at:h.Offset], at); err != nil {
				t.Fatal(err)
			}
		}
		at = h.Offset + h.Length
	}
}

// contentOf reads all of d.
func contentOf(t testing.TB, d block.Device) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	if err := block.Read(d, p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// newDevice makes a device of n bytes and of one of several kinds, with x on it (nil: zeroes).
func newDevice(t testing.TB, kind string, n int64, x *image) block.Device {
	t.Helper()
	var d block.Device
	switch kind {
	case "mem", "async", "nbd":
		m, err := mem.New(mem.Config{Size: (n + 511) &^ 511})
		if err != nil {
			t.Fatal(err)
		}
		d = m
	case "file":
		f, err := file.Create(filepath.Join(t.TempDir(), "image"), n, file.Options{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		d = f
	}
	if x != nil {
		x.writeTo(t, d)
	}
	switch kind {
	case "async":
		a := fault.NewAsync(d, 3, 1)
		t.Cleanup(a.Close)
		return a
	case "nbd":
		return overNBD(t, d)
	}
	return d
}

// exported is an Exports of one device.
type exported struct{ block.Device }

func (e exported) List(context.Context) []exportnbd.Info { return nil }

func (e exported) Open(context.Context, string, string) (*exportnbd.Export, error) {
	return &exportnbd.Export{Device: e.Device, MultiConn: true}, nil
}

// overNBD is d behind a server and two connections.
func overNBD(t testing.TB, d block.Device) block.Device { return dialServer(t, "unix", d) }

// dialServer is d behind a server on a socket of a network, and two connections.
func dialServer(t testing.TB, network string, d block.Device) *nbd.Device {
	t.Helper()
	server, err := exportnbd.NewServer(exportnbd.Config{Exports: exported{d}})
	if err != nil {
		t.Fatal(err)
	}
	address := "127.0.0.1:0"
	if network == "unix" {
		address = filepath.Join(t.TempDir(), "s")
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	c, err := nbd.Open(t.Context(), nbd.Config{Network: network, Address: l.Addr().String(), Connections: 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(c.Close(), server.Shutdown(context.Background())); err != nil {
			t.Error(err)
		}
		if err := <-served; !errors.Is(err, exportnbd.ErrServerClosed) {
			t.Error(err)
		}
	})
	return c
}

// TestModel copies random images between random devices with random options, and compares every byte.
func TestModel(t *testing.T) {
	seeds := []uint64{}
	count := uint64(40)
	if invariant.Enabled {
		count = 12 // the race detector is slow
	}
	for seed := range count {
		seeds = append(seeds, seed+1)
	}
	if *seedFlag != 0 {
		seeds = []uint64{*seedFlag}
	}
	for _, seed := range seeds {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) { runModel(t, rand.New(rand.NewPCG(seed, 0))) })
	}
}

func runModel(t *testing.T, r *rand.Rand) {
	kinds := []string{"mem", "async", "file", "nbd"}
	from, to := kinds[r.IntN(len(kinds))], kinds[r.IntN(len(kinds))]
	size, unit := 1+r.Int64N(3<<20), []int64{1, 512, 4096}[r.IntN(3)]
	if from != "file" {
		size, unit = (size+511)&^511, max(unit, 512)
	}
	x := newImage(r, size, unit)
	source := newDevice(t, from, size, &x)
	room := size + []int64{0, 0, 1, 70000}[r.IntN(4)]
	var old *image
	if r.IntN(2) == 0 {
		o := newImage(r, (room+511)&^511, 512)
		if to == "file" {
			o.content = o.content[:room]
			for i := range o.holes {
				o.holes[i].Length = min(o.holes[i].Length, room-o.holes[i].Offset)
			}
		}
		old = &o
	}
	destination := newDevice(t, to, room, old)
	before := contentOf(t, destination)

	var told atomic.Int64
	o := Options{
		Source: source, Destination: destination,
		Zeroed:    old == nil && r.IntN(2) == 0,
		Allocated: r.IntN(4) == 0,
		Sparse:    []int64{0, 512, 4096, 65536}[r.IntN(4)],
		Queues:    r.IntN(4), InFlight: r.IntN(4),
		PieceSize: []int64{0, 4096, 64 << 10, 1 << 20}[r.IntN(4)],
		Flush:     r.IntN(2) == 0, Verify: r.IntN(3) == 0, Relay: r.IntN(2) == 0,
		Progress: func(_ How, n int64) { told.Add(n) },
	}
	t.Logf("%s to %s, %d bytes, old: %v, %+v", from, to, size, old != nil, o)
	result, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	after := contentOf(t, destination)
	if i := differs(after[:size], x.content); i >= 0 {
		t.Fatalf("byte %d is %#x, want %#x", i, after[i], x.content[i])
	}
	if !bytes.Equal(after[size:], before[size:]) {
		t.Error("what lies behind the source's end has changed")
	}
	sum, times := result.Splice+result.ReadWrite+result.Zeroes+result.Skipped, int64(1)
	if o.Verify {
		times = 2
	}
	if sum != size || result.Size != size || told.Load() != times*size || o.Verify && result.Verified != size {
		t.Errorf("result %+v, progress %d, for %d bytes", result, told.Load(), size)
	}
	if o.Zeroed && !o.Allocated && result.Zeroes > 0 {
		t.Errorf("%d bytes of zeroes were written over zeroes", result.Zeroes)
	}
}

// differs is where a and b differ first; -1: nowhere.
func differs(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// TestSparse: the copy takes no more room than the data, to the unit.
func TestSparse(t *testing.T) {
	dir := memoryDir(t)
	source, err := file.Create(filepath.Join(dir, "source"), 8<<20, file.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	content := make([]byte, 8<<20)
	for i := 4096; i < len(content); i += 3 * 8192 {
		content[i] = 1
	}
	if err := block.Write(source, content, 0); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name string
		o    Options
		want int64 // allocated
	}{
		{"4k", Options{Sparse: 4096, Zeroed: true}, (8<<20/(3*8192) + 1) * 4096},
		{"4k, not known to be zero", Options{Sparse: 4096}, (8<<20/(3*8192) + 1) * 4096},
		{"off", Options{Zeroed: true}, 8 << 20},
		{"allocated", Options{Zeroed: true, Allocated: true, Sparse: 4096}, 8 << 20},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(dir, "copy")
			defer os.Remove(path)
			d, err := file.Create(path, 8<<20, file.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			test.o.Source, test.o.Destination = source, d
			if _, err := Run(t.Context(), test.o); err != nil {
				t.Fatal(err)
			}
			var st syscall.Stat_t
			if err := syscall.Stat(path, &st); err != nil {
				t.Fatal(err)
			}
			if got := st.Blocks * 512; got != test.want {
				t.Errorf("%d bytes allocated, want %d", got, test.want)
			}
			if !bytes.Equal(contentOf(t, d), content) {
				t.Error("another content")
			}
		})
	}
}

// memoryDir is a new directory in memory.
func memoryDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "cowherd-test-*")
	if err != nil {
		t.Skipf("there is no file system in memory: %v", err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
