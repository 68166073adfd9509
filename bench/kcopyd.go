package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"

	"cowherd/backend/mem"
	"cowherd/backend/null"
	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/dm"
	"cowherd/kcopyd"
	"cowherd/target/snapshot"
)

// Engines by the names that results carry.
const (
	Serialised = "serialised"
	Scaled     = "scaled"
)

// Workloads of the suite: 4 KiB (one chunk) random writes, each chunk once.
const (
	Bare       = "bare-write"  // to the device itself
	FirstWrite = "first-write" // to an origin with one transient snapshot: every write copies its chunk
	LaterWrite = "later-write" // the same again: every chunk has been copied
)

// KcopydConfig says what the suite runs.
type KcopydConfig struct {
	Devices     []string // "null", "mem"
	Jobs        []int
	Depths      []int
	ChunkBytes  int64
	Chunks      int // written in each run, over all jobs
	Repetitions int
	Seed        uint64
	// Progress is told before each repetition; may be nil.
	Progress func(done, all int, what string)
}

// DefaultKcopydConfig is the suite that the project's figures come from: jobs as the kernel's tests have them and one
// for each CPU.
func DefaultKcopydConfig() KcopydConfig {
	jobs := []int{1, 2, 8}
	if n := runtime.NumCPU(); !slices.Contains(jobs, n) {
		jobs = append(jobs, n)
		slices.Sort(jobs)
	}
	return KcopydConfig{
		Devices: []string{"null", "mem"}, Jobs: jobs, Depths: []int{1, 32},
		ChunkBytes: 4096, Chunks: 1 << 17, Repetitions: 5, Seed: 1,
	}
}

// Result is one cell of the suite: medians over the repetitions.
type Result struct {
	Engine     string  `json:"engine"`
	Device     string  `json:"device"`
	Workload   string  `json:"workload"`
	Jobs       int     `json:"jobs"`
	Depth      int     `json:"depth"`
	ChunkBytes int64   `json:"chunk_bytes"`
	IOPS       float64 `json:"iops"`
	MeanUS     float64 `json:"latency_mean_us"`
	P50US      float64 `json:"latency_p50_us"`
	P99US      float64 `json:"latency_p99_us"`
	// QueueShare is the part of the copies that the busiest issuer issued: 1 for a single worker.
	QueueShare float64 `json:"queue_share"`
	// Spread is (max - min) / median of IOPS over the repetitions.
	Spread float64 `json:"iops_spread"`
}

// Ratio compares two cells of one run: the median of the ratios of repetitions that ran one after the other.
type Ratio struct {
	Name   string  `json:"name"`
	Device string  `json:"device"`
	Jobs   int     `json:"jobs"`
	Depth  int     `json:"depth"`
	Value  float64 `json:"value"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

// Report is what the suite found.
type Report struct {
	CPUs        int      `json:"cpus"`
	Repetitions int      `json:"repetitions"`
	Results     []Result `json:"results"`
	Ratios      []Ratio  `json:"ratios"`
}

// sample is one run of one workload.
type sample struct{ iops, mean, p50, p99, share float64 }

// cellKey names a cell within one (device, jobs, depth).
type cellKey struct{ engine, workload string }

// Kcopyd runs the suite: for each device, number of jobs and depth, the engines in turn, A B A B.
func Kcopyd(ctx context.Context, c KcopydConfig) (*Report, error) {
	report := &Report{CPUs: runtime.NumCPU(), Repetitions: c.Repetitions}
	all, done := len(c.Devices)*len(c.Jobs)*len(c.Depths)*c.Repetitions, 0
	for _, name := range c.Devices {
		rig, err := newRig(name, c)
		if err != nil {
			return nil, err
		}
		for _, jobs := range c.Jobs {
			for _, depth := range c.Depths {
				samples := make(map[cellKey][]sample)
				for rep := range c.Repetitions {
					if err := ctx.Err(); err != nil {
						return nil, errors.Join(err, rig.close())
					}
					if c.Progress != nil {
						c.Progress(done, all, fmt.Sprintf("%s, %d jobs, depth %d", name, jobs, depth))
					}
					done++
					if err := rig.repetition(samples, rep, jobs, depth); err != nil {
						return nil, errors.Join(err, rig.close())
					}
				}
				report.add(c, name, jobs, depth, samples)
			}
		}
		if err := rig.close(); err != nil {
			return nil, err
		}
	}
	return report, nil
}

// rig is an origin and a COW device to run on.
type rig struct {
	config      KcopydConfig
	origin, cow block.Device
	offsets     []uint32
	rand        *rand.Rand
}

func newRig(name string, c KcopydConfig) (*rig, error) {
	x := &rig{config: c, rand: rand.New(rand.NewPCG(c.Seed, 0))}
	size := int64(c.Chunks) * c.ChunkBytes
	var err error
	if x.origin, err = newDevice(name, size); err != nil {
		return nil, err
	}
	// Twice the size: the queues take chunks in batches.
	if x.cow, err = newDevice(name, 2*size); err != nil {
		return nil, err
	}
	x.offsets = make([]uint32, c.Chunks)
	return x, nil
}

// newDevice makes a device by its name; a memory device has all its memory touched before anything is measured.
func newDevice(name string, size int64) (block.Device, error) {
	switch name {
	case "null":
		return null.New(null.Config{Size: size})
	case "mem":
		d, err := mem.New(mem.Config{Size: size})
		if err != nil {
			return nil, err
		}
		return d, fill(d)
	}
	return nil, fmt.Errorf("bench: unknown device %q (there are: null, mem)", name)
}

func fill(d block.Device) error {
	piece := make([]byte, 1<<20)
	for i := range piece {
		piece[i] = byte(i>>9) | 1
	}
	for at := int64(0); at < d.Size(); at += int64(len(piece)) {
		if err := block.Write(d, piece[:min(int64(len(piece)), d.Size()-at)], at); err != nil {
			return fmt.Errorf("bench: fill the device: %w", err)
		}
	}
	return nil
}

func (x *rig) close() error {
	var errs []error
	for _, d := range []block.Device{x.origin, x.cow} {
		if c, ok := d.(io.Closer); ok {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}

// repetition runs every workload once, the engines one after the other and in turn first.
func (x *rig) repetition(samples map[cellKey][]sample, rep, jobs, depth int) error {
	engines := []string{Serialised, Scaled}
	if rep%2 == 1 {
		slices.Reverse(engines)
	}
	s, err := x.run(x.origin, block.OpWrite, jobs, depth)
	if err != nil {
		return err
	}
	samples[cellKey{"none", Bare}] = append(samples[cellKey{"none", Bare}], s)
	for _, engine := range engines {
		first, later, err := x.snapshotRuns(engine, jobs, depth)
		if err != nil {
			return err
		}
		samples[cellKey{engine, FirstWrite}] = append(samples[cellKey{engine, FirstWrite}], first)
		samples[cellKey{engine, LaterWrite}] = append(samples[cellKey{engine, LaterWrite}], later)
	}
	return nil
}

// snapshotRuns takes a snapshot, writes each chunk twice, and drops it.
func (x *rig) snapshotRuns(name string, jobs, depth int) (first, later sample, err error) {
	engine := newEngine(name)
	defer func() { err = errors.Join(err, engine.Close()) }()
	origin := snapshot.NewOrigin(x.origin)
	device := dm.NewDevice("bench", origin, false)
	chunk := cowstore.ChunkSize(x.config.ChunkBytes)
	s, err := snapshot.New(snapshot.Config{
		Name: "bench@snapshot", Origin: origin, COW: x.cow, ChunkSize: chunk, Engine: engine,
		Store: cowstore.NewTransient(x.cow.Size(), 0, chunk),
	})
	if err != nil {
		return first, later, err
	}
	if err := origin.Add(s); err != nil {
		return first, later, err
	}
	if first, err = x.run(device, block.OpWrite, jobs, depth); err != nil {
		return first, later, err
	}
	first.share = busiest(engine.QueueJobs())
	if later, err = x.run(device, block.OpWrite, jobs, depth); err != nil {
		return first, later, err
	}
	if cause := s.Status().Invalid; cause != nil {
		return first, later, fmt.Errorf("bench: the snapshot became invalid: %w", cause)
	}
	return first, later, nil
}

// engine is a copy engine that says where it issued its jobs from.
type engine interface {
	kcopyd.Engine
	QueueJobs() []uint64
}

func newEngine(name string) engine {
	if name == Serialised {
		return kcopyd.NewSerialised(kcopyd.Config{})
	}
	return kcopyd.NewScaled(kcopyd.Config{})
}

// busiest is the largest share of one issuer.
func busiest(counts []uint64) float64 {
	var sum, most uint64
	for _, n := range counts {
		sum += n
		most = max(most, n)
	}
	if sum == 0 {
		return 0
	}
	return float64(most) / float64(sum)
}

// run writes, or reads, every chunk of d once by jobs at the same time: each in random order over a range of its own, as
// fio's jobs in the tests of dm-snapshot's locking series.
func (x *rig) run(d block.Device, op block.Op, jobs, depth int) (sample, error) {
	for i := range x.offsets {
		x.offsets[i] = uint32(i)
	}
	list := make([]*job, jobs)
	for i := range list {
		part := x.offsets[i*len(x.offsets)/jobs : (i+1)*len(x.offsets)/jobs]
		x.rand.Shuffle(len(part), func(i, j int) { part[i], part[j] = part[j], part[i] })
		list[i] = newJob(d, block.Queue(i), depth, op, x.config.ChunkBytes, x.config.ChunkBytes, part)
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
