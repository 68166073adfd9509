package main

import (
	"context"
	"fmt"
	"math"
	"os/signal"
	"syscall"

	"cowherd/bench"
	"cowherd/cowstore"
	"cowherd/internal/size"
)

type benchCmd struct {
	Kcopyd benchKcopydCmd `cmd:"" help:"Compare the copy engines: first and later writes to an origin with a transient snapshot."`
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
	if isTerminal(s.stderr) {
		config.Progress = func(done, all int, what string) {
			fmt.Fprintf(s.stderr, "\r\x1b[K%3d%%  %s", 100*done/all, what)
		}
		defer fmt.Fprint(s.stderr, "\r\x1b[K")
	}
	ctx, stop := signal.NotifyContext(s, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	report, err := bench.Kcopyd(ctx, config)
	if err != nil {
		return err
	}
	if c.JSON {
		return printJSON(s.stdout, report)
	}
	return report.WriteTable(s.stdout)
}
