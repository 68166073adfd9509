//go:build interop

package interop

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"cowherd/api"
)

// TestCloneKillHydrating kills a daemon while it hydrates a clone in the background and clients write to it. Linux takes
// what is left over, hydrates some more, and hands it back; the next daemon is killed likewise, and after Linux has had it
// once more the last one hydrates the rest.
func TestCloneKillHydrating(t *testing.T) {
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
			d := newDaemon(t)
			slowly := d.writeConfig("[throttle.hydration]\nrate = \"1M\"\nburst = \"64k\"\n")
			for round := range uint64(2) {
				d.start("--config", slowly) // the second one finds the clone in its state
				if round == 0 {
					d.do("clone", live, "--from", c.sourcePath, c.destPath, "--metadata", c.metaPath, "--region-size",
						fmt.Sprint(k.region), "--hydration-threshold", "8", "--hydration-batch-size", "2")
				}
				c.killHydrating(d, round)
				c.holdLinux(20)
				c.checkFiles()
			}
			c.hydrateByDaemon(d)
		})
	}
}

// writeConfig writes a configuration file of the daemon.
func (d *daemon) writeConfig(text string) (path string) {
	d.t.Helper()
	path = filepath.Join(d.dir, "cowherd.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		d.t.Fatal(err)
	}
	return path
}

// killHydrating lets the daemon hydrate and clients write, kills it, and takes what is there then for the model.
func (c *clone) killHydrating(d *daemon, round uint64) {
	t := c.t
	t.Helper()
	taken := d.contents(live)
	if at, differ := difference(taken, c.model); differ {
		t.Errorf("the daemon shows another clone than was left, from byte %d on", at)
	}
	writers := newScribbler(c.model)
	writers.isVolatile = true
	writers.start(d, live, round)
	before, deadline := d.cloneOf(live).Kcopyd, time.Now().Add(endLimit)
	for backgroundBytes(&before) == backgroundBytes(&d.cloneOf(live).Kcopyd) {
		if time.Now().After(deadline) {
			t.Fatal("nothing is hydrated in the background")
		}
		time.Sleep(time.Millisecond)
	}
	x := d.cloneOf(live)
	d.kill()
	view, hydrated := c.compose()
	writers.check(t, "the clone", view)
	if hydrated == c.regions() || !x.Running {
		t.Errorf("%d regions are hydrated, running %v: this shows nothing", hydrated, x.Running)
	}
	t.Logf("killed: %d of %d regions are hydrated; in the background %d bytes were", hydrated, c.regions(), backgroundBytes(&x.Kcopyd))
	c.model, c.status = view, ""
	c.checkMetadata()
}

// cloneOf is what the daemon says of a clone.
func (d *daemon) cloneOf(name string) *api.Clone {
	d.t.Helper()
	x, err := d.api.Device(d.t.Context(), name)
	if err == nil && x.Clone == nil {
		err = errors.New("it is not a clone")
	}
	if err != nil {
		d.t.Fatal(err)
	}
	return x.Clone
}

// backgroundBytes is how much an engine has copied in the background.
func backgroundBytes(k *api.Kcopyd) (sum uint64) {
	for i := range k.Methods {
		if k.Methods[i].Class == "hydration" {
			sum += k.Methods[i].Bytes
		}
	}
	return sum
}

// hydrateByDaemon has a daemon take the clone back, hydrate it to its end and let go of the source.
func (c *clone) hydrateByDaemon(d *daemon) {
	c.t.Helper()
	d.start()
	d.do("clone", "--detach-source", live, "--wait")
	if !bytes.Equal(d.contents(live), c.model) {
		c.t.Error("hydrated, the clone is another than the model")
	}
	d.stop()
	c.status = "" // not the daemon's, which has other arguments
	c.checkMetadata()
	if _, hydrated := c.compose(); hydrated != c.regions() {
		c.t.Errorf("%d of %d regions are hydrated in the end", hydrated, c.regions())
	}
	if at, differ := difference(c.contents(c.destPath), c.model); differ {
		c.t.Errorf("from byte %d on, the destination is not the view, although all is hydrated", at)
	}
	if !bytes.Equal(c.contents(c.sourcePath), c.base) {
		c.t.Error("the source has changed")
	}
}
