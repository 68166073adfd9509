// Package plot draws charts as SVG: lines over linear or logarithmic axes with bars from the least to the greatest value,
// and horizontal bars, side by side or stacked. It is for reports that are read on a screen and on paper, by people who
// see colours differently: the colours are Okabe and Ito's (2008), and each series has a marker, a dash or a hatching of
// its own as well. What it draws depends on nothing outside: no scripts, no fonts, no references.
//
// It is written by hand because the plot library that there is costs every start of the program the initialisation of its
// fonts, and 9 MB, whether anything is drawn or not (docs/dependencies.md).
package plot

import (
	"fmt"
	"html"
	"math"
	"strconv"
	"strings"
)

// A Point is a value with the range that it was found in; Low and High may both be 0: there is none.
type Point struct{ X, Y, Low, High float64 }

// A Series is points in the order of X that are joined by a line.
type Series struct {
	Name   string
	Points []Point
}

// A Tick is a mark of an axis.
type Tick struct {
	At   float64
	Text string
}

// Lines is a chart of series over an axis.
type Lines struct {
	Title, X, Y string
	LogX, LogY  bool
	XTicks      []Tick // nil: chosen
	Series      []Series
	Bare        bool // no markers: there are many points
}

// colours are Okabe and Ito's, but for the yellow, which is too light for lines on white paper, and come last the black.
var colours = []string{"#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"}

// dashes are as many as go round with the colours without repeating a pair soon.
var dashes = []string{"", "7 3", "2 2", "9 3 2 3", "12 4"}

// Sizes in units of the drawing, which are about pixels.
const (
	width       = 560.0
	plotHeight  = 260.0
	left, right = 64.0, 14.0
	top         = 34.0
	bottom      = 40.0
	legendLine  = 16.0
)

// drawing collects elements.
type drawing struct{ strings.Builder }

func (d *drawing) f(format string, args ...any) { fmt.Fprintf(d, format+"\n", args...) }

// text writes s at x, y; anchor is start, middle or end.
func (d *drawing) text(x, y float64, anchor, class, s string) {
	d.f(`<text x="%.1f" y="%.1f" text-anchor="%s" class="%s">%s</text>`, x, y, anchor, class, html.EscapeString(s))
}

// svg is the whole picture. standalone adds what a file needs and a part of a page does not.
func (d *drawing) svg(w, h float64, title, note string, standalone bool) string {
	space := ""
	if standalone {
		space = ` xmlns="http://www.w3.org/2000/svg"`
	}
	const perLine = 6.0 // width of a small character, about
	for _, line := range wrap(note, int((w-16)/perLine)) {
		d.text(8, h+4, "start", "n", line)
		h += 12
	}
	h += 4
	return fmt.Sprintf(`<svg%s viewBox="0 0 %.0f %.0f" width="%.0f" height="%.0f" role="img" font-family="sans-serif" font-size="11">
<title>%s</title>
<style>.t{font-size:13px;font-weight:bold}.a{fill:#333}.l{font-size:11px}.n{font-size:9px;fill:#555}</style>
<rect width="%.0f" height="%.0f" fill="#fff"/>
%s</svg>
`, space, w, h, w, h, html.EscapeString(title), w, h, d.String())
}

// wrap cuts text into lines of at most n characters or so, at spaces.
func wrap(text string, n int) []string {
	var lines []string
	for _, word := range strings.Fields(text) {
		if last := len(lines) - 1; last >= 0 && len(lines[last])+len(word) < n {
			lines[last] += " " + word
		} else {
			lines = append(lines, word)
		}
	}
	return lines
}

// axis maps values to places.
type axis struct {
	low, high float64 // of values
	from, to  float64 // of places
	log       bool
}

func (a axis) at(v float64) float64 {
	low, high := a.low, a.high
	if a.log {
		v, low, high = math.Log(max(v, a.low)), math.Log(low), math.Log(high)
	}
	if high == low {
		return (a.from + a.to) / 2
	}
	return a.from + (v-low)/(high-low)*(a.to-a.from)
}

// newAxis is an axis that shows all values. A logarithmic one leaves out what is not above zero.
func newAxis(values []float64, from, to float64, log bool) axis {
	a := axis{low: math.Inf(1), high: math.Inf(-1), from: from, to: to, log: log}
	for _, v := range values {
		if log && v <= 0 {
			continue
		}
		a.low, a.high = min(a.low, v), max(a.high, v)
	}
	switch {
	case math.IsInf(a.low, 1):
		a.low, a.high = 1, 10
	case log:
		a.low, a.high = a.low/1.1, a.high*1.1
	default:
		a.low, a.high = min(0, a.low), max(a.high, 0)*1.05
	}
	if a.high <= a.low {
		a.high = a.low + 1
	}
	return a
}

// ticks are about six round values, for a logarithmic axis powers of ten with what lies between if there are few.
func (a axis) ticks() []Tick {
	var list []Tick
	if a.log {
		steps := []float64{1, 2, 5}
		if a.high/a.low > 1e3 {
			steps = []float64{1}
		}
		for power := math.Floor(math.Log10(a.low)); power <= math.Ceil(math.Log10(a.high)); power++ {
			for _, s := range steps {
				if v := s * math.Pow(10, power); v >= a.low && v <= a.high {
					list = append(list, Tick{v, Number(v)})
				}
			}
		}
		return list
	}
	step := math.Pow(10, math.Floor(math.Log10((a.high-a.low)/5)))
	for _, s := range []float64{5, 2} {
		if (a.high-a.low)/(step*s) >= 4 {
			step *= s
			break
		}
	}
	for i := math.Ceil(a.low / step); i*step <= a.high; i++ {
		list = append(list, Tick{i * step, Number(i * step)})
	}
	return list
}

// Number is v in short: 1.5k, 20M, 0.25.
func Number(v float64) string {
	for _, unit := range []struct {
		of   float64
		name string
	}{{1e9, "G"}, {1e6, "M"}, {1e3, "k"}} {
		if math.Abs(v) >= unit.of {
			return strconv.FormatFloat(v/unit.of, 'g', 3, 64) + unit.name
		}
	}
	return strconv.FormatFloat(v, 'g', 3, 64)
}

// SVG draws the chart, with a note below it: how it was made.
func (c *Lines) SVG(standalone bool, note string) string {
	var xs, ys []float64
	for _, s := range c.Series {
		for _, p := range s.Points {
			xs, ys = append(xs, p.X), append(ys, p.Y)
			if p.Low != 0 || p.High != 0 {
				ys = append(ys, p.Low, p.High)
			}
		}
	}
	d := &drawing{}
	x := newAxis(xs, left, width-right, c.LogX)
	if !c.LogX && len(xs) > 0 {
		x.low = min(xs[0], x.high)
		for _, v := range xs {
			x.low = min(x.low, v)
		}
	}
	y := newAxis(ys, top+plotHeight, top, c.LogY)
	d.frame(c, x, y)
	for i, s := range c.Series {
		d.line(i, s, x, y, c.Bare)
	}
	base := top + plotHeight + bottom
	for i, s := range c.Series {
		at := base + float64(i)*legendLine + 8
		d.f(`<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" %s/>`, left, at, left+34, at, stroke(i))
		d.marker(i, left+17, at)
		d.text(left+42, at+4, "start", "l", s.Name)
	}
	return d.svg(width, base+float64(len(c.Series))*legendLine+10, c.Title, note, standalone)
}

// frame draws title, axes and grid.
func (d *drawing) frame(c *Lines, x, y axis) {
	d.text(left, 18, "start", "t", c.Title)
	ticks := c.XTicks
	if ticks == nil {
		ticks = x.ticks()
	}
	for _, t := range ticks {
		if at := x.at(t.At); at >= x.from-0.5 && at <= x.to+0.5 {
			d.f(`<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="#ddd"/>`, at, y.to, at, y.from)
			d.text(at, y.from+15, "middle", "a", t.Text)
		}
	}
	for _, t := range y.ticks() {
		at := y.at(t.At)
		d.f(`<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="#ddd"/>`, x.from, at, x.to, at)
		d.text(x.from-6, at+4, "end", "a", t.Text)
	}
	d.f(`<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" fill="none" stroke="#333"/>`, x.from, y.to, x.to-x.from, y.from-y.to)
	d.text((x.from+x.to)/2, y.from+31, "middle", "a", c.X)
	d.f(`<text transform="translate(14 %.1f) rotate(-90)" text-anchor="middle" class="a">%s</text>`, (y.from+y.to)/2, html.EscapeString(c.Y))
}

// stroke is how the lines of series i look.
func stroke(i int) string {
	s := fmt.Sprintf(`fill="none" stroke="%s" stroke-width="1.8"`, colours[i%len(colours)])
	if dash := dashes[i%len(dashes)]; dash != "" {
		s += fmt.Sprintf(` stroke-dasharray="%s"`, dash)
	}
	return s
}

// line draws a series.
func (d *drawing) line(i int, s Series, x, y axis, bare bool) {
	var path strings.Builder
	for k, p := range s.Points {
		step := "L"
		if k == 0 {
			step = "M"
		}
		fmt.Fprintf(&path, "%s%.1f %.1f", step, x.at(p.X), y.at(p.Y))
	}
	d.f(`<path d="%s" %s/>`, path.String(), stroke(i))
	for k, p := range s.Points {
		px := x.at(p.X)
		if (p.Low != 0 || p.High != 0) && p.High > p.Low {
			d.whisker(px, y.at(p.Low), px, y.at(p.High), colours[i%len(colours)])
		}
		if !bare || k%max(1, len(s.Points)/6) == 0 {
			d.marker(i, px, y.at(p.Y))
		}
	}
}

// whisker draws a range, upright or level.
func (d *drawing) whisker(x1, y1, x2, y2 float64, colour string) {
	dx, dy := 3.0, 0.0
	if y1 == y2 {
		dx, dy = 0, 3
	}
	d.f(`<path d="M%.1f %.1fL%.1f %.1fM%.1f %.1fL%.1f %.1fM%.1f %.1fL%.1f %.1f" stroke="%s" fill="none"/>`,
		x1, y1, x2, y2, x1-dx, y1-dy, x1+dx, y1+dy, x2-dx, y2-dy, x2+dx, y2+dy, colour)
}

// marker draws the mark of series i.
func (d *drawing) marker(i int, x, y float64) {
	fill := colours[i%len(colours)]
	switch i % 6 {
	case 0:
		d.f(`<circle cx="%.1f" cy="%.1f" r="3.5" fill="%s"/>`, x, y, fill)
	case 1:
		d.f(`<rect x="%.1f" y="%.1f" width="6.4" height="6.4" fill="%s"/>`, x-3.2, y-3.2, fill)
	case 2:
		d.f(`<path d="M%.1f %.1fl4 7h-8z" fill="%s"/>`, x, y-4, fill)
	case 3:
		d.f(`<path d="M%.1f %.1fl4.3 4.3l-4.3 4.3l-4.3 -4.3z" fill="%s"/>`, x, y-4.3, fill)
	case 4:
		d.f(`<circle cx="%.1f" cy="%.1f" r="3.2" fill="#fff" stroke="%s" stroke-width="1.6"/>`, x, y, fill)
	default:
		d.f(`<path d="M%.1f %.1fl6 6m0 -6l-6 6" stroke="%s" stroke-width="1.8"/>`, x-3, y-3, fill)
	}
}
