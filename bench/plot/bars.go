package plot

import (
	"fmt"
	"html"
	"math"
	"unicode/utf8"
)

// Bars is a chart of horizontal bars: a row for each label, with one bar for each series.
type Bars struct {
	Title, X string
	Rows     []string
	Series   []Values // each of as many values as there are rows
	// Stacked puts the bars of a row end to end, without ranges.
	Stacked bool
	// Log is for ratios: bars begin at 1.
	Log bool
	// Max is the end of the axis; 0: what is needed.
	Max float64
}

// Values are a series of bars; X of the points has no meaning.
type Values struct {
	Name   string
	Points []Point
}

const (
	barHeight   = 13.0
	charWidth   = 6.2
	labelsMost  = 520.0
	bandSpacing = 5.0
)

// SVG draws the chart, with a note below it: how it was made.
func (c *Bars) SVG(standalone bool, note string) string {
	labels := 40.0
	for _, r := range c.Rows {
		labels = min(max(labels, charWidth*float64(utf8.RuneCountInString(r))+12), labelsMost)
	}
	perRow := float64(len(c.Series))
	if c.Stacked {
		perRow = 1
	}
	band := perRow*barHeight + bandSpacing
	wide := labels + 460
	end := top + float64(len(c.Rows))*band
	d := &drawing{}
	d.patterns(len(c.Series))
	x := newAxis(c.values(), labels, wide-right-30, c.Log)
	if c.Max > 0 {
		x.high = c.Max
	}
	d.text(8, 18, "start", "t", c.Title)
	for _, t := range x.ticks() {
		at := x.at(t.At)
		d.f(`<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="#ddd"/>`, at, top, at, end)
		d.text(at, end+14, "middle", "a", t.Text)
	}
	for r, label := range c.Rows {
		y := top + float64(r)*band + bandSpacing/2
		d.text(labels-6, y+perRow*barHeight/2+4, "end", "l", label)
		d.row(c, r, x, y)
	}
	origin := x.at(max(x.low, c.origin()))
	d.f(`<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="#333"/>`, origin, top, origin, end)
	d.text((x.from+x.to)/2, end+30, "middle", "a", c.X)
	for i, s := range c.Series {
		at := end + 38 + float64(i)*legendLine
		d.f(`<rect x="%.1f" y="%.1f" width="24" height="10" fill="url(#%s)" stroke="%s"/>`, labels, at, d.pattern(i), colours[i%len(colours)])
		d.text(labels+32, at+9, "start", "l", s.Name)
	}
	return d.svg(wide, end+46+float64(len(c.Series))*legendLine, c.Title, note, standalone)
}

// origin is where bars begin.
func (c *Bars) origin() float64 {
	if c.Log {
		return 1
	}
	return 0
}

// values are all that the axis has to show.
func (c *Bars) values() []float64 {
	list := []float64{c.origin()}
	for r := range c.Rows {
		sum := 0.0
		for _, s := range c.Series {
			p := s.Points[r]
			sum += p.Y
			if !c.Stacked {
				list = append(list, p.Y, p.Low, p.High)
			}
		}
		if c.Stacked {
			list = append(list, sum)
		}
	}
	return list
}

// row draws the bars of a row from y on.
func (d *drawing) row(c *Bars, r int, x axis, y float64) {
	from := c.origin()
	for i, s := range c.Series {
		p := s.Points[r]
		begin, end := x.at(from), x.at(p.Y)
		if c.Stacked {
			end = x.at(from + p.Y)
			from += p.Y
		}
		if p.Y != 0 {
			d.f(`<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" fill="url(#%s)" stroke="%s"><title>%s: %s</title></rect>`,
				min(begin, end), y, math.Abs(end-begin), barHeight-2, d.pattern(i), colours[i%len(colours)],
				html.EscapeString(s.Name), Number(p.Y))
		}
		if c.Stacked {
			continue
		}
		middle := y + barHeight/2 - 1
		right := max(begin, end)
		if p.High > p.Low {
			d.whisker(x.at(p.Low), middle, x.at(p.High), middle, "#000")
			right = max(right, x.at(p.High))
		}
		d.text(right+5, middle+4, "start", "l", Number(p.Y))
		y += barHeight
	}
}

// pattern is the name of the hatching of series i: the same wherever it is defined, since pages hold many charts.
func (d *drawing) pattern(i int) string { return fmt.Sprintf("hatch%d", i%len(colours)) }

// patterns defines the hatchings of n series: each its colour, with lines of its own direction.
func (d *drawing) patterns(n int) {
	lines := []string{"", "M0 6L6 0", "M0 3H6", "M0 0L6 6", "M3 0V6", "M0 3H6M3 0V6", "M0 0L6 6M0 6L6 0"}
	d.f("<defs>")
	for i := range min(n, len(colours)) {
		d.f(`<pattern id="%s" width="6" height="6" patternUnits="userSpaceOnUse"><rect width="6" height="6" fill="%s"/><path d="%s" stroke="#fff" stroke-width="1.2"/></pattern>`,
			d.pattern(i), colours[i], lines[i%len(lines)])
	}
	d.f("</defs>")
}
