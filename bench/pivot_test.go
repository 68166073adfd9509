package bench

import (
	"bytes"
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestPivot sets a small outcome out in tables, after it has been JSON.
func TestPivot(t *testing.T) {
	_, cells := parse(t, `
[defaults]
stack = "snapshot-origin"
size = "1m"
repetitions = 1
depth = [1, 4]
[[cell]]
name = "first"
engine = ["serialised", "scaled"]
jobs = [1, 2]
compare = "engine"
`)
	ran := runCells(t, cells)
	for i := range ran.Cells {
		c := &ran.Cells[i].Cell
		v := float64(10*c.Jobs + c.Depth)
		if c.Engine == Scaled {
			v *= 3
		}
		ran.Cells[i].Ops = Figure{v, v - 1, v + 1}
	}
	text, err := json.Marshal(ran)
	if err != nil {
		t.Fatal(err)
	}
	read := func() *Outcome {
		o, err := ReadOutcome(bytes.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	for _, test := range []struct {
		name  string
		where map[string][]string
		pivot Pivot
		want  string
	}{
		{"values", map[string][]string{"jobs": {"1"}}, Pivot{Rows: []string{"depth"}, Columns: []string{"engine"}, Quantity: "iops"},
			"| depth | serialised | scaled |\n|---|---|---|\n| 1 | 11.0 (10.0-12.0) | 33.0 (32.0-34.0) |\n| 4 | 14.0 (13.0-15.0) | 42.0 (41.0-43.0) |\n"},
		{"several", nil, Pivot{Rows: []string{"engine"}, Columns: []string{"depth"}, Quantity: "iops"},
			"| engine | 1 | 4 |\n|---|---|---|\n| serialised | 16.0 (11.0-21.0) | 19.0 (14.0-24.0) |\n| scaled | 48.0 (33.0-63.0) | 57.0 (42.0-72.0) |\n"},
		{"ratios", nil, Pivot{Rows: []string{"jobs", "depth"}, Columns: []string{"engine"}, Quantity: "iops", Per: "engine", PerValue: "serialised"},
			"| jobs | depth | scaled |\n|---|---|---|\n| 1 | 1 | 3.00 |\n| 2 | 1 | 3.00 |\n| 1 | 4 | 3.00 |\n| 2 | 4 | 3.00 |\n"},
	} {
		o := read()
		if err := o.Select(nil, test.where); err != nil {
			t.Fatal(err)
		}
		g, err := o.Pivot(test.pivot)
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		if err := g.WriteMarkdown(&b); err != nil || sortedLines(b.String()) != sortedLines(test.want) {
			t.Errorf("%s: %v\n%s\nwant\n%s", test.name, err, b.String(), test.want)
		}
	}
	o := read()
	if err := o.Select(regexp.MustCompile("scaled"), nil); err != nil || len(o.Cells) != 4 || len(o.Compared) != 0 {
		t.Errorf("selected %d cells and %d ratios, %v", len(o.Cells), len(o.Compared), err)
	}
}

// sortedLines are the lines in order: that of the cells is the plan's to say.
func sortedLines(text string) string {
	lines := strings.Split(text, "\n")
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// TestPivotErrors names what is wrong.
func TestPivotErrors(t *testing.T) {
	o := &Outcome{Cells: []CellResult{{Label: "a", Cell: defaultCell()}}}
	for _, test := range []struct {
		err  func() error
		want string
	}{
		{func() error { _, err := o.Pivot(Pivot{Quantity: "speed"}); return err }, "speed"},
		{func() error { _, err := o.Pivot(Pivot{Rows: []string{"colour"}, Quantity: "iops"}); return err }, "colour"},
		{func() error { return o.Select(nil, map[string][]string{"jobs": {"many"}}) }, "many"},
		{func() error { return o.Select(nil, map[string][]string{"taste": {"1"}}) }, "taste"},
		{func() error { _, err := ReadOutcome(strings.NewReader("{}")); return err }, "no results"},
		{func() error { _, err := ReadOutcome(strings.NewReader("table")); return err }, "not the outcome"},
		{func() error { return o.Select(regexp.MustCompile("nothing"), nil) }, "no cell"},
	} {
		if err := test.err(); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("got %v, want something on %q", err, test.want)
		}
	}
}
