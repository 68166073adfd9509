package clone

import (
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"iter"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"cowherd/block"
	"cowherd/kcopyd"
)

var seedFlag = flag.Uint64("seed", 0, "seed of the tests with random operations; 0: a new one each time, which is printed")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// seed is the seed that was asked for, or a new one, and is printed when the test fails.
func seed(t *testing.T) uint64 {
	s := *seedFlag
	if s == 0 {
		s = rand.Uint64()>>1 + 1
	}
	t.Logf("run again with -seed=%d", s)
	return s
}

const (
	kib = int64(1) << 10
	mib = int64(1) << 20
	// patience is how long a test waits for what must happen before it gives up.
	patience = 60 * time.Second
	// discarded is what discarded bytes read as: neither the old data nor zeroes.
	discarded = 0xDD
)

// ram is a device in plain memory that completes at once. Nothing in it is synchronised, so that the race detector
// proves that accesses to the same bytes are ordered.
type ram struct {
	data   []byte
	limits block.Limits
}

func newRAM(size int64) *ram {
	l := block.NoLimits()
	l.NeedsFlush = true
	return &ram{data: make([]byte, size), limits: l}
}

func (d *ram) Size() int64          { return int64(len(d.data)) }
func (d *ram) Limits() block.Limits { return d.limits }

func (d *ram) Submit(r *block.Request) {
	if err := block.CheckRange(r, d.Size(), d.limits); err != nil {
		r.Complete(err)
		return
	}
	switch r.Op {
	case block.OpRead:
		copy(r.Data, d.data[r.Offset:r.End()])
	case block.OpWrite:
		copy(d.data[r.Offset:r.End()], r.Data)
	case block.OpWriteZeroes:
		clear(d.data[r.Offset:r.End()])
	case block.OpDiscard:
		for i := range r.Length {
			d.data[r.Offset+i] = discarded
		}
	}
	r.Complete(nil)
}

// sparse is a ram that knows its holes, in units of a region's smallest size.
type sparse struct{ *ram }

const holeUnit = 4096

func (d sparse) Extents(offset, length int64, yield func(block.Extent) bool) error {
	for end := offset + length; offset < end; {
		next := min(end, (offset/holeUnit+1)*holeUnit)
		zero := len(bytes.Trim(d.data[offset:next], "\x00")) == 0
		if !yield(block.Extent{Offset: offset, Length: next - offset, Hole: zero, Zero: zero}) {
			return nil
		}
		offset = next
	}
	return nil
}

// fill makes sure that each 8 bytes tell where and when they were written.
func fill(p []byte, offset int64, stamp uint64) {
	var b [8]byte
	for i := range p {
		at := offset + int64(i)
		if i == 0 || at%8 == 0 {
			binary.LittleEndian.PutUint64(b[:], (uint64(at/8)+1)*0x9E3779B97F4A7C15^stamp<<1|1)
		}
		p[i] = b[at%8]
	}
}

// memory is a Metadata in memory: what was committed, and what was staged.
type memory struct {
	regionSize block.Sector
	targetSize block.Sector

	// What the next calls of these methods do.
	failSet    atomic.Bool
	failCommit atomic.Bool
	failAbort  atomic.Bool
	failLoad   atomic.Bool
	// Commit tells that it has begun, and waits; nil: it does not.
	begun chan chan struct{}

	mu        sync.Mutex
	committed map[uint64]uint64 // +checklocks:mu
	staged    map[uint64]uint64 // +checklocks:mu
	broken    bool              // +checklocks:mu
	commits   int               // +checklocks:mu
}

func newMemory(regionSize, size int64) *memory {
	return &memory{
		regionSize: block.SectorFloor(regionSize), targetSize: block.SectorFloor(size),
		committed: map[uint64]uint64{}, staged: map[uint64]uint64{},
	}
}

func (m *memory) RegionSize() block.Sector    { return m.regionSize }
func (m *memory) TargetSize() block.Sector    { return m.targetSize }
func (m *memory) Usage() (used, total uint64) { return 6, 1024 }

func (m *memory) LoadBits(yield func(uint64, []uint64) bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failLoad.Load() {
		return syscall.EIO
	}
	for n, v := range m.committed {
		if !yield(n, []uint64{v}) {
			break
		}
	}
	return nil
}

func (m *memory) SetWords(words iter.Seq2[uint64, uint64]) error {
	var numbers, values []uint64
	for n, v := range words {
		numbers, values = append(numbers, n), append(values, v)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if !slices.IsSorted(numbers) {
		return errors.New("the words are not in order")
	}
	if m.failSet.Load() || m.broken {
		m.broken = true
		return syscall.EIO
	}
	for i, n := range numbers {
		m.staged[n] = values[i]
	}
	return nil
}

func (m *memory) Commit() error {
	if m.begun != nil {
		goOn := make(chan struct{})
		m.begun <- goOn
		<-goOn
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failCommit.Load() || m.broken {
		m.broken = true
		return syscall.EIO
	}
	for n, v := range m.staged {
		m.committed[n] = v
	}
	clear(m.staged)
	m.commits++
	return nil
}

func (m *memory) Abort() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.staged)
	if m.failAbort.Load() {
		return syscall.EIO
	}
	m.broken = false
	return nil
}

// hydrated tells whether a region is hydrated durably.
func (m *memory) hydrated(region int64) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.committed[uint64(region/64)]>>(region%64)&1 != 0
}

// call is a request in flight.
type call struct {
	r    block.Request
	done chan error
}

func (c *call) Complete(_ *block.Request, err error) { c.done <- err }

// start submits a request.
func start(d block.Device, op block.Op, flags block.Flags, queue int, offset, length int64, data []byte) *call {
	c := &call{done: make(chan error, 1)}
	c.r = block.Request{Op: op, Flags: flags, Queue: block.Queue(queue), Offset: offset, Length: length, Data: data}
	c.r.Push(c)
	d.Submit(&c.r)
	return c
}

func (c *call) wait(t testing.TB) error {
	t.Helper()
	select {
	case err := <-c.done:
		return err
	case <-time.After(patience):
		t.Fatal("a request was lost")
		return nil
	}
}

func (c *call) pending(t *testing.T, what string) {
	t.Helper()
	select {
	case err := <-c.done:
		t.Fatalf("%s: the request is over (%v)", what, err)
	default:
	}
}

// want fails the test unless errors.Is(err, want).
func want(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) || want == nil && err != nil {
		t.Fatalf("%s: got %v, want %v", what, err, want)
	}
}

// engines are the copy engines by their names.
var engineNames = []string{"scaled", "serialised"}

func newEngine(name string) kcopyd.Engine {
	if name == "serialised" {
		return kcopyd.NewSerialised(kcopyd.Config{})
	}
	return kcopyd.NewScaled(kcopyd.Config{})
}

// closing closes something at the end of the test.
func closing(t testing.TB, what interface{ Close() error }) {
	t.Cleanup(func() {
		if err := what.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
}

// view is a target as a device, without a gate.
type view struct{ c *Clone }

func (v view) Size() int64          { return v.c.Size() }
func (v view) Limits() block.Limits { return v.c.Limits() }
func (v view) Submit(r *block.Request) {
	if err := block.CheckRange(r, v.c.Size(), v.c.Limits()); err != nil {
		r.Complete(err)
		return
	}
	if r.Op <= block.OpWrite && v.c.Passes(r) { // as a mapped device has it
		below, _ := v.c.Passage()
		below.Submit(r)
		return
	}
	if d := v.c.Map(r); d != nil {
		d.Submit(r)
	}
}

// events are what a clone has told.
type events struct{ c chan Event }

func newEvents() events { return events{make(chan Event, 100)} }

func (e events) tell(x Event) { e.c <- x }

func (e events) wait(t *testing.T, kind EventKind) Event {
	t.Helper()
	for {
		select {
		case x := <-e.c:
			if x.Kind == kind {
				return x
			}
		case <-time.After(patience):
			t.Fatalf("event %d did not come", kind)
		}
	}
}
