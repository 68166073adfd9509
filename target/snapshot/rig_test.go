package snapshot

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/dm"
	"cowherd/internal/fault"
	"cowherd/internal/invariant"
	"cowherd/kcopyd"
)

var seedFlag = flag.Uint64("seed", 0, "seed of the tests with random operations; 0: a new one each time, which is printed")

func TestMain(m *testing.M) {
	flag.Parse()
	// What rapid is not told on the command line: how many checks for each configuration, and to leave no files.
	rapid := map[string]string{"rapid.checks": "8", "rapid.nofailfile": "true"}
	if invariant.Enabled {
		rapid["rapid.checks"] = "3"
	}
	flag.Visit(func(f *flag.Flag) { delete(rapid, f.Name) })
	for name, value := range rapid {
		if err := flag.Set(name, value); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
	}
	goleak.VerifyTestMain(m)
}

// seed is the seed that was asked for, or a new one, and is printed when the test fails.
func seed(t *testing.T) uint64 {
	s := *seedFlag
	if s == 0 {
		s = rand.Uint64()>>1 + 1
	}
	t.Logf("run again with -seed=%d", s)
	return s
}

// patience is how long a test waits for what must happen before it gives up.
const patience = 60 * time.Second

const (
	unit     = 512  // the granularity of holes on a RAM device
	discards = 0xDD // what discarded bytes read as: neither the old data nor zeroes
)

// ram is a device in plain memory that completes at once. Nothing in it is synchronised, so that the race detector
// proves that accesses to the same bytes are ordered; unless it is told to lock, for tests in which they need not be.
type ram struct {
	data   []byte
	limits block.Limits
	lock   sync.Locker
}

// unlocked is the lock of a ram that has none.
type unlocked struct{}

func (unlocked) Lock()   {}
func (unlocked) Unlock() {}

func newRAM(size int64) *ram {
	return &ram{data: make([]byte, size), lock: unlocked{}, limits: block.Limits{
		LogicalBlock: 1, PreferredIO: 4096, DiscardMax: math.MaxInt64, DiscardGranularity: 1,
		WriteZeroesMax: math.MaxInt64, NeedsFlush: true,
	}}
}

func (d *ram) Size() int64          { return int64(len(d.data)) }
func (d *ram) Limits() block.Limits { return d.limits }

func (d *ram) Submit(r *block.Request) {
	if err := block.CheckRange(r, d.Size(), d.limits); err != nil {
		panic("a request that does not fit the device: " + err.Error())
	}
	d.lock.Lock()
	d.access(r)
	d.lock.Unlock()
	r.Complete(nil)
}

func (d *ram) access(r *block.Request) {
	if r.Op == block.OpFlush {
		return
	}
	place := d.data[r.Offset:r.End()]
	switch r.Op {
	case block.OpRead:
		copy(r.Data, place)
	case block.OpWrite:
		copy(place, r.Data)
	case block.OpWriteZeroes:
		clear(place)
	case block.OpDiscard:
		fill(place, discards)
	}
}

func fill(p []byte, b byte) {
	if len(p) == 0 {
		return
	}
	p[0] = b
	for n := 1; n < len(p); n *= 2 {
		copy(p[n:], p[:n])
	}
}

// sparseRAM is a ram that knows its holes.
type sparseRAM struct {
	ram
	hole []bool // by unit
}

func newSparseRAM(size int64) *sparseRAM {
	d := &sparseRAM{ram: *newRAM(size), hole: make([]bool, (size+unit-1)/unit)}
	for i := range d.hole {
		d.hole[i] = true
	}
	return d
}

func (d *sparseRAM) Submit(r *block.Request) {
	d.lock.Lock()
	d.mark(r)
	d.lock.Unlock()
	d.ram.Submit(r)
}

// mark notes what r does to the holes.
func (d *sparseRAM) mark(r *block.Request) {
	if !r.Op.Writes() {
		return
	}
	for i := r.Offset / unit; i*unit < r.End(); i++ {
		whole := r.Offset <= i*unit && r.End() >= min((i+1)*unit, d.Size())
		switch {
		case r.Op != block.OpWriteZeroes:
			d.hole[i] = false
		case whole && r.Flags&block.NoUnmap == 0:
			d.hole[i] = true
		}
	}
}

func (d *sparseRAM) Extents(offset, length int64, yield func(block.Extent) bool) error {
	d.lock.Lock()
	defer d.lock.Unlock()
	for end := offset + length; offset < end; {
		hole, next := d.hole[offset/unit], offset
		for next < end && d.hole[next/unit] == hole {
			next = min((next/unit+1)*unit, end)
		}
		if !yield(block.Extent{Offset: offset, Length: next - offset, Hole: hole, Zero: hole}) {
			return nil
		}
		offset = next
	}
	return nil
}

// withExtents is a device whose extents another one knows.
type withExtents struct {
	block.Device
	block.ExtentLister
}

// call is a request and its result.
type call struct {
	r    block.Request
	done chan error
}

func (c *call) Complete(_ *block.Request, err error) { c.done <- err }

func newCall(op block.Op, queue block.Queue, offset, length int64, data []byte) *call {
	c := &call{done: make(chan error, 1)}
	c.r = block.Request{Op: op, Queue: queue, Offset: offset, Length: length, Data: data}
	c.r.Push(c)
	return c
}

// start submits an operation with data, or with a length alone.
func start(d block.Device, op block.Op, queue block.Queue, offset int64, data []byte) *call {
	c := newCall(op, queue, offset, int64(len(data)), data)
	d.Submit(&c.r)
	return c
}

func startRange(d block.Device, op block.Op, offset, length int64) *call {
	c := newCall(op, 0, offset, length, nil)
	d.Submit(&c.r)
	return c
}

// over tells whether the request has completed.
func (c *call) over() bool { return len(c.done) > 0 }

// pending fails the test if the request has completed.
func (c *call) pending(t *testing.T, what string) {
	t.Helper()
	if c.over() {
		t.Fatalf("%s: it is over (%v)", what, <-c.done)
	}
}

// want waits for the request and fails the test if its result is not an error like want.
func (c *call) want(t *testing.T, want error) {
	t.Helper()
	select {
	case err := <-c.done:
		if !errors.Is(err, want) || want == nil && err != nil {
			t.Fatalf("%v at %d: got %v, want %v", c.r.Op, c.r.Offset, err, want)
		}
	case <-time.After(patience):
		t.Fatalf("%v at %d: lost", c.r.Op, c.r.Offset)
	}
}

// wantData waits for a read and compares what it got.
func (c *call) wantData(t *testing.T, want []byte) {
	t.Helper()
	c.want(t, nil)
	same(t, c.r.Data, want)
}

// same fails the test at the first difference.
func same(t testing.TB, got, want []byte) {
	t.Helper()
	if at := differs(got, want); at >= 0 {
		t.Fatalf("byte %d of %d: got %#x, want %#x", at, len(want), got[at], want[at])
	}
}

// differs is the index of the first difference, or -1.
func differs(got, want []byte) int {
	if bytes.Equal(got, want) {
		return -1
	}
	for i := range got {
		if got[i] != want[i] {
			return i
		}
	}
	return len(got)
}

// fataler is what helpers need of testing.T or rapid.T.
type fataler interface {
	Helper()
	Fatalf(format string, args ...any)
}

// eventually waits until what other goroutines do makes cond true.
func eventually(t fataler, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for n := 0; !cond(); n++ {
		if time.Now().After(deadline) {
			t.Fatalf("it never happened: %s", what)
		}
		if n < 1000 {
			runtime.Gosched()
		} else {
			time.Sleep(50 * time.Microsecond) // so as not to take a CPU from those it waits for
		}
	}
}

// pattern is n bytes that are different for each stamp, and different everywhere.
//
// The race detector does not look: it would take as long for eight bytes as for a page, and nobody else has p yet.
//
//go:norace
func pattern(stamp uint64, n int64) []byte {
	p := make([]byte, n+8)
	random := rand.NewPCG(stamp, 0)
	for i := int64(0); i < n; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], random.Uint64())
	}
	return p[:n:n]
}

// engineNames are the copy engines that every test runs over.
var engineNames = []string{"scaled", "serialised"}

// oneLock is a serialised engine below a snapshot with one lock.
const oneLock = "onelock"

func newEngine(name string) kcopyd.Engine {
	if name == "serialised" || name == oneLock {
		return kcopyd.NewSerialised(kcopyd.Config{})
	}
	return kcopyd.NewScaled(kcopyd.Config{})
}

// forEachEngine runs a test over both engines.
func forEachEngine(t *testing.T, run func(t *testing.T, engine string)) {
	for _, name := range engineNames {
		t.Run(name, func(t *testing.T) { run(t, name) })
	}
}

func mustSuspend(t fataler, devices ...*dm.Device) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, d := range devices {
		if err := d.Suspend(ctx); err != nil {
			t.Fatalf("%v", err)
		}
	}
}

// rig is an origin with snapshots for the tests of single races: synchronous RAM devices below two layers of faults
// each, so that some requests can be held longer than others.
type rig struct {
	t      *testing.T
	engine kcopyd.Engine
	ram    *sparseRAM
	upper  *fault.Device // what the origin and the copies go to first
	lower  *fault.Device
	origin *Origin
	dev    *dm.Device
	snaps  []*rigSnap
	frozen []byte // the origin's first content
}

type rigSnap struct {
	*Snapshot
	dev           *dm.Device
	ram           *ram
	upper         *fault.Device
	lower         *fault.Device
	invalidations atomic.Int32
}

// newRig makes an origin of size bytes with a random content. Its end is checked when the test is over.
func newRig(t *testing.T, engine string, size int64) *rig {
	g := &rig{t: t, engine: newEngine(engine), ram: newSparseRAM(size), frozen: pattern(1, size)}
	if err := block.Write(g.ram, g.frozen, 0); err != nil {
		t.Fatal(err)
	}
	g.lower = fault.New(g.ram)
	g.upper = fault.New(g.lower)
	g.origin = NewOrigin(g.upper)
	g.dev = dm.NewDevice("origin", g.origin, false)
	t.Cleanup(g.close)
	return g
}

// newRigWith makes a rig with a snapshot for each chunk size.
func newRigWith(t *testing.T, engine string, size int64, chunkSizes ...cowstore.ChunkSize) *rig {
	g := newRig(t, engine, size)
	for _, c := range chunkSizes {
		g.take(Config{ChunkSize: c})
	}
	return g
}

// take adds a snapshot; what c leaves open gets room for everything. change may alter it before it is added.
func (g *rig) take(c Config, change ...func(*rigSnap)) *rigSnap {
	g.t.Helper()
	x := &rigSnap{}
	room := int64(c.ChunkSize.ChunkCeil(g.dev.Size())) * int64(c.ChunkSize)
	x.ram = newRAM(room)
	x.lower = fault.New(x.ram)
	x.upper = fault.New(x.lower)
	c.Name, c.Origin, c.Engine = fmt.Sprint("snap", len(g.snaps)), g.origin, g.engine
	if c.COW == nil {
		c.COW = x.upper
	}
	if c.Store == nil {
		c.Store = cowstore.NewTransient(room, 0, c.ChunkSize)
	}
	c.Invalidated = func(error) { x.invalidations.Add(1) }
	s, err := New(c)
	if err != nil {
		g.t.Fatal(err)
	}
	x.Snapshot = s
	for _, f := range change {
		f(x)
	}
	x.dev = dm.NewDevice(c.Name, s, c.ReadOnly)
	mustSuspend(g.t, g.dev)
	if err := g.origin.Add(s); err != nil {
		g.t.Fatal(err)
	}
	g.dev.Resume()
	g.snaps = append(g.snaps, x)
	return x
}

// drop removes a snapshot as the daemon does.
func (g *rig) drop(x *rigSnap) {
	g.t.Helper()
	mustSuspend(g.t, g.dev, x.dev)
	g.origin.Remove(x.Snapshot)
	g.dev.Resume()
	if err := x.dev.Close(context.Background()); err != nil {
		g.t.Fatal(err)
	}
}

// close checks that nothing is left over.
func (g *rig) close() {
	if g.t.Failed() {
		return // what is stuck stays so
	}
	for _, x := range g.snaps {
		eventually(g.t, "all exceptions are idle", func() bool { return x.exceptions.inUse() == 0 })
		if n := x.invalidations.Load(); n > 1 || (n == 1) != (x.invalidCause() != nil) {
			g.t.Errorf("Invalidated was called %d times, the cause is %v", n, x.invalidCause())
		}
	}
	if err := g.engine.Close(); err != nil {
		g.t.Error(err)
	}
	if n := g.engine.Stats().BuffersInUse; n != 0 {
		g.t.Errorf("%d bytes of buffers are in use", n)
	}
}

// write starts a write to the origin.
func (g *rig) write(offset int64, data []byte) *call {
	return start(g.dev, block.OpWrite, 0, offset, data)
}

// state is the state of a chunk's slot.
func (x *rigSnap) state(chunk cowstore.Chunk) slotState { return x.lookup(chunk).state() }

// waitState waits until a chunk's slot is in the given state.
func (x *rigSnap) waitState(t *testing.T, chunk cowstore.Chunk, want slotState) {
	t.Helper()
	eventually(t, fmt.Sprintf("chunk %d is in state %d", chunk, want), func() bool { return x.state(chunk) == want })
}

// reads is what a read of n bytes of d gives.
func (g *rig) reads(d block.Device, offset, n int64) []byte {
	g.t.Helper()
	p := make([]byte, n)
	if err := block.Read(d, p, offset); err != nil {
		g.t.Fatal(err)
	}
	return p
}

// wantFrozen compares the whole snapshot with the origin's first content.
func (g *rig) wantFrozen(x *rigSnap) {
	g.t.Helper()
	same(g.t, g.reads(x.dev, 0, x.dev.Size()), g.frozen[:x.dev.Size()])
}

// wantInvalid checks all that holds for an invalid snapshot.
func (g *rig) wantInvalid(x *rigSnap, cause error) {
	g.t.Helper()
	eventually(g.t, "Invalidated is called", func() bool { return x.invalidations.Load() == 1 })
	st := x.Status()
	if !errors.Is(st.Invalid, cause) || st.String() != "Invalid" {
		g.t.Errorf("status %q, cause %v, want %v", st, st.Invalid, cause)
	}
	for _, op := range []block.Op{block.OpRead, block.OpWrite, block.OpWriteZeroes, block.OpFlush} {
		var data []byte
		if op == block.OpRead || op == block.OpWrite {
			data = make([]byte, 1)
		}
		start(x.dev, op, 0, 0, data).want(g.t, errEIO)
	}
	for offset := range x.dev.Size() / 4096 {
		start(x.dev, block.OpRead, 0, offset*4096, make([]byte, 512)).want(g.t, errEIO)
	}
}

// held counts what matches: a predicate for Hold and Fail.
func matching(op block.Op, offset, length int64) func(*block.Request) bool {
	return func(r *block.Request) bool { return r.Op == op && r.Offset < offset+length && offset < r.End() }
}

// failing makes a Fail rule of a predicate.
func failing(match func(*block.Request) bool, err error) func(*block.Request) error {
	return func(r *block.Request) error {
		if match(r) {
			return err
		}
		return nil
	}
}
