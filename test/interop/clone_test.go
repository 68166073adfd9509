//go:build interop

package interop

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"cowherd/block"
)

// clonePrelude is what every script of a guest with a clone begins with.
//
//go:embed lab/clone.sh
var clonePrelude string

// needClone skips the test when there is no lab, or its kernel has no dm-clone and that could not be compiled.
func needClone(t *testing.T) {
	t.Helper()
	why, err := os.ReadFile(filepath.Join(needLab(t), "without"))
	switch {
	case err == nil:
		t.Skipf("needs dm-clone, which could not be compiled:\n%s", why)
	case !errors.Is(err, os.ErrNotExist):
		t.Fatal(err)
	}
}

// cloneKind is the shape of a clone.
type cloneKind struct {
	region int64 // bytes
	size   int64
	meta   int64 // bytes of the metadata device
	// slow is how many milliseconds a read of the source takes while Linux hydrates, so that this lasts for a while.
	slow             int
	threshold, batch uint32 // regions that are hydrated at the same time, and by one copy
}

func (k cloneKind) String() string { return strconv.FormatInt(k.region, 10) }

// cloneKinds are the clones that are handed over. The last region is not whole.
var cloneKinds = []cloneKind{
	{4 * kib, 5*mib + 7*block.SectorSize, cloneMetaSize, 1, 1, 1},
	{64 * kib, 20*mib + 7*block.SectorSize, cloneMetaSize, 10, 3, 2},
	{1 * mib, 40*mib + 7*block.SectorSize, cloneMetaSize, 100, 1, 1},
}

// manyRegions is a clone whose bitset takes two blocks, and the space map of its metadata two more.
var manyRegions = cloneKind{4 * kib, 128*mib + 7*block.SectorSize, 80 * mib, 0, 64, 16}

// cloneMetaSize is that of most metadata devices: the last block is not whole.
const cloneMetaSize = 2*mib + 3*block.SectorSize

// clone is the devices of a clone, as files, and a model of what it must show.
type clone struct {
	t *testing.T
	cloneKind
	sourcePath, destPath, metaPath string
	base                           []byte // what the source holds, for ever
	model                          []byte // what the clone shows
	status                         string // the line with which it was left; "": nobody knows
	steps                          uint64 // workloads and discards so far: each has a seed of its own
}

// newClone makes a source with data in most places, a destination full of what must never be seen, and an empty
// metadata device.
func newClone(t *testing.T, k cloneKind) *clone {
	t.Helper()
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	c := &clone{t: t, cloneKind: k, sourcePath: path("source.img"), destPath: path("destination.img"), metaPath: path("metadata.img")}
	c.base = make([]byte, k.size)
	c.random(int(k.size/mib)*8, 1, 500, 0).apply(c.base)
	c.model = bytes.Clone(c.base)
	rubbish := bytes.Repeat([]byte("never to be seen"), int(k.size/16))
	for name, contents := range map[string][]byte{
		c.sourcePath: c.base, c.destPath: rubbish, c.metaPath: make([]byte, k.meta),
	} {
		if err := writeSparse(name, contents); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// writeSparse writes a file with holes where the contents are zero.
func writeSparse(path string, contents []byte) error {
	const unit = 64 * kib
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	err = f.Truncate(int64(len(contents)))
	zeroes := make([]byte, unit)
	for at := 0; at < len(contents) && err == nil; at += unit {
		if p := contents[at:min(at+unit, len(contents))]; !bytes.Equal(p, zeroes[:len(p)]) {
			_, err = f.WriteAt(p, int64(at))
		}
	}
	return errors.Join(err, f.Close())
}

// regionSectors is the size of a region in sectors.
func (c *clone) regionSectors() int64 { return c.region / block.SectorSize }

// regions is the number of regions, the last one included, whole or not.
func (c *clone) regions() int64 { return (int64(len(c.model)) + c.region - 1) / c.region }

// random is a workload that is like no other of the clone.
func (c *clone) random(count, least, most, align int) workload {
	c.steps++
	return workload{Seed: uint64(c.region)<<20 | c.steps, Count: count, Min: least, Max: most, Align: align}
}

// cloneOp is something that is done to a clone: a workload, or a discard of count sectors.
type cloneOp struct {
	workload
	start, count int64 // of a discard; 0: it is a workload
}

// script is the line that does it in the guest.
func (o cloneOp) script() string {
	if o.count > 0 {
		return fmt.Sprintf("discard %d %d\n", o.start, o.count)
	}
	return fmt.Sprintf("io write $clone %s\n", o.workload)
}

// ops are small writes, writes of whole regions, long ones, and discards: within a region, across some, and of the end.
func (c *clone) ops() (ops []cloneOp) {
	region := int(c.regionSectors())
	few := min(max(2, int(c.regions()/32)), 200)
	write := func(w workload) { ops = append(ops, cloneOp{workload: w}) }
	write(c.random(few, 1, 24, 0))
	write(c.random(few, region, region, region))
	ops = append(ops, c.discards(min(few, 6))...)
	write(c.random(2, 64, 600, 0))
	write(c.random(few, 1, 24, 0))
	return ops
}

// discards are count random discards and one that ends with the device.
func (c *clone) discards(count int) (ops []cloneOp) {
	c.steps++
	random := rand.New(rand.NewPCG(uint64(c.region), c.steps))
	region, end := c.regionSectors(), int64(len(c.model))/block.SectorSize
	for range count {
		n := 1 + random.Int64N(3*region)
		ops = append(ops, cloneOp{start: random.Int64N(end - n), count: n})
	}
	n := 2*region + 1 + random.Int64N(region)
	return append(ops, cloneOp{start: end - n, count: n})
}

// apply does to the model what was done to the clone. A discard is of whole regions, and these read as zeroes from then
// on, because the destination's file has holes there.
func (c *clone) apply(ops []cloneOp) {
	for _, o := range ops {
		if o.count == 0 {
			o.workload.apply(c.model)
			continue
		}
		region := c.regionSectors()
		start, end := (o.start+region-1)/region*region, (o.start+o.count)/region*region
		if start < end {
			clear(c.model[start*block.SectorSize : end*block.SectorSize])
		}
	}
}

// kernel runs a script in a guest that has the clone's devices.
func (c *clone) kernel(script string) *guest {
	c.t.Helper()
	return kernel(c.t, clonePrelude+script, c.sourcePath, c.destPath, c.metaPath)
}

// holdLinux is Linux's turn. percent is how much of what is not hydrated it hydrates in the background.
func (c *clone) holdLinux(percent int) {
	c.t.Helper()
	ops := c.ops()
	script := fmt.Sprintf("activate_clone %d %d %d\nlook_clone taken\n", c.regionSectors(), c.threshold, c.batch)
	for _, o := range ops {
		script += o.script()
	}
	slow := c.slow
	if percent == 100 {
		slow = 0
	}
	g := c.kernel(script + fmt.Sprintf("look_clone written\nhydrate %d %d\nlook_clone left\ndeactivate_clone\n", percent, slow))
	if got := c.look(g, "taken"); c.status != "" && got != c.status {
		c.t.Errorf("Linux takes the clone over with %q, it was left with %q", got, c.status)
	}
	c.apply(ops)
	c.look(g, "written")
	c.status = c.look(g, "left")
	c.t.Logf("Linux: %s", c.status)
}

// look checks the view that the guest has seen under the name of a look, and returns the status line.
func (c *clone) look(g *guest, name string) (status string) {
	c.t.Helper()
	if got, want := g.report(name+" view"), sumBytes(c.model); got != want {
		c.t.Errorf("%s: under Linux the clone has the checksum %s, the model %s", name, got, want)
	}
	return g.report(name + " status")
}

// checkFiles expects that the source is as it was, and that who reads what is hydrated from the destination, and the rest
// from the source, sees the view.
func (c *clone) checkFiles() {
	c.t.Helper()
	if !bytes.Equal(c.contents(c.sourcePath), c.base) {
		c.t.Error("the source has changed")
	}
	view, hydrated := c.compose()
	if at, ok := difference(view, c.model); ok {
		c.t.Errorf("from byte %d (region %d) on, what source, destination and metadata hold is not the view", at, at/int(c.region))
	}
	if got := fmt.Sprintf("%d/%d", hydrated, c.regions()); got != statusWord(c.status, 3) {
		c.t.Errorf("the metadata has %s regions hydrated, the clone was left with %q", got, c.status)
	}
	c.checkMetadata()
}

// checkComplete expects that all is hydrated.
func (c *clone) checkComplete() {
	c.t.Helper()
	if want := fmt.Sprintf("%d/%d", c.regions(), c.regions()); statusWord(c.status, 3) != want {
		c.t.Errorf("the clone was left with %q, want %s regions hydrated", c.status, want)
	}
	if at, ok := difference(c.contents(c.destPath), c.model); ok {
		c.t.Errorf("from byte %d on, the destination is not the view, although all is hydrated", at)
	}
}

// compose is the view, found without anybody's help, and the number of regions that are hydrated.
func (c *clone) compose() (view []byte, hydrated int64) {
	c.t.Helper()
	isHydrated, err := hydratedRegions(c.contents(c.metaPath))
	if err != nil {
		c.t.Fatal(err)
	}
	view = c.contents(c.sourcePath)
	dest := c.contents(c.destPath)
	for r := range c.regions() {
		if isHydrated(r) {
			hydrated++
			start, end := r*c.region, min((r+1)*c.region, int64(len(view)))
			copy(view[start:end], dest[start:end])
		}
	}
	return view, hydrated
}

func (c *clone) contents(path string) []byte {
	c.t.Helper()
	p, err := os.ReadFile(path)
	if err != nil {
		c.t.Fatal(err)
	}
	return p
}

// difference is the first byte where two slices differ, if there is one.
func difference(a, b []byte) (at int, differ bool) {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i, true
		}
	}
	return min(len(a), len(b)), len(a) != len(b)
}

// statusWord is a word of a status line, "" if there are not so many.
func statusWord(status string, index int) string {
	words := strings.Fields(status)
	if index >= len(words) {
		return ""
	}
	return words[index]
}
