package snapshot

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/dm"
	"cowherd/internal/fault"
	"cowherd/internal/invariant"
	"cowherd/kcopyd"
)

// The soak test writes to an origin from many goroutines while snapshots of it are taken, read, written and dropped
// all the time. The devices are plain memory: under the race detector a write to the origin that is let through before
// a copy or a tracked read has ended is a data race, and so is any use of a COW device after its snapshot was dropped,
// even if the bytes happen to be right.
//
// That a snapshot becomes invalid is another matter: from then on writes to the origin need not wait for what is in
// flight in it, which is why that fails. So it is tested apart, over memory with a lock.

const (
	soakStripe  = 11 * unit // bytes that belong to one goroutine; several share a chunk
	soakStripes = 120
	soakSize    = soakStripes*soakStripe - 100
	soakWriters = 6
	soakUsers   = 3 // of each snapshot
)

// TestClaims: goroutines write to the same chunk at the same moment, again and again. Each chunk is copied once.
func TestClaims(t *testing.T) {
	const goroutines = 2
	chunks := 20_000
	if invariant.Enabled {
		chunks = 5_000 // the race detector sees a race without its doing harm
	}
	size := int64(chunks) * 4 * kib
	forEachEngine(t, func(t *testing.T, engine string) {
		e := newEngine(engine)
		origin := NewOrigin(newRAM(size))
		s, err := New(Config{
			Origin: origin, COW: newRAM(size), Store: cowstore.NewTransient(size, 0, 4*kib), ChunkSize: 4 * kib, Engine: e,
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := origin.Add(s); err != nil {
			t.Fatal(err)
		}
		dev := dm.NewDevice("origin", origin, false)
		var all sync.WaitGroup
		var arrived atomic.Int64
		for i := range goroutines {
			all.Go(func() {
				c := &call{done: make(chan error, 1)}
				for chunk := range int64(chunks) {
					arrived.Add(1)
					for arrived.Load() < (chunk+1)*goroutines {
						runtime.Gosched()
					}
					at := chunk*4*kib + int64(i)
					if err := c.do(dev, block.OpWrite, block.Queue(i), at, at+1, []byte{1}); err != nil {
						t.Error(err)
					}
				}
			})
		}
		all.Wait()
		if st := s.Status(); st.Allocated != block.SectorFloor(size) || st.Invalid != nil {
			t.Errorf("%v: %d sectors are allocated, want %d", st.Invalid, st.Allocated, block.SectorFloor(size))
		}
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
}

// soak is an origin under load.
type soak struct {
	t      *testing.T
	config worldConfig
	// Snapshots may become invalid.
	breaking bool
	rnd      *rand.Rand // the taker's
	engine   kcopyd.Engine
	ram      *sparseRAM
	async    *fault.Async // nil: none
	origin   *Origin
	dev      *dm.Device
	model    []byte // each stripe is its writer's
	stop     atomic.Bool
	writes   atomic.Int64
	users    sync.WaitGroup
	snaps    []*soakSnap
	taken    int

	invalid int // snapshots that became invalid
}

type soakSnap struct {
	*Snapshot
	dev           *dm.Device
	ram           *ram
	async         *fault.Async
	model         []byte // what it must hold; each stripe is its user's when it is written
	writable      bool
	users         sync.WaitGroup
	uses          atomic.Int64
	unsure        atomic.Bool // a write failed half way
	invalidations atomic.Int32
}

func TestSoak(t *testing.T) { testSoak(t, false) }

// TestSoakBreaking is the same with snapshots that run out of room or whose COW device fails.
func TestSoakBreaking(t *testing.T) { testSoak(t, true) }

func testSoak(t *testing.T, breaking bool) {
	from := seed(t)
	for _, config := range worldConfigs() {
		t.Run(config.String(), func(t *testing.T) {
			runSoak(t, config, breaking, from)
		})
	}
}

// runSoak runs one soak. When snapshots may break it goes on until one has, which is left to chance.
func runSoak(t *testing.T, config worldConfig, breaking bool, from uint64) {
	const roundsMost = 200
	rounds := 30
	if invariant.Enabled {
		rounds = 8
	}
	k := &soak{t: t, config: config, breaking: breaking, rnd: rand.New(rand.NewPCG(from, 1)), engine: newEngine(config.engine)}
	k.ram = newSparseRAM(soakSize)
	if breaking {
		k.ram.lock = new(sync.Mutex)
	}
	var below block.Device = k.ram
	if config.async {
		k.async = fault.NewAsync(k.ram, 3, from)
		below = k.async
	}
	k.origin = NewOrigin(withExtents{below, k.ram})
	k.dev = dm.NewDevice("origin", k.origin, false)
	k.model = make([]byte, soakSize)
	for i := range soakWriters {
		rnd := rand.New(rand.NewPCG(from, uint64(i)+100))
		k.users.Go(func() { k.write(i, rnd) })
	}
	for n := 0; n < rounds || breaking && k.invalid == 0 && n < roundsMost; n++ {
		k.take()
		k.settle()
		for len(k.snaps) > k.rnd.IntN(4) {
			k.drop(k.rnd.IntN(len(k.snaps)))
		}
	}
	for len(k.snaps) > 0 {
		k.drop(0)
	}
	k.finish()
}

// settle lets everybody work for a while.
func (k *soak) settle() {
	goals := map[*soakSnap]int64{}
	for _, x := range k.snaps {
		goals[x] = x.uses.Load() + 30
	}
	writes := k.writes.Load() + 100
	eventually(k.t, "the writers get on", func() bool { return k.writes.Load() >= writes || k.t.Failed() })
	for x, goal := range goals {
		eventually(k.t, "the users of a snapshot get on", func() bool {
			return x.uses.Load() >= goal || x.invalidCause() != nil || x.unsure.Load() || k.t.Failed()
		})
	}
	if k.t.Failed() {
		k.t.FailNow()
	}
}

// finish stops the writers and checks what is left.
func (k *soak) finish() {
	k.stop.Store(true)
	k.users.Wait()
	if !bytes.Equal(k.ram.data, k.model) {
		k.t.Error("the origin is not what was written to it")
	}
	if err := k.engine.Close(); err != nil {
		k.t.Error(err)
	}
	if st := k.engine.Stats(); st.BuffersInUse != 0 || st.JobsInFlight != 0 || st.JobsWaiting != 0 {
		k.t.Errorf("engine: %+v", st)
	}
	if k.async != nil {
		k.async.Close()
	}
	if (k.invalid > 0) != k.breaking {
		k.t.Errorf("%d of %d snapshots became invalid", k.invalid, k.taken)
	}
	k.t.Logf("%d snapshots, %d of them became invalid; %d writes to the origin", k.taken, k.invalid, k.writes.Load())
}

// soakFill stamps p, which is at offset, so that stamp and place can be told from any eight bytes.
func soakFill(p []byte, offset int64, stamp uint64) {
	var word [8]byte
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(word[:], (stamp<<24|uint64(offset+int64(i)))*0x9e3779b97f4a7c15)
		copy(p[i:], word[:])
	}
}

// within draws a range in one of the stripes that belong to user i of n; often the whole stripe.
func within(rnd *rand.Rand, i, n int) (start, end int64) {
	stripe := int64(rnd.IntN(soakStripes/n)*n+i) * soakStripe
	if rnd.IntN(3) == 0 {
		return stripe, min(stripe+soakStripe, soakSize)
	}
	start = stripe + rnd.Int64N(soakStripe-200)
	return start, min(start+1+rnd.Int64N(stripe+soakStripe-start), soakSize)
}

// do runs one request to its end.
func (c *call) do(d block.Device, op block.Op, queue block.Queue, start, end int64, data []byte) error {
	c.r.Reset()
	c.r.Op, c.r.Queue, c.r.Offset, c.r.Length, c.r.Data = op, queue, start, end-start, data
	c.r.Push(c)
	d.Submit(&c.r)
	return <-c.done
}

// write is a writer of the origin: it owns every stripe whose number is i modulo soakWriters.
func (k *soak) write(i int, rnd *rand.Rand) {
	c := &call{done: make(chan error, 1)}
	buf := make([]byte, soakStripe)
	for n := uint64(1); !k.stop.Load(); n++ {
		start, end := within(rnd, i, soakWriters)
		p := buf[:end-start]
		var err error
		switch rnd.IntN(8) {
		case 0:
			if err = c.do(k.dev, block.OpRead, block.Queue(i), start, end, p); !bytes.Equal(p, k.model[start:end]) {
				k.t.Errorf("origin: wrong data in [%d, %d)", start, end)
			}
		case 1:
			err = c.do(k.dev, block.OpWriteZeroes, block.Queue(i), start, end, nil)
			clear(k.model[start:end])
		default:
			soakFill(p, start, n)
			copy(k.model[start:], p)
			err = c.do(k.dev, block.OpWrite, block.Queue(rnd.IntN(4)), start, end, p)
		}
		if err != nil {
			k.t.Errorf("origin: %v", err)
			return
		}
		k.writes.Add(1)
		runtime.Gosched() // with devices that complete at once, nobody else would run for long
	}
}

// take takes a snapshot and sets its users to work.
func (k *soak) take() {
	chunkSize := cowstore.ChunkSize(4*kib) << k.rnd.IntN(6)
	chunks := int64(chunkSize.ChunkCeil(soakSize))
	limit := int64(0)
	if k.breaking && k.rnd.IntN(3) == 0 {
		limit = (1 + k.rnd.Int64N(chunks)) * int64(chunkSize)
		if k.config.persistent {
			chunks, limit = limit/int64(chunkSize), 0
		}
	}
	x := &soakSnap{
		ram:      newRAM(k.config.room(int(chunks), chunkSize) * int64(chunkSize)),
		writable: k.rnd.IntN(2) == 0,
	}
	faults := fault.New(x.ram)
	var cow block.Device = faults
	if k.config.async {
		x.async = fault.NewAsync(faults, 2, k.rnd.Uint64())
		cow = x.async
	}
	store := k.config.store(k.t, cow, limit, chunkSize)
	if k.breaking && k.rnd.IntN(3) == 0 {
		left := k.rnd.IntN(200)
		faults.Fail(func(r *block.Request) error {
			if left--; left < 0 && r.Op.Writes() {
				return errInjected
			}
			return nil
		})
	}
	s, err := New(Config{
		Name: fmt.Sprint("snap", k.taken), Origin: k.origin, COW: cow, ChunkSize: chunkSize, Engine: k.engine,
		Store:       store,
		PendingMax:  k.config.pendingMax,
		Invalidated: func(error) { x.invalidations.Add(1) },

		DiscardZeroesCOW: true,
	})
	if err != nil {
		k.t.Fatal(err)
	}
	x.Snapshot, x.dev = s, dm.NewDevice(s.name, s, false)
	mustSuspend(k.t, k.dev)
	x.model = bytes.Clone(k.ram.data)
	if err := k.origin.Add(s); err != nil {
		k.t.Fatal(err)
	}
	k.dev.Resume()
	k.snaps = append(k.snaps, x)
	k.taken++
	for i := range soakUsers {
		rnd := rand.New(rand.NewPCG(k.rnd.Uint64(), uint64(i)))
		x.users.Go(func() { k.use(x, i, rnd) })
	}
}

// use reads a snapshot, and writes it if it is writable, until it is removed or invalid.
func (k *soak) use(x *soakSnap, i int, rnd *rand.Rand) {
	c := &call{done: make(chan error, 1)}
	buf := make([]byte, 64*kib)
	for n := uint64(1) << 32; ; n++ {
		err := k.useOnce(x, c, i, n, rnd, buf)
		switch {
		case err == nil:
			x.uses.Add(1)
			runtime.Gosched()
		case errors.Is(err, syscall.ESHUTDOWN):
			return
		case x.invalidCause() != nil:
			if !errors.Is(err, errEIO) {
				k.t.Errorf("%s is invalid: %v", x.name, err)
			}
			k.useInvalid(x, c, rnd, buf)
			return
		default:
			// A write to the COW device failed that was no part of a copy.
			if !errors.Is(err, errInjected) {
				k.t.Errorf("%s: %v", x.name, err)
			}
			x.unsure.Store(true)
			return
		}
	}
}

// useOnce does one operation: in its own stripes if the snapshot is writable, else anywhere.
func (k *soak) useOnce(x *soakSnap, c *call, i int, n uint64, rnd *rand.Rand, buf []byte) error {
	queue := block.Queue(rnd.IntN(4))
	start, end := within(rnd, i, soakUsers)
	op := block.OpRead
	switch {
	case x.writable && rnd.IntN(2) == 0:
		op = block.OpWrite
	case x.writable && rnd.IntN(5) == 0:
		op = block.OpWriteZeroes
	case x.writable && rnd.IntN(5) == 0:
		// What it reads as now is not known; so it is written at once.
		if err := c.do(x.dev, block.OpDiscard, queue, start, end, nil); err != nil {
			return err
		}
		op = block.OpWrite
	case !x.writable && rnd.IntN(3) == 0:
		start = rnd.Int64N(soakSize)
		end = min(start+rnd.Int64N(int64(len(buf))), soakSize)
	}
	p := buf[:end-start]
	switch op {
	case block.OpWrite:
		soakFill(p, start, n)
		copy(x.model[start:], p)
		return c.do(x.dev, op, queue, start, end, p)
	case block.OpWriteZeroes:
		clear(x.model[start:end])
		return c.do(x.dev, op, queue, start, end, nil)
	}
	if rnd.IntN(8) == 0 {
		return k.useExtents(x, start, end)
	}
	err := c.do(x.dev, op, queue, start, end, p)
	if at := differs(p, x.model[start:end]); err == nil && at >= 0 {
		k.t.Errorf("%s, chunks of %d: byte %d is not what was frozen", x.name, x.chunkSize, start+int64(at))
	}
	return err
}

// useExtents checks that what is reported as zeroes was frozen as zeroes.
func (k *soak) useExtents(x *soakSnap, start, end int64) error {
	next := start
	err := x.dev.Extents(start, end-start, func(e block.Extent) bool {
		if e.Offset != next {
			k.t.Errorf("%s: extent at %d, want one at %d", x.name, e.Offset, next)
		}
		next = e.Offset + e.Length
		if e.Zero && bytes.Count(x.model[e.Offset:next], []byte{0}) != int(e.Length) {
			k.t.Errorf("%s: the extent %+v is not zero", x.name, e)
		}
		return true
	})
	if err == nil && next != end {
		k.t.Errorf("%s: the extents end at %d, want %d", x.name, next, end)
	}
	return err
}

// useInvalid checks that an invalid snapshot serves nothing any more.
func (k *soak) useInvalid(x *soakSnap, c *call, rnd *rand.Rand, buf []byte) {
	for range 20 {
		op := []block.Op{block.OpRead, block.OpWrite}[rnd.IntN(2)]
		err := c.do(x.dev, op, 0, 0, 512, buf[:512])
		if errors.Is(err, syscall.ESHUTDOWN) {
			return
		}
		if !errors.Is(err, errEIO) {
			k.t.Errorf("%s is invalid: %v gave %v", x.name, op, err)
		}
		runtime.Gosched()
	}
}

// drop removes a snapshot in the middle of everything.
func (k *soak) drop(i int) {
	x := k.snaps[i]
	k.snaps = append(k.snaps[:i:i], k.snaps[i+1:]...)
	first, second := k.dev, x.dev
	if k.rnd.IntN(2) == 0 {
		first, second = second, first
	}
	mustSuspend(k.t, first, second)
	k.origin.Remove(x.Snapshot)
	k.verify(x)
	k.dev.Resume()
	if err := x.dev.Close(context.Background()); err != nil {
		k.t.Fatal(err)
	}
	x.users.Wait()
	if err := x.Close(); err != nil {
		k.t.Error(err)
	}
	fill(x.ram.data, 0xEE) // a data race, if anybody still uses it
	eventually(k.t, "all exceptions are idle", func() bool { return x.exceptions.inUse() == 0 })
	want := int32(0)
	if x.invalidCause() != nil {
		want = 1
		k.invalid++
	}
	eventually(k.t, "Invalidated was called as often as it should", func() bool { return x.invalidations.Load() == want })
	if x.async != nil {
		x.async.Close()
	}
}

// verify looks at a suspended snapshot from inside: nothing is pending, and every chunk is where its slot says.
func (k *soak) verify(x *soakSnap) {
	if !x.reads.none() {
		k.t.Errorf("%s: reads are tracked while it is suspended", x.name)
	}
	if x.invalidCause() != nil || x.unsure.Load() {
		return
	}
	if x.writable {
		// Writes that were kept at the gate are in the model, but will fail: look at what cannot have been written.
		k.verifyStates(x)
		return
	}
	k.verifyStates(x)
	for start := int64(0); start < soakSize; {
		end := min(start+int64(x.chunkSize), soakSize)
		got := k.ram.data[start:end]
		if v := x.lookup(x.chunkOf(start)); v.readable() {
			at := x.chunkSize.Offset(v.chunk())
			got = x.ram.data[at : at+end-start]
		}
		if at := differs(got, x.model[start:end]); at >= 0 {
			k.t.Errorf("%s: at its end byte %d is not what was frozen", x.name, start+int64(at))
		}
		start = end
	}
}

// verifyStates checks that no chunk is on its way, and that no two lie at the same place.
func (k *soak) verifyStates(x *soakSnap) {
	places := map[cowstore.Chunk]cowstore.Chunk{}
	for chunk := range x.chunkSize.ChunkCeil(soakSize) {
		v := x.lookup(chunk)
		if v.state() != none && v.state() != copied {
			k.t.Errorf("%s: chunk %d is in state %d while it is suspended", x.name, chunk, v.state())
		}
		if v.state() != copied {
			continue
		}
		if other, ok := places[v.chunk()]; ok {
			k.t.Errorf("%s: chunks %d and %d are both at %d", x.name, chunk, other, v.chunk())
		}
		places[v.chunk()] = chunk
	}
}
