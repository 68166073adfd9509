package conformance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"cowherd/api"
	"cowherd/backend/nbd"
	"cowherd/block"
	"cowherd/service"
)

// cycle attaches an image, takes snapshots, uses them over NBD and lets go of everything.
func cycle(d *daemon, i int) error {
	ctx := d.t.Context()
	if _, err := d.api.Attach(ctx, api.AttachRequest{Name: "vm", Device: filepath.Join(d.dir, "disk.img")}); err != nil {
		return err
	}
	origin, err := d.openErr("vm", 2)
	if err != nil {
		return err
	}
	for _, store := range []string{"temp", "mem"} {
		name := "vm@" + store
		r := api.SnapshotRequest{Name: name, Store: store, MaxCOWBytes: int64(i%2) * 64 * kib}
		if _, err := d.api.TakeSnapshot(ctx, r); err != nil {
			return err
		}
		x, err := d.openErr(name, 2)
		if err != nil {
			return err
		}
		for at := int64(0); at < mib; at += 32 * kib { // which invalidates the snapshots that have a limit
			if err := block.Write(origin, []byte(store), at); err != nil {
				return err
			}
		}
		if _, err := contents(x); (err == nil) != (i%2 == 0) {
			return fmt.Errorf("cycle %d: %v", i, err)
		}
		defer x.Close()
	}
	for _, name := range []string{"vm@mem", "vm@temp"} {
		if err := d.api.RemoveSnapshot(ctx, name, true); err != nil { // from under a client
			return err
		}
	}
	if err := origin.Close(); err != nil {
		return err
	}
	for {
		if err := d.api.Detach(ctx, "vm"); !errors.Is(err, syscall.EBUSY) {
			return err
		}
	}
}

// TestNothingLeftBehind lets a daemon do the same again and again: no file and no connection stays open.
func TestNothingLeftBehind(t *testing.T) {
	t.Parallel()
	const cycles = 20
	d := startDaemon(t)
	if err := os.WriteFile(filepath.Join(d.dir, "disk.img"), make([]byte, mib), 0o600); err != nil {
		t.Fatal(err)
	}
	d.api.Close()
	before := len(d.filesOf())
	for i := range cycles {
		if err := cycle(d, i); err != nil {
			t.Fatal(err)
		}
	}
	if out := d.do("ls"); strings.Count(out, "\n") != 1 {
		t.Errorf("left on the list:\n%s", out)
	}
	d.api.Close() // its idle connections
	// The runtime may have opened one or two of its own; what is forgotten is forgotten in each cycle.
	var files []string
	eventually(t, "the daemon to close its files", func() bool {
		files = d.filesOf()
		return len(files) < before+cycles/2
	})
	for _, path := range files {
		if strings.Contains(path, "deleted") || strings.Contains(path, "disk.img") {
			t.Errorf("still open: %s", path)
		}
	}
}

// filesOf are the files that the daemon has open.
func (d *daemon) filesOf() (paths []string) {
	d.t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", d.cmd.Process.Pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		d.t.Fatal(err)
	}
	for _, e := range entries {
		if path, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil {
			paths = append(paths, path)
		}
	}
	return paths
}

// TestNoGoroutinesLeft runs a daemon in this process: when all devices are gone it has as many goroutines as before,
// and when it has stopped it has none.
func TestNoGoroutinesLeft(t *testing.T) {
	for _, engine := range engines {
		before := runtime.NumGoroutine()
		inProcess(t, engine)
		awaitGoroutines(t, before)
	}
}

func inProcess(t *testing.T, engine string) {
	dir := shortDir(t)
	d := &daemon{t: t, dir: dir, socket: filepath.Join(dir, "nbd.sock"), control: filepath.Join(dir, "control.sock")}
	running, err := service.New(service.Config{
		StateDir: filepath.Join(dir, "state"), Control: d.control, NBD: []string{"unix:" + d.socket}, Engine: engine,
	})
	if err != nil {
		t.Fatal(err)
	}
	running.Serve()
	if err := os.WriteFile(filepath.Join(dir, "disk.img"), make([]byte, mib), 0o600); err != nil {
		t.Fatal(err)
	}
	d.api = api.NewClient(d.control)
	serving := runtime.NumGoroutine()
	for i := range 6 {
		if err := cycle(d, i); err != nil {
			t.Fatal(err)
		}
	}
	d.api.Close()
	awaitGoroutines(t, serving)
	// Stopped with everything in use.
	if _, err := running.Attach(api.AttachRequest{Name: "vm", Device: filepath.Join(dir, "disk.img")}); err != nil {
		t.Fatal(err)
	}
	if _, err := running.TakeSnapshot(t.Context(), api.SnapshotRequest{Name: "vm@a"}); err != nil {
		t.Fatal(err)
	}
	var clients []*nbd.Device
	for _, name := range []string{"vm", "vm@a", "vm@a"} {
		clients = append(clients, d.open(name, 1))
	}
	ctx, cancel := context.WithTimeout(context.Background(), endLimit)
	defer cancel()
	if err := running.Stop(ctx); err != nil {
		t.Error(err)
	}
	for _, c := range clients {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	for path, want := range map[string]int{dir: 2, filepath.Join(dir, "state"): 2} { // the image, state; the lock, the state file
		if left, err := os.ReadDir(path); err != nil || len(left) != want {
			t.Errorf("left in %s: %v (%v)", path, left, err)
		}
	}
}

// awaitGoroutines waits until no more goroutines run than before: some end a moment after what they did.
func awaitGoroutines(t testing.TB, before int) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			stacks := make([]byte, mib)
			t.Fatalf("%s goroutines instead of %d:\n%s", strconv.Itoa(runtime.NumGoroutine()), before,
				stacks[:runtime.Stack(stacks, true)])
		}
	}
}
