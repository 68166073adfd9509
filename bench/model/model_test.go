package model

import (
	"math"
	"testing"
)

func near(t *testing.T, what string, got, want, tolerance float64) {
	t.Helper()
	if math.Abs(got-want) > tolerance*want {
		t.Errorf("%s: %.4g, want %.4g within %.0f%%", what, got, want, 100*tolerance)
	}
}

// TestLimits sets the simulation beside what can be worked out.
func TestLimits(t *testing.T) {
	p := Params{Private: 200, Submit: 100, Worker: 150, Hold: 50, Transfer: 0, WakeCost: 0, WakeDelay: 0, BatchSize: 64}
	for _, cpus := range []int{1, 2, 8} {
		l := Load{Scaled, cpus, cpus, 32}
		r := Run(p, l)
		near(t, "scaled", r.IOPS, float64(cpus)*1e9/200, 0.01)
		near(t, "scaled, latency", r.MeanNS, 200, 0.01)
		near(t, "scaled, share", r.Busiest, 1/float64(cpus), 0.02)
	}
	// One CPU does both; two share the work; from then on the worker is the limit.
	near(t, "serialised, 1 CPU", Run(p, Load{Serialised, 1, 1, 32}).IOPS, 1e9/250, 0.02)
	near(t, "serialised, 8 CPUs", Run(p, Load{Serialised, 8, 8, 32}).IOPS, 1e9/150, 0.1)
	p.WorkerAlone = true
	r := Run(p, Load{Serialised, 4, 4, 32})
	near(t, "serialised, alone", r.IOPS, 1e9/150, 0.02)
	near(t, "serialised, latency", r.MeanNS, 4*32*150, 0.1) // Little's law
	near(t, "serialised, share", r.Busiest, 1, 0)
	// The lock is held twice for each request.
	p.Hold = 400
	near(t, "one lock", Run(p, Load{OneLock, 4, 4, 32}).IOPS, 1e9/800, 0.3)
	// At depth 1 the worker has to be woken for each request.
	p = Params{Submit: 100, Worker: 150, WakeDelay: 1000, WorkerAlone: true}
	near(t, "depth 1", Run(p, Load{Serialised, 1, 1, 1}).MeanNS, 100+1000+150, 0.01)
	// A device that does a million copies a second limits both.
	p = Params{Private: 100, Submit: 100, Worker: 100, DeviceGap: 1000}
	for _, s := range []Scheme{Serialised, Scaled} {
		r := Run(p, Load{s, 4, 4, 32})
		near(t, "the device", r.IOPS, 1e6, 0.02)
		near(t, "the device, latency", r.MeanNS, 4*32*1000, 0.1)
	}
	// A line that all write at every request is a limit of its own.
	p = Params{Private: 100, Transfer: 100, BatchSize: 1}
	near(t, "a shared line", Run(p, Load{Scaled, 32, 32, 1}).IOPS, 1e9/100, 0.05)
}

func TestMonotonous(t *testing.T) {
	p := Params{Private: 230, Submit: 150, Worker: 300, Hold: 60, Transfer: 80, WakeCost: 300, WakeDelay: 2000, Switch: 100, Lines: 2, BatchSize: 64}
	for _, s := range []Scheme{OneLock, Serialised, Scaled} {
		last := 0.0
		for _, cpus := range []int{1, 2, 4, 8, 16} {
			r := Run(p, Load{s, cpus, cpus, 32})
			t.Logf("%-10v %3d CPUs: %8.0f kIOPS, mean %8.2f us, p50 %8.2f us, busiest %.2f", s, cpus, r.IOPS/1e3, r.MeanNS/1e3, r.P50NS/1e3, r.Busiest)
			if r.IOPS < 0.55*last {
				// More CPUs make lines wander, so that the worker may become slower, but not by more than they cost.
				t.Errorf("%v: %d CPUs do %.0f requests a second, fewer CPUs did %.0f", s, cpus, r.IOPS, last)
			}
			last = r.IOPS
		}
	}
}

// TestFit finds costs again from what the model itself has measured with them.
func TestFit(t *testing.T) {
	want := Params{Private: 230, Submit: 150, Worker: 300, Hold: 60, Transfer: 80, WakeCost: 300, WakeDelay: 2000, Switch: 100, Lines: 2, BatchSize: 64}
	var observed []Observation
	for _, l := range []Load{
		{Scaled, 1, 1, 1}, {Scaled, 2, 2, 32}, {Serialised, 1, 1, 32}, {Serialised, 2, 2, 32}, {Serialised, 2, 1, 1},
		{OneLock, 2, 2, 32}, {OneLock, 1, 1, 32},
	} {
		r := Run(want, l)
		observed = append(observed, Observation{l, r.IOPS, r.MeanNS})
	}
	start := Params{Private: 500, Submit: 300, Worker: 300, Hold: 100, Transfer: 80, WakeCost: 500, WakeDelay: 5000, Switch: 200, Lines: 2, BatchSize: 64}
	p, misfit, err := Fit(start, observed)
	if err != nil {
		t.Fatal(err)
	}
	if t.Logf("misfit %.3f: %+v", misfit, p); misfit > 0.03 {
		t.Errorf("misfit %.3f", misfit)
	}
	near(t, "private", p.Private, want.Private, 0.05)
	near(t, "submit and worker", p.Submit+p.Worker, want.Submit+want.Worker, 0.1)
	x := Predict(Assumptions(p), Serialised, 8, 32)
	if t.Logf("%+v", x); x.Throughput.Min < 8 || x.Throughput.Min > x.Throughput.Max || x.Latency.Max > 0.2 {
		t.Errorf("prediction %+v", x)
	}
	if x := Limited(Assumptions(p), Serialised, 8, 32, 1e6); x.Throughput.Max > 1.5 || x.ScaledIOPS.Max > 1.02e6 {
		t.Errorf("with a slow device %+v", x)
	}
	if _, _, err := Fit(start, nil); err == nil {
		t.Error("something was fitted to nothing")
	}
}
