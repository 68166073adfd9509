package bench

import (
	"bytes"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// WriteReport writes a report to a directory, which is made if there is none: report.html, which needs nothing else;
// results.json, results.csv and ratios.csv; and each plot as SVG.
func (o *Outcome) WriteReport(dir string) error {
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return err
	}
	text, err := json.MarshalIndent(o, "", "  ")
	if err != nil {
		return err
	}
	files := map[string][]byte{"results.json": append(text, '\n')}
	for name, write := range map[string]func(io.Writer) error{
		"results.csv": o.WriteCSV, "ratios.csv": o.WriteRatiosCSV, "report.html": o.WriteHTML,
	} {
		var b bytes.Buffer
		if err := write(&b); err != nil {
			return err
		}
		files[name] = b.Bytes()
	}
	for _, c := range o.charts() {
		files[c.file+".svg"] = []byte(c.svg(true, o.Command))
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o666); err != nil {
			return fmt.Errorf("bench: report: %w", err)
		}
	}
	return nil
}

// WriteHTML writes the report as one page: black on white, at the width of paper, and nothing that is loaded.
func (o *Outcome) WriteHTML(w io.Writer) error {
	var b strings.Builder
	e := html.EscapeString
	fmt.Fprintf(&b, pageHead, e(o.Title), e(o.Title))
	m := o.Machine
	for _, row := range [][2]string{
		{"Command", o.Command},
		{"Machine", fmt.Sprintf("%d CPUs (%s, %s), %s, %s, cowherd %s", m.CPUs, m.CPU, m.Arch, m.Kernel, m.Go, m.Version)},
		{"Seed", fmt.Sprint(o.Seed)},
	} {
		fmt.Fprintf(&b, "<dt>%s</dt><dd><code>%s</code></dd>\n", row[0], e(row[1]))
	}
	b.WriteString(pageMethod)
	o.resultTable(&b)
	o.ratioTable(&b)
	section := ""
	for _, c := range o.charts() {
		if c.section != section {
			section = c.section
			fmt.Fprintf(&b, "<h2>%s</h2>\n", e(section))
		}
		class := ""
		if c.wide {
			class = ` class="wide"`
		}
		fmt.Fprintf(&b, "<figure%s>\n%s</figure>\n", class, c.svg(false, o.Command))
	}
	b.WriteString("</body>\n</html>\n")
	_, err := io.WriteString(w, b.String())
	return err
}

// resultTable writes a row for each cell: of each quantity the median and, below it, the range.
func (o *Outcome) resultTable(b *strings.Builder) {
	b.WriteString("<h2>Results</h2>\n<table>\n<thead><tr><th>cell</th><th>runs</th>")
	for _, c := range reportColumns {
		fmt.Fprintf(b, "<th>%s</th>", c.head)
	}
	b.WriteString("</tr></thead>\n<tbody>\n")
	for i := range o.Cells {
		r := &o.Cells[i]
		fmt.Fprintf(b, "<tr><td>%s</td><td>%d</td>", html.EscapeString(r.Label), r.Runs)
		for _, c := range reportColumns {
			f := *c.of(r)
			fmt.Fprintf(b, "<td>%s<small>%s to %s</small></td>", short(f.Median/c.scale), short(f.Min/c.scale), short(f.Max/c.scale))
		}
		b.WriteString("</tr>\n")
	}
	b.WriteString("</tbody>\n</table>\n")
}

var reportColumns = []struct {
	head  string
	scale float64
	of    func(r *CellResult) *Figure
}{
	{"kIOPS", 1000, func(r *CellResult) *Figure { return &r.Ops }},
	{"MiB/s", 1 << 20, func(r *CellResult) *Figure { return &r.Bytes }},
	{"mean µs", 1, func(r *CellResult) *Figure { return &r.Mean }},
	{"p50 µs", 1, func(r *CellResult) *Figure { return &r.P50 }},
	{"p99 µs", 1, func(r *CellResult) *Figure { return &r.P99 }},
	{"p99.9 µs", 1, func(r *CellResult) *Figure { return &r.P999 }},
	{"max µs", 1, func(r *CellResult) *Figure { return &r.Max }},
	{"CPU µs", 1, func(r *CellResult) *Figure { return &r.CPU }},
	{"CPU ns/B", 1, func(r *CellResult) *Figure { return &r.CPUByte }},
	{"busiest queue", 1, func(r *CellResult) *Figure { return &r.Busiest }},
	{"copied B/B", 1, func(r *CellResult) *Figure { return &r.Copied }},
}

// ratioTable writes a row for each ratio.
func (o *Outcome) ratioTable(b *strings.Builder) {
	if len(o.Compared) == 0 {
		return
	}
	b.WriteString("<h2>Ratios</h2>\n<table>\n<thead><tr><th>of</th><th>to</th><th>quantity</th><th>median</th><th>least</th>" +
		"<th>greatest</th><th>pairs of runs</th></tr></thead>\n<tbody>\n")
	for _, c := range o.Compared {
		fmt.Fprintf(b, "<tr><td>%s</td><td>%s</td><td>%s</td><td>%s</td><td>%s</td><td>%s</td><td>%d</td></tr>\n",
			html.EscapeString(c.Of), html.EscapeString(c.To), c.Quantity, short(c.Value), short(c.Min), short(c.Max), c.Pairs)
	}
	b.WriteString("</tbody>\n</table>\n")
}

const pageHead = `<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<title>cowherd bench: %s</title>
<style>
body{font-family:sans-serif;font-size:13px;color:#000;background:#fff;max-width:1180px;margin:1.5em auto;padding:0 1em;line-height:1.35}
h1{font-size:1.5em}h2{font-size:1.2em;border-bottom:1px solid #999;margin-top:1.8em}
table{border-collapse:collapse;font-size:11.5px}
th,td{padding:2px 7px;text-align:right;border-bottom:1px solid #ddd;vertical-align:top}
th{border-bottom:1px solid #333}
th:first-child,td:first-child{text-align:left}
td small{display:block;color:#444;white-space:nowrap}
code{background:#f2f2f2;padding:1px 3px}
dt{float:left;clear:left;width:8em;font-weight:bold}dd{margin-left:8.5em}
figure{display:inline-block;margin:4px 8px 12px 0;break-inside:avoid;vertical-align:top}
figure svg{max-width:100%%;height:auto}
@page{margin:14mm}
@media print{body{max-width:none;margin:0;padding:0;font-size:10px}h2{break-after:avoid}tr{break-inside:avoid}thead{display:table-header-group}figure{width:48%%}figure.wide{width:100%%}code{background:none}}
</style>
</head>
<body>
<h1>%s</h1>
<dl>
`

const pageMethod = `</dl>
<p>Each figure is the median of the runs of its cell; below it stand the least and the greatest. Cells that are compared ran
in turn, forwards and backwards, and ratios are medians of the ratios of runs of the same turn. CPU is the processor time of
the whole process for an operation, user and system, less what the same jobs take on a device that does nothing. Latencies of
cells with a rate are counted from when the request was due. In charts a bar across a line or at the end of a bar goes from
the least to the greatest value; curves of latencies are of all runs together. Everything that the charts show is in
results.json, beside the other quantities.</p>
`
