package metrics

import (
	"bytes"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// parse reads a page as Prometheus's own parser does.
func parse(t *testing.T, page string) map[string]*dto.MetricFamily {
	t.Helper()
	p := expfmt.NewTextParser(model.LegacyValidation)
	families, err := p.TextToMetricFamilies(strings.NewReader(page))
	if err != nil {
		t.Fatalf("%v in:\n%s", err, page)
	}
	return families
}

// TestParsed has a page with something of everything read by Prometheus's own parser.
func TestParsed(t *testing.T) {
	families := parse(t, scrape(t))
	types := map[kind]dto.MetricType{
		counter: dto.MetricType_COUNTER, gauge: dto.MetricType_GAUGE, histogram: dto.MetricType_HISTOGRAM, quantiles: dto.MetricType_SUMMARY,
	}
	count := 0
	for _, list := range [][]metric{known, ofRuntime, ofProcess} {
		for _, m := range list {
			count++
			f := families[m.name]
			if f == nil {
				t.Errorf("%s is not there", m.name)
				continue
			}
			if f.GetHelp() != m.help || f.GetType() != types[m.kind] {
				t.Errorf("%s: %s, %v", m.name, f.GetHelp(), f.GetType())
			}
			for _, x := range f.Metric {
				if len(x.Label) != len(m.labels) {
					t.Errorf("%s: labels %v, want %v", m.name, x.Label, m.labels)
				}
			}
		}
	}
	if len(families) != count {
		t.Errorf("%d metrics, want %d", len(families), count)
	}
	h := families["cowherd_copy_duration_seconds"].Metric[0].Histogram
	if h.GetSampleCount() != 5 || len(h.Bucket) < 10 || !math.IsInf(h.Bucket[len(h.Bucket)-1].GetUpperBound(), 1) {
		t.Errorf("histogram: %v", h)
	}
	for i, b := range h.Bucket[1:] {
		if before := h.Bucket[i]; b.GetUpperBound() <= before.GetUpperBound() || b.GetCumulativeCount() < before.GetCumulativeCount() {
			t.Errorf("histogram: %v after %v", b, before)
		}
	}
	for name, least := range map[string]float64{
		"go_goroutines": 1, "go_memstats_sys_bytes": 1 << 20, "process_open_fds": 3, "process_max_fds": 4,
		"process_resident_memory_bytes": 1 << 20, "process_virtual_memory_bytes": 1 << 20, "process_start_time_seconds": 1.6e9,
	} {
		if v := families[name].Metric[0].GetGauge().GetValue(); v < least {
			t.Errorf("%s is %v", name, v)
		}
	}
}

// FuzzPage has values and labels of all kinds read by Prometheus's own parser, which must find what was put.
func FuzzPage(f *testing.F) {
	f.Add("vm", `a "quoted" \ back
slash`, 1.5)
	f.Add("\xff", "", math.Inf(-1))
	f.Add("}", "\\n", math.NaN())
	f.Add(" ", "\r\t\x00é", 1e300)
	f.Fuzz(func(t *testing.T, first, second string, value float64) {
		p := newPage([]metric{{"some", first, gauge, []string{"z", "a"}}, {"never", "-", counter, nil}})
		p.put("some", value, first, second)
		p.put("some", 2, second+"2", first)
		var b bytes.Buffer
		p.writeTo(&b)
		families := parse(t, b.String())
		if len(families) != 1 || len(families["some"].Metric) != 2 {
			t.Fatalf("got %v of %q", families, b.String())
		}
		m := families["some"].Metric[0]
		labels := map[string]string{}
		for _, l := range m.Label {
			labels[l.GetName()] = l.GetValue()
		}
		if labels["z"] != strings.ToValidUTF8(first, "\uFFFD") || labels["a"] != strings.ToValidUTF8(second, "\uFFFD") {
			t.Errorf("labels %q, want %q and %q", labels, first, second)
		}
		if got := m.Gauge.GetValue(); got != value && !(math.IsNaN(got) && math.IsNaN(value)) {
			t.Errorf("got %v, want %v", got, value)
		}
	})
}

// TestTooManyScrapes asks for more pages at the same time than there may be.
func TestTooManyScrapes(t *testing.T) {
	inside, leave := make(chan struct{}), make(chan struct{})
	h := NewHandler(func() *Sample { inside <- struct{}{}; <-leave; return full() })
	ask := func() int {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
		return w.Code
	}
	codes := make(chan int)
	for range scrapesMax {
		go func() { codes <- ask() }()
		<-inside
	}
	if code := ask(); code != http.StatusServiceUnavailable {
		t.Errorf("one more scrape: status %d", code)
	}
	close(leave)
	for range scrapesMax {
		if code := <-codes; code != http.StatusOK {
			t.Errorf("status %d", code)
		}
	}
}
