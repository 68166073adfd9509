package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"text/tabwriter"
	"time"

	"cowherd/backend/file"
	"cowherd/backend/mem"
	"cowherd/backend/null"
	"cowherd/block"
	"cowherd/clonemeta"
	"cowherd/dm"
	"cowherd/kcopyd"
	"cowherd/target/clone"
)

// CloneConfig says what the suite of clones runs.
type CloneConfig struct {
	Jobs, Depth int
	RegionBytes int64
	WriteBytes  int64
	Regions     int // that are written, one write each, over all jobs; as many reads are done
	// Dir is a directory of the file system on which hydration is measured; "": it is not.
	Dir string
	// HydrateBytes is the length of the image that is hydrated there.
	HydrateBytes int64
	Repetitions  int
	Seed         uint64
	// Progress is told before each repetition; may be nil.
	Progress func(done, all int, what string)
}

// CloneReport is what the suite found.
type CloneReport struct {
	CPUs        int           `json:"cpus"`
	Repetitions int           `json:"repetitions"`
	RegionBytes int64         `json:"region_bytes"`
	WriteBytes  int64         `json:"write_bytes"`
	Jobs        int           `json:"jobs"`
	Depth       int           `json:"depth"`
	Results     []CloneResult `json:"results"`
	Ratios      []Ratio       `json:"ratios"`
}

// CloneResult is one measurement: medians over the repetitions. What does not apply is zero.
type CloneResult struct {
	What   string  `json:"what"`
	IOPS   float64 `json:"iops,omitempty"`
	MeanUS float64 `json:"latency_mean_us,omitempty"`
	P99US  float64 `json:"latency_p99_us,omitempty"`
	MiBps  float64 `json:"mib_per_second,omitempty"`
}

// What the suite measures.
const (
	cloneWrite = "first-write"    // 4 KiB writes, each to a region that is not hydrated, on devices that do nothing
	cloneCopy  = "copy"           // the image by one job of the engine
	cloneFill  = "hydration"      // the image by hydration, until it is committed
	cloneQuiet = "read"           // random reads of what is hydrated, while nothing else happens
	cloneBusy  = "read,hydrating" // the same while the rest is hydrated
)

// cloneSamples are figures by what was measured.
type cloneSamples struct {
	times map[string][]sample
	rates map[string][]float64
}

// Clone runs the suite: what is compared runs in turn, A B B A.
func Clone(ctx context.Context, c CloneConfig) (*CloneReport, error) {
	x := &cloneRig{config: c, rand: rand.New(rand.NewPCG(c.Seed, 0))}
	s := cloneSamples{times: map[string][]sample{}, rates: map[string][]float64{}}
	for rep := range c.Repetitions {
		type part struct {
			what string
			run  func() error
		}
		parts := []part{
			{"writes", func() error { return x.writes(&s, Serialised) }},
			{"writes", func() error { return x.writes(&s, Scaled) }},
			{"reads", func() error { return x.foreground(&s, cloneQuiet) }},
			{"reads while hydrating", func() error { return x.foreground(&s, cloneBusy) }},
		}
		if c.Dir != "" {
			parts = append(parts, part{"copy", func() error { return x.hydrate(&s, cloneCopy) }},
				part{"hydration", func() error { return x.hydrate(&s, cloneFill) }})
		}
		if rep%2 == 1 {
			slices.Reverse(parts)
		}
		for _, p := range parts {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			if c.Progress != nil {
				c.Progress(rep, c.Repetitions, p.what)
			}
			if err := p.run(); err != nil {
				return nil, fmt.Errorf("bench: %s: %w", p.what, err)
			}
		}
	}
	return x.report(&s), nil
}

// cloneRig makes clones to be measured.
type cloneRig struct {
	config CloneConfig
	rand   *rand.Rand
}

// rigged is a clone with all that belongs to it.
type rigged struct {
	clone    *clone.Clone
	device   *dm.Device
	engine   engine
	meta     *clonemeta.Metadata
	store    *mem.Device
	hydrated chan struct{}
}

// clone makes a clone of source on dest, with its metadata in memory.
func (x *cloneRig) clone(name string, source, dest block.Device) (_ *rigged, err error) {
	params := clonemeta.Params{
		RegionSize: block.SectorFloor(x.config.RegionBytes), TargetSize: block.SectorFloor(source.Size()),
	}
	r := &rigged{hydrated: make(chan struct{})}
	if r.store, err = mem.New(mem.Config{Size: clonemeta.Size(params)}); err != nil {
		return nil, err
	}
	if r.meta, err = clonemeta.Format(r.store, params); err != nil {
		return nil, err
	}
	r.engine = newEngine(name)
	batch := uint32(max(1, (1<<20)/x.config.RegionBytes))
	r.clone, err = clone.New(clone.Config{
		Name: "bench", Source: source, Destination: dest, Metadata: r.meta, Engine: r.engine,
		Hydration: clone.Hydration{Disabled: true, Threshold: 16 * batch, Batch: batch},
		Event: func(e clone.Event) {
			if e.Kind == clone.EventHydrated {
				close(r.hydrated)
			}
		},
	})
	if err != nil {
		return nil, err
	}
	r.device = dm.NewDevice("bench", r.clone, false)
	r.clone.Resume()
	return r, nil
}

func (r *rigged) close() error {
	return errors.Join(r.device.Close(context.Background()), r.clone.Close(), r.engine.Close(), r.meta.Close(), r.store.Close())
}

// blank is a device that does nothing, at once: it does not even zero what is read, as the null device does, which for
// regions of 64 KiB would cost more than everything else.
type blank struct{ size int64 }

func (d blank) Size() int64             { return d.size }
func (d blank) Limits() block.Limits    { return block.NoLimits() }
func (d blank) Submit(r *block.Request) { r.Complete(nil) }

// writes writes a part of each region once.
func (x *cloneRig) writes(s *cloneSamples, name string) (err error) {
	c := x.config
	size := int64(c.Regions) * c.RegionBytes
	source, dest := blank{size}, blank{size}
	r, err := x.clone(name, source, dest)
	if err != nil {
		return err
	}
	each := uint32(c.RegionBytes / c.WriteBytes)
	offsets := make([]uint32, c.Regions)
	for i := range offsets {
		offsets[i] = uint32(i)*each + x.rand.Uint32N(each)
	}
	m, err := x.jobs(r.device, block.OpWrite, offsets)
	if st := r.clone.Status(); err == nil && st.Hydrated != st.Regions {
		err = fmt.Errorf("%d of %d regions are hydrated", st.Hydrated, st.Regions)
	}
	if err = errors.Join(err, r.close()); err == nil {
		s.times[name] = append(s.times[name], m)
	}
	return err
}

// jobs does one operation at each offset, in random order, by jobs at the same time.
func (x *cloneRig) jobs(d block.Device, op block.Op, offsets []uint32) (sample, error) {
	c := x.config
	list := make([]*job, c.Jobs)
	for i := range list {
		part := offsets[i*len(offsets)/c.Jobs : (i+1)*len(offsets)/c.Jobs]
		x.rand.Shuffle(len(part), func(i, j int) { part[i], part[j] = part[j], part[i] })
		list[i] = newJob(d, block.Queue(i), c.Depth, op, c.WriteBytes, c.WriteBytes, part)
	}
	runtime.GC() // what earlier runs left is not this one's to pay for
	m, err := runJobs(list)
	if err != nil {
		return sample{}, err
	}
	const us = 1000.0
	return sample{
		iops: float64(m.count) / m.elapsed.Seconds(), mean: m.latency.Mean() / us,
		p50: float64(m.latency.ValueAtQuantile(50)) / us, p99: float64(m.latency.ValueAtQuantile(99)) / us,
	}, nil
}

// foregroundBytes is the length of the devices for reads beside hydration, hydratedBytes what is hydrated before.
const (
	foregroundBytes = 4 << 30
	hydratedBytes   = 64 << 20
)

// foreground reads what is hydrated, while the rest is being hydrated or not.
func (x *cloneRig) foreground(s *cloneSamples, what string) error {
	c := x.config
	source, err := null.New(null.Config{Size: foregroundBytes})
	if err != nil {
		return err
	}
	dest, err := mem.New(mem.Config{Size: foregroundBytes})
	if err != nil {
		return err
	}
	r, err := x.clone(Scaled, source, dest)
	if err != nil {
		return err
	}
	piece := make([]byte, 1<<20)
	for i := range piece {
		piece[i] = byte(i>>9) | 1
	}
	for at := int64(0); at < hydratedBytes && err == nil; at += int64(len(piece)) {
		err = block.Write(r.device, piece, at)
	}
	offsets := make([]uint32, c.Regions)
	for i := range offsets {
		offsets[i] = x.rand.Uint32N(uint32(hydratedBytes / c.WriteBytes))
	}
	before := r.clone.Status().Hydrated
	r.clone.SetHydration(what == cloneBusy)
	var m sample
	began := time.Now()
	if err == nil {
		m, err = x.jobs(r.device, block.OpRead, offsets)
	}
	rate := float64(r.clone.Status().Hydrated-before) * float64(c.RegionBytes) / (1 << 20) / time.Since(began).Seconds()
	if err = errors.Join(err, r.close(), dest.Close(), source.Close()); err == nil {
		s.times[what] = append(s.times[what], m)
		s.rates[what] = append(s.rates[what], rate)
	}
	return err
}

// hydrate copies an image in a directory, by a job of the engine or by hydration.
func (x *cloneRig) hydrate(s *cloneSamples, what string) (err error) {
	c := x.config
	var paths []string
	create := func(name string) (*file.Device, error) {
		path := filepath.Join(c.Dir, fmt.Sprintf("cowherd-bench-%d-%s", os.Getpid(), name))
		paths = append(paths, path)
		return file.Create(path, c.HydrateBytes, file.Options{})
	}
	defer func() {
		for _, p := range paths {
			err = errors.Join(err, os.Remove(p))
		}
	}()
	source, err := create("source")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, source.Close()) }()
	if err := fill(source); err != nil {
		return err
	}
	dest, err := create("dest")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dest.Close()) }()
	copied := x.copy
	if what == cloneFill {
		copied = x.fill
	}
	took, err := copied(source, dest)
	if err == nil {
		s.rates[what] = append(s.rates[what], float64(c.HydrateBytes)/(1<<20)/took.Seconds())
	}
	return err
}

// copy copies source to dest by one job.
func (x *cloneRig) copy(source, dest block.Device) (time.Duration, error) {
	engine := newEngine(Scaled)
	done := make(chan error, 1)
	began := time.Now()
	engine.Submit(&kcopyd.Job{
		From: kcopyd.Region{Device: source}, To: []kcopyd.Region{{Device: dest}}, Length: source.Size(), Class: kcopyd.Bulk,
		Done: func(j *kcopyd.Job) { done <- j.Err() },
	})
	err := errors.Join(<-done, block.Flush(dest))
	return time.Since(began), errors.Join(err, engine.Close())
}

// fill copies source to dest by hydration, the last commit included.
func (x *cloneRig) fill(source, dest block.Device) (time.Duration, error) {
	r, err := x.clone(Scaled, source, dest)
	if err != nil {
		return 0, err
	}
	began := time.Now()
	r.clone.SetHydration(true)
	<-r.hydrated
	return time.Since(began), r.close()
}

// report makes medians and ratios.
func (x *cloneRig) report(s *cloneSamples) *CloneReport {
	c := x.config
	rep := &CloneReport{
		CPUs: runtime.NumCPU(), Repetitions: c.Repetitions, RegionBytes: c.RegionBytes, WriteBytes: c.WriteBytes, Jobs: c.Jobs,
		Depth: c.Depth,
	}
	for _, key := range []string{Serialised, Scaled, cloneQuiet, cloneBusy, cloneCopy, cloneFill} {
		times, rates := s.times[key], s.rates[key]
		r := CloneResult{What: key}
		if key == Serialised || key == Scaled {
			r.What = cloneWrite + "," + key
		}
		if len(times) > 0 {
			r.IOPS = median(column(times, func(s sample) float64 { return s.iops }))
			r.MeanUS = median(column(times, func(s sample) float64 { return s.mean }))
			r.P99US = median(column(times, func(s sample) float64 { return s.p99 }))
		}
		if len(rates) > 0 {
			r.MiBps = median(rates)
		}
		if len(times)+len(rates) > 0 {
			rep.Results = append(rep.Results, r)
		}
	}
	ratio := func(name, device string, a, b []float64) {
		values := make([]float64, len(a))
		for i := range a {
			values[i] = a[i] / b[i]
		}
		if len(values) > 0 {
			rep.Ratios = append(rep.Ratios, Ratio{Name: name, Device: device, Jobs: c.Jobs, Depth: c.Depth,
				Value: median(values), Min: slices.Min(values), Max: slices.Max(values)})
		}
	}
	iops := func(s sample) float64 { return s.iops }
	mean := func(s sample) float64 { return s.mean }
	p99 := func(s sample) float64 { return s.p99 }
	ratio("first-write scaled/serialised iops", "blank", column(s.times[Scaled], iops), column(s.times[Serialised], iops))
	ratio("first-write scaled/serialised mean latency", "blank", column(s.times[Scaled], mean), column(s.times[Serialised], mean))
	ratio("read hydrating/quiet p99 latency", "mem", column(s.times[cloneBusy], p99), column(s.times[cloneQuiet], p99))
	ratio("hydration/copy rate", "file", s.rates[cloneFill], s.rates[cloneCopy])
	return rep
}

// WriteTable prints the report for people.
func (rep *CloneReport) WriteTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "what\tkIOPS\tmean µs\tp99 µs\tMiB/s\t")
	figure := func(format string, v float64) string {
		if v == 0 {
			return "-"
		}
		return fmt.Sprintf(format, v)
	}
	for _, r := range rep.Results {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t\n", r.What, figure("%.0f", r.IOPS/1000), figure("%.2f", r.MeanUS),
			figure("%.2f", r.P99US), figure("%.0f", r.MiBps))
	}
	fmt.Fprintln(t)
	fmt.Fprintln(t, "device\tratio\tjobs\tdepth\tmedian\tmin\tmax\t")
	for _, r := range rep.Ratios {
		fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%.2f\t%.2f\t%.2f\t\n", r.Device, r.Name, r.Jobs, r.Depth, r.Value, r.Min, r.Max)
	}
	return t.Flush()
}
