package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
)

// ReadOutcome reads what a run printed as JSON.
func ReadOutcome(r io.Reader) (*Outcome, error) {
	var o Outcome
	if err := json.NewDecoder(r).Decode(&o); err != nil {
		return nil, fmt.Errorf("bench: not the outcome of a run: %w", err)
	}
	if len(o.Cells) == 0 {
		return nil, fmt.Errorf("bench: not the outcome of a run: it has no results")
	}
	return &o, nil
}

// Select keeps the cells whose labels match only (nil: all) and which have, for each key of where, one of its values.
// The ratios that remain are those between cells that do.
func (o *Outcome) Select(only *regexp.Regexp, where map[string][]string) error {
	accepted := map[string][]string{}
	for key, values := range where {
		f, err := fieldOf(key)
		if err != nil {
			return err
		}
		for _, text := range values {
			var c Cell // the value as the field prints it
			v := f.value(&c)
			if err := v.set(text); err != nil {
				return fmt.Errorf("%s: %w", key, err)
			}
			accepted[key] = append(accepted[key], v.String())
		}
	}
	kept := map[string]bool{}
	o.Cells = slices.DeleteFunc(o.Cells, func(r CellResult) bool {
		keep := only == nil || only.MatchString(r.Label)
		for key, values := range accepted {
			keep = keep && slices.Contains(values, r.Cell.get(key))
		}
		kept[r.Label] = keep
		return !keep
	})
	o.Compared = slices.DeleteFunc(o.Compared, func(c Comparison) bool { return !kept[c.Of] || !kept[c.To] })
	if len(o.Cells) == 0 {
		return fmt.Errorf("bench: no cell is left")
	}
	return nil
}

// A Pivot says how results are set out in a table.
type Pivot struct {
	Rows, Columns []string // keys of plans
	Quantity      string   // one of Quantities, or of what only some stacks tell
	// Per and PerValue: each figure is divided by that of the cell that differs in nothing but that its key Per has PerValue.
	// Without such a cell there is no figure.
	Per, PerValue string
}

// A Grid is a table of figures. Where several cells fall on one place it has the median of their medians, the least
// and the greatest; otherwise the median of one cell's runs, the least and the greatest of them (of a ratio only the
// medians').
type Grid struct {
	Title string   `json:"title"`
	Head  []string `json:"head"` // the keys of the rows, then a name for each column
	Rows  []Row    `json:"rows"`
}

// Row is a row of a Grid.
type Row struct {
	Keys    []string  `json:"keys"`
	Figures []*Figure `json:"figures"` // nil: no cell
}

// Quantities are the names of what results tell.
func Quantities() []string {
	var names []string
	for _, q := range quantities() {
		names = append(names, q.name)
	}
	return names
}

// Pivot sets the results out in a table.
func (o *Outcome) Pivot(p Pivot) (*Grid, error) {
	for _, key := range slices.Concat(p.Rows, p.Columns, []string{p.Per}) {
		if key == "" {
			continue
		}
		if _, err := fieldOf(key); err != nil {
			return nil, err
		}
	}
	of, err := o.quantity(p.Quantity)
	if err != nil {
		return nil, err
	}
	g := &Grid{Title: p.Quantity, Head: slices.Clone(p.Rows)}
	if p.Per != "" {
		g.Title += fmt.Sprintf(", as a ratio to that with %s %s", p.Per, p.PerValue)
	}
	found := map[[2]string][]Figure{}
	var rows, columns []string
	for i := range o.Cells {
		r := &o.Cells[i]
		f, ok := o.figureOf(r, p, of)
		if !ok {
			continue
		}
		row, column := keysOf(&r.Cell, p.Rows), keysOf(&r.Cell, p.Columns)
		if !slices.Contains(rows, row) {
			rows = append(rows, row)
		}
		if !slices.Contains(columns, column) {
			columns = append(columns, column)
		}
		found[[2]string{row, column}] = append(found[[2]string{row, column}], f)
	}
	for _, column := range columns {
		g.Head = append(g.Head, strings.Join(strings.Split(column, "\x00"), ", "))
	}
	for _, row := range rows {
		x := Row{Keys: strings.Split(row, "\x00")}
		for _, column := range columns {
			x.Figures = append(x.Figures, together(found[[2]string{row, column}]))
		}
		g.Rows = append(g.Rows, x)
	}
	return g, nil
}

// quantity is what gives the figure of a name: one of Quantities, or one that only some stacks tell. nil: the cell has none.
func (o *Outcome) quantity(name string) (func(*CellResult) *Figure, error) {
	for _, q := range quantities() {
		if q.name == name {
			return q.set, nil
		}
	}
	further := o.furtherNames()
	if slices.Contains(further, name) {
		return func(r *CellResult) *Figure {
			if f, ok := r.Further[name]; ok {
				return &f
			}
			return nil
		}, nil
	}
	return nil, fmt.Errorf("%q is none of the quantities %s", name, strings.Join(append(Quantities(), further...), ", "))
}

// keysOf are the values of keys, joined by a character that none has.
func keysOf(c *Cell, keys []string) string {
	var values []string
	for _, key := range keys {
		values = append(values, c.get(key))
	}
	return strings.Join(values, "\x00")
}

// figureOf is the figure of a result, or its ratio to that of its base.
func (o *Outcome) figureOf(r *CellResult, p Pivot, of func(*CellResult) *Figure) (Figure, bool) {
	x := of(r)
	if x == nil {
		return Figure{}, false
	}
	f := *x
	if p.Per == "" {
		return f, true
	}
	if r.Cell.get(p.Per) == p.PerValue {
		return f, false
	}
	for i := range o.Cells {
		base := &o.Cells[i]
		if base.Cell.get(p.Per) != p.PerValue || !differOnlyIn(&r.Cell, &base.Cell, p.Per) {
			continue
		}
		to := of(base)
		if to == nil {
			continue
		}
		v := f.Median / to.Median
		return Figure{v, v, v}, !math.IsNaN(v) && !math.IsInf(v, 0)
	}
	return f, false
}

// differOnlyIn tells whether two cells have all that matters in common but for one key. What is none of the conditions
// of the workload (how long, how often, compared with what) does not matter, nor does what only one of them has.
func differOnlyIn(a, b *Cell, key string) bool {
	for _, f := range fields() {
		if f.key == key || slices.Contains(unlabelled, f.key) && f.key != "name" || f.used != nil && (!f.used(a) || !f.used(b)) {
			continue
		}
		if a.get(f.key) != b.get(f.key) {
			return false
		}
	}
	return true
}

// together is one figure for those that fall on one place.
func together(list []Figure) *Figure {
	switch len(list) {
	case 0:
		return nil
	case 1:
		return &list[0]
	}
	var medians []float64
	for _, f := range list {
		medians = append(medians, f.Median)
	}
	f := figure(medians)
	return &f
}

// text is a figure with its spread, as a table has it.
func (f *Figure) text() string {
	switch {
	case f == nil:
		return ""
	case f.Min == f.Max:
		return scaledShort(f.Median)
	}
	return fmt.Sprintf("%s (%s-%s)", scaledShort(f.Median), scaledShort(f.Min), scaledShort(f.Max))
}

// scaledShort is short with the prefixes of SI for what is large.
func scaledShort(v float64) string {
	for _, unit := range []struct {
		of   float64
		name string
	}{{1e9, "G"}, {1e6, "M"}, {1e3, "k"}} {
		if v >= 10*unit.of || unit.of > 1e3 && v >= unit.of {
			return short(v/unit.of) + unit.name
		}
	}
	return short(v)
}

// lines are the rows as text, the head first.
func (g *Grid) lines() [][]string {
	list := [][]string{g.Head}
	for _, r := range g.Rows {
		line := slices.Clone(r.Keys)
		for _, f := range r.Figures {
			line = append(line, f.text())
		}
		list = append(list, line)
	}
	return list
}

// WriteTable prints the table for people.
func (g *Grid) WriteTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "%s:\n\n", g.Title)
	for _, line := range g.lines() {
		fmt.Fprintln(t, strings.Join(line, "\t"))
	}
	return t.Flush()
}

// WriteMarkdown prints the table as Markdown has it.
func (g *Grid) WriteMarkdown(w io.Writer) error {
	var b strings.Builder
	for i, line := range g.lines() {
		fmt.Fprintf(&b, "| %s |\n", strings.Join(line, " | "))
		if i == 0 {
			b.WriteString("|" + strings.Repeat("---|", len(line)) + "\n")
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}
