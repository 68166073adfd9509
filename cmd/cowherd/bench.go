package main

import (
	"context"
	"fmt"
	"io"
	"math"
	"os/signal"
	"syscall"

	"cowherd/bench"
	"cowherd/cowstore"
	"cowherd/internal/size"
)

type benchCmd struct {
	Kcopyd benchKcopydCmd `cmd:"" help:"Compare the copy engines: first and later writes to an origin with a transient snapshot."`
	Store  benchStoreCmd  `cmd:"" help:"Compare transient and persistent exception stores on a file system: first writes, exceptions a flush, opening."`
	Clone  benchCloneCmd  `cmd:"" help:"Clones: first writes to regions by either engine, hydration beside reads, and its rate on a file system."`
	Dm     benchDMCmd     `cmd:"" help:"Compare a device in memory, bare and through linear devices that lie on each other."`
}

type benchKcopydCmd struct {
	outputFlags
	Device      []string  `enum:"null,mem" default:"null,mem" placeholder:"DEVICE" help:"Devices to run on: null, mem (both)."`
	Jobs        []int     `placeholder:"N" help:"Numbers of jobs that write at the same time (1, 2, 8, and one for each CPU)."`
	Depth       []int     `default:"1,32" placeholder:"N" help:"Requests that each job keeps in flight (${default})."`
	Chunk       size.Size `default:"4k" placeholder:"SIZE" help:"Chunk size, and size of each write (${default})."`
	Chunks      int       `default:"131072" placeholder:"N" help:"Chunks that each run writes, over all jobs (${default})."`
	Repetitions int       `default:"5" placeholder:"N" help:"Runs of each engine, in turn (${default})."`
}

func (benchKcopydCmd) Help() string {
	return `Everything runs in this process. Each figure is the median of the repetitions, which alternate between
the engines; a ratio is the median of the ratios of runs that followed one another.

Examples:

    cowherd bench kcopyd
    cowherd bench kcopyd --json | jq .ratios
    cowherd bench kcopyd --device null --jobs 2 --depth 32 --repetitions 11
`
}

// config checks the flags.
func (c *benchKcopydCmd) config() (bench.KcopydConfig, error) {
	config := bench.DefaultKcopydConfig()
	config.Devices, config.Depths = c.Device, c.Depth
	config.ChunkBytes, config.Chunks, config.Repetitions = int64(c.Chunk), c.Chunks, c.Repetitions
	if len(c.Jobs) > 0 {
		config.Jobs = c.Jobs
	}
	if err := cowstore.CheckChunkSize(config.ChunkBytes); err != nil {
		return config, usagef("--chunk: %w", err)
	}
	most := math.MaxInt64 / 4 / config.ChunkBytes
	for _, f := range []struct {
		flag   string
		values []int
		most   int64
	}{
		{"--jobs", config.Jobs, 1024}, {"--depth", config.Depths, 4096}, {"--chunks", []int{c.Chunks}, min(most, math.MaxUint32)},
		{"--repetitions", []int{c.Repetitions}, 1000},
	} {
		for _, v := range f.values {
			if v < 1 || int64(v) > f.most {
				return config, usagef("%s: %d is not between 1 and %d", f.flag, v, f.most)
			}
		}
	}
	return config, nil
}

func (c *benchKcopydCmd) Run(s *session) error {
	config, err := c.config()
	if err != nil {
		return err
	}
	return runSuite(s, c.JSON, func(ctx context.Context, progress func(done, all int, what string)) (benchReport, error) {
		config.Progress = progress
		return bench.Kcopyd(ctx, config)
	})
}

type benchStoreCmd struct {
	outputFlags
	Dir         string    `arg:"" complete:"file" help:"A directory of the file system to measure; images are made in it, and removed."`
	Jobs        int       `default:"2" placeholder:"N" help:"Jobs that write at the same time (${default})."`
	Depth       int       `default:"32" placeholder:"N" help:"Requests that each job keeps in flight (${default})."`
	Chunk       size.Size `default:"4k" placeholder:"SIZE" help:"Chunk size, and size of each write (${default})."`
	Chunks      int       `default:"65536" placeholder:"N" help:"Chunks that each run writes, over all jobs (${default})."`
	Records     int       `default:"1000000" placeholder:"N" help:"Exceptions of the store that is opened (${default})."`
	Repetitions int       `default:"5" placeholder:"N" help:"Runs of each store, in turn (${default})."`
}

func (benchStoreCmd) Help() string {
	return `Everything runs in this process, on files in DIR. A persistent snapshot commits exceptions in groups: how many
share one flush is shown. Opening a store is set beside reading its areas, both from the page cache.

Examples:

    cowherd bench store /dev/shm
    cowherd bench store /var/tmp --depth 64 --json | jq .results
`
}

func (c *benchStoreCmd) Run(s *session) error {
	if err := cowstore.CheckNewChunkSize(int64(c.Chunk)); err != nil {
		return usagef("--chunk: %w", err)
	}
	for flag, v := range map[string][2]int{
		"--jobs": {c.Jobs, 1024}, "--depth": {c.Depth, 4096}, "--chunks": {c.Chunks, math.MaxInt32},
		"--records": {c.Records, 1 << 28}, "--repetitions": {c.Repetitions, 1000},
	} {
		if v[0] < 1 || v[0] > v[1] {
			return usagef("%s: %d is not between 1 and %d", flag, v[0], v[1])
		}
	}
	return runSuite(s, c.JSON, func(ctx context.Context, progress func(done, all int, what string)) (benchReport, error) {
		return bench.Store(ctx, bench.StoreConfig{
			Dir: c.Dir, Jobs: c.Jobs, Depth: c.Depth, ChunkBytes: int64(c.Chunk), Chunks: c.Chunks, Records: c.Records,
			Repetitions: c.Repetitions, Seed: 1, Progress: progress,
		})
	})
}

type benchCloneCmd struct {
	outputFlags
	Dir         string    `arg:"" optional:"" complete:"file" help:"A directory of the file system on which hydration is measured beside a plain copy; images are made in it, and removed."`
	Jobs        int       `default:"2" placeholder:"N" help:"Jobs at the same time (${default})."`
	Depth       int       `default:"32" placeholder:"N" help:"Requests that each job keeps in flight (${default})."`
	RegionSize  size.Size `default:"64k" placeholder:"SIZE" help:"Region size (${default})."`
	WriteSize   size.Size `default:"4k" placeholder:"SIZE" help:"Size of each write and read (${default})."`
	Regions     int       `default:"131072" placeholder:"N" help:"Regions that each run writes to, once each (${default})."`
	Length      size.Size `default:"1g" placeholder:"SIZE" help:"Length of the image that is hydrated in DIR (${default})."`
	Repetitions int       `default:"5" placeholder:"N" help:"Runs of each measurement, in turn (${default})."`
}

func (benchCloneCmd) Help() string {
	return `Everything runs in this process, the clones' metadata in memory. Writes run on devices that do nothing, each into
a region that is not hydrated; reads on a memory device, of what is hydrated, while the rest is being hydrated or not. With DIR
an image is made there and copied, by one job of the copy engine and by hydration up to the last commit.

Examples:

    cowherd bench clone
    cowherd bench clone /dev/shm --json | jq .ratios
`
}

func (c *benchCloneCmd) Run(s *session) error {
	for flag, v := range map[string][3]int64{
		"--jobs": {int64(c.Jobs), 1, 1024}, "--depth": {int64(c.Depth), 1, 4096}, "--regions": {int64(c.Regions), 1, 1 << 24},
		"--repetitions": {int64(c.Repetitions), 1, 1000}, "--region-size": {int64(c.RegionSize), 4 << 10, 1 << 24},
		"--write-size": {int64(c.WriteSize), 512, int64(c.RegionSize)}, "--length": {int64(c.Length), int64(c.RegionSize), 1 << 40},
	} {
		if v[0] < v[1] || v[0] > v[2] {
			return usagef("%s: %d is not between %d and %d", flag, v[0], v[1], v[2])
		}
	}
	for flag, v := range map[string]size.Size{"--region-size": c.RegionSize, "--write-size": c.WriteSize} {
		if v&(v-1) != 0 {
			return usagef("%s: %d is not a power of two", flag, v)
		}
	}
	if int64(c.Length)%int64(c.RegionSize) != 0 {
		return usagef("--length: %d is not a multiple of the region size", c.Length)
	}
	return runSuite(s, c.JSON, func(ctx context.Context, progress func(done, all int, what string)) (benchReport, error) {
		return bench.Clone(ctx, bench.CloneConfig{
			Jobs: c.Jobs, Depth: c.Depth, RegionBytes: int64(c.RegionSize), WriteBytes: int64(c.WriteSize), Regions: c.Regions,
			Dir: c.Dir, HydrateBytes: int64(c.Length), Repetitions: c.Repetitions, Seed: 1, Progress: progress,
		})
	})
}

type benchDMCmd struct {
	outputFlags
	Device      []string  `enum:"null,mem" default:"null,mem" placeholder:"DEVICE" help:"Devices at the bottom: null, mem (both)."`
	Jobs        []int     `default:"1,2" placeholder:"N" help:"Numbers of jobs at the same time (${default})."`
	Depth       []int     `default:"1,32" placeholder:"N" help:"Requests that each job keeps in flight (${default})."`
	Size        size.Size `default:"4k" placeholder:"SIZE" help:"Size of each read and write (${default})."`
	Requests    int       `default:"131072" placeholder:"N" help:"Requests of each run, over all jobs (${default})."`
	Repetitions int       `default:"11" placeholder:"N" help:"Runs of each stack, in turn (${default})."`
}

func (benchDMCmd) Help() string {
	return `Everything runs in this process: the device itself, one linear device over it, and three over each other. A null
device drops what is written; to one in memory it is copied.

Examples:

    cowherd bench dm
    cowherd bench dm --device mem --depth 32 --json | jq .ratios
`
}

func (c *benchDMCmd) Run(s *session) error {
	for _, f := range []struct {
		flag        string
		values      []int
		least, most int
	}{
		{"--jobs", c.Jobs, 1, 1024}, {"--depth", c.Depth, 1, 4096}, {"--size", []int{int(c.Size)}, 512, 1 << 20},
		{"--requests", []int{c.Requests}, 1, 1 << 24}, {"--repetitions", []int{c.Repetitions}, 1, 1000},
	} {
		for _, v := range f.values {
			if v < f.least || v > f.most {
				return usagef("%s: %d is not between %d and %d", f.flag, v, f.least, f.most)
			}
		}
	}
	if c.Size%512 != 0 {
		return usagef("--size: %d is not a multiple of 512", c.Size)
	}
	return runSuite(s, c.JSON, func(ctx context.Context, progress func(done, all int, what string)) (benchReport, error) {
		return bench.Mapped(ctx, bench.MappedConfig{
			Devices: c.Device, Jobs: c.Jobs, Depths: c.Depth, RequestBytes: int64(c.Size), Requests: c.Requests,
			Repetitions: c.Repetitions, Seed: 1, Progress: progress,
		})
	})
}

// benchReport is what a suite has found.
type benchReport interface{ WriteTable(w io.Writer) error }

// runSuite runs a suite, with a progress line on a terminal, and prints what it has found. The first signal ends it
// with its files removed, the second ends the process at once.
func runSuite(s *session, asJSON bool, run func(context.Context, func(done, all int, what string)) (benchReport, error)) error {
	var progress func(done, all int, what string)
	if isTerminal(s.stderr) {
		progress = func(done, all int, what string) {
			fmt.Fprintf(s.stderr, "\r\x1b[K%3d%%  %s", 100*done/all, what)
		}
		defer fmt.Fprint(s.stderr, "\r\x1b[K")
	}
	ctx, stop := signal.NotifyContext(s, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)
	report, err := run(ctx, progress)
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(s.stdout, report)
	}
	return report.WriteTable(s.stdout)
}
