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
	"cowherd/kcopyd"
	"cowherd/target/snapshot"
)

// How requests reach the disks.
const (
	now      = "now"      // one after the other; they take effect in Submit: a seed gives the same log each time
	parallel = "parallel" // several at the same time, which take effect in Submit
	late     = "late"     // several at the same time, which take effect later, in random order, on other goroutines
)

// config is a way to set up a run.
type config struct {
	mode    string
	chunk   cowstore.ChunkSize
	origin  int64 // bytes
	room    int64 // chunks of the COW device
	logical int   // block of both disks, in bytes
	plain   bool  // the disks take no writes of zeroes
	width   int   // operations at the same time
	steps   int   // of a generation
	longest int64 // chunks of a write that is as long as several; 0: 6
	prefill int64 // bytes of the origin that are written first, without a crash
	onFull  snapshot.OnFull
	drop    bool // the snapshot is removed at the end

	generations int
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
	n, l := 0, cowstore.NewLayout(c.room*int64(c.chunk), c.chunk)
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
	// taken: the snapshot is there, and its store.
	taken struct{}
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

// generation is one run.
type generation struct {
	c      *config
	random *rand.Rand
	start  start
	rec    *fault.Recorder
	disks  [2]*fault.Disk // of the origin, and the COW device
	late   []*fault.Async
	stack  *stack
	maker  maker
}

func newGeneration(c *config, random *rand.Rand, stamp *uint64, s start) *generation {
	g := &generation{c: c, random: random, start: s, rec: fault.NewRecorder(), maker: maker{random, c, stamp}}
	for i, content := range [][]byte{s.origin, s.cow} {
		g.disks[i] = g.rec.NewDisk(fault.DiskConfig{
			Name: []string{"origin", "cow"}[i], Content: content, Limits: c.limits(), Through: g.through,
		})
	}
	return g
}

func (g *generation) through(lower block.Device) block.Device {
	if g.c.mode != late {
		return lower
	}
	a := fault.NewAsync(lower, 3, g.random.Uint64())
	g.late = append(g.late, a)
	return a
}

// run does everything up to a proper end. What it leaves is in the recorder.
func (g *generation) run() (err error) {
	engine := kcopyd.NewScaled(kcopyd.Config{})
	g.stack = openStack(g.disks[0], engine)
	defer func() {
		err = errors.Join(err, g.stack.close(), engine.Close())
		for _, a := range g.late {
			a.Close()
		}
	}()
	if g.c.prefill == 0 {
		g.rec.Mark(watch{})
	}
	if err := g.take(); err != nil {
		return err
	}
	if g.c.prefill > 0 {
		if err := g.sweep(g.c.prefill, 1<<20); err != nil {
			return err
		}
		g.rec.Mark(watch{})
	}
	if g.c.longest > 0 {
		if err := g.sweep(g.c.origin/2, g.c.longest*int64(g.c.chunk)); err != nil {
			return err
		}
	}
	for range g.c.steps {
		if err := g.do(g.maker.step()); err != nil {
			return err
		}
	}
	if err := g.end(); err != nil || !g.c.drop {
		return err
	}
	return g.drop()
}

// take makes or opens the store, and adds the snapshot.
func (g *generation) take() error {
	store, err := g.store()
	if err != nil {
		return err
	}
	if g.start.snapshot == nil { // the origin may hold what was not flushed
		if err := g.do(originOnly(g.maker.step())); err != nil {
			return err
		}
	}
	flush := func() error { return g.flush(g.disks[0]) }
	if err := g.stack.take(g.disks[1], store, g.c.onFull, flush); err != nil {
		return err
	}
	g.rec.Mark(taken{})
	return nil
}

func (g *generation) store() (*cowstore.Persistent, error) {
	if g.start.snapshot == nil {
		return cowstore.CreatePersistent(g.disks[1], g.c.chunk, cowstore.PersistentConfig{})
	}
	return cowstore.OpenPersistent(g.disks[1], cowstore.PersistentConfig{})
}

// originOnly are the operations on the origin.
func originOnly(step []*op) []*op {
	return slices.DeleteFunc(step, func(o *op) bool { return o.on != onOrigin })
}

// flush flushes the origin's disk, as an operation.
func (g *generation) flush(d block.Device) error {
	o := &op{on: onOrigin, kind: block.OpFlush}
	g.rec.Mark(began{o})
	if err := block.Flush(d); err != nil {
		return err
	}
	g.rec.Mark(ended{o})
	return nil
}

// sweep writes to the front of the origin, so much at a time.
func (g *generation) sweep(length, step int64) error {
	for at := int64(0); at < length; at += step {
		*g.maker.stamp++
		o := &op{kind: block.OpWrite, offset: at, length: min(step, length-at), stamp: *g.maker.stamp}
		if err := g.do([]*op{o}); err != nil {
			return err
		}
	}
	return nil
}

// call is a request of a run.
type call struct {
	g    *generation
	o    *op
	r    block.Request
	err  error
	done sync.WaitGroup
}

func (c *call) Complete(_ *block.Request, err error) {
	if c.err = err; err == nil {
		c.g.rec.Mark(ended{c.o})
	} else {
		c.g.rec.Mark(refused{c.o})
	}
	c.done.Done()
}

// do does the operations of a step. Those on a snapshot that is invalid or has overflowed are left out.
func (g *generation) do(step []*op) error {
	var calls []*call
	for i, o := range step {
		if o.on == onSnapshot && !g.takesWrites() {
			continue
		}
		c := &call{g: g, o: o}
		c.r = block.Request{Op: o.kind, Flags: o.flags, Queue: block.Queue(i), Offset: o.offset, Length: o.length}
		if o.kind == block.OpWrite {
			c.r.Data = make([]byte, o.length)
			o.fill(c.r.Data)
		}
		c.r.Push(c)
		c.done.Add(1)
		calls = append(calls, c)
		g.rec.Mark(began{o})
		switch device := g.stack.devices[o.on]; g.c.mode {
		case parallel:
			go device.Submit(&c.r)
		default:
			device.Submit(&c.r)
		}
		if g.c.mode == now {
			c.done.Wait()
		}
	}
	var errs []error
	for _, c := range calls {
		c.done.Wait()
		if c.err != nil && (c.o.on == onOrigin || !g.c.isShort()) {
			errs = append(errs, fmt.Errorf("%v: %w", c.o, c.err))
		}
	}
	return errors.Join(errs...)
}

// takesWrites tells whether the snapshot can still be written.
func (g *generation) takesWrites() bool {
	if g.stack.snap == nil {
		return false
	}
	st := g.stack.snap.Status()
	return st.Invalid == nil && !st.Overflowed
}

// end reads both devices.
func (g *generation) end() error {
	o := over{origin: make([]byte, g.c.origin)}
	err := read(g.stack.devices[onOrigin], o.origin)
	switch invalid := g.stack.snap.Status().Invalid; {
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
	if err := g.stack.drop(); err != nil {
		return err
	}
	for range g.c.steps {
		if err := g.do(originOnly(g.maker.step())); err != nil {
			return err
		}
	}
	return nil
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
