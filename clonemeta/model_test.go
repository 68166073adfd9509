package clonemeta

import (
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"

	"cowherd/block"
	"cowherd/persistentdata"
)

// model is metadata and what it is to hold.
type model struct {
	random    *rand.Rand
	device    block.Device
	params    Params
	options   persistentdata.Options
	m         *Metadata
	committed []uint64
	staged    []uint64
}

// change chooses words to be changed: neighbours, any, or all.
func (x *model) change() map[uint64]uint64 {
	n := uint64(len(x.staged))
	changes := map[uint64]uint64{}
	put := func(i uint64) {
		word := x.staged[i]
		switch x.random.IntN(4) {
		case 0:
			word = ^uint64(0)
		case 1:
			word |= x.random.Uint64()
		case 2: // as it is
		default:
			word |= 1 << x.random.IntN(64)
		}
		if i == n-1 {
			word &= x.params.tailMask()
		}
		changes[i] = word
	}
	switch x.random.IntN(8) {
	case 0:
		for i := range n {
			put(i)
		}
	case 1, 2, 3:
		first := x.random.Uint64N(n)
		for i := first; i < min(first+x.random.Uint64N(2000), n); i++ {
			put(i)
		}
	default:
		for range x.random.IntN(50) {
			put(x.random.Uint64N(n))
		}
	}
	return changes
}

// inOrder gives changes in ascending order, or, if they are few, in one by chance: many would go through a small cache again
// and again, and a crash test tries the disk at each of its writes.
func inOrder(changes map[uint64]uint64, random *rand.Rand) iter.Seq2[uint64, uint64] {
	keys := make([]uint64, 0, len(changes))
	for i := range changes {
		keys = append(keys, i)
	}
	slices.Sort(keys)
	if len(keys) < 100 && random.IntN(2) == 0 {
		random.Shuffle(len(keys), func(i, j int) { keys[i], keys[j] = keys[j], keys[i] })
	}
	return func(yield func(uint64, uint64) bool) {
		for _, i := range keys {
			if !yield(i, changes[i]) {
				return
			}
		}
	}
}

// step does something, and tells what. full: there was no room, and everything is as it was committed.
func (x *model) step(t *testing.T) (what string) {
	var err error
	switch op := x.random.IntN(10); {
	case op < 5:
		changes := x.change()
		what = fmt.Sprintf("set %d words", len(changes))
		if err = x.m.SetWords(inOrder(changes, x.random)); err == nil {
			for i, word := range changes {
				x.staged[i] = word
			}
		}
	case op < 8:
		what = "commit"
		if err = x.m.Commit(); err == nil {
			copy(x.committed, x.staged)
		}
	case op == 8:
		what = "abort"
		copy(x.staged, x.committed)
		if err := x.m.Abort(); err != nil {
			t.Fatal(err)
		}
	default:
		what = "reopen"
		copy(x.staged, x.committed)
		if err := x.m.Close(); err != nil {
			t.Fatal(err)
		}
		if x.m, err = open(x.device, x.params, x.options); err != nil {
			t.Fatal(err)
		}
	}
	if errors.Is(err, syscall.ENOSPC) {
		what += ": " + err.Error()
		if err := x.m.Commit(); err == nil || !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("after %v a commit gave %v", what, err)
		}
		copy(x.staged, x.committed)
		err = x.m.Abort()
	}
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	return what
}

// check compares.
func (x *model) check(t *testing.T, after string) {
	t.Helper()
	got, err := bitsOf(x.m)
	if err != nil {
		t.Fatalf("after %s: %v", after, err)
	}
	if !slices.Equal(got, x.staged) {
		t.Fatalf("after %s the bitset is not as it should be", after)
	}
	s, lines := findings(t, x.device)
	if len(lines) > 0 {
		t.Fatalf("after %s: check: %q", after, lines)
	}
	if used, _ := x.m.Usage(); used != s.Reached || s.Hydrated != countBits(x.committed) || s.Lost > 0 {
		t.Fatalf("after %s: %d blocks in use, and check says %+v", after, used, s)
	}
}

// TestModel does random things to metadata of many sizes, on devices that have just enough room, or too little.
func TestModel(t *testing.T) {
	random := newRand(t)
	full := 0
	for _, regions := range []uint64{1, 63, 64, 65, 32576, 32577, 100_000, 9_000_000} {
		t.Run(fmt.Sprint(regions), func(t *testing.T) {
			p := Params{RegionSize: 8, TargetSize: block.Sector(regions*8 - random.Uint64N(8))}
			x := model{random: random, params: p, options: persistentdata.Options{CacheBlocks: 16 << random.IntN(8)}}
			// Some room for changes, not always for all of them.
			blocks := persistentdata.ArrayTreeBlocks(p.words())
			blocks += persistentdata.SpaceMapBlocks(2*blocks) + 8 + random.Uint64N(blocks+10)
			x.device = memory(t, int64(blocks)*persistentdata.BlockSize)
			var err error
			if x.m, err = format(x.device, p, x.options, nil); err != nil {
				t.Fatal(err)
			}
			x.committed, x.staged = make([]uint64, p.words()), make([]uint64, p.words())
			x.check(t, "format")
			for range 3000 / (30 + len(x.staged)/1000) {
				what := x.step(t)
				x.check(t, what)
				if len(what) > 30 {
					full++
				}
			}
		})
	}
	if full == 0 {
		t.Log("no device was ever full")
	}
}

// TestSizeIsEnough: on a device of that size all bits can change in every commit.
func TestSizeIsEnough(t *testing.T) {
	for _, regions := range []uint64{1, 40_000, 20_000_000} {
		p := Params{RegionSize: 8, TargetSize: block.Sector(regions * 8)}
		m, err := Format(memory(t, Size(p)), p)
		if err != nil {
			t.Fatal(err)
		}
		for word := range uint64(3) {
			err := m.SetWords(func(yield func(uint64, uint64) bool) {
				for i := range p.words() {
					if !yield(i, (word+1)&p.tailMask()) {
						return
					}
				}
			})
			if err = errors.Join(err, m.Commit()); err != nil {
				t.Fatalf("%d regions: %v", regions, err)
			}
		}
	}
}
