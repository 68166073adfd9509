package bench

import (
	"os"
	"testing"
)

// TestMapped runs a tiny suite and checks that the report is complete and sane.
func TestMapped(t *testing.T) {
	c := MappedConfig{
		Devices: []string{"null", "mem"}, Jobs: []int{1, 2}, Depths: []int{1, 4}, RequestBytes: 4096, Requests: 1 << 10, Repetitions: 2,
	}
	report, err := Mapped(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if cells := 2 * 2 * 2 * 2; len(report.Results) != 3*cells || len(report.Ratios) != 2*cells {
		t.Fatalf("%d results and %d ratios of %d cells", len(report.Results), len(report.Ratios), cells)
	}
	for _, r := range report.Results {
		if r.IOPS <= 0 || r.MeanNS <= 0 || r.P99NS <= 0 {
			t.Errorf("implausible result: %+v", r)
		}
	}
	if err := report.WriteTable(os.Stderr); err != nil {
		t.Fatal(err)
	}
	c.Devices = []string{"disk"}
	if _, err := Mapped(t.Context(), c); err == nil {
		t.Error("a device that does not exist")
	}
}
