package sparse

import (
	"bytes"
	"errors"
	"math"
	"math/rand/v2"
	"sync"
	"testing"
)

// check compares the whole of s with want.
func check(t *testing.T, s *Store, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	s.Read(got, 0)
	if !bytes.Equal(got, want) {
		t.Fatal("the store differs from the model")
	}
}

// holes returns the extents of a range in one list and fails when they do not cover it in order.
func holes(t *testing.T, s *Store, offset, length int64) (list []extent) {
	t.Helper()
	at := offset
	s.Extents(offset, length, func(o, n int64, hole bool) bool {
		if o != at || n <= 0 {
			t.Fatalf("extent [%d, +%d) where %d was next", o, n, at)
		}
		if len(list) > 0 && list[len(list)-1].hole == hole {
			t.Fatalf("extents at %d are not joined", o)
		}
		at += n
		list = append(list, extent{o, n, hole})
		return true
	})
	if at != offset+length {
		t.Fatalf("extents end at %d, not at %d", at, offset+length)
	}
	return list
}

type extent struct {
	offset, length int64
	hole           bool
}

// model is a plain byte slice and the pages that must have memory.
type model struct {
	data    []byte
	present []bool
}

// touch marks the pages of a written range.
func (m *model) touch(offset, length int64) {
	for i := offset; i < offset+length; i = i>>pageShift<<pageShift + PageSize {
		m.present[i>>pageShift] = true
	}
}

// discard clears a range and drops the pages that it covers.
func (m *model) discard(offset, length int64) {
	clear(m.data[offset : offset+length])
	for i := range m.present {
		start, end := int64(i)<<pageShift, min(int64(i+1)<<pageShift, int64(len(m.data)))
		if offset <= start && end <= offset+length {
			m.present[i] = false
		}
	}
}

func (m *model) allocated() (total int64) {
	for _, p := range m.present {
		if p {
			total += PageSize
		}
	}
	return total
}

// deepStore is a store that uses the long table whatever its size.
func deepStore(size int64) *Store {
	s := New(size, 0)
	s.flat = nil
	s.deep = New(5<<40, 0).deep
	return s
}

func TestModel(t *testing.T) {
	const size = 20*PageSize + 1234 // a last partial page
	for name, s := range map[string]*Store{"flat": New(size, 0), "deep": deepStore(size)} {
		t.Run(name, func(t *testing.T) {
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			rnd := rand.New(rand.NewPCG(seed, 0))
			m := &model{data: make([]byte, size), present: make([]bool, spans(size, pageShift))}
			for range 150 {
				step(t, rnd, s, m)
			}
			check(t, s, m.data)
		})
	}
}

// step does one random operation on the store and the model and compares what can be seen of it.
func step(t *testing.T, rnd *rand.Rand, s *Store, m *model) {
	t.Helper()
	size := int64(len(m.data))
	offset := rnd.Int64N(size + 1)
	length := rnd.Int64N(size - offset + 1)
	if rnd.IntN(2) == 0 {
		length = min(length, rnd.Int64N(5000))
	}
	switch rnd.IntN(5) {
	case 0, 1:
		p := make([]byte, length)
		for i := range p {
			p[i] = byte(rnd.Uint32())
		}
		if err := s.Write(p, offset); err != nil {
			t.Fatal(err)
		}
		copy(m.data[offset:], p)
		m.touch(offset, length)
	case 2:
		s.Discard(offset, length)
		m.discard(offset, length)
	case 3:
		if err := s.Zero(offset, min(length, 3*PageSize)); err != nil {
			t.Fatal(err)
		}
		clear(m.data[offset : offset+min(length, 3*PageSize)])
		m.touch(offset, min(length, 3*PageSize))
	case 4:
		p := bytes.Repeat([]byte{0xee}, int(length))
		s.Read(p, offset)
		if !bytes.Equal(p, m.data[offset:offset+length]) {
			t.Fatalf("read of [%d, +%d) differs from the model", offset, length)
		}
	}
	if got, want := s.Allocated(), m.allocated(); got != want {
		t.Fatalf("%d bytes allocated, want %d", got, want)
	}
	for _, e := range holes(t, s, offset, length) {
		for i := e.offset; i < e.offset+e.length; i = i>>pageShift<<pageShift + PageSize {
			if m.present[i>>pageShift] == e.hole {
				t.Fatalf("page %d: hole %v differs from the model", i>>pageShift, e.hole)
			}
		}
	}
}

func TestHuge(t *testing.T) {
	for _, size := range []int64{1, flatMax << 26, flatMax<<26 + 1, 1 << 50, math.MaxInt64 - 511, math.MaxInt64} {
		s := New(size, 0)
		tail := min(size, 3*PageSize+7)
		p := bytes.Repeat([]byte{0x5a}, int(tail))
		for _, offset := range []int64{0, size - tail, (size - tail) / 2} {
			if err := s.Write(p, offset); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, tail)
			s.Read(got, offset)
			if !bytes.Equal(got, p) {
				t.Fatalf("size %d: wrong data at %d", size, offset)
			}
		}
		list := holes(t, s, 0, size)
		if size > 1 && len(list) != 5 {
			t.Errorf("size %d: %d extents, want data, hole, data, hole, data", size, len(list))
		}
		s.Discard(0, size)
		if n := s.Allocated(); n != 0 {
			t.Errorf("size %d: %d bytes are left after a discard of everything", size, n)
		}
		if list := holes(t, s, 0, size); len(list) != 1 || !list[0].hole {
			t.Errorf("size %d: extents after a discard of everything: %v", size, list)
		}
	}
}

func TestEmpty(t *testing.T) {
	s := New(0, 0)
	s.Read(nil, 0)
	s.Discard(0, 0)
	if err := errors.Join(s.Write(nil, 0), s.Zero(0, 0)); err != nil {
		t.Fatal(err)
	}
	holes(t, s, 0, 0)
}

func TestExtentsStops(t *testing.T) {
	s := New(8*PageSize, 0)
	if err := s.Write([]byte{1}, 2*PageSize); err != nil {
		t.Fatal(err)
	}
	calls := 0
	s.Extents(0, 8*PageSize, func(int64, int64, bool) bool { calls++; return calls < 2 })
	if calls != 2 {
		t.Errorf("yield was called %d times after it returned false at the second", calls)
	}
}

func TestLimit(t *testing.T) {
	s := New(1<<40, 2*PageSize+1)
	for i := range int64(2) {
		if err := s.Write([]byte{1}, i<<30); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{s.Write([]byte{1}, 5<<30), s.Zero(5<<30, 1)} {
		if !errors.Is(err, ErrNoSpace) {
			t.Fatalf("got %v at the limit, want ErrNoSpace", err)
		}
	}
	if err := s.Write([]byte{2}, 1<<30|7); err != nil {
		t.Errorf("a page that is there cannot be written at the limit: %v", err)
	}
	s.Discard(0, PageSize)
	if err := s.Write([]byte{1}, 5<<30); err != nil {
		t.Errorf("no room after a discard: %v", err)
	}
}

// TestLimitShared: writers of the same pages never fail for want of room that only one of them needs.
func TestLimitShared(t *testing.T) {
	const pages, writers = 16, 8
	s := New(pages*PageSize, pages*PageSize)
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range pages {
				if err := s.Write([]byte{byte(w)}, int64(i)*PageSize+int64(w)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n := s.Allocated(); n != pages*PageSize {
		t.Errorf("%d bytes allocated, want %d", n, pages*PageSize)
	}
}

// TestDisjoint: neighbours in one page, each writing, discarding and zeroing its own part, do not disturb each other.
func TestDisjoint(t *testing.T) {
	const part = PageSize/2 + 512 // parts do not begin at pages
	const workers = 8
	for name, s := range map[string]*Store{"flat": New(workers*part, 0), "deep": deepStore(workers * part)} {
		var wg sync.WaitGroup
		for w := range workers {
			wg.Go(func() { hammer(t, s, int64(w)*part, part, uint64(w)) })
		}
		wg.Wait()
		if t.Failed() {
			t.Fatalf("in the %s table", name)
		}
	}
}

// hammer does random operations within one range and checks each against a model of it.
func hammer(t *testing.T, s *Store, base, length int64, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 1))
	want, got := make([]byte, length), make([]byte, length)
	for range 60 {
		offset := rnd.Int64N(length)
		count := rnd.Int64N(length-offset) + 1
		switch rnd.IntN(3) {
		case 0:
			p := bytes.Repeat([]byte{byte(rnd.Uint32())}, int(count))
			if err := s.Write(p, base+offset); err != nil {
				t.Error(err)
			}
			copy(want[offset:], p)
		case 1:
			s.Discard(base+offset, count)
			clear(want[offset : offset+count])
		case 2:
			if err := s.Zero(base+offset, count); err != nil {
				t.Error(err)
			}
			clear(want[offset : offset+count])
		}
		s.Read(got, base)
		if !bytes.Equal(got, want) {
			t.Errorf("the range at %d differs from its model", base)
			return
		}
	}
}

func benchmark(b *testing.B, size int64, touch bool, op func(s *Store, p []byte, offset int64)) {
	const span = 256 << 20
	s := New(size, 0)
	if touch {
		page := bytes.Repeat([]byte{1}, PageSize)
		for offset := int64(0); offset < span; offset += PageSize {
			if err := s.Write(page, offset); err != nil {
				b.Fatal(err)
			}
		}
	}
	p := make([]byte, 4096)
	rnd := rand.New(rand.NewPCG(1, 2))
	b.SetBytes(4096)
	b.ReportAllocs()
	for b.Loop() {
		op(s, p, int64(rnd.Uint32()%(span/4096))*4096)
	}
}

func read(s *Store, p []byte, offset int64)  { s.Read(p, offset) }
func write(s *Store, p []byte, offset int64) { _ = s.Write(p, offset) }

func BenchmarkRead4K(b *testing.B)          { benchmark(b, 1<<30, true, read) }
func BenchmarkReadHole4K(b *testing.B)      { benchmark(b, 1<<30, false, read) }
func BenchmarkWrite4K(b *testing.B)         { benchmark(b, 1<<30, true, write) }
func BenchmarkWrite4KExbibyte(b *testing.B) { benchmark(b, 1<<60, true, write) }

// BenchmarkMemmove4K is the copy alone, from and to the same amount of memory: what the table is measured against.
func BenchmarkMemmove4K(b *testing.B) {
	pages := make([][]byte, (256<<20)/PageSize)
	for i := range pages {
		pages[i] = bytes.Repeat([]byte{1}, PageSize)
	}
	p := make([]byte, 4096)
	rnd := rand.New(rand.NewPCG(1, 2))
	b.SetBytes(4096)
	for b.Loop() {
		offset := int(rnd.Uint32()%((256<<20)/4096)) * 4096
		copy(pages[offset/PageSize][offset%PageSize:], p)
	}
}
