package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"
)

// fioLimit is the most time that a run of fio may take: ample for the slowest of the peers.
const fioLimit = 5 * time.Minute

// arguments are fio's for a job over span bytes of an export.
func (j job) arguments(uri string, connections int, span int64, seconds int) []string {
	share := span / int64(connections)
	args := []string{
		"--name=job", "--ioengine=nbd", "--uri=" + uri, "--rw=" + j.rw, "--bs=" + number(blockBytes),
		"--iodepth=" + number(depth), "--numjobs=" + number(int64(connections)), "--group_reporting", "--randrepeat=0",
	}
	switch {
	case !j.once:
		args = append(args, "--size="+number(span), "--norandommap", "--time_based", "--runtime="+strconv.Itoa(seconds))
	case j.stride == 0:
		args = append(args, "--size="+number(share), "--offset_increment="+number(share), "--random_generator=lfsr")
	default:
		// The suffix of rw is how much a sequential job skips after each request.
		args[3] += ":" + number(j.stride-blockBytes)
		args = append(args, "--size="+number(share), "--offset_increment="+number(share),
			"--io_size="+number(j.requests(share)*blockBytes))
	}
	return args
}

func number(n int64) string { return strconv.FormatInt(n, 10) }

// result is what fio found.
type result struct {
	requests int64
	iops     float64
	p50, p99 float64 // completion latency in µs
}

// fioOutput is the part of fio's JSON that is used.
type fioOutput struct {
	Jobs []struct {
		Error       int
		Read, Write fioDirection
	}
}

type fioDirection struct {
	TotalIOs int64 `json:"total_ios"`
	IOPS     float64
	Clat     struct {
		Percentile map[string]float64
	} `json:"clat_ns"`
}

// parseFio reads the JSON of a run with one group of jobs that read or write, not both. Lines that fio prints before
// the JSON are skipped.
func parseFio(output []byte) (result, error) {
	start := bytes.Index(output, []byte("{\n"))
	if start < 0 {
		return result{}, fmt.Errorf("fio printed no JSON: %q", tail(output))
	}
	var parsed fioOutput
	if err := json.Unmarshal(output[start:], &parsed); err != nil {
		return result{}, fmt.Errorf("fio's output: %w", err)
	}
	if len(parsed.Jobs) != 1 {
		return result{}, fmt.Errorf("fio's output has %d groups of jobs instead of 1", len(parsed.Jobs))
	}
	group := parsed.Jobs[0]
	if group.Error != 0 {
		return result{}, fmt.Errorf("fio: %w", syscall.Errno(group.Error))
	}
	d := group.Read
	if group.Write.TotalIOs > 0 {
		d = group.Write
	}
	if d.TotalIOs == 0 {
		return result{}, fmt.Errorf("fio made no request")
	}
	return result{
		requests: d.TotalIOs, iops: d.IOPS,
		p50: d.Clat.Percentile["50.000000"] / 1e3, p99: d.Clat.Percentile["99.000000"] / 1e3,
	}, nil
}

// fioInterrupted is the exit status of fio when it has ended early because it was asked to.
const fioInterrupted = 128

// runFio runs fio, whose output goes to a file, and returns what it found and the CPU time it used. When enough is
// closed, if it is not nil, fio is asked to end.
func runFio(ctx context.Context, dir, output string, args []string, enough <-chan struct{}) (result, time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, fioLimit)
	defer cancel()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "fio", append([]string{"--output-format=json", "--output=" + output}, args...)...)
	cmd.Dir, cmd.Stderr = dir, &stderr
	cmd.SysProcAttr = apart()
	// Its jobs are processes too. It ends and reaps them when it is asked to; should it hang, nobody else would.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = stopLimit
	if err := cmd.Start(); err != nil {
		return result{}, 0, err
	}
	ended, watched := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-enough:
			_ = cmd.Process.Signal(syscall.SIGINT) // an error means that it has ended
		case <-ended:
		}
	}()
	err := cmd.Wait()
	close(ended)
	<-watched
	if ctx.Err() != nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // an error means that none was left
		return result{}, 0, fmt.Errorf("fio was stopped: %w", context.Cause(ctx))
	}
	if enough != nil && cmd.ProcessState.ExitCode() == fioInterrupted {
		err = nil
	}
	if err != nil {
		return result{}, 0, fmt.Errorf("fio: %w: %s", err, tail(stderr.Bytes()))
	}
	text, err := os.ReadFile(output)
	if err != nil {
		return result{}, 0, err
	}
	found, err := parseFio(text)
	return found, cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), err
}
