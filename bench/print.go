package bench

import (
	"encoding/csv"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

// WriteTable prints the outcome for people.
func (o *Outcome) WriteTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "cell\tkIOPS\tMiB/s\tmean µs\tp50 µs\tp99 µs\tp99.9 µs\tCPU µs\tbusiest\tcopied\tspread")
	for _, r := range o.Cells {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%.0f%%\n", r.Label, short(r.Ops.Median/1000),
			short(r.Bytes.Median/(1<<20)), short(r.Mean.Median), short(r.P50.Median), short(r.P99.Median), short(r.P999.Median),
			short(r.CPU.Median), percent(r.Busiest.Median), short(r.Copied.Median), 100*r.Ops.Spread())
	}
	o.writeStages(t)
	for _, name := range o.furtherNames() {
		fmt.Fprintf(t, "\n%s\tmedian\tmin\tmax\n", name)
		for _, r := range o.Cells {
			if f, ok := r.Further[name]; ok {
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", r.Label, short(f.Median), short(f.Min), short(f.Max))
			}
		}
	}
	if len(o.Compared) > 0 {
		fmt.Fprintln(t, "\nratio\tof\tmedian\tmin\tmax\tpairs")
		for _, c := range o.Compared {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%d\n", c.Name, c.Of, short(c.Value), short(c.Min), short(c.Max), c.Pairs)
		}
	}
	return t.Flush()
}

// writeStages prints, if the cells were profiled, the nanoseconds of processor time of each stage of an operation.
func (o *Outcome) writeStages(w io.Writer) {
	if !slices.ContainsFunc(o.Cells, func(r CellResult) bool { return r.Stages != nil }) {
		return
	}
	fmt.Fprintf(w, "\nCPU ns per operation\t%s\tall\n", strings.Join(stageNames[:], "\t"))
	for _, r := range o.Cells {
		fmt.Fprint(w, r.Label)
		all := 0.0
		for _, name := range stageNames {
			ns := 0.0
			for _, s := range r.Stages {
				if s.Stage == name {
					ns = s.NS
				}
			}
			all += ns
			fmt.Fprint(w, "\t", short(ns))
		}
		fmt.Fprintln(w, "\t"+short(all))
	}
}

// furtherNames are the names of all further figures, in order.
func (o *Outcome) furtherNames() []string {
	names := map[string]bool{}
	for i := range o.Cells {
		for name := range o.Cells[i].Further {
			names[name] = true
		}
	}
	return slices.Sorted(maps.Keys(names))
}

// short is a number with three digits or so; a dash for none.
func short(v float64) string {
	switch {
	case v == 0:
		return "-"
	case v < 0.01:
		return strconv.FormatFloat(v, 'g', 2, 64)
	case v < 10:
		return strconv.FormatFloat(v, 'f', 2, 64)
	case v < 100:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 0, 64)
}

func percent(v float64) string {
	if v == 0 {
		return "-"
	}
	return strconv.FormatFloat(100*v, 'f', 0, 64) + "%"
}

// WriteCSV prints the results as comma-separated values (RFC 4180): all fields of the cell, and of each quantity the
// median, the least and the greatest value.
func (o *Outcome) WriteCSV(w io.Writer) error {
	c := csv.NewWriter(w)
	head := append([]string{"label", "runs"}, Keys()...)
	for _, q := range quantities() {
		head = append(head, q.name, q.name+" min", q.name+" max")
	}
	if err := c.Write(head); err != nil {
		return err
	}
	for _, r := range o.Cells {
		row := []string{r.Label, strconv.Itoa(r.Runs)}
		for _, f := range fields() {
			row = append(row, f.value(&r.Cell).String())
		}
		for _, q := range quantities() {
			f := *q.set(&r)
			for _, v := range []float64{f.Median, f.Min, f.Max} {
				row = append(row, strconv.FormatFloat(v, 'g', 6, 64))
			}
		}
		if err := c.Write(row); err != nil {
			return err
		}
	}
	c.Flush()
	return c.Error()
}

// WriteRatiosCSV prints the ratios in the same way.
func (o *Outcome) WriteRatiosCSV(w io.Writer) error {
	c := csv.NewWriter(w)
	if err := c.Write([]string{"ratio", "quantity", "of", "to", "median", "min", "max", "pairs"}); err != nil {
		return err
	}
	for _, r := range o.Compared {
		row := []string{r.What, r.Quantity, r.Of, r.To}
		for _, v := range []float64{r.Value, r.Min, r.Max} {
			row = append(row, strconv.FormatFloat(v, 'g', 6, 64))
		}
		if err := c.Write(append(row, strconv.Itoa(r.Pairs))); err != nil {
			return err
		}
	}
	c.Flush()
	return c.Error()
}
