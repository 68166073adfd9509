package bench

import (
	"math/rand/v2"
	"testing"
)

// TestAftermathBlocks: no block of the source is overwritten whose copy is, wherever the copies lie.
func TestAftermathBlocks(t *testing.T) {
	const size, block = 1 << 20, 16 << 10
	for _, packed := range []bool{false, true} {
		r := rand.New(rand.NewPCG(1, 1))
		x := &aftermath{cell: &Cell{Size: size, Block: block}, rand: r}
		from := func(at int64) int64 { return at }
		if packed {
			x.packed = &packing{from: make([]int64, size/block)}
			for _, i := range r.Perm(size / block) {
				x.packed.place(int64(i)*block, block)
			}
			from = func(at int64) int64 { return x.packed.from[at/block] + at%block }
		}
		ofCopy, ofSource := x.blocks()
		written := map[int64]bool{}
		for _, at := range ofCopy {
			written[from(at)] = true
		}
		for _, at := range ofSource {
			if written[at] || at%overwriteBlock != 0 || at < 0 || at >= size {
				t.Fatalf("packed %v: block at %d of the source", packed, at)
			}
			written[at] = true
		}
		if len(written) != size/overwriteBlock {
			t.Errorf("packed %v: %d blocks", packed, len(written))
		}
	}
}
