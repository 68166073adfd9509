package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"text/tabwriter"
	"time"

	"cowherd/backend/file"
	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/dm"
	"cowherd/target/snapshot"
)

// Kinds of exception stores by the names that results carry.
const (
	Transient  = "transient"
	Persistent = "persistent"
)

// StoreConfig says what the suite of exception stores runs.
type StoreConfig struct {
	// Dir is where the images are made, and removed: its file system is what is measured.
	Dir         string
	Jobs, Depth int
	ChunkBytes  int64
	Chunks      int // written in each run, over all jobs
	Records     int // of the store that is opened
	Repetitions int
	Seed        uint64
	// Progress is told before each repetition; may be nil.
	Progress func(done, all int, what string)
}

// StoreResult is one kind of store: medians over the repetitions.
type StoreResult struct {
	Store  string  `json:"store"`
	IOPS   float64 `json:"iops"` // first writes to an origin
	MeanUS float64 `json:"latency_mean_us"`
	P99US  float64 `json:"latency_p99_us"`
	CPUUS  float64 `json:"cpu_us"` // processor time of each write, the kernel's and the client's included
	// RecordsPerFlush is how many exceptions share a flush of the COW device; 0: the store flushes nothing.
	RecordsPerFlush float64 `json:"records_per_flush"`
}

// StoreReport is what the suite found.
type StoreReport struct {
	Dir         string        `json:"dir"`
	Jobs        int           `json:"jobs"`
	Depth       int           `json:"depth"`
	ChunkBytes  int64         `json:"chunk_bytes"`
	Repetitions int           `json:"repetitions"`
	Results     []StoreResult `json:"results"`
	// Ratio is first writes with a persistent store over those with a transient one, run by run.
	Ratio Ratio `json:"ratio"`
	Open  Open  `json:"open"`
}

// Open is how long it takes to open a store, set beside reading the same areas of the file one by one and doing nothing
// with them. Both find the file in the page cache.
type Open struct {
	Records  int     `json:"records"`
	OpenMS   float64 `json:"open_ms"`   // header, table and gaps, into the table of a snapshot
	ReadMS   float64 `json:"read_ms"`   // the areas alone
	Ratio    float64 `json:"ratio"`     // the median of their ratios
	RatioMax float64 `json:"ratio_max"` // the largest
}

// storeSample is one run of first writes.
type storeSample struct {
	sample
	cpu      float64 // microseconds of each write
	perFlush float64
}

// storeRig is the images that the suite works on.
type storeRig struct {
	config  StoreConfig
	origin  *file.Device
	paths   []string
	offsets []uint32
	rand    *rand.Rand
}

// Store runs the suite.
func Store(ctx context.Context, c StoreConfig) (report *StoreReport, err error) {
	x := &storeRig{config: c, offsets: make([]uint32, c.Chunks), rand: rand.New(rand.NewPCG(c.Seed, 0))}
	defer func() { err = errors.Join(err, x.close()) }()
	if x.origin, err = file.Create(x.path("origin"), int64(c.Chunks)*c.ChunkBytes, file.Options{}); err != nil {
		return nil, fmt.Errorf("bench: %w", err)
	}
	if err := errors.Join(fill(x.origin), block.Flush(x.origin)); err != nil {
		return nil, err
	}
	samples := map[string][]storeSample{}
	for rep := range c.Repetitions {
		x.tell(rep, "first writes")
		kinds := []string{Transient, Persistent}
		if rep%2 == 1 {
			slices.Reverse(kinds)
		}
		for _, kind := range kinds {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			s, err := x.firstWrites(kind)
			if err != nil {
				return nil, fmt.Errorf("bench: %s store: %w", kind, err)
			}
			samples[kind] = append(samples[kind], s)
		}
	}
	report = x.report(samples)
	report.Open, err = x.open(ctx)
	return report, err
}

func (x *storeRig) tell(rep int, what string) {
	if x.config.Progress != nil {
		x.config.Progress(rep, 2*x.config.Repetitions, what)
	}
}

// path is a new name for an image.
func (x *storeRig) path(what string) string {
	p := filepath.Join(x.config.Dir, fmt.Sprintf("cowherd-bench-%d-%s%d", os.Getpid(), what, len(x.paths)))
	x.paths = append(x.paths, p)
	return p
}

func (x *storeRig) close() error {
	var errs []error
	if x.origin != nil {
		errs = append(errs, x.origin.Close())
	}
	for _, p := range x.paths {
		if err := os.Remove(p); !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// leaf is a COW device.
type leaf interface {
	block.Device
	io.Closer
}

// cow makes a COW device as the daemon does, and a store on it.
func (x *storeRig) cow(kind string) (leaf, snapshot.Store, error) {
	c, chunk := x.config, cowstore.ChunkSize(x.config.ChunkBytes)
	length := int64(c.Chunks) * c.ChunkBytes
	if kind == Transient {
		d, err := file.TempStriped(c.Dir, 2*length, cowstore.StripeBytes(chunk), cowstore.Shards())
		if err != nil {
			return nil, nil, err
		}
		return d, cowstore.NewTransient(d.Size(), 0, chunk), nil
	}
	path := x.path("cow")
	d, err := file.Create(path, length+length/c.ChunkBytes*16+4*c.ChunkBytes, file.Options{})
	if err != nil {
		return nil, nil, err
	}
	p, err := cowstore.CreatePersistent(d, chunk, cowstore.PersistentConfig{})
	if err != nil {
		return nil, nil, errors.Join(err, d.Close())
	}
	return d, p, nil
}

// firstWrites takes a snapshot, writes each chunk of the origin once, and drops it.
func (x *storeRig) firstWrites(kind string) (s storeSample, err error) {
	cow, store, err := x.cow(kind)
	if err != nil {
		return s, err
	}
	defer func() {
		err = errors.Join(err, cow.Close())
		if kind == Persistent {
			err = errors.Join(err, os.Remove(x.paths[len(x.paths)-1]))
		}
	}()
	engine := newEngine(Scaled)
	defer func() { err = errors.Join(err, engine.Close()) }()
	origin := snapshot.NewOrigin(x.origin)
	taken, err := snapshot.New(snapshot.Config{
		Name: "bench@snapshot", Origin: origin, COW: cow, ChunkSize: cowstore.ChunkSize(x.config.ChunkBytes), Engine: engine,
		Store: store,
	})
	if err != nil {
		return s, err
	}
	if err := origin.Add(taken); err != nil {
		return s, err
	}
	writes := &rig{config: KcopydConfig{ChunkBytes: x.config.ChunkBytes}, offsets: x.offsets, rand: x.rand}
	before := processorTime()
	if s.sample, err = writes.run(dm.NewDevice("bench", origin, false), block.OpWrite, x.config.Jobs, x.config.Depth); err != nil {
		return s, err
	}
	s.cpu = float64((processorTime() - before).Nanoseconds()) / 1000 / float64(x.config.Chunks)
	if cause := taken.Status().Invalid; cause != nil {
		return s, fmt.Errorf("the snapshot became invalid: %w", cause)
	}
	if p, ok := store.(*cowstore.Persistent); ok {
		n := p.Commits()
		s.perFlush = float64(n.Records) / float64(max(1, n.Flushes))
	}
	return s, taken.Close()
}

// processorTime is what this process has used.
func processorTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// report makes medians and ratios.
func (x *storeRig) report(samples map[string][]storeSample) *StoreReport {
	c := x.config
	r := &StoreReport{Dir: c.Dir, Jobs: c.Jobs, Depth: c.Depth, ChunkBytes: c.ChunkBytes, Repetitions: c.Repetitions}
	for _, kind := range []string{Transient, Persistent} {
		list := samples[kind]
		r.Results = append(r.Results, StoreResult{
			Store:           kind,
			IOPS:            median(column(list, func(s storeSample) float64 { return s.iops })),
			MeanUS:          median(column(list, func(s storeSample) float64 { return s.mean })),
			P99US:           median(column(list, func(s storeSample) float64 { return s.p99 })),
			CPUUS:           median(column(list, func(s storeSample) float64 { return s.cpu })),
			RecordsPerFlush: median(column(list, func(s storeSample) float64 { return s.perFlush })),
		})
	}
	ratios := make([]float64, c.Repetitions)
	for i := range ratios {
		ratios[i] = samples[Persistent][i].iops / samples[Transient][i].iops
	}
	r.Ratio = Ratio{
		Name: "first-write persistent/transient iops", Device: "file", Jobs: c.Jobs, Depth: c.Depth,
		Value: median(ratios), Min: slices.Min(ratios), Max: slices.Max(ratios),
	}
	return r
}

// open measures how long it takes to open a store with random exceptions.
func (x *storeRig) open(ctx context.Context) (o Open, err error) {
	c, chunk := x.config, cowstore.ChunkSize(x.config.ChunkBytes)
	layout := cowstore.NewLayout(1<<62, chunk)
	areas := c.Records/layout.AreaRecords() + 2
	size := chunk.Offset(layout.AreaChunk(uint64(areas)))
	d, err := file.Create(x.path("open"), size, file.Options{})
	if err != nil {
		return o, fmt.Errorf("bench: %w", err)
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if err := x.fillStore(d, chunk); err != nil {
		return o, fmt.Errorf("bench: fill a store: %w", err)
	}
	below := nullOrigin{x.origin, int64(c.Records) * 16 * c.ChunkBytes}
	var opens, reads, ratios []float64
	for rep := range c.Repetitions {
		if err := ctx.Err(); err != nil {
			return o, err
		}
		x.tell(c.Repetitions+rep, "open a store")
		read, err := readAreas(d, chunk, areas-1)
		if err != nil {
			return o, err
		}
		opened, err := openStore(d, below)
		if err != nil {
			return o, err
		}
		reads, opens = append(reads, read), append(opens, opened)
		ratios = append(ratios, opened/read)
	}
	return Open{
		Records: c.Records, OpenMS: median(opens), ReadMS: median(reads), Ratio: median(ratios), RatioMax: slices.Max(ratios),
	}, nil
}

// nullOrigin is an origin of a size that nobody reads.
type nullOrigin struct {
	block.Device
	size int64
}

func (d nullOrigin) Size() int64 { return d.size }

// fillStore makes a store of Records exceptions of random chunks.
func (x *storeRig) fillStore(d block.Device, chunk cowstore.ChunkSize) error {
	p, err := cowstore.CreatePersistent(d, chunk, cowstore.PersistentConfig{})
	if err != nil {
		return err
	}
	if err := p.Load(0, func(cowstore.Record) bool { return true }); err != nil {
		return err
	}
	const together = 4096
	done := make(chan error, together)
	for old := range slices.Chunk(x.rand.Perm(x.config.Records), together) {
		for _, n := range old {
			first, count, err := p.Allocate(0, 1)
			if err != nil {
				return err
			}
			p.Commit(&cowstore.Commit{
				Old: cowstore.Chunk(n)*16 + cowstore.Chunk(n%13), New: first, Count: count,
				Done: func(c *cowstore.Commit) { done <- c.Err },
			})
		}
		for range old {
			if err := <-done; err != nil {
				return err
			}
		}
	}
	p.Wait()
	return block.Flush(d)
}

// readAreas reads the first areas of a store one by one, and tells the milliseconds.
func readAreas(d block.Device, chunk cowstore.ChunkSize, areas int) (float64, error) {
	layout := cowstore.NewLayout(d.Size(), chunk)
	p := make([]byte, chunk)
	start := time.Now()
	for area := range uint64(areas) {
		if err := block.Read(d, p, chunk.Offset(layout.AreaChunk(area))); err != nil {
			return 0, err
		}
	}
	return milliseconds(start), nil
}

// openStore opens the store as a snapshot of origin, and tells the milliseconds.
func openStore(d, origin block.Device) (float64, error) {
	start := time.Now()
	p, err := cowstore.OpenPersistent(d, cowstore.PersistentConfig{})
	if err != nil {
		return 0, err
	}
	_, err = snapshot.New(snapshot.Config{Name: "bench@open", Origin: snapshot.NewOrigin(origin), COW: d, Store: p})
	return milliseconds(start), err
}

func milliseconds(since time.Time) float64 { return float64(time.Since(since).Nanoseconds()) / 1e6 }

// WriteTable prints the report for people.
func (r *StoreReport) WriteTable(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(t, "first writes in %s, %d jobs, depth %d, chunks of %d\n", r.Dir, r.Jobs, r.Depth, r.ChunkBytes)
	fmt.Fprintln(t, "store\tkIOPS\tmean µs\tp99 µs\tCPU µs\texceptions a flush\t")
	for _, x := range r.Results {
		fmt.Fprintf(t, "%s\t%.1f\t%.1f\t%.1f\t%.1f\t%.1f\t\n", x.Store, x.IOPS/1000, x.MeanUS, x.P99US, x.CPUUS,
			x.RecordsPerFlush)
	}
	fmt.Fprintf(t, "\npersistent/transient: %.2f (%.2f to %.2f)\n", r.Ratio.Value, r.Ratio.Min, r.Ratio.Max)
	fmt.Fprintf(t, "a store of %d exceptions: opened in %.0f ms, its areas read in %.0f ms: %.1f times (at most %.1f)\n",
		r.Open.Records, r.Open.OpenMS, r.Open.ReadMS, r.Open.Ratio, r.Open.RatioMax)
	return t.Flush()
}
