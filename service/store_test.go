package service

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"cowherd/api"
	"cowherd/backend/file"
	"cowherd/cowstore"
)

// sparseFile makes a file of size bytes that begins with content.
func sparseFile(t testing.TB, size int64, content ...byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "store")
	if err := errors.Join(os.WriteFile(path, content, 0o600), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestPersistentRefuses(t *testing.T) {
	c := testConfig(t)
	d, path, _ := persistent(t, c, api.SnapshotRequest{})
	store := filepath.Join(c.StateDir, "vm@p.cow")
	busy := sparseFile(t, 1<<20)
	held, err := file.Open(busy, file.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	for _, test := range []struct {
		request api.SnapshotRequest
		errno   syscall.Errno
		text    string
	}{
		{api.SnapshotRequest{Store: "temp"}, syscall.EINVAL, "in a file or on a block device"},
		{api.SnapshotRequest{Store: "mem"}, syscall.EINVAL, "in a file or on a block device"},
		{api.SnapshotRequest{Store: "relative"}, syscall.EINVAL, "absolute path"},
		{api.SnapshotRequest{Store: "/no/such/dir/store"}, syscall.ENOENT, "/no/such/dir/store"},
		{api.SnapshotRequest{Store: "/dev/null"}, syscall.EINVAL, "neither"},
		{api.SnapshotRequest{Store: path}, syscall.EBUSY, `in use by device "vm"`},
		{api.SnapshotRequest{Store: store}, syscall.EBUSY, `in use by device "vm@p"`},
		{api.SnapshotRequest{Store: busy}, syscall.EBUSY, "locked by another program"},
		{api.SnapshotRequest{Store: sparseFile(t, 1<<20, 0, 0, 0, 0, 7)}, syscall.EEXIST, "not empty"},
		{api.SnapshotRequest{Store: sparseFile(t, 8191)}, syscall.EINVAL, "needs 3 of them"},
		{api.SnapshotRequest{Store: sparseFile(t, 1<<20), MaxCOWBytes: 1 << 19}, syscall.EINVAL, "cannot be kept"},
		{api.SnapshotRequest{MaxCOWBytes: 8192}, syscall.EINVAL, "does not hold 3 chunks"},
		{api.SnapshotRequest{ChunkBytes: 5000}, syscall.EINVAL, "power of 2"},
		{api.SnapshotRequest{ChunkBytes: 512}, syscall.EINVAL, "too low"},
		{api.SnapshotRequest{OnFull: "explode"}, syscall.EINVAL, `"explode"`},
		{api.SnapshotRequest{WarnAt: []int{50, 101}}, syscall.EINVAL, "101%"},
		{api.SnapshotRequest{StallMaxMicroseconds: -1}, syscall.EINVAL, "-1 microseconds"},
		{api.SnapshotRequest{Reopen: true, Overwrite: true}, syscall.EINVAL, "either"},
		{api.SnapshotRequest{Reopen: true}, syscall.ENOENT, "vm@x.cow"},
		{api.SnapshotRequest{Reopen: true, Store: sparseFile(t, 1<<20)}, syscall.EINVAL, "no exception store"},
		{api.SnapshotRequest{Reopen: true, Store: sparseFile(t, 1<<20, 1, 2, 3, 4)}, syscall.EUCLEAN, "corrupt"},
		{api.SnapshotRequest{Reopen: true, Store: store}, syscall.EBUSY, `in use by device "vm@p"`},
	} {
		test.request.Name, test.request.Persistent = "vm@x", true
		_, err := d.TakeSnapshot(t.Context(), test.request)
		wantErrno(t, err, test.errno, test.text)
	}
	_, err = d.TakeSnapshot(t.Context(), api.SnapshotRequest{Name: "vm@x", Overwrite: true})
	wantErrno(t, err, syscall.EINVAL, "for persistent stores")
	wantFile(t, filepath.Join(c.StateDir, "vm@x.cow"), false)
	if d.names.taken() != 2 || d.saved.now().snapshot("vm@x") != nil {
		t.Errorf("what was refused is there: count %d, %+v", d.names.taken(), d.saved.now())
	}
}

// TestStoreKinds takes persistent snapshots with each kind of store, and removes them.
func TestStoreKinds(t *testing.T) {
	c := testConfig(t)
	d := startDaemon(t, c)
	path := image(t, imageBytes)
	attach(t, d, "vm", path)
	frozen := get(t, d, "vm", imageBytes)
	dir := t.TempDir()
	for name, x := range map[string]struct {
		store, path string
		overwrite   bool
		made        bool
	}{
		"default":   {"", filepath.Join(c.StateDir, "vm@default.cow"), false, true},
		"directory": {dir, filepath.Join(dir, "vm@directory.cow"), false, true},
		"new":       {filepath.Join(dir, "new.cow"), filepath.Join(dir, "new.cow"), false, true},
		"zeroes":    {sparseFile(t, 1<<20), "", false, false},
		"empty":     {sparseFile(t, 0), "", false, false},
		"something": {sparseFile(t, 1<<20, 1, 2, 3), "", true, false},
	} {
		if x.path == "" {
			x.path = x.store
		}
		r := api.SnapshotRequest{Name: "vm@" + name, Persistent: true, Store: x.store, Overwrite: x.overwrite}
		if taken := take(t, d, r); taken.Snapshot.Store != x.path || taken.TargetStatus[:3] != "16/" {
			t.Errorf("%s: %+v", name, taken)
		}
		put(t, d, "vm", 2, pattern(1, 1))
		put(t, d, "vm@"+name, 4, pattern(2, 2)) // the snapshot can be written
		want := append([]byte{}, frozen...)
		copy(want[4*4096:], pattern(2, 2))
		wantFrozen(t, d, "vm@"+name, want)
		if h := storeState(t, x.path); !h.Valid {
			t.Errorf("%s: the store is %+v", name, h)
		}
		removeSoon(t, d, "vm@"+name)
		if wantFile(t, x.path, !x.made); !x.made {
			if h := storeState(t, x.path); h.Valid {
				t.Errorf("%s: the store of a removed snapshot is valid", name)
			}
		}
		put(t, d, "vm", 2, frozen[2*4096:3*4096])
	}
}

// TestReopen: the store of a daemon that has forgotten it, or of another program, is opened as it is.
func TestReopen(t *testing.T) {
	c := testConfig(t)
	d, _, frozen := persistent(t, c, api.SnapshotRequest{ChunkBytes: 16384})
	stopDaemon(t, d)
	changeState(t, c, func(c *content) { c.forgetSnapshot("vm@p") })
	d = startDaemon(t, c)
	wantGone(t, d, "vm@p")
	_, err := d.TakeSnapshot(t.Context(), api.SnapshotRequest{Name: "vm@p", Persistent: true})
	wantErrno(t, err, syscall.EEXIST, "the store of a snapshot: reopen")
	_, err = d.TakeSnapshot(t.Context(), api.SnapshotRequest{Name: "vm@p", Reopen: true, ChunkBytes: 4096})
	wantErrno(t, err, syscall.EINVAL, "chunks of 16KiB, not of 4KiB")
	store := filepath.Join(c.StateDir, "vm@p.cow")
	if h := storeState(t, store); !h.Valid {
		t.Error("a store that was refused is invalid")
	}
	x := take(t, d, api.SnapshotRequest{Name: "vm@q", Reopen: true, Store: store})
	if x.Snapshot.ChunkBytes != 16384 || !x.Snapshot.Persistent {
		t.Errorf("reopened: %+v", x.Snapshot)
	}
	wantFrozen(t, d, "vm@q", frozen)
	put(t, d, "vm", 9, pattern(1, 9))
	stopDaemon(t, d)
	d = startDaemon(t, c) // and it is remembered like any other
	wantFrozen(t, d, "vm@q", frozen)
	removeSoon(t, d, "vm@q")
	wantFile(t, store, true) // another has made it
	_, err = d.TakeSnapshot(t.Context(), api.SnapshotRequest{Name: "vm@p", Reopen: true})
	wantErrno(t, err, syscall.EINVAL, "invalid: its snapshot is lost")
	_, err = d.TakeSnapshot(t.Context(), api.SnapshotRequest{Name: "vm@p", Persistent: true})
	wantErrno(t, err, syscall.EEXIST, "invalid: let it be overwritten")
	take(t, d, api.SnapshotRequest{Name: "vm@p", Persistent: true, Overwrite: true})
}

// TestInvalidStays: a persistent snapshot that has become invalid is invalid after a restart, too, and can be removed.
func TestInvalidStays(t *testing.T) {
	c := testConfig(t)
	d, _, _ := persistent(t, c, api.SnapshotRequest{MaxCOWBytes: 3 * 4096, WarnAt: []int{50, 100}})
	put(t, d, "vm", 7, pattern(1, 7)) // there was room for one chunk
	waitEvent(t, d, api.EventSnapshotInvalid, "vm@p")
	if x := wantState(t, d, "vm@p", api.StateInvalid); x.TargetStatus != "Invalid" {
		t.Errorf("%+v", x)
	}
	if e := waitEvent(t, d, api.EventSnapshotSpace, "vm@p"); e.Percent != 100 {
		t.Errorf("%+v", e)
	}
	stopDaemon(t, d)
	d = startDaemon(t, c)
	x := wantState(t, d, "vm@p", api.StateInvalid)
	if e := waitEvent(t, d, api.EventSnapshotReopened, "vm@p"); e.Cause == "" || e.Cause != x.Snapshot.Invalid {
		t.Errorf("%+v, %+v", e, x.Snapshot)
	}
	removeSoon(t, d, "vm@p")
	wantFile(t, filepath.Join(c.StateDir, "vm@p.cow"), false)
}

// TestWarns: by default there is a warning when a store that can run full is nearly so, and none else.
func TestWarns(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	attach(t, d, "vm", image(t, 1<<20))
	take(t, d, api.SnapshotRequest{Name: "vm@all", Persistent: true})
	take(t, d, api.SnapshotRequest{Name: "vm@some", Persistent: true, MaxCOWBytes: 12 * 4096})
	take(t, d, api.SnapshotRequest{Name: "vm@none", Persistent: true, MaxCOWBytes: 12 * 4096, WarnAt: []int{}})
	take(t, d, api.SnapshotRequest{Name: "vm@each", Persistent: true, MaxCOWBytes: 12 * 4096, WarnAt: []int{70, 30}})
	client := mustDialNBD(t, d, "vm")
	for i := range int64(10) {
		client.write(t, i*4096, pattern(0, int(i)))
	}
	client.bye(t)
	percents := map[string][]int{}
	for _, e := range allEvents(t, d) {
		if e.Type == api.EventSnapshotSpace {
			percents[e.Name] = append(percents[e.Name], e.Percent)
		}
	}
	if len(percents["vm@all"]) != 0 || len(percents["vm@none"]) != 0 || len(percents["vm@some"]) != 1 ||
		len(percents["vm@each"]) != 2 {
		t.Errorf("warnings %v", percents)
	}
}

// TestOnFull: what is asked for happens when there is no room.
func TestOnFull(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	attach(t, d, "vm", image(t, imageBytes))
	for _, way := range []string{api.OnFullInvalidate, api.OnFullGrow, api.OnFullOverflow} {
		take(t, d, api.SnapshotRequest{
			Name: "vm@" + way, Persistent: true, OnFull: way, Store: sparseFile(t, 4*4096),
		})
	}
	for i := range int64(2) { // there is room for as much
		for _, way := range []string{api.OnFullInvalidate, api.OnFullGrow, api.OnFullOverflow} {
			put(t, d, "vm@"+way, i, pattern(1, int(i)))
		}
	}
	client := mustDialNBD(t, d, "vm@overflow")
	if _, err := client.do(nbdWrite, 2*4096, 0, pattern(1, 2)); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a write to a full snapshot: %v, want ENOSPC", err)
	}
	client.read(t, 0, imageBytes)
	client.bye(t)
	if x := wantState(t, d, "vm@overflow", api.StateOverflow); !x.Snapshot.Overflowed || x.TargetStatus != "Overflow" {
		t.Errorf("%+v", x)
	}
	waitEvent(t, d, api.EventSnapshotOverflow, "vm@overflow")
	put(t, d, "vm", 5, pattern(2, 5))
	wantState(t, d, "vm@invalidate", api.StateInvalid)
	wantState(t, d, "vm@overflow", api.StateInvalid)
	if x := wantState(t, d, "vm@grow", api.StateValid); x.Snapshot.TotalBytes <= 4*4096 {
		t.Errorf("it has not grown: %+v", x.Snapshot)
	}
}

// TestThrottle: writes wait for room until the store is resized.
func TestThrottle(t *testing.T) {
	c := testConfig(t)
	d, _, frozen := persistent(t, c, api.SnapshotRequest{OnFull: api.OnFullThrottle, MaxCOWBytes: 3 * 4096})
	written := make(chan error)
	client := mustDialNBD(t, d, "vm")
	go func() {
		_, err := client.do(nbdWrite, 6*4096, 0, pattern(1, 6))
		written <- err
	}()
	waitStalled(t, d, "vm@p")
	resized, err := d.ResizeSnapshot(t.Context(), "vm@p", 8*4096)
	if err != nil || resized.Snapshot.TotalBytes != 8*4096 {
		t.Errorf("%+v, %v", resized, err)
	}
	if err := <-written; err != nil {
		t.Error(err)
	}
	client.bye(t)
	waitEvent(t, d, api.EventSnapshotResized, "vm@p")
	wantState(t, d, "vm@p", api.StateValid)
	wantFrozen(t, d, "vm@p", frozen)
	stopDaemon(t, d)
	d = startDaemon(t, c)
	if x := wantState(t, d, "vm@p", api.StateValid); x.Snapshot.TotalBytes != 8*4096 {
		t.Errorf("after a restart: %+v", x.Snapshot)
	}
	wantFrozen(t, d, "vm@p", frozen)
}

// waitStalled waits until a request waits for room.
func waitStalled(t testing.TB, d *Daemon, name string) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if x, err := d.Device(name); err != nil || x.Snapshot.StalledRequests > 0 {
			return
		}
	}
	t.Fatal("nothing waits for room")
}

// TestThrottleRemove: a snapshot that makes writes wait can be removed, and they go on.
func TestThrottleRemove(t *testing.T) {
	d, _, _ := persistent(t, testConfig(t), api.SnapshotRequest{OnFull: api.OnFullThrottle, MaxCOWBytes: 3 * 4096})
	written := make(chan error)
	client := mustDialNBD(t, d, "vm")
	go func() {
		_, err := client.do(nbdWrite, 6*4096, 0, pattern(1, 6))
		written <- err
	}()
	waitStalled(t, d, "vm@p")
	if err := errors.Join(d.RemoveSnapshot(t.Context(), "vm@p", false), <-written); err != nil {
		t.Error(err)
	}
	client.bye(t)
}

// TestThrottleEnds: the wait has an end, which costs the snapshot.
func TestThrottleEnds(t *testing.T) {
	d, _, _ := persistent(t, testConfig(t), api.SnapshotRequest{
		OnFull: api.OnFullThrottle, MaxCOWBytes: 3 * 4096, StallMaxMicroseconds: 1000,
	})
	put(t, d, "vm", 6, pattern(1, 6))
	if e := waitEvent(t, d, api.EventSnapshotInvalid, "vm@p"); !strings.Contains(e.Cause, "1ms") {
		t.Errorf("%+v", e)
	}
}

func TestResize(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	attach(t, d, "vm", image(t, imageBytes))
	for _, store := range []string{"", "mem", t.TempDir()} {
		take(t, d, api.SnapshotRequest{Name: "vm@a", Store: store, MaxCOWBytes: 2 * 4096})
		x, err := d.ResizeSnapshot(t.Context(), "vm@a", 4*4096)
		if err != nil || x.Snapshot.TotalBytes != 4*4096 {
			t.Errorf("store %q: %+v, %v", store, x.Snapshot, err)
		}
		for i := range int64(4) {
			put(t, d, "vm@a", i, pattern(1, int(i)))
		}
		wantState(t, d, "vm@a", api.StateValid)
		_, err = d.ResizeSnapshot(t.Context(), "vm@a", 4*4096)
		wantErrno(t, err, syscall.EINVAL, "cannot shrink")
		removeSoon(t, d, "vm@a")
	}
	_, err := d.ResizeSnapshot(t.Context(), "vm@a", 4*4096)
	wantErrno(t, err, syscall.ENOENT, "no such snapshot")
	_, err = d.ResizeSnapshot(t.Context(), "vm", 4*4096)
	wantErrno(t, err, syscall.EINVAL, "ORIGIN@SNAPSHOT")
	_, err = d.ResizeSnapshot(t.Context(), "x@a", 4*4096)
	wantErrno(t, err, syscall.ENOENT, "no device")
}

func TestStoreLength(t *testing.T) {
	for _, test := range []struct {
		origin, limit int64
		chunk         cowstore.ChunkSize
		want          int64 // chunks
	}{
		{0, 0, 4096, 3}, {1, 0, 4096, 3}, {4096, 0, 4096, 3}, {4097, 0, 4096, 4},
		{255 * 4096, 0, 4096, 257}, {256 * 4096, 0, 4096, 259}, {257 * 4096, 0, 4096, 260},
		{1 << 40, 3 * 4096, 4096, 3}, {1 << 40, 100000, 4096, 24}, {1 << 20, 1 << 40, 65536, 18},
		{math.MaxInt64, 0, 4096, math.MaxInt64 / 4096},
	} {
		got, err := storeLength(test.origin, test.limit, test.chunk)
		if err != nil || got != test.want*int64(test.chunk) {
			t.Errorf("%+v: %d chunks, %v", test, got/int64(test.chunk), err)
		}
	}
	for _, limit := range []int64{-1, 1, 3*4096 - 1} {
		_, err := storeLength(1<<20, limit, 4096)
		wantErrno(t, err, syscall.EINVAL, "3 chunks")
	}
}

// TestStoreHolds: a store of the length that is made for it takes every chunk of the origin.
func TestStoreHolds(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	for _, blocks := range []int{1, 255, 256, 257, 513} {
		attach(t, d, "vm", image(t, blocks*4096))
		take(t, d, api.SnapshotRequest{Name: "vm@p", Persistent: true})
		c := mustDialNBD(t, d, "vm")
		c.write(t, 0, make([]byte, blocks*4096))
		c.bye(t)
		if x := wantState(t, d, "vm@p", api.StateValid); x.Snapshot.CopiedChunks != uint64(blocks) {
			t.Errorf("%d blocks: %+v", blocks, x.Snapshot)
		}
		if err := d.RemoveSnapshot(t.Context(), "vm@p", false); err != nil {
			t.Fatal(err)
		}
		detachSoon(t, d, "vm")
	}
}
