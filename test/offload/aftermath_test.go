package offload

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"cowherd/bench"
)

// aftermathPlan copies a file by either method, in place and packed.
const aftermathPlan = `
[[cell]]
stack = "aftermath"
device = "file"
dir = %q
size = "4m"
block = "16k"
depth = 4
time = "20ms"
repetitions = 1
offload = %q
packed = [false, true]
`

// TestAftermath runs what the study measures on file systems that share blocks: what is said to be cloned takes no room
// until it is overwritten, and nothing is left. Others are refused, or are read and written.
func TestAftermath(t *testing.T) {
	for _, kind := range fileSystems {
		t.Run(kind.name, func(t *testing.T) {
			d := mounted(t, kind, diskSize)
			for _, offload := range []string{"off", "only"} {
				o, err := runPlan(t, fmt.Sprintf(aftermathPlan, d.dir, offload))
				if offload == "only" && !kind.shares {
					if err == nil || !strings.Contains(err.Error(), "does not share blocks") {
						t.Errorf("cloned: %v", err)
					}
					continue
				}
				if kind.name == "tmpfs" && err != nil {
					t.Logf("read and written: %v", err) // it has no extents
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				for i := range o.Cells {
					checkAftermath(t, &o.Cells[i])
				}
			}
			if left, err := os.ReadDir(d.dir); err != nil || len(left) > 1 || len(left) == 1 && left[0].Name() != "lost+found" {
				t.Errorf("%v is left, %v", left, err)
			}
		})
	}
}

func runPlan(t *testing.T, text string) (*bench.Outcome, error) {
	t.Helper()
	p, err := bench.ParsePlan("plan", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	cells, err := p.Cells()
	if err != nil {
		t.Fatal(err)
	}
	return (&bench.Runner{Cells: cells, Seed: 1}).Run(t.Context())
}

// checkAftermath compares a result with what its method must come to.
func checkAftermath(t *testing.T, r *bench.CellResult) {
	t.Helper()
	method := "readwrite"
	if r.Cell.Offload == "only" {
		method = "clone"
	}
	if len(r.Methods) != 1 || r.Methods[0].Method != method || r.Methods[0].Bytes != 4*mib {
		t.Errorf("%s: copied by %+v", r.Label, r.Methods)
	}
	f := func(name string) float64 {
		v, ok := r.Further[name]
		if !ok {
			t.Errorf("%s: no %s", r.Label, name)
		}
		return v.Median
	}
	if space := f("copies_space_bytes"); r.Cell.Offload == "only" && space > 2*mib || r.Cell.Offload == "off" && space < 3*mib {
		t.Errorf("%s: the copies take %.0f bytes", r.Label, space)
	}
	if f("copied_extents") < 1 || f("source_extents") < 1 || f("copied_flush_ms") <= 0 || f("copied_read_bytes_per_second") <= 0 {
		t.Errorf("%s: %+v", r.Label, r.Further)
	}
	copied, source := f("copied_overwrites"), f("source_overwrites")
	if copied < 1 || source < 1 || copied > 512 || source > 512 {
		t.Errorf("%s: %v and %v blocks of 1024 were written", r.Label, copied, source)
	}
	if f("copied_overwrite_p50_us") <= 0 || f("copied_overwrite_p99_us") < f("copied_overwrite_p50_us") || f("source_overwrite_p50_us") <= 0 {
		t.Errorf("%s: %+v", r.Label, r.Further)
	}
}
