package service

import (
	"bytes"
	"context"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"cowherd/api"
)

// countEvents is how many events of a kind there were about a device.
func countEvents(t testing.TB, d *Daemon, kind, name string) (count int) {
	t.Helper()
	for _, e := range allEvents(t, d) {
		if e.Type == kind && e.Name == name {
			count++
		}
	}
	return count
}

// TestDetachSource: a source is let go of when all is hydrated, with a commit of what was not committed, and not before;
// once, however often and by however many that is asked for.
func TestDetachSource(t *testing.T) {
	c := testConfig(t)
	d := startDaemon(t, c)
	src, dest := image(t, cloneBytes), filepath.Join(t.TempDir(), "web.img")
	makeClone(t, d, "web", dest, api.CloneRequest{Source: src, NoHydration: true})
	put(t, d, "web", 5, pattern(1, 1))
	_, err := d.DetachSource(t.Context(), "web")
	wantErrno(t, err, syscall.EBUSY, "15 of 16 regions are not hydrated, and hydration is stopped")
	if x, err := d.Device("web"); err != nil || x.Clone.Detached || !x.Clone.SourceInUse {
		t.Errorf("refused, and then: %+v, %v", x.Clone, err)
	}
	// Written, and not flushed: nothing is committed but by chance, after a second.
	want := bytes.Repeat([]byte{7}, cloneBytes)
	client := mustDialNBD(t, d, "web")
	client.write(t, 0, want)
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			if x, err := d.DetachSource(t.Context(), "web"); err != nil || !x.Clone.Detached || x.Clone.SourceInUse {
				t.Errorf("%+v, %v", x.Clone, err)
			}
		})
	}
	all.Wait()
	client.bye(t)
	if n := countEvents(t, d, api.EventSourceDetached, "web"); n != 1 {
		t.Errorf("%d events", n)
	}
	attach(t, d, "golden", src) // it is nobody's any more, and may be written
	stopDaemon(t, d)
	rename(t, src, src+".away")
	d = startDaemon(t, c)
	x := wantState(t, d, "web", api.StateLive)
	if !x.Clone.Detached || x.Clone.Hydrated != 16 || !bytes.Equal(get(t, d, "web", cloneBytes), want) {
		t.Errorf("after a restart: %+v", x.Clone)
	}
	if _, err := d.DetachSource(t.Context(), "web"); err != nil {
		t.Error(err)
	}
	if n := countEvents(t, d, api.EventSourceDetached, "web"); n != 0 {
		t.Errorf("%d events of what was detached before", n)
	}
}

// TestDetachSourceByItself: whoever hydrates to the end need not ask for it.
func TestDetachSourceByItself(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	src := image(t, cloneBytes)
	makeClone(t, d, "web", filepath.Join(t.TempDir(), "web.img"), api.CloneRequest{Source: src})
	waitEvent(t, d, api.EventSourceDetached, "web")
	if x, err := d.Device("web"); err != nil || !x.Clone.Detached {
		t.Errorf("%+v, %v", x.Clone, err)
	}
	if _, err := d.DetachSource(t.Context(), "web"); err != nil {
		t.Error(err)
	}
	if n := countEvents(t, d, api.EventSourceDetached, "web"); n != 1 {
		t.Errorf("%d events", n)
	}
	attach(t, d, "golden", src)
}

// TestDetachSourceRefused: what has no source to let go of, or cannot now.
func TestDetachSourceRefused(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	attach(t, d, "vm", "mem:1M")
	_, err := d.DetachSource(t.Context(), "vm")
	wantErrno(t, err, syscall.EINVAL, "not a clone")
	_, err = d.DetachSource(t.Context(), "none")
	wantErrno(t, err, syscall.ENOENT, "none")
	src := image(t, cloneBytes)
	makeClone(t, d, "web", filepath.Join(t.TempDir(), "web.img"), api.CloneRequest{Source: src, NoHydration: true})
	o, err := d.lockOrigin(t.Context(), "web")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.DetachSource(ctx, "web"); err == nil {
		t.Error("it did not wait for another operation")
	}
	o.unlock()
	// A clone that is let go of unhydrated has not detached its source.
	if err := d.Detach(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	if n := countEvents(t, d, api.EventSourceDetached, "web"); n != 0 {
		t.Errorf("%d events", n)
	}
}
