package clonemeta

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"

	"cowherd/block"
	"cowherd/internal/fault"
	"cowherd/persistentdata"
)

// patch changes one block of metadata and seals it again.
type patch struct {
	block uint64
	kind  *persistentdata.Kind // nil: the checksum is left wrong
	at    int
	to    []byte
}

func (x patch) apply(p []byte) {
	b := p[x.block*persistentdata.BlockSize:][:persistentdata.BlockSize]
	copy(b[x.at:], x.to)
	if x.kind != nil {
		x.kind.Seal(b, x.block)
	}
}

// sample is metadata for 70,000 regions: index 1, reference counts 2, bitmap 3, array blocks 4, 5, 6, root 7. Regions 0, 1
// and 69,999 are hydrated.
func sample(t testing.TB) []byte {
	d := memory(t, 64*persistentdata.BlockSize)
	p := Params{RegionSize: 8, TargetSize: 70_000 * 8}
	m, err := format(d, p, persistentdata.Options{}, func(first uint64, words []uint64) error {
		if first == 0 {
			words[0] = 3
		}
		if last := p.words() - 1; last-first < uint64(len(words)) {
			words[last-first] = 1 << (69_999 % 64)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	return contents(t, d)
}

func u32(v uint32) []byte { return le.AppendUint32(nil, v) }
func u64(v uint64) []byte { return le.AppendUint64(nil, v) }

// TestDamage plants each kind of damage, which Check names, which Open or LoadBits refuses if they would go by it, and which
// Repair mends if nobody has to guess.
func TestDamage(t *testing.T) {
	node, array, index, bitmap := persistentdata.KindNode, persistentdata.KindArray, persistentdata.KindIndex, persistentdata.KindBitmap
	const value = 32 + 252*8 // of a node with values of 8 bytes
	for _, test := range []struct {
		name    string
		patches []patch
		want    []persistentdata.Rule
		opens   bool   // Open and LoadBits see nothing
		lost    uint64 // regions that Repair must ask for
		dead    bool   // Repair can do nothing
	}{
		{"nothing", nil, nil, true, 0, false},
		{"magic", []patch{{0, kind, atMagic, u64(1)}}, []persistentdata.Rule{RuleMagic}, false, 0, true},
		{"version", []patch{{0, kind, atVersion, u32(2)}}, []persistentdata.Rule{RuleVersion}, false, 0, true},
		{"superblock's checksum", []patch{{0, nil, 20, u32(2)}}, []persistentdata.Rule{persistentdata.RuleChecksum}, false, 0, true},
		{"region size", []patch{{0, kind, atRegionSize, u64(24)}}, []persistentdata.Rule{RuleRegionSize}, false, 0, true},
		{"no target", []patch{{0, kind, atTargetSize, u64(0)}}, []persistentdata.Rule{RuleTargetSize}, false, 0, true},
		{"target too large", []patch{{0, kind, atTargetSize, u64(1 << 60)}}, []persistentdata.Rule{RuleTargetSize}, false, 0, true},
		{"flags and tail", []patch{{0, kind, atFlags, u32(2)}, {0, kind, 4000, u32(2)}}, []persistentdata.Rule{RuleFlags, RuleSuperTail}, true, 0, false},
		{"space map too large", []patch{{0, kind, atSpaceMap, u64(65)}}, []persistentdata.Rule{persistentdata.RuleSpaceMapSize}, false, 0, false},
		{"allocated", []patch{{0, kind, atSpaceMap + 8, u64(9)}}, []persistentdata.Rule{persistentdata.RuleFreeCount}, true, 0, false},
		{"bitset nowhere", []patch{{0, kind, atBitset, u64(64)}}, []persistentdata.Rule{persistentdata.RuleBlockRange, persistentdata.RuleLeak, RuleLost}, false, 70_000, false},
		{"index block", []patch{{1, nil, 100, u32(1)}}, []persistentdata.Rule{persistentdata.RuleChecksum}, false, 0, false},
		{"index of another block", []patch{{1, index, 16, u64(1 << 40)}}, []persistentdata.Rule{persistentdata.RuleBlockRange}, false, 0, false},
		{"free count", []patch{{1, index, 24, u32(5)}}, []persistentdata.Rule{persistentdata.RuleFreeCount}, true, 0, false},
		{"free hint", []patch{{1, index, 28, u32(9)}}, []persistentdata.Rule{persistentdata.RuleFreeHint}, true, 0, false},
		{"bitmap", []patch{{3, nil, 100, u32(1)}}, []persistentdata.Rule{persistentdata.RuleChecksum}, false, 0, false},
		{"in use, and free", []patch{{3, bitmap, 16, []byte{0xaa, 0x2a}}},
			[]persistentdata.Rule{persistentdata.RuleFreeCount, persistentdata.RuleFreeCount, persistentdata.RuleFreeHint, persistentdata.RuleInUse}, false, 0, false},
		{"leak", []patch{{3, bitmap, 18, []byte{0x0a}}},
			[]persistentdata.Rule{persistentdata.RuleFreeCount, persistentdata.RuleFreeCount, persistentdata.RuleLeak}, true, 0, false},
		{"counted twice", []patch{{3, bitmap, 16, []byte{0xaa, 0x9a}}}, []persistentdata.Rule{persistentdata.RuleRefCount}, true, 0, false},
		{"reference counts", []patch{{2, node, 4, u32(3)}}, []persistentdata.Rule{persistentdata.RuleNodeFlags}, true, 0, false},
		{"root's flags", []patch{{7, node, 4, u32(3)}}, []persistentdata.Rule{persistentdata.RuleNodeFlags, persistentdata.RuleLeak, RuleLost}, false, 70_000, false},
		{"root's entries", []patch{{7, node, 16, u32(253)}}, []persistentdata.Rule{persistentdata.RuleNodeSize, persistentdata.RuleLeak, RuleLost}, false, 70_000, false},
		{"root's maximum", []patch{{7, node, 20, u32(255)}}, []persistentdata.Rule{persistentdata.RuleNodeSize, persistentdata.RuleLeak, RuleLost}, false, 70_000, false},
		{"root's value size", []patch{{7, node, 24, u32(4)}}, []persistentdata.Rule{persistentdata.RuleNodeSize, persistentdata.RuleLeak, RuleLost}, false, 70_000, false},
		{"root's keys", []patch{{7, node, 40, u64(0)}}, []persistentdata.Rule{persistentdata.RuleNodeKeys, persistentdata.RuleLeak, RuleLost}, false, 70_000, false},
		{"a tree in a circle", []patch{{7, node, 4, u32(1)}, {7, node, value, u64(7)}},
			[]persistentdata.Rule{persistentdata.RuleChecksum, persistentdata.RuleChecksum, persistentdata.RuleLeak, RuleLost, persistentdata.RuleReachedTwice}, false, 70_000, false},
		{"an array block missing", []patch{{7, node, 48, u64(9)}}, []persistentdata.Rule{persistentdata.RuleArrayIndex, persistentdata.RuleLeak, RuleLost}, false, 4848, false},
		{"an array block twice", []patch{{7, node, value + 8, u64(4)}}, []persistentdata.Rule{persistentdata.RuleLeak, RuleLost, persistentdata.RuleReachedTwice}, false, 32_576, false},
		{"array block", []patch{{5, nil, 100, u32(1)}}, []persistentdata.Rule{persistentdata.RuleChecksum, RuleLost}, false, 32_576, false},
		{"array block elsewhere", []patch{{5, array, 100, u32(1)}, {5, nil, 16, u64(4)}}, []persistentdata.Rule{persistentdata.RuleChecksum, RuleLost}, false, 32_576, false},
		{"array block's entries", []patch{{6, array, 8, u32(509)}}, []persistentdata.Rule{persistentdata.RuleArraySize, RuleLost}, false, 4848, false},
		{"array block's value size", []patch{{6, array, 12, u32(0)}}, []persistentdata.Rule{persistentdata.RuleArraySize, RuleLost}, false, 4848, false},
		{"bit behind the end", []patch{{6, array, 24 + 75*8, u64(1 << 63)}}, []persistentdata.Rule{RuleBehindEnd}, true, 0, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := sample(t)
			for _, x := range test.patches {
				x.apply(p)
			}
			d := deviceOf(t, p)
			s, lines := findings(t, d)
			var got []persistentdata.Rule
			for _, line := range lines {
				got = append(got, persistentdata.Rule(line[:strings.Index(line, " ")]))
			}
			slices.Sort(got)
			slices.Sort(test.want)
			if !slices.Equal(got, test.want) {
				t.Errorf("check: %q, want %v", lines, test.want)
			}
			if s.Lost != test.lost {
				t.Errorf("%d regions lost, want %d", s.Lost, test.lost)
			}
			m, err := Open(d, Params{})
			if err == nil {
				_, err = bitsOf(m)
			}
			if (err == nil) != test.opens || err != nil && !errors.Is(err, syscall.EUCLEAN) {
				t.Errorf("open: %v", err)
			}
			repairSample(t, d, test.lost, test.dead)
			if !bytes.Equal(p, contents(t, d)) {
				t.Error("what was only to be read has changed")
			}
		})
	}
}

// repairSample repairs a damaged sample and looks at the result.
func repairSample(t *testing.T, d block.Device, lost uint64, dead bool) {
	t.Helper()
	s, err := PlanRepair(d, RepairConfig{})
	if e, ok := errors.AsType[*LostError](err); lost > 0 && (!ok || e.Regions != lost) || dead && err == nil || lost == 0 && !dead && err != nil {
		t.Errorf("plan: %v", err)
	}
	if dead {
		return
	}
	for choice, add := range map[Choice]uint64{LostHydrated: lost, LostUnhydrated: 0} {
		out := memory(t, RepairSize(d, s))
		if err := Repair(out, d, s, RepairConfig{Lost: choice}); err != nil {
			t.Fatal(err)
		}
		after, lines := findings(t, out)
		if len(lines) > 0 || after.Hydrated != s.Hydrated+add || after.Superblock.Params != s.Superblock.Params {
			t.Errorf("after repair %d regions are hydrated, of %d that were and %d lost: %q", after.Hydrated, s.Hydrated, lost, lines)
		}
	}
	if lost == 0 {
		return
	}
	if err := Repair(memory(t, RepairSize(d, s)), d, s, RepairConfig{}); !errors.Is(err, syscall.EUCLEAN) {
		t.Errorf("a repair that must not guess: %v", err)
	}
}

// TestUnreadable: blocks that the device cannot read are findings, and lost.
func TestUnreadable(t *testing.T) {
	d := fault.New(deviceOf(t, sample(t)))
	d.Fail(func(r *block.Request) error {
		if r.Offset/persistentdata.BlockSize == 5 || r.Offset/persistentdata.BlockSize == 3 {
			return syscall.EIO
		}
		return nil
	})
	s, lines := findings(t, d)
	if len(lines) != 3 || s.Lost != 32576 || !strings.HasPrefix(lines[0], "unreadable true: read block 3 (space map bitmap): ") {
		t.Errorf("%+v: %q", s, lines)
	}
	var runs []Run
	if _, err := Runs(d, func(r Run) error { runs = append(runs, r); return nil }); err != nil {
		t.Fatal(err)
	}
	if want := []Run{{0, 2, false}, {32576, 32576, true}, {69_999, 1, false}}; !slices.Equal(runs, want) {
		t.Errorf("runs %v, want %v", runs, want)
	}
}

// TestParams: what Format and Open refuse.
func TestParams(t *testing.T) {
	for _, test := range []struct {
		p    Params
		size int64
		want string
	}{
		{Params{8, 8}, 1 << 20, ""},
		{Params{2097152, 1}, 1 << 20, ""},
		{Params{4, 8}, 1 << 20, "region size of 4 sectors, want 8 to 2097152"},
		{Params{4194304, 8}, 1 << 20, "region size of 4194304 sectors"},
		{Params{24, 8}, 1 << 20, "region size of 24 sectors is not a power of 2"},
		{Params{8, 0}, 1 << 20, "target size is 0"},
		{Params{8, 1<<35 + 1}, 1 << 20, "at most 4294967296: increase the region size"},
		{Params{8, 1 << 63}, 1 << 20, "at most 4294967296"},
		{Params{8, 1<<64 - 1}, 1 << 20, "at most 4294967296"},
		{Params{8, 1 << 35}, 1 << 20, "free: no space left on device"},
		{Params{8, 8}, 4096, "no space left on device"},
		{Params{8, 8}, 0, ""},
	} {
		m, err := Format(memory(t, test.size), test.p)
		if test.size == 0 {
			if !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("%+v on nothing: %v", test.p, err)
			}
			continue
		}
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%+v: %v, want %q", test.p, err, test.want)
		}
		if (Size(test.p) > 0) != (test.want == "" || strings.Contains(test.want, "space left")) {
			t.Errorf("%+v: size %d", test.p, Size(test.p))
		}
		if m != nil && m.Close() != nil {
			t.Error("close failed")
		}
	}
	d := deviceOf(t, sample(t))
	for p, want := range map[Params]string{
		{8, 560_000}: "", {0, 560_000}: "", {8, 0}: "",
		{16, 0}:     "region size of 16 sectors, and the metadata was made for 8",
		{8, 70_001}: "target size of 70001 sectors, and the metadata was made for 560000",
	} {
		m, err := Open(d, p)
		if want == "" && (err != nil || m.Regions() != 70_000 || m.RegionSize() != 8 || m.TargetSize() != 560_000) {
			t.Errorf("%+v: %v", p, err)
		}
		if want != "" && (err == nil || !strings.Contains(err.Error(), want) || !errors.Is(err, syscall.EINVAL)) {
			t.Errorf("%+v: %v, want %q", p, err, want)
		}
	}
	if _, err := Open(memory(t, 1<<20), Params{}); !errors.Is(err, ErrUnformatted) {
		t.Errorf("zeroes: %v", err)
	}
}

// TestSize: the examples of its comment and of the page about the format.
func TestSize(t *testing.T) {
	for p, want := range map[Params]int64{{8, 1 << 31}: 65, {128, 1 << 31}: 5, {8, 1 << 35}: 1035, {8, 1}: 1, {7, 1}: 0} {
		if got := Size(p) >> 20; got != want {
			t.Errorf("%+v: %d MiB, want %d", p, got, want)
		}
	}
}

// TestSetWordsRefuses: words and bits that belong to no region; after that only Abort works.
func TestSetWordsRefuses(t *testing.T) {
	m, err := Open(deviceOf(t, sample(t)), Params{})
	if err != nil {
		t.Fatal(err)
	}
	for _, words := range []map[uint64]uint64{{1094: 1}, {1093: 1 << 48}} {
		if err := set(m, words); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%v: %v", words, err)
		}
		if err := m.Commit(); err == nil {
			t.Error("committed all the same")
		}
		if err := m.Abort(); err != nil {
			t.Fatal(err)
		}
	}
	if err := set(m, map[uint64]uint64{1093: 1 << 47}); err != nil {
		t.Error(err)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if err := errors.Join(m.Abort()); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("closed: %v", err)
	}
}
