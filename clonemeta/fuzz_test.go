package clonemeta

import (
	"encoding/binary"
	"testing"

	"cowherd/block"
	"cowherd/persistentdata"
)

// FuzzOpen gives Open, LoadBits, SetWords, Commit, Check, Runs and Repair devices that nobody should trust: none may panic, go
// on for ever or take much memory. Most of a device that is taken by chance has wrong checksums, and would be
// refused at once, so that the input is changes of good metadata, after which blocks are sealed again: ten bytes each, for
// block, whether it is sealed, offset and a new value of six bytes. An input of another length is a device as it is.
func FuzzOpen(f *testing.F) {
	base := sample(f)
	change := func(n, seal byte, at uint16, v uint64) []byte {
		p := binary.LittleEndian.AppendUint16([]byte{n, seal}, at)
		return binary.LittleEndian.AppendUint64(p, v)[:10]
	}
	f.Add([]byte{})
	f.Add(append(change(7, 1, 4, 1), change(7, 1, 32+252*8, 7)...))
	f.Add(change(7, 1, 32+252*8+8, 4))
	f.Add(change(0, 1, atTargetSize, 1<<34))
	f.Add(change(0, 1, atSpaceMap, 1<<40))
	f.Add(change(0, 1, atSpaceMap+24, 7))
	f.Add(change(3, 1, 16, 0))
	f.Add(change(1, 1, 16, 5))
	f.Add(append(change(3, 1, 17, 0xff), change(2, 1, 16, 1)...))
	f.Add(base[:5*persistentdata.BlockSize+1])
	kinds := []*persistentdata.Kind{kind, persistentdata.KindIndex, persistentdata.KindNode, persistentdata.KindBitmap,
		persistentdata.KindArray, persistentdata.KindArray, persistentdata.KindArray, persistentdata.KindNode}
	f.Fuzz(func(t *testing.T, input []byte) {
		p := append([]byte(nil), base...)
		if len(input)%10 != 0 {
			p = append(make([]byte, 0, len(input)), input...)
			p = p[:len(p)/block.SectorSize*block.SectorSize]
		} else {
			for ; len(input) > 0; input = input[10:] {
				n := uint64(input[0] % 64)
				b := p[n*persistentdata.BlockSize:][:persistentdata.BlockSize]
				copy(b[binary.LittleEndian.Uint16(input[2:])%persistentdata.BlockSize:], input[4:10])
				if seal := input[1]; seal > 0 && n < uint64(len(kinds)) {
					kinds[n].Seal(b, n)
				} else if seal > 0 {
					kinds[int(seal)%len(kinds)].Seal(b, n)
				}
			}
		}
		useUntrusted(t, deviceOf(t, p))
	})
}

// useUntrusted does with a device all that can be done.
func useUntrusted(t *testing.T, d block.Device) {
	findings := 0
	count := func(*persistentdata.Finding) { findings++ }
	s, err := Check(d, CheckConfig{Report: count})
	if err == nil && s.Violations+s.Remarks != findings {
		t.Errorf("%d findings, %+v", findings, s)
	}
	if err == nil && s.Readable && s.Superblock.Regions() < 1<<20 {
		if s.Hydrated+s.Lost > s.Superblock.Regions() {
			t.Errorf("%d regions hydrated and %d lost, of %d", s.Hydrated, s.Lost, s.Superblock.Regions())
		}
		out := memory(t, RepairSize(d, s))
		if err := Repair(out, d, s, RepairConfig{Lost: LostHydrated}); err != nil {
			t.Errorf("repair: %v", err)
		} else if after, err := Check(out, CheckConfig{}); err != nil || after.Violations+after.Remarks > 0 || after.Hydrated != s.Hydrated+s.Lost {
			t.Errorf("after repair: %+v, %v", after, err)
		}
	}
	m, err := Open(d, Params{})
	if err != nil {
		return
	}
	if _, err = bitsOf(m); err != nil {
		// What LoadBits refuses Check must name.
		if s.Violations == 0 {
			t.Errorf("check is silent, and the bitset cannot be loaded: %v", err)
		}
	}
	for _, words := range []map[uint64]uint64{{0: 1}, {600: 5}, {m.params.words() - 1: 1}} {
		if err := set(m, words); err != nil {
			if err := m.Abort(); err != nil {
				return
			}
		}
	}
	if again, err := Check(d, CheckConfig{}); err == nil && s.Violations == 0 && again.Violations > 0 {
		t.Errorf("good metadata has become bad: %+v", again)
	}
}
