package model

import (
	"errors"
	"math"
)

// An Observation is what was measured under a load.
type Observation struct {
	Load
	IOPS   float64 `json:"iops"`
	MeanNS float64 `json:"latency_mean_ns"` // 0: not measured
}

// Fit finds the costs with which the model comes nearest to what was measured: by the logarithms of rates and latencies,
// which all weigh the same. Private, Submit, Worker, Hold, WakeCost, WakeDelay, Switch and Lines are searched for, each from a
// tenth of start to ten times that; the others are taken from start as they are. The misfit is the root of the mean
// square of the errors, as a fraction: 0.1 is about 10 %.
//
// The search is a descent along one cost after the other, with steps that become smaller. It is deterministic.
func Fit(start Params, observed []Observation) (p Params, misfit float64, err error) {
	if len(observed) == 0 {
		return p, 0, errors.New("nothing was measured that the model could be fitted to")
	}
	p, misfit = start, distance(start, observed)
	for step := 2.0; step > 1.01; step = math.Sqrt(step) {
		for better := true; better; {
			better = false
			for i := range costs(&p) {
				for _, factor := range []float64{step, 1 / step} {
					q := p
					cost, first := costs(&q)[i], *costs(&start)[i]
					if *cost *= factor; *cost > 10*first || *cost < first/10 {
						continue
					}
					if d := distance(q, observed); d < misfit*0.999 {
						p, misfit, better = q, d, true
					}
				}
			}
		}
	}
	return p, misfit, nil
}

// costs are what is searched for.
func costs(p *Params) []*float64 {
	return []*float64{&p.Private, &p.Submit, &p.Worker, &p.Hold, &p.WakeCost, &p.WakeDelay, &p.Switch, &p.Lines}
}

// distance is how far the model is from what was measured.
func distance(p Params, observed []Observation) float64 {
	sum, n := 0.0, 0
	add := func(got, want float64) {
		if want > 0 {
			d := math.Log(got / want)
			sum, n = sum+d*d, n+1
		}
	}
	for _, o := range observed {
		r := Run(p, o.Load)
		add(r.IOPS, o.IOPS)
		add(r.MeanNS, o.MeanNS)
	}
	return math.Sqrt(sum / float64(max(n, 1)))
}

// A Prediction is the model's for some CPUs, each with a job of its own, over the assumptions that were tried: the least
// and the greatest of each ratio.
type Prediction struct {
	CPUs  int `json:"cpus"`
	Depth int `json:"depth"`
	// Scaled over the other scheme.
	Over            string  `json:"over"`
	Throughput      Range   `json:"throughput_ratio"`
	Latency         Range   `json:"latency_ratio"`
	ScaledIOPS      Range   `json:"scaled_iops"`
	OtherIOPS       Range   `json:"other_iops"`
	OtherBusiest    float64 `json:"other_busiest_share"`
	ScaledBusiest   float64 `json:"scaled_busiest_share"`
	AssumptionsUsed int     `json:"assumptions"`
	DeviceIOPS      float64 `json:"device_iops,omitempty"` // the most that the device does; 0: there is no limit
}

// A Range is from the least to the greatest.
type Range struct {
	Min float64 `json:"min"`
	Max float64 `json:"max"`
}

func (r *Range) add(x float64, first bool) {
	if first {
		r.Min, r.Max = x, x
		return
	}
	r.Min, r.Max = min(r.Min, x), max(r.Max, x)
}

// Predict runs the model for a number of CPUs under each of the assumptions.
func Predict(assumptions []Params, over Scheme, cpus, depth int) Prediction {
	x := Prediction{CPUs: cpus, Depth: depth, Over: over.String(), AssumptionsUsed: len(assumptions)}
	for i, p := range assumptions {
		scaled, other := Run(p, Load{Scaled, cpus, cpus, depth}), Run(p, Load{over, cpus, cpus, depth})
		x.Throughput.add(scaled.IOPS/other.IOPS, i == 0)
		x.Latency.add(scaled.MeanNS/other.MeanNS, i == 0)
		x.ScaledIOPS.add(scaled.IOPS, i == 0)
		x.OtherIOPS.add(other.IOPS, i == 0)
		x.OtherBusiest, x.ScaledBusiest = max(x.OtherBusiest, other.Busiest), max(x.ScaledBusiest, scaled.Busiest)
	}
	return x
}

// Limited is Predict for a device that does no more than iops copies in a second.
func Limited(assumptions []Params, over Scheme, cpus, depth int, iops float64) Prediction {
	var limited []Params
	for _, p := range assumptions {
		p.DeviceGap = 1e9 / iops
		limited = append(limited, p)
	}
	x := Predict(limited, over, cpus, depth)
	x.DeviceIOPS = iops
	return x
}

// Assumptions are variants of fitted costs, for what cannot be fitted on few CPUs: how long a line takes to come from
// another CPU, on machines on which that is nearer or farther; whether the worker has a CPU of its own; whether jobs stay
// where they are; whether the work of a request becomes dearer as more CPUs share memory and caches (by a quarter).
func Assumptions(p Params) (all []Params) {
	for _, transfer := range []float64{p.Transfer, 60, 120, 250} {
		for _, alone := range []bool{false, true} {
			for _, bound := range []bool{false, true} {
				for _, dearer := range []float64{1, 1.25} {
					q := p
					q.Transfer, q.WorkerAlone, q.Bound = transfer, alone, bound
					q.Private *= dearer
					all = append(all, q)
				}
			}
		}
	}
	return all
}
