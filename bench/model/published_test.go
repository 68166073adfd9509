package model

import "testing"

// TestPublished fits the model to the published scaling of the kernel's dm-snapshot on null_blk (commit 3f1637f21038:
// origin, 4 KiB random writes, 1 to 8 workers, before and after finer locks: thousands of requests a second at depth
// 32, and the latency of 8 workers at depth 1), and sees what it says of a scaled engine there. Nothing is known of its
// machine but that it had CPUs for 8 workers; the costs of a scaled request are taken to be those of submitter and
// worker together.
func TestPublished(t *testing.T) {
	published := map[Scheme]map[int]float64{
		OneLock:    {1: 57.7, 2: 63.4, 4: 67.3, 8: 60.6},
		Serialised: {1: 66.4, 2: 77.6, 4: 98.8, 8: 109.3},
	}
	var observed []Observation
	for _, s := range []Scheme{OneLock, Serialised} {
		for _, jobs := range []int{1, 2, 4, 8} {
			observed = append(observed, Observation{Load: Load{s, 8, jobs, 32}, IOPS: 1e3 * published[s][jobs]})
		}
	}
	observed = append(observed, Observation{Load: Load{OneLock, 8, 8, 1}, MeanNS: 121470},
		Observation{Load: Load{Serialised, 8, 8, 1}, MeanNS: 74440})
	start := Params{
		Private: 10000, Submit: 5000, Worker: 8000, Hold: 2000, Transfer: 100, WakeCost: 1000, WakeDelay: 5000, Switch: 1000,
		Lines: 20, BatchSize: 64, Bound: true,
	}
	p, misfit, err := Fit(start, observed)
	if err != nil {
		t.Fatal(err)
	}
	p.Private = p.Submit + p.Worker
	t.Logf("misfit %.2f: %+v", misfit, p)
	for _, o := range observed {
		r := Run(p, o.Load)
		t.Logf("%-10v %d workers, depth %2d: published %6.1f thousand a second, %6.1f us; by the model %6.1f, %6.1f", o.Scheme, o.Jobs,
			o.Depth, o.IOPS/1e3, o.MeanNS/1e3, r.IOPS/1e3, r.MeanNS/1e3)
	}
	for _, depth := range []int{32, 1} {
		scaled := Run(p, Load{Scaled, 8, 8, depth})
		for _, s := range []Scheme{OneLock, Serialised} {
			before := Run(p, Load{s, 8, 8, depth})
			t.Logf("scaled over %v, 8 workers, depth %d: %.1f thousand a second, %.1fx, latency %.3fx", s, depth, scaled.IOPS/1e3,
				scaled.IOPS/before.IOPS, scaled.MeanNS/before.MeanNS)
			if scaled.IOPS < 4*before.IOPS || scaled.MeanNS > 0.2*before.MeanNS {
				t.Errorf("that is less than was published for a scaled kcopyd: 4x and 0.2x")
			}
		}
	}
	if misfit > 0.3 {
		t.Errorf("misfit %.2f", misfit)
	}
}
