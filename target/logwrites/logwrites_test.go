package logwrites

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"cowherd/backend/mem"
	"cowherd/block"
	"cowherd/internal/fault"
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

func newMem(t *testing.T, size int64) *mem.Device {
	d, err := mem.New(mem.Config{Size: size})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func newTarget(t *testing.T, device, log block.Device) over {
	x, err := New(target.Lower{Device: device, Name: target.Name("d")}, target.Lower{Device: log, Name: target.Name("l")},
		device.Size())
	if err != nil {
		t.Fatal(err)
	}
	return over{x}
}

// logged is an entry of a log, read by what its format is documented to be.
type logged struct {
	sector, sectors, flags uint64
	text                   string
	data                   []byte
}

func (e logged) String() string {
	return fmt.Sprintf("%d+%d flags %d %q", e.sector, e.sectors, e.flags, e.text)
}

// readLog reads a log of sectors of 512 bytes.
func readLog(t *testing.T, log block.Device) []logged {
	t.Helper()
	p := make([]byte, log.Size())
	if err := block.Read(log, p, 0); err != nil {
		t.Fatal(err)
	}
	u64 := func(at int) uint64 { return binary.LittleEndian.Uint64(p[at:]) }
	if string(p[:7]) != "rhswfsj" {
		t.Fatalf("magic %x", p[:8])
	}
	if u64(8) != 1 || binary.LittleEndian.Uint32(p[24:]) != 512 {
		t.Fatalf("super %x", p[:28])
	}
	var all []logged
	for at := 512; len(all) < int(u64(16)); {
		e := logged{sector: u64(at), sectors: u64(at + 8), flags: u64(at + 16)}
		e.text = string(p[at+32:][:u64(at+24)])
		at += 512
		if e.flags&flagDiscard == 0 {
			e.data = p[at:][:e.sectors*512]
			at += len(e.data)
		}
		all = append(all, e)
	}
	return all
}

func sectorOf(b byte) []byte { return bytes.Repeat([]byte{b}, 512) }

// TestOrder: what is logged when.
func TestOrder(t *testing.T) {
	device, log := fault.New(newMem(t, 1<<16)), newMem(t, 1<<16)
	x := newTarget(t, device, log)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(block.Write(x, sectorOf(1), 512))
	must(block.Write(x, append(sectorOf(2), sectorOf(3)...), 1024))
	_, err := x.Message([]string{"mark", "first"})
	must(err)
	must(block.Do(x, block.OpWrite, block.FUA, 2048, 512, sectorOf(4)))
	device.Hold(func(r *block.Request) bool { return r.Op == block.OpFlush })
	flushed := make(chan error)
	go func() { flushed <- block.Flush(x) }()
	for device.Seen(block.OpFlush) == 0 { // until it has taken along what was done
		must(block.Read(x, make([]byte, 512), 0))
	}
	must(block.Write(x, sectorOf(5), 0)) // which the flush need not cover
	device.Release()
	must(<-flushed)
	must(block.Do(x, block.OpDiscard, 0, 4096, 4096, nil))
	must(x.Close())
	var got []string
	for _, e := range readLog(t, log) {
		got = append(got, e.String())
		if len(e.data) > 0 && e.data[0] == 0 {
			t.Errorf("%v has no data", e)
		}
	}
	want := []string{
		`0+0 flags 8 "first"`, `4+1 flags 2 ""`, `1+1 flags 0 ""`, `2+2 flags 0 ""`, `0+0 flags 1 ""`, `0+1 flags 0 ""`,
		`8+8 flags 4 ""`, `0+0 flags 8 "dm-log-writes-end"`,
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if got := x.StatusLine(); got != "8 13" {
		t.Errorf("status %q", got)
	}
}

// TestFailedFlush: what a flush that failed took along is there for the next one.
func TestFailedFlush(t *testing.T) {
	device, log := fault.New(newMem(t, 1<<16)), newMem(t, 1<<16)
	x := newTarget(t, device, log)
	if err := block.Write(x, sectorOf(1), 0); err != nil {
		t.Fatal(err)
	}
	failed := false
	device.Fail(func(r *block.Request) error {
		if r.Op == block.OpFlush && !failed {
			failed = true
			return syscall.EIO
		}
		return nil
	})
	if err := block.Flush(x); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	if err := block.Flush(x); err != nil {
		t.Fatal(err)
	}
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	if got := readLog(t, log); len(got) != 3 || got[0].flags != 0 || got[1].flags != flagFlush {
		t.Errorf("got %v", got)
	}
}

// TestWaitMax: no more waits than may, whatever becomes of the flushes.
func TestWaitMax(t *testing.T) {
	device, log := fault.New(newMem(t, 1<<20)), newMem(t, 4<<20)
	x := newTarget(t, device, log)
	x.waitMax = 16 << 10
	waiting := func() (n, counted int64) {
		x.mu.Lock()
		defer x.mu.Unlock()
		for _, f := range append(x.flushes, &entry{covered: x.unflushed}) {
			for _, e := range f.covered {
				n += int64(len(e.contents))
			}
		}
		return n, x.waiting
	}
	device.Fail(func(r *block.Request) error {
		if r.Op == block.OpFlush {
			return syscall.EIO
		}
		return nil
	})
	writes := 0
	for i := range int64(200) {
		var flags block.Flags
		if i%7 == 0 {
			flags = block.FUA
		}
		if err := block.Do(x, block.OpWrite, flags, i*512, 512, sectorOf(1)); err != nil {
			t.Fatal(err)
		}
		if writes++; i%10 == 0 {
			if err := block.Flush(x); !errors.Is(err, syscall.EIO) {
				t.Fatal(err)
			}
		}
		if n, counted := waiting(); n > x.waitMax || n != counted {
			t.Fatalf("%d bytes wait, %d are counted, %d may", n, counted, x.waitMax)
		}
	}
	device.Fail(nil)
	device.Hold(func(r *block.Request) bool { return r.Op == block.OpFlush })
	flushes := make(chan error)
	for i := range int64(3) { // each takes along what may wait, but for a little
		for k := range int64(15) {
			if err := block.Write(x, sectorOf(2), (i*15+k)*512); err != nil {
				t.Fatal(err)
			}
			writes++
		}
		go func() { flushes <- block.Flush(x) }()
		device.WaitHeld(int(i) + 1)
		if n, counted := waiting(); n > x.waitMax || n != counted {
			t.Fatalf("%d bytes wait with flushes in flight, %d are counted, %d may", n, counted, x.waitMax)
		}
	}
	device.Release()
	for range 3 {
		if err := <-flushes; err != nil {
			t.Error(err)
		}
	}
	if n, counted := waiting(); n != 0 || counted != 0 {
		t.Errorf("%d bytes wait behind a flush, %d are counted", n, counted)
	}
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	logged := 0
	for _, e := range readLog(t, log) {
		if len(e.data) > 0 {
			logged++
		}
	}
	if logged != writes {
		t.Errorf("%d of %d writes are in the log", logged, writes)
	}
}

// TestFull: when the log is full the device goes on, and the status says it.
func TestFull(t *testing.T) {
	device, log := newMem(t, 1<<16), newMem(t, 4096)
	x := newTarget(t, device, log)
	for range 10 {
		if err := block.Do(x, block.OpWrite, block.FUA, 0, 512, sectorOf(1)); err != nil {
			t.Fatal(err)
		}
	}
	x.writing.Wait()
	if got := x.StatusLine(); !strings.HasSuffix(got, " logging_disabled") {
		t.Errorf("status %q", got)
	}
	if _, err := x.Message([]string{"mark", "x"}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a mark in a full log: %v", err)
	}
	if err := x.Close(); err != nil {
		t.Error(err)
	}
	if n := len(readLog(t, log)); n != 2 {
		t.Errorf("%d entries in a log with room for 2", n)
	}
}

func TestMessages(t *testing.T) {
	x := newTarget(t, newMem(t, 1<<16), newMem(t, 1<<16))
	for _, words := range [][]string{{"hi"}, {"hi", "there"}, {"mark"}, {"mark", "a", "b"}} {
		if _, err := x.Message(words); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%q: %v", words, err)
		}
	}
	if _, err := x.Message([]string{"MARK", strings.Repeat("x", 1000)}); err != nil {
		t.Error(err)
	}
	if err := x.Close(); err != nil {
		t.Error(err)
	}
}

// TestReplay: many writers; the log, replayed to its end, gives what the device holds, and up to any flush nothing that
// was not written by then.
func TestReplay(t *testing.T) {
	const size = 1 << 18
	device, log := newMem(t, size), newMem(t, 64<<20)
	x := newTarget(t, device, log)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var writers sync.WaitGroup
	for w := range int64(4) {
		writers.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(w)))
			for range 300 {
				var flags block.Flags
				if rnd.IntN(10) == 0 {
					flags = block.FUA
				}
				length := (1 + rnd.Int64N(8)) * 512
				offset := w*size/4 + rnd.Int64N(size/4/512-8)*512
				data := bytes.Repeat([]byte{byte(rnd.Uint32())}, int(length))
				if err := block.Do(x, block.OpWrite, flags, offset, length, data); err != nil {
					t.Error(err)
				}
				if rnd.IntN(20) == 0 {
					if err := block.Flush(x); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	writers.Wait()
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	replayed, got := make([]byte, size), make([]byte, size)
	writes := 0
	for _, e := range readLog(t, log) {
		copy(replayed[e.sector*512:], e.data)
		if len(e.data) > 0 {
			writes++
		}
	}
	if err := block.Read(device, got, 0); err != nil {
		t.Fatal(err)
	}
	if writes != 1200 || !bytes.Equal(got, replayed) {
		t.Errorf("%d writes, equal: %v", writes, bytes.Equal(got, replayed))
	}
}
