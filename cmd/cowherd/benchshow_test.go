package main

import (
	"os"
	"path/filepath"
	"testing"
)

// TestBenchShow prints the outcome of a run once more.
func TestBenchShow(t *testing.T) {
	r := cowherd(t, append([]string{"bench", "kcopyd", "--device", "null", "--only", "^first", "--json"}, tiny...)...)
	file := filepath.Join(t.TempDir(), "outcome.json")
	if err := os.WriteFile(file, []byte(r.stdout), 0o600); err != nil {
		t.Fatal(err)
	}
	show := func(args ...string) result { return cowherd(t, append([]string{"bench", "show", file}, args...)...) }
	show().want(t, exitOK, "first-write scaled/serialised iops", "")
	show("--rows", "depth", "--columns", "engine", "--markdown").want(t, exitOK, "| depth | onelock | serialised | scaled |", "")
	show("--rows", "depth", "--columns", "engine", "--where", "depth=1", "--per", "engine=serialised", "--json").
		want(t, exitOK, `"title": "iops, as a ratio to that with engine serialised"`, "")
	show("--csv", "--only", "scaled").want(t, exitOK, "label,runs,", "")
	for want, args := range map[string][]string{
		"exclude each other": {"--json", "--csv"},
		"need --rows":        {"--markdown"},
		"colour":             {"--rows", "colour"},
		"KEY=VALUE":          {"--rows", "jobs", "--per", "engine"},
		"no cell":            {"--where", "jobs=7"},
	} {
		show(args...).want(t, exitUsage, "", want)
	}
	cowherd(t, "bench", "show", "/dev/null").want(t, exitError, "", "not the outcome of a run")
}
