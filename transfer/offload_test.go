package transfer

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"cowherd/block"
)

// copier is a device that can be filled from another one, with troubles.
type copier struct {
	block.Device
	source block.Device // the only one that it knows
	method block.CopyMethod
	short  bool  // each call copies a part only
	good   int32 // so many calls go well
	then   error // what the others answer; nil with good below zero: all go well
	calls  atomic.Int32
}

func (c *copier) Extents(offset, length int64, yield func(block.Extent) bool) error {
	return block.ExtentsOf(c.Device, offset, length, yield)
}

func (c *copier) CopyOffers(source block.Device) []block.CopyOffer {
	if source != c.source {
		return nil
	}
	return []block.CopyOffer{{Method: c.method, Granularity: 4096, TailAtEnd: true, LengthMax: 3 << 20, Concurrency: 2}}
}

func (c *copier) Copy(_ block.CopyMethod, source block.Device, from, to, length int64) (int64, error) {
	if n := c.calls.Add(1); c.good >= 0 && n > c.good {
		return 0, c.then
	}
	if c.short {
		length = max(length/2&^4095, min(length, 4096))
	}
	p := make([]byte, length)
	if err := block.Read(source, p, from); err != nil {
		return 0, err
	}
	return length, block.Write(c.Device, p, to)
}

// TestOffloadModel copies random images by offloads that fail in all ways that are no error, and compares every byte.
func TestOffloadModel(t *testing.T) {
	for seed := range uint64(24) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 1))
			size := (1 + r.Int64N(4<<20)) &^ 511
			x := newImage(r, size, 512)
			source := newDevice(t, []string{"mem", "file"}[r.IntN(2)], size, &x)
			var old *image
			if r.IntN(2) == 0 {
				o := newImage(r, size, 512)
				old = &o
			}
			d := &copier{
				Device: newDevice(t, "mem", size, old), source: source, method: block.CopyMethod(1 + r.IntN(3)),
				short: r.IntN(3) == 0, good: int32(r.IntN(8) - 4), then: []error{syscall.ENOTSUP, nil}[r.IntN(2)],
			}
			o := Options{
				Source: source, Destination: d, Zeroed: old == nil, Sparse: 4096, Verify: true, Queues: 1 + r.IntN(3),
				Allocated: r.IntN(5) == 0,
			}
			t.Logf("%d bytes, method %v, short %v, %d good calls, %+v", size, d.method, d.short, d.good, o)
			result, err := Run(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			after := contentOf(t, d)
			if i := differs(after, x.content); i >= 0 {
				t.Fatalf("byte %d is %#x, want %#x", i, after[i], x.content[i])
			}
			offloaded := result.Clone + result.Device + result.Server
			if sum := offloaded + result.ReadWrite + result.Zeroes + result.Skipped; sum != size {
				t.Errorf("%+v for %d bytes", result, size)
			}
			if allowed := d.method != block.CopyServer && !o.Allocated; !allowed && d.calls.Load() > 0 {
				t.Error("a method was used that Auto does not allow")
			}
			if d.method == block.CopyClone && d.good < 0 && !o.Allocated && size >= offloadMin && result.Clone == 0 {
				t.Error("nothing was cloned")
			}
		})
	}
}

func TestOffloadPolicy(t *testing.T) {
	content := bytes.Repeat([]byte{1}, 4<<20)
	source := newDevice(t, "mem", 4<<20, &image{content: content})
	other := newDevice(t, "mem", 4<<20, nil)
	for _, test := range []struct {
		name   string
		method Method
		offers block.CopyMethod
		good   int32
		then   error
		from   block.Device
		want   syscall.Errno
		text   string
	}{
		{"clone", Clone, block.CopyClone, -1, nil, source, 0, ""},
		{"clone, but the device copies", Clone, block.CopyDevice, -1, nil, source, syscall.ENOTSUP, "offers no such way"},
		{"offload by the server", Offload, block.CopyServer, -1, nil, source, 0, ""},
		{"offload, of another", Offload, block.CopyDevice, -1, nil, other, syscall.ENOTSUP, "offers no such way"},
		{"offload, absent in the middle", Offload, block.CopyDevice, 1, syscall.ENOTSUP, source, syscall.ENOTSUP, "the method is absent"},
		{"auto, an error of I/O", Auto, block.CopyClone, 1, syscall.EIO, source, syscall.EIO, "input/output error"},
		{"auto, no room", Auto, block.CopyDevice, 0, syscall.ENOSPC, source, syscall.ENOSPC, "no space"},
		{"read and write", ReadWrite, block.CopyClone, 0, syscall.EIO, source, 0, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := &copier{Device: newDevice(t, "mem", 4<<20, nil), source: source, method: test.offers, good: test.good, then: test.then}
			r, err := Run(t.Context(), Options{Source: test.from, Destination: d, Method: test.method, Zeroed: true})
			if test.want != 0 {
				if !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.text) {
					t.Errorf("got %v, want %v and %q", err, test.want, test.text)
				}
				return
			}
			if err != nil || !bytes.Equal(contentOf(t, d), content) {
				t.Fatalf("%v", err)
			}
			if got := (r.ReadWrite == 0); got != (test.method != ReadWrite) {
				t.Errorf("%+v", r)
			}
		})
	}
	if _, err := Run(t.Context(), Options{Source: source, Destination: &copier{Device: other, source: source},
		Method: Clone, Allocated: true}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("an allocated clone: %v", err)
	}
}

// cloner clones by doing nothing, as both sides are holes, and notes the lengths.
type cloner struct {
	block.Device
	good    int // so many calls go well
	lengths []int64
}

func (c *cloner) CopyOffers(block.Device) []block.CopyOffer {
	return []block.CopyOffer{{Method: block.CopyClone, Granularity: 4096, TailAtEnd: true, LengthMax: 1 << 30, Concurrency: 1}}
}

func (c *cloner) Copy(_ block.CopyMethod, _ block.Device, _, _, length int64) (int64, error) {
	c.lengths = append(c.lengths, length)
	if len(c.lengths) > c.good {
		return 0, syscall.ENOTSUP
	}
	return length, nil
}

// TestCloneLengths: the first clone is a window, which shows whether it works, and the others are as long as may be. What
// cannot be cloned is found out by few calls.
func TestCloneLengths(t *testing.T) {
	const size = 3<<30 + 4096 + 512
	for _, test := range []struct {
		good  int
		want  []int64
		clone int64
	}{
		{9, []int64{windowSize, 1 << 30, 1 << 30, size - 2<<30 - windowSize}, size},
		{0, []int64{windowSize}, 0},
	} {
		source, d := newDevice(t, "mem", size, nil), &cloner{Device: newDevice(t, "mem", size, nil), good: test.good}
		var told atomic.Int64
		r, err := Run(t.Context(), Options{
			Source: source, Destination: d, Zeroed: true, Sparse: SparseDefault, Flush: true,
			Progress: func(_ How, n int64) { told.Add(n) },
		})
		if err != nil || !slices.Equal(d.lengths, test.want) || r.Clone != test.clone || told.Load() != size {
			t.Errorf("clones of %d, want %d; %+v, told %d, %v", d.lengths, test.want, r, told.Load(), err)
		}
	}
}
