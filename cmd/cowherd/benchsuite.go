package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"cowherd/bench"
	"cowherd/cowstore"
	"cowherd/internal/size"
)

// benchFlags are the flags of all suites that are plans.
type benchFlags struct {
	outputFlags
	CSV     bool   `name:"csv" help:"Print comma-separated values: a line for each cell."`
	Brief   bool   `help:"Print JSON to be kept: a line for each result and ratio, numbers of four digits, no curves of percentiles."`
	Report  string `placeholder:"DIR" complete:"file" help:"Write a report to DIR: report.html, which needs nothing else, and the plots and figures as files beside it."`
	Profile string `placeholder:"DIR" complete:"file" help:"Write CPU profiles of the measured time to DIR, and print where it goes."`
	Only    string `placeholder:"REGEXP" help:"Run only the cells whose labels match."`
	List    bool   `help:"List the cells, and run nothing."`
	Seed    uint64 `default:"1" placeholder:"N" help:"Seed of the patterns (${default})."`

	Set         []string `sep:"none" placeholder:"KEY=VALUE,..." help:"Overrule any key of the plan, in all cells; several values multiply out."`
	Device      []string `placeholder:"KIND,..." complete:"=null blank mem media file remote nbd" help:"As --set device=KIND: null, blank, mem, media, file, remote, nbd."`
	Dir         []string `placeholder:"DIR,..." complete:"file" help:"As --set dir=DIR: where a device of the kind file has its files."`
	Size        []string `placeholder:"SIZE,..." help:"As --set size=SIZE: length of the device."`
	Engine      []string `placeholder:"NAME,..." complete:"=scaled serialised" help:"As --set engine=NAME."`
	Offload     []string `placeholder:"HOW,..." complete:"=off auto only emulated worker" help:"As --set offload=HOW: off, auto, only, emulated, worker."`
	Jobs        []string `placeholder:"N,..." help:"As --set jobs=N: jobs at the same time."`
	Depth       []string `placeholder:"N,..." help:"As --set depth=N: requests that each job keeps in flight."`
	Block       []string `placeholder:"SIZE,..." help:"As --set block=SIZE: size of a request."`
	Chunk       []string `placeholder:"SIZE,..." help:"As --set chunk=SIZE."`
	Time        []string `placeholder:"TIME,..." help:"As --set time=TIME: how long a run takes."`
	Repetitions []string `placeholder:"N,..." help:"As --set repetitions=N."`

	shape func(*bench.Outcome) (benchReport, error) // what is printed of an outcome; nil: the outcome
}

const benchHelp = `Everything runs in this process. A figure is the median of its runs; cells that are compared run in turn, A B B A in each
repetition, and a ratio is the median of the ratios of runs that lie near each other.

Examples:

`

// plan is a suite's plan, or that of a file, with what the flags overrule.
func (f *benchFlags) plan(name string, text []byte) ([]*bench.Cell, string, error) {
	p, err := bench.ParsePlan(name, text)
	if err != nil {
		return nil, "", err
	}
	for key, values := range map[string][]string{
		"device": f.Device, "dir": f.Dir, "size": f.Size, "engine": f.Engine, "offload": f.Offload, "jobs": f.Jobs, "depth": f.Depth,
		"block": f.Block, "chunk": f.Chunk, "time": f.Time, "repetitions": f.Repetitions,
	} {
		if len(values) == 0 {
			continue
		}
		if err := p.Set(key, values...); err != nil {
			return nil, "", usagef("--%w", err)
		}
	}
	for _, s := range f.Set {
		key, values, ok := strings.Cut(s, "=")
		if !ok {
			return nil, "", usagef("--set: %q is not KEY=VALUE", s)
		}
		if err := p.Set(key, strings.Split(values, ",")...); err != nil {
			return nil, "", usagef("--set: %w", err)
		}
	}
	cells, err := p.Cells()
	if err != nil {
		return nil, "", usageError{err}
	}
	only, err := regexp.Compile(f.Only)
	if err != nil {
		return nil, "", usagef("--only: %w", err)
	}
	cells = slices.DeleteFunc(cells, func(c *bench.Cell) bool { return !only.MatchString(c.Label()) })
	if len(cells) == 0 {
		return nil, "", usagef("--only: no cell matches %q", f.Only)
	}
	return cells, p.Title, nil
}

// suite runs the suites of these names.
func (f *benchFlags) suite(s *session, names ...string) error {
	var cells []*bench.Cell
	var titles []string
	for _, name := range names {
		text, err := bench.SuiteText(name)
		if err != nil {
			return usageError{err}
		}
		more, title, err := f.plan(name, text)
		if err != nil {
			return err
		}
		cells, titles = append(cells, more...), append(titles, title)
	}
	return f.cells(s, strings.Join(titles, "; "), cells)
}

// cells runs cells, or lists them, and prints what they have come to.
func (f *benchFlags) cells(s *session, title string, cells []*bench.Cell) error {
	if f.JSON && f.CSV || f.Brief && (f.JSON || f.CSV) {
		return usagef("--json, --csv and --brief exclude each other")
	}
	if f.List {
		for _, c := range cells {
			if _, err := fmt.Fprintln(s.stdout, c.Label()); err != nil {
				return err
			}
		}
		return nil
	}
	return runSuite(s, f.JSON, func(ctx context.Context, progress func(done, all int, what string)) (benchReport, error) {
		o, err := (&bench.Runner{Cells: cells, Seed: f.Seed, Progress: progress, Profile: f.Profile}).Run(ctx)
		if err != nil {
			return nil, err
		}
		o.Title, o.Command, o.Machine = title, commandLine(), bench.ThisMachine(cmp.Or(version, "development"))
		if f.Report != "" {
			if err := o.WriteReport(f.Report); err != nil {
				return nil, err
			}
		}
		switch {
		case f.CSV:
			return csvReport{o}, nil
		case f.Brief:
			return briefReport{o}, nil
		case f.shape != nil:
			return f.shape(o)
		}
		return o, nil
	})
}

// csvReport prints an outcome as comma-separated values.
type csvReport struct{ *bench.Outcome }

// WriteTable prints for programs.
func (r csvReport) WriteTable(w io.Writer) error { return r.WriteCSV(w) }

// briefReport prints an outcome as JSON to be kept.
type briefReport struct{ *bench.Outcome }

// WriteTable prints for programs.
func (r briefReport) WriteTable(w io.Writer) error { return r.WriteBrief(w) }

// commandLine is how this program was called, as a shell takes it.
func commandLine() string {
	words := []string{"cowherd"}
	for _, arg := range os.Args[1:] {
		if strings.ContainsAny(arg, " \t\n'\"\\$`&|;()<>*?[]#~!") || arg == "" {
			arg = "'" + strings.ReplaceAll(arg, "'", `'\''`) + "'"
		}
		words = append(words, arg)
	}
	return strings.Join(words, " ")
}

type benchKcopydCmd struct {
	benchFlags
	Chunks int64 `placeholder:"N" help:"Chunks that first writes go to, over all jobs: the device has as many (131072)."`
}

func (benchKcopydCmd) Help() string {
	return benchHelp + `    cowherd bench kcopyd
    cowherd bench kcopyd --json | jq .ratios
    cowherd bench kcopyd --device null --jobs 2 --depth 32 --repetitions 11
`
}

func (c *benchKcopydCmd) Run(s *session) error {
	if c.Chunks != 0 {
		chunk := size.Size(4 << 10)
		if len(c.Chunk) > 1 {
			return usagef("--chunks: with one size of chunks only")
		} else if len(c.Chunk) == 1 {
			if err := chunk.UnmarshalText([]byte(c.Chunk[0])); err != nil {
				return usagef("--chunk: %w", err)
			}
		}
		if err := cowstore.CheckChunkSize(int64(chunk)); err != nil {
			return usagef("--chunk: %w", err)
		}
		if c.Chunks < 1 || c.Chunks > 1<<26 {
			return usagef("--chunks: %d is not between 1 and %d", c.Chunks, 1<<26)
		}
		c.Size = []string{strconv.FormatInt(c.Chunks*int64(chunk), 10)}
	}
	return c.suite(s, "kcopyd")
}

type benchSnapshotCmd struct{ benchFlags }

func (benchSnapshotCmd) Help() string {
	return benchHelp + `    cowherd bench snapshot --only first-write
    cowherd bench snapshot --device file --dir /var/tmp --report snapshot-report
`
}

func (c *benchSnapshotCmd) Run(s *session) error { return c.suite(s, "snapshot") }

type benchCloneCmd struct{ benchFlags }

func (benchCloneCmd) Help() string {
	return benchHelp + `    cowherd bench clone
    cowherd bench clone --only fill --device file --dir /dev/shm --size 1g
`
}

func (c *benchCloneCmd) Run(s *session) error { return c.suite(s, "clone") }

type benchOffloadCmd struct{ benchFlags }

func (benchOffloadCmd) Help() string {
	return benchHelp + `    cowherd bench offload --report offload-report
    cowherd bench offload --only hydration, --device file --dir /mnt/xfs --size 256m
`
}

func (c *benchOffloadCmd) Run(s *session) error { return c.suite(s, "offload") }

type benchCopyCmd struct{ benchFlags }

func (benchCopyCmd) Help() string {
	return benchHelp + `    cowherd bench copy
    cowherd bench copy --only by-piece --device file --dir /var/tmp
`
}

func (c *benchCopyCmd) Run(s *session) error { return c.suite(s, "copy") }

type benchMetadataCmd struct{ benchFlags }

func (benchMetadataCmd) Help() string {
	return benchHelp + `    cowherd bench metadata
    cowherd bench metadata --only open-store --set count=10000000
`
}

func (c *benchMetadataCmd) Run(s *session) error { return c.suite(s, "metadata") }

type benchDmtsCmd struct {
	benchFlags
	Test []string `arg:"" optional:"" help:"Names of tests; --list without any shows them all."`
}

func (benchDmtsCmd) Help() string {
	return benchHelp + `    cowherd bench --list
    cowherd bench fio_origin_randwrite_throughput_N
    cowherd bench snap_breaking_throughput --size 1g --time 10s
`
}

func (c *benchDmtsCmd) Run(s *session) error {
	if len(c.Test) > 0 {
		return c.suite(s, c.Test...)
	}
	if !c.List {
		return usagef("which suite, or test? \"cowherd bench --list\" shows them")
	}
	_, err := fmt.Fprintln(s.stdout, strings.Join(append(bench.Suites(), bench.DMTests()...), "\n"))
	return err
}

type benchRunCmd struct {
	benchFlags
	File string `arg:"" complete:"file" help:"A plan in TOML; - is standard input."`
}

func (benchRunCmd) Help() string {
	return benchHelp + `    cowherd bench plan kcopyd > mine.toml
    cowherd bench run mine.toml --report mine
    cowherd bench run mine.toml --set rate=20000 --set pattern=random,zipf
`
}

func (c *benchRunCmd) Run(s *session) error {
	var text []byte
	var err error
	if c.File == "-" {
		text, err = io.ReadAll(s.stdin)
	} else {
		text, err = os.ReadFile(c.File)
	}
	if err != nil {
		return err
	}
	cells, title, err := c.plan(c.File, text)
	if err != nil {
		return err
	}
	return c.cells(s, title, cells)
}

type benchPlanCmd struct {
	outputFlags
	Suite string `arg:"" complete:"=kcopyd snapshot clone offload copy metadata" help:"A suite, or a test of device-mapper-test-suite."`
}

func (benchPlanCmd) Help() string {
	return `Examples:

    cowherd bench plan offload > mine.toml
`
}

func (c *benchPlanCmd) Run(s *session) error {
	text, err := bench.SuiteText(c.Suite)
	if err != nil {
		return usageError{err}
	}
	if c.JSON {
		return json.NewEncoder(s.stdout).Encode(map[string]string{"suite": c.Suite, "plan": string(text)})
	}
	_, err = s.stdout.Write(text)
	return err
}

type benchModelCmd struct{ benchFlags }

func (benchModelCmd) Help() string {
	return benchHelp + `    cowherd bench model
    cowherd bench model --repetitions 11 --json | jq '.predicted[] | select(.cpus == 8)'
`
}

func (c *benchModelCmd) Run(s *session) error {
	c.shape = func(o *bench.Outcome) (benchReport, error) { return bench.Model(o) }
	return c.suite(s, bench.ModelSuite)
}

type benchDMCmd struct{ benchFlags }

func (benchDMCmd) Help() string {
	return benchHelp + `    cowherd bench dm
    cowherd bench dm --device mem --depth 32 --json | jq .ratios
`
}

func (c *benchDMCmd) Run(s *session) error { return c.suite(s, "dm") }
