package persistentdata

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"cowherd/backend/mem"
	"cowherd/block"
	"cowherd/internal/fixture"
)

// TestKernelsBlocks: every block in use that a kernel has written, taken apart and written anew, is the same byte for byte.
func TestKernelsBlocks(t *testing.T) {
	packs, err := filepath.Glob("../clonemeta/testdata/*.pack")
	if err != nil || len(packs) == 0 {
		t.Fatalf("no fixtures: %v", err)
	}
	for _, pack := range packs {
		packed, err := os.ReadFile(pack)
		if err != nil {
			t.Fatal(err)
		}
		image, err := fixture.Decode(packed, nil)
		if err != nil {
			t.Fatal(err)
		}
		d, err := mem.New(mem.Config{Size: int64(len(image))})
		if err == nil {
			err = block.Write(d, image, 0)
		}
		if err != nil {
			t.Fatal(err)
		}
		at := func(n uint64) []byte { return image[n*BlockSize:][:BlockSize] }
		same := func(n uint64, k *Kind, p []byte) {
			t.Helper()
			if k.Seal(p, n); !bytes.Equal(p, at(n)) {
				t.Errorf("%s: block %d (%s) is written in another way", pack, n, k.Name)
			}
		}
		const spaceMap, targetSize, regionSize, bitset = 44, 180, 172, 188
		root := ParseRoot(image[spaceMap:])
		again := make([]byte, RootBytes)
		if root.Put(again); !bytes.Equal(again, image[spaceMap:][:RootBytes]) {
			t.Errorf("%s: the space map's root is written in another way", pack)
		}
		m, err := Open(d, root, Options{})
		if err != nil {
			t.Fatal(err)
		}
		index := make([]byte, BlockSize)
		m.space.putIndex(index)
		same(root.Index, KindIndex, index)
		for _, b := range m.space.maps {
			p := make([]byte, BlockSize)
			for i := range bitmapEntries {
				setCounter((*[BlockSize]byte)(p), i, counter(b.current, i))
			}
			same(b.place, KindBitmap, p)
		}
		regions := le.Uint64(image[targetSize:]) / le.Uint64(image[regionSize:])
		same(root.RefCounts, KindNode, nodeAgain(at(root.RefCounts)))
		a, err := OpenArray(m, le.Uint64(image[bitset:]), (regions+63)/64)
		if err != nil {
			t.Fatal(err)
		}
		same(a.Root(), KindNode, nodeAgain(at(a.Root())))
		top := node(at(a.Root()))
		for i := range top.len() {
			n := top.value(i)
			f, err := a.m.cache.read(n, KindArray, a.check(uint64(i)))
			if err != nil {
				t.Fatal(err)
			}
			words := slices.Clone(decodeWords(new([ArrayWords]uint64), f.data[:]))
			made, err := a.build(uint64(i), make([]uint64, ArrayWords), func(_ uint64, to []uint64) error {
				copy(to, words)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			same(n, KindArray, m.cache.frames[made].data[:])
		}
	}
}

// nodeAgain is a node with the same entries, put in one by one.
func nodeAgain(p node) []byte {
	q := node(make([]byte, BlockSize))
	q.init(le.Uint32(p[4:]), p.valueSize())
	for i := range p.len() {
		q.insert(i, p.key(i), p.value(i))
	}
	return q
}
