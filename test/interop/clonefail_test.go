//go:build interop

package interop

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cowherd/block"
)

// TestCloneCrash: the power fails while Linux hydrates in the background and writes to the clone. What it had written and
// flushed before is there, and of the rest each sector holds what somebody has written. cowherd goes on with it, and
// Linux ends it.
func TestCloneCrash(t *testing.T) {
	for _, k := range cloneKinds {
		t.Run(k.String(), func(t *testing.T) {
			t.Parallel()
			needClone(t)
			c := newClone(t, k)
			ops := c.ops()
			lost := []workload{c.random(20000, 1, 8, 0), c.random(20000, 8, 16, 0)}
			script := fmt.Sprintf("activate_clone %d %d %d\n", c.regionSectors(), c.threshold, c.batch)
			for _, o := range ops {
				script += o.script()
			}
			g := c.kernel(script + fmt.Sprintf(`echo "before: $(status clone)"
start_hydration %d
await_hydrated $(($(hydrated) + 3))
io write $clone %s &
io write $clone %s &
await_hydrated $(($(hydrated) + 5))
echo "at work: $(status clone)"
`, c.slow, lost[0], lost[1]))
			c.apply(ops)
			c.adopt(lost)
			c.t.Logf("before the power failure: %s\nat work: %s", g.report("before"), g.report("at work"))
			for i, hold := range []func(int){c.holdCowherd, c.holdLinux} {
				hold(50 + 50*i)
				c.checkFiles()
			}
			c.checkComplete()
		})
	}
}

// adopt takes what the devices hold for the model, after writes of which nobody knows how many were done. Each sector must
// hold what the model has, or what one of the writes has put there.
func (c *clone) adopt(lost []workload) {
	c.t.Helper()
	if !bytes.Equal(c.contents(c.sourcePath), c.base) {
		c.t.Error("the source has changed")
	}
	written := map[[2]uint64]bool{} // sectors and the words that fill them
	for _, w := range lost {
		_ = w.each(int64(len(c.model)), func(p []byte, offset int64) error {
			for at := 0; at < len(p); at += block.SectorSize {
				written[[2]uint64{uint64(offset) + uint64(at), binary.LittleEndian.Uint64(p[at:])}] = true
			}
			return nil
		})
	}
	view, hydrated := c.compose()
	if len(view) != len(c.model) {
		c.t.Fatalf("the view has %d bytes, the model %d", len(view), len(c.model))
	}
	news, sector := 0, make([]byte, block.SectorSize)
	for at := 0; at < len(view); at += block.SectorSize {
		p := view[at : at+block.SectorSize]
		if bytes.Equal(p, c.model[at:at+block.SectorSize]) {
			continue
		}
		word := binary.LittleEndian.Uint64(p)
		if fillSector(sector, word); !written[[2]uint64{uint64(at), word}] || !bytes.Equal(p, sector) {
			c.t.Fatalf("sector %d (region %d) holds what nobody has written", at/block.SectorSize, int64(at)/c.region)
		}
		news++
	}
	c.t.Logf("%d of %d regions are hydrated, %d sectors hold what was written at last", hydrated, c.regions(), news)
	c.model, c.status = view, ""
}

// TestCloneKill kills a daemon in the midst of writes to a clone, again and again; each time the next one goes on. Then
// Linux takes the clone over and hydrates the rest. Only the writes hydrate: in the background all would be hydrated
// before anybody could kill it.
func TestCloneKill(t *testing.T) {
	for _, k := range cloneKinds[:2] {
		k.size *= 4 // else the writes hydrate all
		t.Run(k.String(), func(t *testing.T) {
			t.Parallel()
			needClone(t)
			c := newClone(t, k)
			for _, path := range []string{c.destPath, c.metaPath} { // the daemon makes them
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			}
			writers := newScribbler(c.base)
			writers.isVolatile = true
			d := newDaemon(t)
			for round := range uint64(3) {
				d.start() // from the second on it finds the clone in its state
				if round == 0 {
					d.do("clone", live, "--from", c.sourcePath, c.destPath, "--metadata", c.metaPath, "--region-size",
						fmt.Sprint(k.region), "--no-hydration")
				}
				writers.start(d, live, round)
				d.kill()
				view, hydrated := c.compose()
				writers.check(t, "the clone", view)
				c.model = view
				c.checkMetadata()
				if hydrated == c.regions() {
					t.Error("all is hydrated: this shows nothing")
				}
				t.Logf("killed: %d of %d regions are hydrated", hydrated, c.regions())
			}
			c.holdLinux(100)
			c.checkFiles()
			c.checkComplete()
		})
	}
}

// TestCloneDamage: what Linux refuses to use for a clone's metadata cowherd refuses too.
func TestCloneDamage(t *testing.T) {
	t.Parallel()
	needClone(t)
	c := newClone(t, cloneKinds[1])
	c.holdCowherd(30)
	damages, err := damagedMetadata(c.contents(c.metaPath))
	if err != nil {
		t.Fatal(err)
	}
	images := []string{c.sourcePath, c.destPath, c.metaPath}
	script := fmt.Sprintf(`try_clone() {
	if dmsetup create clone --table "0 $size clone /dev/$1 /dev/vdb /dev/vda %d 1 no_hydration"; then
		echo "$1: taken"
		dmsetup remove clone
	else
		echo "$1: refused"
	fi
}
try_clone vdc
`, c.regionSectors())
	for i, d := range damages {
		path := filepath.Join(t.TempDir(), "metadata.img")
		if err := os.WriteFile(path, d.contents, 0o600); err != nil {
			t.Fatal(err)
		}
		images = append(images, path)
		script += fmt.Sprintf("try_clone vd%c\n", 'd'+i)
		c.refuses(d, path)
	}
	g := kernel(t, clonePrelude+script, images...)
	if got := g.report("vdc"); got != "taken" {
		t.Errorf("metadata that is whole: %s by Linux", got)
	}
	for i, d := range damages {
		if got := g.report(fmt.Sprintf("vd%c", 'd'+i)); got != "refused" {
			t.Errorf("%s: %s by Linux", d.what, got)
		}
	}
	c.holdLinux(100)
	c.checkFiles()
	c.checkComplete()
}

// refuses expects that cowherd does not take metadata, and says why.
func (c *clone) refuses(d damage, path string) {
	c.t.Helper()
	damaged := *c
	damaged.metaPath = path
	l, err := damaged.open(false)
	if err == nil {
		l.close()
		c.t.Errorf("%s: taken by cowherd", d.what)
		return
	}
	if !strings.Contains(err.Error(), d.where) {
		c.t.Errorf("%s: cowherd says %q, and nothing of %q", d.what, err, d.where)
	}
}

// damage is damaged metadata.
type damage struct {
	what, where string // where: what an error must contain
	contents    []byte
}

// damagedMetadata is metadata with a bit turned around in one block, and with another block in the place of one.
func damagedMetadata(whole metaImage) (found []damage, err error) {
	arrays, err := whole.arrays(nil, whole.word(superBitset), metaDepth)
	if err != nil {
		return nil, err
	}
	blocks := []struct {
		name   string
		number uint64
	}{
		{"superblock", 0},
		{"index of the space map", whole.word(superSpaceMap)},
		{"tree of the bitset", whole.word(superBitset)},
		{"block of the bitset", arrays[0]},
	}
	add := func(what string, n uint64, change func(m metaImage)) {
		m := bytes.Clone(whole)
		change(m)
		found = append(found, damage{what, fmt.Sprintf("block %d", n), m})
	}
	for _, b := range blocks {
		add("a bit is turned around: "+b.name, b.number, func(m metaImage) { m[b.number*metaBlock+100] ^= 1 })
	}
	for i, b := range blocks[1:] {
		other := blocks[1+(i+1)%3]
		add(fmt.Sprintf("the %s is where the %s should be", other.name, b.name), b.number, func(m metaImage) {
			copy(m[b.number*metaBlock:][:metaBlock], whole[other.number*metaBlock:])
		})
	}
	return found, nil
}
