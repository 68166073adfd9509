package crash

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cowherd/backend/mem"
	"cowherd/block"
	"cowherd/clonemeta"
	"cowherd/dm"
	"cowherd/internal/fault"
	"cowherd/kcopyd"
	"cowherd/persistentdata"
	"cowherd/target/clone"
)

// cloneConfig is a way to set up a run of TestClone. Its chunk is the region, and its origin the length.
type cloneConfig struct {
	config
	hydrate  bool // in the background, all the time
	discards bool
	zero     bool // the destination is zero at first
	fails    failure
	offload  bool // the destination shares the source's blocks
}

// failure is what fails once in every generation, and without an effect.
type failure uint8

const (
	nothingFails failure = iota
	metaFails            // a write or a flush of the metadata
	flushFails           // a flush of the destination
)

// failsBefore bounds the number of the request that fails.
const failsBefore = 30

// cloneCases are the runs of TestClone.
var cloneCases = []struct {
	name string
	cloneConfig
}{
	{"4k", cloneConfig{config: config{mode: now, chunk: 4 << 10, origin: 300 << 10, logical: 512, width: 6, steps: 60}}},
	{"4k,parallel", cloneConfig{config: config{mode: parallel, chunk: 4 << 10, origin: 300 << 10, logical: 512, width: 6,
		steps: 60}, discards: true}},
	{"4k,late", cloneConfig{config: config{mode: late, chunk: 4 << 10, origin: 300 << 10, logical: 512, width: 10, steps: 50},
		discards: true}},
	{"16k,tail", cloneConfig{config: config{mode: now, chunk: 16 << 10, origin: 300<<10 + 5*512, logical: 512, width: 6, steps: 40},
		discards: true}},
	{"4k,hydrating", cloneConfig{config: config{mode: parallel, chunk: 4 << 10, origin: 600 << 10, logical: 512, width: 6,
		steps: 50}, hydrate: true}},
	{"4k,hydrating,late", cloneConfig{config: config{mode: late, chunk: 4 << 10, origin: 600<<10 + 512, logical: 512, width: 10,
		steps: 50}, hydrate: true, discards: true}},
	{"64k,hydrating,zero", cloneConfig{config: config{mode: late, chunk: 64 << 10, origin: 1 << 20, logical: 512, width: 6,
		steps: 30}, hydrate: true, zero: true}},
	{"16k,plain", cloneConfig{config: config{mode: late, chunk: 16 << 10, origin: 300 << 10, logical: 4096, width: 6, steps: 30,
		plain: true}, hydrate: true}},
	{"16k,late,offload", cloneConfig{config: config{mode: late, chunk: 16 << 10, origin: 600 << 10, logical: 512, width: 10,
		steps: 40}, hydrate: true, offload: true}},
	{"4k,metadata fails", cloneConfig{config: config{mode: now, chunk: 4 << 10, origin: 300 << 10, logical: 512, width: 6,
		steps: 50}, hydrate: true, fails: metaFails}},
	{"4k,late,metadata fails", cloneConfig{config: config{mode: late, chunk: 4 << 10, origin: 300 << 10, logical: 512, width: 10,
		steps: 50}, discards: true, fails: metaFails}},
	{"4k,late,flush fails", cloneConfig{config: config{mode: late, chunk: 4 << 10, origin: 600 << 10, logical: 512, width: 10,
		steps: 40}, hydrate: true, fails: flushFails}},
}

// TestClone crashes clones. Destination and metadata are recorded. A region that the metadata calls hydrated holds its
// data, however the program or the power failed; one that it does not is as on the source. Here a write that was
// acknowledged and not flushed may be lost even if the program only is killed: the region is not known to be hydrated.
// When a commit fails and the program goes on, the same holds: what was not flushed may be lost at once, but no flush
// that comes later is acknowledged.
func TestClone(t *testing.T) {
	eachSeed(t, func(t *testing.T, seed uint64) {
		for _, test := range cloneCases {
			t.Run(test.name, func(t *testing.T) {
				t.Parallel()
				repeatable(t, seed, test.run(t, seed))
			})
		}
	})
}

// cloneStart is what a generation begins with.
type cloneStart struct {
	dest, meta []byte
	view       []byte
	discarded  map[int64]bool // sectors that may hold anything
}

func (c cloneConfig) run(t *testing.T, seed uint64) error {
	random := rand.New(rand.NewPCG(seed, 1))
	engine := kcopyd.NewScaled(kcopyd.Config{})
	source, err := c.newSource(random)
	if err != nil {
		return err
	}
	defer func() {
		if err := errors.Join(engine.Close(), source.Close()); err != nil {
			t.Error(err)
		}
	}()
	s := cloneStart{dest: make([]byte, c.origin), view: make([]byte, c.origin)}
	if !c.zero {
		fill(s.dest, 1<<60)
	}
	if err := read(source, s.view); err != nil {
		return err
	}
	stamp := uint64(0)
	for i := range c.generationCount() {
		g := &cloneRun{cloneConfig: &c, runner: newRunner(&c.config, random, &stamp), engine: engine, source: source, start: s, first: i == 0}
		if err := g.run(); err != nil {
			return fmt.Errorf("generation %d: the run: %w", i, err)
		}
		k := newCloneChecker(g)
		if err := k.walk(); err != nil {
			return fmt.Errorf("generation %d: %w", i, err)
		}
		t.Logf("generation %d: %d events, %d crashes, %d gone on with; hydrated at the end: %d of %d; failed: %v", i, k.replay.Len(),
			k.crashes, k.resumed, g.hydrated, c.chunk.ChunkCeil(c.origin), g.failed.Load())
		s = k.next
	}
	return nil
}

// newSource is a source with data and holes.
func (c cloneConfig) newSource(random *rand.Rand) (*mem.Device, error) {
	source, err := mem.New(mem.Config{Size: c.origin})
	if err != nil {
		return nil, err
	}
	for at := int64(0); at < c.origin; at += 32 << 10 {
		if p := make([]byte, min(32<<10, c.origin-at)); random.IntN(3) > 0 {
			fill(p, 1<<40+uint64(at))
			if err := block.Write(source, p, at); err != nil {
				return nil, errors.Join(err, source.Close())
			}
		}
	}
	return source, nil
}

// cloneRun is one generation: a clone is made or opened, and operations are done on it.
type cloneRun struct {
	*cloneConfig
	runner
	engine     kcopyd.Engine
	source     *mem.Device
	start      cloneStart
	first      bool
	dest, meta *fault.Disk
	hydrated   uint64
	failed     atomic.Bool // what was to fail has failed
}

func (g *cloneRun) params() clonemeta.Params {
	return clonemeta.Params{RegionSize: block.SectorFloor(int64(g.cloneConfig.chunk)), TargetSize: block.SectorFloor(g.origin)}
}

func (g *cloneRun) run() error {
	g.dest = g.disk("dest", g.start.dest)
	if g.start.meta == nil {
		g.start.meta = make([]byte, clonemeta.Size(g.params()))
	}
	// The metadata is written by one goroutine, which waits for each request.
	g.meta = g.rec.NewDisk(fault.DiskConfig{Name: "meta", Content: g.start.meta, Limits: g.cloneConfig.limits()})
	err := g.work()
	for _, a := range g.late {
		a.Close()
	}
	return err
}

func (g *cloneRun) work() error {
	var m *clonemeta.Metadata
	var err error
	dest, meta := fault.New(g.dest), fault.New(g.meta)
	if g.first {
		m, err = clonemeta.Format(meta, g.params())
	} else {
		m, err = clonemeta.Open(meta, g.params())
	}
	if err != nil {
		return err
	}
	g.rec.Mark(watch{})
	switch number := 1 + g.random.Int64N(failsBefore); g.fails {
	case metaFails:
		meta.Fail(g.failOnce(number, func(r *block.Request) bool { return r.Op != block.OpRead }))
	case flushFails:
		dest.Fail(g.failOnce(number, func(r *block.Request) bool { return r.Op == block.OpFlush }))
	}
	to := block.Device(dest)
	sharing := &sharing{Device: dest}
	if g.offload {
		to = sharing
	}
	c, err := g.open(to, m, g.first && g.zero, g.hydrate)
	if err != nil {
		return err
	}
	d := dm.NewDevice("clone", c, false)
	c.Resume()
	for range g.c.steps {
		if err = g.do(d); err != nil {
			break
		}
	}
	got := make([]byte, g.origin)
	readErr := read(d, got)
	closed := errors.Join(d.Close(context.Background()), c.Close())
	if st := c.Status(); st.Mode != clone.ReadWrite && g.failed.Load() {
		if st.Mode == clone.Fail {
			got, readErr = nil, nil
		}
		closed = nil // all have been told
	}
	g.hydrated = c.Status().Hydrated
	if g.offload && g.first && sharing.copies.Load() == 0 {
		err = errors.Join(err, errors.New("nothing was copied by offload"))
	}
	g.rec.Mark(over{origin: got})
	return errors.Join(err, readErr, closed, m.Close())
}

// sharing is a device that can share the blocks of a source, like a file on XFS: what it shares is as durable as what is
// written to it.
type sharing struct {
	block.Device
	copies atomic.Int64
}

// CopyOffers offers to share blocks of 4 KiB.
func (s *sharing) CopyOffers(block.Device) []block.CopyOffer {
	return []block.CopyOffer{{Method: block.CopyClone, Granularity: 4 << 10, TailAtEnd: true, LengthMax: 1 << 20, Concurrency: 1}}
}

// Copy shares.
func (s *sharing) Copy(_ block.CopyMethod, source block.Device, from, to, length int64) (int64, error) {
	s.copies.Add(1)
	p := make([]byte, length)
	if err := block.Read(source, p, from); err != nil {
		return 0, err
	}
	return length, block.Write(s.Device, p, to)
}

// failOnce fails the one of the requests that match whose number it is.
func (g *cloneRun) failOnce(number int64, match func(*block.Request) bool) func(*block.Request) error {
	var seen atomic.Int64
	return func(r *block.Request) error {
		if match(r) && seen.Add(1) == number {
			g.failed.Store(true)
			return syscall.EIO
		}
		return nil
	}
}

// open makes a clone of these devices.
func (g *cloneRun) open(dest block.Device, m *clonemeta.Metadata, zero, hydrate bool) (*clone.Clone, error) {
	return clone.New(clone.Config{
		Name: "clone", Source: g.source, Destination: dest, Metadata: m, Engine: g.engine, DestinationIsZero: zero,
		Hydration: clone.Hydration{Disabled: !hydrate, Threshold: 8, Batch: 3, PromoteOnRead: true},
	})
}

// do does the operations of a step.
func (g *cloneRun) do(d *dm.Device) error {
	g.maker.devices = []int{onOrigin}
	var wait sync.WaitGroup
	var calls []*call
	for i, o := range g.operations() {
		c := &call{rec: g.rec, o: o}
		c.r = block.Request{Op: o.kind, Flags: o.flags, Queue: block.Queue(i), Offset: o.offset, Length: o.length}
		if o.kind == block.OpWrite {
			c.r.Data = make([]byte, o.length)
			o.fill(c.r.Data)
		}
		c.r.Push(c)
		c.done.Add(1)
		g.rec.Mark(began{o})
		calls = append(calls, c)
		if g.mode == parallel {
			wait.Go(func() { d.Submit(&c.r) })
		} else {
			d.Submit(&c.r)
		}
		if g.mode == now {
			c.done.Wait()
		}
	}
	var errs []error
	for _, c := range calls {
		c.done.Wait()
		if c.err != nil && !(g.failed.Load() && errors.Is(c.err, syscall.EIO)) {
			errs = append(errs, fmt.Errorf("%v: %w", c.o, c.err))
		}
	}
	wait.Wait()
	return errors.Join(errs...)
}

// operations are those of a step; some are discards of whole regions.
func (g *cloneRun) operations() []*op {
	step := g.maker.step()
	size := int64(g.cloneConfig.chunk)
	if whole := g.origin / size; g.discards && g.random.IntN(4) == 0 {
		o := &op{kind: block.OpDiscard, offset: g.random.Int64N(whole) * size, stamp: *g.maker.stamp}
		o.length = min(1+g.random.Int64N(3), whole-o.offset/size) * size
		if !disturbs(step, o) {
			step = append(step, o)
		}
	}
	return step
}

// cloneChecker looks at the disks of a generation.
type cloneChecker struct {
	walker
	run     *cloneRun
	view    *view
	got     []byte
	resumed int
	next    cloneStart
	nextAt  int
}

func newCloneChecker(g *cloneRun) *cloneChecker {
	k := &cloneChecker{
		walker: walker{c: &g.cloneConfig.config, random: g.random, replay: g.rec.Replay()},
		run:    g, view: newView("clone", slices.Clone(g.start.view)), got: make([]byte, g.origin),
	}
	for n := range g.start.discarded {
		k.view.sectors[n] = []version{{any: true}}
	}
	k.walker.mark, k.walker.look = k.mark, k.look
	k.nextAt = g.random.IntN(k.replay.Len())
	return k
}

func (k *cloneChecker) mark(mark any) error {
	switch m := mark.(type) {
	case began:
		k.view.begin(m.op)
	case ended:
		k.view.end(m.op)
	case refused:
		if !k.run.failed.Load() {
			return fmt.Errorf("%v was refused", m.op)
		}
	case over:
		if m.origin != nil {
			return k.view.check(m.origin, !k.run.failed.Load())
		}
	}
	return nil
}

// look opens the clone as it is on the images of destination and metadata, and compares what it shows with the model.
func (k *cloneChecker) look(images []*fault.Image, _ bool) error {
	var violations []error
	_, err := clonemeta.Check(images[1], clonemeta.CheckConfig{Report: func(f *persistentdata.Finding) {
		if f.Violation {
			violations = append(violations, fmt.Errorf("the checker says: %s %s", f.Rule, f.What))
		}
	}})
	if err := errors.Join(append(violations, err)...); err != nil {
		return err
	}
	m, err := clonemeta.Open(images[1], k.run.params())
	if err != nil {
		return err
	}
	resume := k.random.IntN(10) == 0
	c, err := k.run.open(images[0], m, false, resume)
	if err != nil {
		return err
	}
	d := dm.NewDevice("clone", c, false)
	err = read(d, k.got)
	if err == nil {
		err = k.view.check(k.got, false)
	}
	if err == nil {
		k.keep(images)
	}
	if err == nil && resume {
		k.resumed++
		err = k.goOn(d, c)
	}
	return errors.Join(err, d.Close(context.Background()), c.Close(), m.Close())
}

// goOn hydrates all of a clone that was opened again: what it shows is not to change.
func (k *cloneChecker) goOn(d *dm.Device, c *clone.Clone) error {
	c.Resume()
	for end := time.Now().Add(patience); !c.Hydrated(); {
		if err := c.Commit(); err != nil {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("hydration does not end: %v", c.Status())
		}
	}
	again := make([]byte, len(k.got))
	if err := read(d, again); err != nil {
		return err
	}
	if at := differs(again, k.got); at >= 0 {
		return fmt.Errorf("byte %d was %#x when opened and is %#x when all is hydrated", at, k.got[at], again[at])
	}
	return nil
}

// keep makes these disks the start of the next generation, if it is time.
func (k *cloneChecker) keep(images []*fault.Image) {
	end := k.replay.At() == k.replay.Len()
	if k.next.dest != nil || !end && (k.replay.At() < k.nextAt || k.random.IntN(2) > 0) {
		return
	}
	k.next = cloneStart{
		dest: images[0].Content(), meta: images[1].Content(), view: slices.Clone(k.got), discarded: map[int64]bool{},
	}
	for n, versions := range k.view.sectors {
		if slices.ContainsFunc(versions, func(v version) bool { return v.any }) {
			k.next.discarded[n] = true
		}
	}
}
