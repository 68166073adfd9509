package plot

import (
	"encoding/xml"
	"errors"
	"io"
	"math"
	"strings"
	"testing"
)

// wellFormed fails unless text is XML; it gives the texts in it.
func wellFormed(t *testing.T, text string) []string {
	t.Helper()
	d := xml.NewDecoder(strings.NewReader(text))
	var texts []string
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return texts
		}
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		if c, ok := token.(xml.CharData); ok {
			texts = append(texts, string(c))
		}
	}
}

func TestLines(t *testing.T) {
	c := &Lines{
		Title: "a < b & c", X: "jobs", Y: "1/s", LogX: true, LogY: true, XTicks: []Tick{{1, "one"}, {8, "eight"}},
		Series: []Series{
			{"first", []Point{{1, 10, 9, 12}, {8, 1000, 900, 1100}}},
			{"second <b>", []Point{{1, 0, 0, 0}, {8, 20, 0, 0}}}, // nothing has no logarithm
		},
	}
	text := c.SVG(true, "made by 'this' & that")
	texts := strings.Join(wellFormed(t, text), "\n")
	for _, want := range []string{"a < b & c", "one", "eight", "jobs", "1/s", "first", "second <b>", "made by 'this' & that"} {
		if !strings.Contains(texts, want) {
			t.Errorf("%q is missing", want)
		}
	}
	if strings.Contains(text, "NaN") || strings.Contains(text, "Inf") {
		t.Error("a place that is no number")
	}
	if inline := c.SVG(false, ""); strings.Contains(inline, "http") {
		t.Error("a part of a page refers to something outside")
	}
}

func TestBars(t *testing.T) {
	for _, c := range []*Bars{
		{Title: "side by side", X: "x", Rows: []string{"r<1>", "r2"}, Series: []Values{
			{"s1", []Point{{0, 1, 0.5, 2}, {0, 3, 3, 3}}}, {"s2", []Point{{0, 0, 0, 0}, {0, 7, 6, 8}}},
		}},
		{Title: "end to end", Stacked: true, Max: 1, Rows: []string{"r<1>", "r2"}, Series: []Values{
			{"s1", []Point{{Y: 0.3}, {Y: 1}}}, {"s2", []Point{{Y: 0.7}, {}}},
		}},
		{Title: "ratios", Log: true, Rows: []string{"r<1>", "r2"}, Series: []Values{{"s1", []Point{{0, 0.1, 0.05, 0.2}, {0, 30, 20, 40}}}}},
		{Title: "nothing"},
	} {
		text := c.SVG(true, "note")
		texts := strings.Join(wellFormed(t, text), "\n")
		for _, want := range append(c.Rows, c.Title) {
			if !strings.Contains(texts, want) {
				t.Errorf("%s: %q is missing", c.Title, want)
			}
		}
		if strings.Contains(text, "NaN") || strings.Contains(text, "Inf") {
			t.Errorf("%s: a place that is no number", c.Title)
		}
	}
}

// TestSeriesDiffer: no two of the first series look alike without colour, nor in colour.
func TestSeriesDiffer(t *testing.T) {
	seen := map[string]int{}
	for i := range 2 * len(colours) {
		d := &drawing{}
		d.marker(i, 0, 0)
		look := stroke(i) + d.String()
		if before, ok := seen[look]; ok {
			t.Errorf("series %d looks like %d", i, before)
		}
		seen[look] = i
	}
}

func TestAxis(t *testing.T) {
	for _, test := range []struct {
		values []float64
		log    bool
	}{
		{[]float64{0, 10}, false}, {[]float64{5}, false}, {nil, false}, {nil, true}, {[]float64{0}, true}, {[]float64{1e-3, 1e6}, true},
		{[]float64{1, 3}, true}, {[]float64{0, 0.02}, false}, {[]float64{-5, 5}, false},
	} {
		a := newAxis(test.values, 100, 500, test.log)
		ticks := a.ticks()
		if len(ticks) == 0 || len(ticks) > 14 {
			t.Errorf("%v: %d ticks", test.values, len(ticks))
		}
		last := 0.0
		for _, tick := range ticks {
			at := a.at(tick.At)
			if math.IsNaN(at) || at < 99 || at > 501 || at < last {
				t.Errorf("%v: tick %v at %v", test.values, tick, at)
			}
			last = at
		}
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.25: "0.25", 12: "12", 1500: "1.5k", 2e7: "20M", 3e9: "3G"} {
		if got := Number(v); got != want {
			t.Errorf("Number(%v) = %s, want %s", v, got, want)
		}
	}
}
