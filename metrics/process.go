package metrics

import (
	"bytes"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// What Go's runtime and the process tell has the names that Prometheus's own client libraries give it, so that dashboards
// made for them work.

// ofRuntime are the metrics of Go's runtime.
var ofRuntime = []metric{
	{"go_gc_duration_seconds", "How long the latest collections of garbage have stopped the program.", quantiles, nil},
	{"go_gc_gomemlimit_bytes", "Memory that the collector tries to stay within.", gauge, nil},
	{"go_goroutines", "Goroutines.", gauge, nil},
	{"go_info", "1, with the version of Go.", gauge, []string{"version"}},
	{"go_memstats_alloc_bytes", "Heap that is in use.", gauge, nil},
	{"go_memstats_alloc_bytes_total", "Heap that has been allocated, freed or not.", counter, nil},
	{"go_memstats_buck_hash_sys_bytes", "Memory of the profiler's tables.", gauge, nil},
	{"go_memstats_frees_total", "Objects that were freed.", counter, nil},
	{"go_memstats_gc_sys_bytes", "Memory of the garbage collector.", gauge, nil},
	{"go_memstats_heap_alloc_bytes", "Heap that is in use, as go_memstats_alloc_bytes.", gauge, nil},
	{"go_memstats_heap_idle_bytes", "Heap in spans that are not used.", gauge, nil},
	{"go_memstats_heap_inuse_bytes", "Heap in spans that are used.", gauge, nil},
	{"go_memstats_heap_objects", "Objects on the heap.", gauge, nil},
	{"go_memstats_heap_released_bytes", "Heap that was given back to the system.", gauge, nil},
	{"go_memstats_heap_sys_bytes", "Heap that was had from the system.", gauge, nil},
	{"go_memstats_last_gc_time_seconds", "When garbage was last collected, since 1970; 0: not yet.", gauge, nil},
	{"go_memstats_mallocs_total", "Objects that were allocated.", counter, nil},
	{"go_memstats_mcache_inuse_bytes", "Memory of the allocator's caches that is used.", gauge, nil},
	{"go_memstats_mcache_sys_bytes", "Memory of the allocator's caches.", gauge, nil},
	{"go_memstats_mspan_inuse_bytes", "Memory of descriptions of spans that is used.", gauge, nil},
	{"go_memstats_mspan_sys_bytes", "Memory of descriptions of spans.", gauge, nil},
	{"go_memstats_next_gc_bytes", "Size of the heap at which garbage is collected next.", gauge, nil},
	{"go_memstats_other_sys_bytes", "Other memory that was had from the system.", gauge, nil},
	{"go_memstats_stack_inuse_bytes", "Memory of stacks that is used.", gauge, nil},
	{"go_memstats_stack_sys_bytes", "Memory of stacks.", gauge, nil},
	{"go_memstats_sys_bytes", "Memory that was had from the system.", gauge, nil},
	{"go_sched_gomaxprocs_threads", "Threads that run Go code at the same time.", gauge, nil},
	{"go_threads", "Threads that were made.", gauge, nil},
}

// ofProcess are the metrics of the process.
var ofProcess = []metric{
	{"process_cpu_seconds_total", "CPU time, of user and system.", counter, nil},
	{"process_max_fds", "File descriptors that may be open.", gauge, nil},
	{"process_open_fds", "File descriptors that are open.", gauge, nil},
	{"process_resident_memory_bytes", "Memory that is resident.", gauge, nil},
	{"process_start_time_seconds", "When the process was started, since 1970.", gauge, nil},
	{"process_virtual_memory_bytes", "Memory that is mapped.", gauge, nil},
	{"process_virtual_memory_max_bytes", "Memory that may be mapped.", gauge, nil},
}

// collectRuntime puts what Go's runtime tells on a page. It stops the program for some ten microseconds.
func collectRuntime(p *page) {
	gc := debug.GCStats{PauseQuantiles: make([]time.Duration, 5)}
	debug.ReadGCStats(&gc)
	var pauses []float64
	for _, d := range gc.PauseQuantiles {
		pauses = append(pauses, d.Seconds())
	}
	p.putQuantiles("go_gc_duration_seconds", pauses, uint64(gc.NumGC), gc.PauseTotal.Seconds())
	p.put("go_gc_gomemlimit_bytes", float64(debug.SetMemoryLimit(-1)))
	p.put("go_goroutines", float64(runtime.NumGoroutine()))
	p.put("go_info", 1, runtime.Version())
	p.put("go_sched_gomaxprocs_threads", float64(runtime.GOMAXPROCS(0)))
	threads, _ := runtime.ThreadCreateProfile(nil)
	p.put("go_threads", float64(threads))
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	for name, n := range map[string]uint64{
		"alloc_bytes": m.Alloc, "alloc_bytes_total": m.TotalAlloc, "buck_hash_sys_bytes": m.BuckHashSys,
		"frees_total": m.Frees, "gc_sys_bytes": m.GCSys, "heap_alloc_bytes": m.HeapAlloc, "heap_idle_bytes": m.HeapIdle,
		"heap_inuse_bytes": m.HeapInuse, "heap_objects": m.HeapObjects, "heap_released_bytes": m.HeapReleased,
		"heap_sys_bytes": m.HeapSys, "mallocs_total": m.Mallocs, "mcache_inuse_bytes": m.MCacheInuse,
		"mcache_sys_bytes": m.MCacheSys, "mspan_inuse_bytes": m.MSpanInuse, "mspan_sys_bytes": m.MSpanSys,
		"next_gc_bytes": m.NextGC, "other_sys_bytes": m.OtherSys, "stack_inuse_bytes": m.StackInuse,
		"stack_sys_bytes": m.StackSys, "sys_bytes": m.Sys,
	} {
		p.put("go_memstats_"+name, float64(n))
	}
	p.put("go_memstats_last_gc_time_seconds", float64(m.LastGC)/1e9)
}

// collectProcess puts what the system tells of the process on a page. What it does not tell is left out.
func collectProcess(p *page) {
	for name, resource := range map[string]int{
		"process_max_fds": unix.RLIMIT_NOFILE, "process_virtual_memory_max_bytes": unix.RLIMIT_AS,
	} {
		var l unix.Rlimit
		if unix.Getrlimit(resource, &l) == nil {
			p.put(name, float64(l.Cur))
		}
	}
	if open, err := os.ReadDir("/proc/self/fd"); err == nil {
		p.put("process_open_fds", float64(len(open)-1)) // one is that of the directory
	}
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) == nil {
		p.put("process_cpu_seconds_total", float64(u.Utime.Nano()+u.Stime.Nano())/1e9)
	}
	stat, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		return
	}
	// The name, in parentheses, may hold anything. Behind it is the third field, proc_pid_stat(5).
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const third, startTime, vsize, rss = 3, 22, 23, 24
	if len(fields) <= rss-third {
		return
	}
	if n, err := strconv.ParseUint(fields[vsize-third], 10, 64); err == nil {
		p.put("process_virtual_memory_bytes", float64(n))
	}
	if n, err := strconv.ParseUint(fields[rss-third], 10, 64); err == nil {
		p.put("process_resident_memory_bytes", float64(n)*float64(os.Getpagesize()))
	}
	if n, err := strconv.ParseUint(fields[startTime-third], 10, 64); err == nil {
		if boot, ok := bootTime(); ok {
			p.put("process_start_time_seconds", boot+float64(n)/ticksPerSecond)
		}
	}
}

// ticksPerSecond is what the kernel counts the times of processes in: USER_HZ, 100 on every platform of Go.
const ticksPerSecond = 100

// bootTime is when the system was started, in seconds since 1970.
func bootTime() (seconds float64, ok bool) {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(stat)) {
		if text, found := strings.CutPrefix(line, "btime "); found {
			seconds, err = strconv.ParseFloat(strings.TrimSpace(text), 64)
			return seconds, err == nil
		}
	}
	return 0, false
}
