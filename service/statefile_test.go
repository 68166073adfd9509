package service

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cowherd/api"
)

// someContent is content with everything in it.
func someContent() *content {
	since := time.Date(2026, 11, 24, 15, 0, 0, 0, time.UTC)
	return &content{Devices: []savedDevice{
		{Request: api.AttachRequest{Name: "data", Device: "/data.img", Direct: true}, Since: since, Lost: "it is away"},
		{
			Request: api.AttachRequest{Name: "vm", Device: "/vm.img"}, Since: since,
			Snapshots: []savedSnapshot{
				{
					Request: api.SnapshotRequest{
						Name: "vm@a", Persistent: true, Store: "/vm@a.cow", ChunkBytes: 4096, OnFull: api.OnFullGrow, WarnAt: []int{},
					},
					Since: since, Phase: phaseKept, OriginBytes: 1 << 20, Made: true,
				},
				{Request: api.SnapshotRequest{Name: "vm@b", Persistent: true}, Phase: phaseMerging, Stopped: true},
				{Request: api.SnapshotRequest{Name: "vm@c"}, Phase: phaseLost, Lost: "no file"},
			},
		},
	}}
}

func openedStateFile(t testing.TB, dir string) *stateFile {
	t.Helper()
	f, err := openStateFile(dir)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// TestStateFile: what a change has written is there when the file is opened again, and nothing else is left.
func TestStateFile(t *testing.T) {
	dir := t.TempDir()
	f := openedStateFile(t, dir)
	if len(f.now().Devices) != 0 {
		t.Errorf("a new file holds %+v", f.now())
	}
	want := someContent()
	if err := f.change(func(c *content) {
		c.put(want.Devices[1])
		c.put(want.Devices[0]) // they come in order of their names
	}); err != nil {
		t.Fatal(err)
	}
	// A file that was not finished when the daemon was killed is no harm.
	if err := os.WriteFile(filepath.Join(dir, stateNewName), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	again := openedStateFile(t, dir)
	if !reflect.DeepEqual(again.now(), want) || !reflect.DeepEqual(f.now(), want) {
		t.Errorf("got %+v\nwant %+v", again.now(), want)
	}
	before := again.now()
	if err := again.change(func(c *content) {
		c.forget("data")
		c.forgetSnapshot("vm@b")
		c.snapshot("vm@a").Phase = phaseRemoving
		c.putSnapshot(savedSnapshot{Request: api.SnapshotRequest{Name: "vm@d"}, Phase: phaseTaking})
		c.putSnapshot(savedSnapshot{Request: api.SnapshotRequest{Name: "none@d"}, Phase: phaseTaking}) // nowhere
	}); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(before, want) {
		t.Error("what was read before the change has changed")
	}
	c := openedStateFile(t, dir).now()
	if c.device("data") != nil || c.snapshot("vm@b") != nil || c.snapshot("vm@a").Phase != phaseRemoving ||
		c.snapshot("vm@d").Phase != phaseTaking || c.snapshot("none@d") != nil || c.snapshot("x") != nil {
		t.Errorf("got %+v", c)
	}
	names, err := os.ReadDir(dir)
	if err != nil || len(names) != 1 || names[0].Name() != stateName {
		t.Errorf("left behind: %v, %v", names, err)
	}
}

// TestStateFileTogether: changes from several goroutines are all there.
func TestStateFileTogether(t *testing.T) {
	dir := t.TempDir()
	f := openedStateFile(t, dir)
	var workers sync.WaitGroup
	for w := range 4 {
		workers.Go(func() {
			for i := range 5 {
				name := string(rune('a'+w)) + string(rune('0'+i))
				if err := f.change(func(c *content) { c.put(savedDevice{Request: api.AttachRequest{Name: name}}) }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	workers.Wait()
	if n := len(openedStateFile(t, dir).now().Devices); n != 20 {
		t.Errorf("%d devices, want 20", n)
	}
}

// TestStateFileDamaged: every byte that is not as it was written is noticed, and the file is left alone.
func TestStateFileDamaged(t *testing.T) {
	text, err := encodeState(someContent())
	if err != nil {
		t.Fatal(err)
	}
	for at := range text {
		for _, cut := range []bool{false, true} {
			damaged := append([]byte{}, text...)
			if damaged[at] ^= 1; cut {
				damaged = damaged[:at]
			}
			c, err := decodeState(damaged)
			if err == nil && !reflect.DeepEqual(c, someContent()) {
				t.Errorf("byte %d (cut: %v): it is read as %+v", at, cut, c)
			}
		}
	}
	for damaged, want := range map[string]string{
		"":               "damaged",
		"{}":             `format ""`,
		string(text[1:]): "damaged",
		strings.Replace(string(text), `"version": 1`, `"version": 2`, 1):      "version 2",
		strings.Replace(string(text), `"format"`, `"colour": 1, "format"`, 1): "colour",
		strings.Replace(string(text), `"crc32c": "`, `"crc32c": "0`, 1):       "checksum",
		strings.Replace(string(text), "/vm.img", "/vn.img", 1):                "checksum",
		string(text) + "{}": "damaged",
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, stateName)
		if err := os.WriteFile(path, []byte(damaged), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := openStateFile(dir)
		for _, text := range []string{path, want, "left as it is", "--reopen"} {
			wantErrno(t, err, syscall.EINVAL, text)
		}
		if held, err := os.ReadFile(path); err != nil || string(held) != damaged {
			t.Errorf("the damaged file has changed: %v", err)
		}
	}
}

// TestStateFileChecks: content that no daemon would have written is refused although its checksum is right.
func TestStateFileChecks(t *testing.T) {
	snapshot := func(name string, p phase) savedSnapshot {
		return savedSnapshot{Request: api.SnapshotRequest{Name: name}, Phase: p}
	}
	device := func(name string, snapshots ...savedSnapshot) savedDevice {
		return savedDevice{Request: api.AttachRequest{Name: name}, Snapshots: snapshots}
	}
	for want, devices := range map[string][]savedDevice{
		"needs a name":    {device("")},
		"character 1":     {device("/")},
		`"a" is there tw`: {device("a"), device("a")},
		"a@x":             {device("a", snapshot("a@x", phaseKept), snapshot("a@x", phaseKept))},
		"among":           {device("a", snapshot("b@x", phaseKept))},
		"not the name":    {device("a", snapshot("a", phaseKept))},
		"unknown phase":   {device("a", snapshot("a@x", "asleep"))},
	} {
		text, err := encodeState(&content{Devices: devices})
		if err != nil {
			t.Fatal(err)
		}
		if c, err := decodeState(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: read as %+v, %v", want, c, err)
		}
	}
}

// TestStateFileFails: a change that cannot be written is not there.
func TestStateFileFails(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	f := openedStateFile(t, dir)
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	err := f.change(func(c *content) { c.put(someContent().Devices[0]) })
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), stateNewName) || len(f.now().Devices) != 0 {
		t.Errorf("%v, %+v", err, f.now())
	}
}

// FuzzDecodeState: content of any kind, with the right checksum, is refused or written again as it was read.
func FuzzDecodeState(f *testing.F) {
	text, err := json.Marshal(someContent())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"devices": [{"request": {"name": "a"}, "snapshots": []}]}`))
	f.Fuzz(func(t *testing.T, inner []byte) {
		sum, err := checksum(inner)
		if err != nil {
			return
		}
		c, err := decodeState(fmt.Appendf(nil, `{"format": %q, "version": 1, "crc32c": %q, "content": %s}`, stateFormat, sum,
			inner))
		if err != nil {
			return
		}
		once, err := encodeState(c)
		if err != nil {
			t.Fatal(err)
		}
		back, err := decodeState(once)
		if err != nil {
			t.Fatal(err)
		}
		if twice, err := encodeState(back); err != nil || !bytes.Equal(once, twice) {
			t.Fatalf("%v: %s is written as %s", err, once, twice)
		}
	})
}
