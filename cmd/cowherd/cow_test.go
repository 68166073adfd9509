package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"cowherd/backend/file"
	"cowherd/internal/fixture"
)

// fixturesFrom in the environment names a folder with more fixtures, whose images are packed by zstd.
const fixturesFrom = "COWHERD_FIXTURES"

// fixtures are unpacked once, for the time of the tests; tests that change one take a copy.
var fixtures struct {
	sync.Once
	dir string
	err error
}

// scratch makes a directory for images: in memory, where there is room, because merges flush what they write.
func scratch() (string, error) {
	const shm, room = "/dev/shm", 2 << 30
	var fs unix.Statfs_t
	if err := unix.Statfs(shm, &fs); err != nil || int64(fs.Bavail)*fs.Bsize < room {
		return os.MkdirTemp("", "cowherd-fixtures-*")
	}
	return os.MkdirTemp(shm, "cowherd-fixtures-*")
}

// scratchDir is a scratch directory for the time of a test.
func scratchDir(t *testing.T) string {
	t.Helper()
	dir, err := scratch()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// unpacked is the directory with the fixtures.
func unpacked(t *testing.T) string {
	t.Helper()
	fixtures.Do(func() {
		if fixtures.dir, fixtures.err = scratch(); fixtures.err != nil {
			return
		}
		all, err := fixture.All()
		for _, f := range all {
			dir := filepath.Join(fixtures.dir, f.Name)
			err = errors.Join(err, os.Mkdir(dir, 0o700), f.Unpack(dir))
		}
		fixtures.err = err
	})
	if fixtures.err != nil {
		t.Fatal(fixtures.err)
	}
	return fixtures.dir
}

// removeFixtures is called when all tests are over.
func removeFixtures() {
	if fixtures.dir != "" {
		_ = os.RemoveAll(fixtures.dir)
	}
}

// eachFixture runs f over all fixtures, and over those in the folder that the environment names.
func eachFixture(t *testing.T, f func(t *testing.T, x fixture.Fixture, origin, cow string)) {
	all, err := fixture.All()
	if err != nil {
		t.Fatal(err)
	}
	dir := unpacked(t)
	for _, x := range all {
		t.Run(x.Name, func(t *testing.T) {
			f(t, x, filepath.Join(dir, x.Name, "origin.img"), filepath.Join(dir, x.Name, "cow.img"))
		})
	}
	more := os.Getenv(fixturesFrom)
	if more == "" {
		return
	}
	packed, err := filepath.Glob(filepath.Join(more, "*", "cow.img.zst"))
	if err != nil || len(packed) == 0 {
		t.Fatalf("there are no fixtures in %s: %v", more, err)
	}
	for _, cow := range packed {
		x, err := fixture.Read(filepath.Dir(cow))
		if err != nil {
			t.Fatal(err)
		}
		t.Run("more/"+x.Name, func(t *testing.T) {
			dir := scratchDir(t)
			for _, image := range []string{"origin.img", "cow.img"} {
				c := exec.Command("zstd", "-q", "-d", "--long=27", "-o", filepath.Join(dir, image),
					filepath.Join(filepath.Dir(cow), image+".zst"))
				if out, err := c.CombinedOutput(); err != nil {
					t.Fatalf("zstd: %v: %s", err, out)
				}
				if err := os.Chmod(filepath.Join(dir, image), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			f(t, x, filepath.Join(dir, "origin.img"), filepath.Join(dir, "cow.img"))
		})
	}
}

// fixtureFile is a copy of a file of a fixture, to be changed.
func fixtureFile(t *testing.T, name, image string) string {
	t.Helper()
	return copyOf(t, filepath.Join(unpacked(t), name, image))
}

// copyOf is a copy of a file, to be changed.
func copyOf(t *testing.T, path string) string {
	t.Helper()
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(scratchDir(t), filepath.Base(path))
	if err := os.WriteFile(path, p, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// poke changes bytes of a file.
func poke(t *testing.T, path string, offset int64, p ...byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(p, offset)
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// record is a record as it lies on disk.
func record(old, new uint64) []byte {
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, old), new)
}

// decode reads JSON that a command has printed.
func decode[T any](t *testing.T, r result) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(r.stdout), &v); err != nil {
		t.Fatalf("%v: %q, errors %q", err, r.stdout, r.stderr)
	}
	return v
}

// TestFixtures: what the kernel has made breaks no rule, and its status is the kernel's.
func TestFixtures(t *testing.T) {
	eachFixture(t, func(t *testing.T, x fixture.Fixture, origin, cow string) {
		if r := cowherd(t, "cow", "check", cow, "--origin", origin); r != (result{}) {
			t.Errorf("check: %+v", r)
		}
		info := decode[cowInfo](t, cowherd(t, "cow", "info", cow, "--json"))
		if info.Status != x.Status {
			t.Errorf("status %q, want %q", info.Status, x.Status)
		}
		want := stateValid
		switch {
		case x.Status == "Invalid":
			want = stateInvalid
		case info.Exceptions == 0:
			want = stateFresh
		}
		if info.State != want || info.Violations+info.Remarks > 0 || info.GapChunks > 0 {
			t.Errorf("%+v, want it %s", info, want)
		}
		lines := uint64(strings.Count(cowherd(t, "cow", "dump", cow).stdout, "\n"))
		if lines != info.Exceptions+1 {
			t.Errorf("%d lines of a dump, %d exceptions", lines, info.Exceptions)
		}
		before, err := os.ReadFile(cow)
		if err != nil {
			t.Fatal(err)
		}
		cowherd(t, "cow", "repair", cow).want(t, exitOK, cow+": nothing to do\n", "")
		if after, err := os.ReadFile(cow); err != nil || !bytes.Equal(before, after) {
			t.Errorf("repair has changed it: %v", err)
		}
	})
}

func TestCOWInfo(t *testing.T) {
	cow := fixtureFile(t, "a-snap-p-4k", "cow.img")
	r := cowherd(t, "cow", "info", cow)
	for _, text := range []string{
		"valid\n", "40 MiB (41943040 bytes)\n", "4 KiB, 10240 on the device\n", "4245\n",
		"0 to 15: 256 each of 256; 16: 149 of 256\n", "4262, 0 free below it\n",
		"16.7 MiB of 40 MiB (41.6%), 72 KiB of it metadata\n", "34104/81920 144\n",
	} {
		r.want(t, exitOK, " "+text, "")
	}
	poke(t, cow, 4096, record(1, 1<<20)...)
	cowherd(t, "cow", "info", cow).want(t, exitOK, " damaged\n", "")
	cowherd(t, "cow", "info", cow).want(t, exitOK, " 1 violation of the format, 0 remarks\n", "")
	poke(t, cow, 12, 7)
	cowherd(t, "cow", "info", cow).want(t, exitError, "", cow+": header: chunk size 3584 is not a power of 2")
	poke(t, cow, 0, 0, 0, 0, 0)
	cowherd(t, "cow", "info", cow).want(t, exitError, "", cow+": there is no exception store")
	cowherd(t, "cow", "info", cow+"x").want(t, exitError, "", "no such file")
}

func TestCOWDump(t *testing.T) {
	cow := fixtureFile(t, "e-po-overflow", "cow.img")
	lines := strings.Split(cowherd(t, "cow", "dump", cow).stdout, "\n")
	if fields := strings.Join(strings.Fields(lines[0]), " "); fields != "AREA SLOT OLD NEW" {
		t.Errorf("heading %q", lines[0])
	}
	if fields := strings.Fields(lines[254]); len(lines) != 256 || strings.Join(fields[:2], " ") != "0 253" || fields[3] != "255" {
		t.Errorf("%d lines, the last %q", len(lines), lines[254])
	}
	objects := strings.Split(cowherd(t, "cow", "dump", cow, "--json").stdout, "\n")
	var last struct{ Area, Slot, New_chunk int }
	if err := json.Unmarshal([]byte(objects[253]), &last); err != nil || last.Slot != 253 || last.New_chunk != 255 {
		t.Errorf("%q: %+v, %v", objects[253], last, err)
	}
	poke(t, cow, 4096+16*16, record(7, 1000)...)
	cowherd(t, "cow", "dump", cow).want(t, exitOK, " 7 ", "")
	cowherd(t, "cow", "dump", cow).want(t, exitOK, " 1000  the new chunk lies behind the end of the COW device", "")
	cowherd(t, "cow", "dump", cow, "--json").want(t, exitOK, `"new_chunk":1000,"wrong":"the new chunk lies`, "")
	poke(t, cow, 12, 0)
	cowherd(t, "cow", "dump", cow).want(t, exitError, "", "chunk size 0 is not a power of 2")
	if again := cowherd(t, "cow", "dump", cow, "--chunk", "4k"); strings.Count(again.stdout, "\n") != 255 {
		t.Errorf("with --chunk: %+v", again)
	}
	cowherd(t, "cow", "dump", cow, "--chunk", "5k").want(t, exitUsage, "", "--chunk: chunk size 5120 is not a power of 2")
	poke(t, cow, 4096+254*16, append(record(300, 5), record(301, 6)...)...)
	cowherd(t, "cow", "dump", cow, "--chunk", "4k").want(t, exitError, " 301 ", "the table goes on behind the end of the device")
}

func TestCOWCheck(t *testing.T) {
	cow, origin := fixtureFile(t, "e-po-overflow", "cow.img"), fixtureFile(t, "g-fresh", "cow.img") // 8 MiB
	const placed = ": violation: old-behind-end: area 0, slot 0, old chunk "
	cowherd(t, "cow", "check", cow, "--origin", origin).want(t, exitError, cow+placed, cow+": ")
	cowherd(t, "cow", "check", cow, "--origin", origin, "--max", "1").want(t, exitError, " more\n", "violations of the format")
	cowherd(t, "cow", "check", cow, "--origin", origin+"x").want(t, exitUsage, "", "no such file")
	cowherd(t, "cow", "check", cow, "--max", "-1").want(t, exitUsage, "", "--max")
	poke(t, cow, 4096+16*16, record(7, 1000)...)
	poke(t, cow, 4096+255*16, 1)
	r := cowherd(t, "cow", "check", cow)
	r.want(t, exitError, cow+": violation: new-behind-end: area 0, slot 16, old chunk 7, new chunk 1000: ", cow+": 1 violation of the format\n")
	r.want(t, exitError, cow+": remark: leftover: area 0, slot 255: ", "")
	r = cowherd(t, "cow", "check", cow, "--json")
	report := decode[checkReport](t, r)
	if r.status != exitError || report.Violations != 1 || report.Remarks != 1 || len(report.Findings) != 2 ||
		*report.Findings[0].New != 1000 || *report.Findings[1].Slot != 255 || report.Findings[1].New != nil {
		t.Errorf("%+v", report)
	}
	good := fixtureFile(t, "g-fresh", "cow.img")
	cowherd(t, "cow", "check", good, "--json").want(t, exitOK, `"findings": []`, "")
}

func TestCOWRepair(t *testing.T) {
	cow := fixtureFile(t, "d-invalid-snap-write", "cow.img")
	poke(t, cow, 4096+254*16, record(9, 9)...)
	const erase = ": would erase what lies behind the end of the table: area 0 from slot 252 on\n"
	cowherd(t, "cow", "repair", cow, "--dry-run").want(t, exitOK, cow+erase, "")
	cowherd(t, "cow", "check", cow).want(t, exitOK, "leftover", "")
	r := cowherd(t, "cow", "repair", cow, "--set-valid", "--dry-run", "--json")
	if report := decode[repairReport](t, r); !report.DryRun || len(report.Steps) != 2 || report.Warning == "" {
		t.Errorf("%+v", report)
	}
	r = cowherd(t, "cow", "repair", cow, "--set-valid")
	r.want(t, exitOK, cow+": erase what lies behind", "")
	r.want(t, exitOK, cow+": warning: the view is right only if no write has reached the origin since", "")
	cowherd(t, "cow", "check", cow).want(t, exitOK, "", "")
	cowherd(t, "cow", "info", cow).want(t, exitOK, " 2032/2048 16\n", "")
	cowherd(t, "cow", "repair", cow).want(t, exitOK, cow+": nothing to do\n", "")

	if err := os.Truncate(cow, 1<<19); err != nil {
		t.Fatal(err)
	}
	cowherd(t, "cow", "check", cow).want(t, exitError, "new-behind-end", "violations")
	cowherd(t, "cow", "repair", cow).want(t, exitError, "nothing to do", "violations cannot be repaired")
	cowherd(t, "cow", "repair", cow, "--invalidate").want(t, exitError, cow+": make the store invalid in the header\n", "cannot be repaired")
	cowherd(t, "cow", "info", cow, "--json").want(t, exitOK, `"status": "Invalid"`, "")
	cowherd(t, "cow", "repair", cow, "--set-valid").want(t, exitError, "", "the store cannot be made valid")
	cowherd(t, "cow", "repair", cow, "--set-valid", "--invalidate").want(t, exitUsage, "", "--set-valid")
}

// TestCOWInUse: who has the store open for writing keeps the tools out.
func TestCOWInUse(t *testing.T) {
	cow := fixtureFile(t, "g-fresh", "cow.img")
	d, err := file.Open(cow, file.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, command := range []string{"info", "dump", "check", "repair"} {
		cowherd(t, "cow", command, cow).want(t, exitError, "", "locked by another program")
	}
}
