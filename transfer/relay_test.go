package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cowherd/backend/mem"
	"cowherd/block"
	"cowherd/internal/fault"
)

// relayer is a device that is relayed to in memory, with troubles.
type relayer struct {
	block.Device
	open  func() error  // before a relay is opened; nil: all goes well
	fail  func() bool   // whether the next move fails; nil: none does
	stall chan struct{} // what a write waits for; nil: nothing

	opened, closed, passed atomic.Int32
}

func (d *relayer) OpenRelay(ctx context.Context, source block.Device, length int64) (block.Relay, error) {
	if d.open != nil {
		if err := d.open(); err != nil {
			return nil, err
		}
	}
	d.opened.Add(1)
	return &memoryRelay{to: d, from: source, most: length, ctx: ctx}, nil
}

type memoryRelay struct {
	to     *relayer
	from   block.Device
	most   int64
	ctx    context.Context
	broken atomic.Bool
}

func (r *memoryRelay) Move(offset, length int64, take func(head []byte) []byte) error {
	if length > r.most || length < block.RelayMin {
		panic("a piece of a wrong length")
	}
	data := make([]byte, length)
	if err := block.Read(r.from, data, offset); err != nil {
		r.broken.Store(true)
		return err
	}
	if r.broken.Load() {
		return syscall.EPIPE
	}
	if p := take(data[:block.RelayMin]); p != nil {
		copy(p, data)
		return nil
	}
	if r.to.stall != nil {
		select {
		case <-r.to.stall:
		case <-r.ctx.Done():
		}
	}
	if r.ctx.Err() != nil || r.to.fail != nil && r.to.fail() {
		r.broken.Store(true)
		_ = block.Write(r.to.Device, data[:length/2&^511], offset) // a part of it may have been written
		return syscall.EPIPE
	}
	r.to.passed.Add(1)
	return block.Write(r.to.Device, data, offset)
}

func (r *memoryRelay) Close() error {
	r.to.closed.Add(1)
	return nil
}

// TestRelayModel relays random images, with relays that break now and then, and compares every byte.
func TestRelayModel(t *testing.T) {
	for seed := range uint64(24) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 2))
			size := (1 + r.Int64N(24<<20)) &^ 511
			x := newImage(r, size, []int64{512, 64 << 10}[r.IntN(2)])
			var old *image
			if r.IntN(2) == 0 {
				o := newImage(r, size, 512)
				old = &o
			}
			d := &relayer{Device: newDevice(t, "mem", size, old)}
			odds := r.IntN(3)
			var mu sync.Mutex
			d.fail = func() bool {
				mu.Lock()
				defer mu.Unlock()
				return odds > 0 && r.IntN(10/odds) == 0
			}
			var told atomic.Int64
			o := Options{
				Source: newDevice(t, "mem", size, &x), Destination: d, Relay: true, Zeroed: old == nil, Queues: 1 + r.IntN(3),
				Sparse: []int64{0, 4096}[r.IntN(2)], Verify: true, Allocated: r.IntN(5) == 0,
				PieceSize: []int64{0, 64 << 10, 2 << 20}[r.IntN(3)],
				Progress:  func(_ How, n int64) { told.Add(n) },
			}
			t.Logf("%d bytes, odds %d, %+v", size, odds, o)
			result, err := Run(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			if i := differs(contentOf(t, d), x.content); i >= 0 {
				t.Fatalf("byte %d differs", i)
			}
			sum := result.Splice + result.ReadWrite + result.Zeroes + result.Skipped
			if sum != size || told.Load() != 2*size || result.Verified != size {
				t.Errorf("result %+v, progress %d, for %d bytes", result, told.Load(), size)
			}
			if d.opened.Load() != d.closed.Load() || (result.Splice > 0) != (d.passed.Load() > 0) {
				t.Errorf("%d relays were opened, %d closed; %d pieces passed, result %+v", d.opened.Load(), d.closed.Load(),
					d.passed.Load(), result)
			}
		})
	}
}

// TestRelayWhen: relays are for those who allow them, and for long pieces of data.
func TestRelayWhen(t *testing.T) {
	const size = 8 << 20
	full := &image{content: bytes.Repeat([]byte{1}, size)}
	source := newDevice(t, "mem", size, full)
	refused := func() error { return syscall.ENOTSUP }
	for _, test := range []struct {
		name string
		o    Options
		open func() error
		want bool
	}{
		{"auto", Options{Relay: true}, nil, true},
		{"at a rate", Options{Relay: true, Rate: 1 << 30}, nil, true},
		{"allocated", Options{Relay: true, Allocated: true, Sparse: 4096}, nil, true},
		{"not allowed", Options{}, nil, false},
		{"through memory", Options{Relay: true, Method: ReadWrite}, nil, false},
		{"none for the pair", Options{Relay: true}, refused, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := &relayer{Device: newDevice(t, "mem", size, nil), open: test.open}
			test.o.Source, test.o.Destination, test.o.Zeroed = source, d, true
			test.o.Queues, test.o.InFlight = 1, 1 // the only worker may be done before a relay is there
			var slow atomic.Bool
			test.o.Progress = func(How, int64) {
				for deadline := time.Now().Add(10 * time.Second); test.want && d.opened.Load() == 0 && !slow.Load(); {
					if time.Now().After(deadline) {
						slow.Store(true)
					}
					time.Sleep(time.Millisecond)
				}
			}
			r, err := Run(t.Context(), test.o)
			if err != nil || !bytes.Equal(contentOf(t, d), full.content) {
				t.Fatalf("%v, or another content", err)
			}
			if d.opened.Load() != d.closed.Load() || test.want != (d.opened.Load() > 0) || r.Splice+r.ReadWrite != size {
				t.Errorf("%d relays were opened, %d closed: %+v", d.opened.Load(), d.closed.Load(), r)
			}
		})
	}
}

// TestRelayErrors: what cannot be read is the source's error, however it was tried.
func TestRelayErrors(t *testing.T) {
	const size, bad = 8 << 20, 5 << 20
	source := fault.New(newDevice(t, "mem", size, &image{content: bytes.Repeat([]byte{1}, size)}))
	source.Fail(func(r *block.Request) error {
		if r.Op == block.OpRead && r.Offset <= bad && bad < r.End() {
			return syscall.EIO
		}
		return nil
	})
	d := &relayer{Device: newDevice(t, "mem", size, nil)}
	_, err := Run(t.Context(), Options{Source: source, Destination: d, Relay: true})
	if !errors.Is(err, syscall.EIO) || d.opened.Load() != d.closed.Load() {
		t.Errorf("got %v; %d relays were opened, %d closed", err, d.opened.Load(), d.closed.Load())
	}
}

// TestRelayCancel: a destination that takes nothing more does not keep a transfer from ending.
func TestRelayCancel(t *testing.T) {
	const size = 64 << 20
	source := newDevice(t, "mem", size, &image{content: bytes.Repeat([]byte{1}, size)})
	d := &relayer{Device: newDevice(t, "mem", size, nil), stall: make(chan struct{})}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	time.AfterFunc(20*time.Millisecond, func() { cancel(why) })
	_, err := Run(ctx, Options{Source: source, Destination: d, Relay: true, Queues: 3})
	if !errors.Is(err, why) || d.opened.Load() != d.closed.Load() {
		t.Errorf("got %v; %d relays were opened, %d closed", err, d.opened.Load(), d.closed.Load())
	}
}

// TestRelayServers relays between cowherd's own servers, over both kinds of sockets, with a journal.
func TestRelayServers(t *testing.T) {
	const size = 48 << 20
	content := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(content) // never fails
	clear(content[9<<20 : 9<<20+700<<10])             // the start of a piece
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network, func(t *testing.T) {
			backing, err := mem.New(mem.Config{Size: size})
			if err != nil {
				t.Fatal(err)
			}
			source := dialServer(t, network, newDevice(t, "mem", size, &image{content: content}))
			var last atomic.Int64
			journal, err := CreateJournal(filepath.Join(t.TempDir(), "journal"), Identity{Kind: "nbd"}, Identity{Kind: "nbd"}, false)
			if err != nil {
				t.Fatal(err)
			}
			r, err := Run(t.Context(), Options{
				Source: source, Destination: dialServer(t, network, backing), Relay: true, Zeroed: true, Sparse: 4096,
				Verify: true, Flush: true, Journal: journal,
				Rate: 200 << 20, // so that it is not over before there are relays
				Progress: func(how How, n int64) {
					if how == Splicing {
						last.Add(n)
					}
				},
			})
			if err != nil || !bytes.Equal(contentOf(t, backing), content) {
				t.Fatalf("%v, or another content", err)
			}
			if r.Splice == 0 || r.Splice != last.Load() || r.Skipped < 700<<10-4096 || journal.Done() != size {
				t.Errorf("%+v, progress %d, journal %d", r, last.Load(), journal.Done())
			}
			if err := journal.Remove(); err != nil {
				t.Error(err)
			}
		})
	}
}
