package clonemeta

import (
	"bytes"
	"fmt"
	"testing"

	"cowherd/persistentdata"
)

// TestKernelsDevices: what the kernel has made breaks no rule, and says what the kernel said.
func TestKernelsDevices(t *testing.T) {
	for _, x := range kernelsDevices(t) {
		t.Run(x.name, func(t *testing.T) {
			d := deviceOf(t, x.image)
			m, err := Open(d, Params{})
			if err != nil {
				t.Fatal(err)
			}
			words, err := bitsOf(m)
			if err != nil {
				t.Fatal(err)
			}
			used, total := m.Usage()
			status := fmt.Sprintf("8 %d/%d %d %d/%d", used, total, m.RegionSize(), countBits(words), m.Regions())
			if status != x.status {
				t.Errorf("status %q, want %q", status, x.status)
			}
			if _, lines := findings(t, d); len(lines) > 0 {
				t.Errorf("check: %q", lines)
			}
			super, err := ReadSuperblock(d)
			if err != nil {
				t.Fatal(err)
			}
			again := make([]byte, persistentdata.BlockSize)
			super.put(again)
			if kind.Seal(again, 0); !bytes.Equal(again, x.image[:len(again)]) {
				t.Error("the superblock is written in another way")
			}
			// Commits of ours go on from the kernel's.
			for i := range 10 {
				words[i] = ^words[i]
				if err := set(m, map[uint64]uint64{uint64(i): words[i]}); err != nil {
					t.Fatal(err)
				}
			}
			if after, lines := findings(t, d); len(lines) > 0 || after.Hydrated != countBits(words) {
				t.Errorf("after commits: %+v, %q", after, lines)
			}
			if now, _ := m.Usage(); now != used {
				t.Errorf("after commits %d blocks are in use, %d were", now, used)
			}
		})
	}
}
