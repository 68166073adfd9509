package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// Units of figures. Less is better of seconds, more of the others.
const (
	unitRate    = "k/s" // thousands of requests a second
	unitSeconds = "s"
	unitOfBare  = "of bare" // share of the rate that the device has without a target
)

// comparison is a line of the table of all parts: cowherd beside one other in one shape of work. Figures are medians of
// the rounds.
type comparison struct {
	Part    string  `json:"part"`
	Shape   string  `json:"shape"`
	Jobs    int     `json:"jobs,omitempty"` // of fio, each with a connection on servers; 0: it is not fio's work
	Unit    string  `json:"unit"`
	Ours    float64 `json:"cowherd,omitempty"` // 0: not measured
	Peer    string  `json:"peer"`
	Theirs  float64 `json:"peer_figure,omitempty"` // 0: not measured
	Ratio   *ratio  `json:"ratio,omitempty"`       // how many times as good cowherd is
	Skipped string  `json:"skipped,omitempty"`     // why the peer was not measured
	Noisy   bool    `json:"noisy,omitempty"`       // other processes used much CPU in one of the rounds
}

// compareStep makes the lines of a step. rows are what was measured of it, by the name of the stack.
func (rep *report) compareStep(c *cell, st step, rows map[string]row) (lines []comparison) {
	mine := rows[ours] // zeroes if it was not measured
	base := comparison{
		Part: serversPart, Shape: st.name, Jobs: c.connections, Unit: unitRate, Ours: mine.IOPS / 1e3, Noisy: mine.Noisy,
	}
	if st.job == nothing {
		base.Jobs, base.Unit, base.Ours = 0, unitSeconds, mine.HydratedS
	}
	if mine.Ratio != nil {
		line := base
		line.Peer, line.Theirs, line.Ratio = "cowherd: "+mine.Ratio.Against, mine.baseIOPS/1e3, mine.Ratio
		lines = append(lines, line)
	}
	if st.own {
		return lines
	}
	for _, name := range c.scenario.peers {
		line, stack := base, rep.stacks[name]
		line.Peer = stack.label
		theirs, ok := rows[name]
		switch {
		case stack.skipped == notAsked:
		case stack.skipped != "":
			line.Skipped = "skipped: " + stack.skipped
			lines = append(lines, line)
		case !ok:
			line.Skipped = "failed"
			lines = append(lines, line)
		default:
			line.Noisy = line.Noisy || theirs.Noisy
			lines = append(lines, line.figures(st, mine, theirs)...)
		}
	}
	return lines
}

// figures completes the line of a peer that was measured, which is two where there is a hydration beside the requests.
func (line comparison) figures(st step, mine, theirs row) (lines []comparison) {
	if st.job != nothing {
		line.Theirs, line.Ratio = theirs.IOPS/1e3, theirs.Ratio
		lines = append(lines, line)
		line.Shape += ": until all is"
	}
	if st.hydrate {
		line.Unit, line.Ours, line.Theirs, line.Ratio = unitSeconds, mine.HydratedS, theirs.HydratedS, theirs.HydratedRatio
		lines = append(lines, line)
	}
	return lines
}

// ratios are the kernel's lines. Beside its snapshots stand cowherd's, each as a share of its own bare device, so that what
// the machines are matters little. They are not of the same rounds: the ratio's ends are the widest that both allow.
func (k *kernelReport) ratios(servers *report) (lines []comparison) {
	version, _, _ := strings.Cut(k.Kernel, "+")
	version, _, _ = strings.Cut(version, "-")
	for _, r := range k.Rows {
		if r.name == bareStep {
			continue
		}
		line := comparison{
			Part: kernelPart, Shape: r.Step, Jobs: r.Jobs, Unit: unitOfBare, Peer: "Linux " + version, Theirs: r.Ratio,
		}
		if mine := servers.ofBare(r.beside, r.Jobs); mine != nil {
			line.Ours = mine.OfBare.Median
			line.Noisy = mine.Noisy
			line.Ratio = &ratio{
				Against: line.Peer, Median: line.Ours / r.Ratio, Min: mine.OfBare.Min / r.Max, Max: mine.OfBare.Max / r.Min,
			}
		}
		lines = append(lines, line)
	}
	return lines
}

// ofBare is cowherd's row of a step that has a share of the bare rate; nil if there is none. rep may be nil.
func (rep *report) ofBare(step string, connections int) *row {
	if rep == nil || step == "" {
		return nil
	}
	for i, r := range rep.Rows {
		if r.peer == ours && r.Step == step && r.Connections == connections && r.OfBare != nil {
			return &rep.Rows[i]
		}
	}
	return nil
}

// writeRatios prints the table of all parts.
func writeRatios(w io.Writer, lines []comparison) error {
	var table strings.Builder
	t := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "shape\tjobs\tcowherd\tpeer\tits figure\tratio\tmin-max\tbar\t")
	for _, l := range lines {
		jobs := "-"
		if l.Jobs > 0 {
			jobs = fmt.Sprint(l.Jobs)
		}
		theirs, noise := figure(l.Theirs, l.Unit), ""
		if l.Skipped != "" {
			theirs = l.Skipped
		}
		if l.Noisy {
			noise = " noisy"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s%s\n", l.Shape, jobs, figure(l.Ours, l.Unit), l.Peer, theirs, l.Ratio.cells(), noise)
	}
	_ = t.Flush() // memory takes it
	for line := range strings.Lines(table.String()) {
		if _, err := fmt.Fprintln(w, strings.TrimRight(line, " \n")); err != nil {
			return err
		}
	}
	return nil
}

// figure prints a figure with its unit; "-" stands for what was not measured.
func figure(value float64, unit string) string {
	switch {
	case value == 0:
		return "-"
	case unit == unitRate:
		return fmt.Sprintf("%.1f %s", value, unit)
	case unit == unitSeconds:
		return fmt.Sprintf("%.3f %s", value, unit)
	}
	return fmt.Sprintf("%.2f %s", value, unit)
}
