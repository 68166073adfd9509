package persistentdata

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"

	"cowherd/backend/mem"
	"cowherd/block"
)

var seed = flag.Uint64("seed", 0, "the seed of the random tests; 0: a new one each time")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newRand is the source of chance of a test, whose seed is printed if the test fails.
func newRand(t testing.TB) *rand.Rand {
	s := *seed
	if s == 0 {
		s = rand.Uint64()
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("to do it again: -seed %d", s)
		}
	})
	return rand.New(rand.NewPCG(s, 1))
}

// memory is a device of zeroes with so many blocks.
func memory(t testing.TB, blocks int64) block.Device {
	t.Helper()
	d, err := mem.New(mem.Config{Size: blocks * BlockSize})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// kindTest is the kind of the superblocks of these tests: a space map root, and the root of a tree behind it.
var kindTest = &Kind{"test superblock", 7, 8}

// commit commits, with the root of a tree.
func commit(m *Manager, tree uint64) error {
	return m.Commit(Superblock{Kind: kindTest, Fill: func(p []byte, space Root) {
		space.Put(p[32:])
		le.PutUint64(p[64:], tree)
	}})
}

// reopen opens what the superblock says.
func reopen(t testing.TB, d block.Device, o Options) (m *Manager, tree uint64) {
	t.Helper()
	var p [BlockSize]byte
	if err := readBlock(d, p[:], 0, kindTest); err != nil {
		t.Fatal(err)
	}
	m, err := Open(d, ParseRoot(p[32:]), o)
	if err != nil {
		t.Fatal(err)
	}
	return m, le.Uint64(p[64:])
}

// check checks what is on disk: the space map, and the nodes of a tree; other are blocks that are in use besides.
func check(t testing.TB, d block.Device, valueSize int, other map[uint64]uint32) map[uint64]uint64 {
	t.Helper()
	var p [BlockSize]byte
	if err := readBlock(d, p[:], 0, kindTest); err != nil {
		t.Fatal(err)
	}
	k := NewChecker(d, ParseRoot(p[32:]), func(f *Finding) {
		if n := f.Block; other[n] > 1 && f.Rule == RuleRefCount {
			return
		}
		t.Errorf("%s: %s", f.Rule, f.What)
	})
	k.SpaceMap()
	found := map[uint64]uint64{}
	w := k.walker(valueSize)
	w.leaf = func(_ uint64, p node) error {
		for i := range p.len() {
			found[p.key(i)] = p.value(i)
		}
		return nil
	}
	if err := w.walk(le.Uint64(p[64:])); err != nil {
		t.Fatal(err)
	}
	for n := range other {
		if !k.reached.add(n) {
			t.Errorf("block %d is in use twice", n)
		}
	}
	k.Finish()
	return found
}

func TestKinds(t *testing.T) {
	kinds := []*Kind{KindNode, KindArray, KindIndex, KindBitmap}
	p := make([]byte, BlockSize)
	for i := range p {
		p[i] = byte(i * 7)
	}
	for _, k := range kinds {
		k.Seal(p, 17)
		if err := k.Verify(p, 17); err != nil {
			t.Error(err)
		}
		for _, other := range kinds {
			if other != k && other.Verify(p, 17) == nil {
				t.Errorf("a %s is taken for a %s", k.Name, other.Name)
			}
		}
		e, ok := errors.AsType[*CorruptError](k.Verify(p, 18))
		if !ok || e.Rule != RuleBlockNumber || e.Expected != 18 || e.Found != 17 || e.Block != 18 || !errors.Is(e, syscall.EUCLEAN) {
			t.Errorf("another number: %v", e)
		}
		p[4000] ^= 4
		e, ok = errors.AsType[*CorruptError](k.Verify(p, 17))
		if !ok || e.Rule != RuleChecksum || !strings.Contains(e.Error(), "block 17 ("+k.Name+"): checksum is 0x") {
			t.Errorf("another byte: %v", e)
		}
	}
}

// TestCounters compares the counters of bitmap blocks with a slice.
func TestCounters(t *testing.T) {
	random := newRand(t)
	b := bitmap{current: new([BlockSize]byte), old: new([BlockSize]byte)}
	counts, old := make([]uint32, bitmapEntries), make([]uint32, bitmapEntries)
	for i := range counts {
		if i < 16000 { // so that few are free
			counts[i], old[i] = random.Uint32N(4), random.Uint32N(4)
		}
		setCounter(b.current, i, 3)
		setCounter(b.current, i, counts[i])
		setCounter(b.old, i, old[i])
	}
	free, first := 0, -1
	for i, want := range counts {
		if got := counter(b.current, i); got != want {
			t.Fatalf("counter %d is %d, want %d", i, got, want)
		}
		if want == 0 {
			if free++; first < 0 {
				first = i
			}
		}
	}
	if countFree(b.current) != free || firstFree(b.current, 0) != first {
		t.Errorf("%d free, from %d on; want %d from %d on", countFree(b.current), firstFree(b.current, 0), free, first)
	}
	for i := range counts {
		want := i
		for want < bitmapEntries-5 && counts[want]+old[want] > 0 {
			want++
		}
		got, ok := b.search(i, bitmapEntries-5)
		if ok != (want < bitmapEntries-5) || ok && got != want {
			t.Fatalf("from %d on: %d, %v; want %d", i, got, ok, want)
		}
	}
}

// TestTree compares trees with a map, through commits, and checks what each has left.
func TestTree(t *testing.T) {
	random := newRand(t)
	for _, valueSize := range []int{4, 8} {
		for _, span := range []uint64{500, 20_000, math.MaxUint64 - 1} {
			t.Run(fmt.Sprintf("%d bytes, %d keys", valueSize, span), func(t *testing.T) {
				d := memory(t, 2000)
				o := Options{CacheBlocks: 16 << random.IntN(6)}
				m, err := Create(d, o)
				if err != nil {
					t.Fatal(err)
				}
				tree, err := NewTree(m, valueSize)
				if err = errors.Join(err, commit(m, tree.Root())); err != nil {
					t.Fatal(err)
				}
				model := map[uint64]uint64{}
				for round := range 12 {
					change(t, random, &tree, model, span, round)
					root := tree.Root()
					if err := commit(m, root); err != nil {
						t.Fatal(err)
					}
					if found := check(t, d, valueSize, nil); !maps.Equal(found, model) {
						t.Fatalf("round %d: %d entries, want %d", round, len(found), len(model))
					}
					if random.IntN(2) == 0 {
						m, root = reopen(t, d, o)
						if tree, err = OpenTree(m, root, valueSize); err != nil {
							t.Fatal(err)
						}
					}
				}
			})
		}
	}
}

// change inserts and deletes, more of the one than of the other, and all in the end.
func change(t *testing.T, random *rand.Rand, tree *Tree, model map[uint64]uint64, span uint64, round int) {
	t.Helper()
	known := slices.Sorted(maps.Keys(model))
	inserts := random.IntN(10)
	if round == 11 {
		inserts = 0
	}
	for i := range 3000 {
		if random.IntN(10) < inserts || len(model) == 0 {
			key, value := random.Uint64N(span+1), random.Uint64()&valueMax(tree.valueSize)
			if inserts == 9 {
				key = span/2 + uint64(i) // in ascending order
			}
			if err := tree.Insert(key, value); err != nil {
				t.Fatal(err)
			}
			if _, ok := model[key]; !ok {
				known = append(known, key)
			}
			model[key] = value
			continue
		}
		key := random.Uint64N(span + 1)
		if random.IntN(4) > 0 {
			key = known[random.IntN(len(known))]
		}
		value, has, err := tree.Lookup(key)
		want, ok := model[key]
		if err != nil || has != ok || value != want {
			t.Fatalf("key %d: %d, %v, %v; want %d, %v", key, value, has, err, want, ok)
		}
		was, err := tree.Delete(key)
		if err != nil || was != ok {
			t.Fatalf("delete %d: %v, %v; want %v", key, was, err, ok)
		}
		delete(model, key)
	}
}

// TestRefCounts compares reference counts, of three and more too, with a map.
func TestRefCounts(t *testing.T) {
	random := newRand(t)
	d := memory(t, 40_000) // three bitmap blocks
	o := Options{CacheBlocks: 16}
	m, err := Create(d, o)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := NewTree(m, 8)
	if err = errors.Join(err, commit(m, tree.Root())); err != nil {
		t.Fatal(err)
	}
	counts := map[uint64]uint32{}
	var known []uint64
	for round := range 20 {
		for range 2000 {
			if len(known) < 1000 && random.IntN(2) == 0 || len(known) == 0 {
				n, err := m.space.take()
				if err != nil {
					t.Fatal(err)
				}
				if counts[n] != 0 {
					t.Fatalf("block %d is in use", n)
				}
				counts[n] = 1
				known = append(known, n)
				continue
			}
			at := random.IntN(len(known))
			if random.IntN(2) == 0 {
				at = random.IntN(min(len(known), 20)) // some are referred to often
			}
			n := known[at]
			more := random.IntN(10) < 6
			if more {
				counts[n]++
				err = m.Ref(n)
			} else {
				counts[n]--
				err = m.Unref(n)
			}
			if err != nil {
				t.Fatal(err)
			}
			if counts[n] == 0 {
				delete(counts, n)
				known[at] = known[len(known)-1]
				known = known[:len(known)-1]
			}
			if got, err := m.RefCount(n); err != nil || got != counts[n] {
				t.Fatalf("block %d: %d, %v; want %d", n, got, err, counts[n])
			}
		}
		if err := commit(m, tree.Root()); err != nil {
			t.Fatal(err)
		}
		check(t, d, 8, counts)
		if round%3 == 0 {
			m, _ = reopen(t, d, o)
			tree.m = m
		}
		for n, want := range counts {
			if got, err := m.RefCount(n); err != nil || got != want {
				t.Fatalf("round %d, block %d: %d, %v; want %d", round, n, got, err, want)
			}
		}
	}
	if err := m.Unref(39_999); !errors.Is(err, syscall.EUCLEAN) {
		t.Errorf("a free block was given up: %v", err)
	}
}

// TestFull: a tree that finds no room leaves the last commit as it was.
func TestFull(t *testing.T) {
	d := memory(t, 32)
	m, err := Create(d, Options{})
	if err != nil {
		t.Fatal(err)
	}
	tree, err := NewTree(m, 8)
	if err = errors.Join(err, commit(m, tree.Root())); err != nil {
		t.Fatal(err)
	}
	for i := uint64(0); err == nil; i++ {
		err = tree.Insert(i, i)
	}
	if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "no free block among the 32") {
		t.Errorf("a full device: %v", err)
	}
	if err := commit(m, tree.Root()); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("commit after that: %v", err)
	}
	if found := check(t, d, 8, nil); len(found) > 0 {
		t.Errorf("%d entries", len(found))
	}
	if used, total := m.Usage(); used != 5 || total != 32 {
		t.Errorf("%d of %d blocks in use", used, total)
	}
}

// TestTooSmall: what has no room for a space map is refused, and what has for no more.
func TestTooSmall(t *testing.T) {
	for blocks := range int64(8) {
		m, err := Create(memory(t, blocks), Options{})
		if err == nil {
			_, err = NewArray(m, 1, nil)
		}
		if want := blocks < 6; errors.Is(err, syscall.ENOSPC) != want || (err == nil) == want {
			t.Errorf("%d blocks: %v", blocks, err)
		}
	}
}
