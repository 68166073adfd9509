package clonemeta

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"cowherd/block"
	"cowherd/internal/fault"
	"cowherd/internal/invariant"
	"cowherd/persistentdata"
)

var rewrite = flag.Bool("rewrite", false, "write the golden files anew")

// disk is a disk whose writes are recorded.
func disk(r *fault.Recorder, blocks int64) *fault.Disk {
	limits := block.NoLimits()
	limits.LogicalBlock, limits.NeedsFlush = 512, true
	return r.NewDisk(fault.DiskConfig{Name: "meta", Content: make([]byte, blocks*persistentdata.BlockSize), Limits: limits})
}

// set stages words and commits them.
func set(m *Metadata, words map[uint64]uint64) error {
	err := m.SetWords(func(yield func(uint64, uint64) bool) {
		for i, w := range words {
			if !yield(i, w) {
				return
			}
		}
	})
	if err != nil {
		return err
	}
	return m.Commit()
}

// TestOrder: what is written, and when it is flushed.
func TestOrder(t *testing.T) {
	r := fault.NewRecorder()
	d := disk(r, 64)
	p := Params{RegionSize: 8, TargetSize: 70_000 * 8}
	r.Mark("format")
	m, err := Format(d, p)
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		name  string
		words map[uint64]uint64
	}{
		{"a commit of one word", map[uint64]uint64{0: 1}},
		{"a commit of a word in each of two blocks", map[uint64]uint64{1: 3, 600: 1}},
		{"a commit of what is there already", map[uint64]uint64{1: 3}},
		{"a commit of one word again", map[uint64]uint64{0: 3}},
	} {
		r.Mark(step.name)
		if err := set(m, step.words); err != nil {
			t.Fatal(err)
		}
	}
	r.Mark("format of what is formatted")
	if _, err = Format(d, p); err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	for replay := r.Replay(); ; replay.Step() {
		e, ok := replay.Peek()
		if !ok {
			break
		}
		fmt.Fprintln(&log, e)
	}
	const golden = "testdata/order.golden"
	if *rewrite {
		if err := os.WriteFile(golden, []byte(log.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if log.String() != string(want) {
		t.Errorf("got\n%s\nwant\n%s", log.String(), want)
	}
}

// TestCrash cuts the power at every write and flush, many times with different luck: what is found is the bitset of the
// last commit that was acknowledged, or the one of the commit that was running, and nothing has leaked.
func TestCrash(t *testing.T) {
	random := newRand(t)
	images, rounds := 0, 12
	if invariant.Enabled {
		rounds = 3 // one goroutine: the race detector is here for what is shared by mistake
	}
	for round := range rounds {
		r := fault.NewRecorder()
		p := Params{RegionSize: 8, TargetSize: block.Sector(1+random.Uint64N(150_000)) * 8}
		if round == 4 { // more than the cache holds, so that blocks are written before the commit
			p.TargetSize = 1_000_000 * 8
		}
		blocks := 3*persistentdata.ArrayTreeBlocks(p.words()) + 16
		d := disk(r, int64(blocks))
		o := persistentdata.Options{CacheBlocks: 16}
		r.Mark(-1) // before anything is acknowledged
		m, err := format(d, p, o, nil)
		if err != nil {
			t.Fatal(err)
		}
		x := model{random: random, device: d, params: p, options: o, m: m}
		x.committed, x.staged = make([]uint64, p.words()), make([]uint64, p.words())
		states := [][]uint64{slices.Clone(x.committed)}
		r.Mark(0)
		for range 30 {
			if x.step(t); !slices.Equal(x.committed, states[len(states)-1]) {
				states = append(states, slices.Clone(x.committed))
				r.Mark(len(states) - 1)
			}
		}
		images += crash(t, r.Replay(), states, func(p *fault.Replay) *fault.Image {
			if random.IntN(4) == 0 {
				return p.Kill()[0]
			}
			return p.PowerCut(random)[0]
		}, round)
	}
	t.Logf("%d images", images)
}

// TestCrashAfterFailedFlush: the flush behind the superblock fails, Abort goes on with what it finds, and commits follow. What
// a crash leaves is then at least what Abort has found, though blocks that the superblock before used are written anew.
func TestCrashAfterFailedFlush(t *testing.T) {
	random := newRand(t)
	rounds := 4
	if invariant.Enabled {
		rounds = 1
	}
	for round := range rounds {
		r := fault.NewRecorder()
		failing := fault.New(disk(r, 40))
		p := Params{RegionSize: 8, TargetSize: 70_000 * 8}
		m, err := Format(failing, p)
		if err == nil {
			err = set(m, map[uint64]uint64{0: 1})
		}
		if err != nil {
			t.Fatal(err)
		}
		flushes := 0
		failing.Fail(func(r *block.Request) error {
			if r.Op == block.OpFlush {
				if flushes++; flushes == 2 {
					return syscall.EIO
				}
			}
			return nil
		})
		if err := set(m, map[uint64]uint64{0: 3, 600: 1}); err == nil {
			t.Fatal("the second flush of a commit did not fail")
		}
		start := r.Replay().Len()
		if err := m.Abort(); err != nil {
			t.Fatal(err)
		}
		first, err := bitsOf(m)
		if err != nil || first[0] != 3 {
			t.Fatalf("%v, %d", err, first[0])
		}
		r.Mark(0)
		states := [][]uint64{first}
		for i := range 6 {
			states = append(states, slices.Clone(states[i]))
			word := uint64(8) << i
			states[i+1][0] = word
			if err := set(m, map[uint64]uint64{0: word}); err != nil {
				t.Fatal(err)
			}
			r.Mark(i + 1)
		}
		replay := r.Replay()
		for replay.At() < start || !isMark(replay) {
			replay.Step()
		}
		crash(t, replay, states, func(p *fault.Replay) *fault.Image { return p.PowerCut(random)[0] }, round)
	}
}

// isMark tells whether the last event was a mark. The one that comes next is not looked at.
func isMark(replay *fault.Replay) bool {
	last := replay.Last(1)
	return len(last) > 0 && last[0].Kind == fault.EventMark
}

// crash tries what a replay leaves at each step.
func crash(t *testing.T, replay *fault.Replay, states [][]uint64, cut func(*fault.Replay) *fault.Image, round int) (images int) {
	t.Helper()
	acknowledged := -1
	if isMark(replay) {
		acknowledged = replay.Last(1)[0].Mark.(int)
	}
	for {
		for range 3 {
			images++
			image := cut(replay)
			if what := wrong(t, image, states, acknowledged); what != "" {
				t.Fatalf("round %d, after %v: %s", round, replay.Last(8), what)
			}
		}
		e, ok := replay.Peek()
		if !ok {
			return images
		}
		if e.Kind == fault.EventMark {
			acknowledged = e.Mark.(int)
		}
		replay.Step()
	}
}

// wrong tells what is wrong with what a crash has left.
func wrong(t *testing.T, d block.Device, states [][]uint64, acknowledged int) string {
	t.Helper()
	m, err := Open(d, Params{})
	if errors.Is(err, ErrUnformatted) && acknowledged < 0 {
		return ""
	}
	if err != nil {
		return err.Error()
	}
	words, err := bitsOf(m)
	if err != nil {
		return err.Error()
	}
	next := min(acknowledged+1, len(states)-1)
	if !slices.Equal(words, states[next]) && (acknowledged < 0 || !slices.Equal(words, states[acknowledged])) {
		return fmt.Sprintf("the bitset is neither that of commit %d nor that of the next", acknowledged)
	}
	if _, lines := findings(t, d); len(lines) > 0 {
		return fmt.Sprintf("check: %q", lines)
	}
	return ""
}

// TestDeviceErrors makes every write and flush of a commit fail, one after the other: Abort goes back to the old bitset or,
// once the superblock was written, to the new one, and then all works again.
func TestDeviceErrors(t *testing.T) {
	p := Params{RegionSize: 8, TargetSize: 70_000 * 8}
	for n := 0; ; n++ {
		d := fault.New(memory(t, Size(p)))
		m, err := Format(d, p)
		if err != nil {
			t.Fatal(err)
		}
		if err := set(m, map[uint64]uint64{5: 1}); err != nil {
			t.Fatal(err)
		}
		seen := 0
		d.Fail(func(r *block.Request) error {
			if r.Op == block.OpRead {
				return nil
			}
			if seen++; seen == n+1 {
				return syscall.EIO
			}
			return nil
		})
		err = set(m, map[uint64]uint64{5: 3, 700: 1})
		if err == nil {
			if n < 4 {
				t.Errorf("a commit does %d writes and flushes", n)
			}
			return
		}
		if !errors.Is(err, syscall.EIO) || m.Commit() == nil || m.SetWords(nil) == nil || m.LoadBits(nil) == nil {
			t.Fatalf("error %d: %v", n, err)
		}
		if err := m.Abort(); err != nil {
			t.Fatalf("error %d: %v", n, err)
		}
		words, err := bitsOf(m)
		if err != nil {
			t.Fatal(err)
		}
		if got := words[5] + words[700]; got != 1 && got != 4 {
			t.Errorf("error %d: words %d and %d", n, words[5], words[700])
		}
		if err := set(m, map[uint64]uint64{5: 7}); err != nil {
			t.Fatal(err)
		}
		if _, lines := findings(t, d); len(lines) > 0 {
			t.Errorf("error %d: %q", n, lines)
		}
	}
}

// TestAbortFails: what cannot be read is an error of Abort, which may be tried again.
func TestAbortFails(t *testing.T) {
	p := Params{RegionSize: 8, TargetSize: 70_000 * 8}
	d := fault.New(memory(t, Size(p)))
	m, err := Format(d, p)
	if err != nil {
		t.Fatal(err)
	}
	d.Fail(func(*block.Request) error { return syscall.EIO })
	if err := set(m, map[uint64]uint64{0: 1}); !errors.Is(err, syscall.EIO) {
		t.Errorf("commit: %v", err)
	}
	if err := m.Abort(); !errors.Is(err, syscall.EIO) {
		t.Errorf("abort: %v", err)
	}
	if err := m.Commit(); !errors.Is(err, syscall.EIO) {
		t.Errorf("commit after a failed abort: %v", err)
	}
	d.Fail(nil)
	if err := m.Abort(); err != nil {
		t.Error(err)
	}
	if err := set(m, map[uint64]uint64{0: 1}); err != nil {
		t.Error(err)
	}
}
