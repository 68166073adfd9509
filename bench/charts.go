package bench

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"cowherd/bench/plot"
)

// chart is a picture of a report.
type chart struct {
	file    string // its name, without an extension
	section string
	wide    bool
	svg     func(standalone bool, note string) string
}

// Limits of a report: with more it would be read by nobody.
const (
	chartsMax = 40 // of one kind
	rowsMax   = 40 // of one chart of bars
)

// charts are all pictures of the outcome.
func (o *Outcome) charts() []chart {
	var list []chart
	for _, axis := range []string{"jobs", "chunk", "block", "depth"} {
		list = append(list, o.over(axis)...)
	}
	if len(list) == 0 {
		list = o.bars("throughput", "Throughput", "operations a second", func(r *CellResult) []namedFigure {
			return []namedFigure{{"iops", r.Ops}}
		}, false)
	}
	list = append(list, o.latencies()...)
	list = append(list, o.ratios()...)
	list = append(list, o.queueShares()...)
	list = append(list, o.methods()...)
	list = append(list, o.further()...)
	return append(list, o.amplification()...)
}

// facet is the results that one chart shows, and what they have in common.
type facet struct {
	title   string
	results []*CellResult
}

// facets are results by the conditions in which they differ, but for those of axis.
func (o *Outcome) facets(axis string) []facet {
	var cells []*Cell
	for i := range o.Cells {
		cells = append(cells, &o.Cells[i].Cell)
	}
	var keys []field
	for _, f := range fields() {
		if f.key != axis && f.key != "range" && slices.Contains(conditions, f.key) && differ(cells, f) {
			keys = append(keys, f)
		}
	}
	var list []facet
	for i := range o.Cells {
		r := &o.Cells[i]
		var parts []string
		for _, f := range keys {
			if f.used == nil || f.used(&r.Cell) {
				parts = append(parts, nameOf(f, &r.Cell))
			}
		}
		title := strings.Join(parts, ", ")
		at := slices.IndexFunc(list, func(f facet) bool { return f.title == title })
		if at < 0 {
			at, list = len(list), append(list, facet{title: title})
		}
		list[at].results = append(list[at].results, r)
	}
	return list
}

// nameOf is a field's value as it stands in titles.
func nameOf(f field, c *Cell) string {
	if _, ok := f.value(c).(choice); ok && !slices.Contains(ambiguous, f.key) {
		return f.value(c).String()
	}
	return f.key + " " + f.value(c).String()
}

// subject is what of a cell's label is neither a condition nor the axis: the name of its series.
func subject(c *Cell, all []*Cell, axis string) string {
	parts := []string{c.Name}
	for _, f := range fields() {
		if f.key == axis || slices.Contains(conditions, f.key) || slices.Contains(unlabelled, f.key) || f.used != nil && !f.used(c) || !differ(all, f) {
			continue
		}
		parts = append(parts, nameOf(f, c))
	}
	return strings.Join(parts, ", ")
}

// named are the cells of the same name.
func (o *Outcome) named(name string) []*Cell {
	var list []*Cell
	for i := range o.Cells {
		if o.Cells[i].Cell.Name == name {
			list = append(list, &o.Cells[i].Cell)
		}
	}
	return list
}

// over are throughput and latency against a condition that varies: a chart for each combination of the others.
func (o *Outcome) over(axis string) []chart {
	f, _ := fieldOf(axis)
	var list []chart
	number := 0
	for _, facet := range o.facets(axis) {
		var rates, latencies, foregrounds []plot.Series
		var ticks []plot.Tick
		for _, r := range facet.results {
			if f.used != nil && !f.used(&r.Cell) || !differ(o.named(r.Cell.Name), f) {
				continue
			}
			x := axisValue(&r.Cell, axis)
			if !slices.ContainsFunc(ticks, func(t plot.Tick) bool { return t.At == x }) {
				ticks = append(ticks, plot.Tick{At: x, Text: f.value(&r.Cell).String()})
			}
			name := subject(&r.Cell, o.named(r.Cell.Name), axis)
			rates = addPoint(rates, name, x, rateOver(axis, r))
			latencies = addPoint(latencies, name, x, r.Mean)
			if hasForeground(&r.Cell) {
				foregrounds = addPoint(foregrounds, name, x, r.ForegroundP99)
			}
		}
		if len(ticks) < 2 || number >= chartsMax/2 {
			continue
		}
		unit := "operations a second"
		switch axis {
		case "block":
			unit = "bytes a second"
		case "chunk":
			unit = "bytes copied a second"
		}
		for _, c := range []struct {
			file, y string
			series  []plot.Series
		}{{"throughput", unit, rates}, {"latency", "mean latency, µs", latencies}, {"foreground", "p99 of the foreground, µs", foregrounds}} {
			if len(c.series) == 0 {
				continue
			}
			lines := &plot.Lines{
				Title: strings.TrimSuffix(fmt.Sprintf("%s over %s: %s", upper(c.file), axis, facet.title), ": "), X: axis, Y: c.y, LogX: true, LogY: true,
				XTicks: ticks, Series: c.series,
			}
			list = append(list, chart{fmt.Sprintf("%s-%s-%d", c.file, axis, number), "Throughput and latency over " + axis, false, lines.SVG})
		}
		number++
	}
	return list
}

// rateOver is the rate that is drawn over an axis of sizes: operations of different sizes say little.
func rateOver(axis string, r *CellResult) Figure {
	switch axis {
	case "block":
		return r.Bytes
	case "chunk":
		return Figure{r.Bytes.Median * r.Copied.Median, r.Bytes.Min * r.Copied.Median, r.Bytes.Max * r.Copied.Median}
	}
	return r.Ops
}

func upper(s string) string { return strings.ToUpper(s[:1]) + s[1:] }

// axisValue is where a cell lies on an axis of jobs, chunks, blocks or depths.
func axisValue(c *Cell, axis string) float64 {
	switch axis {
	case "jobs":
		return float64(c.Jobs)
	case "chunk":
		return float64(c.Chunk)
	case "block":
		return float64(c.Block)
	}
	return float64(c.Depth)
}

// addPoint adds a figure to the series of a name, in order of x.
func addPoint(list []plot.Series, name string, x float64, f Figure) []plot.Series {
	i := slices.IndexFunc(list, func(s plot.Series) bool { return s.Name == name })
	if i < 0 {
		i, list = len(list), append(list, plot.Series{Name: name})
	}
	list[i].Points = append(list[i].Points, plot.Point{X: x, Y: f.Median, Low: f.Min, High: f.Max})
	slices.SortStableFunc(list[i].Points, func(a, b plot.Point) int { return int(math.Copysign(1, a.X-b.X)) })
	return list
}

// latencies are the curves of percentiles: a chart for each combination of conditions. The axis is logarithmic in what is
// left to 100 %.
func (o *Outcome) latencies() []chart {
	var list []chart
	for _, facet := range o.facets("") {
		c := &plot.Lines{
			Title: strings.TrimSuffix("Latencies: "+facet.title, ": "), X: "percentile of all runs", Y: "latency, µs", LogX: true, LogY: true, Bare: true,
		}
		most := 10.0
		for _, r := range facet.results {
			s := plot.Series{Name: subject(&r.Cell, o.named(r.Cell.Name), "")}
			for _, p := range r.Percentiles {
				if left := 100 - p.Percent; left > 0 {
					s.Points = append(s.Points, plot.Point{X: 100 / left, Y: p.US})
					most = max(most, 100/left)
				}
			}
			if len(s.Points) > 1 {
				c.Series = append(c.Series, s)
			}
		}
		for at, text := 1.0, "0%"; at <= most; at *= 10 {
			c.XTicks = append(c.XTicks, plot.Tick{At: at, Text: text})
			text = strconv.FormatFloat(100-10/at, 'f', -1, 64) + "%"
		}
		if len(c.Series) > 0 && len(list) < chartsMax {
			list = append(list, chart{fmt.Sprintf("percentiles-%d", len(list)), "Distribution of latencies", false, c.SVG})
		}
	}
	return list
}

// namedFigure is a bar.
type namedFigure struct {
	name   string
	figure Figure
}

// bars are charts with a row for each cell of which of gives any figures.
func (o *Outcome) bars(file, section, x string, of func(r *CellResult) []namedFigure, stacked bool) []chart {
	var rows []string
	var values [][]namedFigure
	for i := range o.Cells {
		if v := of(&o.Cells[i]); len(v) > 0 {
			rows, values = append(rows, o.Cells[i].Label), append(values, v)
		}
	}
	return barCharts(file, section, x, rows, values, stacked, false)
}

// barCharts cuts rows into charts that fit a page.
func barCharts(file, section, x string, rows []string, values [][]namedFigure, stacked, log bool) []chart {
	var list []chart
	for from := 0; from < len(rows) && len(list) < chartsMax; from += rowsMax {
		end := min(from+rowsMax, len(rows))
		c := &plot.Bars{Title: section, X: x, Rows: rows[from:end], Stacked: stacked, Log: log}
		for n, row := range values[from:end] {
			for _, v := range row {
				i := slices.IndexFunc(c.Series, func(s plot.Values) bool { return s.Name == v.name })
				if i < 0 {
					i, c.Series = len(c.Series), append(c.Series, plot.Values{Name: v.name, Points: make([]plot.Point, end-from)})
				}
				c.Series[i].Points[n] = plot.Point{Y: v.figure.Median, Low: v.figure.Min, High: v.figure.Max}
			}
		}
		if stacked && x == shareOfAll {
			c.Max = 1
		}
		list = append(list, chart{fmt.Sprintf("%s-%d", file, len(list)), section, true, c.SVG})
	}
	return list
}

const shareOfAll = "share of all"

// ratios are a chart for each quantity.
func (o *Outcome) ratios() []chart {
	var list []chart
	for _, quantity := range comparedQuantities {
		var rows []string
		var values [][]namedFigure
		for _, c := range o.Compared {
			if c.Quantity == quantity {
				where := strings.TrimPrefix(c.Of, c.of.Name)
				if c.of.Engine != "" && strings.Contains(c.What, " "+c.of.Engine+"/") {
					where = strings.TrimSuffix(where, ", "+c.of.Engine) // it has been said
				}
				rows = append(rows, c.What+where)
				values = append(values, []namedFigure{{quantity, Figure{c.Value, c.Min, c.Max}}})
			}
		}
		name := strings.ReplaceAll(strings.ReplaceAll(quantity, " ", "-"), "/", "-")
		list = append(list, barCharts("ratio-"+strings.ToLower(name), "Ratios of "+quantity, "ratio", rows, values, false, true)...)
	}
	return list
}

// queueShares are what each queue issued.
func (o *Outcome) queueShares() []chart {
	return o.bars("queues", "Share of each queue", shareOfAll, func(r *CellResult) []namedFigure {
		var list []namedFigure
		if r.Busiest.Median == 0 {
			return nil
		}
		for i, v := range r.Queues {
			if i < 6 {
				list = append(list, namedFigure{"queue " + strconv.Itoa(i), Figure{Median: v}})
			} else if i == 6 {
				list = append(list, namedFigure{"the others", Figure{Median: v}})
			} else {
				list[6].figure.Median += v
			}
		}
		return list
	}, true)
}

// methods are the bytes that were copied, by method.
func (o *Outcome) methods() []chart {
	return o.bars("methods", "Bytes copied by each method", shareOfAll, func(r *CellResult) []namedFigure {
		var list []namedFigure
		for _, m := range r.Methods {
			i := slices.IndexFunc(list, func(n namedFigure) bool { return n.name == m.Method })
			if i < 0 {
				i, list = len(list), append(list, namedFigure{name: m.Method})
			}
			list[i].figure.Median += m.Share
		}
		return list
	}, true)
}

// further are a chart for each quantity that only some stacks tell.
func (o *Outcome) further() []chart {
	var list []chart
	for _, name := range o.furtherNames() {
		title := strings.ReplaceAll(name, "_", " ")
		list = append(list, o.bars("further-"+strings.ReplaceAll(name, "_", "-"), title, title, func(r *CellResult) []namedFigure {
			if f, ok := r.Further[name]; ok {
				return []namedFigure{{title, f}}
			}
			return nil
		}, false)...)
	}
	return list
}

// amplification is what was done for each byte that the jobs wrote: as the leaves counted, or as far as the engines know.
func (o *Outcome) amplification() []chart {
	return o.bars("amplification", "Bytes moved for each byte of the jobs", "bytes for each byte", func(r *CellResult) []namedFigure {
		if len(r.Leaves) == 0 {
			if r.Copied.Median == 0 {
				return nil
			}
			return []namedFigure{{"written by the jobs", Figure{Median: 1}}, {"copied by engines", r.Copied}}
		}
		var list []namedFigure
		for _, l := range r.Leaves {
			list = append(list, namedFigure{l.Role + ", read", Figure{Median: l.ReadBytes}}, namedFigure{l.Role + ", written", Figure{Median: l.WriteBytes}})
			if l.CopiedBytes > 0 {
				list = append(list, namedFigure{l.Role + ", offloaded", Figure{Median: l.CopiedBytes}})
			}
		}
		return list
	}, true)
}
