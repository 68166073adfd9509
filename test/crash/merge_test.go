package crash

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/internal/fault"
	"cowherd/kcopyd"
)

// mergeCases are the runs of TestMerge. The other snapshot has chunks of 4 KiB.
var mergeCases = []struct {
	name string
	config
}{
	{"areas", config{mode: now, chunk: 1 << 10, origin: 200 << 10, room: 215, logical: 512, width: 6, steps: 12}},
	{"areas,parallel", config{mode: parallel, chunk: 1 << 10, origin: 200 << 10, room: 215, logical: 512, width: 6, steps: 12}},
	{"areas,late", config{mode: late, chunk: 1 << 10, origin: 200 << 10, room: 215, logical: 512, width: 10, steps: 12}},
	{"sector,late", config{mode: late, chunk: 512, origin: 100 << 10, room: 215, logical: 512, width: 10, steps: 12}},
	{"4k", config{mode: now, chunk: 4 << 10, origin: 60 << 12, room: 70, logical: 512, width: 6, steps: 12, plain: true}},
	// More than is merged in one batch.
	{"batches", config{mode: now, chunk: 4 << 10, origin: 1110 << 12, room: 1130, logical: 512, width: 6, steps: 4,
		prefill: 1100 << 12, sparse: 12, generations: 2}},
	{"16k,late", config{mode: late, chunk: 16 << 10, origin: 30 << 14, room: 40, logical: 512, width: 10, steps: 10}},
	{"bytes,late", config{mode: late, chunk: 2 << 10, origin: 100<<11 + 777, room: 110, logical: 1, width: 10, steps: 12}},
}

// TestMerge crashes merges of a persistent snapshot into its origin, while both are written and another snapshot of the
// origin is there. After each crash the merge goes on: in the end the origin is the merged view, and the other snapshot
// what it was.
func TestMerge(t *testing.T) {
	eachSeed(t, func(t *testing.T, seed uint64) {
		for _, test := range mergeCases {
			t.Run(test.name, func(t *testing.T) {
				t.Parallel()
				repeatable(t, seed, test.runMerges(t, seed))
			})
		}
	})
}

// What a run with a merge marks, beside what others do.
type (
	// merging: from here on the origin is what the snapshot was.
	merging struct{}
	// finishing: the snapshot is about to be dropped.
	finishing struct{}
	// merged: it is gone.
	merged struct{}
)

// otherChunk is the chunk size of the other snapshot.
const otherChunk = 4 << 10

// mergeStart is what a run begins with.
type mergeStart struct {
	origin, cow, other []byte
	// What a merge that goes on has to give, and the other snapshot; nil: the run begins with the snapshots.
	merged, frozen []byte
}

// mergeRun is a run with a merge.
type mergeRun struct {
	runner
	start              mergeStart
	origin, cow, other *fault.Disk
	finished           chan error
}

func newMergeRun(c *config, random *rand.Rand, stamp *uint64, s mergeStart) *mergeRun {
	g := &mergeRun{runner: newRunner(c, random, stamp), start: s, finished: make(chan error, 1)}
	g.origin, g.cow, g.other = g.disk("origin", s.origin), g.disk("cow", s.cow), g.disk("other", s.other)
	return g
}

// firstMergeStart is an origin, and two COW devices of which the first has an empty store.
func firstMergeStart(c *config, random *rand.Rand) mergeStart {
	s := mergeStart{origin: make([]byte, c.origin), cow: stale(random, c)}
	fill(s.origin, math.MaxUint64)
	empty(s.cow, c.chunk)
	s.other = make([]byte, int64(cowstore.ChunkSize(otherChunk).ChunkCeil(c.origin)+3)*otherChunk)
	return s
}

func (g *mergeRun) run() error { return g.whileOpen(g.origin, g.work) }

func (g *mergeRun) work() error {
	if g.start.merged == nil {
		if err := g.prepare(); err != nil {
			return err
		}
		g.rec.Mark(merging{})
		g.rec.Mark(watch{})
	} else {
		g.rec.Mark(watch{})
		if err := errors.Join(g.open(onOther, g.other), g.open(onSnapshot, g.cow)); err != nil {
			return err
		}
	}
	if err := g.stack.beginMerge(g.finished); err != nil {
		return err
	}
	if err := g.merge(); err != nil {
		return err
	}
	g.rec.Mark(finishing{})
	if err := g.stack.endMerge(); err != nil {
		return err
	}
	g.rec.Mark(merged{})
	return g.steps(g.c.steps/4, onOrigin, onOther)
}

// open opens a store, and adds its snapshot.
func (g *mergeRun) open(on int, cow block.Device) error {
	store, err := cowstore.OpenPersistent(cow, cowstore.PersistentConfig{})
	if err != nil {
		return err
	}
	return g.take(on, cow, store)
}

func (g *mergeRun) take(on int, cow block.Device, store *cowstore.Persistent) error {
	flush := func() error { return g.flush(g.origin) }
	if err := g.stack.take(on, cow, store, g.c, flush); err != nil {
		return err
	}
	g.rec.Mark(taken{on})
	return nil
}

// prepare takes both snapshots, at different times, and writes to all.
func (g *mergeRun) prepare() error {
	if err := g.open(onSnapshot, g.cow); err != nil {
		return err
	}
	if err := g.sweep(g.c.prefill, 64<<10); err != nil {
		return err
	}
	if err := g.steps(2*g.c.steps, onOrigin, onSnapshot); err != nil {
		return err
	}
	store, err := cowstore.CreatePersistent(g.other, otherChunk, cowstore.PersistentConfig{})
	if err != nil {
		return err
	}
	if err := g.take(onOther, g.other, store); err != nil {
		return err
	}
	return g.steps(g.c.steps/3, onOrigin, onSnapshot, onOther)
}

// merge lets the merge run to its end, with stops between, while all is written.
func (g *mergeRun) merge() error {
	for range g.c.steps {
		if g.stack.merge.Finished() {
			break
		}
		g.stack.merge.Start()
		err := g.steps(1, onOrigin, onOther)
		g.stack.merge.Stop()
		if err = errors.Join(err, g.steps(1, onOrigin, onOther)); err != nil {
			return err
		}
	}
	g.stack.merge.Start()
	return wait(g.finished)
}

// wait waits for the end of a merge.
func wait(finished <-chan error) error {
	select {
	case err := <-finished:
		return err
	case <-time.After(patience):
		return errors.New("the merge does not end")
	}
}

// mergeChecker looks at the disks of a run with a merge.
type mergeChecker struct {
	walker
	engine             kcopyd.Engine
	views              [deviceCount]*view // the origin's is the merged view from merging on
	finishing, merged  bool
	next               mergeStart
	nextAt             int
	origin, cow, other []byte // what the images hold
	view, frozen, got  []byte // buffers
}

func newMergeChecker(g *mergeRun, engine kcopyd.Engine) *mergeChecker {
	k := &mergeChecker{walker: walker{c: g.c, random: g.random, replay: g.rec.Replay()}, engine: engine}
	k.walker.mark, k.walker.look = k.mark, k.look
	k.nextAt = g.random.IntN(k.replay.Len())
	k.views[onOrigin] = newView("origin", slices.Clone(g.start.origin))
	if g.start.merged != nil {
		k.views[onOrigin] = newView("merged", slices.Clone(g.start.merged))
		k.views[onOther] = newView("other", slices.Clone(g.start.frozen))
	}
	for _, p := range []*[]byte{&k.origin, &k.view, &k.frozen, &k.got} {
		*p = make([]byte, g.c.origin)
	}
	k.cow, k.other = make([]byte, len(g.start.cow)), make([]byte, len(g.start.other))
	return k
}

func (k *mergeChecker) mark(mark any) error {
	switch m := mark.(type) {
	case began:
		k.views[m.on].begin(m.op)
	case ended:
		k.views[m.on].end(m.op)
	case taken:
		if k.views[m.on] == nil && !k.watching {
			k.views[m.on] = newView(deviceNames[m.on], slices.Clone(k.views[onOrigin].newest))
		}
	case merging:
		k.views[onOrigin] = k.views[onSnapshot]
	case finishing:
		k.finishing = true
	case merged:
		k.merged = true
	}
	return nil
}

// look checks both views as the kernel would find them, and lets the merge go on.
func (k *mergeChecker) look(images []*fault.Image, killed bool) error {
	if err := errors.Join(read(images[0], k.origin), read(images[1], k.cow), read(images[2], k.other)); err != nil {
		return err
	}
	table, err := parseTable(k.cow)
	if err != nil {
		return fmt.Errorf("the kernel would not like the store: %w", err)
	}
	switch {
	case !table.there:
		return errors.New("there is no store")
	case !table.valid && !k.finishing:
		return errors.New("the store is invalid")
	case table.valid && k.merged:
		return errors.New("the store is still valid")
	case len(table.old) > 0 && k.finishing:
		return fmt.Errorf("the store has %d exceptions, and is said to be merged", len(table.old))
	}
	other, err := parseTable(k.other)
	if err != nil || !other.valid {
		return fmt.Errorf("the other store: valid %v, %w", other != nil && other.valid, err)
	}
	err = errors.Join(examine(images[1], k.c), examine(images[2], k.c))
	err = errors.Join(err, table.view(k.view, k.origin, k.cow), other.view(k.frozen, k.origin, k.other))
	if err != nil {
		return err
	}
	if err := k.views[onOrigin].check(k.view, killed); err != nil {
		return fmt.Errorf("the merged view: %w", err)
	}
	if err := k.views[onOther].check(k.frozen, killed); err != nil {
		return err
	}
	if k.finishing {
		return nil
	}
	if k.next.merged == nil && k.replay.At() >= k.nextAt {
		k.next = mergeStart{
			origin: slices.Clone(k.origin), cow: slices.Clone(k.cow), other: slices.Clone(k.other),
			merged: slices.Clone(k.view), frozen: slices.Clone(k.frozen),
		}
	}
	if err := k.goOn(images); err != nil {
		return fmt.Errorf("the merge goes on: %w", err)
	}
	return nil
}

// goOn finishes the merge, and compares both views with those that were found.
func (k *mergeChecker) goOn(images []*fault.Image) error {
	s := openStack(images[0], k.engine)
	for _, x := range []struct {
		on  int
		cow *fault.Image
	}{{onOther, images[2]}, {onSnapshot, images[1]}} {
		store, err := cowstore.OpenPersistent(x.cow, cowstore.PersistentConfig{})
		if err != nil {
			return err
		}
		if err := s.take(x.on, x.cow, store, k.c, func() error { return nil }); err != nil {
			return err
		}
	}
	finished := make(chan error, 1)
	if err := s.beginMerge(finished); err != nil {
		return err
	}
	s.merge.Start()
	if err := wait(finished); err != nil {
		return err
	}
	if err := k.compare(s); err != nil {
		return err
	}
	if err := errors.Join(s.endMerge(), k.compare(s), s.close()); err != nil {
		return err
	}
	if err := read(images[0], k.got); err != nil {
		return err
	}
	if at := differs(k.got, k.view); at >= 0 {
		return fmt.Errorf("byte %d of the origin is not the merged view's", at)
	}
	return nil
}

// compare reads the devices of a stack.
func (k *mergeChecker) compare(s *stack) error {
	for on, want := range [deviceCount][]byte{onOrigin: k.view, onSnapshot: k.view, onOther: k.frozen} {
		if s.devices[on] == nil {
			continue
		}
		if err := read(s.devices[on], k.got); err != nil {
			return err
		}
		if at := differs(k.got, want); at >= 0 {
			return fmt.Errorf("byte %d of %s is %#x instead of %#x", at, deviceNames[on], k.got[at], want[at])
		}
	}
	return nil
}

// runMerges does all generations of a seed.
func (c config) runMerges(t *testing.T, seed uint64) error {
	random := rand.New(rand.NewPCG(seed, 0))
	engine := kcopyd.NewScaled(kcopyd.Config{})
	defer func() {
		if err := engine.Close(); err != nil {
			t.Error(err)
		}
	}()
	stamp := uint64(0)
	for i, s := 0, firstMergeStart(&c, random); i < c.generationCount() && s.origin != nil; i++ {
		g := newMergeRun(&c, random, &stamp, s)
		if err := g.run(); err != nil {
			return fmt.Errorf("generation %d: the run: %w", i, err)
		}
		k := newMergeChecker(g, engine)
		if err := k.walk(); err != nil {
			return fmt.Errorf("generation %d: %w", i, err)
		}
		t.Logf("generation %d: %d events, %d crashes", i, k.replay.Len(), k.crashes)
		s = k.next
	}
	return nil
}
