package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"cowherd/internal/size"
)

// "peers all" runs the parts one after the other, each with less to do than it has by itself, and prints one table of
// ratios instead of theirs. All that the parts found is in its JSON.

// allOptions are the flags of "peers all".
type allOptions struct {
	rounds, seconds int
	bytes           int64 // as in options
	only            string
	parts           []string
	memory, disk    string
	cowherd, lab    string
	save            string // a file for JSON; "": none
	json            bool
}

func parseAllOptions(args []string, stderr io.Writer) (o allOptions, err error) {
	o.bytes = 256 << 20
	var chosen string
	flags := flag.NewFlagSet("peers all", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&o.rounds, "reps", 3, "rounds of each cell")
	flags.IntVar(&o.seconds, "seconds", 1, "duration of the steps that are measured for a time; twice that in the guest")
	flags.Func("size", "`bytes` written by the steps that write each block once; twice that is copied (default 256MiB)",
		func(s string) (err error) {
			o.bytes, err = size.Parse(s)
			return err
		})
	flags.StringVar(&o.only, "only", "", "regular expression: measure these cells of those two parts")
	flags.StringVar(&chosen, "parts", strings.Join(parts, ","), "the parts, with commas between")
	flags.StringVar(&o.memory, "dir", "/dev/shm", "where images in memory go, in directories that are removed")
	flags.StringVar(&o.disk, "disk", "/var/tmp", "where images on a disk go, in a directory that is removed")
	flags.StringVar(&o.cowherd, "cowherd", "bin/cowherd", "the cowherd that is measured")
	flags.StringVar(&o.lab, "lab", "test/interop/lab/build.sh", "the script that makes the kernel's lab")
	flags.StringVar(&o.save, "save", "", "write all figures, as JSON, to this `file` too")
	flags.BoolVar(&o.json, "json", false, "print JSON")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if flags.NArg() > 0 {
		return o, errors.New("arguments are not understood, only flags")
	}
	if _, err := regexp.Compile(o.only); err != nil {
		return o, fmt.Errorf("-only: %w", err)
	}
	o.parts = strings.Split(chosen, ",")
	for _, part := range o.parts {
		if !slices.Contains(parts, part) {
			return o, fmt.Errorf("-parts: %q is not one of %s", part, strings.Join(parts, ", "))
		}
	}
	if dir, err := os.Stat(filepath.Dir(o.save)); o.save != "" && (err != nil || !dir.IsDir()) {
		return o, fmt.Errorf("-save: %s is no directory", filepath.Dir(o.save))
	}
	return o, nil
}

// allReport is what "peers all" found.
type allReport struct {
	Machine string        `json:"machine"`
	Started time.Time     `json:"started"`
	Seconds float64       `json:"seconds"` // that all of it took
	Rounds  int           `json:"rounds"`
	Ratios  []comparison  `json:"ratios"`
	Notes   []string      `json:"notes"` // what was skipped, and what failed
	Servers *report       `json:"servers,omitempty"`
	Copies  *copyReport   `json:"copies,omitempty"`
	Kernel  *kernelReport `json:"kernel,omitempty"`
}

// runAll is "peers all". A part that fails does not keep the others from being measured.
func runAll(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o, err := parseAllOptions(args, stderr)
	if err != nil {
		return err
	}
	rep := &allReport{
		Machine: machine(), Started: time.Now().UTC().Truncate(time.Second), Rounds: o.rounds,
		Ratios: []comparison{}, Notes: []string{},
	}
	run := map[string]func(context.Context, allOptions, io.Writer) error{
		serversPart: rep.addServers, copyPart: rep.addCopies, kernelPart: rep.addKernel,
	}
	var failures []error
	for _, part := range parts {
		if !slices.Contains(o.parts, part) || ctx.Err() != nil {
			continue
		}
		if err := run[part](ctx, o, stderr); err != nil {
			failures = append(failures, fmt.Errorf("%s: %w", part, err))
		}
	}
	rep.Seconds = time.Since(rep.Started).Round(time.Second).Seconds()
	return errors.Join(errors.Join(failures...), rep.write(stdout, o))
}

func (rep *allReport) addServers(ctx context.Context, o allOptions, stderr io.Writer) error {
	options, err := parseOptions([]string{
		"-reps", fmt.Sprint(o.rounds), "-retries", "1", "-seconds", fmt.Sprint(o.seconds), "-size", number(o.bytes),
		"-only", o.only, "-dir", o.memory, "-cowherd", o.cowherd,
	}, stderr)
	if err != nil {
		return err
	}
	found, err := measureServers(ctx, options, stderr)
	switch {
	case errors.Is(err, errNoCells):
		return nil
	case found == nil:
		return err
	}
	rep.Servers = found
	rep.Ratios = append(rep.Ratios, found.ratios...)
	rep.Notes = append(rep.Notes, found.Notes...)
	return cmp.Or(err, found.failure())
}

func (rep *allReport) addCopies(ctx context.Context, o allOptions, stderr io.Writer) error {
	options, err := parseCopyOptions([]string{
		"-reps", fmt.Sprint(o.rounds), "-size", number(2 * o.bytes), "-only", o.only, "-dir", o.memory, "-disk", o.disk,
		"-cowherd", o.cowherd,
	}, stderr)
	if err != nil {
		return err
	}
	found, err := measureCopies(ctx, options, stderr)
	rep.Copies = found.report()
	rep.Ratios = append(rep.Ratios, found.ratios...)
	rep.Notes = append(rep.Notes, found.notes...)
	return err
}

// addKernel measures with as many jobs as there are connections on servers. Where there can be no guest that is noted.
func (rep *allReport) addKernel(ctx context.Context, o allOptions, stderr io.Writer) error {
	jobs := strings.Trim(strings.ReplaceAll(fmt.Sprint(connections), " ", ","), "[]")
	options, err := parseKernelOptions([]string{
		"-reps", fmt.Sprint(o.rounds), "-seconds", fmt.Sprint(2 * o.seconds), "-jobs", jobs, "-lab", o.lab,
	}, stderr)
	if err != nil {
		return err
	}
	_, err = exec.LookPath("qemu-system-x86_64")
	if err == nil {
		rep.Kernel, err = options.measure(ctx, stderr)
	}
	if ctx.Err() == nil && (errors.Is(err, exec.ErrNotFound) || errors.Is(err, errNoLab)) {
		rep.Notes = append(rep.Notes, fmt.Sprintf("skipped: the kernel's targets: %v", err))
		return nil
	}
	if err != nil {
		return err
	}
	rep.Ratios = append(rep.Ratios, rep.Kernel.ratios(rep.Servers)...)
	return nil
}

// write prints the table, or JSON, and saves JSON.
func (rep *allReport) write(w io.Writer, o allOptions) (err error) {
	if o.save != "" {
		f, openErr := os.Create(o.save)
		if openErr == nil {
			openErr = cmp.Or(writeJSON(f, rep), f.Close())
		}
		err = openErr
	}
	if o.json {
		return errors.Join(err, writeJSON(w, rep))
	}
	fmt.Fprintf(w, "%s; medians, rounds: %d; %.0f s in all\n", rep.Machine, rep.Rounds, rep.Seconds)
	fmt.Fprint(w, "ratio: how many times as good cowherd is, the median, the least and the greatest\n\n")
	err = errors.Join(err, writeRatios(w, rep.Ratios))
	for _, note := range rep.Notes {
		fmt.Fprintln(w, note)
	}
	return err
}
