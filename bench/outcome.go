package bench

import (
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sys/unix"
)

// Outcome is what a plan's cells have come to.
type Outcome struct {
	Title    string       `json:"title"`
	Command  string       `json:"command"` // that made it
	Seed     uint64       `json:"seed"`
	Machine  Machine      `json:"machine"`
	Cells    []CellResult `json:"results"`
	Compared []Comparison `json:"ratios"`
}

// Machine is where it was measured.
type Machine struct {
	CPUs    int    `json:"cpus"`
	CPU     string `json:"cpu"`
	Kernel  string `json:"kernel"`
	Go      string `json:"go"`
	Arch    string `json:"arch"`
	Version string `json:"cowherd"`
}

// ThisMachine describes the machine; version is cowherd's.
func ThisMachine(version string) Machine {
	m := Machine{CPUs: runtime.NumCPU(), Go: runtime.Version(), Arch: runtime.GOARCH, Version: version}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Sysname[:]) + " " + unix.ByteSliceToString(u.Release[:])
	}
	text, _ := os.ReadFile("/proc/cpuinfo") // a name for people: not knowing it is no error
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			m.CPU = strings.TrimSpace(value)
			break
		}
	}
	return m
}

// Figure is one quantity over the runs of a cell.
type Figure struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

// Spread is (max - min) / median; 0 for a median of 0.
func (f Figure) Spread() float64 {
	if f.Median == 0 {
		return 0
	}
	return (f.Max - f.Min) / f.Median
}

// figure is that of the values, at least one.
func figure(values []float64) Figure {
	return Figure{Median: middle(values), Min: slices.Min(values), Max: slices.Max(values)}
}

// middle is the median, of an even number of values the mean of the two in the middle.
func middle(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// CellResult is what one cell has come to, over its runs.
type CellResult struct {
	Cell    Cell    `json:"cell"`
	Label   string  `json:"label"`
	Runs    int     `json:"runs"`
	Ops     Figure  `json:"ops_per_second"`
	Bytes   Figure  `json:"bytes_per_second"`
	Mean    Figure  `json:"latency_mean_us"`
	P50     Figure  `json:"latency_p50_us"`
	P99     Figure  `json:"latency_p99_us"`
	P999    Figure  `json:"latency_p999_us"`
	Max     Figure  `json:"latency_max_us"`
	CPU     Figure  `json:"cpu_us_per_op"` // of the whole process, less what the harness takes
	CPUByte Figure  `json:"cpu_ns_per_byte"`
	Harness float64 `json:"harness_cpu_us_per_op"` // that was taken off
	// Busiest is the share of the queue that issued most: of copies where there is an engine, else of requests.
	Busiest Figure    `json:"busiest_queue_share"`
	Queues  []float64 `json:"queue_shares,omitempty"` // medians
	// Copied is the bytes that engines copied for each byte that the jobs wrote.
	Copied Figure `json:"copied_bytes_per_byte"`
	// Foreground is the latencies of the foreground beside a stream of copies, where there is one.
	ForegroundOps  Figure         `json:"foreground_ops,omitzero"` // of a run, which were measured
	ForegroundP50  Figure         `json:"foreground_p50_us,omitzero"`
	ForegroundP99  Figure         `json:"foreground_p99_us,omitzero"`
	ForegroundP999 Figure         `json:"foreground_p999_us,omitzero"`
	Methods        []MethodResult `json:"methods,omitempty"`
	// Further is what only the stack of the cell tells.
	Further map[string]Figure `json:"further,omitempty"`
	Leaves  []LeafResult      `json:"leaves,omitempty"`
	Stages  []StageResult     `json:"stages,omitempty"` // if it was profiled
	// Percentiles is the curve of the latencies of all runs together.
	Percentiles []Percentile `json:"percentiles,omitempty"`
}

// MethodResult is what engines copied by one method, over all runs.
type MethodResult struct {
	Class      string  `json:"class"`
	Method     string  `json:"method"`
	Operations uint64  `json:"operations"`
	Bytes      uint64  `json:"bytes"`
	Share      float64 `json:"share"` // of the bytes of all methods
}

// LeafResult is what reached the leaf devices of one role for each write of the jobs (or, where they write nothing, for
// each operation), over all runs.
type LeafResult struct {
	Role        string  `json:"role"`
	Reads       float64 `json:"reads_per_op"`
	ReadBytes   float64 `json:"read_bytes_per_byte"`
	Writes      float64 `json:"writes_per_op"`
	WriteBytes  float64 `json:"write_bytes_per_byte"`
	Flushes     float64 `json:"flushes_per_op"`
	Copies      float64 `json:"copies_per_op"` // calls of offload, counted at the destination
	CopiedBytes float64 `json:"copy_bytes_per_byte"`
}

// Percentile is a point of a curve of latencies.
type Percentile struct {
	Percent float64 `json:"percent"`
	US      float64 `json:"us"`
}

// Comparison is a quantity of a cell as a ratio to that of another one: over pairs of runs, each from the same half of a
// repetition.
type Comparison struct {
	What     string  `json:"what"` // in short
	Quantity string  `json:"quantity"`
	Of       string  `json:"of"` // labels
	To       string  `json:"to"`
	Name     string  `json:"name"` // What and Quantity
	Device   string  `json:"device"`
	Jobs     int     `json:"jobs,omitempty"`
	Depth    int     `json:"depth,omitempty"`
	Value    float64 `json:"value"` // the median
	Min      float64 `json:"min"`
	Max      float64 `json:"max"`
	Pairs    int     `json:"pairs"`
	of       *Cell
}

const us = 1000.0

// quantities are what results tell of each run.
func quantities() []quantity {
	return []quantity{
		{"iops", func(s *sampled) float64 { return float64(s.count) / s.elapsed.Seconds() }, func(r *CellResult) *Figure { return &r.Ops }},
		{"bytes/s", func(s *sampled) float64 { return float64(s.bytes) / s.elapsed.Seconds() }, func(r *CellResult) *Figure { return &r.Bytes }},
		{"mean latency", func(s *sampled) float64 { return s.latency.Mean() / us }, func(r *CellResult) *Figure { return &r.Mean }},
		{"p50 latency", quantile(50), func(r *CellResult) *Figure { return &r.P50 }},
		{"p99 latency", quantile(99), func(r *CellResult) *Figure { return &r.P99 }},
		{"p99.9 latency", quantile(99.9), func(r *CellResult) *Figure { return &r.P999 }},
		{"max latency", quantile(100), func(r *CellResult) *Figure { return &r.Max }},
		{"CPU/op", func(s *sampled) float64 { return float64(s.cpu) / us / float64(s.count) }, func(r *CellResult) *Figure { return &r.CPU }},
		{"CPU/byte", func(s *sampled) float64 { return float64(s.cpu) / float64(s.bytes) }, func(r *CellResult) *Figure { return &r.CPUByte }},
		{"busiest queue", func(s *sampled) float64 { return busiest(s.queues) }, func(r *CellResult) *Figure { return &r.Busiest }},
		{"copied bytes", copiedPerByte, func(r *CellResult) *Figure { return &r.Copied }},
		{"foreground ops", foregroundOps, func(r *CellResult) *Figure { return &r.ForegroundOps }},
		{"foreground p50", foregroundQuantile(50), func(r *CellResult) *Figure { return &r.ForegroundP50 }},
		{"foreground p99", foregroundQuantile(99), func(r *CellResult) *Figure { return &r.ForegroundP99 }},
		{"foreground p99.9", foregroundQuantile(99.9), func(r *CellResult) *Figure { return &r.ForegroundP999 }},
	}
}

// quantity is one of them.
type quantity struct {
	name  string
	value func(s *sampled) float64
	set   func(r *CellResult) *Figure
}

// comparedQuantities are those of which ratios are told.
var comparedQuantities = []string{"iops", "mean latency", "p50 latency", "p99 latency", "CPU/op", "foreground p50", "foreground p99"}

func quantile(q float64) func(s *sampled) float64 {
	return func(s *sampled) float64 { return float64(s.latency.ValueAtQuantile(q)) / us }
}

// foregroundOps is zero where there is no foreground, as foregroundQuantile is.
func foregroundOps(s *sampled) float64 {
	if s.foreground == nil {
		return 0
	}
	return float64(s.foreground.TotalCount())
}

func foregroundQuantile(q float64) func(s *sampled) float64 {
	return func(s *sampled) float64 {
		if s.foreground == nil {
			return 0
		}
		return float64(s.foreground.ValueAtQuantile(q)) / us
	}
}

// copiedPerByte is zero where nothing was written.
func copiedPerByte(s *sampled) float64 {
	copied := uint64(0)
	for _, m := range s.stats.Methods {
		copied += m.Bytes
	}
	if s.written == 0 {
		return 0
	}
	return float64(copied) / float64(s.written)
}

// outcome makes results and ratios of samples.
func (x *Runner) outcome(groups [][]*Cell, samples map[*Cell][]*sampled) *Outcome {
	o := &Outcome{Seed: x.Seed}
	for _, c := range x.Cells {
		o.Cells = append(o.Cells, x.result(c, samples[c]))
	}
	for _, g := range groups {
		for _, c := range g {
			for _, base := range bases(c, g) {
				o.compare(c, base, samples)
			}
		}
	}
	return o
}

// bases are the cells of its group that c is compared with: of those that it differs from in one field the first, or all
// before it if the field is the engine, and the one that it names.
func bases(c *Cell, group []*Cell) []*Cell {
	var list []*Cell
	for _, o := range group {
		if o == c {
			break
		}
		if comparedBy(c, o) {
			list = append(list, o)
			if c.Compare != "engine" {
				break
			}
		}
	}
	for _, o := range group {
		if isAgainst(c, o) && !slices.Contains(list, o) {
			list = append(list, o)
		}
	}
	return list
}

// compare adds the ratios of c to base.
func (o *Outcome) compare(c, base *Cell, samples map[*Cell][]*sampled) {
	pairs := min(len(samples[c]), len(samples[base]))
	for _, q := range quantities() {
		single := samples[c][0].latency.TotalCount() == 1 // such a run has no distribution
		if !slices.Contains(comparedQuantities, q.name) || single && strings.HasPrefix(q.name, "p") {
			continue
		}
		var ratios []float64
		for i := range pairs {
			if q.name == "CPU/op" && (samples[c][i].cpuDoubtful() || samples[base][i].cpuDoubtful()) {
				continue
			}
			if r := q.value(samples[c][i]) / q.value(samples[base][i]); !math.IsNaN(r) && !math.IsInf(r, 0) {
				ratios = append(ratios, r)
			}
		}
		if len(ratios) == 0 {
			continue // nothing was measured to compare: the processor time of a run that took none
		}
		what, f := difference(c, base), figure(ratios)
		o.Compared = append(o.Compared, Comparison{
			What: what, Quantity: q.name, Of: c.Label(), To: base.Label(), Name: what + " " + q.name, Device: c.Device, Jobs: c.Jobs,
			Depth: c.Depth, Value: f.Median, Min: f.Min, Max: f.Max, Pairs: len(ratios), of: c,
		})
	}
}

// cpuDoubtful tells whether the processor time of an operation is less than the harness's own, so that what is left of it
// is mostly the error of both.
func (s *sampled) cpuDoubtful() bool {
	return float64(s.cpu) < s.harness*float64(s.count) || s.cpu == 0
}

// difference is c/base in short.
func difference(c, base *Cell) string {
	if c.Name == base.Name && c.Compare != "" {
		f, _ := fieldOf(c.Compare)
		return fmt.Sprintf("%s %s/%s", c.Name, nameOf(f, c), base.get(c.Compare))
	}
	of, to := c.Name, base.Name
	if c.Engine != base.Engine {
		of, to = strings.TrimSpace(of+" "+c.Engine), strings.TrimSpace(to+" "+base.Engine)
	}
	return of + "/" + to
}

// result makes the result of a cell.
func (x *Runner) result(c *Cell, list []*sampled) CellResult {
	r := CellResult{Cell: *c, Label: c.Label(), Runs: len(list), Harness: x.harness[[3]int{c.Jobs, c.Depth, c.CPUs}] / us}
	for _, q := range quantities() {
		*q.set(&r) = figure(column(list, q.value))
	}
	all := hdrhistogram.New(1, latencyMax, 3)
	var bytes uint64
	for _, s := range list {
		all.Merge(s.latency)
		for _, m := range s.stats.Methods {
			bytes += m.Bytes
			r.addMethod(MethodResult{Class: m.Class, Method: m.Method, Operations: m.Operations, Bytes: m.Bytes})
		}
	}
	for i := range r.Methods {
		r.Methods[i].Share = float64(r.Methods[i].Bytes) / float64(max(bytes, 1))
	}
	for i := range list[0].queues {
		r.Queues = append(r.Queues, middle(column(list, func(s *sampled) float64 { return shareOf(s.queues, i) })))
	}
	r.Leaves, r.Stages, r.Further = leaves(list), stages(list), further(list)
	r.Percentiles = curve(all)
	return r
}

func (r *CellResult) addMethod(m MethodResult) {
	for i, o := range r.Methods {
		if o.Class == m.Class && o.Method == m.Method {
			r.Methods[i].Operations += m.Operations
			r.Methods[i].Bytes += m.Bytes
			return
		}
	}
	r.Methods = append(r.Methods, m)
}

// shareOf is the part of one queue.
func shareOf(counts []uint64, i int) float64 {
	var sum uint64
	for _, n := range counts {
		sum += n
	}
	return float64(counts[i]) / float64(max(sum, 1))
}

// further are figures of what only some stacks tell, and all runs of a cell.
func further(list []*sampled) map[string]Figure {
	var figures map[string]Figure
	for name := range list[0].further {
		var values []float64
		for _, s := range list {
			if v, ok := s.further[name]; ok {
				values = append(values, v)
			}
		}
		if figures == nil {
			figures = map[string]Figure{}
		}
		figures[name] = figure(values)
	}
	return figures
}

// leaves are what the leaf devices counted, for each write.
func leaves(list []*sampled) []LeafResult {
	var results []LeafResult
	var ops, bytes float64
	for _, s := range list {
		n, b := s.writes, s.written
		if n == 0 {
			n, b = s.count, s.bytes
			if s.sent > 0 {
				n, b = s.sent, s.sent*(s.bytes/s.count)
			}
		}
		ops, bytes = ops+float64(n), bytes+float64(b)
	}
	for _, role := range []string{roleDevice, roleCOW, roleOther} {
		var sum ioCount
		found := false
		for _, s := range list {
			for i, n := range s.io {
				if s.roles[i] == role {
					sum.add(n)
					found = true
				}
			}
		}
		if found {
			results = append(results, LeafResult{
				Role: role, Reads: float64(sum.Reads) / ops, ReadBytes: float64(sum.ReadBytes) / bytes,
				Writes: float64(sum.Writes) / ops, WriteBytes: float64(sum.WriteBytes) / bytes, Flushes: float64(sum.Flushes) / ops,
				Copies: float64(sum.Copies) / ops, CopiedBytes: float64(sum.CopyBytes) / bytes,
			})
		}
	}
	return results
}

// curve is a histogram's curve of percentiles: more points the nearer it comes to the last.
func curve(h *hdrhistogram.Histogram) []Percentile {
	var list []Percentile
	for _, b := range h.CumulativeDistributionWithTicks(5) {
		list = append(list, Percentile{b.Quantile, float64(b.ValueAt) / us})
	}
	return list
}
