package flakey

import (
	"bytes"
	"errors"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"cowherd/backend/mem"
	"cowherd/block"
	"cowherd/target"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// over is a target as a device.
type over struct{ *Target }

func (o over) Submit(r *block.Request) {
	if d := o.Map(r); d != nil {
		d.Submit(r)
	}
}

// newTarget misbehaves every other second, over a device that holds ones from 4096 on.
func newTarget(t *testing.T, f Features) (over, *mem.Device) {
	d, err := mem.New(mem.Config{Size: 1 << 16})
	if err != nil {
		t.Fatal(err)
	}
	if err := block.Write(d, bytes.Repeat([]byte{1}, 4096), 4096); err != nil {
		t.Fatal(err)
	}
	return over{New(Config{
		Lower: target.Lower{Device: d, Name: target.Name("d")}, Start: 4096, Size: 4096, Up: time.Second, Down: time.Second,
		Features: f,
	})}, d
}

// differs is where p is not all ones.
func differs(p []byte) int { return bytes.IndexFunc(p, func(r rune) bool { return r != 1 }) }

// TestFeatures: each feature does its harm in the down interval and only then; the submitter's data is left alone.
func TestFeatures(t *testing.T) {
	for _, test := range []struct {
		name        string
		features    Features
		read, write error // in the down interval
		flush       error
		lower       int // what a write of twos leaves at the lower device: the first byte that is not 2, or -1
		seen        int // what a read of ones gives: the first byte that is not 1, or -1
	}{
		{"none", Features{}, syscall.EIO, syscall.EIO, syscall.EIO, 0, -1},
		{"error_reads", Features{ErrorReads: true}, syscall.EIO, nil, nil, -1, -1},
		{"error_writes", Features{ErrorWrites: true}, nil, syscall.EIO, syscall.EIO, 0, -1},
		{"drop_writes", Features{DropWrites: true}, nil, nil, nil, 0, -1},
		{"corrupt r", Features{CorruptByte: 33, CorruptValue: 9}, nil, nil, nil, -1, 32},
		{"corrupt w", Features{CorruptByte: 33, CorruptValue: 9, CorruptWrite: true}, nil, nil, nil, 32, -1},
		{"corrupt beyond", Features{CorruptByte: 513, CorruptValue: 9, CorruptWrite: true}, nil, nil, nil, -1, -1},
		{"corrupt r with FUA", Features{CorruptByte: 33, CorruptFlags: opfFUA}, nil, nil, nil, -1, -1},
		{"corrupt w with write", Features{CorruptByte: 1, CorruptWrite: true, CorruptFlags: opfWrite}, nil, nil, nil, 0, -1},
		{"random r", Features{RandomRead: Probability}, nil, nil, nil, -1, 100},
		{"random w", Features{RandomWrite: Probability}, nil, nil, nil, 100, -1},
		{"random w, seldom", Features{RandomWrite: 1}, nil, nil, nil, -1, -1},
	} {
		t.Run(test.name, func(t *testing.T) {
			x, lower := newTarget(t, test.features)
			now := x.began
			x.now = func() time.Time { return now }
			x.random = func(n uint32) uint32 { return 100 % n }
			ones, twos := make([]byte, 512), bytes.Repeat([]byte{2}, 512)
			for turn := range 4 {
				down := turn%2 == 1
				want := func(err error) error {
					if !down {
						return nil
					}
					return err
				}
				if err := block.Write(lower, bytes.Repeat([]byte{1}, 1024), 4096); err != nil {
					t.Fatal(err)
				}
				if err := block.Read(x, ones, 0); !errors.Is(err, want(test.read)) {
					t.Errorf("turn %d: read: %v", turn, err)
				} else if seen := differs(ones); err == nil && (down && seen != test.seen || !down && seen >= 0) {
					t.Errorf("turn %d: byte %d of a read is wrong", turn, seen)
				}
				if err := block.Write(x, twos, 512); !errors.Is(err, want(test.write)) {
					t.Errorf("turn %d: write: %v", turn, err)
				}
				if bytes.Count(twos, []byte{2}) != 512 {
					t.Fatal("the submitter's data was harmed")
				}
				if err := block.Flush(x); !errors.Is(err, want(test.flush)) {
					t.Errorf("turn %d: flush: %v", turn, err)
				}
				got := make([]byte, 512)
				if err := block.Read(lower, got, 4096+512); err != nil {
					t.Fatal(err)
				}
				at := bytes.IndexFunc(got, func(r rune) bool { return r != 2 })
				if down && at != test.lower || !down && at >= 0 {
					t.Errorf("turn %d: byte %d of what was written is wrong", turn, at)
				}
				now = now.Add(time.Second)
			}
		})
	}
}

// TestShares: a random feature strikes as often as it is asked to.
func TestShares(t *testing.T) {
	x, _ := newTarget(t, Features{RandomRead: Probability / 4})
	n := 0
	for range 10000 {
		if x.happens(Probability / 4) {
			n++
		}
	}
	if n < 2200 || n > 2800 {
		t.Errorf("%d of 10000 at a probability of a quarter", n)
	}
}
