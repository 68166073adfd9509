package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"cowherd/api"
	"cowherd/internal/guest"
)

// TestMain lets the test's program adopt others, as the program itself does.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == adoptCommand {
		exit(adopt(os.Args[2:]))
	}
	goleak.VerifyTestMain(m)
}

// TestPlan checks what the tables in plan.go cannot say by their types.
func TestPlan(t *testing.T) {
	for _, s := range plan {
		all := stacks("cowherd")
		for _, name := range s.peers {
			if !slices.Contains(peerNames(), name) || (all[name].clone != nil) != s.clone {
				t.Errorf("%s: peer %q is unknown, or starts otherwise", s.name, name)
			}
		}
		var before []string
		frozen := false
		for _, st := range s.steps {
			if slices.Contains(before, st.name) {
				t.Errorf("%s: two steps are called %q", s.name, st.name)
			}
			if st.against != "" && !slices.Contains(before, st.against) {
				t.Errorf("%s: %q is compared with %q, which is no earlier step", s.name, st.name, st.against)
			}
			if frozen && !st.frozen || st.on == snapshot && !st.frozen {
				t.Errorf("%s: %q has no snapshot", s.name, st.name)
			}
			for n := range st.bars {
				if !slices.Contains(connections, n) {
					t.Errorf("%s: %q has a bar for %d connections", s.name, st.name, n)
				}
			}
			before, frozen = append(before, st.name), st.frozen
		}
	}
	names := cellNames()
	if len(slices.Compact(slices.Sorted(slices.Values(names)))) != len(names) || slices.Contains(names, "clone-idle/4") {
		t.Errorf("cells are not told apart by their names: %q", names)
	}
}

func TestRequests(t *testing.T) {
	tests := []struct {
		name string
		job  job
		span int64
		want int64
	}{
		{"for a time", randomReads, 1 << 20, 0},
		{"each block", eachOnce, 1 << 20, 256},
		{"each stride", eachStride, 1 << 20, 16},
	}
	for _, test := range tests {
		if got := test.job.requests(test.span); got != test.want {
			t.Errorf("%s: %d requests, want %d", test.name, got, test.want)
		}
	}
}

func TestArguments(t *testing.T) {
	tests := []struct {
		name string
		job  job
		want string // the arguments that differ between jobs
	}{
		{"for a time", randomReads, "--rw=randread --size=1048576 --norandommap --time_based --runtime=3"},
		{"each block", eachOnce, "--rw=randwrite --size=262144 --offset_increment=262144 --random_generator=lfsr"},
		{"each stride", eachStride, "--rw=write:61440 --size=262144 --offset_increment=262144 --io_size=16384"},
	}
	for _, test := range tests {
		got := strings.Join(test.job.arguments("nbd://x", 4, 1<<20, 3), " ")
		if !strings.Contains(got, "--uri=nbd://x ") || !strings.Contains(got, "--numjobs=4 ") {
			t.Errorf("%s: %s", test.name, got)
		}
		for _, want := range strings.Fields(test.want) {
			if !slices.Contains(strings.Fields(got), want) {
				t.Errorf("%s: no %s in %s", test.name, want, got)
			}
		}
	}
}

func TestParseFio(t *testing.T) {
	text, err := os.ReadFile("testdata/reads.json")
	if err != nil {
		t.Fatal(err)
	}
	want := result{requests: 277981, iops: 138921.039480, p50: 179.2, p99: 937.984}
	for _, before := range []string{"", "fio: a warning {with brackets}\n"} {
		got, err := parseFio(append([]byte(before), text...))
		if err != nil || got != want {
			t.Errorf("after %q: %+v, %v; want %+v", before, got, err, want)
		}
	}
}

func TestParseFioErrors(t *testing.T) {
	tests := []struct{ name, output, want string }{
		{"empty", "", "no JSON"},
		{"text only", "fio: unknown engine\n", "unknown engine"},
		{"cut short", "{\n\"jobs\": [", "unexpected end"},
		{"no jobs", "{\n\"jobs\": []}", "0 groups"},
		{"error", "{\n\"jobs\": [{\"error\": 5}]}", "input/output error"},
		{"nothing done", "{\n\"jobs\": [{\"error\": 0}]}", "no request"},
	}
	for _, test := range tests {
		if _, err := parseFio([]byte(test.output)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q in it", test.name, err, test.want)
		}
	}
}

func TestCPUTexts(t *testing.T) {
	const name = "7 (a) b (c)) S"
	const stat = name + " 1 7 7 0 -1 4194304 100 200 0 0 11 12 300 45 20 0 1 0 123"
	if got, err := endedChildren(stat); err != nil || got != 345*tick {
		t.Errorf("children: %v, %v", got, err)
	}
	if _, err := endedChildren(name + " 1 7"); err == nil {
		t.Error("children: a short line is accepted")
	}
	if got, err := busyTime("cpu  1 2 4 1000 1000 8 16 32 64 128\ncpu0 9\n"); err != nil || got != 63*tick {
		t.Errorf("busy: %v, %v", got, err)
	}
	for _, text := range []string{"", "cpu 1 2", "cpu 1 2 x 4 5 6 7 8", "intr 1 2 3 4 5 6 7 8 9"} {
		if _, err := busyTime(text); err == nil {
			t.Errorf("busy: %q is accepted", text)
		}
	}
}

func TestProcessCPU(t *testing.T) {
	first, err := processCPU(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for begin := time.Now(); time.Since(begin) < 5*time.Millisecond; {
	}
	second, err := processCPU(os.Getpid())
	if err != nil || second <= first {
		t.Errorf("%v, then %v, %v", first, second, err)
	}
}

func TestForeignShare(t *testing.T) {
	if got := foreignShare(3*time.Second, 2*time.Second, 4*time.Second); got != 0.25 {
		t.Errorf("%v", got)
	}
	if got := foreignShare(2*time.Second, 3*time.Second, 4*time.Second); got != 0 {
		t.Errorf("more used than the machine has: %v", got)
	}
}

func TestMedian(t *testing.T) {
	for want, values := range map[float64][]float64{7: {7}, 3: {9, 3, 1}, 4: {9, 3, 1, 5}} {
		if got := median(values); got != want {
			t.Errorf("median of %v is %v, want %v", values, got, want)
		}
	}
}

func TestQuietest(t *testing.T) {
	x, y := key{ours, "x"}, key{ours, "y"}
	var rounds []round
	for i, noise := range []float64{0.5, 0.1, 0.9, 0.1} {
		rounds = append(rounds, round{x: {foreign: noise, result: result{iops: float64(i)}}, y: {foreign: 1 - noise}})
	}
	tests := []struct {
		keys []key
		n    int
		want []float64
	}{
		{[]key{x}, 1, []float64{1}},
		{[]key{x}, 2, []float64{1, 3}},
		{[]key{x}, 3, []float64{0, 1, 3}},
		{[]key{x}, 5, []float64{0, 1, 2, 3}},
		{[]key{y}, 1, []float64{2}},
		{[]key{x, y}, 1, []float64{0}},
	}
	for _, test := range tests {
		var got []float64
		for _, r := range quietest(rounds, test.keys, test.n) {
			got = append(got, r[x].iops)
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("%d by %v: %v, want %v", test.n, test.keys, got, test.want)
		}
	}
}

func TestQuiet(t *testing.T) {
	c := &cell{scenario: &scenario{name: "made-up", peers: []string{qsdCBW}, steps: []step{{name: "x"}, {name: "y", against: "x"}}}}
	x, y, peer := key{ours, "x"}, key{ours, "y"}, key{qsdCBW, "x"}
	tests := []struct {
		name  string
		round round
		want  int // for how many quiet rounds of each step this round and those before it make
	}{
		{"all quiet", round{x: {foreign: 0.25}, y: {}, peer: {}}, 1},
		{"step", round{x: {}, y: {foreign: 0.3}, peer: {}}, 1},
		{"step compared with", round{x: {foreign: 0.3}, y: {}, peer: {}}, 1},
		{"peer of the other step", round{x: {}, y: {}, peer: {foreign: 0.3}}, 2},
		{"all quiet again", round{x: {}, y: {}, peer: {}}, 3},
	}
	for _, test := range tests {
		c.rounds = append(c.rounds, test.round)
		if !c.quiet(test.want) || c.quiet(test.want+1) {
			t.Errorf("after %s: not %d quiet rounds of each step", test.name, test.want)
		}
	}
}

func TestCheckStatus(t *testing.T) {
	tests := []struct {
		name   string
		state  string
		copied uint64
		want   string
	}{
		{"as expected", api.StateValid, 3, ""},
		{"invalid", api.StateInvalid, 3, "invalid instead of a valid"},
		{"too few", api.StateValid, 2, "4 chunks of its own instead of 5"},
	}
	for _, test := range tests {
		d := api.Device{Name: "vm@s", State: test.state}
		d.Snapshot = &api.Snapshot{CopiedChunks: test.copied, OverwrittenChunks: 2}
		text, err := json.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		err = checkStatus(text, 5)
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
	}
}

// TestTable prints a report of made-up rounds.
func TestTable(t *testing.T) {
	c := &cell{connections: 1, scenario: &scenario{name: "made-up", peers: []string{nbdkitFile, nbdServer}, steps: []step{
		{name: bareOnce, own: true},
		{name: "good", bars: map[int]float64{1: 2}},
		{name: "bad", against: bareOnce, bars: map[int]float64{1: 0.9}},
		{name: "informal"},
		{name: "alone", hydrate: true},
	}}}
	for i := range 3 {
		at := func(iops float64, foreign float64) measurement {
			return measurement{result: result{iops: iops * 1000, p99: 99.4}, cpu: 1.5, foreign: foreign}
		}
		c.rounds = append(c.rounds, round{
			{ours, bareOnce}: at(100, 0),
			{ours, "good"}:   at([]float64{200, 300, 250}[i], 0), {nbdkitFile, "good"}: at(100, 0.3),
			{ours, "bad"}: at(80, 0), {nbdkitFile, "bad"}: at(10, 0),
			{ours, "informal"}: at(80, 0), {nbdkitFile, "informal"}: at(10, 0.25),
			{ours, "alone"}: {result: result{iops: 8e4}, hydrated: []float64{9, 1.25, 0.5}[i]},
		})
	}
	rep := &report{stacks: stacks("cowherd"), Repetitions: 3}
	rep.add(c)
	rep.add(&cell{scenario: &plan[0], connections: 4, failed: map[string]error{nbdServer: errors.New("no luck")}})
	var out strings.Builder
	if err := rep.writeTable(&out); err != nil {
		t.Fatal(err)
	}
	want := `
step                   conns  server       kIOPS  min-max      p99 µs  CPU µs/req  hydrated  ratio  min-max    bar         foreign
bare, each block once  1      cowherd      100.0  100.0-100.0  99      1.5                                                 0%
good                   1      cowherd      250.0  200.0-300.0  99      1.5                                                 0%
good                   1      nbdkit file  100.0  100.0-100.0  99      1.5                   2.50   2.00-3.00  2    PASS   30% noisy
bad                    1      cowherd      80.0   80.0-80.0    99      1.5                   0.80   0.80-0.80  0.9  short  0%
bad                    1      nbdkit file  10.0   10.0-10.0    99      1.5                   8.00   8.00-8.00  -           0%
informal               1      cowherd      80.0   80.0-80.0    99      1.5                                                 0%
informal               1      nbdkit file  10.0   10.0-10.0    99      1.5                   8.00   8.00-8.00  -           25%
alone                  1      cowherd      80.0   80.0-80.0    0       0.0         1.2 s                                   0%
`
	if got := "\n" + out.String(); got != want {
		t.Errorf("got:%s\nwant:%s", got, want)
	}
	if rep.Failed != 1 || len(rep.Notes) != 1 || rep.Notes[0] != "failed: bare-read/4: nbd-server: no luck" || rep.failure() == nil {
		t.Errorf("failed: %d, notes: %q", rep.Failed, rep.Notes)
	}
}

func TestOptions(t *testing.T) {
	good := [][]string{{}, {"-size", "1MiB", "-peers", "none"}, {"-peers", "nbdkit-cow,qsd-cbw", "-only", "x|y"}}
	for _, args := range good {
		if _, err := parseOptions(args, io.Discard); err != nil {
			t.Errorf("%q: %v", args, err)
		}
	}
	bad := [][]string{
		{"-size", "0"}, {"-size", "-1MiB"}, {"-size", "100k"}, {"-size", "many"}, {"-reps", "0"}, {"-retries", "-1"},
		{"-seconds", "0"}, {"-peers", "nbdkit"}, {"-only", "("}, {"more"}, {"-peers", "cowherd"},
	}
	for _, args := range bad {
		if _, err := parseOptions(args, io.Discard); err == nil {
			t.Errorf("%q is accepted", args)
		}
	}
	if _, err := parseOptions([]string{"-h"}, io.Discard); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("-h: %v", err)
	}
}

// runHere runs the program over nbdkit in a directory that it must leave empty.
func runHere(t *testing.T, ctx context.Context, args ...string) (report, error) {
	t.Helper()
	for _, program := range []string{"fio", "nbdkit"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%s is not installed", program)
		}
	}
	dir, err := os.MkdirTemp("", "peers-") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	args = append([]string{"-dir", dir, "-cowherd", dir + "/missing", "-size", "1MiB", "-reps", "1", "-retries", "0", "-json"},
		args...)
	var out, progress strings.Builder
	if err = run(ctx, args, &out, &progress); err != nil {
		t.Logf("what it said: %s", progress.String())
	}
	if left, dirErr := os.ReadDir(dir); dirErr != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, dirErr)
	}
	rep := report{}
	if err == nil {
		if err := json.Unmarshal([]byte(out.String()), &rep); err != nil {
			t.Fatal(err)
		}
	}
	return rep, err
}

// runPatiently is runHere with ever more time, because a second of fio may give nothing to measure on a busy machine.
func runPatiently(t *testing.T, args ...string) (rep report) {
	t.Helper()
	var err error
	for _, seconds := range []string{"1", "3", "9"} {
		if rep, err = runHere(t, t.Context(), append(args, "-seconds", seconds)...); err == nil {
			return rep
		}
	}
	t.Fatal(err)
	return rep
}

func TestRun(t *testing.T) {
	rep := runPatiently(t, "-only", "^bare-write/1|^snapshot-write/4|^stride/1", "-peers", "nbdkit-file,nbdkit-cow")
	var got []string
	for _, r := range rep.Rows {
		got = append(got, r.Cell+" "+r.Server)
		if r.IOPS <= 0 || r.CPUUS <= 0 || r.P99US < r.P50US || r.Ratio != nil {
			t.Errorf("%+v", r)
		}
	}
	want := []string{"bare-write/1 nbdkit file", "snapshot-write/4 nbdkit cow 4k", "snapshot-write/4 nbdkit cow 4k"}
	if !slices.Equal(got, want) {
		t.Errorf("measured %q, want %q", got, want)
	}
	if !strings.HasPrefix(rep.Notes[0], "skipped: cowherd: no ") || !slices.Contains(rep.Notes, "skipped: qsd-cbw: not asked for") ||
		len(rep.Notes) != 1+len(peerNames())-2 {
		t.Errorf("notes: %q", rep.Notes)
	}
}

// TestRunPeers measures each server without snapshots, and those that write to an overlay.
func TestRunPeers(t *testing.T) {
	needed := map[string]bool{}
	for _, s := range stacks("cowherd") {
		if s.name != ours {
			for _, program := range append([]string{s.program}, s.needs...) {
				needed[program] = true
			}
		}
	}
	for program := range needed {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%s is not installed", program)
		}
	}
	rep := runPatiently(t, "-only", "^bare-read/1|^snapshot-write/4|^clone-write/1")
	var got []string
	for _, r := range rep.Rows {
		if r.IOPS <= 0 || r.CPUUS <= 0 {
			t.Errorf("%+v", r)
		}
		got = append(got, r.Server)
	}
	want := []string{"nbdkit file", "nbdkit memory", "qemu-nbd", "nbd-server", "nbdkit cow 4k", "qemu-nbd --snapshot",
		"nbdkit cow 4k", "qemu-nbd --snapshot", "qsd block-stream", "qemu-nbd overlay"}
	if !slices.Equal(got, want) {
		t.Errorf("measured %q, want %q", got, want)
	}
}

// TestRunClones measures a clone with and without hydration.
func TestRunClones(t *testing.T) {
	for _, program := range []string{"qemu-storage-daemon", "qemu-img"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%s is not installed", program)
		}
	}
	var rep report
	var err error
	for _, size := range []string{"64MiB", "256MiB", "1GiB"} { // a small hydration may be over before fio has begun
		rep, err = runHere(t, t.Context(), "-only", "^clone-.*/1", "-seconds", "1", "-peers", "qsd-stream", "-size", size)
		if err == nil {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, r := range rep.Rows {
		got = append(got, r.Cell)
		if r.IOPS <= 0 || r.CPUUS <= 0 || (r.HydratedS > 0) != (r.Cell != "clone-write/1") {
			t.Errorf("%+v", r)
		}
	}
	if want := []string{"clone-write/1", "clone-hydrate/1", "clone-idle/1"}; !slices.Equal(got, want) {
		t.Errorf("measured %q, want %q", got, want)
	}
}

// TestInterrupt ends the program while it measures, or before if the machine is slow: either way nothing is left.
func TestInterrupt(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if _, err := runHere(t, ctx, "-only", "^bare-write/4", "-seconds", "60", "-peers", "nbdkit-file"); err == nil {
		t.Error("it was not interrupted")
	}
}

// TestServerFails starts what is no server, and what is no program.
func TestServerFails(t *testing.T) {
	dir := t.TempDir()
	for name, program := range map[string]string{"ends": "true", "missing": "/nonexistent/nbdkit"} {
		k := &stack{name: name, program: program, start: startNbdkitFile}
		if s, err := startServer(t.Context(), k, false, dir+"/"+name, "image"); err == nil {
			s.stop()
			t.Errorf("%s: it started", name)
		}
		if _, err := os.Stat(dir + "/" + name); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: its directory is left: %v", name, err)
		}
	}
}

// TestKernelRows reads what a guest has left: of a step that was not measured there is no row.
func TestKernelRows(t *testing.T) {
	text, err := os.ReadFile("testdata/reads.json")
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for _, name := range []string{"bare.1.1", "bare.1.2", "first.1.1", "first.1.2", "bare.2.1", "bare.2.2"} {
		files[name] = text
	}
	o := kernelOptions{rounds: 2, jobs: []int{1, 2}}
	rows, err := o.rows(&guest.Result{Files: files})
	if err != nil || len(rows) != 3 {
		t.Fatalf("%d rows, %v", len(rows), err)
	}
	for _, r := range rows {
		if r.Rounds != 2 || r.Ratio != 1 || r.IOPS == 0 {
			t.Errorf("%+v", r)
		}
	}
	var table strings.Builder
	if err := writeKernel(&table, "6.12", rows); err != nil || strings.Count(table.String(), "\n") != 6 {
		t.Errorf("%v\n%s", err, &table)
	}
	files["first.1.2"] = []byte("no JSON")
	if _, err := o.rows(&guest.Result{Files: files}); err == nil {
		t.Error("what is no output of fio was read")
	}
}
