package cowstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"

	"cowherd/backend/mem"
	"cowherd/block"
	"cowherd/internal/fault"
)

// handmade is a store that is written byte by byte, so that it can break any rule.
type handmade struct {
	layout Layout
	device *mem.Device
}

// newHandmade makes a store of whole chunks, and size bytes more, that holds records.
func newHandmade(t testing.TB, chunkSize ChunkSize, chunks int64, more int64, records ...Record) *handmade {
	t.Helper()
	d, err := mem.New(mem.Config{Size: chunks*int64(chunkSize) + more})
	if err != nil {
		t.Fatal(err)
	}
	h := &handmade{layout: NewLayout(d.Size(), chunkSize), device: d}
	p := make([]byte, block.SectorSize)
	Header{Valid: true, ChunkSize: chunkSize}.put(p)
	h.write(t, p, 0)
	for i, r := range records {
		h.record(t, uint64(i/h.layout.AreaRecords()), i%h.layout.AreaRecords(), r)
	}
	return h
}

// write changes bytes.
func (h *handmade) write(t testing.TB, p []byte, offset int64) {
	t.Helper()
	for len(p) > 0 {
		sector := make([]byte, block.SectorSize)
		start := offset / block.SectorSize * block.SectorSize
		if err := block.Read(h.device, sector, start); err != nil {
			t.Fatal(err)
		}
		n := copy(sector[offset-start:], p)
		if err := block.Write(h.device, sector, start); err != nil {
			t.Fatal(err)
		}
		p, offset = p[n:], offset+int64(n)
	}
}

// record writes a record to its place.
func (h *handmade) record(t testing.TB, area uint64, slot int, r Record) {
	t.Helper()
	p := make([]byte, recordBytes)
	r.put(p, 0)
	h.write(t, p, h.layout.place(area, slot))
}

// field writes a field of the header.
func (h *handmade) field(t testing.TB, offset int64, value uint32) {
	t.Helper()
	h.write(t, binary.LittleEndian.AppendUint32(nil, value), offset)
}

// full is as many good records as fit n areas.
func full(chunkSize ChunkSize, n int) []Record {
	l := Layout{ChunkSize: chunkSize, Chunks: 1 << 40}
	records := make([]Record, 0, n*l.AreaRecords())
	next := Chunk(2)
	for i := range n * l.AreaRecords() {
		next = l.skipMetadata(next)
		records = append(records, Record{Old: Chunk(i), New: next})
		next++
	}
	return records
}

// check is Check with all findings as strings: the rule, and "!" before it if it is a violation.
func (h *handmade) check(t testing.TB, origin int64) (*Survey, []string) {
	t.Helper()
	var found []string
	s, err := Check(h.device, CheckConfig{OriginSize: origin, Report: func(f *Finding) {
		kind := ""
		if f.Violation {
			kind = "!"
		}
		found = append(found, fmt.Sprintf("%s%s: %s", kind, f.Rule, f))
	}})
	if err != nil {
		t.Fatal(err)
	}
	if violations := len(slices.DeleteFunc(slices.Clone(found), func(s string) bool { return s[0] != '!' })); s.Violations != violations ||
		s.Remarks != len(found)-violations {
		t.Errorf("%d violations and %d remarks are counted of %q", s.Violations, s.Remarks, found)
	}
	return s, found
}

func TestCheck(t *testing.T) {
	const size = 4096 // 256 records of an area, areas at chunks 1, 258, 515
	two := []Record{{7, 2}, {3, 3}}
	tests := []struct {
		name    string
		chunks  int64
		records []Record
		spoil   func(t *testing.T, h *handmade)
		origin  int64
		want    []string // starts of the findings
	}{
		{"empty", 10, nil, nil, 0, nil},
		{"good", 10, two, nil, 8 * size, nil},
		{"last chunk of the origin not whole", 10, two, nil, 7*size + 512, nil},
		{"last chunk", 10, []Record{{0, 9}}, nil, 0, nil},
		{"gap below an area", 300, []Record{{0, 259}}, nil, 0, nil},
		{"full area", 600, full(size, 1), nil, 0, nil},
		{"full areas", 600, full(size, 2), nil, 0, nil},
		{"magic", 10, two, func(t *testing.T, h *handmade) { h.field(t, 0, 5) }, 0,
			[]string{"!header-magic: header: magic 0x00000005, want 0x70416e53"}},
		{"version", 10, two, func(t *testing.T, h *handmade) { h.field(t, 8, 2) }, 0,
			[]string{"!header-version: header: version 2, want 1"}},
		{"valid", 10, two, func(t *testing.T, h *handmade) { h.field(t, 4, 2) }, 0,
			[]string{"!header-valid: header: valid is 2, want 0 or 1"}},
		{"chunk size", 10, two, func(t *testing.T, h *handmade) { h.field(t, 12, 7) }, 0,
			[]string{"!header-chunk-size: header: chunk size 3584 is not a power of 2"}},
		{"chunk size 0", 10, two, func(t *testing.T, h *handmade) { h.field(t, 12, 0) }, 0,
			[]string{"!header-chunk-size: header: chunk size 0 "}},
		{"chunk size too high", 10, two, func(t *testing.T, h *handmade) { h.field(t, 12, 1<<31) }, 0,
			[]string{"!header-chunk-size: header: chunk size 1099511627776 is too high"}},
		{"chunk size and version", 10, two, func(t *testing.T, h *handmade) { h.field(t, 12, 3); h.field(t, 8, 9) }, 0,
			[]string{"!header-version", "!header-chunk-size"}},
		{"header tail", 10, two, func(t *testing.T, h *handmade) { h.write(t, []byte{1}, 4095) }, 0,
			[]string{"header-tail: header: byte 4095 "}},
		{"no room for an area", 1, nil, nil, 0, []string{"!next-area: area 0 is to be chunk 1, behind the end"}},
		{"behind the end", 10, []Record{{0, 2}, {1, 10}, {2, 1 << 63}}, nil, 0, []string{
			"!new-behind-end: area 0, slot 1, old chunk 1, new chunk 10: the new chunk lies behind the end of the COW device, which has 10",
			"!new-behind-end: area 0, slot 2, "}},
		{"metadata", 600, []Record{{0, 2}, {1, 1}, {2, 258}}, nil, 0, []string{
			"!new-metadata: area 0, slot 1, old chunk 1, new chunk 1: ", "!new-metadata: area 0, slot 2, "}},
		{"new twice", 10, []Record{{0, 2}, {1, 3}, {2, 2}}, nil, 0, []string{"!new-twice: area 0, slot 2, old chunk 2, new chunk 2: "}},
		{"old twice", 10, []Record{{0, 2}, {1, 3}, {0, 4}}, nil, 0, []string{"!old-twice: area 0, slot 2, old chunk 0, new chunk 4: "}},
		{"the same record twice", 10, []Record{{5, 2}, {5, 2}}, nil, 0, []string{"!new-twice: ", "!old-twice: "}},
		{"behind the origin", 10, []Record{{7, 2}, {8, 3}}, nil, 8 * size, []string{"!old-behind-end: area 0, slot 1, old chunk 8, new chunk 3: "}},
		{"too large", 10, []Record{{1 << 56, 2}, {1<<56 - 1, 3}}, nil, 0, []string{"!old-too-large: area 0, slot 0, "}},
		{"all at once", 10, []Record{{1 << 60, 100}}, nil, 0, []string{"!new-behind-end", "!old-too-large"}},
		{"leftover", 10, two, func(t *testing.T, h *handmade) { h.record(t, 0, 9, Record{9, 9}) }, 0,
			[]string{"leftover: area 0, slot 9: bytes behind the end of the table, which is at slot 2,"}},
		{"leftover at the end", 10, two, func(t *testing.T, h *handmade) { h.record(t, 0, 2, Record{9, 0}) }, 0,
			[]string{"leftover: area 0, slot 2: "}},
		{"leftover in the last slot", 10, nil, func(t *testing.T, h *handmade) { h.record(t, 0, 255, Record{0, 4}) }, 0,
			[]string{"leftover: area 0, slot 255: "}},
		{"leftover in the next area", 600, full(size, 1), func(t *testing.T, h *handmade) { h.record(t, 1, 1, Record{1, 4}) }, 0,
			[]string{"leftover: area 1, slot 1: "}},
		{"garbage in the next area", 600, full(size, 1), func(t *testing.T, h *handmade) { h.record(t, 1, 0, Record{1 << 50, 4}) }, 0,
			[]string{"!new-twice: area 1, slot 0, "}},
		{"garbage in an area not reached", 600, two, func(t *testing.T, h *handmade) { h.record(t, 1, 0, Record{1, 4}) }, 0, nil},
		{"no room for the next area", 258, full(size, 1), nil, 0, []string{"!next-area: area 1 is to be chunk 258, behind the end of the COW device, which has 258"}},
		{"no room for the next area, invalid", 258, full(size, 1), func(t *testing.T, h *handmade) { h.field(t, 4, 0) }, 0, []string{"next-area: area 1 "}},
		{"invalid and damaged", 10, []Record{{0, 100}}, func(t *testing.T, h *handmade) { h.field(t, 4, 0) }, 0, []string{"!new-behind-end"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			h := newHandmade(t, size, test.chunks, 1024, test.records...)
			if test.spoil != nil {
				test.spoil(t, h)
			}
			_, got := h.check(t, test.origin)
			if len(got) != len(test.want) {
				t.Fatalf("got %q, want %q", got, test.want)
			}
			for i := range got {
				if !strings.HasPrefix(got[i], test.want[i]) {
					t.Errorf("got %q, want %q", got[i], test.want[i])
				}
			}
		})
	}
}

func TestSurvey(t *testing.T) {
	invalid := func(t *testing.T, h *handmade) { h.field(t, 4, 0) }
	tests := []struct {
		name      string
		chunkSize ChunkSize
		chunks    int64
		records   []Record
		spoil     func(*testing.T, *handmade)
		status    string // the kernel's, by hand
		area      uint64
		slot      int
	}{
		{"empty", 4096, 10, nil, nil, "16/83 16", 0, 0},
		{"one", 4096, 10, []Record{{0, 2}}, nil, "24/83 16", 0, 1},
		{"gap", 4096, 10, []Record{{0, 5}}, nil, "48/83 16", 0, 1},
		{"up to the end", 4096, 10, []Record{{0, 9}}, nil, "80/83 16", 0, 1},
		{"full area", 4096, 600, full(4096, 1), nil, "2072/4803 24", 1, 0}, // 258 is an area: 259 chunks
		{"below an area", 4096, 600, full(4096, 1)[1:], nil, "2072/4803 16", 0, 255},
		{"sectors", 512, 80, full(512, 2), nil, "68/83 4", 2, 0}, // areas at 1, 34, 67
		{"large", 1 << 20, 3, []Record{{0, 2}}, nil, "6144/6147 4096", 0, 1},
		{"invalid", 4096, 10, []Record{{0, 5}}, invalid, "Invalid", 0, 1},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			h := newHandmade(t, test.chunkSize, test.chunks, 3*512, test.records...)
			if test.spoil != nil {
				test.spoil(t, h)
			}
			s, _ := h.check(t, 0)
			if s.Status() != test.status || s.Area != test.area || s.Slot != test.slot || s.Exceptions != uint64(len(test.records)) {
				t.Errorf("status %q, table's end at area %d, slot %d, %d exceptions; want %q, %d, %d, %d", s.Status(), s.Area,
					s.Slot, s.Exceptions, test.status, test.area, test.slot, len(test.records))
			}
		})
	}
}

// TestCheckModel compares the counts of random stores with what a plain loop finds, and with a store that is loaded.
func TestCheckModel(t *testing.T) {
	for seed := range uint64(100) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		chunkSize := ChunkSize(512 << rnd.IntN(4))
		chunks := 20 + rnd.Int64N(300)
		l := NewLayout(chunks*int64(chunkSize), chunkSize)
		var records []Record
		news, olds := map[Chunk]bool{}, map[Chunk]bool{}
		violations, highest := 0, Chunk(0)
		for range rnd.IntN(2 * l.AreaRecords()) {
			if l.AreaChunk(uint64(len(records)+1)/uint64(l.AreaRecords())) >= l.Chunks {
				break
			}
			r := Record{Chunk(rnd.IntN(400)), 1 + Chunk(rnd.Int64N(chunks+3))}
			if seed%2 == 0 { // a good one
				r = Record{Chunk(len(records)), l.skipMetadata(Chunk(len(records)) + 2 + Chunk(len(records))/Chunk(l.AreaRecords()))}
			}
			records = append(records, r)
			bad := r.New >= l.Chunks || r.New%(l.stride()) == 1
			if bad || news[r.New] {
				violations++
			}
			if !bad {
				news[r.New] = true
			}
			if r.New < l.Chunks {
				highest = max(highest, r.New)
			}
			if olds[r.Old] {
				violations++
			}
			olds[r.Old] = true
		}
		gaps := uint64(0)
		for c := Chunk(2); c < highest; c++ {
			if !news[c] && c%l.stride() != 1 {
				gaps++
			}
		}
		h := newHandmade(t, chunkSize, chunks, 0, records...)
		s, found := h.check(t, 0)
		if s.Violations != violations || s.NewMax != highest || s.Gaps != gaps {
			t.Fatalf("seed %d: %d violations, highest %d, %d gaps; want %d, %d, %d: %q", seed, s.Violations, s.NewMax, s.Gaps,
				violations, highest, gaps, found)
		}
		checkLoad(t, h.device, s, violations > 0)
	}
}

func TestCheckErrors(t *testing.T) {
	h := newHandmade(t, 4096, 600, 0, full(4096, 1)...)
	for name, fail := range map[string]struct {
		offset int64
		want   string
	}{
		"header": {0, "read the header: "},
		"area":   {258 * 4096, "read area 1: "},
	} {
		d := fault.New(h.device)
		d.Fail(func(r *block.Request) error {
			if r.Offset == fail.offset {
				return syscall.EIO
			}
			return nil
		})
		s, err := Check(d, CheckConfig{})
		if !errors.Is(err, syscall.EIO) || !strings.HasPrefix(err.Error(), fail.want) || s == nil {
			t.Errorf("%s: got %v", name, err)
		}
	}
	empty, err := mem.New(mem.Config{Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Check(empty, CheckConfig{}); !errors.Is(err, ErrNoStore) {
		t.Errorf("zeroes: %v", err)
	}
	nothing, err := mem.New(mem.Config{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Check(nothing, CheckConfig{}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("no bytes: %v", err)
	}
}

func TestRecords(t *testing.T) {
	want := full(4096, 2)
	for _, chunks := range []int64{515, 600} {
		var got []Record
		ended, err := newHandmade(t, 4096, chunks, 0, want...).layout.Records(
			newHandmade(t, 4096, chunks, 0, want...).device, func(area uint64, slot int, r Record) error {
				if int(area)*256+slot != len(got) {
					t.Errorf("record %d is said to be at area %d, slot %d", len(got), area, slot)
				}
				got = append(got, r)
				return nil
			})
		if err != nil || ended != (chunks > 515) || !slices.Equal(got, want) {
			t.Errorf("%d chunks: %d records, ended %v, %v", chunks, len(got), ended, err)
		}
	}
}

// FuzzCheck gives arbitrary bytes to Check, and to a store that is opened and loaded: both must come to an end, without a
// panic, and agree about what is wrong.
func FuzzCheck(f *testing.F) {
	for _, records := range [][]Record{nil, {{1, 2}}, {{1, 2}, {1, 2}, {1 << 60, 1 << 60}}, full(512, 1)} {
		chunks := 5 + int64(len(records))
		h := newHandmade(f, 512, chunks, 0, records...)
		p := make([]byte, chunks*512)
		if err := block.Read(h.device, p, 0); err != nil {
			f.Fatal(err)
		}
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) > 64<<10 {
			return
		}
		d, err := mem.New(mem.Config{Size: int64(len(p)+511) / 512 * 512})
		if err != nil {
			t.Fatal(err)
		}
		if err := block.Write(d, append(p, make([]byte, int(d.Size())-len(p))...), 0); err != nil {
			t.Fatal(err)
		}
		reported, broken := 0, false
		s, err := Check(d, CheckConfig{Report: func(f *Finding) {
			reported++
			broken = broken || f.Violation && f.Rule != RuleNextArea && f.Rule != RuleHeaderValid
			_ = f.String()
		}})
		if err != nil {
			return
		}
		if s.Violations+s.Remarks != reported || s.Exceptions > uint64(len(p))/recordBytes {
			t.Fatalf("%+v, %d findings reported", s, reported)
		}
		_ = s.Status()
		checkLoad(t, d, s, broken)
		if h, err := ReadHeader(d); (err == nil) != (s.Layout != Layout{}) || err == nil && h != s.Header {
			t.Fatalf("the header: %+v and %v, survey %+v", h, err, s)
		}
	})
}

// checkLoad opens the store on d and loads it. broken: it breaks rules other than those about where the table ends and how
// the header says valid, which a store that is opened does not mind.
func checkLoad(t *testing.T, d block.Device, s *Survey, broken bool) {
	t.Helper()
	olds, loaded := map[Chunk]bool{}, uint64(0)
	p, err := OpenPersistent(d, PersistentConfig{})
	if err == nil {
		err = p.Load(0, func(r Record) bool {
			before := olds[r.Old]
			olds[r.Old] = true
			loaded++
			return !before
		})
	}
	corrupt := errors.As(err, new(*CorruptError))
	if noArea := s.Layout != (Layout{}) && s.Layout.Areas() == 0; noArea && corrupt {
		return
	}
	if broken != corrupt || !corrupt && (err != nil || loaded != s.Exceptions) {
		t.Fatalf("check: %+v, broken %v; load of %d: %v", s, broken, loaded, err)
	}
	if corrupt {
		return
	}
	allocated, total, metadata := p.Usage()
	if a, b, c := s.Usage(); s.Ended && (a != allocated || b != total || c != metadata) {
		t.Fatalf("usage %d/%d %d, of the store %d/%d %d", a, b, c, allocated, total, metadata)
	}
	leftover := false
	_, err = Check(d, CheckConfig{Report: func(f *Finding) { leftover = leftover || f.Rule == RuleLeftover }})
	if err != nil || s.Header.Valid && leftover {
		t.Fatalf("what lay behind the table is there after it was loaded: %+v, %v", s, err)
	}
}

func BenchmarkCheck(b *testing.B) {
	const count = 1 << 20
	records := full(4096, count/256)
	d, err := mem.New(mem.Config{Size: 4096 * (count + count/256 + 10)})
	if err != nil {
		b.Fatal(err)
	}
	l := NewLayout(d.Size(), 4096)
	p := make([]byte, 4096)
	Header{Valid: true, ChunkSize: 4096}.put(p)
	_ = block.Write(d, p, 0)
	for area := range uint64(count / 256) {
		for i := range 256 {
			records[area*256+uint64(i)].put(p, i)
		}
		_ = block.Write(d, p, l.place(area, 0))
	}
	b.SetBytes(count * recordBytes)
	for b.Loop() {
		if s, err := Check(d, CheckConfig{}); err != nil || s.Exceptions != count || s.Violations > 0 {
			b.Fatal(s, err)
		}
	}
}
