package clonemeta

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"cowherd/backend/file"
	"cowherd/block"
	"cowherd/internal/invariant"
	"cowherd/persistentdata"
)

// trimmed is a device that keeps of each block what comes before its last byte that is not zero, so that even the metadata
// of the largest clone fits in memory.
type trimmed struct {
	size   int64
	blocks map[int64][]byte
}

func (d *trimmed) Size() int64 { return d.size }

func (d *trimmed) Limits() block.Limits {
	l := block.NoLimits()
	l.LogicalBlock = persistentdata.BlockSize
	return l
}

func (d *trimmed) Submit(r *block.Request) {
	if err := block.CheckRange(r, d.size, d.Limits()); err != nil {
		r.Complete(err)
		return
	}
	for i := 0; i < len(r.Data); i += persistentdata.BlockSize {
		p, n := r.Data[i:i+persistentdata.BlockSize], (r.Offset+int64(i))/persistentdata.BlockSize
		switch r.Op {
		case block.OpRead:
			clear(p[copy(p, d.blocks[n]):])
		case block.OpWrite:
			if p = bytes.TrimRight(p, "\x00"); !bytes.Equal(d.blocks[n], p) {
				d.blocks[n] = slices.Clone(p)
			}
		}
	}
	r.Complete(nil)
}

// TestLargest: 2^32 regions, 16 TiB of 4 KiB each, which the kernel does not open. What the metadata takes in memory does
// not depend on that.
func TestLargest(t *testing.T) {
	if invariant.Enabled {
		t.Skip("one goroutine, and a minute of it under the race detector")
	}
	p := Params{RegionSize: 8, TargetSize: 16 << 40 / block.SectorSize}
	d := &trimmed{size: Size(p), blocks: make(map[int64][]byte)}
	start := time.Now()
	m, err := Format(d, p)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("format: %v, %d MiB", time.Since(start), d.size>>20)
	words := map[uint64]uint64{0: 1, 1 << 25: 2, 1<<26 - 1: 1 << 63}
	if err := set(m, words); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	start = time.Now()
	if m, err = Open(d, p); err != nil {
		t.Fatal(err)
	}
	t.Logf("open: %v", time.Since(start))
	if m.Regions() != RegionsMax {
		t.Errorf("%d regions", m.Regions())
	}
	err = m.LoadBits(func(first uint64, got []uint64) bool {
		for i, w := range got {
			if w != words[first+uint64(i)] {
				t.Errorf("word %d is %#x", first+uint64(i), w)
			}
		}
		return true
	})
	if err != nil {
		t.Error(err)
	}
	t.Logf("open and load: %v", time.Since(start))
	s, lines := findings(t, d)
	if len(lines) > 0 || s.Hydrated != 3 {
		t.Errorf("%d hydrated, %q", s.Hydrated, lines)
	}
	// What m keeps, without what the device does.
	d.blocks = nil
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if kept := int64(before.HeapAlloc) - int64(after.HeapAlloc); kept > 32<<20 {
		t.Errorf("it kept %d MiB in memory", kept>>20)
	}
}

// unflushed is a device whose flushes are free.
type unflushed struct{ block.Device }

func (d unflushed) Submit(r *block.Request) {
	if r.Op == block.OpFlush {
		r.Complete(nil)
		return
	}
	d.Device.Submit(r)
}

// newBenchmark is metadata of a clone of 1 TiB in regions of 4 KiB, in a file.
func newBenchmark(b *testing.B, flushed bool) (block.Device, *Metadata) {
	b.Helper()
	p := Params{RegionSize: 8, TargetSize: 1 << 40 / block.SectorSize}
	f, err := file.Create(filepath.Join(b.TempDir(), "meta"), Size(p), file.Options{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := f.Close(); err != nil {
			b.Error(err)
		}
	})
	var d block.Device = f
	if !flushed {
		d = unflushed{f}
	}
	m, err := Format(d, p)
	if err != nil {
		b.Fatal(err)
	}
	return d, m
}

// BenchmarkCommit: a commit in which so many bits of a clone of 1 TiB in regions of 4 KiB change, by chance or side by side;
// the metadata is in a file in the temporary directory, with its flushes or without.
func BenchmarkCommit(b *testing.B) {
	for _, bits := range []uint64{1, 1000, 1_000_000} {
		for _, scattered := range []bool{true, false} {
			for _, flushed := range []bool{true, false} {
				b.Run(fmt.Sprintf("bits=%d/scattered=%v/flushed=%v", bits, scattered, flushed), func(b *testing.B) {
					_, m := newBenchmark(b, flushed)
					random := rand.New(rand.NewPCG(1, 1))
					words := make([]uint64, m.params.words())
					b.ReportAllocs()
					b.ResetTimer()
					for range b.N {
						b.StopTimer()
						changed := choose(random, words, bits, scattered)
						b.StartTimer()
						err := m.SetWords(func(yield func(uint64, uint64) bool) {
							for _, i := range changed {
								if !yield(i, words[i]) {
									return
								}
							}
						})
						if err == nil {
							err = m.Commit()
						}
						if err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		}
	}
}

// choose changes bits and returns the words that differ, in order.
func choose(random *rand.Rand, words []uint64, bits uint64, scattered bool) []uint64 {
	regions := uint64(len(words)) * 64
	first := random.Uint64N(regions - bits)
	changed := make([]uint64, 0, bits)
	for i := range bits {
		r := first + i
		if scattered {
			r = random.Uint64N(regions)
		}
		words[r/64] ^= 1 << (r % 64)
		changed = append(changed, r/64)
	}
	slices.Sort(changed)
	return slices.Compact(changed)
}

// BenchmarkOpen: Open and LoadBits of a clone of 1 TiB in regions of 4 KiB.
func BenchmarkOpen(b *testing.B) {
	d, _ := newBenchmark(b, false)
	b.ReportAllocs()
	for b.Loop() {
		m, err := Open(d, Params{})
		if err == nil {
			err = m.LoadBits(func(uint64, []uint64) bool { return true })
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkFormat: Format of a clone of 16 TiB in regions of 4 KiB, in a file in the temporary directory.
func BenchmarkFormat(b *testing.B) {
	p := Params{RegionSize: 8, TargetSize: 16 << 40 / block.SectorSize}
	dir := b.TempDir()
	var fs syscall.Statfs_t
	if err := syscall.Statfs(dir, &fs); err != nil || int64(fs.Bavail)*fs.Bsize < 2<<30 {
		b.Skipf("there are no 2 GiB free in %s: %v", dir, err)
	}
	f, err := file.Create(filepath.Join(dir, "meta"), Size(p), file.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Format(f, p); err != nil {
			b.Fatal(err)
		}
	}
}
