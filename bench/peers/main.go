// Command peers sets cowherd beside what people use today, in three parts: one client, fio with its NBD engine, over
// cowherd and over other servers; copies of images by cowherd and by other programs (copy.go); the kernel's own targets in
// a guest (kernel.go). Each part prints what each did; "peers all" (all.go) runs them all and prints one table of ratios.
//
// In the first part a cell is one scenario (plan.go) with one number of connections. It is measured in rounds. In each
// round every server of the cell is started afresh, goes through the scenario's steps, and is stopped, one server after the
// other: so the figures that a ratio is made of lie seconds apart, and a ratio is the median of the rounds' ratios. A round
// during which other processes used much CPU does not count, and is repeated a few times.
//
// Everything that is written lies in one directory, which goes at the end. No process outlives the program: it ends
// them, and the kernel does if the program cannot.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"cowherd/internal/size"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == adoptCommand {
		exit(adopt(os.Args[2:]))
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	exit(err)
}

// exit ends the program; what -h prints is no failure.
func exit(err error) {
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintf(os.Stderr, "peers: %v\n", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// options are the flags.
type options struct {
	repetitions int
	retries     int
	seconds     int
	bytes       int64 // that the steps which write each block once write
	only        *regexp.Regexp
	peers       []string // names of stacks
	dir         string
	cowherd     string
	json, keep  bool
}

func parseOptions(args []string, stderr io.Writer) (options, error) {
	o := options{bytes: 512 << 20}
	var only, peers string
	flags := flag.NewFlagSet("peers", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&o.repetitions, "reps", 3, "rounds of each cell")
	flags.IntVar(&o.retries, "retries", 2, "rounds more at most, for those in which others used the CPUs")
	flags.IntVar(&o.seconds, "seconds", 2, "duration of the steps that are measured for a time")
	flags.Func("size", "`bytes` written by the steps that write each block once (default 512MiB)",
		func(s string) (err error) {
			o.bytes, err = size.Parse(s)
			return err
		})
	flags.StringVar(&only, "only", "", "regular expression: measure these cells, named as in first-write/4")
	flags.StringVar(&peers, "peers", "", "peers to measure, with commas between: "+strings.Join(peerNames(), ",")+
		"; none for cowherd alone (default all)")
	flags.StringVar(&o.dir, "dir", "/dev/shm", "where the images go, in a directory that is removed")
	flags.StringVar(&o.cowherd, "cowherd", "bin/cowherd", "the cowherd that is measured")
	flags.BoolVar(&o.json, "json", false, "print JSON")
	flags.BoolVar(&o.keep, "keep", false, "leave the images, logs and fio's output where they are, and say where")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	return o, o.check(only, peers, flags.NArg())
}

// check completes the options from those that need more than the flag package does.
func (o *options) check(only, peers string, arguments int) (err error) {
	if o.only, err = regexp.Compile(only); err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	switch peers {
	case "":
		o.peers = peerNames()
	case "none":
	default:
		o.peers = strings.Split(peers, ",")
	}
	for _, name := range o.peers {
		if !slices.Contains(peerNames(), name) {
			return fmt.Errorf("-peers: %q is not one of %s", name, strings.Join(peerNames(), ", "))
		}
	}
	unit := int64(slices.Max(connections)) * strideBytes
	switch {
	case arguments > 0:
		return fmt.Errorf("arguments are not understood, only flags")
	case o.repetitions < 1 || o.retries < 0 || o.seconds < 1:
		return fmt.Errorf("-reps and -seconds are at least 1, -retries at least 0")
	case o.bytes < unit || o.bytes%unit != 0:
		return fmt.Errorf("-size is a multiple of %s", size.Human(unit))
	}
	return nil
}

// run is the program.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	// What this goroutine starts is killed when its thread ends, which must not be before the program does.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	part, rest := serversPart, args
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		part, rest = args[0], args[1:]
	}
	switch part {
	case serversPart:
		return runServers(ctx, rest, stdout, stderr)
	case copyPart:
		return runCopies(ctx, rest, stdout, stderr)
	case kernelPart:
		return runKernel(ctx, rest, stdout, stderr)
	case "all":
		return runAll(ctx, rest, stdout, stderr)
	}
	return fmt.Errorf("%q is not one of %s, all", part, strings.Join(parts, ", "))
}

// The parts, which are run by their names; the first also without.
const (
	serversPart = "servers"
	copyPart    = "copy"
	kernelPart  = "kernel"
)

var parts = []string{serversPart, copyPart, kernelPart}

// runServers is "peers servers".
func runServers(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o, err := parseOptions(args, stderr)
	if err != nil {
		return err
	}
	rep, err := measureServers(ctx, o, stderr)
	if err != nil {
		return err
	}
	return errors.Join(rep.write(stdout, o.json), rep.failure())
}

// errNoCells means that there is nothing to measure.
var errNoCells = errors.New("-only matches none")

// measureServers measures the cells that are asked for. If it is interrupted the report has those that were measured.
func measureServers(ctx context.Context, o options, stderr io.Writer) (rep *report, err error) {
	r := &runner{options: o, stacks: stacks(o.cowherd), progress: stderr}
	cells := r.choose()
	if len(cells) == 0 {
		return nil, fmt.Errorf("%w of %s", errNoCells, strings.Join(cellNames(), ", "))
	}
	if err := r.look(); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.cleanUp()) }()
	if err = r.prepare(ctx, cells); err != nil {
		return nil, err
	}
	rep = newReport(r)
	for _, c := range cells {
		if err = r.measureCell(ctx, c); err != nil {
			return rep, err
		}
		rep.add(c)
	}
	return rep, nil
}

// choose returns the cells that -only asks for.
func (r *runner) choose() []*cell {
	return slices.DeleteFunc(cells(), func(c *cell) bool { return !r.only.MatchString(c.name()) })
}

// prepare makes the directory and the image.
func (r *runner) prepare(ctx context.Context, cells []*cell) (err error) {
	span := int64(0)
	for _, c := range cells {
		span = max(span, c.scenario.span(r.bytes))
	}
	if err := roomFor(r.dir, span, r.progress); err != nil {
		return err
	}
	if r.work, err = os.MkdirTemp(r.dir, "cowherd-peers-"); err != nil {
		return err
	}
	r.image = filepath.Join(r.work, "image")
	return fillImage(ctx, r.image, span)
}

func (r *runner) cleanUp() error {
	if r.work == "" {
		return nil
	}
	if r.keep {
		fmt.Fprintf(r.progress, "kept: %s\n", r.work)
		return nil
	}
	return os.RemoveAll(r.work)
}
