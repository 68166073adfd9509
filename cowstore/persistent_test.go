package cowstore

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"

	"cowherd/backend/mem"
	"cowherd/block"
	"cowherd/internal/fault"
)

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

// opened is a store that has been loaded, with what the table held.
type opened struct {
	*Persistent
	records map[Chunk]Chunk
}

func open(t testing.TB, d block.Device, c PersistentConfig) opened {
	t.Helper()
	p, err := OpenPersistent(d, c)
	if err != nil {
		t.Fatal(err)
	}
	return load(t, p)
}

func create(t testing.TB, d block.Device, chunk ChunkSize) opened {
	t.Helper()
	p, err := CreatePersistent(d, chunk, PersistentConfig{})
	if err != nil {
		t.Fatal(err)
	}
	return load(t, p)
}

func load(t testing.TB, p *Persistent) opened {
	t.Helper()
	o := opened{p, map[Chunk]Chunk{}}
	if err := p.Load(0, o.insert); err != nil {
		t.Fatal(err)
	}
	return o
}

func (o opened) insert(r Record) bool {
	_, doubled := o.records[r.Old]
	o.records[r.Old] = r.New
	return !doubled
}

// commitNow allocates chunks for the old ones from old on, commits them, and waits.
func (o opened) commitNow(t testing.TB, old Chunk, count int) {
	t.Helper()
	for count > 0 {
		first, n, err := o.Allocate(0, count)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		o.Commit(&Commit{Old: old, New: first, Count: n, Done: func(c *Commit) { done <- c.Err }})
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		for i := range Chunk(n) {
			o.records[old+i] = first + i
		}
		old, count = old+Chunk(n), count-n
	}
}

func wantRecords(t testing.TB, got, want map[Chunk]Chunk) {
	t.Helper()
	if !maps.Equal(got, want) {
		t.Fatalf("%d records, want %d", len(got), len(want))
	}
}

func TestPersistentReopens(t *testing.T) {
	for _, chunk := range []ChunkSize{4 << 10, 16 << 10, 64 << 10, 256 << 10} {
		t.Run(fmt.Sprint(int64(chunk)), func(t *testing.T) {
			d := newMem(t, 3000*int64(chunk))
			o := create(t, d, chunk)
			old := Chunk(0)
			for round := range 9 {
				for i := range 30 {
					o.commitNow(t, old, 1+i%13)
					old += 20
				}
				o.Wait()
				allocated, total, metadata := o.Usage()
				again := open(t, d, PersistentConfig{ReadOnly: round%2 == 0})
				wantRecords(t, again.records, o.records)
				if a, b, c := again.Usage(); a != allocated || b != total || c != metadata {
					t.Fatalf("round %d: usage %d/%d %d after opening, was %d/%d %d", round, a, b, c, allocated, total, metadata)
				}
				if round%2 == 1 {
					o = again
				}
			}
		})
	}
}

// TestPersistentUsage holds the numbers of the kernel's status line (reference: a fresh store shows 32/... 32 at chunks
// of 16 sectors).
func TestPersistentUsage(t *testing.T) {
	o := create(t, newMem(t, 2000*4096), 4096)
	want := func(allocated, metadata block.Sector) {
		t.Helper()
		if a, total, m := o.Usage(); a != allocated || total != 16000 || m != metadata {
			t.Errorf("usage %d/%d %d, want %d/16000 %d", a, total, m, allocated, metadata)
		}
	}
	want(16, 16)
	o.commitNow(t, 0, 1)
	want(24, 16)
	o.commitNow(t, 1, 254)
	want(8*(2+255), 16)
	o.commitNow(t, 255, 1)
	want(8*(2+256+1), 24)
	o.commitNow(t, 256, 1)
	want(8*(2+257+1), 24)
}

// TestPersistentFull: the chunks of a device, and which of them remain of no use.
func TestPersistentFull(t *testing.T) {
	for chunks, want := range map[int64]int{3: 1, 257: 255, 258: 255, 259: 256, 260: 257, 514: 511, 515: 511, 516: 512} {
		d := newMem(t, chunks*4096)
		o := create(t, d, 4096)
		got := 0
		for {
			first, n, err := o.Allocate(0, 1)
			if err != nil {
				if !errors.Is(err, syscall.ENOSPC) {
					t.Fatal(err)
				}
				break
			}
			done := make(chan error, 1)
			o.Commit(&Commit{Old: Chunk(got), New: first, Count: n, Done: func(c *Commit) { done <- c.Err }})
			if err := <-done; err != nil {
				t.Fatalf("%d chunks: record %d: %v", chunks, got, err)
			}
			o.records[Chunk(got)] = first
			got++
		}
		if got != want {
			t.Errorf("%d chunks: %d exceptions, want %d", chunks, got, want)
		}
		o.Wait()
		wantRecords(t, open(t, d, PersistentConfig{}).records, o.records)
	}
}

// TestPersistentConcurrent commits from many goroutines over a device whose completions come late and out of order.
func TestPersistentConcurrent(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4))
	for _, chunk := range []ChunkSize{4 << 10, 64 << 10} {
		d := newMem(t, 20000*int64(chunk))
		async := fault.NewAsync(d, 3, uint64(chunk))
		o := create(t, async, chunk)
		var all, commits sync.WaitGroup
		var mu sync.Mutex
		for worker := range Chunk(6) {
			all.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(worker), uint64(chunk)))
				for i := range Chunk(150) {
					first, n, err := o.Allocate(block.Queue(worker), 1+rnd.IntN(20))
					if err != nil {
						t.Error(err)
						return
					}
					old := worker<<20 + i*32
					commits.Add(1)
					o.Commit(&Commit{Old: old, New: first, Count: n, Done: func(c *Commit) {
						if c.Err != nil {
							t.Error(c.Err)
						}
						mu.Lock()
						for k := range Chunk(c.Count) {
							o.records[c.Old+k] = c.New + k
						}
						mu.Unlock()
						commits.Done()
					}})
					if rnd.IntN(4) == 0 {
						runtime.Gosched()
					}
				}
			})
		}
		all.Wait()
		commits.Wait()
		o.Wait()
		async.Close()
		wantRecords(t, open(t, d, PersistentConfig{}).records, o.records)
	}
}

// TestPersistentGaps: chunks that were given out but never committed are free when the store is opened again.
func TestPersistentGaps(t *testing.T) {
	d := newMem(t, 1000*4096)
	o := create(t, d, 4096)
	rnd := rand.New(rand.NewPCG(1, 2))
	free := map[Chunk]bool{}
	for old := Chunk(0); old < 600; old++ {
		if rnd.IntN(3) > 0 {
			first, _, err := o.Allocate(0, 1)
			if err != nil {
				t.Fatal(err)
			}
			free[first] = true
		} else {
			o.commitNow(t, old, 1)
		}
	}
	o.commitNow(t, 999, 1)
	o.Wait()
	again := open(t, d, PersistentConfig{})
	wantRecords(t, again.records, o.records)
	before, _, _ := again.Usage()
	lowest := slices.Sorted(maps.Keys(free))
	for len(lowest) > 0 {
		first, n, err := again.Allocate(0, 3)
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			if lowest[i] != first+Chunk(i) {
				t.Fatalf("chunk %d was given out, the lowest free one is %d", first+Chunk(i), lowest[i])
			}
		}
		lowest = lowest[n:]
	}
	if after, _, _ := again.Usage(); after != before {
		t.Errorf("gaps were in use: %d sectors allocated before, %d now", before, after)
	}
	first, _, err := again.Allocate(0, 1)
	if err != nil || again.layout.skipMetadata(first) != first || block.SectorFloor(int64(first)*4096) != before {
		t.Errorf("behind the gaps: chunk %d, %v", first, err)
	}
}

// TestLeftoversAreErased: what a torn write has left behind the end of the table does not come to life.
func TestLeftoversAreErased(t *testing.T) {
	for _, chunk := range []ChunkSize{4 << 10, 64 << 10, 128 << 10} {
		d := newMem(t, 9000*int64(chunk))
		o := create(t, d, chunk)
		o.commitNow(t, 0, 10)
		o.Wait()
		for _, place := range []int64{o.layout.place(0, 11), o.layout.place(0, o.layout.AreaRecords()-1), o.layout.place(1, 0), o.layout.place(1, 5)} {
			poke(t, d, place, Record{Old: 77, New: 99})
		}
		look := open(t, d, PersistentConfig{ReadOnly: true})
		wantRecords(t, look.records, o.records)
		again := open(t, d, PersistentConfig{})
		wantRecords(t, again.records, o.records)
		again.commitNow(t, 100, again.layout.AreaRecords()+3)
		again.Wait()
		wantRecords(t, open(t, d, PersistentConfig{}).records, again.records)
	}
}

// poke puts a record on a device.
func poke(t *testing.T, d block.Device, place int64, r Record) {
	t.Helper()
	sector := make([]byte, block.SectorSize)
	start := place / block.SectorSize * block.SectorSize
	if err := block.Read(d, sector, start); err != nil {
		t.Fatal(err)
	}
	r.put(sector[place-start:], 0)
	if err := block.Write(d, sector, start); err != nil {
		t.Fatal(err)
	}
}

func TestPersistentErrors(t *testing.T) {
	d := newMem(t, 100*4096)
	if _, err := OpenPersistent(d, PersistentConfig{}); !errors.Is(err, ErrNoStore) {
		t.Errorf("an empty device: %v", err)
	}
	for _, size := range []ChunkSize{2048, 5000, 64 << 10, 1 << 31} {
		if _, err := CreatePersistent(d, size, PersistentConfig{}); !errors.Is(err, syscall.EINVAL) && size != 64<<10 {
			t.Errorf("chunks of %d: %v", size, err)
		}
	}
	if _, err := CreatePersistent(newMem(t, 2*4096), 4096, PersistentConfig{}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("two chunks: %v", err)
	}
	corrupt := func(what string, change func(p []byte)) {
		t.Helper()
		o := create(t, d, 4096)
		o.commitNow(t, 0, 3)
		o.Wait()
		p := make([]byte, 8192)
		if err := block.Read(d, p, 0); err != nil {
			t.Fatal(err)
		}
		change(p)
		if err := block.Write(d, p, 0); err != nil {
			t.Fatal(err)
		}
		p2, err := OpenPersistent(d, PersistentConfig{})
		if err == nil {
			err = p2.Load(50, opened{p2, map[Chunk]Chunk{}}.insert)
		}
		if _, ok := errors.AsType[*CorruptError](err); !ok || !errors.Is(err, syscall.EUCLEAN) {
			t.Errorf("%s: %v", what, err)
		}
	}
	corrupt("magic", func(p []byte) { p[0]++ })
	corrupt("version", func(p []byte) { p[8]++ })
	corrupt("chunk size", func(p []byte) { p[12] = 9 })
	corrupt("chunk size 0", func(p []byte) { p[12] = 0 })
	corrupt("new chunk behind the end", func(p []byte) { Record{5, 100}.put(p[4096:], 1) })
	corrupt("new chunk is an area", func(p []byte) { Record{5, 1}.put(p[4096:], 1) })
	corrupt("new chunk twice", func(p []byte) { Record{5, 2}.put(p[4096:], 1) })
	corrupt("old chunk twice", func(p []byte) { Record{0, 50}.put(p[4096:], 2) })
	corrupt("old chunk behind the end", func(p []byte) { Record{50, 50}.put(p[4096:], 2) })
}

// TestPersistentFails: after an error of the device no record is written any more, and every commit is told.
func TestPersistentFails(t *testing.T) {
	for _, op := range []block.Op{block.OpWrite, block.OpFlush} {
		m := newMem(t, 1000*4096)
		d := fault.New(m)
		d.Fail(nil)
		o := create(t, needsFlush{d}, 4096)
		o.commitNow(t, 0, 10)
		broken := errors.New("broken")
		d.Fail(func(r *block.Request) error {
			if r.Op == op {
				return broken
			}
			return nil
		})
		commit := func() error {
			first, n, err := o.Allocate(0, 1)
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			o.Commit(&Commit{Old: 100, New: first, Count: n, Done: func(c *Commit) { done <- c.Err }})
			return <-done
		}
		if err := commit(); !errors.Is(err, broken) {
			t.Errorf("%v fails: %v", op, err)
		}
		d.Fail(nil)
		if err := commit(); !errors.Is(err, broken) {
			t.Errorf("after %v failed: %v", op, err)
		}
		if err := o.Invalidate(); err != nil {
			t.Error(err)
		}
		o.Wait()
		if again := open(t, m, PersistentConfig{ReadOnly: true}); again.Valid() {
			t.Error("the store is still valid")
		}
	}
}

// needsFlush is a device that may lose what was not flushed.
type needsFlush struct{ block.Device }

func (d needsFlush) Limits() block.Limits {
	l := d.Device.Limits()
	l.NeedsFlush = true
	return l
}

func TestInvalidate(t *testing.T) {
	d := newMem(t, 100*4096)
	o := create(t, d, 4096)
	o.commitNow(t, 3, 4)
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			if err := o.Invalidate(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	again := open(t, d, PersistentConfig{})
	if again.Valid() || o.ChunkSize() != again.ChunkSize() {
		t.Errorf("valid %v, chunks of %d", again.Valid(), again.ChunkSize())
	}
	look, err := OpenPersistent(d, PersistentConfig{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := look.Invalidate(); !errors.Is(err, syscall.EROFS) {
		t.Errorf("a store that is open for reading only: %v", err)
	}
}

// TestEraseTakesTheTableBack compares with the list of records, over several areas.
func TestEraseTakesTheTableBack(t *testing.T) {
	for _, chunk := range []ChunkSize{4 << 10, 16 << 10, 128 << 10} {
		d := newMem(t, 12000*int64(chunk))
		o := create(t, d, chunk)
		var list []Record
		count := 2*o.layout.AreaRecords() + 100
		if chunk > 64<<10 {
			count = o.layout.AreaRecords() + 100
		}
		for old := Chunk(0); len(list) < count; {
			o.commitNow(t, old, 7)
			for i := range Chunk(7) {
				list = append(list, Record{old + i, o.records[old+i]})
			}
			old += 10
		}
		o.Wait()
		rnd := rand.New(rand.NewPCG(5, uint64(chunk)))
		buffer := make([]Record, 300)
		for round := 0; ; round++ {
			n, err := o.Last(buffer[:1+rnd.IntN(len(buffer))])
			if err != nil {
				t.Fatal(err)
			}
			if n == 0 {
				break
			}
			for i := range n {
				if want := list[len(list)-1-i]; buffer[i] != want {
					t.Fatalf("record %d from the end: %v, want %v", i, buffer[i], want)
				}
			}
			erased := 1 + rnd.IntN(n)
			if err := o.Erase(erased); err != nil {
				t.Fatal(err)
			}
			list = list[:len(list)-erased]
			if round%16 == 0 {
				again := open(t, d, PersistentConfig{ReadOnly: round%32 == 0})
				if len(again.records) != len(list) {
					t.Fatalf("%d records are left, want %d", len(again.records), len(list))
				}
				if round%32 == 16 {
					o = again
				}
			}
		}
		if len(list) != 0 {
			t.Fatalf("%d records were never told", len(list))
		}
		if a, _, m := o.Usage(); a != m {
			t.Errorf("an empty table: %d allocated, %d metadata", a, m)
		}
	}
}

func TestCommitDoesNotAllocate(t *testing.T) {
	o := create(t, newMem(t, 1<<32), 4096)
	done := make(chan struct{}, 1)
	c := &Commit{Done: func(*Commit) { done <- struct{}{} }}
	old := Chunk(0)
	if n := testing.AllocsPerRun(500, func() {
		first, count, err := o.Allocate(0, 1)
		if err != nil {
			t.Fatal(err)
		}
		c.Old, c.New, c.Count = old, first, count
		old++
		o.Commit(c)
		<-done
	}); n >= 1 {
		t.Errorf("%v allocations for each commit", n)
	}
}

func TestWarning(t *testing.T) {
	var told []int
	o := create(t, newMem(t, 100*4096), 4096)
	o.Warn([]int{90, 50, 20, 1}, func(percent int) { told = append(told, percent) })
	for range 97 {
		if _, _, err := o.Allocate(0, 1); err != nil {
			t.Fatal(err)
		}
	}
	if want := []int{1, 20, 50, 90}; !slices.Equal(told, want) {
		t.Errorf("told %v, want %v", told, want)
	}
}

// TestTransientResize: all of the new room is given out, and none twice.
func TestTransientResize(t *testing.T) {
	for _, before := range []int{0, 1, 100, 128, 129, 700} {
		for _, after := range []int{before + 1, before + 50, before + 1000} {
			s := NewTransient(int64(before)*4096, 0, 4096)
			seen := map[Chunk]bool{}
			take := func(total int) {
				t.Helper()
				for {
					first, n, err := s.Allocate(block.Queue(len(seen)), 3)
					if err != nil {
						break
					}
					for i := range Chunk(n) {
						if seen[first+i] || int(first+i) >= total {
							t.Fatalf("%d to %d: chunk %d", before, after, first+i)
						}
						seen[first+i] = true
					}
				}
				if len(seen) != total {
					t.Fatalf("%d to %d: %d chunks given out of %d", before, after, len(seen), total)
				}
			}
			take(before)
			if err := s.Resize(int64(before) * 4096); !errors.Is(err, syscall.EINVAL) {
				t.Errorf("the same size: %v", err)
			}
			if err := s.Resize(int64(after) * 4096); err != nil {
				t.Fatal(err)
			}
			take(after)
		}
	}
}
