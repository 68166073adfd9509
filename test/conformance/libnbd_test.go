package conformance

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// exportInfo is what nbdinfo tells of an export.
type exportInfo struct {
	Name        string   `json:"export-name"`
	Description string   `json:"description"`
	Contexts    []string `json:"contexts"`
	Size        int64    `json:"export-size"`
	ReadOnly    bool     `json:"is_read_only"`
	Cache       bool     `json:"can_cache"`
	DF          bool     `json:"can_df"`
	Flush       bool     `json:"can_flush"`
	FUA         bool     `json:"can_fua"`
	MultiConn   bool     `json:"can_multi_conn"`
	Trim        bool     `json:"can_trim"`
	Zero        bool     `json:"can_zero"`
	Minimum     int64    `json:"block_size_minimum"`
	Preferred   int64    `json:"block_size_preferred"`
	Maximum     int64    `json:"block_size_maximum"`
}

// listExports is what nbdinfo tells of all exports, by name.
func listExports(t testing.TB, uri string) map[string]exportInfo {
	t.Helper()
	var info struct {
		Protocol   string
		TLS        bool
		Structured bool
		Exports    []exportInfo
	}
	if err := json.Unmarshal([]byte(tool(t, "nbdinfo", "--json", "--list", uri)), &info); err != nil {
		t.Fatal(err)
	}
	if info.Protocol != "newstyle-fixed" || !info.Structured || info.TLS {
		t.Errorf("%+v", info)
	}
	exports := map[string]exportInfo{}
	for _, x := range info.Exports {
		exports[x.Name] = x
	}
	return exports
}

// TestNbdinfo checks what exports tell of themselves: what a client may do with them depends on it.
func TestNbdinfo(t *testing.T) {
	t.Parallel()
	need(t, "nbdinfo")
	const size = 4 * mib
	d := startDaemon(t)
	d.do("attach", "vm", emptyImage(t, size))
	d.do("attach", "rom", emptyImage(t, size+100), "--read-only")
	d.do("attach", "ram", "mem:64M")
	d.do("snapshot", "vm@plain")
	d.do("snapshot", "vm@trim", "--discard-zeroes-cow", "--chunk", "64k")
	d.do("snapshot", "vm@fixed", "--read-only")
	exports := listExports(t, d.uri(""))
	for _, want := range []exportInfo{
		{Name: "vm", Description: "live device", Size: size, Trim: true, Zero: true, Minimum: 1},
		{Name: "rom", Description: "live device", Size: size + 100, ReadOnly: true, Minimum: 1},
		{Name: "ram", Description: "live device", Size: 64 * mib, Trim: true, Zero: true, Minimum: 512},
		{Name: "vm@plain", Size: size, Zero: true, Minimum: 1},
		{Name: "vm@trim", Size: size, Trim: true, Zero: true, Minimum: 1},
		{Name: "vm@fixed", Size: size, ReadOnly: true, Minimum: 1},
	} {
		want.Cache, want.DF, want.Flush, want.FUA, want.MultiConn = true, true, true, true, true
		want.Contexts = []string{"base:allocation"}
		got := exports[want.Name]
		if strings.Contains(want.Name, "@") {
			want.Contexts = append(want.Contexts, "cowherd:copied")
			want.Description = got.Description
			if !strings.HasPrefix(got.Description, "snapshot of vm taken ") {
				t.Errorf("description %q", got.Description)
			}
		}
		if got.Preferred < 4096 || got.Maximum < mib {
			t.Errorf("%s: preferred block %d, largest %d", want.Name, got.Preferred, got.Maximum)
		}
		want.Preferred, want.Maximum = got.Preferred, got.Maximum
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("nbdinfo tells\n%+v, want\n%+v", got, want)
		}
	}
	if len(exports) != 6 {
		t.Errorf("%d exports", len(exports))
	}
	if got := strings.TrimSpace(tool(t, "nbdinfo", "--size", d.uri("vm@fixed"))); got != strconv.Itoa(size) {
		t.Errorf("size %q", got)
	}
	for _, can := range []string{"multi-conn", "flush", "fua", "df", "cache", "zero", "structured-reply", "write"} {
		tool(t, "nbdinfo", "--can", can, d.uri("vm@plain"))
	}
	tool(t, "nbdinfo", "--is", "read-only", d.uri("vm@fixed"))
	toolFails(t, "nbdinfo", "--can", "write", d.uri("vm@fixed"))
	toolFails(t, "nbdinfo", "--can", "trim", d.uri("vm@plain"))
	if out := toolFails(t, "nbdinfo", d.uri("nothing")); !strings.Contains(out, "No such file or directory") {
		t.Errorf("an export that is not there: %s", out)
	}
	// Three devices are attached: there is no export without a name.
	toolFails(t, "nbdinfo", d.uri(""))
}

// mapEntry is a line of nbdinfo's map.
type mapEntry struct {
	Offset, Length int64
	Type           int
}

// nbdMap is a map of an export, neighbours of one type joined.
func nbdMap(t testing.TB, uri, context string) []mapEntry {
	t.Helper()
	var all, joined []mapEntry
	if err := json.Unmarshal([]byte(tool(t, "nbdinfo", "--json", "--map="+context, uri)), &all); err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		if n := len(joined); n > 0 && joined[n-1].Type == e.Type && joined[n-1].Offset+joined[n-1].Length == e.Offset {
			joined[n-1].Length += e.Length
		} else {
			joined = append(joined, e)
		}
	}
	return joined
}

func wantMap(t testing.TB, uri, context string, want ...mapEntry) {
	t.Helper()
	if got := nbdMap(t, uri, context); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s of %s\n%+v, want\n%+v", context, uri, got, want)
	}
}

// TestMaps checks where data, holes and copied chunks are said to be.
func TestMaps(t *testing.T) {
	t.Parallel()
	need(t, "nbdinfo", "qemu-io")
	const (
		size       = 4 * mib
		data, hole = 0, 3 // of base:allocation
		allocation = "base:allocation"
		copied     = "cowherd:copied"
	)
	d := startDaemon(t)
	d.do("attach", "vm", emptyImage(t, size))
	wantMap(t, d.uri("vm"), allocation, mapEntry{0, size, hole})
	qemuIO(t, d.uri("vm"), "write -P 1 1M 64k")
	wantMap(t, d.uri("vm"), allocation,
		mapEntry{0, mib, hole}, mapEntry{mib, 64 * kib, data}, mapEntry{mib + 64*kib, size - mib - 64*kib, hole})
	d.do("snapshot", "vm@a", "--chunk", "64k")
	wantMap(t, d.uri("vm@a"), copied, mapEntry{0, size, 0})
	wantMap(t, d.uri("vm@a"), allocation,
		mapEntry{0, mib, hole}, mapEntry{mib, 64 * kib, data}, mapEntry{mib + 64*kib, size - mib - 64*kib, hole})

	qemuIO(t, d.uri("vm"), "write 200k 10k", "write 2M 128k") // one chunk, two chunks
	qemuIO(t, d.uri("vm@a"), "write 3M 1k")                   // one more
	wantMap(t, d.uri("vm@a"), copied,
		mapEntry{0, 192 * kib, 0}, mapEntry{192 * kib, 64 * kib, 1}, mapEntry{256 * kib, 2*mib - 256*kib, 0},
		mapEntry{2 * mib, 128 * kib, 1}, mapEntry{2*mib + 128*kib, mib - 128*kib, 0},
		mapEntry{3 * mib, 64 * kib, 1}, mapEntry{3*mib + 64*kib, mib - 64*kib, 0})
	// What is a hole in the map reads as zeroes, though the origin has data there by now.
	for _, e := range nbdMap(t, d.uri("vm@a"), allocation) {
		if e.Type == hole {
			qemuIO(t, d.uri("vm@a"), fmt.Sprintf("read -P 0 %d %d", e.Offset, e.Length))
		}
	}
	if x := d.status("vm@a").Snapshot; x.AllocatedBytes != 4*64*kib {
		t.Errorf("%d bytes of COW space are said to be taken", x.AllocatedBytes)
	}
	qemuIO(t, d.uri("vm"), "write 0 4M")
	wantMap(t, d.uri("vm@a"), copied, mapEntry{0, size, 1})
	var totals []struct {
		Size int64
		Type int
	}
	text := tool(t, "nbdinfo", "--json", "--totals", "--map="+copied, d.uri("vm@a"))
	if err := json.Unmarshal([]byte(text), &totals); err != nil || len(totals) != 1 || totals[0].Size != size {
		t.Errorf("totals: %s", text)
	}
	toolFails(t, "nbdinfo", "--map="+copied, d.uri("vm")) // an origin has no such context
}

// TestNbdcopy copies in both directions, from export to export, and with different numbers of connections and requests.
func TestNbdcopy(t *testing.T) {
	t.Parallel()
	need(t, "nbdcopy")
	const size = 12*mib + 512
	image, other := randomImage(t, size, 8), randomImage(t, size, 9)
	for _, flags := range [][]string{
		{"--connections=1", "--requests=1", "--synchronous"},
		{"--connections=4", "--requests=64", "--request-size=4096"},
		{"--connections=8", "--threads=2", "--request-size=1048576", "--flush"},
		{"--connections=2", "--allocated", "--sparse=0"},
		{"--connections=2", "--no-extents", "--sparse=65536"},
	} {
		t.Run(strings.Join(flags, ","), func(t *testing.T) {
			d := startDaemon(t)
			disk := emptyImage(t, size)
			d.do("attach", "vm", disk)
			d.do("attach", "spare", "mem:"+strconv.Itoa(size))
			tool(t, "nbdcopy", append(flags, image, d.uri("vm"))...)
			tool(t, "cmp", image, disk)
			d.do("snapshot", "vm@a", "--chunk", "32k")
			d.do("snapshot", "spare@a", "--store", "mem")
			tool(t, "nbdcopy", append(flags, d.uri("vm"), d.uri("spare"))...)
			tool(t, "nbdcopy", append(flags, other, d.uri("vm"))...)
			tool(t, "cmp", image, fetch(t, d.uri("spare"), flags...))
			tool(t, "cmp", image, fetch(t, d.uri("vm@a"), flags...))
			tool(t, "cmp", other, fetch(t, d.uri("vm"), flags...))
			tool(t, "nbdcopy", append(flags, d.uri("vm@a"), d.uri("spare@a"))...) // into a snapshot
			tool(t, "cmp", image, fetch(t, d.uri("spare@a"), flags...))
			tool(t, "cmp", image, fetch(t, d.uri("spare"), flags...))
		})
	}
}

// TestNbdkitProxy has nbdkit's nbd plugin and a filter between the clients and cowherd.
func TestNbdkitProxy(t *testing.T) {
	t.Parallel()
	need(t, "nbdkit", "nbdcopy", "qemu-img", "nbdinfo")
	const size = 8 * mib
	d := startDaemon(t)
	image, other := randomImage(t, size, 10), randomImage(t, size, 11)
	d.do("attach", "vm", emptyImage(t, size))
	proxy := func(export, script string, flags ...string) string {
		t.Helper()
		args := append([]string{"--unix", "-", "--exit-with-parent", "nbd", "uri=" + d.uri(export)}, flags...)
		return tool(t, "nbdkit", append(args, "--run", script)...)
	}
	proxy("vm", "nbdcopy "+image+` "$uri"`)
	d.do("snapshot", "vm@a", "--chunk", "16k")
	proxy("vm", "nbdcopy --connections=4 "+other+` "$uri"`, "shared=true")
	out := filepath.Join(t.TempDir(), "out")
	proxy("vm@a", `nbdcopy --connections=4 "$uri" `+out)
	tool(t, "cmp", image, out)
	proxy("vm", "qemu-img compare -f raw -F raw "+other+` "$uri"`)
	proxy("vm@a", "qemu-img compare -f raw -F raw "+image+` "$uri"`, "--filter=blocksize", "minblock=4096")
	if got := strings.TrimSpace(proxy("vm@a", `nbdinfo --size "$uri"`)); got != strconv.Itoa(size) {
		t.Errorf("size %q", got)
	}
}

// nbdshScript writes an origin and reads its snapshot at the same time, over several connections, hundreds of requests
// in flight. ORIGIN and SNAPSHOT are their URIs.
const nbdshScript = `
import os
def connect(uri):
    c = nbd.NBD()
    c.add_meta_context("base:allocation")
    c.add_meta_context("cowherd:copied")
    c.connect_uri(uri)
    return c
origins = [connect(os.environ["ORIGIN"]) for _ in range(2)]
snaps = [connect(os.environ["SNAPSHOT"]) for _ in range(2)]
size = snaps[0].get_size()
block, count = 4096, snaps[0].get_size() // 4096
assert not origins[0].can_meta_context("cowherd:copied")
assert snaps[0].can_meta_context("cowherd:copied")

pending, reads = [], []
for i in range(count):
    o, s, at = origins[i % 2], snaps[i // 3 % 2], i * 7919 % count * block
    pending.append((o, o.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([0xee]) * block), at)))
    b = nbd.Buffer(block)
    pending.append((s, s.aio_pread(b, at)))
    reads.append((at, b))
    if len(pending) > 400:
        for c, cookie in pending:
            while not c.aio_command_completed(cookie):
                c.poll(-1)
        pending = []
for c, cookie in pending:
    while not c.aio_command_completed(cookie):
        c.poll(-1)
for at, b in reads:
    assert bytes(b.to_bytearray()) == bytes([at // block % 251 + 1]) * block, at
for i in range(count):
    assert snaps[0].pread(block, i * block) == bytes([i % 251 + 1]) * block, i
    assert origins[0].pread(block, i * block) == b"\xee" * block, i
found = []
snaps[1].block_status(size, 0, lambda context, offset, entries, error: found.append((context, entries)))
copied = [e for context, e in found if context == "cowherd:copied"]
assert copied == [[size, 1]], copied

origins[0].trim(block, 0)
origins[0].zero(block, block, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
origins[0].cache(size, 0)
origins[0].flush()
assert origins[1].pread(block, 0) == b"\xee" * block
assert origins[1].pread(block, block) == bytes(block)
snaps[0].pwrite(b"own", 10, nbd.CMD_FLAG_FUA)
assert snaps[1].pread(5, 9) == b"\x01own\x01"
try:
    snaps[0].trim(block, 0)
    raise AssertionError("a snapshot was trimmed")
except nbd.Error as e:
    pass
for c in origins + snaps:
    c.shutdown()
print("fine")
`

// TestNbdsh does by libnbd what the other clients do not.
func TestNbdsh(t *testing.T) {
	t.Parallel()
	need(t, "nbdsh")
	// The shell's module belongs to the distribution's interpreter, whatever others come first.
	env := []string{"PATH=/usr/bin:" + os.Getenv("PATH")}
	path, err := exec.LookPath("nbdsh")
	if err != nil {
		t.Fatal(err)
	}
	if r := runProgram(t, env, path, "-c", "pass"); r.status != 0 {
		t.Skipf("nbdsh does not run: %s", r.stderr)
	}
	image := filepath.Join(t.TempDir(), "blocks.img")
	blocks := make([]byte, 2*mib)
	for i := range blocks {
		blocks[i] = byte(i/4096%251 + 1)
	}
	for _, engine := range engines {
		if err := os.WriteFile(image, blocks, 0o600); err != nil {
			t.Fatal(err)
		}
		d := startDaemon(t, "--engine", engine)
		d.do("attach", "vm", image)
		d.do("snapshot", "vm@a", "--chunk", "16k")
		uris := []string{"ORIGIN=" + d.uri("vm"), "SNAPSHOT=" + d.uri("vm@a")}
		r := runProgram(t, append(uris, env...), path, "-c", nbdshScript)
		if r.status != 0 || !strings.Contains(r.stdout, "fine") {
			t.Errorf("%s: status %d, %s%s", engine, r.status, r.stdout, r.stderr)
		}
		d.stop()
	}
}
