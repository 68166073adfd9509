package service

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"cowherd/api"
)

// mapDevice makes a mapped device with a live table through the API.
func mapDevice(t *testing.T, c *api.Client, name, table string) error {
	t.Helper()
	if err := c.DMCreate(t.Context(), api.DMCreate{Name: name}); err != nil {
		return err
	}
	err := c.DMLoad(t.Context(), name, api.DMTable{Table: table})
	if err == nil {
		err = c.DMSuspend(t.Context(), name, api.DMSuspend{})
	}
	if err != nil {
		if removed := c.DMRemove(t.Context(), name, false); removed != nil {
			t.Error(removed)
		}
	}
	return err
}

// mustMap is mapDevice of what must be right.
func mustMap(t *testing.T, c *api.Client, name, table string) {
	t.Helper()
	if err := mapDevice(t, c, name, table); err != nil {
		t.Fatal(err)
	}
}

// mapped finds a device by its name.
func mapped(t *testing.T, c *api.Client, name string) api.DMDevice {
	t.Helper()
	devices, err := c.DMDevices(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range devices {
		if d.Name == name {
			return d
		}
	}
	t.Fatalf("there is no %q in %v", name, devices)
	return api.DMDevice{}
}

// TestMappedDevices: mapped devices through the control API and NBD, over a file that two of them share, memory, another
// daemon's export, a live device and a snapshot.
func TestMappedDevices(t *testing.T) {
	c := testConfig(t)
	d := startDaemon(t, c)
	client := api.NewClient(c.Control)
	defer client.Close()
	path := image(t, 1<<20)
	mustMap(t, client, "low", "0 1024 linear "+path+" 0\n1024 8 zero")
	mustMap(t, client, "also", "0 1024 linear "+path+" 1024")
	attach(t, d, "vm", "mem:1M")
	take(t, d, api.SnapshotRequest{Name: "vm@s"})
	uri := d.exports.uris("vm@s")[0]
	mustMap(t, client, "top", "0 1032 linear low 0\n1032 8 linear vm 0\n1040 8 linear vm@s 0\n1048 8 linear mem:1M 8\n1056 8 linear "+
		uri+" 0")
	nbd := mustDialNBD(t, d, "top")
	nbd.write(t, 0, pattern(1, 1))
	nbd.write(t, 1032*512, pattern(2, 2))
	if got := nbd.read(t, 0, 4096); !bytes.Equal(got, pattern(1, 1)) {
		t.Error("what was written is not there")
	}
	if got := nbd.read(t, 1056*512, 4096); !bytes.Equal(got, make([]byte, 4096)) {
		t.Error("the snapshot has changed")
	}
	nbd.bye(t)
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got[:4096], pattern(1, 1)) {
		t.Errorf("the file does not have it: %v", err)
	}

	for _, test := range []struct {
		what  string
		err   error
		errno syscall.Errno
		text  string
	}{
		{"a name of a live device", client.DMCreate(t.Context(), api.DMCreate{Name: "vm"}), syscall.EBUSY, "already"},
		{"a name with @", client.DMCreate(t.Context(), api.DMCreate{Name: "vm@x"}), syscall.EINVAL, "snapshot"},
		{"no such device", mapDevice(t, client, "x", "0 8 linear nosuch 0"), syscall.ENOENT, "wanted is a name"},
		{"no such file", mapDevice(t, client, "x", "0 8 linear /no/such 0"), syscall.ENOENT, "/no/such"},
		{"a bad table", mapDevice(t, client, "x", "0 8"), syscall.EINVAL, "line 1"},
		{"a bad size", mapDevice(t, client, "x", "0 8 linear mem:1kB 0"), syscall.EINVAL, "two meanings"},
		{"a loop", client.DMLoad(t.Context(), "low", api.DMTable{Table: "0 8 linear top 0"}), syscall.ELOOP, "itself"},
		{"removed in use", client.DMRemove(t.Context(), "low", false), syscall.EBUSY, `"top"`},
		{"a live device's table", client.DMLoad(t.Context(), "vm", api.DMTable{Table: "0 8 zero"}), syscall.EBUSY, "belongs"},
		{"a live device's removal", client.DMRemove(t.Context(), "vm", false), syscall.EBUSY, "belongs"},
		{"a live device's clear", client.DMClear(t.Context(), "vm"), syscall.EBUSY, "belongs"},
		{"a live device's name", client.DMRename(t.Context(), "vm", api.DMRename{Name: "x"}), syscall.EBUSY, "belongs"},
		{"detached below", d.Detach(t.Context(), "vm"), syscall.EBUSY, "vm@s"},
		{"a snapshot below", d.RemoveSnapshot(t.Context(), "vm@s", false), syscall.EBUSY, `mapped device "top"`},
		{"the file", attachError(d, "file", path), syscall.EBUSY, "mapped devices"},
		{"the name", attachError(d, "low", "mem:1M"), syscall.EEXIST, "mapped device"},
	} {
		if !errors.Is(test.err, test.errno) || !strings.Contains(test.err.Error(), test.text) {
			t.Errorf("%s: %v, want %v and %q", test.what, test.err, test.errno, test.text)
		}
	}
	vm := mapped(t, client, "vm")
	if !vm.Managed || vm.Table[0].Type != "snapshot-origin" || vm.Table[0].Table != "mem:1M" || vm.Open != 1 {
		t.Errorf("a live device is shown as %+v", vm)
	}
	if s := mapped(t, client, "vm@s"); s.Table[0].Table != "mem:1M temp N 8" || len(s.Dependencies) != 2 {
		t.Errorf("a snapshot is shown as %+v", s)
	}
	for _, name := range []string{"top", "also", "low"} {
		removeMapped(t, client, name)
	}
	attach(t, d, "file", path) // nobody has it any more
}

// attachError is why something cannot be attached.
func attachError(d *Daemon, name, device string) error {
	_, err := d.Attach(api.AttachRequest{Name: name, Device: device})
	return err
}

// TestMappedSuspend: live devices can be suspended by themselves; the daemon ends all the same, with requests waiting.
func TestMappedSuspend(t *testing.T) {
	c := testConfig(t)
	d := startDaemon(t, c)
	client := api.NewClient(c.Control)
	defer client.Close()
	attach(t, d, "vm", "mem:1M")
	attach(t, d, "file", image(t, 1<<20)) // which is flushed
	mustMap(t, client, "x", "0 8 linear mem:1M 0")
	for _, name := range []string{"vm", "file", "x"} {
		for range 2 { // the second has nothing to do
			if err := client.DMSuspend(t.Context(), name, api.DMSuspend{Suspended: true}); err != nil {
				t.Fatal(err)
			}
		}
		if !mapped(t, client, name).Suspended {
			t.Errorf("%s is not suspended", name)
		}
	}
	if _, err := d.TakeSnapshot(t.Context(), api.SnapshotRequest{Name: "vm@s"}); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("a snapshot of a suspended device: %v", err)
	}
	if err := client.DMSuspend(t.Context(), "vm", api.DMSuspend{}); err != nil {
		t.Fatal(err)
	}
	take(t, d, api.SnapshotRequest{Name: "vm@s"})
	if err := client.DMSuspend(t.Context(), "vm@s", api.DMSuspend{Suspended: true}); err != nil {
		t.Fatal(err)
	}
}

// TestMappedEvents: a wait ends with the event, and with the daemon.
func TestMappedEvents(t *testing.T) {
	c := testConfig(t)
	d := startDaemon(t, c)
	client := api.NewClient(c.Control)
	defer client.Close()
	mustMap(t, client, "x", "0 8 zero")
	waited := make(chan error, 1)
	go func() {
		event, err := client.DMWait(t.Context(), "x", 0)
		if err == nil && event != 1 {
			err = errors.New("another event")
		}
		waited <- err
	}()
	if err := client.DMRename(t.Context(), "x", api.DMRename{Name: "y"}); err != nil {
		t.Fatal(err)
	}
	if err := <-waited; err != nil && !errors.Is(err, syscall.ENXIO) { // the name had changed already
		t.Error(err)
	}
	if err := client.DMRename(t.Context(), "y", api.DMRename{UUID: "U"}); err != nil {
		t.Fatal(err)
	}
	if x := mapped(t, client, "y"); x.UUID != "U" || x.Event != 2 {
		t.Errorf("%+v", x)
	}
	if _, err := client.DMMessage(t.Context(), "y", api.DMMessage{Words: []string{"hi"}}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("a message: %v", err)
	}
	types, err := client.DMTypes(t.Context())
	if err != nil || len(types) < 10 || types[0].Name != "clone" {
		t.Errorf("types %v, %v", types, err)
	}
	_ = d
}

// TestMappedClone: a clone in a table copies, is reloaded, and says what the kernel's says.
func TestMappedClone(t *testing.T) {
	c := testConfig(t)
	d := startDaemon(t, c)
	client := api.NewClient(c.Control)
	defer client.Close()
	dir := t.TempDir()
	src := image(t, cloneBytes)
	want := readFile(t, src)
	meta, dest := filepath.Join(dir, "meta"), filepath.Join(dir, "dest")
	for _, path := range []string{meta, dest} {
		if err := os.WriteFile(path, make([]byte, cloneBytes), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	line := func(rest string) string { return fmt.Sprintf("0 2048 clone %s %s %s %s", meta, dest, src, rest) }
	for rest, text := range map[string]string{
		"9": "region size is not a power of 2", "8 1 x": "feature argument", "8 1 no_hydration 1 x": "must be even",
		"4": "region size", "8 0 2 hydration_batch_size x": "value for argument",
	} {
		err := mapDevice(t, client, "bad", line(rest))
		if !errors.Is(err, syscall.EINVAL) || !strings.Contains(strings.ToLower(err.Error()), text) {
			t.Errorf("%q: %v, want %q", rest, err, text)
		}
	}
	mustMap(t, client, "x", line("32 1 no_hydration 2 hydration_threshold 1"))
	status := func(want string) {
		t.Helper()
		x := mapped(t, client, "x")
		if got := x.Table[0].Status; got != want {
			t.Errorf("status %q, want %q", got, want)
		}
	}
	status("8 6/256 32 0/64 0 1 no_hydration 4 hydration_threshold 1 hydration_batch_size 1 rw")
	if got := mapped(t, client, "x").Table[0].Table; got != strings.Join([]string{meta, dest, src, "32 1 no_hydration 2 hydration_threshold 1"}, " ") {
		t.Errorf("table %q", got)
	}
	put(t, d, "x", 5, pattern(1, 1))
	copy(want[5*4096:], pattern(1, 1))
	status("8 6/256 32 1/64 0 1 no_hydration 4 hydration_threshold 1 hydration_batch_size 1 rw")
	// Another region size is not that of the metadata.
	if err := client.DMLoad(t.Context(), "x", api.DMTable{Table: line("64")}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("another region size: %v", err)
	}
	if _, err := client.DMMessage(t.Context(), "x", api.DMMessage{Words: []string{"hydrate"}}); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("a wrong message: %v", err)
	}
	// Loaded anew while it is written: what the old table has hydrated is there in the new one.
	if err := client.DMLoad(t.Context(), "x", api.DMTable{Table: line("32 1 no_hydration")}); err != nil {
		t.Fatal(err)
	}
	put(t, d, "x", 9, pattern(1, 2))
	copy(want[9*4096:], pattern(1, 2))
	if err := client.DMSuspend(t.Context(), "x", api.DMSuspend{}); err != nil {
		t.Fatal(err)
	}
	status("8 6/256 32 2/64 0 1 no_hydration 4 hydration_threshold 1 hydration_batch_size 1 rw")
	event := mapped(t, client, "x").Event
	if _, err := client.DMMessage(t.Context(), "x", api.DMMessage{Words: []string{"hydration_threshold", "16"}}); err != nil {
		t.Error(err)
	}
	if _, err := client.DMMessage(t.Context(), "x", api.DMMessage{Words: []string{"enable_hydration"}}); err != nil {
		t.Error(err)
	}
	if _, err := client.DMWait(t.Context(), "x", event); err != nil {
		t.Error(err)
	}
	status("8 6/256 32 64/64 0 0 4 hydration_threshold 16 hydration_batch_size 1 rw")
	if !bytes.Equal(get(t, d, "x", cloneBytes), want) {
		t.Error("it shows something else")
	}
	stopDaemon(t, d)
	if !bytes.Equal(readFile(t, dest), want) {
		t.Error("the destination is no copy")
	}
}

// TestMappedNumbers: a block device by its numbers is the one by its path.
func TestMappedNumbers(t *testing.T) {
	c := testConfig(t)
	startDaemon(t, c)
	client := api.NewClient(c.Control)
	defer client.Close()
	err := mapDevice(t, client, "x", "0 8 linear 999:999 0")
	if !errors.Is(err, syscall.ENOENT) || !strings.Contains(err.Error(), filepath.Join("/dev/block", "999:999")) {
		t.Errorf("a device that is not there: %v", err)
	}
	mustMap(t, client, "low", "0 8 zero")
	mustMap(t, client, "high", "0 8 linear 253:0 0")
	if got := mapped(t, client, "high").Table[0].Table; got != "low 0" {
		t.Errorf("table %q", got)
	}
}

// removeMapped removes a mapped device whose client has just said goodbye.
func removeMapped(t testing.TB, client *api.Client, name string) {
	t.Helper()
	for {
		err := client.DMRemove(t.Context(), name, false)
		if err == nil {
			return
		}
		if !errors.Is(err, syscall.EBUSY) {
			t.Fatal(err)
		}
	}
}
