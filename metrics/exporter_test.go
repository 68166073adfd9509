package metrics

import (
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// full is a sample that has something of everything.
func full() *Sample {
	var h Histogram
	for _, d := range []time.Duration{500, 5000, 5000, 2 * time.Second, time.Minute} {
		h.Record(d, 1)
	}
	latency := h.Snapshot()
	return &Sample{
		Version: "1.2", Engine: "scaled", Events: 7, Yields: 3,
		Devices: []DeviceSample{{
			Name: "vm", Kind: "origin", State: "live", Size: 1 << 30, Connections: 4, Open: 2, InFlight: 1,
			Commands: map[string]CommandSample{"write": {10, 40960, 1}},
		}},
		Snapshots: []SnapshotSample{{
			Name: "vm@a", Origin: "vm", Valid: true, Chunk: 4096, Used: 8192, Limit: 1 << 20, Merging: true, ChunksTotal: 2,
		}},
		Clones:  []CloneSample{{Name: "web", Writable: true, Region: 65536, Regions: 16, Hydrated: 3, Failed: 1}},
		Remotes: []RemoteSample{{Device: "web", Wanted: 4, Open: 3, Reconnects: 2}},
		Engines: []EngineSample{{
			Device: "vm@a", Jobs: 5, Fallbacks: map[string]uint64{"no-method": 2},
			Methods: []MethodSample{{Class: "cow", Method: "readwrite", Operations: 5, Bytes: 20480, Latency: &latency}},
		}},
		Throttles: []ThrottleSample{{Class: "merge", Rate: 1 << 20, Share: 0.5, Waits: 9}},
	}
}

// scrape is the text that Prometheus gets.
func scrape(t *testing.T) string {
	t.Helper()
	w := httptest.NewRecorder()
	NewHandler(full).ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != 200 {
		t.Fatalf("status %d: %s", w.Code, w.Body)
	}
	return w.Body.String()
}

func TestScrape(t *testing.T) {
	text := scrape(t)
	for _, line := range []string{
		`cowherd_build_info{engine="scaled",version="1.2"} 1`,
		`cowherd_events_total 7`,
		`cowherd_export_bytes_total{command="write",device="vm"} 40960`,
		`cowherd_snapshot_valid{device="vm@a",origin="vm"} 1`,
		`cowherd_clone_writable{device="web"} 1`,
		`cowherd_clone_source_in_use{device="web"} 0`,
		`cowherd_clone_hydrated_regions{device="web"} 3`,
		`cowherd_clone_failed_regions{device="web"} 1`,
		`cowherd_remote_connections{device="web"} 3`,
		`cowherd_remote_reconnects_total{device="web"} 2`,
		`cowherd_copy_bytes_total{class="cow",device="vm@a",method="readwrite"} 20480`,
		`cowherd_copy_duration_seconds_bucket{class="cow",device="vm@a",method="readwrite",le="1.024e-06"} 1`,
		`cowherd_copy_duration_seconds_bucket{class="cow",device="vm@a",method="readwrite",le="1.6384e-05"} 3`,
		`cowherd_copy_duration_seconds_bucket{class="cow",device="vm@a",method="readwrite",le="4.294967296"} 4`,
		`cowherd_copy_duration_seconds_bucket{class="cow",device="vm@a",method="readwrite",le="+Inf"} 5`,
		`cowherd_copy_duration_seconds_count{class="cow",device="vm@a",method="readwrite"} 5`,
		`cowherd_copy_fallbacks_total{device="vm@a",reason="no-method"} 2`,
		`cowherd_throttle_share_ratio{class="merge"} 0.5`,
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("missing: %s", line)
		}
	}
	if !strings.Contains(text, "\ngo_goroutines ") {
		t.Error("the runtime's metrics are missing")
	}
}

// TestDocs compares what is exported with the page that lists it, name, kind, labels and words.
func TestDocs(t *testing.T) {
	page, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	var listed []string
	for _, row := range regexp.MustCompile("(?m)^\\| `(cowherd_\\w+)` \\| (\\w+) \\| (.*) \\| (.*) \\|$").FindAllStringSubmatch(string(page), -1) {
		listed = append(listed, row[1])
		i := slices.IndexFunc(known, func(m metric) bool { return m.name == row[1] })
		if i < 0 {
			t.Errorf("docs/metrics.md lists %s, which there is not", row[1])
			continue
		}
		labels := "-"
		if len(known[i].labels) > 0 {
			labels = "`" + strings.Join(known[i].labels, "`, `") + "`"
		}
		if row[3] != labels || row[4] != known[i].help {
			t.Errorf("docs/metrics.md says of %s: %s, %s", row[1], row[3], row[4])
		}
		if !strings.Contains(scrape(t), "# TYPE "+row[1]+" "+row[2]+"\n") {
			t.Errorf("%s is not exported as a %s", row[1], row[2])
		}
	}
	for _, m := range known {
		if !slices.Contains(listed, m.name) {
			t.Errorf("docs/metrics.md does not list %s", m.name)
		}
		if (m.kind == counter) != strings.HasSuffix(m.name, "_total") {
			t.Errorf("%s: a counter ends in _total, and nothing else does", m.name)
		}
	}
}
