package demo

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"cowherd/backend/nbd"
	"cowherd/block"
)

// A stamp fills a block that was written:
//
//	1 bit      the write was issued after the snapshot had been taken
//	31 bits    which write of this block it is, from 1
//	32 bits    the block's number
type stamp uint64

const sequenceMask = 1<<31 - 1

func makeStamp(later bool, sequence uint32, number int) stamp {
	s := stamp(sequence)<<32 | stamp(uint32(number))
	if later {
		s |= 1 << 63
	}
	return s
}

func (s stamp) later() bool      { return s>>63 != 0 }
func (s stamp) sequence() uint32 { return uint32(s>>32) & sequenceMask }

// fill writes s all over p.
func (s stamp) fill(p []byte) {
	binary.LittleEndian.PutUint64(p, uint64(s))
	for done := 8; done < len(p); done *= 2 {
		copy(p[done:], p[:done])
	}
}

// stampOf reads the stamp that p, block number i, was filled with; false when it was not.
func stampOf(i int, p []byte) (stamp, bool) {
	s := stamp(binary.LittleEndian.Uint64(p))
	return s, s.sequence() > 0 && uint32(s) == uint32(i) && isUniform(p)
}

// writers write to the whole image, over one connection each.
type writers struct {
	all   []*writer
	later atomic.Bool  // what stamps say
	count atomic.Int64 // writes acknowledged
	fail  func(error)  // told of each failed write
}

// writer owns the blocks from first on. It writes to random ones, and never to one that it is writing to.
type writer struct {
	group  *writers
	device block.Device
	queue  block.Queue
	first  int

	mu       sync.Mutex
	rand     *rand.Rand // +checklocks:mu
	issued   []uint32   // +checklocks:mu
	acked    []uint32   // +checklocks:mu
	idle     []*op      // +checklocks:mu
	inflight int        // +checklocks:mu
	held     bool       // +checklocks:mu
	drained  *sync.Cond // +checklocks:mu
}

// op is a request of a writer. While it is in flight its block is one whose issued and acked differ.
type op struct {
	r     block.Request
	owner *writer
	index int // of the block among the writer's
	data  []byte
}

// newWriters makes writers that hold still until release is called.
func newWriters(d *nbd.Device, blocks, count, depth int, fail func(error)) *writers {
	w := &writers{fail: fail}
	for i := range count {
		first, end := i*blocks/count, (i+1)*blocks/count
		one := &writer{
			group: w, device: d, queue: block.Queue(i), first: first, held: true,
			rand: rand.New(rand.NewPCG(uint64(i), 3)), issued: make([]uint32, end-first), acked: make([]uint32, end-first),
		}
		one.drained = sync.NewCond(&one.mu)
		for range min(depth, end-first) {
			one.idle = append(one.idle, &op{owner: one, data: make([]byte, blockSize)})
		}
		w.all = append(w.all, one)
	}
	return w
}

// hold makes the writers hold still and waits until nothing is in flight.
func (w *writers) hold() {
	for _, one := range w.all {
		one.mu.Lock()
		one.held = true
		one.mu.Unlock()
	}
	for _, one := range w.all {
		one.mu.Lock()
		for one.inflight > 0 {
			one.drained.Wait()
		}
		one.mu.Unlock()
	}
}

// release lets the writers go on.
func (w *writers) release() {
	for _, one := range w.all {
		one.mu.Lock()
		one.held = false
		start := one.idle
		one.idle = nil
		one.mu.Unlock()
		for _, o := range start {
			o.next()
		}
	}
}

// acknowledged is how many writes of each block have been acknowledged by now.
func (w *writers) acknowledged() []uint32 {
	var all []uint32
	for _, one := range w.all {
		one.mu.Lock()
		all = append(all, one.acked...)
		one.mu.Unlock()
	}
	return all
}

// wrote waits until the writers have run for a time and written a part of all blocks since.
func (w *writers) wrote(ctx context.Context, atLeast time.Duration, writes int64) error {
	goal := w.count.Load() + writes
	tick := time.NewTicker(min(atLeast, 10*time.Millisecond))
	defer tick.Stop()
	for begun := time.Now(); time.Since(begun) < atLeast || w.count.Load() < goal; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// next begins the op's next write, unless the writer holds still.
func (o *op) next() {
	w := o.owner
	w.mu.Lock()
	if w.held {
		w.idle = append(w.idle, o)
		w.mu.Unlock()
		return
	}
	o.index = w.rand.IntN(len(w.issued))
	for w.issued[o.index] != w.acked[o.index] {
		o.index = (o.index + 1) % len(w.issued)
	}
	w.issued[o.index]++
	sequence := w.issued[o.index]
	w.inflight++
	w.mu.Unlock()
	number := w.first + o.index
	makeStamp(w.group.later.Load(), sequence, number).fill(o.data)
	o.r.Op, o.r.Queue, o.r.Data = block.OpWrite, w.queue, o.data
	o.r.Offset, o.r.Length = int64(number)*blockSize, blockSize
	o.r.Push(o)
	w.device.Submit(&o.r)
}

// Complete notes the acknowledgement and begins the next write. A writer whose write fails holds still for good.
func (o *op) Complete(_ *block.Request, err error) {
	w := o.owner
	if err != nil {
		w.group.fail(fmt.Errorf("a writer: %w", err))
	}
	w.mu.Lock()
	w.held = w.held || err != nil
	w.acked[o.index] = w.issued[o.index]
	w.inflight--
	if w.inflight == 0 {
		w.drained.Broadcast()
	}
	w.mu.Unlock()
	w.group.count.Add(1)
	o.next()
}

// run writes each block of a list once, as fast as it goes: what the table is made of.
type run struct {
	mu       sync.Mutex
	offsets  []uint32 // +checklocks:mu
	inflight int      // +checklocks:mu
	err      error    // +checklocks:mu
	done     chan struct{}

	device block.Device
	queue  block.Queue
	ops    []runOp
}

type runOp struct {
	r   block.Request
	run *run
}

func newRun(d block.Device, queue block.Queue, depth int) *run {
	x := &run{device: d, queue: queue, ops: make([]runOp, depth)}
	for i := range x.ops {
		o := &x.ops[i]
		o.run, o.r.Data = x, make([]byte, blockSize)
		makeStamp(true, uint32(i+1), i).fill(o.r.Data)
	}
	return x
}

// start begins to write the blocks of offsets; done is closed at the end.
func (x *run) start(offsets []uint32) {
	x.mu.Lock()
	x.offsets, x.inflight, x.done = offsets, len(x.ops), make(chan struct{})
	x.mu.Unlock()
	for i := range x.ops {
		x.ops[i].next()
	}
}

// wait waits for the end.
func (x *run) wait() error {
	<-x.done
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.err
}

func (o *runOp) next() {
	x := o.run
	x.mu.Lock()
	if len(x.offsets) == 0 || x.err != nil {
		x.inflight--
		last := x.inflight == 0
		x.mu.Unlock()
		if last {
			close(x.done)
		}
		return
	}
	o.r.Offset = int64(x.offsets[0]) * blockSize
	x.offsets = x.offsets[1:]
	x.mu.Unlock()
	o.r.Op, o.r.Queue, o.r.Length = block.OpWrite, x.queue, blockSize
	o.r.Push(o)
	x.device.Submit(&o.r)
}

// Complete goes on with the next block.
func (o *runOp) Complete(_ *block.Request, err error) {
	if err != nil {
		o.run.mu.Lock()
		o.run.err = err
		o.run.mu.Unlock()
	}
	o.next()
}

// shuffled is the numbers below n in a random order that depends on seed only.
func shuffled(n int, seed uint64) []uint32 {
	list := make([]uint32, n)
	for i := range list {
		list[i] = uint32(i)
	}
	rand.New(rand.NewPCG(seed, 4)).Shuffle(n, func(i, j int) { list[i], list[j] = list[j], list[i] })
	return slices.Clip(list)
}
