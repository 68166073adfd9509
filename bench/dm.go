package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"text/tabwriter"

	"cowherd/block"
	"cowherd/dm"
	"cowherd/target"
	"cowherd/target/linear"
)

// MappedConfig says what the suite of mapped devices runs.
type MappedConfig struct {
	Devices      []string // below: "null", "mem"
	Jobs, Depths []int
	RequestBytes int64
	Requests     int // in each run, over all jobs, each at another offset
	Repetitions  int
	Seed         uint64
	// Progress is told before each repetition; may be nil.
	Progress func(done, all int, what string)
}

// MappedResult is one stack of devices: medians over the repetitions.
type MappedResult struct {
	Device string  `json:"device"` // at the bottom
	Op     string  `json:"op"`     // "read", "write"
	Linear int     `json:"linear"` // how many linear devices lie over it; 0: bare
	Jobs   int     `json:"jobs"`
	Depth  int     `json:"depth"`
	IOPS   float64 `json:"iops"`
	MeanNS float64 `json:"latency_mean_ns"`
	P99NS  float64 `json:"latency_p99_ns"`
}

// MappedReport is what the suite found. The ratios are the request rates over mapped devices by those of the bare one.
type MappedReport struct {
	CPUs         int            `json:"cpus"`
	Repetitions  int            `json:"repetitions"`
	RequestBytes int64          `json:"request_bytes"`
	Results      []MappedResult `json:"results"`
	Ratios       []Ratio        `json:"ratios"`
}

// linears are how many linear devices the stacks of the suite have; the first is what the others are set beside.
var linears = []int{0, 1, 3}

// mappedRig is the stacks over one device.
type mappedRig struct {
	rig
	stacks map[int]block.Device // by the number of linear devices
	c      MappedConfig
}

// Mapped runs the suite: for each device, operation, number of jobs and depth the bare device and the stacks over it in
// turn, A B C, C B A.
func Mapped(ctx context.Context, c MappedConfig) (*MappedReport, error) {
	report := &MappedReport{CPUs: runtime.NumCPU(), Repetitions: c.Repetitions, RequestBytes: c.RequestBytes}
	done := 0
	for _, name := range c.Devices {
		x, err := newMappedRig(name, c)
		if err != nil {
			return nil, err
		}
		for _, op := range []block.Op{block.OpRead, block.OpWrite} {
			for _, jobs := range c.Jobs {
				for _, depth := range c.Depths {
					if c.Progress != nil {
						c.Progress(done, 2*len(c.Devices)*len(c.Jobs)*len(c.Depths), fmt.Sprintf("%s, %s, %d jobs, depth %d", name, op,
							jobs, depth))
					}
					done++
					samples, err := x.samples(ctx, op, jobs, depth)
					if err != nil {
						return nil, errors.Join(err, x.close())
					}
					report.add(name, op, jobs, depth, samples)
				}
			}
		}
		if err := x.close(); err != nil {
			return nil, err
		}
	}
	return report, nil
}

// newMappedRig makes a device and lays linear devices over it, one on the other.
func newMappedRig(name string, c MappedConfig) (*mappedRig, error) {
	size := int64(c.Requests) * c.RequestBytes
	leaf, err := newDevice(name, size)
	if err != nil {
		return nil, err
	}
	x := &mappedRig{c: c, stacks: map[int]block.Device{0: leaf}, rig: rig{
		config: KcopydConfig{ChunkBytes: c.RequestBytes}, origin: leaf, offsets: make([]uint32, c.Requests),
		rand: rand.New(rand.NewPCG(c.Seed, 0)),
	}}
	top := leaf
	for i := range slices.Max(linears) {
		top = dm.NewDevice(fmt.Sprint("bench", i), linear.New(target.Lower{Device: top}, 0, size), false)
		x.stacks[i+1] = top
	}
	return x, nil
}

// samples are the runs of each stack.
func (x *mappedRig) samples(ctx context.Context, op block.Op, jobs, depth int) (map[int][]sample, error) {
	samples := map[int][]sample{}
	for rep := range x.c.Repetitions {
		turn := slices.Clone(linears)
		if rep%2 == 1 {
			slices.Reverse(turn)
		}
		for _, n := range turn {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			s, err := x.run(x.stacks[n], op, jobs, depth)
			if err != nil {
				return nil, err
			}
			samples[n] = append(samples[n], s)
		}
	}
	return samples, nil
}

// add appends the results and ratios of one device, operation, number of jobs and depth.
func (rep *MappedReport) add(device string, op block.Op, jobs, depth int, samples map[int][]sample) {
	for _, n := range linears {
		list := samples[n]
		rep.Results = append(rep.Results, MappedResult{
			Device: device, Op: op.String(), Linear: n, Jobs: jobs, Depth: depth,
			IOPS:   median(column(list, func(s sample) float64 { return s.iops })),
			MeanNS: 1000 * median(column(list, func(s sample) float64 { return s.mean })),
			P99NS:  1000 * median(column(list, func(s sample) float64 { return s.p99 })),
		})
		if n == 0 {
			continue
		}
		ratios := make([]float64, len(list))
		for i := range list {
			ratios[i] = list[i].iops / samples[0][i].iops
		}
		rep.Ratios = append(rep.Ratios, Ratio{
			Name: fmt.Sprintf("%s through %d linear/bare iops", op, n), Device: device, Jobs: jobs, Depth: depth,
			Value: median(ratios), Min: slices.Min(ratios), Max: slices.Max(ratios),
		})
	}
}

// WriteTable prints the report for people.
func (rep *MappedReport) WriteTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "device\top\tlinear\tjobs\tdepth\tkIOPS\tmean ns\tp99 ns\t")
	for _, r := range rep.Results {
		fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%d\t%.0f\t%.0f\t%.0f\t\n", r.Device, r.Op, r.Linear, r.Jobs, r.Depth, r.IOPS/1000, r.MeanNS,
			r.P99NS)
	}
	fmt.Fprintln(t)
	writeRatios(t, rep.Ratios)
	return t.Flush()
}
