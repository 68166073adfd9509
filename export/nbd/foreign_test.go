package nbd

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"cowherd/block"
)

// tool runs another's client and returns what it prints. The test is skipped when there is no such client.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("needs %s: %v", name, err)
	}
	out, err := exec.CommandContext(testContext(t), path, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (s *testServer) uri(export string) string {
	return "nbd+unix:///" + export + "?socket=" + s.socket
}

func TestNbdinfo(t *testing.T) {
	e := testExport(t)
	e.MultiConn = true
	e.Contexts = []Context{{Name: "cowherd:copied", Extents: allData}}
	ro := testExport(t)
	ro.Name, ro.Description, ro.ReadOnly = "frozen", "", true
	if err := block.Write(e.Device, bytes.Repeat([]byte{1}, 64<<10), 128<<10); err != nil {
		t.Fatal(err)
	}
	s := startServer(t, Config{}, e, ro)

	var info struct {
		Protocol   string
		Structured bool
		Exports    []struct {
			Name        string   `json:"export-name"`
			Description string   `json:"description"`
			Contexts    []string `json:"contexts"`
			Size        int64    `json:"export-size"`
			ReadOnly    bool     `json:"is_read_only"`
			Cache       bool     `json:"can_cache"`
			DF          bool     `json:"can_df"`
			FastZero    bool     `json:"can_fast_zero"`
			Flush       bool     `json:"can_flush"`
			FUA         bool     `json:"can_fua"`
			MultiConn   bool     `json:"can_multi_conn"`
			Trim        bool     `json:"can_trim"`
			Zero        bool     `json:"can_zero"`
			Minimum     int64    `json:"block_size_minimum"`
			Preferred   int64    `json:"block_size_preferred"`
			Maximum     int64    `json:"block_size_maximum"`
		}
	}
	if err := json.Unmarshal([]byte(tool(t, "nbdinfo", "--json", "--list", s.uri(""))), &info); err != nil {
		t.Fatal(err)
	}
	if info.Protocol != "newstyle-fixed" || len(info.Exports) != 2 {
		t.Errorf("%+v", info)
	}
	for _, x := range info.Exports {
		frozen := x.Name == "frozen"
		if x.Size != testSize || x.ReadOnly != frozen || !x.Cache || !x.DF || x.FastZero == frozen || !x.Flush || !x.FUA ||
			x.MultiConn == frozen || x.Trim == frozen || x.Zero == frozen || x.Minimum != 1 || x.Preferred != 4096 ||
			x.Maximum != LengthMax || len(x.Contexts) == 0 || x.Contexts[0] != "base:allocation" {
			t.Errorf("%+v", x)
		}
		if !frozen && (x.Description != "a test's" || len(x.Contexts) != 2) {
			t.Errorf("%+v", x)
		}
	}
	if got := strings.TrimSpace(tool(t, "nbdinfo", "--size", s.uri("frozen"))); got != "1048576" {
		t.Errorf("size %q", got)
	}

	var ranges []struct {
		Offset, Length int64
		Type           int
	}
	if err := json.Unmarshal([]byte(tool(t, "nbdinfo", "--json", "--map", s.uri("disk"))), &ranges); err != nil {
		t.Fatal(err)
	}
	if len(ranges) != 3 || ranges[1].Offset != 128<<10 || ranges[1].Length != 64<<10 || ranges[1].Type != 0 || ranges[0].Type != 3 {
		t.Errorf("%+v", ranges)
	}
	if got := tool(t, "nbdinfo", "--map=cowherd:copied", s.uri("disk")); !strings.Contains(got, "1048576") {
		t.Errorf("%q", got)
	}
}

// randomImage is a file with data and holes in turn.
func randomImage(t *testing.T, size int) (path string, contents []byte) {
	contents = make([]byte, size)
	random := rand.NewChaCha8([32]byte{1})
	for at := 0; at < size; at += 1 << 20 {
		random.Read(contents[at : at+300<<10])
	}
	path = filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, contents, 0o600); err != nil {
		t.Fatal(err)
	}
	return path, contents
}

func TestNbdcopy(t *testing.T) {
	const size = 16 << 20
	image, contents := randomImage(t, size)
	for _, kind := range []string{"now", "mixed"} {
		d := newLaterDevice(t, size, kind)
		s := startServer(t, Config{}, &Export{Name: "disk", Device: d, MultiConn: true})
		tool(t, "nbdcopy", image, s.uri("disk"))
		got := make([]byte, size)
		if err := block.Read(d.fileDevice, got, 0); err != nil || !bytes.Equal(got, contents) {
			t.Errorf("%s: copied to the export: %v, equal %v", kind, err, bytes.Equal(got, contents))
		}
		out := filepath.Join(t.TempDir(), "out")
		for _, extents := range []string{"--no-extents", "--flush"} {
			tool(t, "nbdcopy", extents, s.uri("disk"), out)
			if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, contents) {
				t.Errorf("%s, %s: copied from the export: %v, equal %v", kind, extents, err, bytes.Equal(got, contents))
			}
		}
	}
}

func TestQemuImg(t *testing.T) {
	const size = 16 << 20
	image, _ := randomImage(t, size)
	d := newFileDevice(t, size)
	s := startServer(t, Config{}, &Export{Name: "disk", Device: d})
	tool(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, s.uri("disk"))
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", image, s.uri("disk"))
	if got := tool(t, "qemu-img", "map", "-f", "raw", "--output=json", s.uri("disk")); !strings.Contains(got, `"zero": true`) {
		t.Errorf("no zeroes in the map: %s", got)
	}
}

func TestQemuIO(t *testing.T) {
	d := newFileDevice(t, 8<<20)
	emulated := *d
	emulated.limits.WriteZeroesMax, emulated.limits.DiscardMax = 0, 0
	s := startServer(t, Config{}, &Export{Name: "disk", Device: d}, &Export{Name: "emulated", Device: &emulated})
	for _, name := range []string{"disk", "emulated"} {
		out := tool(t, "qemu-io", "-f", "raw",
			"-c", "write -P 0x11 0 4M",
			"-c", "write -f -P 0x22 4096 4096",
			"-c", "write -z 8192 64k",
			"-c", "write -z -u 128k 64k",
			"-c", "discard 1M 1M",
			"-c", "flush",
			"-c", "aio_write -P 0x33 2M 1M",
			"-c", "aio_write -P 0x44 3M 64k",
			"-c", "aio_flush",
			"-c", "read -P 0x11 0 4096",
			"-c", "read -P 0x22 4096 4096",
			"-c", "read -P 0 8192 64k",
			"-c", "read -P 0 128k 64k",
			"-c", "read -P 0x33 2M 1M",
			"-c", "read -P 0x44 3M 64k",
			"-c", "read 0 8M",
			s.uri(name))
		if strings.Contains(out, "failed") || strings.Contains(out, "rror") {
			t.Errorf("%s: %s", name, out)
		}
	}
	ro := startServer(t, Config{}, &Export{Name: "ro", Device: d, ReadOnly: true})
	tool(t, "qemu-io", "-r", "-f", "raw", "-c", "read -P 0x22 4096 4096", ro.uri("ro"))
}

// nbdshScript does by libnbd what other tools do not: flags in odd places, bounds, many commands in flight.
const nbdshScript = `
import errno
def refused(number, f, *args, **kw):
    try:
        f(*args, **kw)
    except nbd.Error as e:
        assert e.errnum == number, e
        return
    raise AssertionError("not refused")
assert h.get_size() == 8 << 20
assert h.get_protocol() == "newstyle-fixed"
assert h.get_structured_replies_negotiated()
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
h.set_strict_mode(0)
h.pwrite(b"x" * 70000, 100, nbd.CMD_FLAG_FUA)
assert h.pread(70000, 100, nbd.CMD_FLAG_DF) == b"x" * 70000
seen = []
h.pread_structured(1 << 20, 0, lambda buf, offset, status, error: seen.append((offset, len(buf), status)))
assert sum(n for _, n, _ in seen) == 1 << 20, seen
assert any(status == nbd.READ_HOLE for _, _, status in seen), seen
h.zero(4096, 0, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.zero(4096, 8192, nbd.CMD_FLAG_FAST_ZERO)
assert h.pread(4096, 8192) == bytes(4096)
h.trim(4096, 16384, nbd.CMD_FLAG_FUA)
h.cache(1 << 20, 0)
h.flush()
refused(errno.EINVAL, h.pread, 512, 8 << 20)
refused(errno.ENOSPC, h.pwrite, b"y" * 512, (8 << 20) - 511)
refused(errno.ENOSPC, h.zero, 512, 8 << 20)
refused(errno.EINVAL, h.trim, 512, 8 << 20)
refused(errno.EINVAL, h.pread, 512, 0, nbd.CMD_FLAG_REQ_ONE)
extents = []
h.block_status(8 << 20, 0, lambda context, offset, entries, error: extents.append((context, entries)))
assert extents[0][0] == "base:allocation" and sum(extents[0][1][::2]) == 8 << 20, extents
one = []
h.block_status(8 << 20, 0, lambda context, offset, entries, error: one.append(entries), nbd.CMD_FLAG_REQ_ONE)
assert len(one[0]) == 2, one
cookies = []
for i in range(200):
    cookies.append(h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([i]) * 4096), i * 4096))
    cookies.append(h.aio_pread(nbd.Buffer(1 << 18), 4 << 20))
while h.aio_in_flight() > 0:
    h.poll(-1)
for c in cookies:
    assert h.aio_command_completed(c)
for i in range(200):
    assert h.pread(4096, i * 4096) == bytes([i]) * 4096
h.shutdown()
print("fine")
`

func TestNbdsh(t *testing.T) {
	// The shell's module belongs to the distribution's interpreter, whatever others come first.
	t.Setenv("PATH", "/usr/bin:"+os.Getenv("PATH"))
	if path, err := exec.LookPath("nbdsh"); err == nil {
		if out, err := exec.Command(path, "-c", "pass").CombinedOutput(); err != nil {
			t.Skipf("nbdsh does not run: %v\n%s", err, out)
		}
	}
	for _, kind := range []string{"now", "later", "mixed"} {
		s := startServer(t, Config{}, &Export{Name: "disk", Device: newLaterDevice(t, 8<<20, kind)})
		out := tool(t, "nbdsh", "--base-allocation", "-u", s.uri("disk"), "-c", nbdshScript)
		if !strings.Contains(out, "fine") {
			t.Errorf("%s: %s", kind, out)
		}
	}
}

func TestForeignTLS(t *testing.T) {
	a := newAuthority(t)
	dir := a.newDirectory()
	s := startServer(t, Config{TLS: mustLoadTLS(t, dir, true), TLSMode: TLSRequire},
		&Export{Name: "disk", Device: newFileDevice(t, testSize)})
	uri := "nbds+unix:///disk?socket=" + s.socket + "&tls-certificates=" + dir + "&tls-verify-peer=false"
	if got := strings.TrimSpace(tool(t, "nbdinfo", "--size", uri)); got != "1048576" {
		t.Errorf("size %q", got)
	}
	image, contents := randomImage(t, testSize)
	tool(t, "nbdcopy", image, uri)
	out := filepath.Join(t.TempDir(), "out")
	tool(t, "nbdcopy", uri, out)
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, contents) {
		t.Errorf("copied back: %v, equal %v", err, bytes.Equal(got, contents))
	}
	if path, err := exec.LookPath("nbdinfo"); err == nil {
		if out, err := exec.CommandContext(testContext(t), path, "--size", s.uri("disk")).CombinedOutput(); err == nil {
			t.Errorf("a client without TLS was served: %s", out)
		}
	}
}

func TestFioVerify(t *testing.T) {
	d := newLaterDevice(t, 16<<20, "mixed")
	s := startServer(t, Config{}, &Export{Name: "disk", Device: d, MultiConn: true})
	// fio leaves its connection without a disconnect, which the client library answers with a signal on the way out.
	out := tool(t, "fio", "--name=v", "--ioengine=nbd", "--uri="+s.uri("disk"), "--rw=randwrite", "--bsrange=512-128k",
		"--bs_unaligned=0", "--blockalign=512", "--iodepth=16", "--size=16m", "--verify=crc32c", "--do_verify=1",
		"--verify_fatal=1", "--fsync=50", "--randrepeat=0")
	if !strings.Contains(out, "err= 0") {
		t.Error(out)
	}
}
