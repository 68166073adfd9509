package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"cowherd/backend/mem"
	"cowherd/backend/null"
	"cowherd/block"
	"cowherd/internal/fault"
)

func TestRefuses(t *testing.T) {
	small, large := newDevice(t, "mem", 1<<20, nil), newDevice(t, "mem", 2<<20, nil)
	for _, test := range []struct {
		name string
		o    Options
		want syscall.Errno
		text string
	}{
		{"too small", Options{Source: large, Destination: small}, syscall.ENOSPC, "it has 1048576 bytes, and the source 2097152"},
		{"piece", Options{Source: small, Destination: large, PieceSize: 5000}, syscall.EINVAL, "5000"},
		{"small piece", Options{Source: small, Destination: large, PieceSize: 256}, syscall.EINVAL, "256"},
		{"large piece", Options{Source: small, Destination: large, PieceSize: 32 << 20}, syscall.EINVAL, "33554432"},
		{"unit", Options{Source: small, Destination: large, Sparse: 3}, syscall.EINVAL, "3 bytes"},
		{"negative unit", Options{Source: small, Destination: large, Sparse: -4096}, syscall.EINVAL, "-4096"},
		{"start", Options{Source: small, Destination: large, Start: 4096}, syscall.EINVAL, "byte 4096"},
		{"start behind the end", Options{Source: small, Destination: large, Start: 16 << 20}, syscall.EINVAL, "byte 16777216"},
		{"workers", Options{Source: small, Destination: large, Queues: 100, InFlight: 100}, syscall.EINVAL, "100 queues"},
		{"overflow", Options{Source: small, Destination: large, Queues: 1 << 32, InFlight: 1 << 32}, syscall.EINVAL, "queues"},
		{"rate", Options{Source: small, Destination: large, Rate: -1}, syscall.EINVAL, "-1"},
		{"read-only", Options{Source: small, Destination: readOnly{large}}, syscall.EROFS, "read-only"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := Run(t.Context(), test.o)
			if !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.text) {
				t.Errorf("got %v, want %v and %q", err, test.want, test.text)
			}
		})
	}
}

type readOnly struct{ block.Device }

func (r readOnly) Limits() block.Limits {
	l := r.Device.Limits()
	l.ReadOnly = true
	return l
}

// TestEmpty: a source without a byte.
func TestEmpty(t *testing.T) {
	r, err := Run(t.Context(), Options{Source: newDevice(t, "mem", 0, nil), Destination: newDevice(t, "mem", 512, nil), Verify: true})
	if err != nil || r.Size != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestErrors: the first error of any kind ends the transfer, and says where.
func TestErrors(t *testing.T) {
	const size, bad = 8 << 20, 5<<20 + 4096
	content := image{content: bytes.Repeat([]byte{1}, size)}
	at := func(op block.Op) func(*block.Request) error {
		return func(r *block.Request) error {
			if r.Op == op && (op == block.OpFlush || r.Offset <= bad && bad < r.End()) {
				return syscall.EIO
			}
			return nil
		}
	}
	for _, test := range []struct {
		name     string
		source   func(*block.Request) error
		dest     func(*block.Request) error
		flush    bool
		verify   bool
		zeroes   bool
		wantText string
	}{
		{"read", at(block.OpRead), nil, false, false, false, "source: read of 1048576 bytes at offset 5242880"},
		{"write", nil, at(block.OpWrite), false, false, false, "destination: write of 1048576 bytes at offset 5242880"},
		{"zeroes", nil, at(block.OpWriteZeroes), false, false, true, "destination: write zeroes of 8388608 bytes at offset 0"},
		{"flush", nil, at(block.OpFlush), true, false, false, "destination: flush"},
		{"verify", nil, at(block.OpRead), true, true, false, "destination: read of 1048576 bytes at offset 5242880"},
	} {
		t.Run(test.name, func(t *testing.T) {
			x := &content
			if test.zeroes {
				x = nil
			}
			source := fault.New(newDevice(t, "mem", size, x))
			destination := fault.New(newDevice(t, "mem", size, &content))
			source.Fail(test.source)
			destination.Fail(test.dest)
			r, err := Run(t.Context(), Options{
				Source: source, Destination: destination, Flush: test.flush, Verify: test.verify, Sparse: 4096,
			})
			if !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), test.wantText) {
				t.Errorf("got %v, want %q", err, test.wantText)
			}
			if done := r.ReadWrite + r.Zeroes + r.Skipped; done > size || done == size && !test.flush {
				t.Errorf("%+v", r)
			}
		})
	}
}

// TestNoRoom: a destination that is full.
func TestNoRoom(t *testing.T) {
	source := newDevice(t, "mem", 8<<20, &image{content: bytes.Repeat([]byte{1}, 8<<20)})
	destination, err := mem.New(mem.Config{Size: 8 << 20, Limit: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Run(t.Context(), Options{Source: source, Destination: destination}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %v", err)
	}
}

// TestCancel: what runs is waited for, and nothing follows.
func TestCancel(t *testing.T) {
	source := fault.New(newDevice(t, "mem", 64<<20, &image{content: bytes.Repeat([]byte{1}, 64<<20)}))
	destination := newDevice(t, "mem", 64<<20, nil)
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	var told atomic.Int64
	_, err := Run(ctx, Options{Source: source, Destination: destination, Queues: 2, Progress: func(_ How, n int64) {
		if told.Add(n) >= 4<<20 {
			cancel(why)
		}
	}})
	if err != why {
		t.Errorf("got %v", err)
	}
	if n := told.Load(); n > 6<<20 {
		t.Errorf("%d bytes were copied", n)
	}
}

// TestVerifyFinds what has changed behind the copy's back.
func TestVerifyFinds(t *testing.T) {
	const size = 4 << 20
	for _, offset := range []int64{0, 1<<20 + 77, 3 << 20, size - 1} {
		for _, kind := range []string{"mem", "nbd"} {
			x := image{content: make([]byte, size), holes: []block.Extent{{Offset: 2 << 20, Length: 2 << 20}}}
			rand.NewChaCha8([32]byte{}).Read(x.content[:2<<20])
			below := newDevice(t, "mem", size, nil)
			destination := fault.New(below)
			destination.Fail(func(r *block.Request) error {
				if r.Op != block.OpFlush { // the copy is complete, and has not been read yet
					return nil
				}
				var b [512]byte
				at := offset &^ 511
				if err := block.Read(below, b[:], at); err != nil {
					return err
				}
				b[offset-at] ^= 0x55
				return block.Write(below, b[:], at)
			})
			source := newDevice(t, kind, size, &x)
			_, err := Run(t.Context(), Options{Source: source, Destination: destination, Verify: true, Sparse: 4096})
			m, ok := errors.AsType[*MismatchError](err)
			if !ok || m.Offset != offset || m.Got != m.Want^0x55 || m.Want != x.content[offset] {
				t.Errorf("%s, byte %d: got %v", kind, offset, err)
			}
		}
	}
}

// TestStart: what was done before is not done again.
func TestStart(t *testing.T) {
	content := bytes.Repeat([]byte{1}, 20<<20)
	source := newDevice(t, "mem", 20<<20, &image{content: content})
	destination := newDevice(t, "mem", 20<<20, nil)
	r, err := Run(t.Context(), Options{Source: source, Destination: destination, Start: 16 << 20, Zeroed: true, Sparse: 4096})
	if err != nil || r.Resumed != 16<<20 || r.ReadWrite != 4<<20 {
		t.Fatalf("%+v, %v", r, err)
	}
	if got := contentOf(t, destination); !isZero(got[:16<<20]) || !bytes.Equal(got[16<<20:], content[16<<20:]) {
		t.Error("another part was copied")
	}
}

// TestMark: the low-water mark stays below what has not been done, whatever is done above it.
func TestMark(t *testing.T) {
	source := fault.New(newDevice(t, "mem", 8<<20, &image{content: bytes.Repeat([]byte{1}, 8<<20)}))
	tr, err := newTransfer(Options{Source: source, Destination: newDevice(t, "mem", 8<<20, nil), Queues: 2, InFlight: 1})
	if err != nil {
		t.Fatal(err)
	}
	p := newPlanner(tr, 0, true, true)
	first, second := tr.workers[0], tr.workers[1]
	step := func(w *worker, want int64) {
		t.Helper()
		if more, err := p.next(w); !more || err != nil {
			t.Fatal(more, err)
		}
		if got := p.reached(); got != want {
			t.Errorf("the mark is at %d, want %d", got, want)
		}
	}
	step(first, 0)
	step(second, 0)
	step(second, 0)
	step(second, 0)
	step(first, 3*PieceSizeDefault)
	step(second, 4*PieceSizeDefault)
}

func TestAligned(t *testing.T) {
	data := func(offset, length int64) block.Extent { return block.Extent{Offset: offset, Length: length} }
	zero := func(offset, length int64) block.Extent {
		return block.Extent{Offset: offset, Length: length, Zero: true}
	}
	for _, test := range []struct {
		name     string
		in, want []block.Extent
	}{
		{"nothing", nil, nil},
		{"whole", []block.Extent{data(0, 512), zero(512, 512)}, []block.Extent{data(0, 512), zero(512, 512)}},
		{"zeroes shrink", []block.Extent{data(0, 100), zero(100, 1000), data(1100, 436)},
			[]block.Extent{data(0, 512), zero(512, 512), data(1024, 512)}},
		{"too short", []block.Extent{data(0, 100), zero(100, 900), data(1000, 24)}, []block.Extent{data(0, 1024)}},
		{"at the end", []block.Extent{data(0, 512), zero(512, 100)}, []block.Extent{data(0, 512), zero(512, 100)}},
		{"two", []block.Extent{zero(0, 600), data(600, 1), zero(601, 1447)},
			[]block.Extent{zero(0, 512), data(512, 512), zero(1024, 1024)}},
	} {
		if got := aligned(test.in, 512); fmt.Sprint(got) != fmt.Sprint(test.want) {
			t.Errorf("%s: got %v, want %v", test.name, got, test.want)
		}
	}
}

func TestZeroRun(t *testing.T) {
	p := make([]byte, 10)
	p[0], p[4] = 1, 1
	for _, test := range []struct{ at, offset, unit, start, end int64 }{
		{0, 0, 2, 2, 4}, {4, 0, 2, 6, 10}, {0, 1, 2, 1, 3}, {0, 0, 4, 8, 10}, {0, 0, 16, 10, 10}, {10, 0, 2, 10, 10},
	} {
		if start, end := zeroRun(p, test.at, test.offset, test.unit); start != test.start || end != test.end {
			t.Errorf("%+v: got %d to %d", test, start, end)
		}
	}
}

func TestIsZero(t *testing.T) {
	for _, n := range []int{0, 1, 8, 4095, 4096, 4097, 100000} {
		p := make([]byte, n)
		if !isZero(p) {
			t.Errorf("%d zeroes are none", n)
		}
		for _, i := range []int{0, n / 2, n - 1} {
			if n > 0 {
				p[i] = 1
				if isZero(p) {
					t.Errorf("%d bytes with byte %d set are zero", n, i)
				}
				p[i] = 0
			}
		}
	}
}

// TestRate: a limited transfer takes its time, by a clock that only counts.
func TestRate(t *testing.T) {
	source := newDevice(t, "mem", 8<<20, &image{content: bytes.Repeat([]byte{1}, 8<<20)})
	synctest.Test(t, func(t *testing.T) {
		destination, err := null.New(null.Config{Size: 8 << 20})
		if err != nil {
			t.Fatal(err)
		}
		defer destination.Close()
		start := time.Now()
		if _, err := Run(t.Context(), Options{Source: source, Destination: destination, Rate: 1 << 20, Queues: 3}); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start).Seconds(); took < 7.5 || took > 8.1 {
			t.Errorf("8 MiB at 1 MiB a second took %.2f s", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		start = time.Now()
		_, err = Run(ctx, Options{Source: source, Destination: destination, Rate: 1 << 10})
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 4*time.Second {
			t.Errorf("got %v after %v", err, time.Since(start))
		}
	})
}

// TestJournalOfARun: marks are written while it runs, and only for what has been flushed.
func TestJournalOfARun(t *testing.T) {
	const size = 64 << 20
	source := newDevice(t, "mem", size, &image{content: bytes.Repeat([]byte{1}, size)})
	synctest.Test(t, func(t *testing.T) {
		below, err := mem.New(mem.Config{Size: size})
		if err != nil {
			t.Fatal(err)
		}
		destination := fault.New(below)
		j, err := CreateJournal(filepath.Join(t.TempDir(), "journal"), Identity{Size: size}, Identity{Size: size}, false)
		if err != nil {
			t.Fatal(err)
		}
		defer j.Close()
		ctx, cancel := context.WithCancel(t.Context())
		var told atomic.Int64
		_, err = Run(ctx, Options{
			Source: source, Destination: destination, Journal: j, Zeroed: true, Rate: 10 << 20,
			Progress: func(_ How, n int64) {
				if told.Add(n) == 40<<20 {
					cancel()
				}
			},
		})
		if !errors.Is(err, context.Canceled) || j.Done() != 32<<20 {
			t.Errorf("got %v, and %d bytes in the journal", err, j.Done())
		}
		if flushes := destination.Seen(block.OpFlush); flushes != 2 {
			t.Errorf("%d flushes", flushes)
		}
		r, err := Run(t.Context(), Options{Source: source, Destination: destination, Journal: j, Start: j.Done(), Verify: true})
		if err != nil || r.Resumed != 32<<20 || j.Done() != size || r.Verified != size {
			t.Errorf("%+v, %v, %d in the journal", r, err, j.Done())
		}
	})
}

func identities() (source, destination Identity) {
	return Identity{Kind: "file", Name: "/a", Size: 100 << 20, Device: 1, Inode: 2, Modified: 3},
		Identity{Kind: "nbd", Name: "nbd://b", Size: 200 << 20}
}

func TestJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	a, b := identities()
	if _, err := OpenJournal(path, a, b); !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	j, err := CreateJournal(path, a, b, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, done := range []int64{16 << 20, 8 << 20, 32 << 20} {
		if err := j.Record(done); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := OpenJournal(path, a, b); !errors.Is(err, syscall.EBUSY) || !strings.Contains(err.Error(), "is running") {
		t.Errorf("opened twice: %v", err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := CreateJournal(path, a, b, false); !errors.Is(err, os.ErrExist) {
		t.Errorf("replaced: %v", err)
	}
	for _, test := range []struct {
		change func(a, b *Identity)
		text   string
	}{
		{func(a, b *Identity) { a.Modified++ }, "source cannot be gone on with: it has been written since"},
		{func(a, b *Identity) { a.Taken++ }, "it is another snapshot of the same name"},
		{func(a, b *Identity) { a.Size++ }, "it had 104857600 bytes, and has 104857601 now"},
		{func(a, b *Identity) { a.Inode++ }, "it is another one: it was the file /a"},
		{func(a, b *Identity) { b.Name = "nbd://c" }, "destination cannot be gone on with: it is another one"},
		{func(a, b *Identity) { b.Kind = "file" }, "it was the nbd nbd://b"},
	} {
		a, b := a, b
		test.change(&a, &b)
		if _, err := OpenJournal(path, a, b); !errors.Is(err, syscall.ESTALE) || !strings.Contains(err.Error(), test.text) {
			t.Errorf("got %v, want %q", err, test.text)
		}
	}
	moved := a
	moved.Name = "/c" // the same file by another name
	if j, err = OpenJournal(path, moved, b); err != nil || j.Done() != 32<<20 {
		t.Fatal(err)
	}
	if err := j.Record(48 << 20); err != nil {
		t.Fatal(err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if j, err = OpenJournal(path, a, b); err != nil || j.Done() != 48<<20 {
		t.Fatal(err)
	}
	if err := j.Remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// TestTornJournal: cut off anywhere, a journal is what it was before the last line, and damaged anywhere else refused.
func TestTornJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	a, b := identities()
	j, err := CreateJournal(path, a, b, false)
	if err != nil {
		t.Fatal(err)
	}
	ends := []int{}
	for done := int64(0); done < 3; done++ {
		if err := j.Record(done << 20); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, len(text))
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for n := range text {
		_, done, length, err := parseJournal(text[:n])
		want := -1
		for i, end := range ends {
			if n >= end {
				want = i
			}
		}
		if (err == nil) != (want >= 0) || err == nil && (done != int64(want)<<20 || length != ends[want]) {
			t.Fatalf("%d bytes: %d done, %d count, %v", n, done, length, err)
		}
		wrong := bytes.Clone(text)
		wrong[n] ^= 1
		head, done, _, err := parseJournal(wrong)
		if err == nil && (done > 1<<20 || head.Source != a || n < ends[0]) { // a wrong end of a line: it counts as torn
			t.Fatalf("with a wrong byte %d: %d done, %+v", n, done, head)
		}
	}
	if err := os.WriteFile(path, text[:len(text)-3], 0o600); err != nil {
		t.Fatal(err)
	}
	if j, err = OpenJournal(path, a, b); err != nil || j.Done() != 1<<20 {
		t.Fatal(err)
	}
	defer j.Close()
	if err := j.Record(5 << 20); err != nil {
		t.Fatal(err)
	}
	if text, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	if _, done, length, err := parseJournal(text); done != 5<<20 || length != len(text) || err != nil {
		t.Errorf("%d done, %d of %d bytes count, %v", done, length, len(text), err)
	}
}

func FuzzJournal(f *testing.F) {
	f.Add([]byte("00000000 {}\n"))
	path := filepath.Join(f.TempDir(), "journal")
	a, b := identities()
	j, err := CreateJournal(path, a, b, false)
	if err != nil {
		f.Fatal(err)
	}
	if err := errors.Join(j.Record(1<<20), j.Close()); err != nil {
		f.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Fuzz(func(t *testing.T, text []byte) {
		head, done, length, err := parseJournal(text)
		if err != nil {
			if !errors.Is(err, syscall.EINVAL) {
				t.Error(err)
			}
			return
		}
		if head.Version != journalVersion || done < 0 || length <= 0 || length > len(text) || text[length-1] != '\n' {
			t.Errorf("%+v, %d done, %d of %d bytes", head, done, length, len(text))
		}
	})
}

// BenchmarkPiece copies from memory to memory; allocations count for the whole transfer, of 4096 pieces.
func BenchmarkPiece(b *testing.B) {
	const size = 256 << 20
	source := newDevice(b, "mem", size, &image{content: bytes.Repeat([]byte{1}, size)})
	destination := newDevice(b, "mem", size, nil)
	run := func() {
		if _, err := Run(b.Context(), Options{Source: source, Destination: destination, Sparse: 4096, PieceSize: 64 << 10}); err != nil {
			b.Fatal(err)
		}
	}
	run() // the destination takes memory
	b.SetBytes(size)
	b.ReportAllocs()
	for b.Loop() {
		run()
	}
}
