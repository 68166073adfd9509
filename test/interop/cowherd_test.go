//go:build interop

package interop

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"cowherd/backend/file"
	"cowherd/block"
	"cowherd/cowstore"
)

// TestKill kills a daemon in the midst of writes to origin and snapshot, again and again; each time the next one goes on
// with the store, and is killed in turn. Then Linux takes the store over as
// the last one has left it, writes on, and hands it back.
func TestKill(t *testing.T) {
	for _, chunk := range []int64{4 * kib, 64 * kib} {
		t.Run(fmt.Sprint(chunk), func(t *testing.T) {
			t.Parallel()
			needLab(t)
			p := newPair(t, "P", chunk, originSize, 30*mib)
			origin, view := newScribbler(p.originModel), newScribbler(p.viewModel)
			d := newDaemon(t)
			for round := range uint64(4) {
				d.start() // from the second on it finds both in its state
				if round == 0 {
					d.take(p, true)
				}
				origin.start(d, live, round)
				view.start(d, snap, round)
				d.kill()
				p.adopt()
				origin.check(t, "the origin", p.originModel)
				view.check(t, "the snapshot", p.viewModel)
				p.status = ""
				p.checkStore()
				t.Logf("killed: %+v", p.info())
			}
			p.holdLinux(false)
			p.checkStore()
			p.holdCowherd(false)
			p.checkStore()
		})
	}
}

// TestGaps: a store that a crash has left with chunks that no record names, which is what a kill leaves only with luck.
// cowherd uses them, and Linux sees a store like any other and merges it.
func TestGaps(t *testing.T) {
	t.Parallel()
	needLab(t)
	p := newPair(t, "P", 4*kib, originSize, 30*mib)
	const lost = 300 // more than an area's
	if err := p.makeGaps(lost); err != nil {
		t.Fatal(err)
	}
	if got := p.info().GapChunks; got < lost {
		t.Fatalf("the store has gaps of %d chunks, want %d", got, lost)
	}
	p.checkStore()
	p.holdCowherd(false)
	p.checkStore()
	if got := p.info().GapChunks; got != 0 {
		t.Errorf("gaps of %d chunks are left", got)
	}
	p.mergeByLinux()
}

// makeGaps makes a store with one exception, of chunk 0, for which chunks before it were given out and never committed.
func (p *pair) makeGaps(lost int) error {
	d, err := file.Open(p.cow, file.Options{})
	if err != nil {
		return err
	}
	store, err := cowstore.CreatePersistent(d, cowstore.ChunkSize(p.chunk), cowstore.PersistentConfig{})
	if err == nil {
		err = store.Load(0, func(cowstore.Record) bool { return true })
	}
	for count := 0; err == nil && lost > 0; lost -= count {
		_, count, err = store.Allocate(0, lost)
	}
	if err == nil {
		err = p.commitFirst(d, store)
	}
	return errors.Join(err, d.Close())
}

// commitFirst writes chunk 0 of the snapshot.
func (p *pair) commitFirst(d block.Device, store *cowstore.Persistent) error {
	chunk, _, err := store.Allocate(0, 1)
	if err != nil {
		return err
	}
	data := p.viewModel[:p.chunk]
	fillSector(data, 1)
	if err := block.Write(d, data, int64(chunk)*p.chunk); err != nil {
		return err
	}
	done := make(chan error, 1)
	store.Commit(&cowstore.Commit{New: chunk, Count: 1, Done: func(c *cowstore.Commit) { done <- c.Err }})
	defer store.Wait()
	return <-done
}

// TestFull: a store that cowherd has filled to the last chunk that is of use is readable for Linux. What is of use is a
// matter of where the second area lies: behind the end of the device (258 chunks), or in its last chunk.
func TestFull(t *testing.T) {
	for _, chunks := range []int64{258, 259, 260} {
		t.Run(fmt.Sprint(chunks), func(t *testing.T) {
			t.Parallel()
			needLab(t)
			p := newPair(t, "PO", 4*kib, originSize, chunks*4*kib)
			d := newDaemon(t)
			d.start()
			d.take(p, true)
			device := d.open(snap)
			err := p.random(1000, 8, 8).each(device.Size(), func(b []byte, at int64) error {
				at -= at % p.chunk
				err := block.Write(device, b, at)
				if err == nil {
					copy(p.viewModel[at:], b)
				}
				return err
			})
			if err = errors.Join(err, device.Close()); err == nil || d.status() != "Overflow" {
				t.Errorf("status %q after 1000 writes, %v", d.status(), err)
			}
			d.look(p, "full")
			d.stop()
			p.checkStore()
			g := kernel(t, fmt.Sprintf("activate %s\nlook full\ndeactivate\n", p.table()), p.origin, p.cow)
			if got := p.look(g, "full"); got != p.status {
				t.Errorf("Linux takes the store over with %q, it was left with %q", got, p.status)
			}
		})
	}
}

// TestGrow: a store whose device has grown while it was in use.
func TestGrow(t *testing.T) {
	t.Parallel()
	needLab(t)
	p := newPair(t, "P", 4*kib, originSize, 1*mib)
	d := newDaemon(t)
	d.start()
	d.do("attach", live, p.origin)
	d.do("snapshot", snap, "--persistent", "--store", p.cow, "--chunk", fmt.Sprint(p.chunk), "--on-full", "grow")
	loads := p.loads()
	d.write(loads)
	p.apply(loads)
	d.look(p, "left")
	p.status = d.status()
	d.stop()
	if grown, err := os.Stat(p.cow); err != nil || grown.Size() <= 1*mib {
		t.Errorf("the store has not grown: %+v, %v", grown, err)
	}
	p.checkStore()
	p.holdLinux(false)
	p.checkStore()
}
