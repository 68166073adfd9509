// Package demo shows what cowherd does, on a disk image that is being written all the while: it takes snapshots, proves
// that they are what they should be, and measures what they cost. It uses the daemon as anybody would: through the
// control API and through NBD, though all in one process.
//
// # The truth
//
// A proof is worth what it is compared with. Three things are:
//
//   - the image file itself: for a moment the writers hold still, and the file is read past cowherd and hashed;
//   - the image before the demo: a hash of each block;
//   - the writers' own books. A block is written by one writer only, one write at a time, and each write fills it
//     with a stamp that says which block it is, which write of that block, and whether it was issued after the
//     snapshot had been taken. A snapshot that is taken in full flow must hold, of each block, no write older than the
//     last one that was acknowledged before the snapshot was asked for, and none that was issued after it had been
//     taken; either is right for those in between.
//
// # What runs
//
//	stage     a temporary directory, the image, two daemons (one with each copy engine), connections to them
//	writers   a fixed number of writes in flight on each connection, each completion submitting the next
//	proof     the snapshots and what is checked
//	measure   the table
//
// All that is made is removed before Run returns, whatever ends it.
//
// # Locks
//
// writer.mu, run.mu and narrator.mu are leaves: nothing is called with them held but the clock.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"time"

	"cowherd/internal/size"
)

// budget is how long the demo may take before no further repetition is begun.
const budget = 20 * time.Second

// blockSize is the unit in bytes of everything that the demo writes: a chunk of its snapshots.
const blockSize = 4 << 10

// Config says what to show. The zero value is the demo as it is meant to be, without output.
type Config struct {
	// Image is a file or block device whose copy is used; the original is only read. Empty: an image is made.
	Image string
	// Size is the length in bytes of the image that is made, a multiple of 4096. 0: 256 MiB.
	Size int64
	// Dir is where the temporary directory is made. Empty: /dev/shm if there is room, else where the system keeps
	// temporary files.
	Dir string
	// Connections is the number of connections, and of writers. 0: 4.
	Connections int
	// Depth is the number of writes that each has in flight. 0: 32.
	Depth int
	// Pace is how long the writers run between two acts of the play. 0: 0.7 s.
	Pace time.Duration
	// Repetitions is how often each rate is measured, if there is time; the table has medians. 0: 5.
	Repetitions int
	// Out is where the story and the tables go; nil: nowhere.
	Out io.Writer
	// Live makes Out a terminal: the last line shows the state of things.
	Live bool

	// taken is called when a snapshot has been taken, so that a test can spoil it; nil: nobody is.
	taken func(ctx context.Context, d *daemon, name string) error
}

func (c Config) withDefaults() Config {
	if c.Size == 0 {
		c.Size = 256 << 20
	}
	if c.Connections == 0 {
		c.Connections = 4
	}
	if c.Depth == 0 {
		c.Depth = 32
	}
	if c.Pace == 0 {
		c.Pace = 700 * time.Millisecond
	}
	if c.Repetitions == 0 {
		c.Repetitions = 5
	}
	if c.Out == nil {
		c.Out = io.Discard
	}
	return c
}

// Report is what was found.
type Report struct {
	CPUs        int      `json:"cpus"`
	ImageBytes  int64    `json:"image_bytes"`
	Connections int      `json:"connections"`
	Depth       int      `json:"depth"` // writes in flight on each connection
	Proofs      []Proof  `json:"proofs"`
	Repetitions int      `json:"repetitions"` // of each measurement
	Rates       []Rate   `json:"rates"`       // 4 KiB random writes over NBD, scaled engine
	Engines     []Engine `json:"engines"`     // first writes with each copy engine
	Seconds     float64  `json:"seconds"`     // that the demo took
}

// Proof is something that was checked.
type Proof struct {
	Claim string `json:"claim"`
	OK    bool   `json:"ok"`
	// Evidence is what was compared, in words, line by line.
	Evidence []string `json:"evidence"`
}

// Rate is a line of the table.
type Rate struct {
	Name string `json:"name"`
	// PerSecond is the median of the writes per second.
	PerSecond float64 `json:"writes_per_second"`
	// OfPlain is the median of the ratios to the plain rate of the same repetition.
	OfPlain float64 `json:"of_plain"`
	// Spread is (highest - lowest) / median of PerSecond.
	Spread float64 `json:"spread"`
}

// Engine compares the copy engines: first writes per second.
type Engine struct {
	Where      string  `json:"where"`
	Serialised float64 `json:"serialised"`
	Scaled     float64 `json:"scaled"`
	// Ratio is the median of the ratios of runs that followed on each other.
	Ratio float64 `json:"ratio"`
}

// ErrNotProven is returned when a proof failed.
var ErrNotProven = errors.New("not everything could be proven")

// Run shows the demo. With an error other than ErrNotProven there is no report. When ctx ends it stops early, with
// ctx's error. It leaves nothing behind: an error that says otherwise names what is left.
func Run(ctx context.Context, c Config) (report *Report, err error) {
	c = c.withDefaults()
	began := time.Now()
	n := newNarrator(c.Out, c.Live, began)
	s, err := openStage(ctx, c, n)
	if err != nil {
		n.quiet()
		return nil, fmt.Errorf("demo: %w", err)
	}
	report = &Report{CPUs: runtime.NumCPU(), ImageBytes: s.size, Connections: c.Connections, Depth: c.Depth}
	err = s.play(ctx, n, report)
	n.quiet()
	err = errors.Join(err, s.close())
	if err != nil {
		return nil, fmt.Errorf("demo: %w", err)
	}
	report.Seconds = time.Since(began).Seconds()
	for _, p := range report.Proofs {
		if !p.OK {
			err = ErrNotProven
		}
	}
	n.say("Everything is stopped and removed, after %.0f seconds.", report.Seconds)
	return report, err
}

// play is the demo on a stage.
func (s *stage) play(ctx context.Context, n *narrator, report *Report) error {
	n.say("cowherd demo: freeze a disk while it is written, prove it, see what it costs.\n")
	n.say("%s\n", wrap(fmt.Sprintf("A disk image of %s (%s) is attached as \"vm\" to a daemon in this process, which"+
		" serves it over NBD on a unix socket. %d connections write 4 KiB blocks to random places of it, as fast as they"+
		" can, all the while.", size.Human(s.size), s.origin, s.config.Connections), ""))
	proofs, err := s.prove(ctx, n)
	if err != nil {
		return err
	}
	report.Proofs = proofs
	n.proofs(proofs)
	if err := s.measure(ctx, n, report); err != nil {
		return err
	}
	n.rates(report)
	return nil
}
