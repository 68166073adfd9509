package main

import (
	"encoding/json"
	"errors"
	"flag"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// madeUp is a report of made-up rounds in which nbd-server is skipped, and one of the peers fails.
func madeUp() *report {
	c := &cell{
		connections: 1, failed: map[string]error{nbdkitMemory: errors.New("no luck")},
		scenario: &scenario{name: "made-up", peers: []string{nbdkitFile, nbdkitMemory, nbdServer, qemuNBD}, steps: []step{
			{name: bareOnce, job: eachOnce, own: true},
			{name: firstWrites, job: eachOnce, frozen: true, bars: map[int]float64{1: 3}},
			{name: laterWrites, job: eachOnce, frozen: true, against: bareOnce, bars: map[int]float64{1: 0.9}},
			{name: "filling", job: randomWrites, hydrate: true},
			{name: "filling alone", job: nothing, hydrate: true},
		}},
	}
	for i := range 3 {
		at := func(iops float64) measurement {
			return measurement{result: result{iops: iops * 1000}, hydrated: 100 / iops}
		}
		c.rounds = append(c.rounds, round{
			{ours, bareOnce}: at(200), {ours, firstWrites}: at([]float64{80, 100, 120}[i]), {ours, laterWrites}: at(190),
			{nbdkitFile, firstWrites}: at(40), {nbdkitFile, laterWrites}: at(50),
			{ours, "filling"}: at(50), {nbdkitFile, "filling"}: at(100),
			{ours, "filling alone"}: at(50), {nbdkitFile, "filling alone"}: at(25),
		})
	}
	rep := &report{stacks: stacks("cowherd"), Repetitions: 3}
	rep.stacks[nbdServer].skipped = "no nbd-server"
	rep.stacks[qemuNBD].skipped = notAsked
	rep.add(c)
	return rep
}

func TestRatios(t *testing.T) {
	rep := madeUp()
	kernel := &kernelReport{Kernel: "6.12.117+deb12-cloud-amd64", Rows: []kernelRow{
		{Step: "the null device", name: bareStep, Jobs: 1, Ratio: 1},
		{Step: "origin: first writes", name: "first", beside: firstWrites, Jobs: 1, Ratio: 0.25, Min: 0.2, Max: 0.5},
		{Step: "origin: first writes", name: "first", beside: firstWrites, Jobs: 2, Ratio: 0.25, Min: 0.2, Max: 0.5},
		{Step: "linear", name: "linear", Jobs: 1, Ratio: 0.9},
	}}
	lines := append(rep.ratios, kernel.ratios(rep)...)
	lines = append(lines, comparison{Part: copyPart, Shape: "copy", Unit: unitSeconds, Ours: 0.25, Peer: "cp", Theirs: 0.5, Noisy: true,
		Ratio: &ratio{Median: 2, Min: 1.5, Max: 2.5}})
	var out strings.Builder
	if err := writeRatios(&out, lines); err != nil {
		t.Fatal(err)
	}
	want := `
shape                         jobs  cowherd       peer                            its figure              ratio  min-max    bar
first writes with a snapshot  1     100.0 k/s     nbdkit file                     40.0 k/s                2.50   2.00-3.00  3    short
first writes with a snapshot  1     100.0 k/s     nbdkit memory                   failed
first writes with a snapshot  1     100.0 k/s     nbd-server                      skipped: no nbd-server
later writes with a snapshot  1     190.0 k/s     cowherd: bare, each block once  200.0 k/s               0.95   0.95-0.95  0.9  PASS
later writes with a snapshot  1     190.0 k/s     nbdkit file                     50.0 k/s                3.80   3.80-3.80  -
later writes with a snapshot  1     190.0 k/s     nbdkit memory                   failed
later writes with a snapshot  1     190.0 k/s     nbd-server                      skipped: no nbd-server
filling                       1     50.0 k/s      nbdkit file                     100.0 k/s               0.50   0.50-0.50  -
filling: until all is         1     2.000 s       nbdkit file                     1.000 s                 0.50   0.50-0.50  -
filling                       1     50.0 k/s      nbdkit memory                   failed
filling                       1     50.0 k/s      nbd-server                      skipped: no nbd-server
filling alone                 -     2.000 s       nbdkit file                     4.000 s                 2.00   2.00-2.00  -
filling alone                 -     2.000 s       nbdkit memory                   failed
filling alone                 -     2.000 s       nbd-server                      skipped: no nbd-server
origin: first writes          1     0.50 of bare  Linux 6.12.117                  0.25 of bare            2.00   0.80-3.00  -
origin: first writes          2     -             Linux 6.12.117                  0.25 of bare
linear                        1     -             Linux 6.12.117                  0.90 of bare
copy                          -     0.250 s       cp                              0.500 s                 2.00   1.50-2.50  -     noisy
`
	if got := "\n" + out.String(); got != want {
		t.Errorf("got:%s\nwant:%s", got, want)
	}
}

// TestRatiosJSON checks that what a program reads says the same.
func TestRatiosJSON(t *testing.T) {
	text, err := json.Marshal(madeUp().ratios[0])
	const want = `{"part":"servers","shape":"first writes with a snapshot","jobs":1,"unit":"k/s","cowherd":100,"peer":"nbdkit file","peer_figure":40,` +
		`"ratio":{"against":"nbdkit file","median":2.5,"min":2,"max":3,"bar":3,"verdict":"short"}}`
	if err != nil || string(text) != want {
		t.Errorf("%v\n%s\nwant\n%s", err, text, want)
	}
}

func TestAllOptions(t *testing.T) {
	for args, text := range map[string]string{
		"x": "only flags", "-parts x": "is not one of", "-only (": "-only", "-save /nonexistent/x": "no directory",
	} {
		if _, err := parseAllOptions(strings.Fields(args), io.Discard); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: got %v, want %q", args, err, text)
		}
	}
	if _, err := parseAllOptions([]string{"-h"}, io.Discard); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("-h: %v", err)
	}
	for args, text := range map[string]string{"all -reps 0 -parts copy": "-reps", "all -size 3kB -parts kernel,servers": "two meanings", "all -size 3 -parts servers": "multiple of",
		"all -reps 0 -parts kernel": "-reps", "most": "is not one of"} {
		if err := run(t.Context(), strings.Fields(args), io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: got %v, want %q", args, err, text)
		}
	}
}

// TestAll measures a program that is no server but copies: one part fails, and the other is told of all the same. There is
// no lab, which is no failure.
func TestAll(t *testing.T) {
	for _, program := range []string{"fio", "nbdkit", "qemu-nbd"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%s is not installed", program)
		}
	}
	dir, err := os.MkdirTemp("", "peers-") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	saved := filepath.Join(t.TempDir(), "figures.json")
	var out strings.Builder
	err = run(t.Context(), []string{"all", "-reps", "1", "-seconds", "1", "-size", "1MiB", "-only", "^snapshot-write/1|memory/full",
		"-dir", dir, "-disk", dir, "-lab", "false", "-save", saved, "-cowherd", fakeCopier(t, `cp "$from" "$to"`)}, &out, io.Discard)
	if err == nil || !strings.Contains(err.Error(), "servers: ") || strings.Contains(err.Error(), "copy: ") {
		t.Errorf("failures: %v", err)
	}
	text, err := os.ReadFile(saved)
	if err != nil {
		t.Fatal(err)
	}
	var rep allReport
	if err := json.Unmarshal(text, &rep); err != nil {
		t.Fatal(err)
	}
	copied := slices.IndexFunc(rep.Ratios, func(l comparison) bool { return l.Shape == "copy, memory/full" && l.Ratio != nil })
	served := slices.IndexFunc(rep.Ratios, func(l comparison) bool { return l.Peer == "qemu-nbd --snapshot" && l.Theirs > 0 })
	if copied < 0 || served < 0 || rep.Servers == nil || rep.Copies == nil || rep.Kernel != nil {
		t.Errorf("%s", text)
	}
	if !strings.Contains(strings.Join(rep.Notes, "\n"), "skipped: the kernel's targets: ") || !strings.Contains(out.String(), "qemu-nbd --snapshot") {
		t.Errorf("notes: %q; printed:\n%s", rep.Notes, &out)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
