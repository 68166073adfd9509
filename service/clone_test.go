package service

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"cowherd/api"
)

// cloneBytes is the size of the images of these tests.
const cloneBytes = 1 << 20

// makeClone makes a clone of a source on a new file, without hydration unless it is asked for.
func makeClone(t testing.TB, d *Daemon, name, dest string, r api.CloneRequest) api.Device {
	t.Helper()
	x, err := d.Attach(api.AttachRequest{Name: name, Device: dest, Clone: r})
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestClone: a clone can be used at once, its source stays as it is, and in the end the destination is a copy.
func TestClone(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	src := image(t, cloneBytes)
	want := readFile(t, src)
	dest := filepath.Join(t.TempDir(), "web.img")
	x := makeClone(t, d, "web", dest, api.CloneRequest{Source: src, NoHydration: true, RegionBytes: 16 << 10})
	if x.Kind != api.KindClone || x.Target != "clone" || x.SizeBytes != cloneBytes || x.Clone.Regions != 64 || !x.Clone.SourceInUse ||
		!strings.HasPrefix(x.TargetStatus, "8 ") || x.Clone.Mode != api.CloneReadWrite || x.Clone.Running {
		t.Errorf("made %+v, %+v", x, x.Clone)
	}
	if !bytes.Equal(get(t, d, "web", cloneBytes), want) {
		t.Error("the clone does not show its source")
	}
	put(t, d, "web", 5, pattern(1, 1))
	copy(want[5*4096:], pattern(1, 1))
	if !bytes.Equal(get(t, d, "web", cloneBytes), want) {
		t.Error("a write is not there")
	}
	running := true
	if _, err := d.Hydrate(t.Context(), "web", api.HydrationRequest{Running: &running, Threshold: 8, Batch: 4}); err != nil {
		t.Fatal(err)
	}
	waitEvent(t, d, api.EventCloneHydrated, "web")
	if x, err := d.Device("web"); err != nil || x.Clone.SourceInUse || x.Clone.Hydrated != 64 || x.Clone.Threshold != 8 {
		t.Errorf("%+v, %v", x.Clone, err)
	}
	if err := d.Detach(t.Context(), "web"); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(readFile(t, dest), want) {
		t.Error("the destination is no copy")
	}
	if !bytes.Equal(readFile(t, src), readFile(t, image(t, cloneBytes))) {
		t.Error("the source has changed")
	}
	if d.names.taken() != 0 {
		t.Error("names or files are held")
	}
}

// TestCloneRestart: a clone goes on where it was, and its settings with it; one that is hydrated needs no source.
func TestCloneRestart(t *testing.T) {
	c := testConfig(t)
	d := startDaemon(t, c)
	src, dest := image(t, cloneBytes), filepath.Join(t.TempDir(), "web.img")
	want := readFile(t, src)
	makeClone(t, d, "web", dest, api.CloneRequest{Source: src, NoHydration: true})
	for turn := range 3 {
		put(t, d, "web", int64(20*turn), pattern(1, turn))
		copy(want[20*turn*4096:], pattern(1, turn))
		if _, err := d.Hydrate(t.Context(), "web", api.HydrationRequest{Threshold: uint32(turn + 1)}); err != nil {
			t.Fatal(err)
		}
		stopDaemon(t, d)
		d = startDaemon(t, c)
		x := wantState(t, d, "web", api.StateLive)
		if x.Clone == nil || x.Clone.Hydrated != uint64(turn+1) || x.Clone.Running || x.Clone.Threshold != uint32(turn+1) {
			t.Errorf("after a restart: %+v", x.Clone)
		}
		if !bytes.Equal(get(t, d, "web", cloneBytes), want) {
			t.Error("after a restart it shows something else")
		}
	}
	running := true
	if _, err := d.Hydrate(t.Context(), "web", api.HydrationRequest{Running: &running}); err != nil {
		t.Fatal(err)
	}
	waitEvent(t, d, api.EventCloneHydrated, "web")
	stopDaemon(t, d)
	rename(t, src, src+".away")
	d = startDaemon(t, c)
	if x := wantState(t, d, "web", api.StateLive); x.Clone.SourceInUse || !bytes.Equal(get(t, d, "web", cloneBytes), want) {
		t.Errorf("hydrated, after a restart: %+v", x.Clone)
	}
}

// TestCloneIsNotMadeAnew: a clone of which a part is missing after a restart is lost, and comes back with the part.
func TestCloneIsNotMadeAnew(t *testing.T) {
	for _, what := range []string{"metadata", "destination", "source"} {
		t.Run(what, func(t *testing.T) {
			c := testConfig(t)
			d := startDaemon(t, c)
			src, dest := image(t, cloneBytes), filepath.Join(t.TempDir(), "web.img")
			makeClone(t, d, "web", dest, api.CloneRequest{Source: src, NoHydration: true})
			put(t, d, "web", 5, pattern(1, 1))
			want := get(t, d, "web", cloneBytes)
			stopDaemon(t, d)
			path := map[string]string{"metadata": dest + metadataSuffix, "destination": dest, "source": src}[what]
			rename(t, path, path+".away")
			d = startDaemon(t, c)
			if x := wantState(t, d, "web", api.StateLost); !strings.Contains(x.Lost, path) {
				t.Errorf("lost: %q", x.Lost)
			}
			wantFile(t, path, false)
			_, err := d.Attach(api.AttachRequest{Name: "web", Device: dest, Clone: api.CloneRequest{Source: src}})
			wantErrno(t, err, syscall.ENOENT, path)
			wantFile(t, path, false)
			_, err = d.Attach(api.AttachRequest{Name: "web", Device: dest})
			wantErrno(t, err, syscall.EEXIST, "clone")
			stopDaemon(t, d)
			rename(t, path+".away", path)
			d = startDaemon(t, c)
			wantState(t, d, "web", api.StateLive)
			if !bytes.Equal(get(t, d, "web", cloneBytes), want) {
				t.Error("it shows something else")
			}
		})
	}
}

// TestCloneOfSnapshot: a snapshot that is cloned cannot be removed, and is let go of when it is no longer needed.
func TestCloneOfSnapshot(t *testing.T) {
	c := testConfig(t)
	d := startDaemon(t, c)
	attach(t, d, "vm", image(t, cloneBytes))
	want := get(t, d, "vm", cloneBytes)
	dir := t.TempDir()
	_, err := d.Attach(api.AttachRequest{Name: "a", Device: filepath.Join(dir, "a.img"), Clone: api.CloneRequest{Source: "vm"}})
	wantErrno(t, err, syscall.EBUSY, "take a snapshot")
	_, err = d.Attach(api.AttachRequest{Name: "a", Device: filepath.Join(dir, "a.img"), Clone: api.CloneRequest{Source: "vm@x"}})
	wantErrno(t, err, syscall.ENOENT, "vm@x")
	take(t, d, api.SnapshotRequest{Name: "vm@p", Persistent: true, ReadOnly: true})
	put(t, d, "vm", 3, pattern(9, 9))
	makeClone(t, d, "a", filepath.Join(dir, "a.img"), api.CloneRequest{Source: "vm@p", NoHydration: true})
	wantErrno(t, d.RemoveSnapshot(t.Context(), "vm@p", false), syscall.EBUSY, `clone "a"`)
	put(t, d, "a", 7, pattern(1, 1))
	copy(want[7*4096:], pattern(1, 1))
	stopDaemon(t, d)
	d = startDaemon(t, c) // "a" comes before "vm" by name
	wantState(t, d, "a", api.StateLive)
	if !bytes.Equal(get(t, d, "a", cloneBytes), want) {
		t.Error("it shows something else")
	}
	wantErrno(t, d.RemoveSnapshot(t.Context(), "vm@p", false), syscall.EBUSY, `clone "a"`)
	running := true
	if _, err := d.Hydrate(t.Context(), "a", api.HydrationRequest{Running: &running}); err != nil {
		t.Fatal(err)
	}
	waitEvent(t, d, api.EventCloneHydrated, "a")
	removeSoon(t, d, "vm@p")
	if !bytes.Equal(get(t, d, "a", cloneBytes), want) {
		t.Error("it shows something else without its source")
	}
}

// TestSnapshotOfClone: a clone has snapshots as any device.
func TestSnapshotOfClone(t *testing.T) {
	c := testConfig(t)
	d := startDaemon(t, c)
	src, dest := image(t, cloneBytes), filepath.Join(t.TempDir(), "web.img")
	makeClone(t, d, "web", dest, api.CloneRequest{Source: src, NoHydration: true})
	frozen := get(t, d, "web", cloneBytes)
	take(t, d, api.SnapshotRequest{Name: "web@p", Persistent: true})
	put(t, d, "web", 2, pattern(1, 1))
	running := true
	if _, err := d.Hydrate(t.Context(), "web", api.HydrationRequest{Running: &running}); err != nil {
		t.Fatal(err)
	}
	waitEvent(t, d, api.EventCloneHydrated, "web")
	put(t, d, "web", 9, pattern(1, 2))
	wantFrozen(t, d, "web@p", frozen)
	stopDaemon(t, d)
	d = startDaemon(t, c)
	wantFrozen(t, d, "web@p", frozen)
	wantErrno(t, d.Detach(t.Context(), "web"), syscall.EBUSY, "web@p")
}

// TestCloneOfExport: the source may be an export, here one of another daemon; the clone can be used at once.
func TestCloneOfExport(t *testing.T) {
	remote := startDaemon(t, testConfig(t))
	x := attach(t, remote, "golden", image(t, cloneBytes))
	want := get(t, remote, "golden", cloneBytes)
	d := startDaemon(t, testConfig(t))
	dest := filepath.Join(t.TempDir(), "web.img")
	best := time.Hour
	for range 5 { // a busy machine may be slow once
		began := time.Now()
		makeClone(t, d, "web", dest, api.CloneRequest{Source: x.URIs[0], NoHydration: true})
		best = min(best, time.Since(began))
		if !bytes.Equal(get(t, d, "web", cloneBytes), want) {
			t.Error("the clone does not show its source")
		}
		detachSoon(t, d, "web")
		for _, path := range []string{dest, dest + metadataSuffix} {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Logf("ready within %v", best)
	makeClone(t, d, "web", dest, api.CloneRequest{Source: x.URIs[0]})
	waitEvent(t, d, api.EventCloneHydrated, "web")
	detachSoon(t, d, "web")
	if !bytes.Equal(readFile(t, dest), want) {
		t.Error("the destination is no copy")
	}
}

// TestCloneShares: one image is the source of any number of clones, and of nothing that writes.
func TestCloneShares(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	src, dir := image(t, cloneBytes), t.TempDir()
	for _, name := range []string{"a", "b"} {
		makeClone(t, d, name, filepath.Join(dir, name), api.CloneRequest{Source: src, NoHydration: true})
	}
	_, err := d.Attach(api.AttachRequest{Name: "vm", Device: src})
	wantErrno(t, err, syscall.EBUSY, "source of 2 clones")
	for _, name := range []string{"a", "b"} {
		if err := d.Detach(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	attach(t, d, "vm", src)
	_, err = d.Attach(api.AttachRequest{Name: "a", Device: filepath.Join(dir, "a"), Clone: api.CloneRequest{Source: src}})
	wantErrno(t, err, syscall.EBUSY, `"vm"`)
}

// TestCloneRefused: what a clone is not made of, and that nothing is left behind.
func TestCloneRefused(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	src, dir := image(t, cloneBytes), t.TempDir()
	odd, full := image(t, 1000), image(t, cloneBytes)
	small := filepath.Join(dir, "small")
	if err := os.WriteFile(small, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(small, cloneBytes/2); err != nil {
		t.Fatal(err)
	}
	fresh := filepath.Join(dir, "fresh")
	for _, test := range []struct {
		name  string
		dest  string
		r     api.CloneRequest
		errno syscall.Errno
		text  string
	}{
		{"no source", fresh, api.CloneRequest{RegionBytes: 4096}, syscall.EINVAL, "source"},
		{"no such source", fresh, api.CloneRequest{Source: filepath.Join(dir, "none")}, syscall.ENOENT, "none"},
		{"no such device", fresh, api.CloneRequest{Source: "none"}, syscall.ENOENT, "none"},
		{"no server", fresh, api.CloneRequest{Source: "nbd+unix:///x?socket=" + dir + "/sock"}, syscall.ENOENT, "sock"},
		{"odd source", fresh, api.CloneRequest{Source: odd}, syscall.EINVAL, "multiple of 512"},
		{"odd region", fresh, api.CloneRequest{Source: src, RegionBytes: 12 << 10}, syscall.EINVAL, "power of two"},
		{"small region", fresh, api.CloneRequest{Source: src, RegionBytes: 2 << 10}, syscall.EINVAL, "power of two"},
		{"unknown order", fresh, api.CloneRequest{Source: src, Order: "random"}, syscall.EINVAL, "order"},
		{"full destination", full, api.CloneRequest{Source: src}, syscall.EEXIST, "--overwrite"},
		{"small destination", small, api.CloneRequest{Source: src}, syscall.EINVAL, "has 512KiB, and the source 1MiB"},
		{"source is destination", src, api.CloneRequest{Source: src}, syscall.EBUSY, src},
		{"relative destination", "fresh", api.CloneRequest{Source: src}, syscall.EINVAL, "absolute"},
		{"relative metadata", fresh, api.CloneRequest{Source: src, Metadata: "x"}, syscall.EINVAL, "absolute"},
		{"metadata is an image", fresh, api.CloneRequest{Source: src, Metadata: full}, syscall.EUCLEAN, "superblock"},
	} {
		_, err := d.Attach(api.AttachRequest{Name: "web", Device: test.dest, Clone: test.r})
		wantErrno(t, err, test.errno, test.text)
		wantFile(t, fresh, false)
		wantFile(t, fresh+metadataSuffix, false)
		if d.names.taken() != 0 {
			t.Fatalf("%s: names or files are held", test.name)
		}
	}
	if !bytes.Equal(readFile(t, full), readFile(t, src)) {
		t.Error("a destination was written")
	}
	makeClone(t, d, "web", full, api.CloneRequest{Source: src, Overwrite: true, NoHydration: true})
	_, err := d.Hydrate(t.Context(), "none", api.HydrationRequest{})
	wantErrno(t, err, syscall.ENOENT, "none")
	attach(t, d, "vm", "mem:1M")
	_, err = d.Hydrate(t.Context(), "vm", api.HydrationRequest{})
	wantErrno(t, err, syscall.EINVAL, "not a clone")
}

// TestCloneSizes: metadata goes with what is long enough for it, and with no other region size.
func TestCloneSizes(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	dir := t.TempDir()
	src, dest, meta := image(t, cloneBytes), filepath.Join(dir, "web.img"), filepath.Join(dir, "meta")
	makeClone(t, d, "web", dest, api.CloneRequest{Source: src, Metadata: meta, NoHydration: true})
	put(t, d, "web", 5, pattern(1, 1))
	want := get(t, d, "web", cloneBytes)
	detachSoon(t, d, "web")
	before := readFile(t, meta)
	short, long := image(t, cloneBytes-512), image(t, cloneBytes+4096)
	for _, test := range []struct {
		name, dest, source string
		region             int64
		text               string
	}{
		{"short source", dest, short, 0, "is of a clone of 1MiB, and the source " + short + " has only 1048064"},
		{"short destination", short, src, 0, "is of a clone of 1MiB, and the destination " + short + " has only 1048064"},
		{"region size", dest, src, 4096, "region size"},
	} {
		_, err := d.Attach(api.AttachRequest{Name: "web", Device: test.dest, Clone: api.CloneRequest{
			Source: test.source, Metadata: meta, RegionBytes: test.region, NoHydration: true,
		}})
		wantErrno(t, err, syscall.EINVAL, test.text)
		if d.names.taken() != 0 {
			t.Fatalf("%s: names or files are held", test.name)
		}
	}
	if !bytes.Equal(readFile(t, meta), before) {
		t.Error("the metadata has changed")
	}
	makeClone(t, d, "web", dest, api.CloneRequest{Source: long, Metadata: meta, NoHydration: true})
	if got := get(t, d, "web", cloneBytes); !bytes.Equal(got, want) {
		t.Error("with a longer source, which begins alike, it shows something else")
	}
}

// TestCloneIsNoOther: a clone that is lost does not come back over another source, with other metadata, or as none.
func TestCloneIsNoOther(t *testing.T) {
	c := testConfig(t)
	d := startDaemon(t, c)
	src, other, dest := image(t, cloneBytes), image(t, cloneBytes), filepath.Join(t.TempDir(), "web.img")
	makeClone(t, d, "web", dest, api.CloneRequest{Source: src, NoHydration: true})
	put(t, d, "web", 5, pattern(1, 1))
	want := get(t, d, "web", cloneBytes)
	stopDaemon(t, d)
	rename(t, src, src+".away")
	d = startDaemon(t, c)
	wantState(t, d, "web", api.StateLost)
	for _, test := range []struct {
		r    api.CloneRequest
		text string
	}{
		{api.CloneRequest{Source: other}, "the name is that of a clone of " + src},
		{api.CloneRequest{Source: src, Metadata: other}, "with the metadata " + dest + metadataSuffix},
		{api.CloneRequest{}, "a clone and the other is not"},
	} {
		_, err := d.Attach(api.AttachRequest{Name: "web", Device: dest, Clone: test.r})
		wantErrno(t, err, syscall.EEXIST, test.text)
	}
	stopDaemon(t, d)
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	wantErrno(t, d.Restore([]api.AttachRequest{{Name: "web", Device: dest}}), syscall.EEXIST, "the name as that of a clone")
	stopDaemon(t, d)
	rename(t, src+".away", src)
	d = startDaemon(t, c)
	if wantState(t, d, "web", api.StateLive); !bytes.Equal(get(t, d, "web", cloneBytes), want) {
		t.Error("it shows something else")
	}
}

// TestRestoreOrder: clones come after what they are clones of.
func TestRestoreOrder(t *testing.T) {
	device := func(name, source string) savedDevice {
		return savedDevice{Request: api.AttachRequest{Name: name, Clone: api.CloneRequest{Source: source}}}
	}
	var got []string
	for _, x := range inOrder([]savedDevice{
		device("a", "c@x"), device("b", "a@y"), device("c", ""), device("d", "/img"), device("e", "nbd://host/c"), device("f", "gone"),
		device("g", "f"),
	}) {
		got = append(got, x.Request.Name)
	}
	if want := []string{"c", "d", "e", "a", "b", "f", "g"}; !slices.Equal(got, want) {
		t.Errorf("order %v, want %v", got, want)
	}
}
