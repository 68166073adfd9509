package main

import (
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// fakeCopier is a program that stands for cowherd: it runs a line of shell with $from and $to set.
func fakeCopier(t *testing.T, line string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "copier")
	script := "#!/bin/sh\nfor to; do from=$last last=$to; done\n" + line + "\n"
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestCopyOptions(t *testing.T) {
	for args, text := range map[string]string{
		"-size 1000": "multiple of 1 MiB", "-size 3kB": "two meanings", "-reps 0": "at least 1", "x": "only flags", "-only (": "-only",
	} {
		if err := runCopies(t.Context(), strings.Fields(args), io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: got %v, want %q", args, err, text)
		}
	}
}

// TestCopies measures a copier in memory, beside those that are there.
func TestCopies(t *testing.T) {
	dir := t.TempDir()
	args := []string{"-dir", dir, "-disk", dir, "-size", "1MiB", "-reps", "2", "-only", "memory", "-json", "-cowherd"}
	var out strings.Builder
	if err := runCopies(t.Context(), append(args, fakeCopier(t, `cp "$from" "$to"`)), &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	var report struct{ Rows []copyRow }
	if err := json.Unmarshal([]byte(out.String()), &report); err != nil {
		t.Fatal(err)
	}
	for _, cell := range []string{"memory/full", "memory/sparse"} {
		found := false
		for _, r := range report.Rows {
			if r.Cell == cell && r.Tool == ours {
				found = r.Seconds > 0 && r.Least <= r.Seconds && r.Seconds <= r.Most && (r.Bar == 0 || r.Verdict != "")
			}
		}
		if !found {
			t.Errorf("%s: %+v", cell, report.Rows)
		}
	}
	for line, text := range map[string]string{`: > "$to"`: "the copy is wrong", "echo broken; exit 1": "broken"} {
		err := runCopies(t.Context(), append(args, fakeCopier(t, line)), io.Discard, io.Discard)
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: got %v, want %q", line, err, text)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
