package bench

import (
	"fmt"
	"io"
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"text/tabwriter"
	"time"

	"cowherd/bench/model"
)

// ModelSuite is the name of the plan whose outcome Model wants.
const ModelSuite = "model"

// ModelReport is the model of the engines, fitted to what was measured, and what it says of more CPUs.
type ModelReport struct {
	Outcome  *Outcome           `json:"measured"`
	Fitted   model.Params       `json:"fitted"`
	Misfit   float64            `json:"misfit"` // root of the mean square of the errors, as a fraction
	Observed []ModelledLoad     `json:"observed"`
	Ahead    []model.Prediction `json:"predicted"`
	Limited  []model.Prediction `json:"predicted_with_slower_devices"` // on limitedCPUs
}

// ModelledLoad sets what the model makes of a load beside what was measured.
type ModelledLoad struct {
	model.Observation
	Scheme string       `json:"engine"`
	Model  model.Result `json:"model"`
}

// predictedCPUs are the numbers of CPUs that the model is run for.
var predictedCPUs = []int{1, 2, 4, 8, 16, 32, 128}

// limitedCPUs is the number for which the model is run with devices of limitedIOPS.
const limitedCPUs = 8

var limitedIOPS = []float64{250e3, 1e6, 4e6, 16e6}

// Model fits the model to the outcome of ModelSuite, and runs it for more CPUs, each with a job of its own of depth 32
// and of depth 1, under all assumptions of model.Assumptions.
func Model(o *Outcome) (*ModelReport, error) {
	r := &ModelReport{Outcome: o}
	schemes := map[string]model.Scheme{OneLock: model.OneLock, Serialised: model.Serialised, Scaled: model.Scaled}
	var observed []model.Observation
	for i := range o.Cells {
		c := &o.Cells[i]
		s, known := schemes[c.Cell.Engine]
		if !known || c.Cell.CPUs == 0 {
			continue
		}
		load := model.Load{Scheme: s, CPUs: c.Cell.CPUs, Jobs: c.Cell.Jobs, Depth: c.Cell.Depth}
		observed = append(observed, model.Observation{Load: load, IOPS: c.Ops.Median, MeanNS: 1000 * c.Mean.Median})
	}
	// What the search begins with: of the order of what Go and today's CPUs need.
	start := model.Params{
		Private: 250, Submit: 200, Worker: 300, Hold: 50, WakeCost: 500, WakeDelay: 3000, Switch: 200, Lines: 4,
		BatchSize: 64, Transfer: lineTransfer(),
	}
	var err error
	if r.Fitted, r.Misfit, err = model.Fit(start, observed); err != nil {
		return nil, fmt.Errorf("bench: model: %w", err)
	}
	for _, x := range observed {
		r.Observed = append(r.Observed, ModelledLoad{Observation: x, Scheme: x.Scheme.String(), Model: model.Run(r.Fitted, x.Load)})
	}
	assumptions := model.Assumptions(r.Fitted)
	for _, over := range []model.Scheme{model.OneLock, model.Serialised} {
		for _, depth := range []int{32, 1} {
			for _, cpus := range predictedCPUs {
				r.Ahead = append(r.Ahead, model.Predict(assumptions, over, cpus, depth))
			}
		}
		for _, iops := range limitedIOPS {
			r.Limited = append(r.Limited, model.Limited(assumptions, over, limitedCPUs, 32, iops))
		}
	}
	return r, nil
}

// lineTransfer measures how long a cache line takes from one CPU to another, in ns: two goroutines hand a number to each
// other. It is the least of many rounds, since others may have a CPU in some. Where there is one CPU it is a guess.
func lineTransfer() float64 {
	const rounds, guess = 50, 100
	if runtime.GOMAXPROCS(0) < 2 {
		return guess
	}
	least := math.Inf(1)
	for range rounds {
		least = min(least, handOver())
	}
	return max(10, least)
}

// handOver is one round of lineTransfer.
func handOver() float64 {
	const turns = 1 << 12
	var line struct {
		_    [128]byte
		turn atomic.Uint64
		_    [128]byte
	}
	var players sync.WaitGroup
	began := time.Now()
	for parity := range uint64(2) {
		players.Go(func() {
			for n := parity; n < turns; n += 2 {
				for spins := 0; line.turn.Load() != n; spins++ {
					if spins > 1<<12 {
						runtime.Gosched() // the other one has no CPU
					}
				}
				line.turn.Store(n + 1)
			}
		})
	}
	players.Wait()
	return float64(time.Since(began)) / turns
}

// WriteTable prints the report for people.
func (r *ModelReport) WriteTable(w io.Writer) error {
	f := &r.Fitted
	fmt.Fprintf(w, "Costs in ns: a request of the scaled engine %.0f; with a worker %.0f at the submitter's and %.0f at the worker's; the one\n"+
		"lock held for %.0f, twice; a line from another CPU %.0f, and %.1f of them for a request; waking %.0f, and %.0f until it\n"+
		"runs here, %.0f on another CPU. Misfit %.0f%%.\n\n",
		f.Private, f.Submit, f.Worker, f.Hold, f.Transfer, f.Lines, f.WakeCost, f.Switch, f.WakeDelay, 100*r.Misfit)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "engine\tCPUs\tjobs\tdepth\tkIOPS\tmodel\tmean µs\tmodel\t")
	for _, o := range r.Observed {
		fmt.Fprintf(t, "%s\t%d\t%d\t%d\t%.0f\t%.0f\t%.2f\t%.2f\t\n", o.Scheme, o.CPUs, o.Jobs, o.Depth, o.IOPS/1e3, o.Model.IOPS/1e3,
			o.MeanNS/1e3, o.Model.MeanNS/1e3)
	}
	fmt.Fprintln(t, "\nscaled over\tCPUs\tdepth\tthroughput\tlatency\tscaled kIOPS\tother kIOPS\tbusiest CPU: other\tscaled\t")
	for _, x := range r.Ahead {
		writePrediction(t, x, x.CPUs)
	}
	fmt.Fprintf(t, "\nwith %d CPUs, over\tkIOPS of device\tdepth\tthroughput\tlatency\tscaled kIOPS\tother kIOPS\tbusiest CPU: other\tscaled\t\n", limitedCPUs)
	for _, x := range r.Limited {
		writePrediction(t, x, int(x.DeviceIOPS/1e3))
	}
	return t.Flush()
}

// writePrediction prints a line of a table, with a number behind the other scheme's name.
func writePrediction(w io.Writer, x model.Prediction, number int) {
	fmt.Fprintf(w, "%s\t%d\t%d\t%.1f-%.1f\t%.4f-%.4f\t%.0f-%.0f\t%.0f-%.0f\t%.0f%%\t%.0f%%\t\n", x.Over, number, x.Depth,
		x.Throughput.Min, x.Throughput.Max, x.Latency.Min, x.Latency.Max, x.ScaledIOPS.Min/1e3, x.ScaledIOPS.Max/1e3,
		x.OtherIOPS.Min/1e3, x.OtherIOPS.Max/1e3, 100*x.OtherBusiest, 100*x.ScaledBusiest)
}
