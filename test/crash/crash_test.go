package crash

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"cowherd/kcopyd"
	"cowherd/target/snapshot"
)

// cases are the runs of TestPersistent. An area holds a record for each 16 bytes of a chunk, so that small chunks make
// many areas, and large ones areas of many sectors, of which a power failure may take some.
var cases = []struct {
	name string
	config
}{
	{"areas", config{mode: now, chunk: 1 << 10, origin: 200 << 10, room: 215, logical: 512, width: 6, steps: 60}},
	{"areas,parallel", config{mode: parallel, chunk: 1 << 10, origin: 200 << 10, room: 215, logical: 512, width: 6, steps: 60}},
	{"areas,late", config{mode: late, chunk: 2 << 10, origin: 400 << 10, room: 215, logical: 512, width: 10, steps: 50}},
	// Writes over many chunks, whose records fill an area at once, and of which a power failure takes some.
	{"runs", config{mode: now, chunk: 1 << 10, origin: 300 << 10, room: 320, logical: 512, width: 6, steps: 20, longest: 90}},
	{"runs,late", config{mode: late, chunk: 2 << 10, origin: 600 << 10, room: 320, logical: 512, width: 10, steps: 10, longest: 140}},
	// Areas of one sector, some of which are filled with one write.
	{"sector", config{mode: now, chunk: 512, origin: 120 << 10, room: 260, logical: 512, width: 6, steps: 20, longest: 80}},
	// Stores that are made, where another one was. The first area is all but full when crashes begin.
	{"4k", config{mode: now, chunk: 4 << 10, origin: 290 << 12, room: 300, logical: 512, width: 6, steps: 25,
		prefill: 235 << 12}},
	{"4k,late", config{mode: late, chunk: 4 << 10, origin: 290 << 12, room: 300, logical: 512, width: 10, steps: 25,
		prefill: 235 << 12, plain: true, generations: 2}},
	// Areas of many sectors, of which little is written at a time.
	{"16k", config{mode: now, chunk: 16 << 10, origin: 60 << 14, room: 70, logical: 512, width: 6, steps: 20, generations: 2}},
	{"64k", config{mode: late, chunk: 64 << 10, origin: 20 << 16, room: 30, logical: 512, width: 6, steps: 20, generations: 2}},
	// Nothing is aligned, and the origin does not end with a chunk or a sector.
	{"bytes", config{mode: now, chunk: 4 << 10, origin: 50<<12 + 777, room: 60, logical: 1, width: 6, steps: 60}},
	{"bytes,late", config{mode: late, chunk: 1 << 10, origin: 150<<10 + 77, room: 180, logical: 1, width: 10, steps: 60}},
	// Disks with blocks of 4 KiB; no less of an area is written.
	{"blocks", config{mode: late, chunk: 8 << 10, origin: 60 << 13, room: 70, logical: 4096, width: 10, steps: 30}},
	// Too little room, by the rules P and PO.
	{"full", config{mode: now, chunk: 1 << 10, origin: 200 << 10, room: 100, logical: 512, width: 6, steps: 40}},
	{"full,late", config{mode: late, chunk: 1 << 10, origin: 200 << 10, room: 100, logical: 512, width: 10, steps: 40}},
	{"overflow", config{mode: now, chunk: 1 << 10, origin: 200 << 10, room: 100, logical: 512, width: 6, steps: 40,
		onFull: snapshot.FullOverflow}},
	{"overflow,late", config{mode: late, chunk: 1 << 10, origin: 200 << 10, room: 100, logical: 512, width: 10, steps: 40,
		onFull: snapshot.FullOverflow}},
	// A COW device that grows.
	{"grow", config{mode: now, chunk: 1 << 10, origin: 200 << 10, room: 70, roomMax: 215, logical: 512, width: 6, steps: 40,
		onFull: snapshot.FullGrow}},
	{"grow,late", config{mode: late, chunk: 1 << 10, origin: 200 << 10, room: 63, roomMax: 215, logical: 512, width: 10,
		steps: 40, onFull: snapshot.FullGrow}},
	// The snapshot is removed at the end.
	{"drop", config{mode: now, chunk: 4 << 10, origin: 50 << 12, room: 60, logical: 512, width: 6, steps: 20, drop: true}},
	{"drop,late", config{mode: late, chunk: 4 << 10, origin: 50 << 12, room: 60, logical: 512, width: 6, steps: 20, drop: true}},
}

// TestPersistent crashes persistent snapshots.
func TestPersistent(t *testing.T) {
	eachSeed(t, func(t *testing.T, seed uint64) {
		for _, test := range cases {
			t.Run(test.name, func(t *testing.T) {
				t.Parallel()
				repeatable(t, seed, test.run(t, seed))
			})
		}
	})
}

// eachSeed runs a test with the seeds that were asked for. Each of the three tests gets a third of the time.
func eachSeed(t *testing.T, run func(t *testing.T, seed uint64)) {
	first, last := uint64(1), *seedCount
	if *oneSeed != 0 {
		first, last = *oneSeed, *oneSeed
	}
	for seed, end := first, time.Now().Add(*crashTime/3); seed <= last || time.Now().Before(end) && !t.Failed(); seed++ {
		t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) { run(t, seed) })
	}
}

// repeatable fails the test if there is an error, and says how to see it again.
func repeatable(t *testing.T, seed uint64, err error) {
	if err != nil {
		t.Errorf("%v\nto repeat it:\ngo test ./test/crash -run '^%s$' -seed %d", err, strings.ReplaceAll(t.Name(), "/", "$/^"), seed)
	}
}

// run does all generations of a seed.
func (c config) run(t *testing.T, seed uint64) error {
	random := rand.New(rand.NewPCG(seed, 0))
	engine := kcopyd.NewScaled(kcopyd.Config{})
	defer func() {
		if err := engine.Close(); err != nil {
			t.Error(err)
		}
	}()
	stamp := uint64(0)
	s := firstStart(&c, random)
	for i := range c.generationCount() {
		s.prepare(&c)
		g := newGeneration(&c, random, &stamp, s)
		if err := g.run(); err != nil {
			return fmt.Errorf("generation %d: the run: %w", i, err)
		}
		k := newChecker(g, engine)
		if err := k.walk(); err != nil {
			return fmt.Errorf("generation %d: %w", i, err)
		}
		t.Logf("generation %d: %d events, %d crashes, %d with an invalid store, %d with a rest behind the table", i,
			k.replay.Len(), k.crashes, k.invalid, k.rests)
		s = k.next
	}
	return nil
}
