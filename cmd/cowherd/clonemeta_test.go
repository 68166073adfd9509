package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cowherd/backend/file"
	"cowherd/clonemeta"
	"cowherd/internal/fixture"
	"cowherd/persistentdata"
)

// kernelsMetadata is a file with metadata that a kernel has made.
func kernelsMetadata(t *testing.T, name string) string {
	t.Helper()
	packed, err := os.ReadFile("../../clonemeta/testdata/" + name + ".pack")
	if err != nil {
		t.Fatal(err)
	}
	image, err := fixture.Decode(packed, nil)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(scratchDir(t), name)
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// newMetadata is a file with metadata for 100,000 regions of 4 KiB, of which 10 to 19 and 40,000 are hydrated.
func newMetadata(t *testing.T) string {
	t.Helper()
	path := filepath.Join(scratchDir(t), "meta")
	p := clonemeta.Params{RegionSize: 8, TargetSize: 800_000}
	d, err := file.Create(path, clonemeta.Size(p), file.Options{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := clonemeta.Format(d, p)
	if err == nil {
		err = m.SetWords(func(yield func(uint64, uint64) bool) { _ = yield(0, 0xffc00) && yield(625, 1) })
	}
	if err == nil {
		err = m.Commit()
	}
	if err = errors.Join(err, d.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestCloneMetadata(t *testing.T) {
	for _, name := range []string{"f-clone-8", "f-clone-128", "f-clone-full"} {
		meta := kernelsMetadata(t, name)
		if r := cowherd(t, "clone-metadata", "check", meta); r != (result{}) {
			t.Errorf("%s: check: %+v", name, r)
		}
		info := decode[metadataInfo](t, cowherd(t, "clone-metadata", "info", meta, "--json"))
		text, err := os.ReadFile("../../clonemeta/testdata/" + name + ".txt")
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		if !strings.Contains(lines[len(lines)-2], " clone "+info.Status+" ") {
			t.Errorf("%s: status %q, want %q", name, info.Status, lines[len(lines)-2])
		}
		mended := meta + "-mended"
		cowherd(t, "clone-metadata", "repair", meta, mended).want(t, exitOK, ": 0 violations, 0 remarks; ", "")
		before, after := cowherd(t, "clone-metadata", "dump", meta), cowherd(t, "clone-metadata", "dump", mended)
		if before != after || before.status != exitOK {
			t.Errorf("%s: what was written anew lists other regions", name)
		}
	}
}

func TestCloneMetadataInfo(t *testing.T) {
	meta := newMetadata(t)
	for _, text := range []string{" partial\n", "390.6 MiB (409600000 bytes)\n", "100000 of 4 KiB\n", "11 (0.0%)\n", "9 of 256 blocks", "8 9/256 8 11/100000\n"} {
		cowherd(t, "clone-metadata", "info", meta).want(t, exitOK, text, "")
	}
	cowherd(t, "clone-metadata", "info", kernelsMetadata(t, "f-clone-full")).want(t, exitOK, " complete\n", "")
	cowherd(t, "clone-metadata", "info", meta+"x").want(t, exitError, "", "no such file")
	poke(t, meta, 40, 7)
	cowherd(t, "clone-metadata", "info", meta).want(t, exitError, "", meta+": block 0 (clone superblock): version is 7, want 1")
	if err := os.WriteFile(meta, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"info", "dump", "check"} {
		cowherd(t, "clone-metadata", command, meta).want(t, exitError, "", meta+": there is no clone metadata: block 0")
	}
	cowherd(t, "clone-metadata", "repair", meta, "--dry-run").want(t, exitError, "", meta+": there is no clone metadata: block 0")
}

func TestCloneMetadataDump(t *testing.T) {
	meta := newMetadata(t)
	r := cowherd(t, "clone-metadata", "dump", meta)
	if got := strings.Join(strings.Fields(r.stdout), " "); r.status != exitOK ||
		got != "# 100000 regions of 8 sectors, 800000 sectors in all FIRST LAST COUNT 10 19 10 40000 40000 1" {
		t.Errorf("%+v", r)
	}
	const want = `{"region_sectors":8,"target_sectors":800000,"regions":100000}
{"first":10,"count":10}
{"first":32576,"count":32576,"lost":true}
`
	spoil(t, meta, 40_000)
	r = cowherd(t, "clone-metadata", "dump", meta, "--json")
	if r.stdout != want || r.status != exitError || !strings.Contains(r.stderr, "of 32576 regions it cannot be told") {
		t.Errorf("%+v", r)
	}
}

// spoil damages the array block of a region.
func spoil(t *testing.T, path string, region uint64) {
	t.Helper()
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for n := 1; n < len(p)/persistentdata.BlockSize; n++ {
		block := p[n*persistentdata.BlockSize:][:persistentdata.BlockSize]
		at := 24 + region%32576/8
		if persistentdata.KindArray.Verify(block, uint64(n)) == nil && block[at]>>(region%8)&1 != 0 {
			poke(t, path, int64(n*persistentdata.BlockSize)+int64(at), 0)
			return
		}
	}
	t.Fatal("no block to be damaged")
}

func TestCloneMetadataCheckAndRepair(t *testing.T) {
	meta := newMetadata(t)
	out := meta + "-mended"
	spoil(t, meta, 40_000)
	r := cowherd(t, "clone-metadata", "check", meta)
	r.want(t, exitError, meta+": violation: checksum: block ", meta+": 2 violations of the format\n")
	r.want(t, exitError, meta+": violation: lost: regions 32576 to 65151: whether", "")
	cowherd(t, "clone-metadata", "check", meta, "--max", "1").want(t, exitError, meta+": 1 more\n", "")
	cowherd(t, "clone-metadata", "check", meta, "--max", "-1").want(t, exitUsage, "", "--max")
	report := decode[metadataReport](t, cowherd(t, "clone-metadata", "check", meta, "--json"))
	if report.Lost != 32576 || report.Hydrated != 10 || report.Violations != 2 || len(report.Findings) != 2 || *report.Findings[0].Block == 0 {
		t.Errorf("%+v", report)
	}
	cowherd(t, "clone-metadata", "info", meta).want(t, exitOK, " damaged\n", "")
	cowherd(t, "clone-metadata", "repair", meta).want(t, exitUsage, "", "OUT is missing")
	cowherd(t, "clone-metadata", "repair", meta, out).want(t, exitError, "", "of 32576 regions it cannot be told whether they are hydrated")
	cowherd(t, "clone-metadata", "repair", meta, "--dry-run", "--lost", "hydrated").want(t, exitOK, "can be written", "")
	if _, err := os.Stat(out); err == nil {
		t.Error("a repair that was refused has made a file")
	}
	cowherd(t, "clone-metadata", "repair", meta, out, "--lost", "hydrated").want(t, exitOK,
		": warning: 32576 regions more as hydrated: where one was never copied", "")
	cowherd(t, "clone-metadata", "check", out).want(t, exitOK, "", "")
	cowherd(t, "clone-metadata", "info", out, "--json").want(t, exitOK, `"hydrated": 32586`, "")
	cowherd(t, "clone-metadata", "repair", meta, out, "--lost", "unhydrated").want(t, exitError, "", "is there already")
	r = cowherd(t, "clone-metadata", "repair", meta, out, "--lost", "unhydrated", "--force", "--json")
	if report := decode[metadataRepair](t, r); report.Warning == "" || report.Hydrated != 10 || report.Out != out {
		t.Errorf("%+v", report)
	}
	cowherd(t, "clone-metadata", "info", out, "--json").want(t, exitOK, `"hydrated": 10`, "")
	cowherd(t, "clone-metadata", "repair", meta, meta, "--lost", "hydrated", "--force").want(t, exitError, "", "is what is to be read")
	poke(t, meta, 172, 9)
	cowherd(t, "clone-metadata", "repair", meta, out, "--force").want(t, exitError, "", "nothing that it leads to can be found")
}

// TestCloneMetadataInUse: who has the metadata open for writing keeps the tools out.
func TestCloneMetadataInUse(t *testing.T) {
	meta := newMetadata(t)
	d, err := file.Open(meta, file.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, command := range []string{"info", "dump", "check"} {
		cowherd(t, "clone-metadata", command, meta).want(t, exitError, "", "locked by another program")
	}
	cowherd(t, "clone-metadata", "repair", meta, meta+"x").want(t, exitError, "", "locked by another program")
}
