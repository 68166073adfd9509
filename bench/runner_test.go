package bench

import (
	"context"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"cowherd/block"
)

// TestOrder: a repetition runs a group forward and back; a cell alone runs once.
func TestOrder(t *testing.T) {
	for n, want := range map[int][]int{1: {0}, 2: {0, 1, 1, 0}, 3: {0, 1, 2, 2, 1, 0}} {
		if got := order(n); !slices.Equal(got, want) {
			t.Errorf("order(%d) = %v, want %v", n, got, want)
		}
	}
}

// TestGroups: who is compared with whom.
func TestGroups(t *testing.T) {
	_, cells := parse(t, `
[defaults]
size = "1m"
jobs = [1, 2]
depth = 1
[[cell]]
name = "bare"
[[cell]]
name = "first"
stack = "snapshot-origin"
engine = ["serialised", "scaled"]
compare = "engine"
against = "bare"
[[cell]]
name = "alone"
stack = "mapped"
[[cell]]
name = "copies"
stack = "copies"
jobs = 1
copy-latency = "1us"
offload = ["off", "only"]
compare = "offload"
[[cell]]
name = "fill"
stack = ["transfer", "hydration"]
jobs = 1
compare = "stack"
`)
	var got []string
	for _, g := range groupsOf(cells) {
		var members []string
		for _, c := range g {
			var to []string
			for _, b := range bases(c, g) {
				to = append(to, strings.TrimSpace(b.Name+" "+b.Engine))
			}
			members = append(members, strings.TrimSpace(c.Name+" "+c.Engine)+" "+c.get("jobs")+" to ["+strings.Join(to, ", ")+"]")
		}
		got = append(got, strings.Join(members, "; "))
	}
	want := []string{
		"bare 1 to []; first serialised 1 to [bare]; first scaled 1 to [first serialised, bare]",
		"bare 2 to []; first serialised 2 to [bare]; first scaled 2 to [first serialised, bare]",
		"alone 1 to []", "alone 2 to []",
		"copies scaled 1 to []; copies scaled 1 to [copies scaled]",
		"fill 1 to []; fill scaled 0 to [fill]",
	}
	if !slices.Equal(got, want) {
		t.Errorf("groups:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestRatios: ratios are of runs of the same half of a repetition, and the middle one is told with the ends.
func TestRatios(t *testing.T) {
	a, b := &Cell{Name: "a", Jobs: 2}, &Cell{Name: "b", Jobs: 2}
	run := func(rate int64) *sampled { return once(time.Second, time.Second, rate, rate) }
	o := &Outcome{}
	o.compare(a, b, map[*Cell][]*sampled{
		a: {run(10), run(40), run(90), run(100)},
		b: {run(10), run(20), run(30), run(200)},
	})
	i := slices.IndexFunc(o.Compared, func(c Comparison) bool { return c.Quantity == "iops" })
	if c := o.Compared[i]; c.Value != 1.5 || c.Min != 0.5 || c.Max != 3 || c.Pairs != 4 || c.What != "a/b" {
		t.Errorf("%+v", c)
	}
}

// stalling is a device that answers at once, but for one request that takes long, and all that come meanwhile.
type stalling struct {
	blank
	at, length time.Duration
	began      time.Time
	stalled    bool
}

func (d *stalling) Submit(r *block.Request) {
	if d.began.IsZero() {
		d.began = time.Now()
	}
	if !d.stalled && time.Since(d.began) > d.at {
		d.stalled = true
		time.Sleep(d.length)
	}
	r.Complete(nil)
}

// TestPaced: a device that stalls for a tenth of the time shows it in a tenth of the latencies, though only one request
// was in flight meanwhile; without a pace only that one shows it.
func TestPaced(t *testing.T) {
	const requests, stall = 1000, 50 * time.Millisecond
	measure := func(interval float64) measurement {
		offsets := make([]uint32, requests)
		j := newJob(&stalling{blank: blank{1 << 20}, at: 100 * time.Millisecond, length: stall}, 0, 1, block.OpWrite, 512, 512, offsets)
		j.interval = interval
		if interval == 0 {
			j.limit = math.MaxInt
			j.until.Store(int64(200 * time.Millisecond))
		}
		m, err := runJobs([]*job{j})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	m := measure(float64(500 * time.Microsecond)) // half a second
	if m.count != requests {
		t.Fatalf("%d requests", m.count)
	}
	if took := m.elapsed; took < 480*time.Millisecond {
		t.Errorf("too fast: %v", took)
	}
	// 100 requests were due in the stall, the first 50 ms too late, the last on time.
	if p95 := time.Duration(m.latency.ValueAtQuantile(95)); p95 < stall/4 {
		t.Errorf("p95 %v hides the stall", p95)
	}
	if p99 := time.Duration(m.latency.ValueAtQuantile(99)); p99 < stall*3/4 {
		t.Errorf("p99 %v hides the stall", p99)
	}
	closed := measure(0)
	if p99 := time.Duration(closed.latency.ValueAtQuantile(99)); p99 > stall/4 {
		t.Errorf("without a pace the stall is one latency of %d, but p99 is %v", closed.count, p99)
	}
}

// TestBounds: a run ends with its time, and what began in the warm-up is not measured.
func TestBounds(t *testing.T) {
	j := newJob(blank{1 << 20}, 0, 4, block.OpWrite, 512, 512, make([]uint32, 7))
	j.limit, j.from = math.MaxInt, int64(20*time.Millisecond)
	j.until.Store(int64(300 * time.Millisecond))
	m, err := runJobs([]*job{j})
	if err != nil {
		t.Fatal(err)
	}
	if m.count == 0 || m.count >= m.sent || m.elapsed < 30*time.Millisecond || m.elapsed > 10*time.Second {
		t.Errorf("%d of %d in %v", m.count, m.sent, m.elapsed)
	}
	j = newJob(blank{1 << 20}, 0, 4, block.OpWrite, 512, 512, make([]uint32, 7))
	j.from = int64(20 * time.Millisecond)
	if _, err := runJobs([]*job{j}); !errors.Is(err, errWarmup) {
		t.Errorf("over before it is warm: %v", err)
	}
}

// TestMix: the share of reads is as asked for.
func TestMix(t *testing.T) {
	_, cells := parse(t, `
[[cell]]
read = 30
counted = true
size = "64m"
jobs = 2
repetitions = 1
device = ["null", "mem"]
`)
	o := runCells(t, cells)
	for _, r := range o.Cells {
		leaf := r.Leaves[0]
		// By write: 0.3 / 0.7 reads.
		if math.Abs(leaf.Reads-30.0/70) > 0.03 || math.Abs(leaf.Writes-1) > 0.01 || leaf.Role != roleDevice {
			t.Errorf("%s: %+v", r.Label, leaf)
		}
	}
}

func runCells(t *testing.T, cells []*Cell) *Outcome {
	t.Helper()
	o, err := (&Runner{Cells: cells, Seed: 1, calibration: 1 << 8}).Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	checkOutcome(t, o, cells)
	return o
}

// TestAmplification counts what reaches the leaves for each write: bare, for the first time, and later.
func TestAmplification(t *testing.T) {
	_, cells := parse(t, `
[defaults]
size = "4m"
jobs = 2
repetitions = 1
counted = true
device = ["null", "mem", "file"]
dir = "`+t.TempDir()+`"
[[cell]]
name = "bare"
[[cell]]
name = "first"
stack = "snapshot-origin"
[[cell]]
name = "later"
stack = "snapshot-origin"
writes = "later"
`)
	for _, r := range runCells(t, cells).Cells {
		device, cow := r.Leaves[0], LeafResult{}
		if len(r.Leaves) > 1 {
			cow = r.Leaves[1]
		}
		first := 0.0
		if r.Cell.Name == "first" {
			first = 1
		}
		if device.Writes != 1 || device.WriteBytes != 1 || device.Reads != first || cow.Writes != first || cow.WriteBytes != first {
			t.Errorf("%s: device %+v, COW %+v", r.Label, device, cow)
		}
		if r.Copied.Median != first {
			t.Errorf("%s: %v bytes copied a byte", r.Label, r.Copied.Median)
		}
	}
}

// TestOffload: "only" means that nothing is read and written, or an error; copies are counted through the counters.
func TestOffload(t *testing.T) {
	_, cells := parse(t, `
[defaults]
size = "4m"
block = "64k"
chunk = "64k"
jobs = 2
repetitions = 1
counted = true
[[cell]]
name = "copies"
stack = "copies"
offload = ["off", "only"]
engine = ["serialised", "scaled"]
[[cell]]
name = "chunks"
stack = "snapshot-origin"
block = "4k"
offload = ["off", "only"]
[[cell]]
name = "worker"
stack = "copies"
engine = "serialised"
offload = "worker"
`)
	for _, r := range runCells(t, cells).Cells {
		want := "device"
		if r.Cell.Offload == offloadOff {
			want = "readwrite"
		}
		if len(r.Methods) != 1 || r.Methods[0].Method != want || r.Methods[0].Share != 1 {
			t.Errorf("%s: %+v", r.Label, r.Methods)
		}
	}
}

// TestFile: nothing is left in the directory, whatever the stack.
func TestFile(t *testing.T) {
	dir := t.TempDir()
	_, cells := parse(t, `
[defaults]
size = "4m"
device = "file"
dir = "`+dir+`"
jobs = 2
repetitions = 1
region = "64k"
[[cell]]
stack = ["bare", "snapshot-origin", "snapshot", "clone", "copies", "mapped", "hydration"]
[[cell]]
stack = "transfer"
data = [0, 30, 100]
[[cell]]
name = "persistent"
stack = "snapshot-origin"
store = "persistent"
`)
	for _, r := range runCells(t, cells).Cells {
		if r.Cell.Stack != stackTransfer {
			continue
		}
		copied := 0.0
		for _, m := range r.Methods {
			if m.Method == "readwrite" {
				copied = m.Share
			}
		}
		if want := map[int]float64{0: 0, 30: 0.25, 100: 1}[r.Cell.Data]; copied != want { // one MiB of four
			t.Errorf("%s: %v of it was copied, want %v", r.Label, copied, want)
		}
	}
	if left := readDir(t, dir); len(left) > 0 {
		t.Errorf("%v is left", left)
	}
}

// TestRemote: the link's bandwidth bounds what is copied.
func TestRemote(t *testing.T) {
	_, cells := parse(t, `
[defaults]
device = "remote"
latency = "100us"
bandwidth = "64m"
size = "4m"
jobs = 2
repetitions = 1
[[cell]]
stack = ["bare", "copies"]
block = "64k"
`)
	for _, r := range runCells(t, cells).Cells {
		if mib := r.Bytes.Median / (1 << 20); mib > 70 || mib < 1 {
			t.Errorf("%s: %.0f MiB/s over a link of 64", r.Label, mib)
		}
	}
}

// TestStopped: a run that is stopped says so, and tells what was next.
func TestStopped(t *testing.T) {
	_, cells := parse(t, "[[cell]]\nsize = '1m'\njobs = 1\nrepetitions = 5\n")
	ctx, cancel := context.WithCancel(t.Context())
	told := 0
	x := &Runner{Cells: cells, Progress: func(done, all int, what string) {
		if done != told || all != 5 || what == "" {
			t.Errorf("progress %d of %d: %q", done, all, what)
		}
		if told++; told == 2 {
			cancel()
		}
	}}
	if _, err := x.Run(ctx); !errors.Is(err, context.Canceled) || told != 2 {
		t.Errorf("%v after %d runs", err, told)
	}
}

// TestInterrupted: a run that would take an hour, paced or not, warming up or not, ends when it is told to.
func TestInterrupted(t *testing.T) {
	for _, text := range []string{"time = '1h'", "time = '1h'\nrate = 0.1", "warmup = '1h'\ntime = '1h'\nrate = 100"} {
		_, cells := parse(t, "[[cell]]\nsize = '1m'\nrepetitions = 1\n"+text+"\n")
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		if _, err := (&Runner{Cells: cells, calibration: 1 << 8}).Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", text, err)
		}
		cancel()
	}
}
