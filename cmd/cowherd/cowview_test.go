package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"cowherd/backend/file"
	"cowherd/backend/mem"
	"cowherd/block"
	"cowherd/dm"
	"cowherd/internal/fault"
	"cowherd/internal/fixture"
)

// sumOf is the sha256 of a file.
func sumOf(t *testing.T, path string) string {
	t.Helper()
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(p)
	return hex.EncodeToString(sum[:])
}

// viewSum is the sum of the view of a fixture; "": it has none.
func viewSum(x fixture.Fixture) string {
	for _, name := range []string{"merged-view", "snapshot-reactivated", "snapshot"} {
		if sum := x.Sums[name]; len(sum) == 2*sha256.Size {
			return sum
		}
	}
	return ""
}

// diffReport is what diff prints.
type diffReport struct {
	Ranges []struct{ Offset, Length int64 }
	Bytes  int64 `json:"different_bytes"`
}

// TestFixtureViews: the view of a store that the kernel has made is what the kernel showed, and so is what differs.
func TestFixtureViews(t *testing.T) {
	eachFixture(t, func(t *testing.T, x fixture.Fixture, origin, cow string) {
		out := filepath.Join(scratchDir(t), "out.img")
		r := cowherd(t, "cow", "export", "--origin", origin, cow, out)
		want := viewSum(x)
		if want == "" {
			r.want(t, exitError, "", cow+": the snapshot is invalid")
			if _, err := os.Stat(out); !os.IsNotExist(err) {
				t.Errorf("an invalid view was written: %v", err)
			}
			cowherd(t, "cow", "diff", "--origin", origin, cow).want(t, exitError, "", "the snapshot is invalid")
			return
		}
		r.want(t, exitOK, out+": ", "")
		if got := sumOf(t, out); got != want {
			t.Errorf("the view has sum %s, want %s", got, want)
		}
		checkDiff(t, origin, cow, out)
	})
}

// checkDiff compares what diff says with a comparison of the images.
func checkDiff(t *testing.T, originPath, cow, viewPath string) {
	t.Helper()
	origin, err := os.ReadFile(originPath)
	if err != nil {
		t.Fatal(err)
	}
	view, err := os.ReadFile(viewPath)
	if err != nil {
		t.Fatal(err)
	}
	report := decode[diffReport](t, cowherd(t, "cow", "diff", "--origin", originPath, cow))
	end, total := int64(-1), int64(0)
	for _, x := range report.Ranges {
		if x.Offset <= end || x.Length <= 0 || x.Offset%512 != 0 || bytes.Equal(origin[x.Offset:][:x.Length], view[x.Offset:][:x.Length]) {
			t.Fatalf("range %+v, the one before ends at %d", x, end)
		}
		end, total = x.Offset+x.Length, total+x.Length
		copy(origin[x.Offset:][:x.Length], view[x.Offset:])
	}
	if !bytes.Equal(origin, view) || report.Bytes != total {
		t.Errorf("with these ranges the origin is not the view; %d bytes, said to be %d", total, report.Bytes)
	}
	all := decode[diffReport](t, cowherd(t, "cow", "diff", "--origin", originPath, cow, "--no-compare"))
	info := decode[cowInfo](t, cowherd(t, "cow", "info", cow, "--json"))
	if all.Bytes != int64(info.Exceptions)*info.ChunkBytes || all.Bytes < report.Bytes { // no origin here ends within a chunk
		t.Errorf("%d bytes have an exception, of %d exceptions", all.Bytes, info.Exceptions)
	}
}

func TestCOWExport(t *testing.T) {
	dir := unpacked(t)
	origin, cow := filepath.Join(dir, "e-po-overflow/origin.img"), filepath.Join(dir, "e-po-overflow/cow.img")
	out := filepath.Join(scratchDir(t), "out.img")
	r := cowherd(t, "cow", "export", "--origin", origin, cow, out, "--json", "--progress", "json")
	report := decode[exportReport](t, r)
	if r.status != exitOK || report.SizeBytes != 64<<20 || report.WrittenBytes == 0 || report.WrittenBytes > 40<<20 {
		t.Errorf("%+v", report)
	}
	lines := strings.Split(strings.TrimSpace(r.stderr), "\n")
	var last progressLine
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &last); err != nil || last.DoneBytes != 64<<20 || last.TotalBytes != 64<<20 {
		t.Errorf("progress %q: %v", r.stderr, err)
	}
	var st syscall.Stat_t
	if err := syscall.Stat(out, &st); err != nil || st.Blocks*512 > report.WrittenBytes+1<<20 {
		t.Errorf("it takes %d bytes: %v", st.Blocks*512, err)
	}
	cowherd(t, "cow", "export", "--origin", origin, cow, out).want(t, exitError, "", "--force replaces it")
	if err := os.WriteFile(out, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	r = cowherd(t, "cow", "export", "--origin", origin, cow, out, "--force", "--progress", "bar")
	if r.status != exitOK || !strings.HasPrefix(r.stdout, out+": 64 MiB, ") || !strings.HasSuffix(r.stderr, "\r\x1b[K") {
		t.Errorf("%+v", r)
	}
}

func TestCOWExportRefuses(t *testing.T) {
	dir := t.TempDir()
	origin, cow := fixtureFile(t, "e-po-overflow", "origin.img"), fixtureFile(t, "e-po-overflow", "cow.img")
	link := filepath.Join(dir, "link")
	if err := os.Symlink(origin, link); err != nil {
		t.Fatal(err)
	}
	before := sumOf(t, origin) + sumOf(t, cow)
	for _, test := range []struct{ out, text string }{
		{origin, "is what is to be read"}, {cow, "is what is to be read"}, {link, "is what is to be read"},
		{dir, "neither a regular file nor a block device"}, {"/dev/null", "neither a regular file nor a block device"},
		{filepath.Join(dir, "none/out"), "no such file"},
	} {
		cowherd(t, "cow", "export", "--origin", origin, cow, test.out, "--force").want(t, exitError, "", test.text)
	}
	cowherd(t, "cow", "export", "--origin", cow, cow, filepath.Join(dir, "x")).want(t, exitError, "", "as the origin and as the COW device")
	cowherd(t, "cow", "export", cow, filepath.Join(dir, "x")).want(t, exitUsage, "", "--origin")
	small := fixtureFile(t, "g-fresh", "cow.img")
	cowherd(t, "cow", "export", "--origin", small, cow, filepath.Join(dir, "x")).want(t, exitError, "", "behind the end of the origin")
	d, err := file.Open(origin, file.Options{})
	if err != nil {
		t.Fatal(err)
	}
	cowherd(t, "cow", "export", "--origin", origin, cow, filepath.Join(dir, "x")).want(t, exitError, "", "locked by another program")
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if after := sumOf(t, origin) + sumOf(t, cow); after != before {
		t.Error("a source was changed")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("something was left behind: %v, %v", left, err)
	}
}

// TestExportInterrupted: what is incomplete vanishes.
func TestExportInterrupted(t *testing.T) {
	dir := unpacked(t)
	out := filepath.Join(scratchDir(t), "out.img")
	var stdout, stderr bytes.Buffer
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	args := []string{"cow", "export", "--origin", filepath.Join(dir, "g-fresh/origin.img"), filepath.Join(dir, "g-fresh/cow.img"), out}
	if status := run(ctx, args, nil, &stdout, &stderr); status != exitError || !strings.Contains(stderr.String(), "interrupted") {
		t.Errorf("status %d, %q", status, stderr.String())
	}
	if left, err := os.ReadDir(filepath.Dir(out)); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// linear is a target that passes everything on.
type linear struct{ block.Device }

func (l linear) Map(*block.Request) block.Device { return l.Device }
func (l linear) Extents(offset, length int64, yield func(block.Extent) bool) error {
	return l.Device.(block.ExtentLister).Extents(offset, length, yield)
}

// TestExporterOverOld: to a device that holds something, zeroes are written too; and errors of either side surface.
func TestExporterOverOld(t *testing.T) {
	const size = 40<<20 + 512
	newMem := func() *mem.Device {
		d, err := mem.New(mem.Config{Size: size})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	from, to := newMem(), newMem()
	for offset := int64(0); offset < size; offset += 3 << 20 {
		if err := block.Write(from, bytes.Repeat([]byte{byte(offset >> 20), 1}, 8192/2)[:min(8192, size-offset)], offset); err != nil {
			t.Fatal(err)
		}
	}
	if err := block.Write(to, bytes.Repeat([]byte{7}, size), 0); err != nil {
		t.Fatal(err)
	}
	source := fault.New(from)
	e := &exporter{from: dm.NewDevice("from", linear{source}, true), to: to}
	if err := e.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	want, got := make([]byte, size), make([]byte, size)
	if err := errors.Join(block.Read(from, want, 0), block.Read(to, got, 0)); err != nil || !bytes.Equal(want, got) {
		t.Errorf("they differ: %v", err)
	}
	source.Fail(func(r *block.Request) error {
		if r.Offset > 30<<20 {
			return syscall.EIO
		}
		return nil
	})
	e = &exporter{from: e.from, to: to}
	if err := e.run(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Errorf("a read failed: %v", err)
	}
	source.Fail(nil)
	target := fault.New(to)
	for _, op := range []block.Op{block.OpWrite, block.OpWriteZeroes} {
		target.Fail(func(r *block.Request) error {
			if r.Op == op {
				return syscall.ENOSPC
			}
			return nil
		})
		e = &exporter{from: e.from, to: target}
		if err := e.run(t.Context()); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%v failed: %v", op, err)
		}
	}
	if err := e.from.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestProgress(t *testing.T) {
	var out bytes.Buffer
	s := &session{stderr: &out}
	if p := (&progressFlag{"auto"}).newProgress(s, "x", 10); p != nil {
		t.Error("a bar where there is no terminal")
	}
	var none *progress
	none.add(1)
	none.end()
	p := (&progressFlag{"bar"}).newProgress(s, "x", 4096)
	p.add(1024)
	p.add(1024)
	p.end()
	if got := out.String(); got != "\r\x1b[Kx: 1 KiB of 4 KiB (25.0%)\r\x1b[K" {
		t.Errorf("%q", got)
	}
	out.Reset()
	p.show(2 * time.Second)
	if got := out.String(); got != "\r\x1b[Kx: 2 KiB of 4 KiB (50.0%), 1 KiB/s, 2s left" {
		t.Errorf("%q", got)
	}
	out.Reset()
	p.addBy("clone", 512)
	p.addBy("", 512)
	p.show(3 * time.Second)
	if got := out.String(); got != "\r\x1b[Kx: 3 KiB of 4 KiB (75.0%), 1 KiB/s, 1s left, clone" {
		t.Errorf("%q", got)
	}
	if n := testing.AllocsPerRun(100, func() { p.addBy("clone", 0) }); n > 0 {
		t.Errorf("%v allocations to be told of the same method", n)
	}
	if got := fmt.Sprint(plural(1, "chunk"), plural(0, "chunk")); got != "1 chunk0 chunks" {
		t.Error(got)
	}
}

// TestFixtureMerges: merging a store that the kernel has made gives the view; one that the kernel has begun to merge is
// finished.
func TestFixtureMerges(t *testing.T) {
	eachFixture(t, func(t *testing.T, x fixture.Fixture, origin, cow string) {
		origin, cow = copyOf(t, origin), copyOf(t, cow)
		before := sumOf(t, origin) + sumOf(t, cow)
		r := cowherd(t, "cow", "merge", "--origin", origin, cow, "--json")
		want := viewSum(x)
		if want == "" {
			r.want(t, exitError, "", "the snapshot is invalid")
			if sumOf(t, origin)+sumOf(t, cow) != before {
				t.Error("a file was changed")
			}
			return
		}
		r.want(t, exitOK, "", "")
		if final := x.Sums["final-origin"]; final != "" {
			want = final
		}
		if got := sumOf(t, origin); got != want {
			t.Errorf("the origin has sum %s, want %s", got, want)
		}
		info := decode[cowInfo](t, cowherd(t, "cow", "info", cow, "--json"))
		if info.State != stateFresh || info.AllocatedSectors != info.MetadataSectors {
			t.Errorf("afterwards: %+v", info)
		}
		cowherd(t, "cow", "check", cow).want(t, exitOK, "", "")
		cowherd(t, "cow", "merge", "--origin", origin, cow).want(t, exitOK, "merged into "+origin+", 0 chunks", "")
	})
}

// TestMergeInterrupted: an interrupted merge goes on, and the view stays what it was meanwhile.
func TestMergeInterrupted(t *testing.T) {
	origin, cow := fixtureFile(t, "a-snap-p-4k", "origin.img"), fixtureFile(t, "a-snap-p-4k", "cow.img")
	args := []string{"cow", "merge", "--origin", origin, cow}
	all, err := fixture.All()
	if err != nil {
		t.Fatal(err)
	}
	want := viewSum(all[0])
	for range 8 {
		var stdout, stderr bytes.Buffer
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // a batch that is begun is finished all the same
		status := run(ctx, args, nil, &stdout, &stderr)
		if status != exitOK && !strings.Contains(stderr.String(), "chunks merged: the same command goes on") {
			t.Fatalf("%q", stderr.String())
		}
	}
	cowherd(t, "cow", "check", cow, "--origin", origin).want(t, exitOK, "", "")
	out := filepath.Join(scratchDir(t), "out.img")
	cowherd(t, "cow", "export", "--origin", origin, cow, out).want(t, exitOK, "", "")
	if sumOf(t, out) != want {
		t.Fatal("the view is another one")
	}
	cowherd(t, args...).want(t, exitOK, "", "")
	if sumOf(t, origin) != want {
		t.Error("the origin is not what the snapshot showed")
	}
}
