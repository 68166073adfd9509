package main

import (
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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

// kernelSteps are what is measured, with what stands in the table.
var kernelSteps = []struct{ name, text string }{
	{"bare", "the null device"},
	{"linear", "linear"},
	{"first", "origin, transient snapshot: first writes"},
	{"later", "origin, transient snapshot: later writes"},
	{"clone-first", "clone, 64 KiB regions: first writes"},
	{"clone-later", "clone: hydrated regions"},
}

// kernelOptions are the flags of "peers kernel".
type kernelOptions struct {
	rounds, seconds int
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
}

// runKernel is "peers kernel".
func runKernel(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var o kernelOptions
	flags := flag.NewFlagSet("peers kernel", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&o.rounds, "reps", 3, "rounds")
	flags.IntVar(&o.seconds, "seconds", 3, "duration of each run of fio")
	flags.StringVar(&o.lab, "lab", "test/interop/lab/build.sh", "the script that makes the lab")
	flags.BoolVar(&o.json, "json", false, "print JSON")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if o.rounds < 1 || o.seconds < 1 || flags.NArg() > 0 {
		return errors.New("-reps and -seconds are at least 1, and there are only flags")
	}
	scratch, err := os.MkdirTemp("", "cowherd-kernel-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(scratch)
	fmt.Fprintln(stderr, "the lab is made, if it is not there yet; then the guest runs")
	r, version, err := o.boot(ctx, scratch)
	if err != nil {
		return err
	}
	rows, err := o.rows(r)
	if err != nil {
		return err
	}
	if o.json {
		e := json.NewEncoder(stdout)
		e.SetIndent("", "  ")
		return e.Encode(map[string]any{"machine": machine(), "kernel": version, "seconds": o.seconds, "rows": rows})
	}
	return writeKernel(stdout, version, rows)
}

// boot runs the guest.
func (o *kernelOptions) boot(ctx context.Context, scratch string) (*guest.Result, string, error) {
	var diagnosis bytes.Buffer
	cmd := exec.CommandContext(ctx, o.lab)
	cmd.Stderr = &diagnosis
	out, err := cmd.Output()
	if err != nil {
		return nil, "", fmt.Errorf("the lab cannot be made (scripts/clients.sh interop installs what it needs): %w\n%s", err, &diagnosis)
	}
	lab := strings.TrimSpace(string(out))
	files, err := guest.Program("fio")
	if err != nil {
		return nil, "", err
	}
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
		Limit:  time.Minute + time.Duration(o.rounds)*2*6*(time.Duration(o.seconds)+4)*time.Second*2,
		Script: fmt.Sprintf("ROUNDS=%d SECONDS_EACH=%d WITHCLONE=%s\nuname -r >/out/version\n", o.rounds, o.seconds, clone) + kernelScript,
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
	for _, jobs := range []int{1, 2} {
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
				if step.name == "bare" {
					bare[round] = x.iops
				}
				list, ratios = append(list, x), append(ratios, x.iops/bare[round])
			}
			if len(list) == 0 {
				continue // the lab is without the module
			}
			of := func(value func(result) float64) float64 {
				slices.SortFunc(list, func(a, b result) int { return cmp.Compare(value(a), value(b)) })
				return value(list[len(list)/2])
			}
			slices.Sort(ratios)
			rows = append(rows, kernelRow{
				Step: step.text, Jobs: jobs, Rounds: len(list),
				IOPS:  of(func(x result) float64 { return x.iops }),
				P50US: of(func(x result) float64 { return x.p50 }), P99US: of(func(x result) float64 { return x.p99 }),
				Ratio: ratios[len(ratios)/2], Min: ratios[0], Max: ratios[len(ratios)-1],
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
