package nbd

import (
	"encoding/json"
	"fmt"
	"math"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The comparison with nbdkit's file plugin runs only when asked for, as it wants the machine for itself:
//
//	NBD_FIO=5 go test -run TestFio -v ./export/nbd        five rounds of each server in turn
//
// NBD_FIO_SECONDS (3) is the length of a run, NBD_FIO_ONLY a part of a workload's name, NBD_FIO_PROFILE a file for a
// CPU profile of the server.
const (
	fioRounds  = "NBD_FIO"
	fioSeconds = "NBD_FIO_SECONDS"
	fioOnly    = "NBD_FIO_ONLY"
	fioProfile = "NBD_FIO_PROFILE"
	fioServe   = "NBD_FIO_SERVE" // in the child process: socket and image
	fioImage   = 1 << 30
)

// fioBars are the ratios to nbdkit's file plugin that must be reached.
var fioBars = []struct {
	rw   string
	bs   string
	jobs int
	bar  float64
}{
	{"randwrite", "4k", 1, 1.0},
	{"randwrite", "4k", 4, 1.3},
	{"randread", "4k", 1, 1.3},
	{"randread", "4k", 4, 1.5},
	{"read", "1m", 1, 0},
	{"write", "1m", 1, 0},
	{"read", "128k", 1, 0},
	{"write", "128k", 1, 0},
}

// TestFioServer is the server of TestFio, in a process of its own so that its CPU time can be told from fio's.
func TestFioServer(t *testing.T) {
	socket, image, ok := strings.Cut(os.Getenv(fioServe), ",")
	if !ok {
		t.Skip("only as a child of TestFio")
	}
	fd, err := syscall.Open(image, syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	e := &Export{Name: "file", Device: fileDeviceOf(fd, fioImage), MultiConn: true}
	s, err := NewServer(Config{Exports: exportsOf(e)})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	if path := os.Getenv(fioProfile); path != "" {
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := pprof.StartCPUProfile(f); err != nil {
			t.Fatal(err)
		}
		defer pprof.StopCPUProfile()
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	go s.Serve(l)
	<-stop
	if err := s.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}

type fioResult struct {
	iops float64
	cpu  float64 // server's microseconds for each request
	p99  float64 // microseconds
}

func TestFio(t *testing.T) {
	rounds, _ := strconv.Atoi(os.Getenv(fioRounds))
	if rounds <= 0 {
		t.Skip("a measurement, not a test: set " + fioRounds + " to the number of rounds")
	}
	for _, tool := range []string{"fio", "nbdkit"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip(err)
		}
	}
	image := filepath.Join(memoryDir(t), fmt.Sprintf("nbd-fio-%d.img", os.Getpid()))
	defer os.Remove(image)
	fillImage(t, image)
	t.Logf("%-14s %4s %10s %10s %6s %6s %18s %18s", "workload", "jobs", "ours", "nbdkit", "ratio", "bar", "cpu us/request", "p99 us")
	for _, w := range fioBars {
		name := w.rw + w.bs
		if !strings.Contains(name+"-"+strconv.Itoa(w.jobs), os.Getenv(fioOnly)) {
			continue
		}
		var ours, theirs []fioResult
		var ratios []float64
		for range rounds {
			a := runFio(t, oursCommand, image, w.rw, w.bs, w.jobs)
			b := runFio(t, nbdkitCommand, image, w.rw, w.bs, w.jobs)
			ours, theirs, ratios = append(ours, a), append(theirs, b), append(ratios, a.iops/b.iops)
		}
		iops := func(r fioResult) float64 { return r.iops }
		cpu := func(r fioResult) float64 { return r.cpu }
		p99 := func(r fioResult) float64 { return r.p99 }
		verdict := ""
		if median(ratios) < w.bar {
			verdict = "  MISSED"
		}
		t.Logf("%-14s %4d %10.0f %10.0f %6.2f %6.2f %8.2f /%8.2f %8.0f /%8.0f  ratios %.2f..%.2f%s", name, w.jobs,
			medianOf(ours, iops), medianOf(theirs, iops), median(ratios), w.bar, medianOf(ours, cpu),
			medianOf(theirs, cpu), medianOf(ours, p99), medianOf(theirs, p99),
			slices.Min(ratios), slices.Max(ratios), verdict)
	}
}

func oursCommand(socket, image string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], "-test.run=^TestFioServer$")
	cmd.Env = append(os.Environ(), fioServe+"="+socket+","+image)
	return cmd
}

func nbdkitCommand(socket, image string) *exec.Cmd {
	return exec.Command("nbdkit", "-f", "-U", socket, "file", image)
}

// fillImage makes an image whose every block is allocated and different.
func fillImage(t *testing.T, path string) {
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1<<20)
	for i := range int64(fioImage / (1 << 20)) {
		for j := 0; j < len(b); j += 8 {
			be.PutUint64(b[j:], uint64(i)<<32|uint64(j))
		}
		if _, err := f.Write(b); err != nil {
			t.Fatal(err)
		}
	}
}

// runFio starts a server, runs one workload against it and stops it.
func runFio(t *testing.T, command func(socket, image string) *exec.Cmd, image, rw, bs string, jobs int) fioResult {
	socket := socketPath(t)
	server := command(socket, image)
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	_ = syscall.Setpriority(syscall.PRIO_PROCESS, server.Process.Pid, -19) // as fio; may be refused to both
	defer func() {
		_ = server.Process.Signal(syscall.SIGTERM)
		_ = server.Wait()
	}()
	for range 200 {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	seconds := os.Getenv(fioSeconds)
	if seconds == "" {
		seconds = "3"
	}
	depth := map[string]string{"4k": "32", "128k": "16", "1m": "8"}[bs]
	before := cpuTime(t, server.Process.Pid)
	cmd := exec.Command("nice", "-n", "-19", "fio", "--output-format=json", "--name=w", "--ioengine=nbd",
		"--uri=nbd+unix:///?socket="+socket, "--iodepth="+depth, "--bs="+bs, "--rw="+rw, "--direct=1",
		"--numjobs="+strconv.Itoa(jobs), "--group_reporting", "--randrepeat=0", "--refill_buffers=0",
		"--scramble_buffers=1", "--time_based", "--runtime="+seconds, "--size="+strconv.Itoa(fioImage), "--norandommap")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("fio: %v\n%s", err, out)
	}
	used := cpuTime(t, server.Process.Pid) - before
	var report struct {
		Jobs []struct {
			Error       int
			Read, Write struct {
				IOPS   float64 `json:"iops"`
				Total  float64 `json:"total_ios"`
				ClatNs struct {
					Percentile map[string]float64 `json:"percentile"`
				} `json:"clat_ns"`
			}
		}
	}
	if i := strings.IndexByte(string(out), '{'); i >= 0 {
		out = out[i:]
	}
	if err := json.Unmarshal(out, &report); err != nil || len(report.Jobs) != 1 || report.Jobs[0].Error != 0 {
		t.Fatalf("fio's report: %v\n%s", err, out)
	}
	j := report.Jobs[0]
	p99 := math.Max(j.Read.ClatNs.Percentile["99.000000"], j.Write.ClatNs.Percentile["99.000000"]) / 1000
	return fioResult{j.Read.IOPS + j.Write.IOPS, used.Seconds() * 1e6 / (j.Read.Total + j.Write.Total), p99}
}

// cpuTime is the CPU time that a process has used.
func cpuTime(t *testing.T, pid int) time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest)
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}

func medianOf(rs []fioResult, of func(fioResult) float64) float64 {
	var values []float64
	for _, r := range rs {
		values = append(values, of(r))
	}
	return median(values)
}

func median(values []float64) float64 {
	s := slices.Sorted(slices.Values(values))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}
