package demo

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"

	"cowherd/backend/nbd"
	"cowherd/bench"
	"cowherd/block"
)

const measureName = "vm@measure"

// The lines of the table.
const (
	ratePlain = iota
	rateFirst
	rateLater
	rateDropped
	rateCount
)

var rateNames = [rateCount]string{
	ratePlain:   "plain",
	rateFirst:   "snapshot active, first write to a chunk",
	rateLater:   "snapshot active, chunk copied before",
	rateDropped: "snapshot dropped",
}

// benchJobs and benchDepth are what the engines are compared with in process.
const (
	benchJobs  = 2
	benchDepth = 32
)

// measurement is one connection of all runs to an export.
type measurement struct {
	device *nbd.Device
	runs   []*run
	order  []uint32
}

// measure makes the table: each rate several times, in turn, so that what disturbs disturbs all.
func (s *stage) measure(ctx context.Context, n *narrator, report *Report) error {
	n.say("Measuring, %d times in turn ...\n", s.config.Repetitions)
	defer n.quiet()
	var rates [rateCount][]float64
	var serialised []float64
	for rep := range s.config.Repetitions {
		if rep > 0 && time.Since(n.began) > budget {
			break
		}
		tell := func(what string) { n.state("repetition %d of %d: %s", rep+1, s.config.Repetitions, what) }
		all, err := s.rates(ctx, s.scaled, uint64(rep), rateCount, tell)
		if err != nil {
			return err
		}
		for i, r := range all {
			rates[i] = append(rates[i], r)
		}
		if all, err = s.rates(ctx, s.serialised, uint64(rep), rateLater, tell); err != nil {
			return err
		}
		serialised = append(serialised, all[rateFirst])
	}
	n.state("the copy engines in process")
	report.Repetitions = len(serialised)
	inProcess, err := s.inProcess(ctx, report.Repetitions)
	if err != nil {
		return err
	}
	for i, values := range rates {
		report.Rates = append(report.Rates, Rate{
			Name: rateNames[i], PerSecond: median(values), OfPlain: median(ratios(values, rates[ratePlain])),
			Spread: (slices.Max(values) - slices.Min(values)) / median(values),
		})
	}
	report.Engines = []Engine{{
		Where:      fmt.Sprintf("over NBD, %d connections", s.config.Connections),
		Serialised: median(serialised), Scaled: median(rates[rateFirst]), Ratio: median(ratios(rates[rateFirst], serialised)),
	}, inProcess}
	return nil
}

// rates attaches the image to a daemon and takes the rates below end, one after the other.
func (s *stage) rates(
	ctx context.Context, d *daemon, seed uint64, end int, tell func(string),
) (rates [rateCount]float64, err error) {
	if err := d.attach(ctx, s.image); err != nil {
		return rates, err
	}
	device, err := d.open(ctx, "vm", s.config.Connections)
	if err != nil {
		return rates, err
	}
	m := measurement{device: device, order: shuffled(len(s.before), seed)}
	for i := range s.config.Connections {
		m.runs = append(m.runs, newRun(device, block.Queue(i), s.config.Depth))
	}
	for i := 0; i < end && err == nil; i++ {
		tell(d.engine + " engine, " + rateNames[i])
		if err = m.prepare(ctx, d, i); err == nil {
			rates[i], err = m.rate(ctx)
		}
	}
	if err == nil && end <= rateDropped {
		err = m.prepare(ctx, d, rateDropped)
	}
	err = errors.Join(err, device.Close())
	if err == nil {
		err = d.client.Detach(ctx, "vm")
	}
	return rates, err
}

// prepare makes the snapshot come or go before a rate is taken.
func (m *measurement) prepare(ctx context.Context, d *daemon, rate int) error {
	switch rate {
	case rateFirst:
		_, err := d.snapshot(ctx, measureName)
		return err
	case rateDropped:
		return d.client.RemoveSnapshot(ctx, measureName, false)
	}
	return nil
}

// rate writes every block once over all connections, and is the writes per second.
func (m *measurement) rate(ctx context.Context) (float64, error) {
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	runtime.GC() // what went before is not this run's to pay for
	begun := time.Now()
	for i, x := range m.runs {
		x.start(m.order[i*len(m.order)/len(m.runs) : (i+1)*len(m.order)/len(m.runs)])
	}
	var errs []error
	for _, x := range m.runs {
		errs = append(errs, x.wait())
	}
	return float64(len(m.order)) / time.Since(begun).Seconds(), errors.Join(errs...)
}

// inProcess compares the engines over a null device, without a client, a socket or a disk.
func (s *stage) inProcess(ctx context.Context, repetitions int) (Engine, error) {
	report, err := bench.Kcopyd(ctx, bench.KcopydConfig{
		Devices: []string{"null"}, Jobs: []int{benchJobs}, Depths: []int{benchDepth}, ChunkBytes: blockSize,
		Chunks: min(2*len(s.before), 1<<17), Repetitions: repetitions, Seed: 1,
	})
	if err != nil {
		return Engine{}, err
	}
	e := Engine{Where: fmt.Sprintf("in process, null device, %d jobs", benchJobs)}
	for _, r := range report.Results {
		switch {
		case r.Workload == bench.FirstWrite && r.Engine == bench.Serialised:
			e.Serialised = r.IOPS
		case r.Workload == bench.FirstWrite && r.Engine == bench.Scaled:
			e.Scaled = r.IOPS
		}
	}
	if e.Serialised == 0 || e.Scaled == 0 {
		return e, errors.New("the benchmark has no first writes")
	}
	e.Ratio = e.Scaled / e.Serialised
	return e, nil
}

// ratios divides a by b, one by one.
func ratios(a, b []float64) []float64 {
	r := make([]float64, len(a))
	for i := range a {
		r[i] = a[i] / b[i]
	}
	return r
}

// median of values, which must not be empty.
func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}
