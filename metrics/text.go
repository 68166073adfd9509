package metrics

import (
	"io"
	"math"
	"slices"
	"strconv"
	"strings"

	"cowherd/internal/invariant"
)

// textType is the content type of Prometheus's text format, in its version 0.0.4. All that scrape understand it.
const textType = "text/plain; version=0.0.4; charset=utf-8"

// kind is a type of metrics, as the text format calls it.
type kind string

const (
	counter   kind = "counter"
	gauge     kind = "gauge"
	histogram kind = "histogram"
	quantiles kind = "summary"
)

// metric is one that the exporter knows.
type metric struct {
	name, help string
	kind       kind
	labels     []string
}

// page is the answer to one scrape. The format wants all lines of a metric together, and they come device by device: so
// each metric has its own text until all is said. Of one goroutine.
type page struct {
	families []*family // as they are written
	byName   map[string]*family
}

// family is what is said of a metric.
type family struct {
	metric
	text []byte // lines
}

// newPage makes a page for metrics, which are written in that order.
func newPage(lists ...[]metric) *page {
	p := &page{byName: make(map[string]*family)}
	for _, m := range slices.Concat(lists...) {
		f := &family{metric: m}
		p.families, p.byName[m.name] = append(p.families, f), f
	}
	return p
}

// put says that a metric has a value, with as many labels as it has. Invalid UTF-8 in a label is replaced: the scraper
// would refuse all of the page for it.
func (p *page) put(name string, value float64, labels ...string) {
	f := p.byName[name]
	f.add("", value, labels, "", "")
}

// bound is a bucket of a histogram: how many are at most so much.
type bound struct {
	most  float64
	count uint64
}

// putHistogram says what a histogram holds. bounds ascend, and the counts in them too; count and sum are those of all.
func (p *page) putHistogram(name string, bounds []bound, count uint64, sum float64, labels ...string) {
	f := p.byName[name]
	for _, b := range append(bounds, bound{math.Inf(1), count}) {
		f.add("_bucket", float64(b.count), labels, "le", number(b.most))
	}
	f.add("_sum", sum, labels, "", "")
	f.add("_count", float64(count), labels, "", "")
}

// putQuantiles says what a summary holds: values[i] is the quantile i/(len(values)-1).
func (p *page) putQuantiles(name string, values []float64, count uint64, sum float64) {
	f := p.byName[name]
	for i, v := range values {
		f.add("", v, nil, "quantile", number(float64(i)/float64(len(values)-1)))
	}
	f.add("_sum", sum, nil, "", "")
	f.add("_count", float64(count), nil, "", "")
}

// add appends a line: name and suffix, the labels by their names, the extra one if it has a name, and the value.
func (f *family) add(suffix string, value float64, labels []string, extra, extraValue string) {
	invariant.Check(len(labels) == len(f.labels), "%s has the labels %v", f.name, f.labels)
	var pairs []string
	for i, name := range f.labels {
		pairs = append(pairs, name+`="`+escapeLabel(labels[i])+`"`)
	}
	slices.Sort(pairs)
	if extra != "" {
		pairs = append(pairs, extra+`="`+extraValue+`"`)
	}
	f.text = append(append(f.text, f.name...), suffix...)
	if len(pairs) > 0 {
		f.text = append(f.text, "{"+strings.Join(pairs, ",")+"}"...)
	}
	f.text = append(append(append(f.text, ' '), number(value)...), '\n')
}

// writeTo writes what has been said. Metrics of which nothing was said are left out. An error of w is the scraper's: it
// has gone.
func (p *page) writeTo(w io.Writer) {
	var all []byte
	for _, f := range p.families {
		if len(f.text) > 0 {
			all = append(all, "# HELP "+f.name+" "+escapeHelp(f.help)+"\n# TYPE "+f.name+" "+string(f.kind)+"\n"...)
			all = append(all, f.text...)
		}
	}
	_, _ = w.Write(all)
}

// number is a value as the format has it: the shortest decimal that is read as the same float; +Inf, -Inf, NaN.
func number(v float64) string { return strconv.FormatFloat(v, 'g', -1, 64) }

// escapeHelp is a help text as the format has it.
func escapeHelp(s string) string { return strings.NewReplacer(`\`, `\\`, "\n", `\n`).Replace(s) }

// escapeLabel is the value of a label as the format has it between quotes.
func escapeLabel(s string) string {
	return strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`).Replace(strings.ToValidUTF8(s, "\uFFFD"))
}
