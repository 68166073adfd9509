package service

import (
	"bytes"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"cowherd/api"
)

// serveGolden starts a daemon that exports image as golden.
func serveGolden(t testing.TB, c Config, image string) *Daemon {
	t.Helper()
	d := startDaemon(t, c)
	if _, err := d.Device("golden"); err != nil {
		attach(t, d, "golden", image)
	}
	return d
}

// TestCloneSourceAway: a clone whose source's server is away is detached, and its daemon ended, without waiting until the
// server is given up.
func TestCloneSourceAway(t *testing.T) {
	remote := serveGolden(t, testConfig(t), image(t, cloneBytes))
	x, err := remote.Device("golden")
	if err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t, testConfig(t))
	if _, err := d.SetThrottle("hydration", api.ThrottleRequest{RateBytes: new(int64(64 << 10)), BurstBytes: new(int64(4 << 10))}); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, name := range []string{"a", "b"} {
		makeClone(t, d, name, filepath.Join(dir, name), api.CloneRequest{
			Source: x.URIs[0] + "&reconnect-timeout=10m", NoHydration: name == "b", RegionBytes: 4096, Batch: 1,
		})
	}
	for began := time.Now(); ; { // "a" will wait for data, "b" for the extents
		if x, err := d.Device("a"); err != nil || x.Clone.Hydrated > 0 {
			break
		}
		if time.Since(began) > 20*time.Second {
			t.Fatal("nothing is hydrated")
		}
	}
	stopDaemon(t, remote)
	if _, err := d.SetThrottle("hydration", api.ThrottleRequest{RateBytes: new(int64)}); err != nil {
		t.Fatal(err)
	}
	running := true
	if _, err := d.Hydrate(t.Context(), "b", api.HydrationRequest{Running: &running}); err != nil {
		t.Fatal(err)
	}
	if err := d.Detach(t.Context(), "a"); err != nil {
		t.Error(err)
	}
	if n := countEvents(t, d, api.EventHydrationFailed, "a"); n != 0 {
		t.Errorf("%d events of regions that could not be copied", n)
	}
	stopDaemon(t, d) // within 20 s
}

// TestCloneSourceBack: a server that was away until it was given up is connected to anew by another try.
func TestCloneSourceBack(t *testing.T) {
	c, golden := testConfig(t), image(t, cloneBytes)
	remote := serveGolden(t, c, golden)
	x, err := remote.Device("golden")
	if err != nil {
		t.Fatal(err)
	}
	d := startDaemon(t, testConfig(t))
	dest := filepath.Join(t.TempDir(), "web.img")
	makeClone(t, d, "web", dest, api.CloneRequest{Source: x.URIs[0] + "&reconnect-timeout=0", NoHydration: true})
	stopDaemon(t, remote)
	client := mustDialNBD(t, d, "web")
	if _, err := client.do(0, 0, 4096, nil); err == nil {
		t.Error("it reads what its source holds without its source")
	}
	client.bye(t)
	retry := api.HydrationRequest{Retry: true}
	_, err = d.Hydrate(t.Context(), "web", retry)
	wantErrno(t, err, syscall.ENOENT, "the source does not come back")

	// Another export is none.
	if err := os.Truncate(golden, cloneBytes/2); err != nil {
		t.Fatal(err)
	}
	remote = serveGolden(t, c, golden)
	_, err = d.Hydrate(t.Context(), "web", retry)
	wantErrno(t, err, syscall.ESTALE, "has 512KiB in blocks of")
	stopDaemon(t, remote)
	if err := os.WriteFile(golden, readFile(t, image(t, cloneBytes)), 0o600); err != nil {
		t.Fatal(err)
	}
	serveGolden(t, c, golden)
	for range 2 { // the second time there is nothing to be done about it
		if _, err := d.Hydrate(t.Context(), "web", retry); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(get(t, d, "web", cloneBytes), readFile(t, golden)) {
		t.Error("it does not show its source")
	}
	running := true
	if _, err := d.Hydrate(t.Context(), "web", api.HydrationRequest{Running: &running}); err != nil {
		t.Fatal(err)
	}
	waitEvent(t, d, api.EventSourceDetached, "web")
	detachSoon(t, d, "web")
	if !bytes.Equal(readFile(t, dest), readFile(t, golden)) {
		t.Error("the destination is no copy")
	}
}

// loadMapped gives a mapped device a live table.
func loadMapped(t testing.TB, client *api.Client, name, table string, readOnly bool) error {
	t.Helper()
	err := client.DMLoad(t.Context(), name, api.DMTable{Table: table, ReadOnly: readOnly})
	if err == nil {
		err = client.DMSuspend(t.Context(), name, api.DMSuspend{})
	}
	return err
}

// TestCloneOfMapped: a mapped device that nobody can write is cloned by its name, and is the clone's until that has
// detached it. It ends with the daemon, and the clone comes back when it does.
func TestCloneOfMapped(t *testing.T) {
	c := testConfig(t)
	d := startDaemon(t, c)
	client := api.NewClient(c.Control)
	defer client.Close()
	src, dest := image(t, cloneBytes), filepath.Join(t.TempDir(), "web.img")
	want := append(readFile(t, src)[cloneBytes/2:], readFile(t, src)[:cloneBytes/2]...)
	table := "0 1024 linear " + src + " 1024\n1024 1024 linear " + src + " 0"
	r := api.AttachRequest{Name: "web", Device: dest, Clone: api.CloneRequest{Source: "turned", NoHydration: true}}
	_, err := d.Attach(r)
	wantErrno(t, err, syscall.ENOENT, `"turned"`)
	mustMap(t, client, "turned", table)
	_, err = d.Attach(r)
	wantErrno(t, err, syscall.EBUSY, "--readonly")
	if err := loadMapped(t, client, "turned", table, true); err != nil {
		t.Fatal(err)
	}
	if _, err = d.Attach(r); err != nil {
		t.Fatal(err)
	}
	put(t, d, "web", 5, pattern(1, 1))
	copy(want[5*4096:], pattern(1, 1))
	if !bytes.Equal(get(t, d, "web", cloneBytes), want) {
		t.Error("the clone does not show its source")
	}
	wantErrno(t, client.DMRemove(t.Context(), "turned", false), syscall.EBUSY, `clone "web"`)
	wantErrno(t, loadMapped(t, client, "turned", "0 8 linear web 0", true), syscall.ELOOP, "lie on itself")
	take(t, d, api.SnapshotRequest{Name: "web@s"})
	makeClone(t, d, "second", dest+"2", api.CloneRequest{Source: "web@s", NoHydration: true})
	wantErrno(t, loadMapped(t, client, "turned", "0 8 linear second 0", true), syscall.ELOOP, "lie on itself")
	stopDaemon(t, d) // in good order, whoever is on whom

	d = startDaemon(t, c)
	wantState(t, d, "web", api.StateLost)
	mustMap(t, client, "turned", table)
	if err := loadMapped(t, client, "turned", table, true); err != nil {
		t.Fatal(err)
	}
	if _, err = d.Attach(r); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(get(t, d, "web", cloneBytes), want) {
		t.Error("after a restart it shows something else")
	}
	running := true
	if _, err := d.Hydrate(t.Context(), "web", api.HydrationRequest{Running: &running}); err != nil {
		t.Fatal(err)
	}
	waitEvent(t, d, api.EventSourceDetached, "web")
	if err := loadMapped(t, client, "turned", "0 8 linear web 0", true); err != nil {
		t.Errorf("a table on a clone that is detached: %v", err)
	}
}

// TestCloneOfOwnExport: the URI of an export of the same daemon is taken for the name, so that a restart does not wait for
// itself.
func TestCloneOfOwnExport(t *testing.T) {
	c := testConfig(t)
	d := startDaemon(t, c)
	attach(t, d, "vm", image(t, cloneBytes))
	take(t, d, api.SnapshotRequest{Name: "vm@s", Persistent: true, ReadOnly: true})
	x := makeClone(t, d, "a", filepath.Join(t.TempDir(), "a"), api.CloneRequest{
		Source: d.exports.uris("vm@s")[0], NoHydration: true,
	})
	if x.Clone.Source != "vm@s" {
		t.Errorf("its source is %q", x.Clone.Source)
	}
	stopDaemon(t, d)
	d = startDaemon(t, c)
	wantState(t, d, "a", api.StateLive)
	wantErrno(t, d.RemoveSnapshot(t.Context(), "vm@s", false), syscall.EBUSY, `clone "a"`)
}
