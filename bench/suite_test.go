package bench

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"cowherd/internal/invariant"
)

// TestSuites runs every cell of every suite once, tiny, and checks that the outcome is complete and sane. Of the tests of
// device-mapper-test-suite all are multiplied out, and one run.
func TestSuites(t *testing.T) {
	for _, name := range slices.Concat(Suites(), DMTests(), []string{"snap_breaking_throughput"}) {
		t.Run(name, func(t *testing.T) {
			text, err := SuiteText(name)
			if err != nil {
				t.Fatal(err)
			}
			p, err := ParsePlan(name, text)
			if err != nil {
				t.Fatal(err)
			}
			if slices.Contains(DMTests(), name) && !strings.HasPrefix(name, "fio_origin_randwrite_throughput") {
				return
			}
			for key, value := range map[string]string{"time": "2ms", "repetitions": "1", "size": "4m", "copy-latency": "1us"} {
				if err := p.Set(key, value); err != nil {
					t.Fatal(err)
				}
			}
			switch name {
			case "offload":
				err = errors.Join(p.Set("block", "4k", "64k"), p.Set("depth", "4"), p.Set("warmup", "0s"))
			case "kcopyd":
				err = p.Set("jobs", "2")
			case "metadata":
				err = p.Set("count", "300")
			case "clone":
				err = p.Set("range", "1m")
			case "snapshot":
				if invariant.Enabled {
					// Two writes of one job in flight to one block of a device in memory race, as they do on any device.
					err = p.Set("depth", "1")
				}
			}
			cells, err2 := p.Cells()
			if err != nil || err2 != nil {
				t.Fatal(err, err2)
			}
			o, err := (&Runner{Cells: cells, Seed: 1, calibration: 1 << 8}).Run(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			checkOutcome(t, o, cells)
		})
	}
}

// checkOutcome checks what holds for any outcome.
func checkOutcome(t *testing.T, o *Outcome, cells []*Cell) {
	t.Helper()
	if len(o.Cells) != len(cells) {
		t.Fatalf("%d results of %d cells", len(o.Cells), len(cells))
	}
	for _, r := range o.Cells {
		if r.Runs < 1 || r.Ops.Median <= 0 || r.Mean.Median <= 0 || r.P99.Median < r.P50.Median || len(r.Percentiles) == 0 {
			t.Errorf("implausible: %+v", r)
		}
		if r.Ops.Min > r.Ops.Median || r.Ops.Max < r.Ops.Median {
			t.Errorf("%s: a median out of its range: %+v", r.Label, r.Ops)
		}
	}
	for _, c := range o.Compared {
		if c.Value <= 0 || c.Pairs < 1 {
			t.Errorf("implausible: %+v", c)
		}
	}
}
