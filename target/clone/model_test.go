package clone

import (
	"context"
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"

	"cowherd/block"
	"cowherd/dm"
	"cowherd/internal/fault"
	"cowherd/internal/invariant"
	"cowherd/kcopyd"
)

// The model test does random operations on a clone, while it is hydrated or not, and compares every read with a plain
// byte slice. Operations of one step run at the same time and do not overlap. Now and then the clone is closed and
// opened again, hydration is switched, or the source fails.

// worldConfig is what the model test is run over.
type worldConfig struct {
	engine     string
	async      bool // all devices complete late, on other goroutines
	failing    bool // the source fails now and then
	regionSize int64
	size       int64
	hydration  Hydration
	noPassdown bool
	zero       bool // the destination is zero
}

func (c worldConfig) String() string {
	return fmt.Sprintf("%s,async=%v,failing=%v,region=%d,size=%d,passdown=%v,zero=%v,%+v", c.engine, c.async, c.failing, c.regionSize, c.size,
		!c.noPassdown, c.zero, c.hydration)
}

// world is a clone and its model.
type world struct {
	t      *testing.T
	config worldConfig
	rand   *rand.Rand
	stamp  uint64

	engine       kcopyd.Engine
	source, dest block.Device
	faults       *fault.Device // in front of the source
	asyncs       []*fault.Async
	meta         *memory
	first        bool // the clone was not opened before

	clone *Clone
	dev   *dm.Device

	model   []byte
	known   []bool // by byte: what a read gives is known; not after a discard
	touched []bool // by region: it must be hydrated
	log     []string
}

func newWorld(t *testing.T, config worldConfig, random *rand.Rand) *world {
	w := &world{t: t, config: config, rand: random, engine: newEngine(config.engine), first: true}
	source, dest := newRAM(config.size), newRAM(config.size+random.Int64N(3)*512)
	for range 3 {
		at := random.Int64N(config.size)
		n := random.Int64N(config.size-at) + 1
		fill(source.data[at:at+n], at, uint64(random.Uint32()))
	}
	if !config.zero {
		fill(dest.data, 0, 12345)
	}
	w.model = append(w.model, source.data...)
	w.known, w.touched = make([]bool, config.size), make([]bool, (config.size+config.regionSize-1)/config.regionSize)
	for i := range w.known {
		w.known[i] = true
	}
	w.faults = fault.New(sparseDevice(source))
	w.source, w.dest = w.async(w.faults), w.async(dest)
	w.meta = newMemory(config.regionSize, config.size)
	w.open()
	return w
}

// sparseDevice is d with its holes known.
func sparseDevice(d *ram) block.Device { return sparse{d} }

// lister passes extents on, which an Async does not.
type lister struct {
	*fault.Async
	lower block.Device
}

func (l lister) Extents(offset, length int64, yield func(block.Extent) bool) error {
	return extentsOf(l.lower, offset, length, yield)
}

func (w *world) async(d block.Device) block.Device {
	if !w.config.async {
		return d
	}
	a := fault.NewAsync(d, 3, w.rand.Uint64())
	w.asyncs = append(w.asyncs, a)
	return lister{a, d}
}

func (w *world) open() {
	c, err := New(Config{
		Name: "web", Source: w.source, Destination: w.dest, Metadata: w.meta, Engine: w.engine, Hydration: w.config.hydration,
		NoDiscardPassdown: w.config.noPassdown, DestinationIsZero: w.config.zero && w.first,
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.clone, w.dev, w.first = c, dm.NewDevice("web", c, false), false
	c.Resume()
}

// reload closes the clone and opens it again.
func (w *world) reload() {
	if err := w.dev.Close(context.Background()); err != nil {
		w.t.Fatal(err)
	}
	w.faults.Fail(nil)
	if err := w.clone.Close(); err != nil {
		w.t.Fatal(err)
	}
	w.checkTouched("closed")
	w.open()
}

func (w *world) close() {
	if err := w.dev.Close(context.Background()); err != nil {
		w.t.Fatal(err)
	}
	if err := w.clone.Close(); err != nil {
		w.t.Fatal(err)
	}
	for _, a := range w.asyncs {
		a.Close()
	}
	if err := w.engine.Close(); err != nil {
		w.t.Fatal(err)
	}
}

// checkTouched: what was written is hydrated durably.
func (w *world) checkTouched(when string) {
	for i, touched := range w.touched {
		if touched && !w.meta.hydrated(int64(i)) {
			w.fatalf("%s: region %d was written, flushed and is not hydrated", when, i)
		}
	}
}

func (w *world) fatalf(format string, args ...any) {
	w.t.Helper()
	for _, l := range w.log[max(0, len(w.log)-20):] {
		w.t.Log(l)
	}
	w.t.Fatalf(format, args...)
}

// op is one operation of a step.
type op struct {
	op             block.Op
	flags          block.Flags
	offset, length int64
	data           []byte
	call           *call
}

func (o *op) String() string {
	return fmt.Sprintf("%v %d+%d flags %d", o.op, o.offset, o.length, o.flags)
}

// step does a few operations at the same time, on parts of the device that do not overlap, and checks what they did.
func (w *world) step() {
	count := w.rand.IntN(4) + 1
	part := w.config.size / int64(count)
	var ops []*op
	for i := range int64(count) {
		o := w.operation(i*part, part)
		w.log = append(w.log, o.String())
		ops = append(ops, o)
	}
	if w.rand.IntN(8) == 0 {
		ops = append(ops, &op{op: block.OpFlush})
	}
	for i, o := range ops {
		o.call = start(w.dev, o.op, o.flags, i, o.offset, o.length, o.data)
	}
	for _, o := range ops {
		w.check(o, o.call.wait(w.t))
	}
	if w.rand.IntN(16) == 0 {
		if err := block.Flush(w.dev); err != nil {
			w.fatalf("flush: %v", err)
		}
		w.checkTouched("flushed")
	}
}

// operation is a random one on the bytes [start, start+length).
func (w *world) operation(start, length int64) *op {
	o := &op{offset: start + w.rand.Int64N(length)}
	most := start + length - o.offset
	switch w.rand.IntN(4) {
	case 0: // anything
		o.length = w.rand.Int64N(most + 1)
	case 1: // whole regions, if there are any
		mask := w.config.regionSize - 1
		if at := (o.offset + mask) &^ mask; at < start+length {
			o.offset = at
			o.length = min(w.config.regionSize*(1+w.rand.Int64N(4)), start+length-at)
			break
		}
		fallthrough
	default: // little
		o.length = min(most, w.rand.Int64N(9000))
	}
	switch n := w.rand.IntN(20); {
	case n < 9:
		o.op = block.OpRead
		o.data = make([]byte, o.length)
	case n < 17:
		o.op = block.OpWrite
		o.data = make([]byte, o.length)
		w.stamp++
		fill(o.data, o.offset, w.stamp)
	case n < 18:
		o.op = block.OpWriteZeroes
	default:
		o.op = block.OpDiscard
	}
	if o.op.Writes() && o.op != block.OpDiscard && w.rand.IntN(6) == 0 {
		o.flags = block.FUA
	}
	return o
}

// check compares the outcome of an operation with the model, and carries it over to the model.
func (w *world) check(o *op, err error) {
	if err != nil && !(w.config.failing && block.Errno(err) == syscall.EIO && o.op != block.OpFlush) {
		w.fatalf("%v: %v", o, err)
	}
	size := w.config.regionSize
	switch o.op {
	case block.OpRead:
		for i := range o.data {
			if at := o.offset + int64(i); err == nil && w.known[at] && o.data[i] != w.model[at] {
				w.fatalf("%v: byte %d is %#x, want %#x", o, at, o.data[i], w.model[at])
			}
		}
	case block.OpWrite, block.OpWriteZeroes:
		for at := o.offset; at < o.offset+o.length; at++ {
			w.model[at] = 0
			if o.op == block.OpWrite {
				w.model[at] = o.data[at-o.offset]
			}
			w.known[at] = err == nil
		}
		if err == nil && o.length > 0 {
			for i := o.offset / size; i <= (o.offset+o.length-1)/size; i++ {
				w.touched[i] = true
				if o.flags&block.FUA != 0 && !w.meta.hydrated(i) {
					w.fatalf("%v: region %d is not hydrated durably", o, i)
				}
			}
		}
	case block.OpDiscard:
		for i := (o.offset + size - 1) / size; i < (o.offset+o.length)/size; i++ {
			w.touched[i] = true
			for at := i * size; at < (i+1)*size; at++ {
				w.known[at] = false
			}
		}
	}
}

// disturb changes something about the clone.
func (w *world) disturb() {
	switch n := w.rand.IntN(10); {
	case n == 0:
		w.log = append(w.log, "reload")
		w.reload()
	case n < 3:
		w.log = append(w.log, "suspend")
		ctx := context.Background()
		if err := w.dev.Suspend(ctx); err != nil {
			w.t.Fatal(err)
		}
		if err := w.clone.Suspend(); err != nil {
			w.fatalf("suspend: %v", err)
		}
		w.checkTouched("suspended")
		w.clone.Resume()
		w.dev.Resume()
	case n < 5:
		w.clone.SetHydration(w.rand.IntN(2) == 0)
	case n < 6:
		w.clone.SetBatch(uint32(w.rand.IntN(8)))
		w.clone.SetThreshold(uint32(w.rand.IntN(20)))
	case n < 8 && w.config.failing:
		w.log = append(w.log, "the source fails")
		from := w.rand.Int64N(w.config.size)
		w.faults.Fail(func(r *block.Request) error {
			if r.Offset <= from && from < r.End() {
				return syscall.EIO
			}
			return nil
		})
	case n < 9:
		w.faults.Fail(nil)
		w.clone.Retry()
	}
}

func (w *world) run(steps int) {
	for range steps {
		if w.rand.IntN(12) == 0 {
			w.disturb()
		}
		w.step()
	}
	w.faults.Fail(nil)
	all := &op{op: block.OpRead, length: w.config.size, data: make([]byte, w.config.size)}
	w.check(all, start(w.dev, all.op, 0, 0, 0, all.length, all.data).wait(w.t))
	w.close()
}

func worldConfigs(random *rand.Rand) (all []worldConfig) {
	sizes := []int64{300*kib + 512, 256 * kib, 3 * 4096, 4096, 1*mib + 3*512, 5 * 512}
	for _, engine := range engineNames {
		for _, async := range []bool{false, true} {
			for _, failing := range []bool{false, true} {
				for _, regionSize := range []int64{4 * kib, 16 * kib, 64 * kib, 1 * mib} {
					c := worldConfig{engine: engine, async: async, failing: failing, regionSize: regionSize}
					c.size = sizes[random.IntN(len(sizes))]
					c.hydration = Hydration{
						Disabled: random.IntN(2) == 0, Threshold: uint32(random.IntN(30)), Batch: uint32(random.IntN(10)),
						PromoteOnRead: random.IntN(2) == 0, Order: Order(random.IntN(2)),
					}
					c.noPassdown, c.zero = random.IntN(3) == 0, random.IntN(2) == 0
					all = append(all, c)
				}
			}
		}
	}
	return all
}

// TestModel compares a clone with a byte slice over thousands of random operations.
func TestModel(t *testing.T) {
	steps := 300
	if invariant.Enabled {
		steps = 60
	}
	s := seed(t)
	random := rand.New(rand.NewPCG(s, 0))
	for i, c := range worldConfigs(random) {
		own := rand.New(rand.NewPCG(s, uint64(i)+1))
		t.Run(c.String(), func(t *testing.T) {
			newWorld(t, c, own).run(steps)
		})
	}
}
