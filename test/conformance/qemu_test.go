package conformance

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// qemuIO runs commands of qemu-io on an export. A read with a pattern that is not found fails.
func qemuIO(t testing.TB, uri string, commands ...string) {
	t.Helper()
	if out, failed := tryQemuIO(t, uri, commands...); failed {
		t.Errorf("qemu-io on %s:\n%s", uri, out)
	}
}

// tryQemuIO runs them and tells whether any of them failed.
func tryQemuIO(t testing.TB, uri string, commands ...string) (out string, failed bool) {
	t.Helper()
	need(t, "qemu-io")
	args := []string{"-f", "raw"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	r := runProgram(t, nil, "qemu-io", append(args, uri)...)
	out = r.stdout + r.stderr
	failed = r.status != 0
	for _, bad := range []string{"failed", "rror", "Input/output", "non-matching", "Permission", "can't open"} {
		failed = failed || strings.Contains(out, bad)
	}
	return out, failed
}

// TestQemuIO writes patterns in every way that qemu-io knows, before and after snapshots are taken, and reads each from
// where it must be.
func TestQemuIO(t *testing.T) {
	need(t, "qemu-io")
	for _, engine := range engines {
		for _, chunk := range []string{"4k", "64k", "2M"} {
			t.Run(engine+"-"+chunk, func(t *testing.T) {
				t.Parallel()
				patterns(t, startDaemon(t, "--engine", engine), chunk)
			})
		}
	}
}

func patterns(t *testing.T, d *daemon, chunk string) {
	d.do("attach", "vm", emptyImage(t, 9*mib+3*kib)) // the last chunk is not whole
	origin := d.uri("vm")
	qemuIO(t, origin,
		"write -P 0x11 0 8M", "write -f -P 0x12 1M 64k", "write -z 2M 64k", "write -z -u 3M 64k", "discard 4M 1M",
		"write -P 0x13 8M 1027k", "flush",
		"aio_write -P 0x14 5M 256k", "aio_write -P 0x15 5376k 256k", "aio_write -z 6M 128k", "aio_flush",
		"write -P 0x16 777 333",
		"read -P 0x11 0 777", "read -P 0x16 777 333", "read -P 0x11 1110 2k", "read -P 0x12 1M 64k", "read -P 0 2M 64k",
		"read -P 0 3M 64k", "read -P 0 4M 1M", "read -P 0x14 5M 256k", "read -P 0x15 5376k 256k", "read -P 0 6M 128k",
		"read -P 0x13 8M 1027k")
	d.do("snapshot", "vm@old", "--chunk", chunk)
	old := []string{
		"read -P 0x11 0 777", "read -P 0x16 777 333", "read -P 0x11 1110 100k", "read -P 0x12 1M 64k", "read -P 0 2M 64k",
		"read -P 0 4M 1M", "read -P 0x14 5M 256k", "read -P 0x15 5376k 256k", "read -P 0 6M 128k", "read -P 0x13 8M 1027k",
	}
	qemuIO(t, d.uri("vm@old"), old...)
	qemuIO(t, origin,
		"write -P 0x21 511 5000", "write -z 1M 32k", "write -z -u 1056k 32k", "write -f -P 0x22 2M 1M",
		"aio_write -P 0x23 4M 300k", "aio_write -P 0x24 4500k 300k", "aio_flush", "discard 5M 256k", "flush",
		"write -P 0x25 9M 3k", // the last chunk
		"read -P 0x11 0 511", "read -P 0x21 511 5000", "read -P 0 1M 64k", "read -P 0x22 2M 1M", "read -P 0x23 4M 300k",
		"read -P 0 4396k 104k", "read -P 0x24 4500k 300k",
		"read -P 0x14 5M 256k", // a discard is dropped while there are snapshots
		"read -P 0x25 9M 3k", "read -P 0x13 8M 1M")
	qemuIO(t, d.uri("vm@old"), old...)
	d.do("snapshot", "vm@new", "--store", "mem", "--discard-zeroes-cow")
	later := []string{
		"read -P 0x21 511 5000", "read -P 0 1M 64k", "read -P 0x22 2M 1M", "read -P 0x23 4M 300k", "read -P 0x25 9M 3k",
	}
	writeToSnapshots(t, d, old, later)
	qemuIO(t, origin, "write -P 0x41 0 9219k", "read -P 0x41 0 9219k")
	qemuIO(t, d.uri("vm@new"), later...)
}

// writeToSnapshots writes to a snapshot, of which neither the origin nor the other snapshot must see anything.
func writeToSnapshots(t *testing.T, d *daemon, old, later []string) {
	qemuIO(t, d.uri("vm@old"),
		"write -P 0x31 0 3M", "write -P 0x32 1000 10", "write -f -P 0x33 4M 2M", "write -z 4100k 1M", "write -z -u 7M 64k",
		"aio_write -P 0x34 9M 1k", "aio_write -P 0x35 9217k 2k", "aio_flush", "flush",
		"read -P 0x31 0 1000", "read -P 0x32 1000 10", "read -P 0x31 1010 2M", "read -P 0x33 4M 4k", "read -P 0 4100k 1M",
		"read -P 0 7M 64k", "read -P 0x34 9M 1k", "read -P 0x35 9217k 2k", "read -P 0x11 6912k 128k", "read -P 0x13 8M 1M")
	qemuIO(t, d.uri("vm"), later...)
	qemuIO(t, d.uri("vm@new"), later...)
	qemuIO(t, d.uri("vm@new"), "write -P 0x36 0 1M", "discard 0 512k", "read -P 0 0 512k", "read -P 0x36 512k 512k",
		"write -P 0x21 511 5000", "write -z 1M 64k")
	d.do("snapshot", "vm@fixed", "--read-only")
	if out, failed := tryQemuIO(t, d.uri("vm@fixed"), "write 0 4k"); !failed {
		t.Errorf("a read-only snapshot was written: %s", out)
	}
	x := d.status("vm@old")
	small := x.Snapshot.ChunkBytes < mib // so that some chunks were overwritten as a whole
	if x.State != "valid" || x.Snapshot.CopiedChunks == 0 || small && x.Snapshot.OverwrittenChunks == 0 {
		t.Errorf("vm@old: %+v", x.Snapshot)
	}
}

// TestQemuImg compares and converts between exports and files, in several formats.
func TestQemuImg(t *testing.T) {
	t.Parallel()
	need(t, "qemu-img", "qemu-io")
	const size = 16 * mib
	d := startDaemon(t)
	image := randomImage(t, size, 5)
	before := copyFile(t, image)
	d.do("attach", "vm", image)
	compare := func(a, b string) { t.Helper(); tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", a, b) }
	compare(before, d.uri("vm"))
	checkMap(t, d.uri("vm"), size, 64*96*kib)
	d.do("snapshot", "vm@a", "--chunk", "32k")
	qemuIO(t, d.uri("vm"), "write -P 1 100k 1M", "write -z 8M 1M", "write -P 2 15M 1M")
	compare(before, d.uri("vm@a"))
	checkMap(t, d.uri("vm@a"), size, 63*64*kib-3*mib) // what was copied counts as data
	out := toolFails(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", before, d.uri("vm"))
	if !strings.Contains(out, "Content mismatch at offset 102400!") {
		t.Errorf("origin and image: %s", out)
	}

	qcow := filepath.Join(t.TempDir(), "a.qcow2")
	tool(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", d.uri("vm@a"), qcow)
	tool(t, "qemu-img", "check", qcow)
	tool(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", before, qcow)

	// To an origin that has a snapshot, and to a snapshot, out of order and by many requests.
	other := randomImage(t, size, 6)
	d.do("snapshot", "vm@b")
	second := copyFile(t, image)
	tool(t, "qemu-img", "convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", other, d.uri("vm"))
	compare(other, d.uri("vm"))
	compare(before, d.uri("vm@a"))
	compare(second, d.uri("vm@b"))
	tool(t, "qemu-img", "convert", "-n", "-W", "-f", "qcow2", "-O", "raw", qcow, d.uri("vm@b"))
	compare(before, d.uri("vm@b"))
	compare(other, d.uri("vm"))
	tool(t, "qemu-img", "bench", "-w", "-f", "raw", "-c", "2000", "-d", "32", "-s", "8192", "-S", "24576",
		"--pattern", "7", "--flush-interval", "100", d.uri("vm"))
	compare(before, d.uri("vm@a"))
}

// checkMap checks that qemu's map of a randomImage's export covers it, and knows at least so many bytes of its zeroes.
func checkMap(t *testing.T, uri string, size, least int64) {
	t.Helper()
	var extents []struct {
		Start, Length int64
		Zero, Data    bool
	}
	if err := json.Unmarshal([]byte(tool(t, "qemu-img", "map", "-f", "raw", "--output=json", uri)), &extents); err != nil {
		t.Fatal(err)
	}
	end, zeroes := int64(0), int64(0)
	for _, e := range extents {
		if e.Start != end {
			t.Errorf("a gap in the map at %d: %+v", end, extents)
		}
		end = e.Start + e.Length
		if e.Zero {
			zeroes += e.Length
		}
	}
	if end != size || zeroes < least || zeroes > size/randomPiece*randomHole {
		t.Errorf("the map covers %d bytes, %d of them zeroes: %+v", end, zeroes, extents)
	}
}

// TestSameAsQemuStorageDaemon gives the same requests to cowherd and to qemu's copy-before-write: origins and frozen
// views must be the same.
func TestSameAsQemuStorageDaemon(t *testing.T) {
	t.Parallel()
	need(t, "qemu-storage-daemon", "qemu-io", "qemu-img")
	const size = 8 * mib
	ours, theirs := randomImage(t, size, 7), randomImage(t, size, 7)
	d := startDaemon(t)
	d.do("attach", "vm", ours)
	d.do("snapshot", "vm@a", "--chunk", "64k") // qemu's cluster size
	peer := startPeer(t, theirs)
	var stream []string
	for i := range 300 {
		at, length := i*7919*613%(size-70000), 1+i*5077%65536
		switch i % 10 {
		case 3:
			stream = append(stream, fmt.Sprintf("write -z %d %d", at, length))
		case 6:
			stream = append(stream, fmt.Sprintf("write -z -u %d %d", at, length))
		case 8:
			stream = append(stream, fmt.Sprintf("aio_write -P %d %d %d", i%250, at, length), "aio_flush")
		default:
			stream = append(stream, fmt.Sprintf("write -P %d %d %d", i%250, at, length))
		}
	}
	qemuIO(t, d.uri("vm"), stream...)
	qemuIO(t, peer("origin"), stream...)
	compare := func(a, b string) { t.Helper(); tool(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", a, b) }
	compare(d.uri("vm@a"), peer("snapshot"))
	compare(d.uri("vm"), peer("origin"))
	toolFails(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", d.uri("vm"), d.uri("vm@a"))
}

// startPeer starts qemu-storage-daemon over an image: "origin" is written, "snapshot" is the image as it is now.
func startPeer(t *testing.T, image string) (uri func(export string) string) {
	dir := shortDir(t)
	socket, ready := filepath.Join(dir, "s"), filepath.Join(dir, "pid")
	info, err := os.Stat(image)
	if err != nil {
		t.Fatal(err)
	}
	p := startInteractive(t, "qemu-storage-daemon",
		"--blockdev", "driver=file,node-name=image,filename="+image,
		"--blockdev", "driver=file,node-name=fleece,discard=unmap,filename="+emptyImage(t, info.Size()),
		"--blockdev", "driver=copy-before-write,node-name=cbw,file=image,target=fleece",
		"--blockdev", "driver=snapshot-access,node-name=access,file=cbw",
		"--nbd-server", "addr.type=unix,max-connections=0,addr.path="+socket,
		"--export", "type=nbd,id=origin,node-name=cbw,name=origin,writable=on",
		"--export", "type=nbd,id=snapshot,node-name=access,name=snapshot",
		"--pidfile", ready)
	t.Cleanup(func() { _ = p.cmd.Process.Kill() }) // it does not look at its input
	eventually(t, "qemu-storage-daemon", func() bool {
		text, err := os.ReadFile(ready)
		return err == nil && bytes.HasSuffix(text, []byte("\n"))
	})
	return func(export string) string { return "nbd+unix:///" + export + "?socket=" + socket }
}
