package crash

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/internal/fault"
	"cowherd/internal/invariant"
	"cowherd/kcopyd"
	"cowherd/target/snapshot"
)

// How requests reach the disks.
const (
	now      = "now"      // one after the other; they take effect in Submit
	parallel = "parallel" // several at the same time, which take effect in Submit
	late     = "late"     // several at the same time, which take effect later, in random order, on other goroutines
)

// config is a way to set up a run.
type config struct {
	mode    string
	chunk   cowstore.ChunkSize
	origin  int64 // bytes
	room    int64 // chunks of the COW device, and
	roomMax int64 // of how many it may come to have; 0: it does not grow
	logical int   // block of both disks, in bytes
	plain   bool  // the disks take no writes of zeroes
	width   int   // operations at the same time
	steps   int   // of a generation
	longest int64 // chunks of a write that is as long as several; 0: 6
	prefill int64 // bytes of the origin that are written first, without a crash
	onFull  snapshot.OnFull
	drop    bool // the snapshot is removed at the end

	generations int // 0: 3
	sparse      int // a crash at each so many events; 0: at each
}

// generationCount is less under the race detector, which takes ten times as long and looks for other things.
func (c *config) generationCount() int {
	switch {
	case invariant.Enabled:
		return 1
	case c.generations == 0:
		return 3
	}
	return c.generations
}

// every is the number of events from one that is looked at to the next.
func (c *config) every() int {
	n := max(1, c.sparse)
	if invariant.Enabled {
		n *= 10
	}
	return n
}

func (c *config) limits() block.Limits {
	l := block.NoLimits()
	l.LogicalBlock, l.NeedsFlush = c.logical, true
	if c.plain {
		l.WriteZeroesMax = 0
	}
	return l
}

// capacity is the number of chunks of the COW device that can hold exceptions.
func (c *config) capacity() int {
	n, l := 0, cowstore.NewLayout(max(c.room, c.roomMax)*int64(c.chunk), c.chunk)
	for chunk := cowstore.Chunk(2); chunk < l.Chunks; chunk++ {
		if !l.IsMetadata(chunk) {
			n++
		}
	}
	return n
}

// isShort tells whether the COW device has too little room for all of the origin.
func (c *config) isShort() bool { return c.capacity() <= int(c.chunk.ChunkCeil(c.origin)) }

// What a run marks in the log, beside its operations.
type (
	began   struct{ *op } // it is about to be submitted
	ended   struct{ *op } // it was acknowledged
	refused struct{ *op } // it has failed
	// watch: crashes are of interest from here on.
	watch struct{}
	// taken: a snapshot is there, and its store.
	taken struct{ on int }
	// dropping: the snapshot is about to be removed for good.
	dropping struct{}
	// over: what the devices hold at the end; snapshot is nil if it is invalid or gone.
	over struct{ origin, snapshot []byte }
)

// start is what a generation begins with.
type start struct {
	origin, cow []byte
	snapshot    []byte // the snapshot's view; nil: there is none, a new store is made
}

// runner does operations on recorded disks, and marks them.
type runner struct {
	c      *config
	random *rand.Rand
	rec    *fault.Recorder
	late   []*fault.Async
	maker  maker
	stack  *stack
}

func newRunner(c *config, random *rand.Rand, stamp *uint64) runner {
	return runner{c: c, random: random, rec: fault.NewRecorder(), maker: maker{random: random, c: c, stamp: stamp}}
}

// disk makes a recorded disk.
func (r *runner) disk(name string, content []byte) *fault.Disk {
	return r.rec.NewDisk(fault.DiskConfig{Name: name, Content: content, Limits: r.c.limits(), Through: r.through})
}

func (r *runner) through(lower block.Device) block.Device {
	if r.c.mode != late {
		return lower
	}
	a := fault.NewAsync(lower, 3, r.random.Uint64())
	r.late = append(r.late, a)
	return a
}

// whileOpen makes a stack over a disk and runs what; then it ends everything.
func (r *runner) whileOpen(origin block.Device, what func() error) error {
	engine := kcopyd.NewScaled(kcopyd.Config{})
	r.stack = openStack(origin, engine)
	err := errors.Join(what(), r.stack.close(), engine.Close())
	for _, a := range r.late {
		a.Close()
	}
	return err
}

// flush flushes the origin's disk, as an operation.
func (r *runner) flush(d block.Device) error {
	o := &op{on: onOrigin, kind: block.OpFlush}
	r.rec.Mark(began{o})
	if err := block.Flush(d); err != nil {
		return err
	}
	r.rec.Mark(ended{o})
	return nil
}

// sweep writes to the front of the origin, so much at a time.
func (r *runner) sweep(length, step int64) error {
	for at := int64(0); at < length; at += step {
		*r.maker.stamp++
		o := &op{kind: block.OpWrite, offset: at, length: min(step, length-at), stamp: *r.maker.stamp}
		if err := r.do([]*op{o}); err != nil {
			return err
		}
	}
	return nil
}

// steps does random operations on some devices.
func (r *runner) steps(count int, devices ...int) error {
	r.maker.devices = devices
	for range count {
		if err := r.do(r.maker.step()); err != nil {
			return err
		}
	}
	return nil
}

// call is a request of a run.
type call struct {
	rec  *fault.Recorder
	o    *op
	r    block.Request
	err  error
	done sync.WaitGroup
}

func (c *call) Complete(_ *block.Request, err error) {
	if c.err = err; err == nil {
		c.rec.Mark(ended{c.o})
	} else {
		c.rec.Mark(refused{c.o})
	}
	c.done.Done()
}

// do does the operations of a step. Those on a snapshot that is invalid or has overflowed are left out.
func (r *runner) do(step []*op) error {
	var calls []*call
	for i, o := range step {
		if r.takes(o) {
			c := r.start(o, block.Queue(i))
			calls = append(calls, c)
			if r.c.mode == now {
				c.done.Wait()
			}
		}
	}
	var errs []error
	for _, c := range calls {
		c.done.Wait()
		if c.err != nil && (c.o.on == onOrigin || !r.c.isShort()) {
			errs = append(errs, fmt.Errorf("%v: %w", c.o, c.err))
		}
	}
	return errors.Join(errs...)
}

// takes tells whether an operation can be done.
func (r *runner) takes(o *op) bool {
	if o.on == onOrigin {
		return true
	}
	x := r.stack.snaps[o.on]
	if x == nil {
		return false
	}
	st := x.Status()
	return st.Invalid == nil && !st.Overflowed
}

// start submits an operation. While a merge is there, snapshot and origin are the same, and take turns.
func (r *runner) start(o *op, queue block.Queue) *call {
	c := &call{rec: r.rec, o: o}
	c.r = block.Request{Op: o.kind, Flags: o.flags, Queue: queue, Offset: o.offset, Length: o.length}
	if o.kind == block.OpWrite {
		c.r.Data = make([]byte, o.length)
		o.fill(c.r.Data)
	}
	c.r.Push(c)
	c.done.Add(1)
	r.rec.Mark(began{o})
	device := r.stack.devices[o.on]
	if o.on == onOrigin && r.stack.merge != nil && o.stamp%2 == 1 {
		device = r.stack.devices[onSnapshot]
	}
	if r.c.mode == parallel {
		go device.Submit(&c.r)
	} else {
		device.Submit(&c.r)
	}
	return c
}

// generation is one run of an origin and a snapshot.
type generation struct {
	runner
	start       start
	origin, cow *fault.Disk
}

func newGeneration(c *config, random *rand.Rand, stamp *uint64, s start) *generation {
	g := &generation{runner: newRunner(c, random, stamp), start: s}
	g.origin, g.cow = g.disk("origin", s.origin), g.disk("cow", s.cow)
	return g
}

// run does everything up to a proper end. What it leaves is in the recorder.
func (g *generation) run() error { return g.whileOpen(g.origin, g.work) }

func (g *generation) work() error {
	if g.c.prefill == 0 {
		g.rec.Mark(watch{})
	}
	err := g.take()
	if err == nil && g.c.prefill > 0 {
		err = g.sweep(g.c.prefill, 1<<20)
		g.rec.Mark(watch{})
	}
	if err == nil && g.c.longest > 0 {
		err = g.sweep(g.c.origin/2, g.c.longest*int64(g.c.chunk))
	}
	for range resizes {
		if err == nil {
			err = g.steps(g.c.steps/resizes, onOrigin, onOrigin, onSnapshot)
		}
		if err == nil {
			err = g.resize()
		}
	}
	if err == nil {
		err = g.end()
	}
	if err == nil && g.c.drop {
		err = g.drop()
	}
	return err
}

// take makes or opens the store, and adds the snapshot.
func (g *generation) take() error {
	store, err := g.store()
	if err != nil {
		return err
	}
	if g.start.snapshot == nil { // the origin may hold what was not flushed
		if err := g.steps(1, onOrigin); err != nil {
			return err
		}
	}
	flush := func() error { return g.flush(g.origin) }
	if err := g.stack.take(onSnapshot, g.cow, store, g.c, flush); err != nil {
		return err
	}
	g.rec.Mark(taken{onSnapshot})
	return nil
}

func (g *generation) store() (*cowstore.Persistent, error) {
	if g.start.snapshot == nil {
		return cowstore.CreatePersistent(g.cow, g.c.chunk, cowstore.PersistentConfig{})
	}
	return cowstore.OpenPersistent(g.cow, cowstore.PersistentConfig{})
}

// resizes is how often a COW device that may grow is told to during a run, beside what it does by itself.
const resizes = 2

// resize lets the COW device grow, if it may, by half of what is left.
func (g *generation) resize() error {
	size := g.cow.Size()
	more := (g.c.roomMax*int64(g.c.chunk) - size) / 2
	if more <= 0 {
		return nil
	}
	return g.stack.snaps[onSnapshot].Resize(size + more)
}

// end reads both devices.
func (g *generation) end() error {
	o := over{origin: make([]byte, g.c.origin)}
	err := read(g.stack.devices[onOrigin], o.origin)
	switch invalid := g.stack.snaps[onSnapshot].Status().Invalid; {
	case invalid == nil:
		o.snapshot = make([]byte, g.c.origin)
		err = errors.Join(err, read(g.stack.devices[onSnapshot], o.snapshot))
	case !g.c.isShort():
		err = errors.Join(err, fmt.Errorf("the snapshot is invalid: %w", invalid))
	}
	g.rec.Mark(o)
	return err
}

// drop removes the snapshot, and goes on with the origin.
func (g *generation) drop() error {
	g.rec.Mark(dropping{})
	if err := g.stack.drop(onSnapshot); err != nil {
		return err
	}
	return g.steps(g.c.steps, onOrigin)
}

// firstStart is the start of the first generation: an origin with a content, and a COW device full of what an earlier
// store has left.
func firstStart(c *config, random *rand.Rand) start {
	s := start{origin: make([]byte, c.origin), cow: stale(random, c)}
	fill(s.origin, math.MaxUint64)
	return s
}

// prepare makes a store where there is none and a run makes none either: those with small chunks are opened and no
// longer made.
func (s *start) prepare(c *config) {
	if s.snapshot == nil && c.chunk < cowstore.ChunkSizeNewMin {
		empty(s.cow, c.chunk)
		s.snapshot = slices.Clone(s.origin)
	}
}
