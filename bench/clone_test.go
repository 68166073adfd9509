package bench

import (
	"os"
	"testing"
)

// TestClone runs a tiny suite and checks that the report is complete and sane.
func TestClone(t *testing.T) {
	report, err := Clone(t.Context(), CloneConfig{
		Jobs: 2, Depth: 4, RegionBytes: 64 << 10, WriteBytes: 4096, Regions: 1 << 9, Dir: t.TempDir(), HydrateBytes: 4 << 20,
		Repetitions: 1, Seed: 1,
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(report.Results) != 6 || len(report.Ratios) != 4 {
		t.Fatalf("%d results and %d ratios", len(report.Results), len(report.Ratios))
	}
	for _, r := range report.Results {
		if r.IOPS <= 0 && r.MiBps <= 0 {
			t.Errorf("implausible result: %+v", r)
		}
	}
	if err := report.WriteTable(os.Stderr); err != nil {
		t.Fatal(err)
	}
}
