package snapshot

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/dm"
	"cowherd/internal/fault"
	"cowherd/internal/invariant"
	"cowherd/kcopyd"
)

// The model test does random operations on an origin and its snapshots and compares every result with plain byte
// slices. It knows exactly which chunks must have been copied, when a snapshot runs out of room, and which injected
// error costs whom what. The same steps are driven by a seed (thousands of them) and by rapid (which shrinks).

// worldConfig is what the model test is run over.
type worldConfig struct {
	async      bool
	engine     string
	pendingMax int // 0: the default
	persistent bool
}

func (c worldConfig) String() string {
	return fmt.Sprintf("async=%v,engine=%s,pending=%d,persistent=%v", c.async, c.engine, c.pendingMax, c.persistent)
}

// room is the device, in chunks, on which a store of this kind has room for count exceptions.
func (c worldConfig) room(count int, chunkSize cowstore.ChunkSize) int64 {
	if !c.persistent {
		return int64(count)
	}
	return int64(2 + count + count/int(chunkSize/16)) // header, areas, and the one that must follow a full area
}

// store makes a store on a COW device that may use limit bytes of it. The RAM devices of the tests do not fail here.
func (c worldConfig) store(t fataler, d block.Device, limit int64, chunkSize cowstore.ChunkSize) Store {
	if !c.persistent {
		return cowstore.NewTransient(d.Size(), limit, chunkSize)
	}
	p, err := cowstore.CreatePersistent(d, chunkSize, cowstore.PersistentConfig{})
	if err != nil {
		t.Fatalf("%v", err)
	}
	return p
}

func worldConfigs() (all []worldConfig) {
	for _, async := range []bool{false, true} {
		for _, engine := range engineNames {
			for _, pendingMax := range []int{0, 1, 2} {
				all = append(all, worldConfig{async, engine, pendingMax, false})
			}
			all = append(all, worldConfig{async, engine, 0, true}, worldConfig{async, engine, 2, true})
		}
		all = append(all, worldConfig{async, oneLock, 0, false}, worldConfig{async, oneLock, 2, true})
	}
	return all
}

// draw is where the steps get their random numbers from: n is at least 0 and less than limit.
type draw func(label string, limit int) int

// tracer tells, when the test fails, what was done last.
type tracer struct {
	fataler
	lines []string
}

func (t *tracer) add(format string, args ...any) {
	t.lines = append(t.lines, fmt.Sprintf(format, args...))
}

func (t *tracer) Fatalf(format string, args ...any) {
	t.Helper()
	last := t.lines[max(0, len(t.lines)-15):]
	t.fataler.Fatalf("%s\nthe last things done:\n\t%s", fmt.Sprintf(format, args...), strings.Join(last, "\n\t"))
}

// A world is an origin, its snapshots, and what they must hold.
type world struct {
	t      *tracer
	draw   draw
	config worldConfig
	stamp  uint64
	steps  map[string]int // how often each operation was done

	engine kcopyd.Engine
	ram    *sparseRAM
	asyncs []*fault.Async
	faults *fault.Device
	origin *Origin
	dev    *dm.Device
	model  []byte
	zeroes []byte
	snaps  []*worldSnap
	taken  int
}

// worldSnap is a snapshot and its model.
type worldSnap struct {
	*Snapshot
	config Config
	dev    *dm.Device
	ram    *ram
	faults *fault.Device
	model  []byte
	kept   []bool // by chunk: it has an exception
	used   int    // of total chunks of the COW device
	total  int

	invalid       bool
	unreached     bool // the COW device failed when it became invalid: the header may not say so
	invalidations atomic.Int32
}

var worldSizes = []int64{300*kib + 777, 256 * kib, 3000, 1<<20 + 1, 2 << 20}

func newWorld(t fataler, config worldConfig, draw draw) *world {
	w := &world{t: &tracer{fataler: t}, draw: draw, config: config, steps: map[string]int{}, engine: newEngine(config.engine)}
	size := worldSizes[draw("size", len(worldSizes))]
	w.ram = newSparseRAM(size)
	w.ram.lock = new(sync.Mutex) // reads of an invalid snapshot race with writes, and fail
	w.model, w.zeroes = make([]byte, size), make([]byte, size)
	for range 3 { // some data and some holes
		offset, length := w.area(size)
		p := w.data(length)
		copy(w.model[offset:], p)
		if err := block.Write(w.ram, p, offset); err != nil {
			t.Fatalf("%v", err)
		}
	}
	w.faults = fault.New(withExtents{w.below(w.ram), w.ram})
	w.origin = NewOrigin(w.faults)
	w.dev = dm.NewDevice("origin", w.origin, false)
	return w
}

// below puts goroutines in front of a device, if so configured.
func (w *world) below(d block.Device) block.Device {
	if !w.config.async {
		return d
	}
	a := fault.NewAsync(d, 3, w.stamp)
	w.asyncs = append(w.asyncs, a)
	return a
}

// close checks that nothing is left over and stops what runs.
func (w *world) close() {
	for len(w.snaps) > 0 {
		w.drop(0)
	}
	if err := w.engine.Close(); err != nil {
		w.t.Fatalf("%v", err)
	}
	if st := w.engine.Stats(); st.BuffersInUse != 0 || st.JobsInFlight != 0 {
		w.t.Fatalf("engine: %+v", st)
	}
	for _, a := range w.asyncs {
		a.Close()
	}
}

// area draws a range of a device: any bytes, whole sectors, pages or many pages; sometimes none, sometimes all.
func (w *world) area(size int64) (offset, length int64) {
	grain := []int64{1, 512, 4096, 64 * kib}[w.draw("grain", 4)]
	offset = int64(w.draw("offset", int(size/grain)+1)) * grain
	most := []int64{0, 100, 5000, 70_000, 600_000, size}[w.draw("most", 6)]
	if left := size - offset; most > 0 {
		length = min(int64(w.draw("length", int(most)))/grain*grain+grain, left)
	}
	return offset, length
}

func (w *world) data(length int64) []byte {
	w.stamp++
	return pattern(w.stamp, length)
}

// take adds a snapshot.
func (w *world) take() {
	if len(w.snaps) == 4 {
		w.drop(w.draw("instead", 4))
	}
	x := &worldSnap{}
	chunkSize := cowstore.ChunkSize(4*kib) << w.draw("chunk size", 9)
	size := w.dev.Size()
	chunks := int(chunkSize.ChunkCeil(size))
	x.total = chunks
	if w.draw("limited", 3) == 0 {
		x.total = w.draw("total", chunks+1)
	}
	if w.config.persistent {
		x.total = max(1, x.total)
		chunks = x.total // all of the device is room
	}
	x.ram = newRAM(w.config.room(chunks, chunkSize)*int64(chunkSize) + 100)
	x.faults = fault.New(w.below(x.ram))
	x.model = append(x.model, w.model...)
	x.kept = make([]bool, chunkSize.ChunkCeil(size))
	features := w.draw("features", 4) // none, none, discard_zeroes_cow, and discard_passdown_origin
	x.config = Config{
		Name: fmt.Sprint("snap", w.taken), Origin: w.origin, COW: x.faults, ChunkSize: chunkSize, Engine: w.engine,
		Store:            w.config.store(w.t, x.faults, max(1, int64(x.total)*int64(chunkSize)), chunkSize),
		DiscardZeroesCOW: features >= 2, DiscardPassdownOrigin: features == 3,
		PendingMax:  w.config.pendingMax,
		OneLock:     w.config.engine == oneLock,
		Invalidated: func(error) { x.invalidations.Add(1) },
	}
	w.t.add("take snap%d: chunks of %d, at most %d, features %d", w.taken, chunkSize, x.total, features)
	mustSuspend(w.t, w.dev)
	w.add(x)
	w.dev.Resume()
	w.snaps = append(w.snaps, x)
	w.taken++
}

// add makes the snapshot of x and adds it to the suspended origin.
func (w *world) add(x *worldSnap) {
	s, err := New(x.config)
	if err != nil {
		w.t.Fatalf("%v", err)
	}
	x.Snapshot = s
	if err := w.origin.Add(s); err != nil {
		w.t.Fatalf("%v", err)
	}
	x.dev = dm.NewDevice(s.name, s, false)
}

// reopen does with a persistent snapshot what a restart does, but for the origin: it is taken down and opened again.
func (w *world) reopen(i int) {
	x := w.snaps[i]
	w.t.add("reopen %s", x.name)
	mustSuspend(w.t, w.dev, x.dev)
	w.origin.Remove(x.Snapshot)
	w.end(x)
	p, err := cowstore.OpenPersistent(x.faults, cowstore.PersistentConfig{})
	if err != nil {
		w.t.Fatalf("%s: %v", x.name, err)
	}
	if p.Valid() == x.invalid && !x.unreached {
		w.t.Fatalf("%s: the header says valid=%v", x.name, p.Valid())
	}
	if x.invalid {
		w.snaps = append(w.snaps[:i:i], w.snaps[i+1:]...)
	} else {
		x.config.Store, x.config.ChunkSize = p, 0
		w.add(x)
	}
	w.dev.Resume()
}

// end takes down the suspended snapshot of x, which is in no origin.
func (w *world) end(x *worldSnap) {
	if err := x.dev.Close(context.Background()); err != nil {
		w.t.Fatalf("%v", err)
	}
	eventually(w.t, "all exceptions are idle", func() bool { return x.exceptions.inUse() == 0 })
	if err := x.Close(); err != nil {
		w.t.Fatalf("%v", err)
	}
}

// drop removes a snapshot, and checks that nobody uses its COW device afterwards.
func (w *world) drop(i int) {
	x := w.snaps[i]
	w.t.add("drop %s", x.name)
	if w.draw("order", 2) == 0 {
		mustSuspend(w.t, w.dev, x.dev)
	} else {
		mustSuspend(w.t, x.dev, w.dev)
	}
	w.origin.Remove(x.Snapshot)
	w.dev.Resume()
	w.end(x)
	fill(x.ram.data, 0xEE)
	w.snaps = append(w.snaps[:i:i], w.snaps[i+1:]...)
}

// A worldCall is one operation of a batch: on the origin, or on a snapshot.
type worldCall struct {
	*call
	snap           *worldSnap // nil: the origin
	offset, length int64      // as submitted
	data           []byte     // what a write writes
}

func (c *worldCall) end() int64 { return c.offset + c.length }

func (c *worldCall) String() string {
	on := "origin"
	if c.snap != nil {
		on = c.snap.name
	}
	return fmt.Sprintf("%s: %v [%d, %d)", on, c.r.Op, c.offset, c.end())
}

// batch does up to count operations at the same time, which do not conflict, and checks everything.
func (w *world) batch(count int) {
	var calls []*worldCall
	for range count {
		c := w.newCall()
		// A discard of a snapshot does one thing to a chunk that has been copied, another to one that has not.
		alone := c.snap != nil && c.r.Op == block.OpDiscard
		if alone && len(calls) > 0 || conflicts(calls, c) {
			continue
		}
		calls = append(calls, c)
		if alone {
			break
		}
	}
	f := w.newFault(calls)
	expect := w.expect(calls, f)
	w.t.add("%v, fault %v", calls, f)
	f.arm()
	for _, c := range calls {
		w.steps[c.r.Op.String()]++
		c.device(w).Submit(&c.r)
	}
	results := make([]error, len(calls))
	deadline := time.After(patience)
	for i, c := range calls {
		select {
		case results[i] = <-c.done:
		case <-deadline:
			w.t.Fatalf("%v: lost", c)
		}
	}
	f.disarm()
	for i, c := range calls {
		w.checkResult(c, results[i], expect, f)
	}
	for _, x := range w.snaps {
		w.checkSnap(x, expect[x], f)
	}
}

func (c *worldCall) device(w *world) *dm.Device {
	if c.snap != nil {
		return c.snap.dev
	}
	return w.dev
}

// newCall draws an operation.
func (w *world) newCall() *worldCall {
	c := &worldCall{}
	if i := w.draw("on", 2*len(w.snaps)+2); i < len(w.snaps) {
		c.snap = w.snaps[i]
	}
	op := []block.Op{
		block.OpRead, block.OpRead, block.OpWrite, block.OpWrite, block.OpWriteZeroes, block.OpDiscard, block.OpFlush,
	}[w.draw("op", 7)]
	if op == block.OpDiscard && c.snap != nil && c.snap.Limits().DiscardMax == 0 {
		op = block.OpWrite
	}
	c.offset, c.length = w.area(w.dev.Size())
	var data []byte
	switch op {
	case block.OpRead:
		data = make([]byte, c.length)
	case block.OpWrite:
		c.data = w.data(c.length)
		data = c.data
	case block.OpFlush:
		c.offset, c.length = 0, 0
	}
	c.call = newCall(op, block.Queue(w.draw("queue", 3)), c.offset, c.length, data)
	if op == block.OpWriteZeroes && w.draw("no unmap", 4) == 0 {
		c.r.Flags = block.NoUnmap
	}
	return c
}

// passesDown tells whether the call changes the origin behind all snapshots' backs.
func (c *worldCall) passesDown() bool {
	return c.snap != nil && c.r.Op == block.OpDiscard && c.snap.passdown
}

// conflicts tells whether the outcome would depend on which of two calls comes first.
func conflicts(calls []*worldCall, c *worldCall) bool {
	for _, d := range calls {
		if d.snap == c.snap && (d.r.Op.Writes() || c.r.Op.Writes()) && d.offset < c.end() && c.offset < d.end() {
			return true
		}
	}
	return false
}

// faultKind is what fails during a batch.
type faultKind int

const (
	noFault     faultKind = iota
	cowWrites             // everything that changes the COW device of one snapshot
	cowWrite              // one such request
	cowReads              // reads of the COW device of one snapshot
	originReads           // reads of the origin's device
	originWrites
	faultKinds
)

type worldFault struct {
	kind  faultKind
	snap  *worldSnap // of cow...
	on    *fault.Device
	nth   int
	fired atomic.Bool
}

// newFault draws what is to fail; mostly nothing.
func (w *world) newFault(calls []*worldCall) *worldFault {
	f := &worldFault{}
	if w.draw("fault", 5) != 0 {
		return f
	}
	for _, c := range calls {
		if c.passesDown() {
			return f
		}
	}
	f.kind = faultKind(w.draw("fault kind", int(faultKinds)))
	f.on = w.faults
	if f.kind == cowWrites || f.kind == cowWrite || f.kind == cowReads {
		if len(w.snaps) == 0 {
			f.kind = noFault
			return f
		}
		f.snap = w.snaps[w.draw("fault of", len(w.snaps))]
		f.on = f.snap.faults
	}
	if f.kind == cowWrite {
		f.nth = w.draw("nth", 4)
	}
	return f
}

func (f *worldFault) String() string {
	name := []string{"none", "all writes of COW", "a write of COW", "reads of COW", "reads of origin", "writes of origin"}[f.kind]
	if f.snap != nil {
		name += " of " + f.snap.name
	}
	return name
}

func (f *worldFault) arm() {
	if f.kind == noFault {
		return
	}
	f.on.Fail(func(r *block.Request) error {
		read := f.kind == cowReads || f.kind == originReads
		if r.Length == 0 || read && r.Op != block.OpRead || !read && !r.Op.Writes() {
			return nil
		}
		if f.kind == cowWrite {
			if f.nth--; f.nth != -1 {
				return nil
			}
		}
		f.fired.Store(true)
		return errInjected
	})
}

func (f *worldFault) disarm() {
	if f.kind != noFault {
		f.on.Fail(nil)
	}
}

// expectation is what a batch must do to one snapshot.
type expectation struct {
	need        []bool // by chunk: it has an exception afterwards, if the snapshot is valid
	fresh       int    // how many of them are new
	invalid     bool   // the snapshot is invalid afterwards
	mayInvalid  bool   // or may be
	wasInvalid  bool
	keptBefore  []bool
	copiesSure  bool // at least one new exception must be copied
	copiesMaybe bool
}

// expect says what the batch must do to every snapshot.
func (w *world) expect(calls []*worldCall, f *worldFault) map[*worldSnap]*expectation {
	all := map[*worldSnap]*expectation{}
	for _, x := range w.snaps {
		e := &expectation{wasInvalid: x.invalid, keptBefore: append([]bool(nil), x.kept...)}
		e.need = append([]bool(nil), x.kept...)
		full := make([]bool, len(x.kept)) // chunks that a write to the snapshot may fill without a copy
		for _, c := range calls {
			if (c.snap == nil || c.snap == x) && (c.r.Op == block.OpWrite || c.r.Op == block.OpWriteZeroes) {
				x.chunks(c, func(i int, whole bool) {
					e.need[i] = true
					full[i] = full[i] || whole && c.snap == x
				})
			}
		}
		for i := range e.need {
			if !e.need[i] || x.kept[i] {
				continue
			}
			e.fresh++
			e.copiesSure = e.copiesSure || !full[i]
			e.copiesMaybe = true
		}
		all[x] = e
		if x.invalid {
			e.invalid = true
			continue
		}
		e.invalid = x.used+e.fresh > x.total
		e.invalid = e.invalid || f.kind == cowWrites && f.snap == x && e.fresh > 0
		e.invalid = e.invalid || f.kind == originReads && e.copiesSure
		e.mayInvalid = f.kind == originReads && e.copiesMaybe || f.kind == cowWrite && f.snap == x && e.fresh > 0
	}
	return all
}

// chunks calls f for every chunk that c touches, and tells whether c covers it.
func (x *worldSnap) chunks(c *worldCall, f func(i int, whole bool)) {
	if c.length == 0 {
		return
	}
	first, last := x.chunkSize.ChunkFloor(c.offset), x.chunkSize.ChunkFloor(c.end()-1)
	for i := first; i <= last; i++ {
		start := x.chunkSize.Offset(i)
		f(int(i), c.offset <= start && c.end() >= min(start+int64(x.chunkSize), x.size))
	}
}

// touches tells whether c touches a chunk for which has is as given.
func (x *worldSnap) touches(c *worldCall, has []bool, want bool) bool {
	found := false
	x.chunks(c, func(i int, _ bool) { found = found || has[i] == want })
	return found
}

// checkResult compares one result with the model and updates it.
func (w *world) checkResult(c *worldCall, err error, expect map[*worldSnap]*expectation, f *worldFault) {
	if c.snap == nil {
		w.checkOrigin(c, err, f)
		return
	}
	x, e := c.snap, expect[c.snap]
	if err != nil && !errors.Is(err, errEIO) {
		w.t.Fatalf("%v: got %v, want EIO or nothing", c, err)
	}
	if e.wasInvalid {
		if err == nil {
			w.t.Fatalf("%v: an invalid snapshot served it", c)
		}
		return
	}
	must, may := x.mustFail(c, e, f)
	if must && err == nil {
		w.t.Fatalf("%v: it did not fail", c)
	}
	if !must && !may && !e.invalid && !e.mayInvalid && err != nil {
		w.t.Fatalf("%v: %v", c, err)
	}
	place := x.model[c.offset:c.end()]
	switch {
	case c.r.Op == block.OpRead:
		if err == nil {
			w.sameData(c, c.r.Data, place)
		}
	case err != nil && f.kind == cowWrite && !e.invalid:
		// Part of it may have been written.
		if x.invalidCause() == nil {
			w.settle(c, place)
		}
	case err != nil:
		// Nothing was written, or the snapshot is invalid.
	case c.r.Op == block.OpWrite:
		copy(place, c.data)
	case c.r.Op == block.OpWriteZeroes:
		clear(place)
	case c.r.Op == block.OpDiscard:
		w.discarded(c, e)
	}
}

// mustFail tells whether the faults make a request to a valid snapshot fail, or may do so.
func (x *worldSnap) mustFail(c *worldCall, e *expectation, f *worldFault) (must, may bool) {
	if c.length == 0 {
		return false, false
	}
	mine := f.snap == x
	switch {
	case c.r.Op == block.OpRead && f.kind == cowReads && mine:
		return x.touches(c, e.keptBefore, true), x.touches(c, e.need, true)
	case c.r.Op == block.OpRead && f.kind == originReads:
		return x.touches(c, e.need, false), x.touches(c, e.keptBefore, false)
	case c.r.Op == block.OpDiscard && f.kind == cowWrites && mine:
		return x.touches(c, e.keptBefore, true), x.touches(c, e.need, true)
	case c.r.Op.Writes() && f.kind == cowWrites && mine:
		return true, true
	case c.r.Op.Writes() && f.kind == cowWrite && mine:
		return false, true
	}
	return false, false
}

// settle takes over what a write that failed has left: each byte is the old one or the new one.
func (w *world) settle(c *worldCall, place []byte) {
	got := make([]byte, c.length)
	if err := block.Read(c.snap.dev, got, c.offset); err != nil {
		w.t.Fatalf("%v: read after an error: %v", c, err)
	}
	for i, b := range got {
		fresh := byte(0)
		if c.r.Op == block.OpWrite {
			fresh = c.data[i]
		}
		if b != place[i] && b != fresh && c.r.Op != block.OpDiscard {
			w.t.Fatalf("%v: failed, and left neither old nor new data at %d", c, c.offset+int64(i))
		}
	}
	copy(place, got)
}

// discarded updates the models after a discard of a snapshot.
func (w *world) discarded(c *worldCall, e *expectation) {
	x := c.snap
	x.chunks(c, func(i int, whole bool) {
		if !e.keptBefore[i] {
			return
		}
		part := x.model[max(c.offset, int64(i)*int64(x.chunkSize)):min(c.end(), int64(i+1)*int64(x.chunkSize))]
		if fill(part, discards); whole {
			clear(part)
		}
	})
	if !x.passdown {
		return
	}
	fill(w.model[c.offset:c.end()], discards)
	for _, y := range w.snaps { // nothing was copied for it
		y.chunks(c, func(i int, _ bool) {
			if !y.kept[i] {
				fill(y.model[max(c.offset, int64(i)*int64(y.chunkSize)):min(c.end(), int64(i+1)*int64(y.chunkSize))], discards)
			}
		})
	}
}

func (w *world) checkOrigin(c *worldCall, err error, f *worldFault) {
	place := w.model[c.offset:c.end()]
	passed := c.r.Op != block.OpDiscard || len(w.snaps) == 0
	fails := f.kind == originReads && c.r.Op == block.OpRead || f.kind == originWrites && c.r.Op.Writes() && passed
	if (fails && c.length > 0) != (err != nil) {
		w.t.Fatalf("%v: got %v", c, err)
	}
	if err != nil {
		return
	}
	switch c.r.Op {
	case block.OpRead:
		w.sameData(c, c.r.Data, place)
	case block.OpWrite:
		copy(place, c.data)
	case block.OpWriteZeroes:
		clear(place)
	case block.OpDiscard:
		if passed {
			fill(place, discards)
		}
	}
}

func (w *world) sameData(c *worldCall, got, want []byte) {
	w.t.Helper()
	if at := differs(got, want); at >= 0 {
		w.t.Fatalf("%v: byte %d is %#x, want %#x", c, c.offset+int64(at), got[at], want[at])
	}
}

// checkSnap compares the state of a snapshot with what was expected of it.
func (w *world) checkSnap(x *worldSnap, e *expectation, f *worldFault) {
	st := x.Status()
	invalid := st.Invalid != nil
	if e.invalid && !invalid || invalid && !e.invalid && !e.mayInvalid {
		w.t.Fatalf("%s: invalid is %v, want %v (may be: %v)", x.name, st.Invalid, e.invalid, e.mayInvalid)
	}
	if invalid && !e.invalid && f.kind == cowWrite && !f.fired.Load() {
		w.t.Fatalf("%s: invalid without a reason: %v", x.name, st.Invalid)
	}
	x.unreached = x.unreached || invalid && !x.invalid && f.snap == x
	x.invalid = invalid
	want := int32(0)
	if invalid {
		want = 1
		if !errors.Is(st.Invalid, errEIO) && !errors.Is(st.Invalid, errNoRoom) && !errors.Is(st.Invalid, errInjected) {
			w.t.Fatalf("%s: the cause is %v", x.name, st.Invalid)
		}
	}
	eventually(w.t, "Invalidated was called as often as it should", func() bool { return x.invalidations.Load() == want })
	if invalid {
		return
	}
	x.kept, x.used = e.need, x.used+e.fresh
	if got := st.Allocated; got != block.SectorFloor(w.config.room(x.used, x.chunkSize)*int64(x.chunkSize)) {
		w.t.Fatalf("%s: %d sectors allocated, want %d chunks of %d bytes", x.name, got, x.used, x.chunkSize)
	}
	x.Copied(0, x.size, func(offset, length int64, copied bool) bool {
		for i := int(x.chunkOf(offset)); i <= int(x.chunkOf(offset+length-1)); i++ {
			if x.kept[i] != copied {
				w.t.Fatalf("%s: chunk %d: copied is %v, want %v", x.name, i, copied, x.kept[i])
			}
		}
		return true
	})
}

// verify compares everything with the models.
func (w *world) verify() {
	got := make([]byte, w.dev.Size())
	if err := block.Read(w.dev, got, 0); err != nil {
		w.t.Fatalf("%v", err)
	}
	if at := differs(got, w.model); at >= 0 {
		w.t.Fatalf("origin: byte %d is %#x, want %#x", at, got[at], w.model[at])
	}
	for _, x := range w.snaps {
		err := block.Read(x.dev, got, 0)
		extentErr := x.dev.Extents(0, x.size, func(extent block.Extent) bool {
			if place := x.model[extent.Offset:][:extent.Length]; extent.Zero && differs(place, w.zeroes[:len(place)]) >= 0 {
				w.t.Fatalf("%s: the extent %+v is not zero", x.name, extent)
			}
			return true
		})
		if x.invalid {
			if !errors.Is(err, errEIO) || !errors.Is(extentErr, errEIO) {
				w.t.Fatalf("%s is invalid: read %v, extents %v", x.name, err, extentErr)
			}
			continue
		}
		if err != nil || extentErr != nil {
			w.t.Fatalf("%s: read %v, extents %v", x.name, err, extentErr)
		}
		if at := differs(got, x.model); at >= 0 {
			w.t.Fatalf("%s, chunks of %d: byte %d is %#x, want %#x", x.name, x.chunkSize, at, got[at], x.model[at])
		}
	}
}

// step does one random thing.
func (w *world) step() {
	switch w.draw("step", 12) {
	case 0:
		w.steps["take"]++
		w.take()
	case 1:
		if len(w.snaps) > 0 {
			w.steps["drop"]++
			w.drop(w.draw("which", len(w.snaps)))
		}
	case 2:
		w.verify()
		if w.config.persistent && len(w.snaps) > 0 {
			w.steps["reopen"]++
			w.reopen(w.draw("which", len(w.snaps)))
		}
	case 3, 4, 5, 6:
		w.batch(1)
	default:
		w.batch(2 + w.draw("count", 7))
	}
}

// TestModel does thousands of steps from one seed.
func TestModel(t *testing.T) {
	from := seed(t)
	for _, config := range worldConfigs() {
		t.Run(config.String(), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(from, 0))
			steps := map[string]int{}
			worlds := 8
			if invariant.Enabled {
				worlds = 2
			}
			for range worlds {
				w := newWorld(t, config, func(_ string, limit int) int { return rnd.IntN(limit) })
				w.take()
				for range 100 {
					w.step()
				}
				w.verify()
				w.close()
				for what, n := range w.steps {
					steps[what] += n
				}
			}
			wanted := []string{"read", "write", "write zeroes", "discard", "flush", "take", "drop"}
			if config.persistent {
				wanted = append(wanted, "reopen")
			}
			for _, what := range wanted {
				if steps[what] < worlds {
					t.Errorf("%d times %s: the test has lost its sense", steps[what], what)
				}
			}
		})
	}
}

// TestModelShrinking does the same from rapid, which finds the shortest list of steps that fails.
func TestModelShrinking(t *testing.T) {
	for _, config := range worldConfigs() {
		t.Run(config.String(), func(t *testing.T) {
			rapid.Check(t, func(r *rapid.T) {
				w := newWorld(r, config, func(label string, limit int) int {
					return rapid.IntRange(0, limit-1).Draw(r, label)
				})
				w.take()
				for range rapid.IntRange(1, 60).Draw(r, "steps") {
					w.step()
				}
				w.verify()
				w.close()
			})
		})
	}
}
