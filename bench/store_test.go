package bench

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"testing"
)

// TestStore runs the suite small: every figure is there, and no file is left.
func TestStore(t *testing.T) {
	c := StoreConfig{Dir: t.TempDir(), Jobs: 2, Depth: 4, ChunkBytes: 4096, Chunks: 600, Records: 1000, Repetitions: 2, Seed: 1}
	told := 0
	c.Progress = func(done, all int, _ string) {
		if done != told || all != 4 {
			t.Errorf("progress %d of %d, want %d of 4", done, all, told)
		}
		told++
	}
	report, err := Store(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range report.Results {
		if r.IOPS <= 0 || r.MeanUS <= 0 || r.P99US <= 0 || (r.RecordsPerFlush > 0) != (r.Store == Persistent) {
			t.Errorf("%+v", r)
		}
	}
	if o := report.Open; told != 4 || report.Ratio.Value <= 0 || o.Records != 1000 || o.OpenMS <= 0 || o.ReadMS <= 0 || o.Ratio <= 0 {
		t.Errorf("%+v, %+v", report.Ratio, o)
	}
	var table bytes.Buffer
	if err := report.WriteTable(&table); err != nil || !strings.Contains(table.String(), "persistent/transient") {
		t.Errorf("%v: %s", err, table.String())
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	c.Progress = nil
	if _, err := Store(ctx, c); !errors.Is(err, context.Canceled) {
		t.Errorf("stopped: %v", err)
	}
	if left, err := os.ReadDir(c.Dir); err != nil || len(left) > 0 {
		t.Errorf("%v is left, %v", left, err)
	}
}
