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
	Kcopyd   benchKcopydCmd   `cmd:"" help:"The copy engines: first and later writes to an origin with a transient snapshot."`
	Snapshot benchSnapshotCmd `cmd:"" help:"Snapshots: chunk sizes, several snapshots, kinds of stores, the snapshot itself."`
	Clone    benchCloneCmd    `cmd:"" help:"Clones: first writes to regions, reads beside hydration, the rate of hydration."`
	Offload  benchOffloadCmd  `cmd:"" help:"Copy offload: engines, methods, patterns, sizes."`
	Copy     benchCopyCmd     `cmd:"" help:"Whole images: queues, pieces, methods."`
	Metadata benchMetadataCmd `cmd:"" help:"Metadata: opening a store, commits of a clone's metadata, look-ups."`
	Dmts     benchDmtsCmd     `cmd:"" default:"withargs" help:"Tests of device-mapper-test-suite by their names, in the shapes that they have there."`
	Run      benchRunCmd      `cmd:"" help:"Run the plan in a file."`
	Plan     benchPlanCmd     `cmd:"" help:"Print the plan of a suite, as a start for one of your own."`
	Show     benchShowCmd     `cmd:"" help:"Print what a run has found once more: as a table of one's own, or as a report."`
	Store    benchStoreCmd    `cmd:"" help:"Compare transient and persistent exception stores on a file system: first writes, exceptions a flush, opening."`
	Dm       benchDMCmd       `cmd:"" help:"Mapped devices: linear targets on each other, beside the device below."`
	Model    benchModelCmd    `cmd:"" help:"A model of the engines, fitted to this machine, for more CPUs than it has."`
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
