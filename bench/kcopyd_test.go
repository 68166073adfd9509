package bench

import (
	"os"
	"testing"
)

// TestKcopyd runs a tiny suite and checks that the report is complete and sane.
func TestKcopyd(t *testing.T) {
	c := DefaultKcopydConfig()
	c.Chunks, c.Repetitions, c.Jobs = 1<<10, 2, []int{1, 2}
	report, err := Kcopyd(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	cells := len(c.Devices) * len(c.Jobs) * len(c.Depths)
	if len(report.Results) != 5*cells || len(report.Ratios) != 5*cells {
		t.Fatalf("%d results and %d ratios, want %d each", len(report.Results), len(report.Ratios), 5*cells)
	}
	for _, r := range report.Results {
		if r.IOPS <= 0 || r.MeanUS <= 0 || r.P99US < r.P50US {
			t.Errorf("implausible result: %+v", r)
		}
		if r.Workload == FirstWrite && r.Engine == Serialised && r.QueueShare != 1 {
			t.Errorf("the serialised engine has one issuer, share is %v", r.QueueShare)
		}
	}
	if err := report.WriteTable(os.Stderr); err != nil {
		t.Fatal(err)
	}
}
