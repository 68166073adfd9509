package main

import (
	"encoding/csv"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cowherd/bench"
)

// tiny makes a suite take no time.
var tiny = []string{"--size", "1m", "--jobs", "1", "--depth", "1,2", "--repetitions", "1", "--time", "1ms"}

func TestBench(t *testing.T) {
	list := cowherd(t, "bench", "--list")
	for _, name := range append(bench.Suites(), bench.DMTests()...) {
		list.want(t, exitOK, name+"\n", "")
	}
	cowherd(t, append([]string{"bench", "kcopyd", "--device", "null"}, tiny...)...).want(t, exitOK, "first-write scaled/serialised iops", "")
	dir := t.TempDir()
	args := append([]string{"bench", "kcopyd", "--device", "null", "--only", "^first", "--json", "--report", dir}, tiny...)
	r := cowherd(t, args...)
	var o bench.Outcome
	if err := json.Unmarshal([]byte(r.stdout), &o); err != nil || len(o.Cells) != 6 || len(o.Compared) == 0 || o.Machine.CPUs < 1 {
		t.Errorf("%v: %+v", err, o)
	}
	if _, err := os.Stat(filepath.Join(dir, "report.html")); err != nil {
		t.Error(err)
	}
	brief := cowherd(t, append([]string{"bench", "kcopyd", "--device", "null", "--only", "^first", "--brief"}, tiny...)...)
	var kept bench.Outcome
	if err := json.Unmarshal([]byte(brief.stdout), &kept); err != nil || len(kept.Cells) != 6 || len(kept.Compared) != len(o.Compared) ||
		kept.Cells[0].Percentiles != nil || kept.Cells[0].Ops.Median == 0 || kept.Machine != o.Machine {
		t.Errorf("%v: %+v", err, kept)
	}
	if lines := strings.Count(brief.stdout, "\n"); lines != 10+len(kept.Cells)+len(kept.Compared) {
		t.Errorf("%d lines", lines)
	}
	r = cowherd(t, append([]string{"bench", "fio_origin_randwrite_latency_N", "--csv"}, tiny...)...)
	if rows, err := csv.NewReader(strings.NewReader(r.stdout)).ReadAll(); err != nil || len(rows) != 5 {
		t.Errorf("%d rows, %v, %s", len(rows), err, r.stderr)
	}
	cowherd(t, "bench", "kcopyd", "--chunk", "8k", "--chunks", "64", "--list", "--device", "mem").want(t, exitOK, "later-write, jobs 8, depth 32, scaled", "")
}

// TestBenchPlans: a suite's plan is the start of one's own, which flags overrule.
func TestBenchPlans(t *testing.T) {
	plan := cowherd(t, "bench", "plan", "snap_breaking_throughput")
	plan.want(t, exitOK, `name = "snap_breaking_throughput_N"`, "")
	file := filepath.Join(t.TempDir(), "mine.toml")
	if err := os.WriteFile(file, []byte(plan.stdout), 0o600); err != nil {
		t.Fatal(err)
	}
	r := cowherd(t, "bench", "run", file, "--list", "--set", "chunk=4k,8k", "--set", "block=64k", "--set", "engine=scaled")
	if want := "snap_breaking_throughput_N, chunk 4KiB\nsnap_breaking_throughput_N, chunk 8KiB\n"; r.stdout != want {
		t.Errorf("%+v, want %q", r, want)
	}
	if err := os.WriteFile(file, []byte("[[cell]]\nname = 'a'\nstak = 'bare'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cowherd(t, "bench", "run", file).want(t, exitError, "", file+":3: stak: there is no such key")
	cowherd(t, "bench", "run", file+"x").want(t, exitError, "", "no such file")
	cowherd(t, "bench", "plan", "kcopyd", "--json").want(t, exitOK, `"suite":"kcopyd"`, "")
}

func TestBenchMistakes(t *testing.T) {
	for _, test := range []struct{ args, want string }{
		{"", "which suite"},
		{"steam", `no suite "steam"`},
		{"plan steam", `no suite "steam"`},
		{"kcopyd --jobs 0", `--jobs: "0" is not a number from 1 to 1024`},
		{"kcopyd --set jobs", `--set: "jobs" is not KEY=VALUE`},
		{"kcopyd --set job=1", "--set: job: there is no such key"},
		{"kcopyd --device drum", "--device: "},
		{"kcopyd --device file", "dir: "},
		{"kcopyd --only (", "--only: "},
		{"kcopyd --only nothing", `no cell matches "nothing"`},
		{"kcopyd --json --csv", "exclude each other"},
		{"kcopyd --json --brief", "exclude each other"},
		{"kcopyd --chunks -5", "--chunks: "},
		{"kcopyd --chunk 5000 --chunks 5", "--chunk: "},
		{"kcopyd --chunk 5000", "chunk: 5000 is not a power of two"},
	} {
		cowherd(t, strings.Fields("bench "+test.args)...).want(t, exitUsage, "", test.want)
	}
}
