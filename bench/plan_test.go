package bench

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func parse(t *testing.T, text string) (*Plan, []*Cell) {
	t.Helper()
	p, err := ParsePlan("plan.toml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	cells, err := p.Cells()
	if err != nil {
		t.Fatal(err)
	}
	return p, cells
}

// TestMatrix multiplies lists out, in the order of the fields, and drops what differs only in what does not concern it.
func TestMatrix(t *testing.T) {
	p, cells := parse(t, `
title = "all of it"
[defaults]
engine = ["serialised", "scaled"]
jobs = [1, 2]
size = "8m"
[[cell]]
name = "bare"
stack = "bare"
[[cell]]
name = "first"
stack = "snapshot-origin"
chunk = ["4k", "64k"]
time = "2s"
`)
	if p.Title != "all of it" {
		t.Errorf("title %q", p.Title)
	}
	var got []string
	for _, c := range cells {
		got = append(got, strings.Join([]string{c.Name, c.get("chunk"), c.get("jobs"), c.Engine}, " "))
	}
	want := []string{
		"bare 0 1 ", "bare 0 2 ",
		"first 4KiB 1 serialised", "first 4KiB 1 scaled", "first 4KiB 2 serialised", "first 4KiB 2 scaled",
		"first 64KiB 1 serialised", "first 64KiB 1 scaled", "first 64KiB 2 serialised", "first 64KiB 2 scaled",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("cells:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if c := cells[6]; c.Block != 64<<10 || c.Time != 2*time.Second || c.Size != 8<<20 || c.Range != 8<<20 {
		t.Errorf("block %d, time %v, size %d, range %d", c.Block, c.Time, c.Size, c.Range)
	}
	if err := p.Set("jobs", "4"); err != nil {
		t.Fatal(err)
	}
	if cells, err := p.Cells(); err != nil || len(cells) != 5 || cells[0].Jobs != 4 {
		t.Errorf("overruled: %d cells, %v", len(cells), err)
	}
	for key, value := range map[string]string{"job": "1", "jobs": "0", "engine": "steam"} {
		if err := p.Set(key, value); err == nil || !strings.Contains(err.Error(), key+": ") {
			t.Errorf("Set(%s, %s): %v", key, value, err)
		}
	}
}

// TestPlanErrors looks at where errors are said to be.
func TestPlanErrors(t *testing.T) {
	tests := []struct{ name, text, want string }{
		{"empty", ``, "plan.toml: there is no [[cell]]"},
		{"no TOML", "[[cell]\n", "plan.toml:1"},
		{"top", "titel = 'x'\n[[cell]]\n", "plan.toml:1: titel: there is no such key"},
		{"key", "[[cell]]\nname = 'a'\n[[cell]]\njob = 1\n", "plan.toml:4: job: there is no such key"},
		{"default", "[defaults]\njobs = 0\n[[cell]]\njobs = 1\n", `plan.toml:2: jobs: "0" is not a number from 1 to 1024`},
		{"in a list", "[[cell]]\n\n jobs = [1, 'x']\n", `plan.toml:3: jobs: "x"`},
		{"empty list", "[[cell]]\njobs = []\n", "plan.toml:2: jobs: the list is empty"},
		{"table", "[[cell]]\njobs = {a = 1}\n", "plan.toml:2: jobs: neither"},
		{"word", "[[cell]]\ndevice = 'drum'\n", `plan.toml:2: device: "drum" is none of null, blank`},
		{"size", "[[cell]]\nsize = '4kB'\n", "plan.toml:2: size: "},
		{"time", "[[cell]]\ntime = '4'\n", "plan.toml:2: time: "},
		{"flag", "[[cell]]\ndirect = 'yes'\n", "plan.toml:2: direct: "},
		{"list of names", "[[cell]]\nname = ['a', 'b']\n", "plan.toml:2: name: it cannot be a list"},
		{"against", "[[cell]]\nname = 'a'\nagainst = 'b'\n", `plan.toml:3: against: no cell is named "b"`},
		{"cell", "[[cell]]\n[[cell]]\ndevice = 'file'\n", "plan.toml:2: dir: "},
		{"power", "[[cell]]\nblock = 1000\n", "plan.toml:1: block: 1000 is not a power of two"},
		{"range", "[[cell]]\nsize = '4k'\njobs = 2\n", "plan.toml:1: range: "},
		{"bandwidth", "[[cell]]\nbandwidth = '1m'\n", "plan.toml:1: latency: "},
		{"worker", "[[cell]]\nstack = 'copies'\noffload = 'worker'\n", "plan.toml:1: offload: "},
		{"no offload", "[[cell]]\nstack = 'copies'\ndevice = 'mem'\noffload = 'only'\n", "plan.toml:1: offload: "},
		{"not emulated", "[[cell]]\nstack = 'copies'\noffload = 'emulated'\n", "plan.toml:1: offload: "},
		{"foreground without time", "[[cell]]\nstack = 'copies'\nforeground = 'read'\n", "plan.toml:1: foreground: it needs a time"},
		{"small beside foreground", "[[cell]]\nstack = 'copies'\nforeground = 'read'\ntime = '1s'\nblock = 512\n", "plan.toml:1: block: "},
		{"no room beside foreground", "[[cell]]\nstack = 'copies'\nforeground = 'read'\ntime = '1s'\nsize = '8k'\njobs = 2\n", "plan.toml:1: range: "},
		{"aftermath of memory", "[[cell]]\nstack = 'aftermath'\n", "plan.toml:1: device: "},
		{"aftermath past the page cache", "[[cell]]\nstack = 'aftermath'\ndevice = 'file'\ndir = '/'\ndirect = true\n", "plan.toml:1: device: "},
		{"too many", "[defaults]\njobs = [" + strings.Repeat("1, ", 200) + "1]\ndepth = [" + strings.Repeat("1, ", 200) + "1]\n[[cell]]\n",
			"plan.toml:4: the lists multiply out to more than 10000"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := ParsePlan("plan.toml", []byte(test.text))
			if err == nil || !strings.HasPrefix(err.Error(), test.want) {
				t.Fatalf("got %v, want %s", err, test.want)
			}
			if _, ok := errors.AsType[*PlanError](err); !ok {
				t.Errorf("%T", err)
			}
		})
	}
}

// TestStudyPlans parses the plans of the study, which are too long to be run by a test: all of their cells are sound.
func TestStudyPlans(t *testing.T) {
	files, err := filepath.Glob("../docs/study/plans/*.toml")
	if err != nil || len(files) == 0 {
		t.Fatalf("%d plans, %v", len(files), err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		p, err := ParsePlan(filepath.Base(file), text)
		if err != nil {
			t.Fatal(err)
		}
		cells, err := p.Cells()
		if err != nil || p.Title == "" {
			t.Errorf("%s: title %q, %v", file, p.Title, err)
		}
		for _, g := range groupsOf(cells) {
			if c := g[0]; len(g) < 2 && (c.Compare != "" || c.Against != "") {
				t.Errorf("%s: %s is compared with nothing", file, c.Label())
			}
		}
	}
}

// FuzzPlan parses whatever comes: no panic, and what is accepted multiplies out.
func FuzzPlan(f *testing.F) {
	for _, name := range Suites() {
		text, _ := SuiteText(name)
		f.Add(string(text))
	}
	f.Add("[[cell]]\nsize = '1e'\nblock = 512\n")
	f.Fuzz(func(t *testing.T, text string) {
		p, err := ParsePlan("plan.toml", []byte(text))
		if err != nil {
			return
		}
		if cells, err := p.Cells(); err != nil || len(cells) == 0 {
			t.Fatalf("%d cells, %v", len(cells), err)
		}
	})
}

// TestOffsets looks at where jobs go: over ranges of their own, each unit once.
func TestOffsets(t *testing.T) {
	_, cells := parse(t, `
[defaults]
size = "1m"
jobs = 3
[[cell]]
stack = "clone"
region = "16k"
block = "4k"
[[cell]]
stack = "snapshot-origin"
pattern = "sequential"
[[cell]]
stack = "bare"
pattern = "zipf"
range = "512k"
[[cell]]
stack = "clone"
region = "16k"
block = "4k"
pattern = "strided"
`)
	list := func(c *Cell, first, end int64, once bool) []uint32 {
		return (&load{cell: c, rand: rand.New(rand.NewPCG(1, 1))}).offsets(first, end, once)
	}
	seen := map[uint32]bool{}
	for _, at := range list(cells[0], 4, 10, false) {
		seen[at/4] = true // the region
	}
	if len(seen) != 6 || !seen[4] || !seen[9] {
		t.Errorf("regions %v", seen)
	}
	for i, at := range list(cells[3], 4, 10, false) {
		if at/4 != uint32(4+i) {
			t.Errorf("strided: region %d is %d", i, at/4)
		}
	}
	for i, at := range list(cells[1], 3, 10, false) {
		if at != uint32(3+i) {
			t.Errorf("sequential: block %d is %d", i, at)
		}
	}
	for _, at := range list(cells[2], 5, 50, false) {
		if at < 5 || at >= 50 {
			t.Errorf("zipf: block %d", at)
		}
	}
	jobs := (&load{cell: cells[2], rand: rand.New(rand.NewPCG(1, 1))}).jobs(blank{1 << 20}, nil, false)
	sum := 0
	for _, j := range jobs {
		sum += j.limit
	}
	if len(jobs) != 3 || sum != 128 {
		t.Errorf("%d jobs of %d requests", len(jobs), sum)
	}
}

// TestZipf compares frequencies with the law.
func TestZipf(t *testing.T) {
	for _, theta := range []float64{0.5, 0.99, 1, 1.5} {
		r, z := rand.New(rand.NewPCG(1, 2)), newZipf(theta, 1000)
		const draws = 200_000
		counts := make([]float64, 1001)
		for range draws {
			counts[z.rank(r)]++
		}
		sum := 0.0
		weight := func(k int) float64 { return z.integral(float64(k)+0.5) - z.integral(float64(k)-0.5) }
		for k := 2; k <= 1000; k++ {
			sum += weight(k)
		}
		// The first rank's weight is 1; the curve's integral stands for the others within a few percent.
		for _, k := range []int{1, 2, 10} {
			want := weight(k) / (sum + 1)
			if k == 1 {
				want = 1 / (sum + 1)
			}
			if got := counts[k] / draws; got < 0.9*want || got > 1.1*want {
				t.Errorf("theta %v: rank %d has %.4f, want %.4f", theta, k, got, want)
			}
		}
	}
}

func readDir(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
