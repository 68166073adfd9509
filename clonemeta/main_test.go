package clonemeta

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"go.uber.org/goleak"

	"cowherd/backend/mem"
	"cowherd/block"
	"cowherd/internal/fixture"
	"cowherd/persistentdata"
)

var seed = flag.Uint64("seed", 0, "the seed of the random tests; 0: a new one each time")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newRand is the source of chance of a test, whose seed is printed if the test fails.
func newRand(t testing.TB) *rand.Rand {
	s := *seed
	if s == 0 {
		s = rand.Uint64()
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("to do it again: -seed %d", s)
		}
	})
	return rand.New(rand.NewPCG(s, 1))
}

// memory is a device of zeroes.
func memory(t testing.TB, size int64) block.Device {
	t.Helper()
	d, err := mem.New(mem.Config{Size: size})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// deviceOf is a device that holds p.
func deviceOf(t testing.TB, p []byte) block.Device {
	t.Helper()
	d := memory(t, int64(len(p)))
	if len(p) > 0 {
		if err := block.Write(d, p, 0); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// contents is all that a device holds.
func contents(t testing.TB, d block.Device) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	if err := block.Read(d, p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

// bitsOf is the bitset.
func bitsOf(m *Metadata) (words []uint64, err error) {
	err = m.LoadBits(func(first uint64, w []uint64) bool {
		if first != uint64(len(words)) {
			panic(fmt.Sprintf("word %d follows %d words", first, len(words)))
		}
		words = append(words, w...)
		return true
	})
	return words, err
}

func countBits(words []uint64) (n uint64) {
	for _, w := range words {
		n += uint64(bits.OnesCount64(w))
	}
	return n
}

// findings are what Check has to say, as lines.
func findings(t testing.TB, d block.Device) (*Survey, []string) {
	t.Helper()
	var lines []string
	s, err := Check(d, CheckConfig{Report: func(f *persistentdata.Finding) {
		lines = append(lines, fmt.Sprintf("%s %v: %s", f.Rule, f.Violation, f.What))
	}})
	if err != nil {
		t.Fatal(err)
	}
	return s, lines
}

// fromKernel is metadata that a kernel has made, and the last status line that it printed.
type fromKernel struct {
	name, status string
	image        []byte
}

// kernelsDevices are those in testdata, and those in the folder that COWHERD_FIXTURES names.
func kernelsDevices(t testing.TB) (all []fromKernel) {
	t.Helper()
	packs, err := filepath.Glob("testdata/*.pack")
	if err != nil || len(packs) == 0 {
		t.Fatalf("no fixtures: %v", err)
	}
	for _, pack := range packs {
		packed, err := os.ReadFile(pack)
		if err != nil {
			t.Fatal(err)
		}
		image, err := fixture.Decode(packed, nil)
		if err != nil {
			t.Fatal(err)
		}
		name := pack[:len(pack)-len(".pack")]
		all = append(all, fromKernel{filepath.Base(name), lastStatus(t, name+".txt"), image})
	}
	more, err := filepath.Glob(filepath.Join(os.Getenv("COWHERD_FIXTURES"), "*", "meta.img.zst"))
	if err != nil {
		t.Fatal(err)
	}
	for _, meta := range more {
		out, err := exec.Command("zstd", "-q", "-d", "--long=27", "-c", meta).Output()
		if err != nil {
			t.Fatalf("zstd: %v", err)
		}
		dir := filepath.Dir(meta)
		all = append(all, fromKernel{"more/" + filepath.Base(dir), lastStatus(t, filepath.Join(dir, "status.txt")), out})
	}
	return all
}

var statusLine = regexp.MustCompile(`(?m)^clone: 0 \d+ clone (\d+ \d+/\d+ \d+ \d+/\d+) .* rw$`)

// lastStatus is the last status line in a file, as far as the metadata determines it.
func lastStatus(t testing.TB, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	found := statusLine.FindAllSubmatch(text, -1)
	if len(found) == 0 {
		t.Fatalf("%s: no status line", file)
	}
	return string(found[len(found)-1][1])
}

// TestPack packs the devices of a folder of fixtures anew.
func TestPack(t *testing.T) {
	from := os.Getenv("COWHERD_PACK_FIXTURES")
	if from == "" {
		t.Skip("COWHERD_PACK_FIXTURES names no folder of fixtures to be packed")
	}
	metas, err := filepath.Glob(filepath.Join(from, "f-clone-*", "meta.img.zst"))
	if err != nil || len(metas) == 0 {
		t.Fatalf("nothing to pack: %v", err)
	}
	for _, meta := range metas {
		image, err := exec.Command("zstd", "-q", "-d", "--long=27", "-c", meta).Output()
		if err != nil {
			t.Fatal(err)
		}
		packed, err := fixture.Encode(image, nil)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := fixture.Decode(packed, nil); err != nil || !bytes.Equal(image, again) {
			t.Fatalf("%s: what was packed is something else: %v", meta, err)
		}
		dir := filepath.Dir(meta)
		status, err := os.ReadFile(filepath.Join(dir, "status.txt"))
		to := filepath.Join("testdata", filepath.Base(dir))
		if err = errors.Join(err, os.MkdirAll("testdata", 0o755), os.WriteFile(to+".pack", packed, 0o644), os.WriteFile(to+".txt", status, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
}
