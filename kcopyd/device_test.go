package kcopyd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cowherd/block"
)

var errInjected = errors.New("injected")

// ram is a device in memory that completes in Submit. It fails the test when a request does not fit it.
type ram struct {
	t        testing.TB
	data     []byte
	block    int   // LogicalBlock
	zeroMax  int64 // WriteZeroesMax
	zeroings atomic.Int64
}

func newRAM(t testing.TB, size int64) *ram { return &ram{t: t, data: make([]byte, size), block: 1} }

func (d *ram) Size() int64 { return int64(len(d.data)) }

func (d *ram) Limits() block.Limits {
	return block.Limits{LogicalBlock: d.block, PreferredIO: 4096, WriteZeroesMax: d.zeroMax}
}

func (d *ram) Submit(r *block.Request) {
	if err := block.CheckRange(r, d.Size(), d.Limits()); err != nil {
		d.t.Errorf("request that does not fit: %v", err)
		r.Complete(err)
		return
	}
	place := d.data[r.Offset:r.End()]
	switch r.Op {
	case block.OpRead:
		copy(r.Data, place)
	case block.OpWrite:
		copy(place, r.Data)
	case block.OpWriteZeroes:
		if r.Flags != 0 {
			d.t.Errorf("write zeroes with flags %#x", r.Flags)
		}
		d.zeroings.Add(1)
		clear(place)
	}
	r.Complete(nil)
}

// null is a device that completes in Submit and does nothing.
type null struct{}

func (null) Size() int64             { return 1 << 60 }
func (null) Limits() block.Limits    { return block.Limits{LogicalBlock: 1} }
func (null) Submit(r *block.Request) { r.Complete(nil) }

// hooked calls a function for each request, which hands it on or completes it.
type hooked struct {
	block.Device
	submit func(r *block.Request)
}

func (d *hooked) Submit(r *block.Request) { d.submit(r) }

// failing fails the requests that a function picks.
func failing(d block.Device, bad func(r *block.Request) bool) block.Device {
	return &hooked{d, func(r *block.Request) {
		if bad(r) {
			r.Complete(errInjected)
			return
		}
		d.Submit(r)
	}}
}

// async hands requests to goroutines, which pick any of those that wait, so that they complete elsewhere and out of
// order. With none it completes nothing until step is called.
type async struct {
	block.Device
	wg   sync.WaitGroup
	cond sync.Cond

	mu sync.Mutex
	// +checklocks:mu
	rng *rand.Rand
	// +checklocks:mu
	pending []*block.Request
	// +checklocks:mu
	closed bool
}

func newAsync(t testing.TB, d block.Device, workers int, seed uint64) *async {
	a := &async{Device: d, rng: rand.New(rand.NewPCG(seed, 1))}
	a.cond.L = &a.mu
	for range workers {
		a.wg.Go(func() {
			for a.step(true) {
			}
		})
	}
	t.Cleanup(a.close)
	return a
}

func (a *async) Submit(r *block.Request) {
	a.mu.Lock()
	a.pending = append(a.pending, r)
	a.mu.Unlock()
	a.cond.Signal()
}

// step completes one request; false when there is none and will be none, or, without wait, when there is none now.
func (a *async) step(wait bool) bool {
	a.mu.Lock()
	for wait && len(a.pending) == 0 && !a.closed {
		a.cond.Wait()
	}
	n := len(a.pending)
	if n == 0 {
		a.mu.Unlock()
		return false
	}
	i := a.rng.IntN(n)
	r := a.pending[i]
	a.pending[i] = a.pending[n-1]
	a.pending = a.pending[:n-1]
	a.mu.Unlock()
	a.Device.Submit(r)
	return true
}

func (a *async) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.pending)
}

func (a *async) close() {
	a.mu.Lock()
	a.closed = true
	a.mu.Unlock()
	a.cond.Broadcast()
	a.wg.Wait()
}

// testEngine is what both engines have.
type testEngine interface {
	Engine
	QueueJobs() []uint64
}

var engines = []struct {
	name string
	make func(Config) testEngine
}{
	{"scaled", func(c Config) testEngine { return NewScaled(c) }},
	{"serialised", func(c Config) testEngine { return NewSerialised(c) }},
}

// forEngines runs a test on each engine with shards for several CPUs, whatever the machine, and checks that the engine
// leaves nothing behind.
func forEngines(t *testing.T, c Config, test func(t *testing.T, e testEngine)) {
	for _, engine := range engines {
		t.Run(engine.name, func(t *testing.T) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(8))
			before := runtime.NumGoroutine()
			t.Cleanup(func() { checkGoroutines(t, before) }) // after the test's devices have been closed
			e := engine.make(c)
			test(t, e)
			closeClean(t, e)
		})
	}
}

// closeClean closes an engine and checks that nothing is left in it, and that its buffers are what the ceiling allows.
func closeClean(t *testing.T, e Engine) {
	t.Helper()
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if s := e.Stats(); s.BuffersInUse != 0 || s.JobsInFlight != 0 || s.JobsWaiting != 0 {
		t.Errorf("the closed engine has not given all back: %+v", s)
	}
	p := poolOf(e)
	p.mu.Lock()
	defer p.mu.Unlock()
	sum := p.room
	for i := range p.shards.Len() {
		sum += p.shards.Index(i).drop()
	}
	if p.room < 0 || sum != p.ceiling {
		t.Errorf("room for %d bytes, with the free buffers %d, below a ceiling of %d", p.room, sum, p.ceiling)
	}
}

// poolOf is the pool of an engine.
func poolOf(e Engine) *pool {
	switch e := e.(type) {
	case *Scaled:
		return &e.pool
	case *Serialised:
		return &e.pool
	}
	return nil
}

// checkGoroutines checks that no more goroutines run than before. Those that have ended in effect may take a moment
// to be gone.
func checkGoroutines(t *testing.T, before int) {
	for range 1000 {
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(time.Millisecond)
	}
	stacks := make([]byte, 1<<16)
	t.Errorf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, stacks[:runtime.Stack(stacks, true)])
}

// run runs a job to its end.
func run(e Engine, j *Job) {
	done := make(chan struct{})
	j.Done = func(*Job) { close(done) }
	e.Submit(j)
	<-done
}

// fill makes bytes of which no piece looks like another, and which are never 0 or sentinel.
//
// The race detector does not look: it would take as long for eight bytes as for a page. Areas are filled before others
// know them.
//
//go:norace
func fill(p []byte, rng *rand.Rand) {
	next := func() uint64 { return rng.Uint64()&0x7f7f7f7f7f7f7f7f | 0x0101010101010101 }
	for ; len(p) >= 8; p = p[8:] {
		binary.LittleEndian.PutUint64(p, next())
	}
	if len(p) > 0 {
		var last [8]byte
		binary.LittleEndian.PutUint64(last[:], next())
		copy(p, last[:])
	}
}

// blank fills p with sentinel.
func blank(p []byte) {
	if len(p) == 0 {
		return
	}
	p[0] = sentinel
	for done := 1; done < len(p); {
		done += copy(p[done:], p[:done])
	}
}

// sentinel is what destinations hold before a test.
const sentinel = 0xff

// all tells whether p is made of nothing but b.
func all(p []byte, b byte) bool { return bytes.Count(p, []byte{b}) == len(p) }

// yield lets others run.
func yield() { runtime.Gosched() }
