package clonemeta

import (
	"sync/atomic"

	"cowherd/persistentdata"
)

// usage is what Usage tells: it may be read while the metadata is being changed.
type usage struct{ used, total atomic.Uint64 }

func (u *usage) set(m *persistentdata.Manager) {
	used, total := m.Usage()
	u.used.Store(used)
	u.total.Store(total)
}

func (u *usage) get() (used, total uint64) { return u.used.Load(), u.total.Load() }

// sizeMin is the least that Size gives: 1 MiB. What the kernel's documents advise is much more.
const sizeMin = 1 << 20

// Size is how many bytes a metadata device for p needs, so that every commit finds room: twice the blocks of the bitset and
// its tree, because one commit may change all of them while the last one's stay; twice those of the space map; the
// superblock; and 64 more. It is a multiple of 1 MiB. 0: the parameters are out of range. For 1 TiB in regions of
// 4 KiB it is 65 MiB, in regions of 64 KiB 5 MiB; for 16 TiB in regions of 4 KiB 1035 MiB.
func Size(p Params) int64 {
	if _, what := p.check(); what != "" {
		return 0
	}
	tree := 2 * persistentdata.ArrayTreeBlocks(p.words())
	blocks := tree + 1 + 64
	blocks += 2 * persistentdata.SpaceMapBlocks(blocks+2*persistentdata.SpaceMapBlocks(blocks))
	size := int64(blocks) * persistentdata.BlockSize
	return max((size+sizeMin-1)/sizeMin*sizeMin, sizeMin)
}
