package service

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"cowherd/api"
	"cowherd/backend/null"
	"cowherd/cowstore"
)

func TestParseNull(t *testing.T) {
	for argument, want := range map[string]null.Config{
		"0":                      {},
		"1T":                     {Size: 1 << 40},
		"4k,latency=50us":        {Size: 4096, Latency: 50 * time.Microsecond},
		"4k,memory,block=4k":     {Size: 4096, MemoryBacked: true, LogicalBlock: 4096},
		"8s,block=1s,latency=0s": {Size: 4096, LogicalBlock: 512},
	} {
		if got, err := parseNull(argument); err != nil || got != want {
			t.Errorf("%q: %+v, %v; want %+v", argument, got, err, want)
		}
	}
	for _, argument := range []string{
		"", "x", "-1", "4k,", "4k,,", "4k,latency", "4k,latency=5", "4k,block=", "4k,block=2G", "4k,memory=1", "4k,x=1",
	} {
		if got, err := parseNull(argument); err == nil {
			t.Errorf("%q is taken as %+v", argument, got)
		}
	}
}

func FuzzParseNull(f *testing.F) {
	for _, s := range []string{"1T", "4k,latency=50us", "4k,memory,block=4k", "4k,,", "x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if c, err := parseNull(s); err == nil && (c.Size < 0 || c.LogicalBlock < 0) {
			t.Fatalf("%q is taken as %+v", s, c)
		}
	})
}

func TestAttachRefuses(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	dir := t.TempDir()
	for _, test := range []struct {
		request api.AttachRequest
		errno   syscall.Errno
		text    string
	}{
		{api.AttachRequest{Name: "", Device: "mem:1M"}, syscall.EINVAL, "needs a name"},
		{api.AttachRequest{Name: "a@b", Device: "mem:1M"}, syscall.EINVAL, "character 2"},
		{api.AttachRequest{Name: "a", Device: ""}, syscall.EINVAL, "absolute path"},
		{api.AttachRequest{Name: "a", Device: "disk.img"}, syscall.EINVAL, "absolute path"},
		{api.AttachRequest{Name: "a", Device: "mem:"}, syscall.EINVAL, "size"},
		{api.AttachRequest{Name: "a", Device: "mem:1000"}, syscall.EINVAL, "multiple"},
		{api.AttachRequest{Name: "a", Device: "mem:1M", Direct: true}, syscall.EINVAL, "direct"},
		{api.AttachRequest{Name: "a", Device: "null:1M,x"}, syscall.EINVAL, "unknown option"},
		{api.AttachRequest{Name: "a", Device: "null:1000"}, syscall.EINVAL, "multiple"},
		{api.AttachRequest{Name: "a", Device: dir}, syscall.EINVAL, "neither"},
		{api.AttachRequest{Name: "a", Device: "/dev/null"}, syscall.EINVAL, "neither"},
		{api.AttachRequest{Name: "a", Device: filepath.Join(dir, "no")}, syscall.ENOENT, "no such file"},
	} {
		_, err := d.Attach(test.request)
		wantErrno(t, err, test.errno, test.text)
	}
	if len(d.Devices()) != 0 || d.names.taken() != 0 {
		t.Errorf("what was refused is there: %v, count %d", d.Devices(), d.names.taken())
	}
	attach(t, d, "a", "mem:1M") // the name is free again
}

// TestFileTwice: a file is used once, whatever it is called, and is free again when its device has gone.
func TestFileTwice(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	path := image(t, 64<<10)
	link := filepath.Join(t.TempDir(), "link")
	if err := errors.Join(os.Link(path, link), os.Symlink(path, link+"2")); err != nil {
		t.Fatal(err)
	}
	attach(t, d, "vm", path)
	for _, again := range []string{path, link, link + "2"} {
		_, err := d.Attach(api.AttachRequest{Name: "b", Device: again})
		wantErrno(t, err, syscall.EBUSY, `in use by device "vm"`)
		_, err = d.TakeSnapshot(t.Context(), api.SnapshotRequest{Name: "vm@a", Store: again})
		wantErrno(t, err, syscall.EBUSY, `in use by device "vm"`)
	}
	_, err := d.Attach(api.AttachRequest{Name: "vm", Device: "mem:1M"})
	wantErrno(t, err, syscall.EEXIST, "already")

	cow := image(t, 64<<10)
	take(t, d, api.SnapshotRequest{Name: "vm@a", Store: cow})
	_, err = d.Attach(api.AttachRequest{Name: "b", Device: cow})
	wantErrno(t, err, syscall.EBUSY, `in use by device "vm@a"`)
	if err := d.RemoveSnapshot(t.Context(), "vm@a", false); err != nil {
		t.Fatal(err)
	}
	attach(t, d, "b", cow)
	if err := d.Detach(t.Context(), "vm"); err != nil {
		t.Fatal(err)
	}
	attach(t, d, "vm", link)
}

// TestStores takes a snapshot with each kind of COW space.
func TestStores(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	attach(t, d, "vm", "mem:64k")
	for name, store := range map[string]string{
		"a": "", "b": "temp", "c": "mem", "d": t.TempDir(), "e": image(t, 64<<10),
	} {
		x := take(t, d, api.SnapshotRequest{Name: "vm@" + name, Store: store})
		if x.Snapshot.TotalBytes != 64<<10 {
			t.Errorf("store %q: total %d bytes", store, x.Snapshot.TotalBytes)
		}
		c := mustDialNBD(t, d, "vm")
		c.write(t, 0, make([]byte, 4096))
		c.bye(t)
		got, err := d.Device("vm@" + name)
		if err != nil || got.Snapshot.AllocatedBytes != 4096 || got.State != api.StateValid {
			t.Errorf("store %q: %+v, %v", store, got.Snapshot, err)
		}
	}
	for _, test := range []struct {
		request api.SnapshotRequest
		errno   syscall.Errno
		text    string
	}{
		{api.SnapshotRequest{Store: "relative"}, syscall.EINVAL, "absolute path"},
		{api.SnapshotRequest{Store: "/no/such"}, syscall.ENOENT, "/no/such"},
		{api.SnapshotRequest{Store: image(t, 4095)}, syscall.EINVAL, "not even one chunk"},
		{api.SnapshotRequest{ChunkBytes: 5000}, syscall.EINVAL, "power of 2"},
		{api.SnapshotRequest{ChunkBytes: 2048}, syscall.EINVAL, "too low"},
		{api.SnapshotRequest{ChunkBytes: 2 << 30}, syscall.EINVAL, "too high"},
		{api.SnapshotRequest{ChunkBytes: -1}, syscall.EINVAL, "chunk size"},
		{api.SnapshotRequest{MaxCOWBytes: 4095}, syscall.EINVAL, "does not hold a chunk"},
		{api.SnapshotRequest{MaxCOWBytes: -1}, syscall.EINVAL, "does not hold a chunk"},
		{api.SnapshotRequest{DiscardPassdownOrigin: true}, syscall.EINVAL, "discard_zeroes_cow"},
	} {
		test.request.Name = "vm@x"
		_, err := d.TakeSnapshot(t.Context(), test.request)
		wantErrno(t, err, test.errno, test.text)
	}
	if d.names.taken() != 6 {
		t.Errorf("count %d, want 6", d.names.taken())
	}
}

func TestCOWLength(t *testing.T) {
	for _, test := range []struct {
		origin, limit int64
		chunk         cowstore.ChunkSize
		want          int64
	}{
		{0, 0, 4096, 4096}, {1, 0, 4096, 4096}, {4096, 0, 4096, 4096}, {4097, 0, 4096, 8192},
		{1 << 20, 4096, 4096, 4096}, {1 << 20, 10000, 4096, 8192}, {1 << 20, 1 << 40, 65536, 1 << 20},
		{100, 0, 1 << 30, 1 << 30}, {math.MaxInt64, 0, 4096, math.MaxInt64 &^ 4095},
		{math.MaxInt64, 0, 1 << 30, math.MaxInt64 &^ (1<<30 - 1)}, {math.MaxInt64, 5000, 4096, 4096},
	} {
		got, err := cowLength(test.origin, test.limit, test.chunk)
		if err != nil || got != test.want {
			t.Errorf("%+v: %d, %v", test, got, err)
		}
	}
}
