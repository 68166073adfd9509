package snapshot

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
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

// merging is an origin with snapshots, one of which is merged, and what everything must hold.
type merging struct {
	t      *testing.T
	rnd    *rand.Rand
	engine kcopyd.Engine

	ram, cowRAM *ram
	faults, cow *fault.Device
	asyncs      []*fault.Async
	origin      *Origin
	dev         *dm.Device // the origin's
	snap        *Snapshot
	snapDev     *dm.Device
	merge       *Merge
	view        []byte
	others      []*mergeOther
	failed      atomic.Int32
	finished    chan struct{}
}

// mergeOther is another snapshot of the origin.
type mergeOther struct {
	*Snapshot
	dev    *dm.Device
	ram    *ram
	frozen []byte
}

// newMerging makes an origin of size bytes with a snapshot to be merged, written to on both sides, and other snapshots
// taken before and after it.
func newMerging(t *testing.T, engine string, async bool, seed uint64, size int64, chunkSize cowstore.ChunkSize) *merging {
	g := &merging{t: t, rnd: rand.New(rand.NewPCG(seed, 0)), engine: newEngine(engine), ram: newRAM(size)}
	g.ram.lock = new(sync.Mutex)
	copy(g.ram.data, pattern(seed, size))
	g.faults = fault.New(g.below(g.ram, async))
	g.origin = NewOrigin(g.faults)
	g.dev = dm.NewDevice("origin", g.origin, false)
	g.takeOther(4 * kib)
	chunks := int64(chunkSize.ChunkCeil(size))
	g.cowRAM = newRAM((chunks + 3 + chunks/int64(chunkSize/16)) * int64(chunkSize))
	g.cowRAM.lock = new(sync.Mutex)
	g.cow = fault.New(g.below(g.cowRAM, async))
	store, err := cowstore.CreatePersistent(g.cow, chunkSize, cowstore.PersistentConfig{})
	if err != nil {
		t.Fatal(err)
	}
	g.view = append(g.view, g.ram.data...)
	g.snap = g.newSnap(Config{Name: "merged", COW: g.cow, Store: store})
	g.snapDev = dm.NewDevice("merged", g.snap, false)
	g.scribble(g.dev, 60, nil)
	g.scribble(g.snapDev, 60, g.view)
	g.takeOther(16 * kib)
	g.takeOther(64 * kib)
	g.scribble(g.dev, 20, nil)
	g.scribble(g.snapDev, 20, g.view)
	return g
}

func (g *merging) below(d block.Device, async bool) block.Device {
	if !async {
		return d
	}
	a := fault.NewAsync(d, 3, g.rnd.Uint64())
	g.asyncs = append(g.asyncs, a)
	return a
}

func (g *merging) newSnap(c Config) *Snapshot {
	c.Origin, c.Engine = g.origin, g.engine
	s, err := New(c)
	if err != nil {
		g.t.Fatal(err)
	}
	mustSuspend(g.t, g.dev)
	if err := g.origin.Add(s); err != nil {
		g.t.Fatal(err)
	}
	g.dev.Resume()
	return s
}

func (g *merging) takeOther(chunkSize cowstore.ChunkSize) {
	room := (int64(len(g.ram.data)) + int64(chunkSize)) / int64(chunkSize) * int64(chunkSize)
	x := &mergeOther{ram: newRAM(room), frozen: append([]byte(nil), g.ram.data...)}
	name := fmt.Sprint("other", len(g.others))
	x.Snapshot = g.newSnap(Config{Name: name, COW: x.ram, Store: cowstore.NewTransient(room, 0, chunkSize), ChunkSize: chunkSize})
	x.dev = dm.NewDevice(name, x.Snapshot, false)
	g.others = append(g.others, x)
}

// scribble does count random writes to d, and to its model.
func (g *merging) scribble(d block.Device, count int, model []byte) {
	g.t.Helper()
	for range count {
		c, data := g.draw(model)
		d.Submit(&c.r)
		c.want(g.t, nil)
		c.apply(model, data)
	}
}

// mergeCall is a request to the merged view.
type mergeCall struct {
	*call
	offset, end int64
}

// draw makes a random request for the view.
func (g *merging) draw(model []byte) (c *mergeCall, data []byte) {
	size := int64(len(g.ram.data))
	offset := g.rnd.Int64N(size/512) * 512
	length := min(size-offset, (1+g.rnd.Int64N([]int64{1, 16, 200}[g.rnd.IntN(3)]))*512)
	op := []block.Op{block.OpWrite, block.OpWrite, block.OpWriteZeroes, block.OpRead, block.OpFlush}[g.rnd.IntN(5)]
	if model == nil && op == block.OpRead {
		op = block.OpWrite
	}
	switch op {
	case block.OpWrite:
		data = pattern(g.rnd.Uint64(), length)
		return &mergeCall{newCall(op, block.Queue(g.rnd.IntN(4)), offset, length, data), offset, offset + length}, data
	case block.OpRead:
		return &mergeCall{newCall(op, 0, offset, length, make([]byte, length)), offset, offset + length}, nil
	case block.OpFlush:
		return &mergeCall{newCall(op, 0, 0, 0, nil), 0, 0}, nil
	}
	return &mergeCall{newCall(op, 1, offset, length, nil), offset, offset + length}, nil
}

// apply does to the model what a write did to the device.
func (c *mergeCall) apply(model, data []byte) {
	switch {
	case model == nil:
	case c.r.Op == block.OpWrite:
		copy(model[c.offset:], data)
	case c.r.Op == block.OpWriteZeroes:
		clear(model[c.offset:c.end])
	}
}

// begin puts the Merge in place, with batches of count records.
func (g *merging) begin(count int) {
	g.t.Helper()
	mustSuspend(g.t, g.dev, g.snapDev)
	g.origin.Remove(g.snap)
	g.finished = make(chan struct{})
	m, err := NewMerge(g.snap, MergeConfig{
		Failed:   func(error) { g.failed.Add(1) },
		Finished: func() { close(g.finished) },
	})
	if err != nil {
		g.t.Fatal(err)
	}
	m.records = m.records[:min(count, len(m.records))]
	g.merge = m
	for _, d := range []*dm.Device{g.dev, g.snapDev} {
		if err := d.SetTarget(m); err != nil {
			g.t.Fatal(err)
		}
		d.Resume()
	}
}

// batch does some requests at once, which do not conflict, and checks what they give.
func (g *merging) batch() {
	g.t.Helper()
	var calls []*mergeCall
	var written [][]byte
	for range 1 + g.rnd.IntN(6) {
		c, data := g.draw(g.view)
		for _, d := range calls {
			if c.offset < d.end && d.offset < c.end {
				c = nil
				break
			}
		}
		if c != nil {
			calls, written = append(calls, c), append(written, data)
		}
	}
	for _, c := range calls {
		d := g.dev
		if g.rnd.IntN(2) == 0 {
			d = g.snapDev
		}
		d.Submit(&c.r)
	}
	for i, c := range calls {
		c.want(g.t, nil)
		if c.r.Op == block.OpRead {
			same(g.t, c.r.Data, g.view[c.offset:c.end])
		}
		c.apply(g.view, written[i])
	}
}

// check compares everything with the models.
func (g *merging) check() {
	g.t.Helper()
	got := make([]byte, len(g.view))
	for _, d := range []*dm.Device{g.dev, g.snapDev} {
		if err := block.Read(d, got, 0); err != nil {
			g.t.Fatal(err)
		}
		same(g.t, got, g.view)
	}
	for _, x := range g.others {
		if err := block.Read(x.dev, got, 0); err != nil {
			g.t.Fatal(err)
		}
		same(g.t, got, x.frozen)
	}
}

// close checks what is left, and stops what runs.
func (g *merging) close() {
	g.t.Helper()
	g.merge.Stop()
	mustSuspend(g.t, g.dev, g.snapDev)
	if err := errors.Join(g.engine.Close(), g.snap.Close()); err != nil {
		g.t.Error(err)
	}
	for _, a := range g.asyncs {
		a.Close()
	}
}

// TestMergeModel reads and writes the view while it is merged, stopped and started, and compares all with models.
func TestMergeModel(t *testing.T) {
	from := seed(t)
	for _, async := range []bool{false, true} {
		for _, engine := range engineNames {
			for _, chunkSize := range []cowstore.ChunkSize{4 * kib, 16 * kib} {
				t.Run(fmt.Sprintf("async=%v,engine=%s,chunk=%d", async, engine, chunkSize), func(t *testing.T) {
					worlds := uint64(6)
					if invariant.Enabled {
						worlds = 1
					}
					for i := range worlds {
						runMerge(t, newMerging(t, engine, async, from+i, 1<<20+77*512, chunkSize))
					}
				})
			}
		}
	}
}

func runMerge(t *testing.T, g *merging) {
	g.begin(1 + g.rnd.IntN(100))
	for range 20 {
		g.batch()
	}
	g.check()
	for range 120 {
		switch g.rnd.IntN(6) {
		case 0:
			g.merge.Start()
		case 1:
			g.merge.Stop()
			g.check()
		default:
			g.batch()
		}
	}
	g.merge.Start()
	<-g.finished
	g.check()
	g.merge.Stop()
	if merged, total := g.merge.Progress(); merged != total || total == 0 || !g.merge.Finished() {
		t.Errorf("%d of %d chunks are merged", merged, total)
	}
	for range 5 {
		g.batch() // it is the origin now
	}
	g.check()
	same(t, g.ram.data, g.view)
	g.close()
	p, err := cowstore.OpenPersistent(g.cowRAM, cowstore.PersistentConfig{})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Load(0, func(cowstore.Record) bool { t.Error("a record is left"); return true }); err != nil {
		t.Error(err)
	}
	if a, _, b := p.Usage(); a != b {
		t.Errorf("%d sectors allocated, %d of metadata", a, b)
	}
}

// TestMergeFails: after an error of either device the view is right, and the merge goes on when it is started again.
func TestMergeFails(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		for name, op := range map[string]block.Op{"origin": block.OpWrite, "flush": block.OpFlush, "read": block.OpRead, "erase": block.OpWrite} {
			t.Run(name, func(t *testing.T) {
				g := newMerging(t, engine, false, 7, 1<<20, 4*kib)
				g.begin(20)
				on := g.faults
				if name == "read" || name == "erase" {
					on = g.cow
				}
				on.Fail(failing(func(r *block.Request) bool { return r.Op == op }, errInjected))
				g.merge.Start()
				eventually(t, "the merge fails", func() bool { return g.failed.Load() == 1 && !g.merge.Running() })
				on.Fail(nil)
				if g.merge.Status() != "Merge failed" || !errors.Is(g.merge.Err(), errInjected) {
					t.Errorf("status %q, error %v", g.merge.Status(), g.merge.Err())
				}
				g.check()
				if name == "erase" {
					g.wantRefused()
				} else {
					for range 30 {
						g.batch()
					}
				}
				g.merge.Start()
				<-g.finished
				g.check()
				same(t, g.ram.data, g.view)
				g.close()
			})
		}
	})
}

// wantRefused: chunks whose records may or may not be there take no writes.
func (g *merging) wantRefused() {
	g.t.Helper()
	refused, done := 0, 0
	for offset := int64(0); offset < int64(len(g.view)); offset += 4 * kib {
		data := pattern(uint64(offset), 4*kib)
		err := block.Write(g.dev, data, offset)
		switch {
		case err == nil:
			done++
			copy(g.view[offset:], data)
		case errors.Is(err, syscall.EIO):
			refused++
		default:
			g.t.Fatal(err)
		}
	}
	if refused != 20 || done == 0 {
		g.t.Errorf("%d writes were refused, %d done", refused, done)
	}
}

func TestNewMergeErrors(t *testing.T) {
	g := newMerging(t, "scaled", false, 3, 1<<20, 4*kib)
	if _, err := NewMerge(g.others[0].Snapshot, MergeConfig{}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("a transient snapshot: %v", err)
	}
	if _, err := NewMerge(g.snap, MergeConfig{}); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("a snapshot that is still in use: %v", err)
	}
	mustSuspend(t, g.dev, g.snapDev)
	g.origin.Remove(g.snap)
	g.snap.invalidate(errInjected)
	if _, err := NewMerge(g.snap, MergeConfig{}); !errors.Is(err, syscall.EIO) {
		t.Errorf("an invalid snapshot: %v", err)
	}
	if err := errors.Join(g.engine.Close(), g.snap.Close(), g.snapDev.Close(context.Background())); err != nil {
		t.Error(err)
	}
}

// TestMergeFromLargerBlocks: requests that do not fit the COW device's logical block are refused where they concern it.
func TestMergeFromLargerBlocks(t *testing.T) {
	g := newMerging(t, "scaled", false, 11, 1<<20, 4*kib)
	g.cowRAM.limits.LogicalBlock = 512
	g.begin(20)
	on, off := int64(-1), int64(-1) // chunks that are on the COW device, and not
	for chunk := range cowstore.Chunk(256) {
		if g.snap.lookup(chunk).readable() {
			on = int64(chunk) * 4 * kib
		} else {
			off = int64(chunk) * 4 * kib
		}
	}
	start(g.dev, block.OpWrite, 0, on+1, []byte("x")).want(t, syscall.EINVAL)
	start(g.dev, block.OpRead, 0, on+1, make([]byte, 1)).want(t, syscall.EINVAL)
	start(g.dev, block.OpRead, 0, on, make([]byte, 512)).wantData(t, g.view[on:on+512])
	start(g.dev, block.OpWrite, 0, off+1, []byte("x")).want(t, nil)
	g.view[off+1] = 'x'
	g.check()
	g.merge.Start()
	<-g.finished
	start(g.dev, block.OpWrite, 0, on+1, []byte("y")).want(t, nil)
	g.view[on+1] = 'y'
	g.check()
	g.close()
}
