package fault_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"cowherd/block"
	"cowherd/internal/fault"
)

// limits are those of a disk with a volatile cache that takes any bytes.
func limits() block.Limits {
	l := block.NoLimits()
	l.NeedsFlush = true
	return l
}

// random fills n bytes.
func random(r *rand.Rand, n int64) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	return p
}

// naive is a disk as TestReplay knows it: the versions of each sector that may be there after a power failure, oldest
// first, the last of which is the newest.
type naive struct {
	disk     *fault.Disk
	versions [][][]byte
}

func newNaive(d *fault.Disk, content []byte) *naive {
	n := &naive{disk: d}
	for at := 0; at < len(content); at += block.SectorSize {
		n.versions = append(n.versions, [][]byte{content[at:min(at+block.SectorSize, len(content))]})
	}
	return n
}

// write adds versions; flush leaves the newest of each.
func (n *naive) write(offset int64, data []byte, durable bool) {
	for i := range n.versions {
		start := int64(i) * block.SectorSize
		v := n.versions[i]
		newest := slices.Clone(v[len(v)-1])
		from, to := max(start, offset), min(start+int64(len(newest)), offset+int64(len(data)))
		if from >= to {
			continue
		}
		copy(newest[from-start:], data[from-offset:to-offset])
		if durable {
			v = nil
		}
		n.versions[i] = append(v, newest)
	}
}

func (n *naive) flush() {
	for i, v := range n.versions {
		n.versions[i] = v[len(v)-1:]
	}
}

// check compares an image with the versions; newest: only the newest will do. It returns how many sectors are not the
// newest.
func (n *naive) check(x *fault.Image, newest bool) (lost int, err error) {
	content := x.Content()
	for i, v := range n.versions {
		got := content[i*block.SectorSize:][:len(v[0])]
		at := len(v) - 1
		for at >= 0 && !bytes.Equal(v[at], got) {
			at--
		}
		if at < 0 || newest && at < len(v)-1 {
			return lost, fmt.Errorf("%s: sector %d is version %d of %d", n.disk.Name(), i, at, len(v))
		}
		if at < len(v)-1 {
			lost++
		}
	}
	return lost, nil
}

// step is an operation of TestReplay, as a mark.
type step struct {
	n    *naive
	op   block.Op
	fua  bool
	at   int64
	data []byte
}

func (s step) apply() {
	switch s.op {
	case block.OpFlush:
		s.n.flush()
	case block.OpDiscard:
		s.n.write(s.at, bytes.Repeat([]byte{0xDD}, len(s.data)), s.fua)
	case block.OpWriteZeroes:
		s.n.write(s.at, make([]byte, len(s.data)), s.fua)
	case block.OpWrite:
		s.n.write(s.at, s.data, s.fua)
	}
}

// do does the operation and marks it, so that it has happened in a replay when the mark has.
func (s step) do(t *testing.T, rec *fault.Recorder) {
	t.Helper()
	var flags block.Flags
	if s.fua {
		flags = block.FUA
	}
	var data []byte
	if s.op == block.OpWrite {
		data = s.data
	}
	if err := block.Do(s.n.disk, s.op, flags, s.at, int64(len(s.data)), data); err != nil {
		t.Fatal(err)
	}
	rec.Mark(s)
}

// TestReplay compares images of a random history, after each of its events, with versions of sectors.
func TestReplay(t *testing.T) {
	lost := 0
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 0))
		rec := fault.NewRecorder()
		var disks []*naive
		for _, size := range []int64{20_000, 9 * 4096} {
			content := random(r, size)
			d := rec.NewDisk(fault.DiskConfig{Name: fmt.Sprint("disk", size), Content: slices.Clone(content), Limits: limits()})
			disks = append(disks, newNaive(d, content))
		}
		for range 200 {
			s := step{n: disks[r.IntN(2)], op: block.OpWrite, fua: r.IntN(6) == 0}
			switch r.IntN(12) {
			case 0, 1:
				s = step{n: s.n, op: block.OpFlush}
			case 2:
				s.op = block.OpDiscard
			case 3:
				s.op = block.OpWriteZeroes
			}
			if s.op != block.OpFlush {
				s.at = r.Int64N(s.n.disk.Size())
				s.data = random(r, min(r.Int64N(6000), s.n.disk.Size()-s.at))
			}
			s.do(t, rec)
		}
		lost += replay(t, rec, disks, r)
	}
	if lost == 0 {
		t.Error("no power failure has cost anything")
	}
}

// replay checks images at each mark. It returns how many sectors were lost.
func replay(t *testing.T, rec *fault.Recorder, disks []*naive, r *rand.Rand) (lost int) {
	t.Helper()
	p := rec.Replay()
	for e, ok := p.Peek(); ok; e, ok = p.Peek() {
		p.Step()
		s, is := e.Mark.(step)
		if !is {
			continue
		}
		s.apply()
		killed, cut := p.Kill(), p.PowerCut(r)
		for i, n := range disks {
			if _, err := n.check(killed[i], true); err != nil {
				t.Fatalf("killed after event %d: %v", p.At(), err)
			}
			count, err := n.check(cut[i], false)
			if err != nil {
				t.Fatalf("power cut after event %d: %v", p.At(), err)
			}
			lost += count
		}
	}
	if p.At() != p.Len() {
		t.Errorf("the replay ends at %d of %d", p.At(), p.Len())
	}
	return lost
}

// TestFlushCoversWhatHadCompleted: a write that is in flight while a flush is, is not covered, though it takes effect
// first.
func TestFlushCoversWhatHadCompleted(t *testing.T) {
	rec := fault.NewRecorder()
	var front *fault.Device
	d := rec.NewDisk(fault.DiskConfig{
		Name: "disk", Content: make([]byte, 4096), Limits: limits(),
		Through: func(lower block.Device) block.Device { front = fault.New(lower); return front },
	})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(block.Write(d, bytes.Repeat([]byte{1}, 512), 0))
	front.Hold(func(r *block.Request) bool { return r.Op == block.OpFlush })
	flush := start(d, block.OpFlush, 0)
	must(block.Write(d, bytes.Repeat([]byte{2}, 512), 512))
	must(block.Do(d, block.OpWrite, block.FUA, 1024, 512, bytes.Repeat([]byte{3}, 512)))
	front.Release()
	must(<-flush.done)

	p := rec.Replay()
	for range p.Len() {
		p.Step()
	}
	if n := p.Volatile(); n != 1 {
		t.Errorf("%d writes may be lost, want the one during the flush", n)
	}
	r := rand.New(rand.NewPCG(1, 0))
	seen := map[byte]bool{}
	for range 50 {
		content := p.PowerCut(r)[0].Content()
		if content[0] != 1 || content[1024] != 3 {
			t.Fatalf("a durable write was lost: %d, %d", content[0], content[1024])
		}
		seen[content[512]] = true
	}
	if !seen[0] || !seen[2] {
		t.Errorf("the write during the flush was seen as %v", seen)
	}
	var log []string
	for _, e := range p.Last(4) {
		log = append(log, e.String())
	}
	want := []string{
		"write    disk: write, 512 bytes at 512", "write    disk: write, 512 bytes at 1024, FUA",
		"durable  disk: write, 512 bytes at 1024, FUA", "flush    disk",
	}
	if !slices.Equal(log, want) {
		t.Errorf("log:\n%s", strings.Join(log, "\n"))
	}
}

// TestDurableOverVolatile: what is lost of an older write does not come back over a newer one that is durable.
func TestDurableOverVolatile(t *testing.T) {
	rec := fault.NewRecorder()
	d := rec.NewDisk(fault.DiskConfig{Name: "disk", Content: make([]byte, 1024), Limits: limits()})
	err := errors.Join(
		block.Write(d, bytes.Repeat([]byte{1}, 1024), 0),
		block.Do(d, block.OpWrite, block.FUA, 0, 512, bytes.Repeat([]byte{2}, 512)))
	if err != nil {
		t.Fatal(err)
	}
	p := rec.Replay()
	for range p.Len() {
		p.Step()
	}
	r := rand.New(rand.NewPCG(1, 0))
	seen := map[byte]bool{}
	for range 50 {
		content := p.PowerCut(r)[0].Content()
		if content[0] != 2 {
			t.Fatalf("the durable write is %d", content[0])
		}
		seen[content[512]] = true
	}
	if !seen[0] || !seen[1] {
		t.Errorf("the volatile write was seen as %v", seen)
	}
}

// TestGrow: a disk that has grown may be as it was after a power failure, with what was written behind its old end, until
// a flush.
func TestGrow(t *testing.T) {
	rec := fault.NewRecorder()
	d := rec.NewDisk(fault.DiskConfig{Name: "disk", Content: make([]byte, 1024), Limits: limits()})
	one := bytes.Repeat([]byte{1}, 512)
	err := errors.Join(d.Grow(1000), d.Grow(4096), block.Write(d, one, 2048), block.Write(d, one, 512))
	rec.Mark("grown")
	if err = errors.Join(err, block.Flush(d), d.Grow(8192), block.Do(d, block.OpWrite, block.FUA, 7680, 512, one)); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 0))
	p := rec.Replay()
	for e, ok := p.Peek(); ok && e.Kind != fault.EventMark; e, ok = p.Peek() {
		p.Step()
	}
	if size := p.Kill()[0].Size(); size != 4096 {
		t.Errorf("killed: it has %d bytes", size)
	}
	sizes := map[int64]bool{}
	for range 50 {
		x := p.PowerCut(r)[0]
		sizes[x.Size()] = true
		if err := errors.Join(x.Grow(5000), block.Write(x, one, 4400)); err != nil || x.Size() != 5000 || x.Content()[4900] != 1 {
			t.Fatalf("an image grows to %d bytes: %v", x.Size(), err)
		}
	}
	if len(sizes) != 2 || !sizes[1024] || !sizes[4096] {
		t.Errorf("after power failures it has %v bytes", sizes)
	}
	for range p.Len() - p.At() {
		p.Step()
	}
	for range 20 {
		content := p.PowerCut(r)[0].Content()
		if len(content) != 8192 || content[512] != 1 || content[2048] != 1 || content[7680] != 1 {
			t.Fatalf("%d bytes are left, or something is lost", len(content))
		}
	}
}

// TestImage: an image can be written, alone, and is void when the replay goes on.
func TestImage(t *testing.T) {
	rec := fault.NewRecorder()
	d := rec.NewDisk(fault.DiskConfig{Name: "disk", Content: make([]byte, 9000), Limits: limits()})
	if err := block.Write(d, []byte{1, 2, 3}, 4095); err != nil {
		t.Fatal(err)
	}
	p := rec.Replay()
	p.Step()
	x, other := p.Kill()[0], p.Kill()[0]
	err := errors.Join(
		block.Write(x, []byte{9, 9}, 4096),
		block.Do(x, block.OpWriteZeroes, 0, 8990, 10, nil),
		block.Do(x, block.OpDiscard, 0, 8000, 5000-4096, nil),
		block.Flush(x))
	if err != nil {
		t.Fatal(err)
	}
	if got := x.Content()[4094:4099]; !bytes.Equal(got, []byte{0, 1, 9, 9, 0}) {
		t.Errorf("the image holds %v", got)
	}
	if got := other.Content()[4094:4099]; !bytes.Equal(got, []byte{0, 1, 2, 3, 0}) {
		t.Errorf("another image holds %v", got)
	}
	if err := block.Write(x, make([]byte, 1), 9000); err == nil {
		t.Error("a write behind the end succeeded")
	}
	if err := block.Write(d, make([]byte, 1), 9000); err == nil {
		t.Error("a write behind the end of the disk succeeded")
	}
	rec.Mark("more")
	p = rec.Replay()
	x = p.Kill()[0]
	p.Step()
	defer func() {
		if recover() == nil {
			t.Error("a void image can be read")
		}
	}()
	x.Content()
}

// journal is a protocol with one rule, that a record is written when its data is durable, to see that breaking it is
// found out. Records and data are on disks of their own.
type journal struct {
	rec           *fault.Recorder
	data, records *fault.Disk
	area          []byte // of all records, a sector for each
	close         func()
}

const (
	journalEntries = 8
	journalData    = 2048 // bytes of an entry
)

func newJournal(late bool) *journal {
	j := &journal{rec: fault.NewRecorder(), area: make([]byte, journalEntries*block.SectorSize), close: func() {}}
	through := func(lower block.Device) block.Device {
		a, earlier := fault.NewAsync(lower, 3, 1), j.close
		j.close = func() { a.Close(); earlier() }
		return a
	}
	if !late {
		through = nil
	}
	j.data = j.rec.NewDisk(fault.DiskConfig{Name: "data", Content: make([]byte, journalEntries*journalData),
		Limits: limits(), Through: through})
	j.records = j.rec.NewDisk(fault.DiskConfig{Name: "records", Content: slices.Clone(j.area), Limits: limits(),
		Through: through})
	return j
}

// commit is what is done for entry i.
type commit func(j *journal, i int) error

func (j *journal) writeData(i int) error {
	return block.Write(j.data, bytes.Repeat([]byte{byte(i + 1)}, journalData), int64(i)*journalData)
}

func (j *journal) writeRecord(i int, flags block.Flags) error {
	binary.LittleEndian.PutUint64(j.area[i*block.SectorSize:], uint64(i+1))
	return block.Do(j.records, block.OpWrite, flags, 0, int64(len(j.area)), j.area)
}

// check looks for an entry that is acknowledged but not there, or there without its data.
func (j *journal) check(images []*fault.Image, acknowledged int) error {
	data, records := images[0].Content(), images[1].Content()
	for i := range journalEntries {
		there := binary.LittleEndian.Uint64(records[i*block.SectorSize:]) != 0
		whole := bytes.Equal(data[i*journalData:][:journalData], bytes.Repeat([]byte{byte(i + 1)}, journalData))
		switch {
		case !there && i < acknowledged:
			return fmt.Errorf("entry %d is lost", i)
		case there && !whole:
			return fmt.Errorf("entry %d has no data", i)
		}
	}
	return nil
}

// run commits all entries and looks at the disks after a crash everywhere.
func (j *journal) run(t *testing.T, c commit) error {
	t.Helper()
	for i := range journalEntries {
		if err := c(j, i); err != nil {
			t.Fatal(err)
		}
		j.rec.Mark(i + 1)
	}
	j.close()
	acknowledged := 0
	r := rand.New(rand.NewPCG(7, 0))
	p := j.rec.Replay()
	for e, ok := p.Peek(); ok; e, ok = p.Peek() {
		p.Step()
		if n, is := e.Mark.(int); is {
			acknowledged = n
		}
		if err := j.check(p.Kill(), acknowledged); err != nil {
			return fmt.Errorf("killed: %w", err)
		}
		for range 20 {
			if err := j.check(p.PowerCut(r), acknowledged); err != nil {
				return fmt.Errorf("power cut: %w", err)
			}
		}
	}
	return nil
}

// TestJournal: a right protocol survives every crash, and each wrong one does not.
func TestJournal(t *testing.T) {
	tests := []struct {
		name string
		want string // part of what is found; "": nothing
		c    commit
	}{
		{"right", "", func(j *journal, i int) error {
			return errors.Join(j.writeData(i), block.Flush(j.data), j.writeRecord(i, block.FUA))
		}},
		{"a flush instead of FUA", "", func(j *journal, i int) error {
			return errors.Join(j.writeData(i), block.Flush(j.data), j.writeRecord(i, 0), block.Flush(j.records))
		}},
		{"no flush of the data", "power cut: entry 0 has no data", func(j *journal, i int) error {
			return errors.Join(j.writeData(i), j.writeRecord(i, block.FUA))
		}},
		{"flush of the other disk", "power cut: entry 0 has no data", func(j *journal, i int) error {
			return errors.Join(j.writeData(i), block.Flush(j.records), j.writeRecord(i, block.FUA))
		}},
		{"flush before the data", "power cut: entry 0 has no data", func(j *journal, i int) error {
			return errors.Join(block.Flush(j.data), j.writeData(i), j.writeRecord(i, block.FUA))
		}},
		{"no FUA", "power cut: entry 0 is lost", func(j *journal, i int) error {
			return errors.Join(j.writeData(i), block.Flush(j.data), j.writeRecord(i, 0))
		}},
		{"record before data", "killed: entry 0 has no data", func(j *journal, i int) error {
			return errors.Join(j.writeRecord(i, block.FUA), j.writeData(i), block.Flush(j.data))
		}},
		{"no data", "killed: entry 0 has no data", func(j *journal, i int) error {
			return j.writeRecord(i, block.FUA)
		}},
	}
	for _, test := range tests {
		for _, late := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, late=%v", test.name, late), func(t *testing.T) {
				err := newJournal(late).run(t, test.c)
				if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
					t.Errorf("got %v, want %q", err, test.want)
				}
			})
		}
	}
}

// TestFlushInFlight: a protocol whose flush is submitted together with the data is caught when requests overtake each
// other.
func TestFlushInFlight(t *testing.T) {
	err := newJournal(true).run(t, func(j *journal, i int) error {
		flush := start(j.data, block.OpFlush, 0)
		return errors.Join(j.writeData(i), <-flush.done, j.writeRecord(i, block.FUA))
	})
	if err == nil || !strings.Contains(err.Error(), "power cut") {
		t.Errorf("got %v", err)
	}
}
