package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"

	"golang.org/x/sys/unix"

	"cowherd/internal/size"
)

// report is what the program prints.
type report struct {
	Machine     string   `json:"machine"`
	Programs    []string `json:"programs"` // versions
	Repetitions int      `json:"repetitions"`
	Seconds     int      `json:"seconds"`
	SizeBytes   int64    `json:"size_bytes"`
	Rows        []row    `json:"rows"`
	Notes       []string `json:"notes"`  // what was skipped, and what failed
	Failed      int      `json:"failed"` // servers in cells

	stacks map[string]*stack
	ratios []comparison
}

// row is one step of a cell on one server. Figures are medians of the rounds.
type row struct {
	Cell        string  `json:"cell"`
	Step        string  `json:"step"`
	Connections int     `json:"connections"`
	Server      string  `json:"server"`
	Rounds      int     `json:"rounds"`
	IOPS        float64 `json:"iops"`
	IOPSMin     float64 `json:"iops_min"`
	IOPSMax     float64 `json:"iops_max"`
	P50US       float64 `json:"latency_p50_us"`
	P99US       float64 `json:"latency_p99_us"`
	CPUUS       float64 `json:"server_cpu_us_per_request"`
	HydratedS   float64 `json:"hydrated_seconds,omitempty"` // 0: the step does not hydrate
	Foreign     float64 `json:"foreign"`                    // the most of the rounds, as a share of one CPU
	Noisy       bool    `json:"noisy"`
	// Ratio is cowherd's rate to this one. In a row of cowherd's it is to another step of cowherd's own.
	Ratio *ratio `json:"ratio,omitempty"`
	// HydratedRatio is this one's time until all is hydrated to cowherd's.
	HydratedRatio *ratio `json:"hydrated_ratio,omitempty"`
	// OfBare is what part of its rate without a snapshot cowherd has in this step.
	OfBare *ratio `json:"of_bare,omitempty"`

	peer     string  // the name of the stack
	baseIOPS float64 // of the step that cowherd's own ratio is to
}

// ratio is how many times as good cowherd is as something else: the median of the rounds' ratios.
type ratio struct {
	Against string  `json:"against"`
	Median  float64 `json:"median"`
	Min     float64 `json:"min"`
	Max     float64 `json:"max"`
	Bar     float64 `json:"bar,omitempty"` // 0: the ratio is for information
	Verdict string  `json:"verdict,omitempty"`
}

// Verdicts.
const (
	pass  = "PASS"
	short = "short"
)

func newReport(r *runner) *report {
	rep := &report{
		Machine: machine(), Programs: versions(r.stacks),
		Repetitions: r.repetitions, Seconds: r.seconds, SizeBytes: r.bytes, Rows: []row{}, Notes: []string{},
		stacks: r.stacks,
	}
	for _, name := range slices.Sorted(maps.Keys(r.stacks)) {
		if s := r.stacks[name]; s.skipped != "" {
			rep.Notes = append(rep.Notes, fmt.Sprintf("skipped: %s: %s", name, s.skipped))
		}
	}
	return rep
}

// failure is an error if something could not be measured.
func (rep *report) failure() error {
	if rep.Failed == 0 {
		return nil
	}
	return fmt.Errorf("%d times a server could not be measured", rep.Failed)
}

// add adds the rows of a cell.
func (rep *report) add(c *cell) {
	for _, name := range c.stacks() {
		if err := c.failed[name]; err != nil {
			rep.Failed++
			rep.Notes = append(rep.Notes, fmt.Sprintf("failed: %s: %s: %v", c.name(), name, err))
		}
	}
	for _, st := range c.scenario.steps {
		rounds := quietest(c.rounds, c.keys(st), rep.Repetitions)
		rows := map[string]row{}
		for _, name := range c.stacks() {
			found, ok := column(rounds, key{name, st.name})
			if !ok {
				continue
			}
			line := newRow(found)
			line.Cell, line.Step, line.Connections = c.name(), st.name, c.connections
			line.Server, line.peer = rep.stacks[name].label, name
			line.compare(c, st, rounds)
			rep.Rows = append(rep.Rows, line)
			rows[name] = line
		}
		rep.ratios = append(rep.ratios, rep.compareStep(c, st, rows)...)
	}
}

// compare sets the ratios of a row.
func (line *row) compare(c *cell, st step, rounds []round) {
	if line.peer == ours {
		mine := key{ours, st.name}
		if st.against != "" {
			base := key{ours, st.against}
			line.Ratio = compare(rounds, mine, base, st.against, rate)
			line.Ratio.judge(st.bars[c.connections])
			line.baseIOPS = median(each(rounds, func(r round) float64 { return r[base].iops }))
		}
		if st.job == eachOnce && st.on == live && st.name != bareOnce {
			line.OfBare = compare(rounds, mine, key{ours, bareOnce}, bareOnce, rate)
		}
		return
	}
	mine, theirs := key{ours, st.name}, key{line.peer, st.name}
	line.Ratio = compare(rounds, mine, theirs, line.Server, rate)
	if st.against == "" && line.peer == c.scenario.peers[0] {
		line.Ratio.judge(st.bars[c.connections])
	}
	if st.hydrate {
		line.HydratedRatio = compare(rounds, theirs, mine, line.Server, func(m measurement) float64 { return m.hydrated })
	}
}

func rate(m measurement) float64 { return m.iops }

// column is what was measured in each round; false if it was not.
func column(rounds []round, k key) ([]measurement, bool) {
	var found []measurement
	for _, r := range rounds {
		if m, ok := r[k]; ok {
			found = append(found, m)
		}
	}
	return found, len(found) > 0 && len(found) == len(rounds)
}

func newRow(found []measurement) row {
	iops := each(found, func(m measurement) float64 { return m.iops })
	foreign := slices.Max(each(found, func(m measurement) float64 { return m.foreign }))
	return row{
		Rounds: len(found), IOPS: median(iops), IOPSMin: slices.Min(iops), IOPSMax: slices.Max(iops),
		P50US:     median(each(found, func(m measurement) float64 { return m.p50 })),
		P99US:     median(each(found, func(m measurement) float64 { return m.p99 })),
		CPUUS:     median(each(found, func(m measurement) float64 { return m.cpu })),
		HydratedS: median(each(found, func(m measurement) float64 { return m.hydrated })),
		Foreign:   foreign, Noisy: foreign > noisy,
	}
}

// compare divides a quantity of one measurement by that of another, round by round; nil if one was not measured.
func compare(rounds []round, over, under key, against string, quantity func(measurement) float64) *ratio {
	_, first := column(rounds, over)
	_, second := column(rounds, under)
	if !first || !second {
		return nil
	}
	values := make([]float64, len(rounds))
	for i, found := range rounds {
		values[i] = quantity(found[over]) / quantity(found[under])
	}
	return newRatio(against, values)
}

// newRatio sums up the ratios of rounds, of which there is at least one.
func newRatio(against string, values []float64) *ratio {
	return &ratio{Against: against, Median: median(values), Min: slices.Min(values), Max: slices.Max(values)}
}

// judge compares a ratio, if it is there, with the least that is good enough; a bar of 0 is none.
func (r *ratio) judge(bar float64) {
	if r == nil || bar == 0 {
		return
	}
	r.Bar, r.Verdict = bar, short
	if r.Median >= bar {
		r.Verdict = pass
	}
}

func each[T, V any](found []T, value func(T) V) []V {
	values := make([]V, len(found))
	for i, m := range found {
		values[i] = value(m)
	}
	return values
}

// median of values, of which there is at least one: the mean of the middle two where they are even in number.
func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	if len(sorted)%2 == 0 {
		return (sorted[middle-1] + sorted[middle]) / 2
	}
	return sorted[middle]
}

// write prints the report for people, or for programs.
func (rep *report) write(w io.Writer, asJSON bool) error {
	if asJSON {
		return writeJSON(w, rep)
	}
	fmt.Fprintf(w, "%s; %s\n", rep.Machine, strings.Join(rep.Programs, "; "))
	fmt.Fprintf(w, "fio over NBD on unix sockets: %s requests, depth %d, %s; medians, rounds: %d\n\n",
		size.Human(blockBytes), depth, size.Human(rep.SizeBytes), rep.Repetitions)
	if err := rep.writeTable(w); err != nil {
		return err
	}
	for _, note := range rep.Notes {
		fmt.Fprintln(w, note)
	}
	return nil
}

func writeJSON(w io.Writer, value any) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(value)
}

func (rep *report) writeTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "step\tconns\tserver\tkIOPS\tmin-max\tp99 µs\tCPU µs/req\thydrated\tratio\tmin-max\tbar\t\tforeign")
	for _, r := range rep.Rows {
		mark := ""
		if r.Noisy {
			mark = " noisy"
		}
		hydrated := ""
		if r.HydratedS > 0 {
			hydrated = fmt.Sprintf("%.1f s", r.HydratedS)
		}
		fmt.Fprintf(t, "%s\t%d\t%s\t%.1f\t%.1f-%.1f\t%.0f\t%.1f\t%s\t%s\t%.0f%%%s\n", r.Step, r.Connections, r.Server,
			r.IOPS/1e3, r.IOPSMin/1e3, r.IOPSMax/1e3, r.P99US, r.CPUUS, hydrated, r.Ratio.cells(), 100*r.Foreign, mark)
	}
	return t.Flush()
}

// cells are a ratio's four columns of the table.
func (r *ratio) cells() string {
	switch {
	case r == nil:
		return "\t\t\t"
	case r.Bar == 0:
		return fmt.Sprintf("%.2f\t%.2f-%.2f\t-\t", r.Median, r.Min, r.Max)
	}
	return fmt.Sprintf("%.2f\t%.2f-%.2f\t%g\t%s", r.Median, r.Min, r.Max, r.Bar, r.Verdict)
}

// machine describes what the figures were found on.
func machine() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return fmt.Sprintf("%d CPUs", runtime.NumCPU())
	}
	return fmt.Sprintf("%d CPUs, Linux %s %s", runtime.NumCPU(), unix.ByteSliceToString(name.Release[:]),
		unix.ByteSliceToString(name.Machine[:]))
}

// versions are the first lines of what the programs say of themselves.
func versions(all map[string]*stack) []string {
	commands := map[string][]string{"fio": {"--version"}}
	for _, s := range all {
		switch {
		case s.skipped != "":
		case s.name == ours:
			commands[s.program] = []string{"version"}
		case s.name == nbdServer:
			commands[s.program] = []string{"-V"}
		default:
			commands[s.program] = []string{"--version"}
		}
	}
	var lines []string
	for _, program := range slices.Sorted(maps.Keys(commands)) {
		text, err := exec.Command(program, commands[program]...).Output()
		if line, _, _ := strings.Cut(string(text), "\n"); err == nil {
			lines = append(lines, line)
		}
	}
	return lines
}
