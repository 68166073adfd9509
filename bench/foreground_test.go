package bench

import (
	"math/rand/v2"
	"strings"
	"testing"

	"cowherd/kcopyd"
)

// TestForeground: streams of copies by either engine and every method, and beside them a foreground. Its latencies are
// told, its requests are in no count of the streams', and all goes the way that the cell says.
func TestForeground(t *testing.T) {
	_, cells := parse(t, `
[defaults]
stack = "copies"
device = "media"
size = "64m"
block = "64k"
jobs = 2
depth = 4
time = "20ms"
repetitions = 1
counted = true
compare = "engine"
engine = ["serialised", "scaled"]
foreground-rate = 2000
[[cell]]
name = "beside"
offload = ["off", "emulated", "only"]
foreground = ["none", "read", "copy"]
[[cell]]
name = "yielding"
foreground = "copy"
yield = true
[[cell]]
name = "worker"
engine = "serialised"
offload = "worker"
foreground = "copy"
warmup = "5ms"
`)
	if len(cells) != 2*9+2+1 {
		t.Fatalf("%d cells", len(cells))
	}
	o := runCells(t, cells)
	for _, r := range o.Cells {
		if has := r.ForegroundOps.Median > 0 && r.ForegroundP99.Median >= r.ForegroundP50.Median && r.ForegroundP50.Median > 0; has != hasForeground(&r.Cell) {
			t.Errorf("%s: foreground of %+v, p50 %+v", r.Label, r.ForegroundOps, r.ForegroundP50)
		}
		want, offloaded := "readwrite", r.Cell.Offload != offloadOff
		if offloaded {
			want = "device"
		}
		for _, m := range r.Methods {
			if m.Class == kcopyd.CopyOnWrite.String() {
				if m.Method != "readwrite" || r.Cell.Foreground != foregroundCopy {
					t.Errorf("%s: %+v", r.Label, m)
				}
			} else if m.Method != want {
				t.Errorf("%s: %+v", r.Label, m)
			}
		}
		from, to := r.Leaves[0], r.Leaves[1]
		if offloaded && (to.CopiedBytes != 1 || to.Writes != 0 || from.Reads != 0) {
			t.Errorf("%s: from %+v, to %+v", r.Label, from, to)
		}
		if !offloaded && (to.WriteBytes != 1 || from.ReadBytes != 1 || to.Copies != 0) {
			t.Errorf("%s: from %+v, to %+v", r.Label, from, to)
		}
	}
	compared := 0
	for _, c := range o.Compared {
		if strings.HasPrefix(c.Quantity, "foreground") {
			compared++
		}
	}
	if compared != 2*(6+1) {
		t.Errorf("%d ratios of foregrounds", compared)
	}
}

// TestForegroundRange: the streams leave the end of the range to the foreground.
func TestForegroundRange(t *testing.T) {
	_, cells := parse(t, "[[cell]]\nstack = 'copies'\nsize = '16m'\nblock = '64k'\njobs = 3\ntime = '1ms'\nforeground = 'read'\n")
	from := foregroundUnits(cells[0], 256)
	if from != 16 {
		t.Errorf("%d of 256 blocks are the foreground's", from)
	}
	l := &load{cell: cells[0], rand: rand.New(rand.NewPCG(1, 1))}
	for _, j := range l.jobs(nil, nil, false) {
		for _, at := range j.offsets {
			if at >= 240 {
				t.Errorf("a stream copies block %d", at)
			}
		}
	}
	j := l.foreground(&stack{copies: &copies{from: blank{16 << 20}}})
	for _, at := range j.offsets {
		if at < 240*16 || at >= 256*16 {
			t.Errorf("the foreground reads block %d", at)
		}
	}
}
