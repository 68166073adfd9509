package service

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"cowherd/api"
	"cowherd/backend/file"
	"cowherd/cowstore"
)

// imageBytes is the size of the images of these tests.
const imageBytes = 64 << 10

// persistent is a daemon with a device "vm" on an image, a persistent snapshot of it, vm@p, and a block that was
// written since. It gives what the snapshot must show.
func persistent(t testing.TB, c Config, r api.SnapshotRequest) (d *Daemon, path string, frozen []byte) {
	t.Helper()
	d = startDaemon(t, c)
	path = image(t, imageBytes)
	attach(t, d, "vm", path)
	frozen = get(t, d, "vm", imageBytes)
	r.Name, r.Persistent = "vm@p", true
	take(t, d, r)
	put(t, d, "vm", 3, pattern(1, 1))
	return d, path, frozen
}

// wantFrozen checks what a snapshot shows.
func wantFrozen(t testing.TB, d *Daemon, name string, want []byte) {
	t.Helper()
	if !bytes.Equal(get(t, d, name, len(want)), want) {
		t.Errorf("%s does not show what it should", name)
	}
}

// storeState is what the header of a store says.
func storeState(t testing.TB, path string) cowstore.Header {
	t.Helper()
	f, err := file.Open(path, file.Options{ReadOnly: true, Shared: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h, err := cowstore.ReadHeader(f)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// TestRestart: devices and persistent snapshots come back with all that they were; transient ones are said to be gone.
func TestRestart(t *testing.T) {
	c := testConfig(t)
	d, path, frozen := persistent(t, c, api.SnapshotRequest{ReadOnly: true, ChunkBytes: 8192})
	take(t, d, api.SnapshotRequest{Name: "vm@t"})
	before := wantState(t, d, "vm@p", api.StateValid)
	store := filepath.Join(c.StateDir, "vm@p.cow")
	if before.Snapshot.Store != store || !before.Snapshot.Persistent || before.TargetStatus != "48/160 32" {
		t.Errorf("taken: %+v, %+v", before, before.Snapshot)
	}
	for turn := range 3 {
		stopDaemon(t, d)
		if h := storeState(t, store); !h.Valid || h.ChunkSize != 8192 {
			t.Errorf("the store after a clean stop: %+v", h)
		}
		d = startDaemon(t, c)
		x := wantState(t, d, "vm@p", api.StateValid)
		if x.Since != before.Since || !x.ReadOnly || x.Snapshot.ChunkBytes != 8192 {
			t.Errorf("after a restart %+v, before %+v", x, before)
		}
		if origin := wantState(t, d, "vm", api.StateLive); origin.Device != path {
			t.Errorf("the origin: %+v", origin)
		}
		wantFrozen(t, d, "vm@p", frozen)
		put(t, d, "vm", int64(5+turn), pattern(2, turn)) // is copied to the store that was opened
		wantFrozen(t, d, "vm@p", frozen)
	}
	var types []string
	for _, e := range allEvents(t, d)[:2] {
		types = append(types, e.Type+" "+e.Name)
	}
	if got := strings.Join(types, ","); got != "device-attached vm,snapshot-reopened vm@p" {
		t.Errorf("events %s", got)
	}
	wantGone(t, d, "vm@t")
	_, err := d.TakeSnapshot(t.Context(), api.SnapshotRequest{Name: "vm@p"})
	wantErrno(t, err, syscall.EEXIST, "already")
	wantErrno(t, d.Detach(t.Context(), "vm"), syscall.EBUSY, "vm has snapshots: vm@p")
	removeSoon(t, d, "vm@p")
	detachSoon(t, d, "vm")
	wantFile(t, store, false)
	if left := d.saved.now(); len(left.Devices) != 0 || d.names.taken() != 0 {
		t.Errorf("remembered: %+v, count %d", left, d.names.taken())
	}
}

// TestTransientGone: a transient snapshot is said to be gone once, and its name is free.
func TestTransientGone(t *testing.T) {
	c := testConfig(t)
	d := startDaemon(t, c)
	attach(t, d, "vm", image(t, imageBytes))
	take(t, d, api.SnapshotRequest{Name: "vm@t"})
	stopDaemon(t, d)
	d = startDaemon(t, c)
	if e := waitEvent(t, d, api.EventSnapshotLost, "vm@t"); !strings.Contains(e.Cause, "transient") || e.Persistent {
		t.Errorf("%+v", e)
	}
	wantGone(t, d, "vm@t")
	take(t, d, api.SnapshotRequest{Name: "vm@t"})
	stopDaemon(t, d)
	d = startDaemon(t, c)
	take(t, d, api.SnapshotRequest{Name: "vm@t"})
}

// TestRestartPhases: whatever the daemon was doing when it died, no store comes back that the origin may have gone on
// without.
func TestRestartPhases(t *testing.T) {
	for _, p := range []phase{phaseTaking, phaseRemoving, phaseLost} {
		for _, made := range []bool{false, true} {
			c := testConfig(t)
			store := filepath.Join(t.TempDir(), "store")
			if !made {
				if err := os.WriteFile(store, make([]byte, 1<<20), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			d, _, _ := persistent(t, c, api.SnapshotRequest{Store: store})
			stopDaemon(t, d)
			changeState(t, c, func(c *content) {
				if s := c.snapshot("vm@p"); s.Made != made {
					t.Errorf("remembered as %+v", s)
				}
				c.snapshot("vm@p").Phase = p
				if p == phaseLost {
					c.snapshot("vm@p").Lost = "it was away"
				}
			})
			d = startDaemon(t, c)
			wantState(t, d, "vm", api.StateLive)
			if p == phaseLost {
				if x := wantState(t, d, "vm@p", api.StateLost); x.Lost != "it was away" || x.Snapshot.Store != store {
					t.Errorf("lost: %+v", x)
				}
				if _, err := dialNBD(t, d, "vm@p"); err == nil {
					t.Error("a snapshot that is lost can be opened")
				}
				_, err := d.TakeSnapshot(t.Context(), api.SnapshotRequest{Name: "vm@p"})
				wantErrno(t, err, syscall.EEXIST, "lost")
				wantErrno(t, d.Detach(t.Context(), "vm"), syscall.EBUSY, "vm@p (lost)")
				if err := d.RemoveSnapshot(t.Context(), "vm@p", false); err != nil {
					t.Error(err)
				}
			}
			wantGone(t, d, "vm@p")
			removed := 0
			for _, e := range allEvents(t, d) {
				if e.Type == api.EventSnapshotRemoved {
					removed++
				}
			}
			if told := p != phaseTaking; (removed == 1) != told {
				t.Errorf("phase %s: %d events of a removal", p, removed)
			}
			if wantFile(t, store, !made); !made {
				if h := storeState(t, store); h.Valid {
					t.Errorf("phase %s: the store is valid", p)
				}
			}
			if s := d.saved.now().snapshot("vm@p"); s != nil {
				t.Errorf("phase %s: remembered as %+v", p, s)
			}
		}
	}
}

// TestRestartTakingEmpty: the daemon died between making the file of a store and giving it its length.
func TestRestartTakingEmpty(t *testing.T) {
	c := testConfig(t)
	store := filepath.Join(t.TempDir(), "store")
	d, _, _ := persistent(t, c, api.SnapshotRequest{Store: store})
	stopDaemon(t, d)
	changeState(t, c, func(c *content) { c.snapshot("vm@p").Phase = phaseTaking })
	if err := os.Truncate(store, 0); err != nil {
		t.Fatal(err)
	}
	d = startDaemon(t, c)
	wantState(t, d, "vm", api.StateLive)
	wantGone(t, d, "vm@p")
	wantFile(t, store, false)
	if s := d.saved.now().snapshot("vm@p"); s != nil {
		t.Errorf("remembered as %+v", s)
	}
}

// TestSnapshotLost: a snapshot whose store cannot be opened is lost, and said to be; the origin is there; the store is
// made invalid as soon as it can be reached, because the origin has gone on without it.
func TestSnapshotLost(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(t *testing.T, store, image string) (mend func())
		cause string
		valid bool // the store, while nothing is mended
	}{
		"missing": {func(t *testing.T, store, _ string) func() {
			rename(t, store, store+".away")
			return func() { rename(t, store+".away", store) }
		}, "no such file", false},
		"busy": {func(t *testing.T, store, _ string) func() {
			f, err := file.Open(store, file.Options{})
			if err != nil {
				t.Fatal(err)
			}
			return func() {
				if err := f.Close(); err != nil {
					t.Error(err)
				}
			}
		}, "locked by another program", true},
		"corrupt": {func(t *testing.T, store, _ string) func() {
			scribble(t, store, 4096, bytes.Repeat([]byte{0xff}, 16))
			return func() {}
		}, "corrupt", false},
		"no store": {func(t *testing.T, store, _ string) func() {
			scribble(t, store, 0, make([]byte, 4096))
			return func() {}
		}, "no exception store", false},
		"another origin": {func(t *testing.T, _, image string) func() {
			if err := os.Truncate(image, 2*imageBytes); err != nil {
				t.Fatal(err)
			}
			return func() {}
		}, "its origin has 131072 bytes, and had 65536", false},
	} {
		t.Run(name, func(t *testing.T) {
			config := testConfig(t)
			d, path, _ := persistent(t, config, api.SnapshotRequest{})
			stopDaemon(t, d)
			store := filepath.Join(config.StateDir, "vm@p.cow")
			mend := c.spoil(t, store, path)
			d = startDaemon(t, config)
			wantState(t, d, "vm", api.StateLive)
			x := wantState(t, d, "vm@p", api.StateLost)
			e := waitEvent(t, d, api.EventSnapshotLost, "vm@p")
			if !strings.Contains(x.Lost, c.cause) || e.Cause != x.Lost || !e.Persistent {
				t.Errorf("lost: %q, event %+v", x.Lost, e)
			}
			put(t, d, "vm", 1, pattern(3, 3))
			stopDaemon(t, d)
			if c.valid && !storeState(t, store).Valid {
				t.Error("the store was reached")
			}
			mend()
			d = startDaemon(t, config) // now its store can be reached, but it stays lost
			wantState(t, d, "vm@p", api.StateLost)
			if err := errors.Join(d.RemoveSnapshot(t.Context(), "vm@p", false), d.Detach(t.Context(), "vm")); err != nil {
				t.Error(err)
			}
			wantFile(t, store, false)
		})
	}
}

func rename(t testing.TB, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

// scribble overwrites a part of a file.
func scribble(t testing.TB, path string, offset int64, p []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt(p, offset)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestRemoveLostForced: a snapshot whose store stays out of reach is forgotten only by force.
func TestRemoveLostForced(t *testing.T) {
	c := testConfig(t)
	d, _, _ := persistent(t, c, api.SnapshotRequest{})
	stopDaemon(t, d)
	f, err := file.Open(filepath.Join(c.StateDir, "vm@p.cow"), file.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	d = startDaemon(t, c)
	wantErrno(t, d.RemoveSnapshot(t.Context(), "vm@p", false), syscall.EBUSY, "locked by another program")
	wantState(t, d, "vm@p", api.StateLost)
	if err := d.RemoveSnapshot(t.Context(), "vm@p", true); err != nil {
		t.Error(err)
	}
	wantGone(t, d, "vm@p")
}

// TestDeviceLost: a device that cannot be opened is shown as lost with its snapshots, and all comes back when it is
// attached again, or the daemon is started again.
func TestDeviceLost(t *testing.T) {
	for _, again := range []bool{false, true} {
		c := testConfig(t)
		d, path, frozen := persistent(t, c, api.SnapshotRequest{})
		stopDaemon(t, d)
		rename(t, path, path+".away")
		d = startDaemon(t, c)
		if x := wantState(t, d, "vm", api.StateLost); !strings.Contains(x.Lost, "no such file") || x.Device != path {
			t.Errorf("lost: %+v", x)
		}
		if x := wantState(t, d, "vm@p", api.StateLost); !strings.Contains(x.Lost, "its origin") {
			t.Errorf("lost: %+v", x)
		}
		if e := waitEvent(t, d, api.EventDeviceLost, "vm"); !strings.Contains(e.Cause, path) || !e.Persistent {
			t.Errorf("event %+v", e)
		}
		_, err := d.Attach(api.AttachRequest{Name: "vm", Device: "mem:1M"})
		wantErrno(t, err, syscall.EEXIST, "which is lost")
		_, err = d.TakeSnapshot(t.Context(), api.SnapshotRequest{Name: "vm@q"})
		wantErrno(t, err, syscall.ENOENT, "no device")
		rename(t, path+".away", path)
		if again {
			stopDaemon(t, d)
			d = startDaemon(t, c)
		} else {
			attach(t, d, "vm", path)
		}
		wantState(t, d, "vm", api.StateLive)
		wantState(t, d, "vm@p", api.StateValid)
		wantFrozen(t, d, "vm@p", frozen)
	}
}

// TestForgetLost: a device that will never come back is forgotten, with the stores of its snapshots.
func TestForgetLost(t *testing.T) {
	c := testConfig(t)
	d, path, _ := persistent(t, c, api.SnapshotRequest{})
	take(t, d, api.SnapshotRequest{Name: "vm@q", Persistent: true})
	stopDaemon(t, d)
	rename(t, path, path+".away")
	d = startDaemon(t, c)
	if err := d.RemoveSnapshot(t.Context(), "vm@q", false); err != nil {
		t.Error(err)
	}
	wantFile(t, filepath.Join(c.StateDir, "vm@q.cow"), false)
	wantState(t, d, "vm@p", api.StateLost)
	if err := d.Detach(t.Context(), "vm"); err != nil {
		t.Error(err)
	}
	wantFile(t, filepath.Join(c.StateDir, "vm@p.cow"), false)
	if len(d.Devices()) != 0 || len(d.saved.now().Devices) != 0 || d.names.taken() != 0 {
		t.Errorf("left: %+v, %+v", d.Devices(), d.saved.now())
	}
	attach(t, d, "vm", "mem:1M")
}

// TestVolatile: what was in memory is said to be lost, and its name is free.
func TestVolatile(t *testing.T) {
	c := testConfig(t)
	d := startDaemon(t, c)
	attach(t, d, "ram", "mem:1M")
	attach(t, d, "zero", "null:1M")
	attach(t, d, "kept", "null:1M,memory")
	take(t, d, api.SnapshotRequest{Name: "ram@a"})
	_, err := d.TakeSnapshot(t.Context(), api.SnapshotRequest{Name: "ram@p", Persistent: true})
	wantErrno(t, err, syscall.EINVAL, "ends with the daemon")
	stopDaemon(t, d)
	d = startDaemon(t, c)
	for _, name := range []string{"ram", "kept"} {
		if e := waitEvent(t, d, api.EventDeviceLost, name); !strings.Contains(e.Cause, "in memory") || e.Persistent {
			t.Errorf("%+v", e)
		}
		wantGone(t, d, name)
	}
	waitEvent(t, d, api.EventSnapshotLost, "ram@a")
	wantState(t, d, "zero", api.StateLive)
	attach(t, d, "ram", "mem:1M")
}

// TestConfigured: the configuration says what is attached, unless that would cost a persistent snapshot.
func TestConfigured(t *testing.T) {
	c := testConfig(t)
	restart := func(d *Daemon, devices ...api.AttachRequest) (*Daemon, error) {
		if d != nil {
			stopDaemon(t, d)
		}
		d, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		err = d.Restore(devices)
		d.Serve()
		t.Cleanup(func() { stopDaemon(t, d) })
		return d, err
	}
	first, second := image(t, imageBytes), image(t, imageBytes)
	vm := api.AttachRequest{Name: "vm", Device: first}
	d, err := restart(nil, vm, api.AttachRequest{Name: "ram", Device: "mem:1M"})
	if err != nil {
		t.Fatal(err)
	}
	wantState(t, d, "ram", api.StateLive)
	vm.ReadOnly = true
	if d, err = restart(d, vm, api.AttachRequest{Name: "ram", Device: "mem:2M"}); err != nil {
		t.Fatal(err)
	}
	if x := wantState(t, d, "vm", api.StateLive); !x.ReadOnly {
		t.Errorf("the configuration's options are not taken: %+v", x)
	}
	if x := wantState(t, d, "ram", api.StateLive); x.SizeBytes != 2<<20 {
		t.Errorf("%+v", x)
	}
	vm.Device = second
	if d, err = restart(d, vm); err != nil {
		t.Fatal(err)
	}
	if x := wantState(t, d, "vm", api.StateLive); x.Device != second {
		t.Errorf("the configuration's device is not taken: %+v", x)
	}
	take(t, d, api.SnapshotRequest{Name: "vm@p", Persistent: true})
	vm.Device = first
	d, err = restart(d, vm)
	wantErrno(t, err, syscall.EEXIST, "with the persistent snapshot vm@p")
	if d, err = restart(d); err != nil {
		t.Fatal(err)
	}
	if x := wantState(t, d, "vm", api.StateLive); x.Device != second {
		t.Errorf("%+v", x)
	}
	wantState(t, d, "vm@p", api.StateValid)
	stopDaemon(t, d)
	// A device of the configuration that is not there is an error, remembered or not.
	rename(t, second, second+".away")
	_, err = restart(nil, api.AttachRequest{Name: "vm", Device: second, ReadOnly: true})
	wantErrno(t, err, syscall.ENOENT, "no such file")
}

// TestStateFull: what cannot be remembered is not done.
func TestStateFull(t *testing.T) {
	c := testConfig(t)
	d, _, frozen := persistent(t, c, api.SnapshotRequest{})
	inTheWay := filepath.Join(c.StateDir, stateNewName)
	if err := os.MkdirAll(filepath.Join(inTheWay, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	other := image(t, imageBytes)
	_, err := d.Attach(api.AttachRequest{Name: "b", Device: other})
	wantErrno(t, err, syscall.EISDIR, "state file")
	for _, persistent := range []bool{false, true} {
		_, err = d.TakeSnapshot(t.Context(), api.SnapshotRequest{Name: "vm@b", Persistent: persistent})
		wantErrno(t, err, syscall.EISDIR, "state file")
	}
	wantErrno(t, d.RemoveSnapshot(t.Context(), "vm@p", false), syscall.EISDIR, "state file")
	wantFrozen(t, d, "vm@p", frozen)
	wantFile(t, filepath.Join(c.StateDir, "vm@b.cow"), false)
	if err := os.RemoveAll(inTheWay); err != nil {
		t.Fatal(err)
	}
	attach(t, d, "b", other)
	take(t, d, api.SnapshotRequest{Name: "vm@b", Persistent: true})
	removeSoon(t, d, "vm@p")
}

// detachSoon detaches a device whose client has just said goodbye.
func detachSoon(t testing.TB, d *Daemon, name string) {
	t.Helper()
	for {
		err := d.Detach(t.Context(), name)
		if err == nil {
			return
		}
		if !errors.Is(err, syscall.EBUSY) {
			t.Fatal(err)
		}
	}
}
