package bench

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

// add appends the cells and ratios of one device, number of jobs and depth.
func (rep *Report) add(c KcopydConfig, device string, jobs, depth int, samples map[cellKey][]sample) {
	for _, key := range []cellKey{
		{"none", Bare}, {Serialised, FirstWrite}, {Scaled, FirstWrite}, {Serialised, LaterWrite}, {Scaled, LaterWrite},
	} {
		list := samples[key]
		iops := column(list, func(s sample) float64 { return s.iops })
		rep.Results = append(rep.Results, Result{
			Engine: key.engine, Device: device, Workload: key.workload, Jobs: jobs, Depth: depth,
			ChunkBytes: c.ChunkBytes, IOPS: median(iops),
			MeanUS:     median(column(list, func(s sample) float64 { return s.mean })),
			P50US:      median(column(list, func(s sample) float64 { return s.p50 })),
			P99US:      median(column(list, func(s sample) float64 { return s.p99 })),
			QueueShare: median(column(list, func(s sample) float64 { return s.share })),
			Spread:     (slices.Max(iops) - slices.Min(iops)) / median(iops),
		})
	}
	scaled, serialised := samples[cellKey{Scaled, FirstWrite}], samples[cellKey{Serialised, FirstWrite}]
	bare, later := samples[cellKey{"none", Bare}], samples[cellKey{Scaled, LaterWrite}]
	ratio := func(name string, a, b []sample, value func(sample) float64) {
		values := make([]float64, len(a))
		for i := range a {
			values[i] = value(a[i]) / value(b[i])
		}
		rep.Ratios = append(rep.Ratios, Ratio{
			Name: name, Device: device, Jobs: jobs, Depth: depth,
			Value: median(values), Min: slices.Min(values), Max: slices.Max(values),
		})
	}
	iops := func(s sample) float64 { return s.iops }
	ratio("first-write scaled/serialised iops", scaled, serialised, iops)
	ratio("first-write scaled/serialised mean latency", scaled, serialised, func(s sample) float64 { return s.mean })
	ratio("first-write scaled/serialised p50 latency", scaled, serialised, func(s sample) float64 { return s.p50 })
	ratio("first-write scaled/bare iops", scaled, bare, iops)
	ratio("later-write scaled/bare iops", later, bare, iops)
}

func column[T any](list []T, value func(T) float64) []float64 {
	values := make([]float64, len(list))
	for i, s := range list {
		values[i] = value(s)
	}
	return values
}

// median of values, which must not be empty.
func median[T cmp.Ordered](values []T) T {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}

// WriteTable prints the report for people.
func (rep *Report) WriteTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "device\tworkload\tengine\tjobs\tdepth\tkIOPS\tmean µs\tp50 µs\tp99 µs\tbusiest\tspread\t")
	for _, r := range rep.Results {
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%d\t%.0f\t%.2f\t%.2f\t%.2f\t%.0f%%\t%.0f%%\t\n", r.Device, r.Workload, r.Engine,
			r.Jobs, r.Depth, r.IOPS/1000, r.MeanUS, r.P50US, r.P99US, 100*r.QueueShare, 100*r.Spread)
	}
	fmt.Fprintln(t)
	writeRatios(t, rep.Ratios)
	return t.Flush()
}

// writeRatios prints ratios for people.
func writeRatios(w io.Writer, ratios []Ratio) {
	fmt.Fprintln(w, "device\tratio\tjobs\tdepth\tmedian\tmin\tmax\t")
	for _, r := range ratios {
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%.2f\t%.2f\t%.2f\t\n", r.Device, r.Name, r.Jobs, r.Depth, r.Value, r.Min, r.Max)
	}
}
