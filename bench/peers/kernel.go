package main

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"cowherd/clonemeta"
	"cowherd/internal/guest"
)

// "peers kernel" measures the kernel's own targets: fio over null block devices in a guest under emulation, bare and
// below dm-snapshot and dm-clone. Rates under emulation mean nothing; their ratios within one run tell what the target
// costs beside the device, which is what cowherd's engines are set beside.

//go:embed kernel.sh
var kernelScript string

// bareStep is the device without a target.
const bareStep = "bare"

// kernelSteps are what is measured, with what stands in the table.
var kernelSteps = []struct {
	name, text string
	beside     string // the step on servers that has the same shape
}{
	{name: bareStep, text: "the null device"},
	{name: "linear", text: "linear"},
	{name: "first", text: "origin, transient snapshot: first writes", beside: firstWrites},
	{name: "later", text: "origin, transient snapshot: later writes", beside: laterWrites},
	{name: "clone-first", text: "clone, 64 KiB regions: first writes"},
	{name: "clone-later", text: "clone: hydrated regions"},
}

// kernelOptions are the flags of "peers kernel".
type kernelOptions struct {
	rounds, seconds int
	jobs            []int
	lab             string // the script that makes it
	json            bool
}

// kernelRow is one step with a number of jobs: medians of the rounds.
type kernelRow struct {
	Step   string  `json:"step"`
	Jobs   int     `json:"jobs"`
	IOPS   float64 `json:"iops"`
	P50US  float64 `json:"latency_p50_us"`
	P99US  float64 `json:"latency_p99_us"`
	Ratio  float64 `json:"ratio_to_bare"`
	Min    float64 `json:"ratio_min"`
	Max    float64 `json:"ratio_max"`
	Rounds int     `json:"rounds"`

	name, beside string // as in kernelSteps
}

// kernelReport is what "peers kernel" prints.
type kernelReport struct {
	Machine string      `json:"machine"`
	Kernel  string      `json:"kernel"`
	Seconds int         `json:"seconds"`
	Rows    []kernelRow `json:"rows"`
}

func parseKernelOptions(args []string, stderr io.Writer) (o kernelOptions, err error) {
	var jobs string
	flags := flag.NewFlagSet("peers kernel", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&o.rounds, "reps", 3, "rounds")
	flags.IntVar(&o.seconds, "seconds", 3, "duration of each run of fio")
	flags.StringVar(&jobs, "jobs", "1,2", "numbers of fio's jobs, with commas between")
	flags.StringVar(&o.lab, "lab", "test/interop/lab/build.sh", "the script that makes the lab")
	flags.BoolVar(&o.json, "json", false, "print JSON")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	for _, text := range strings.Split(jobs, ",") {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > 64 {
			return o, fmt.Errorf("-jobs: %q is no number from 1 to 64", text)
		}
		o.jobs = append(o.jobs, n)
	}
	if o.rounds < 1 || o.seconds < 1 || flags.NArg() > 0 {
		return o, errors.New("-reps and -seconds are at least 1, and there are only flags")
	}
	return o, nil
}

// runKernel is "peers kernel".
func runKernel(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o, err := parseKernelOptions(args, stderr)
	if err != nil {
		return err
	}
	rep, err := o.measure(ctx, stderr)
	if err != nil {
		return err
	}
	if o.json {
		return writeJSON(stdout, rep)
	}
	return writeKernel(stdout, rep.Kernel, rep.Rows)
}

// measure boots the guest and reads what it found.
func (o *kernelOptions) measure(ctx context.Context, stderr io.Writer) (*kernelReport, error) {
	scratch, err := os.MkdirTemp("", "cowherd-kernel-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(scratch)
	fmt.Fprintln(stderr, "the lab is made, if it is not there yet; then the guest runs")
	r, version, err := o.boot(ctx, scratch)
	if err != nil {
		return nil, err
	}
	rows, err := o.rows(r)
	return &kernelReport{machine(), version, o.seconds, rows}, err
}

// errNoLab means that there is no guest to measure in.
var errNoLab = errors.New("no lab (scripts/clients.sh interop installs what it needs)")

// boot runs the guest.
func (o *kernelOptions) boot(ctx context.Context, scratch string) (*guest.Result, string, error) {
	var diagnosis bytes.Buffer
	cmd := exec.CommandContext(ctx, o.lab)
	cmd.Stderr = &diagnosis
	out, err := cmd.Output()
	if err != nil {
		return nil, "", fmt.Errorf("%w: %w: %s", errNoLab, err, tail(diagnosis.Bytes()))
	}
	lab := strings.TrimSpace(string(out))
	files, err := guest.Program("fio")
	if err != nil {
		return nil, "", err
	}
	jobs := strings.Trim(fmt.Sprint(o.jobs), "[]")
	clone := "yes"
	if _, err := os.Stat(filepath.Join(lab, "without")); err == nil {
		clone = "no"
	}
	meta := filepath.Join(scratch, "metadata")
	if err := makeImage(meta, clonemeta.Size(clonemeta.Params{RegionSize: 128, TargetSize: 8 << 21})); err != nil {
		return nil, "", err
	}
	m := guest.Machine{
		Lab: lab, CPUs: 2, Memory: 2048, Files: files, Images: []string{meta},
		Limit: time.Minute + time.Duration(o.rounds*len(o.jobs)*len(kernelSteps))*(time.Duration(o.seconds)+4)*time.Second*2,
		Script: fmt.Sprintf("ROUNDS=%d SECONDS_EACH=%d JOBS='%s' WITHCLONE=%s\nuname -r >/out/version\n",
			o.rounds, o.seconds, jobs, clone) + kernelScript,
	}
	r, err := m.Run(scratch)
	if err == nil && r.Status != 0 {
		err = fmt.Errorf("the guest's script ends with status %d:\n%s", r.Status, r.Output)
	}
	if err != nil {
		return nil, "", err
	}
	return r, strings.TrimSpace(string(r.Files["version"])), nil
}

// makeImage makes an empty image of size bytes.
func makeImage(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// rows reads what fio has left.
func (o *kernelOptions) rows(r *guest.Result) (rows []kernelRow, err error) {
	for _, jobs := range o.jobs {
		bare := make([]float64, o.rounds)
		for _, step := range kernelSteps {
			var list []result
			ratios := []float64{}
			for round := range o.rounds {
				output, there := r.Files[fmt.Sprintf("%s.%d.%d", step.name, jobs, round+1)]
				if !there {
					break
				}
				x, err := parseFio(output)
				if err != nil {
					return nil, fmt.Errorf("%s, %d jobs: %w", step.name, jobs, err)
				}
				if step.name == bareStep {
					bare[round] = x.iops
				}
				list, ratios = append(list, x), append(ratios, x.iops/bare[round])
			}
			if len(list) == 0 {
				continue // the lab is without the module
			}
			of := func(value func(result) float64) float64 { return median(each(list, value)) }
			rows = append(rows, kernelRow{
				Step: step.text, name: step.name, beside: step.beside, Jobs: jobs, Rounds: len(list),
				IOPS:  of(func(x result) float64 { return x.iops }),
				P50US: of(func(x result) float64 { return x.p50 }), P99US: of(func(x result) float64 { return x.p99 }),
				Ratio: median(ratios), Min: slices.Min(ratios), Max: slices.Max(ratios),
			})
		}
	}
	return rows, nil
}

// writeKernel prints the table.
func writeKernel(w io.Writer, version string, rows []kernelRow) error {
	fmt.Fprintf(w, "Linux %s under emulation, 2 CPUs, null_blk; fio, libaio, 4 KiB random writes, depth 32 for each job\n\n", version)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "jobs\tdevice\tkIOPS\tp50 µs\tp99 µs\tof bare\tmin-max")
	for _, r := range rows {
		fmt.Fprintf(t, "%d\t%s\t%.1f\t%.0f\t%.0f\t%.2f\t%.2f-%.2f\n", r.Jobs, r.Step, r.IOPS/1000, r.P50US, r.P99US, r.Ratio, r.Min, r.Max)
	}
	return t.Flush()
}
