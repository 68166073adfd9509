package service

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"cowherd/api"
)

// halfMerged is a daemon that has begun to merge vm@p and was stopped by its user before anything was done, over a
// restart; and what origin and snapshot must show. There is another snapshot, vm@q, which shows old.
func halfMerged(t testing.TB, c Config) (d *Daemon, path string, view, old []byte) {
	t.Helper()
	d, path, view = persistent(t, c, api.SnapshotRequest{})
	put(t, d, "vm@p", 7, pattern(7, 7)) // what is written to the snapshot is merged, too
	copy(view[7*4096:], pattern(7, 7))
	old = get(t, d, "vm", imageBytes)
	take(t, d, api.SnapshotRequest{Name: "vm@q", Persistent: true})
	put(t, d, "vm", 5, pattern(5, 5))
	stopDaemon(t, d)
	changeState(t, c, func(c *content) {
		c.snapshot("vm@p").Phase, c.snapshot("vm@p").Stopped = phaseMerging, true
	})
	return startDaemon(t, c), path, view, old
}

// wantMerged checks what is there when vm@p has been merged.
func wantMerged(t testing.TB, d *Daemon, path string, view, old []byte) {
	t.Helper()
	waitEvent(t, d, api.EventMergeFinished, "vm@p")
	wantFrozen(t, d, "vm", view)
	wantFrozen(t, d, "vm@q", old)
	waitEvent(t, d, api.EventSnapshotRemoved, "vm@p")
	wantGone(t, d, "vm@p")
	wantFile(t, filepath.Join(d.state.path, "vm@p.cow"), false)
	if x := wantState(t, d, "vm", api.StateLive); x.Target != "snapshot-origin" {
		t.Errorf("the origin is %+v", x)
	}
	if s := d.saved.now().snapshot("vm@p"); s != nil {
		t.Errorf("remembered as %+v", s)
	}
	if held, err := os.ReadFile(path); err != nil || !bytes.Equal(held, view) {
		t.Errorf("the image is not what the snapshot showed (%v)", err)
	}
}

// TestMerge: the snapshot becomes the origin while both are in use; who has it open keeps it until he leaves.
func TestMerge(t *testing.T) {
	d, path, view := persistent(t, testConfig(t), api.SnapshotRequest{})
	put(t, d, "vm@p", 7, pattern(7, 7))
	copy(view[7*4096:], pattern(7, 7))
	old := get(t, d, "vm", imageBytes)
	take(t, d, api.SnapshotRequest{Name: "vm@q"})
	origin, snapshot := mustDialNBD(t, d, "vm"), mustDialNBD(t, d, "vm@p")
	x, err := d.MergeSnapshot(t.Context(), "vm@p", true)
	if err != nil || x.Name != "vm@p" {
		t.Fatalf("%+v, %v", x, err)
	}
	for _, client := range []*nbdClient{origin, snapshot} {
		if !bytes.Equal(client.read(t, 0, imageBytes), view) {
			t.Error("the snapshot's view is not shown")
		}
	}
	if e := waitEvent(t, d, api.EventMergeFinished, "vm@p"); e.Cause != "" {
		t.Errorf("%+v", e)
	}
	origin.write(t, 0, pattern(9, 9))
	copy(view, pattern(9, 9))
	for _, client := range []*nbdClient{origin, snapshot} {
		if !bytes.Equal(client.read(t, 0, imageBytes), view) {
			t.Error("a merged snapshot does not show its origin")
		}
	}
	wantState(t, d, "vm@p", api.StateMerged)
	if _, err := dialNBD(t, d, "vm@p"); err == nil {
		t.Error("a merged snapshot can be opened")
	}
	_, err = d.MergeSnapshot(t.Context(), "vm@p", true)
	wantErrno(t, err, syscall.EBUSY, "has been merged")
	wantErrno(t, d.RemoveSnapshot(t.Context(), "vm@p", false), syscall.EBUSY, "in use by")
	origin.bye(t)
	snapshot.bye(t)
	wantMerged(t, d, path, view, old)
	take(t, d, api.SnapshotRequest{Name: "vm@p", Persistent: true})
}

// TestMergedForced: a merged snapshot that is still open can be removed by force, and a daemon that stops ends it.
func TestMergedForced(t *testing.T) {
	for _, force := range []bool{false, true} {
		c := testConfig(t)
		d, _, view := persistent(t, c, api.SnapshotRequest{})
		client := mustDialNBD(t, d, "vm@p")
		client.read(t, 0, 4096)
		if _, err := d.MergeSnapshot(t.Context(), "vm@p", true); err != nil {
			t.Fatal(err)
		}
		waitEvent(t, d, api.EventMergeFinished, "vm@p")
		if force {
			if err := d.RemoveSnapshot(t.Context(), "vm@p", true); err != nil {
				t.Error(err)
			}
			wantGone(t, d, "vm@p")
		}
		stopDaemon(t, d)
		d = startDaemon(t, c)
		wantGone(t, d, "vm@p")
		wantFrozen(t, d, "vm", view)
	}
}

func TestMergeRefuses(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	attach(t, d, "vm", image(t, imageBytes))
	take(t, d, api.SnapshotRequest{Name: "vm@t"})
	take(t, d, api.SnapshotRequest{Name: "vm@small", Persistent: true, MaxCOWBytes: 3 * 4096})
	put(t, d, "vm", 1, pattern(1, 1))
	put(t, d, "vm", 2, pattern(1, 2))
	waitEvent(t, d, api.EventSnapshotInvalid, "vm@small")
	if _, err := d.Attach(api.AttachRequest{Name: "ro", Device: image(t, imageBytes), ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	take(t, d, api.SnapshotRequest{Name: "ro@p", Persistent: true})
	// What was told to go without flushes cannot begin to need them.
	attach(t, d, "zero", "null:1M")
	take(t, d, api.SnapshotRequest{Name: "zero@p", Persistent: true})
	for _, test := range []struct {
		name    string
		running bool
		errno   syscall.Errno
		text    string
	}{
		{"vm", true, syscall.EINVAL, "ORIGIN@SNAPSHOT"},
		{"x@p", true, syscall.ENOENT, "no device"},
		{"vm@x", true, syscall.ENOENT, "no such snapshot"},
		{"vm@t", true, syscall.EINVAL, "transient"},
		{"vm@small", true, syscall.EINVAL, "invalid: "},
		{"vm@t", false, syscall.EINVAL, "not being merged"},
		{"ro@p", true, syscall.EROFS, "read-only"},
		{"zero@p", true, syscall.EINVAL, "flushes"},
	} {
		_, err := d.MergeSnapshot(t.Context(), test.name, test.running)
		wantErrno(t, err, test.errno, test.text)
	}
	// What was refused has changed nothing.
	for _, name := range []string{"ro@p", "zero@p"} {
		x := wantState(t, d, name, api.StateValid)
		if s := d.saved.now().snapshot(name); s.Phase != phaseKept || x.Target != "snapshot" {
			t.Errorf("%s: %+v, %+v", name, s, x)
		}
	}
	put(t, d, "zero", 1, pattern(1, 1))
	if x := wantState(t, d, "zero@p", api.StateValid); x.Snapshot.CopiedChunks != 1 {
		t.Errorf("it is no snapshot of its origin any more: %+v", x.Snapshot)
	}
}

// TestMergeStopped: both show what the snapshot showed while the merge is stopped, over a restart, too, and nothing may
// come between.
func TestMergeStopped(t *testing.T) {
	c := testConfig(t)
	d, path, view, old := halfMerged(t, c)
	for _, name := range []string{"vm", "vm@p"} {
		if x, err := d.Device(name); err != nil || x.Target != "snapshot-merge" || !strings.HasPrefix(x.TargetStatus, "40/") {
			t.Errorf("%s: %+v, %v", name, x, err)
		}
		wantFrozen(t, d, name, view)
	}
	x := wantState(t, d, "vm@p", api.StateMerging)
	if m := x.Snapshot.Merge; m == nil || m.Running || m.MergedChunks != 0 || m.TotalChunks != 3 || m.Failed != "" {
		t.Errorf("the merge: %+v", m)
	}
	put(t, d, "vm", 9, pattern(9, 1))
	copy(view[9*4096:], pattern(9, 1))
	put(t, d, "vm@p", 3, pattern(9, 2))
	copy(view[3*4096:], pattern(9, 2))
	wantFrozen(t, d, "vm", view)
	wantFrozen(t, d, "vm@p", view)
	wantFrozen(t, d, "vm@q", old)
	_, err := d.TakeSnapshot(t.Context(), api.SnapshotRequest{Name: "vm@r"})
	wantErrno(t, err, syscall.EBUSY, "vm@p is being merged into vm")
	_, err = d.MergeSnapshot(t.Context(), "vm@q", true)
	wantErrno(t, err, syscall.EBUSY, "vm@p is being merged")
	wantErrno(t, d.RemoveSnapshot(t.Context(), "vm@p", true), syscall.EBUSY, "being merged")
	wantErrno(t, d.Detach(t.Context(), "vm"), syscall.EBUSY, "vm has snapshots")
	if _, err := d.MergeSnapshot(t.Context(), "vm@p", false); err != nil {
		t.Errorf("stop of what is stopped: %v", err)
	}
	stopDaemon(t, d)
	d = startDaemon(t, c)
	wantFrozen(t, d, "vm", view)
	wantState(t, d, "vm@p", api.StateMerging)
	if _, err := d.MergeSnapshot(t.Context(), "vm@p", true); err != nil {
		t.Fatal(err)
	}
	wantMerged(t, d, path, view, old)
}

// TestMergeGoesOn: a daemon that is started goes on with a merge that ran.
func TestMergeGoesOn(t *testing.T) {
	c := testConfig(t)
	d, path, view, old := halfMerged(t, c)
	stopDaemon(t, d)
	changeState(t, c, func(c *content) { c.snapshot("vm@p").Stopped = false })
	d = startDaemon(t, c)
	waitEvent(t, d, api.EventMergeStarted, "vm@p")
	wantMerged(t, d, path, view, old)
}

// TestMergeStoreLost: an origin that is half merged is not served without the rest.
func TestMergeStoreLost(t *testing.T) {
	c := testConfig(t)
	d, path, view, old := halfMerged(t, c)
	stopDaemon(t, d)
	store := filepath.Join(c.StateDir, "vm@p.cow")
	rename(t, store, store+".away")
	d = startDaemon(t, c)
	if x := wantState(t, d, "vm", api.StateLost); !strings.Contains(x.Lost, "vm@p cannot be merged any further") {
		t.Errorf("%+v", x)
	}
	wantErrno(t, d.RemoveSnapshot(t.Context(), "vm@p", false), syscall.EBUSY, "half merged")
	wantErrno(t, d.Detach(t.Context(), "vm"), syscall.EBUSY, "half merged")
	_, err := d.Attach(api.AttachRequest{Name: "vm", Device: path})
	wantErrno(t, err, syscall.ENOENT, "cannot be merged any further")
	rename(t, store+".away", store)
	attach(t, d, "vm", path)
	wantState(t, d, "vm@q", api.StateValid)
	if _, err := d.MergeSnapshot(t.Context(), "vm@p", true); err != nil {
		t.Fatal(err)
	}
	wantMerged(t, d, path, view, old)
}

// TestMergeGivenUp: by force a half merged origin is served as it is, and the store is left as it is.
func TestMergeGivenUp(t *testing.T) {
	c := testConfig(t)
	d, path, _, _ := halfMerged(t, c)
	stopDaemon(t, d)
	rename(t, path, path+".away")
	d = startDaemon(t, c)
	if err := d.RemoveSnapshot(t.Context(), "vm@p", true); err != nil {
		t.Error(err)
	}
	if h := storeState(t, filepath.Join(c.StateDir, "vm@p.cow")); !h.Valid {
		t.Error("the store of a snapshot that was half merged is invalid")
	}
	rename(t, path+".away", path)
	attach(t, d, "vm", path)
	wantState(t, d, "vm@q", api.StateValid)
}

// TestMergeFails: a merge that fails says why, and can be tried again.
func TestMergeFails(t *testing.T) {
	c := testConfig(t)
	d, path, _, _ := halfMerged(t, c)
	if err := os.Truncate(path, 4096); err != nil { // is found by the flush
		t.Fatal(err)
	}
	if _, err := d.MergeSnapshot(t.Context(), "vm@p", true); err != nil {
		t.Fatal(err)
	}
	e := waitEvent(t, d, api.EventMergeFailed, "vm@p")
	x := wantState(t, d, "vm@p", api.StateMerging)
	if !strings.Contains(e.Cause, "truncated") || x.TargetStatus != "Merge failed" || x.Snapshot.Merge.Failed != e.Cause ||
		x.Snapshot.Merge.Running {
		t.Errorf("%+v, %+v, %+v", e, x, x.Snapshot.Merge)
	}
	if _, err := d.MergeSnapshot(t.Context(), "vm@p", true); err != nil {
		t.Errorf("another try: %v", err)
	}
	ctx := t.Context()
	_ = d.Stop(ctx) // the device cannot be flushed
}
