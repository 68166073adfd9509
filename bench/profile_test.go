package bench

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestStageOf(t *testing.T) {
	for _, c := range []struct {
		stack string // innermost first
		want  stage
	}{
		{"cowherd/dm.(*Device).Submit cowherd/bench.(*job).run", stageGate},
		{"sync/atomic.(*Int64).Add cowherd/dm.(*Device).leave", stageGate},
		{"runtime.memclrNoHeapPointers cowherd/backend/null.(*Device).Submit cowherd/kcopyd.(*subJob).submit", stageLeaf},
		{"runtime.nanotime1 runtime.nanotime time.runtimeNano time.Since cowherd/bench.(*job).now", stageHarness},
		{"cowherd/target/snapshot.(*table).search cowherd/target/snapshot.(*Snapshot).preserve", stageLookUp},
		{"cowherd/target/snapshot.(*table).insert cowherd/target/snapshot.(*Snapshot).claim", stageClaim},
		{"sync.(*Mutex).Lock cowherd/cowstore.(*Transient).Allocate", stageAllocate},
		{"cowherd/target/snapshot.(*Snapshot).publish cowherd/kcopyd.(*core).finish", stageTarget},
		{"cowherd/kcopyd.(*shard).enter cowherd/kcopyd.(*Scaled).dash cowherd/target/snapshot.(*Snapshot).startCopy", stageKcopyd},
		{"cowherd/block.(*Request).Complete cowherd/dm.(*Device).Submit", stageRequest},
		{"runtime.nextFreeFast runtime.mallocgc runtime.newobject cowherd/target/snapshot.(*table).refillLocked", stageMemory},
		{"runtime.scanobject runtime.gcDrain runtime.gcBgMarkWorker", stageMemory},
		{"runtime.futex runtime.notewakeup runtime.goready runtime.send runtime.chansend1 cowherd/bench.(*op).Complete", stageScheduler},
		{"runtime.findRunnable runtime.schedule runtime.park_m runtime.mcall", stageScheduler},
		{"runtime.asyncPreempt cowherd/target/snapshot.(*Snapshot).preserve", stageTarget},
		{"", stageHarness},
	} {
		if got := stageOf(strings.Fields(c.stack)); got != c.want {
			t.Errorf("%s: stage %s, want %s", c.stack, stageNames[got], stageNames[c.want])
		}
	}
}

// TestProfile: a cell's profiles can be read, and its stages add up to the processor time that it took.
func TestProfile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made")
	p, err := ParsePlan("x", []byte(`title = "x"
[[cell]]
name = "later"
stack = "snapshot-origin"
writes = "later"
size = "1m"
jobs = 2
time = "300ms"
repetitions = 1
`))
	if err != nil {
		t.Fatal(err)
	}
	cells, err := p.Cells()
	if err != nil {
		t.Fatal(err)
	}
	o, err := (&Runner{Cells: cells, Seed: 1, Profile: dir, calibration: 1000}).Run(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	var sum, share float64
	for _, s := range o.Cells[0].Stages {
		sum, share = sum+s.NS, share+s.Share
	}
	if sum <= 0 || math.Abs(share-1) > 1e-6 {
		t.Errorf("stages of %g ns and %g of all: %+v", sum, share, o.Cells[0].Stages)
	}
	var table bytes.Buffer
	if err := o.WriteTable(&table); err != nil || !strings.Contains(table.String(), "CPU ns per operation  harness") {
		t.Errorf("%v, table:\n%s", err, &table)
	}
	text, err := os.ReadFile(filepath.Join(dir, "later.1.pb.gz"))
	if err != nil {
		t.Fatal(err)
	}
	known := false
	if err := readProfile(bytes.NewReader(text), func(stack []string, count int64) {
		for _, name := range stack {
			known = known || count > 0 && strings.HasPrefix(name, "cowherd/bench.(*job).run")
		}
	}); err != nil || !known {
		t.Errorf("read the profile: %v, functions known: %v", err, known)
	}
}

func TestBrokenProfile(t *testing.T) {
	packed := func(text string) []byte {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		_, _ = z.Write([]byte(text))
		_ = z.Close()
		return b.Bytes()
	}
	for _, text := range [][]byte{
		nil, []byte("nothing"), packed("\x12"), packed("\x12\x05\x0a"), packed("\x11\x01"), packed("\x80"), packed("\x12\x03\x0a\x01\x80"),
		packed("\x22\x02\x22\x05"), packed("\x2a\x01\x08"),
	} {
		if err := readProfile(bytes.NewReader(text), func([]string, int64) {}); !errors.Is(err, errProfile) {
			t.Errorf("%q: %v", text, err)
		}
	}
}
