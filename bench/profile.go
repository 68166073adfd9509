package bench

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime/pprof"
	"strings"
	"time"
	"unicode"
)

// stage is where the processor time of a request goes.
type stage uint8

const (
	stageHarness   stage = iota // the jobs, their clock and their histograms
	stageRequest                // a request's own list of completions
	stageGate                   // mapped devices
	stageLookUp                 // has the chunk been copied?
	stageClaim                  // an exception for it
	stageAllocate               // room on the COW device; the store
	stageTarget                 // what else a target does
	stageKcopyd                 // copies
	stageLeaf                   // the devices below: memory that is copied or cleared
	stageMemory                 // the allocator and the collector of garbage
	stageScheduler              // goroutines that wait and are woken, and what else the runtime does
	stageCount
)

// stageNames are the stages' names in tables and JSON.
var stageNames = [stageCount]string{
	"harness", "request", "gate", "look-up", "claim", "allocate", "target", "kcopyd", "leaf", "memory", "scheduler",
}

// stagePrefixes tell the stage of a function by the beginning of its name; the first that fits counts.
var stagePrefixes = []struct {
	prefix string
	stage  stage
}{
	{"cowherd/target/snapshot.(*table).find", stageLookUp},
	{"cowherd/target/snapshot.(*table).search", stageLookUp},
	{"cowherd/target/snapshot.(*table).group", stageLookUp},
	{"cowherd/target/snapshot.(*knownCopied).has", stageLookUp},
	{"cowherd/target/snapshot.(*Snapshot).has", stageLookUp},
	{"cowherd/target/snapshot.(*Snapshot).lookup", stageLookUp},
	{"cowherd/target.(*Passage)", stageLookUp},
	{"cowherd/target/clone.(*table).run", stageLookUp},
	{"cowherd/target/snapshot.(*table)", stageClaim},
	{"cowherd/target/snapshot.(*tableShard)", stageClaim},
	{"cowherd/target/snapshot.tableIndex", stageClaim},
	{"cowherd/target/snapshot.(*exceptionPool).get", stageClaim},
	{"cowherd/target/snapshot.(*exceptionShard).pop", stageClaim},
	{"cowherd/target/snapshot.(*Snapshot).claim", stageClaim},
	{"cowherd/target/clone.(*table).claim", stageClaim},
	{"cowherd/target/clone.(*hydration).claim", stageClaim},
	{"cowherd/target/snapshot.(*Snapshot).allocate", stageAllocate},
	{"cowherd/cowstore", stageAllocate},
	{"cowherd/clonemeta", stageAllocate},
	{"cowherd/target", stageTarget},
	{"cowherd/dm.", stageGate},
	{"cowherd/block.", stageRequest},
	{"cowherd/kcopyd.", stageKcopyd},
	{"cowherd/backend/", stageLeaf},
	{"cowherd/internal/sparse.", stageLeaf},
	{"cowherd/bench.blank", stageLeaf},
	{"cowherd/bench.", stageHarness},
	{"github.com/HdrHistogram/", stageHarness},
}

// transparent are the beginnings of names of functions that work for whoever calls them.
var transparent = []string{
	"sync/atomic.", "internal/runtime/atomic.", "sync.", "internal/sync.", "time.", "cowherd/internal/percpu.",
	"runtime.memmove", "runtime.memclr", "runtime.duff", "runtime.nanotime", "runtime.walltime", "runtime.gcWriteBarrier",
	"runtime.vdso", "runtime.time", "runtime.asyncPreempt", // which is where a function was interrupted
}

// allocating are parts of names by which the runtime's memory management is known.
var allocating = []string{
	"runtime.malloc", "runtime.newobject", "runtime.makeslice", "runtime.growslice", "runtime.(*m", "runtime.gc", "runtime.bg",
	"runtime.scan", "runtime.sweep", "runtime.grey", "runtime.wb", "runtime.(*gc", "runtime.markroot", "runtime.(*sweep",
	"runtime.tryDefer", "runtime.findObject", "runtime.deduct",
}

// stageOf is the stage of a stack, innermost function first. The runtime works for itself unless it is transparent.
func stageOf(stack []string) stage {
	inRuntime, memory := false, false
	for _, name := range stack {
		switch {
		case hasPrefix(name, transparent):
		case strings.HasPrefix(name, "runtime.") || strings.HasPrefix(name, "internal/runtime/"):
			inRuntime, memory = true, memory || hasPrefix(name, allocating)
		case !inRuntime:
			for _, p := range stagePrefixes {
				if strings.HasPrefix(name, p.prefix) {
					return p.stage
				}
			}
		}
	}
	switch {
	case memory:
		return stageMemory
	case inRuntime:
		return stageScheduler
	}
	return stageHarness
}

func hasPrefix(name string, prefixes []string) bool {
	for _, p := range prefixes {
		if strings.HasPrefix(name, p) {
			return true
		}
	}
	return false
}

// StageResult is what one stage takes of the processor time of an operation, over all runs.
type StageResult struct {
	Stage string  `json:"stage"`
	NS    float64 `json:"ns_per_op"`
	Share float64 `json:"share"`
}

// profiled is where the time of a run went: samples by stage, and the processor time that they stand for.
type profiled struct {
	samples [stageCount]int64
	cpu     time.Duration
}

// profile runs what is to be measured. With a directory it is sampled meanwhile, and the profile is kept there for
// "go tool pprof".
func (x *Runner) profile(c *Cell, number int, run func() (measurement, error)) (measurement, *profiled, error) {
	if x.Profile == "" {
		m, err := run()
		return m, nil, err
	}
	if err := os.MkdirAll(x.Profile, 0o755); err != nil {
		return measurement{}, nil, err
	}
	var text bytes.Buffer
	if err := pprof.StartCPUProfile(&text); err != nil {
		return measurement{}, nil, err
	}
	m, err := run()
	pprof.StopCPUProfile()
	if err != nil {
		return m, nil, err
	}
	name := filepath.Join(x.Profile, fmt.Sprintf("%s.%d.pb.gz", fileName(c.Label()), number+1))
	if err := os.WriteFile(name, text.Bytes(), 0o644); err != nil {
		return m, nil, err
	}
	p := &profiled{cpu: m.cpu}
	return m, p, readProfile(&text, func(stack []string, count int64) { p.samples[stageOf(stack)] += count })
}

// fileName makes a file name of a label.
func fileName(label string) string {
	words := strings.FieldsFunc(label, func(r rune) bool { return !unicode.IsLetter(r) && !unicode.IsDigit(r) })
	return strings.Join(words, "-")
}

// stages are the stages of runs that were profiled, those that take any time.
func stages(list []*sampled) []StageResult {
	var samples [stageCount]int64
	var all, count int64
	var cpu time.Duration
	for _, s := range list {
		if s.profile == nil {
			return nil
		}
		for i, n := range s.profile.samples {
			samples[i] += n
			all += n
		}
		cpu += s.profile.cpu
		count += s.count
	}
	var results []StageResult
	for i, n := range samples {
		if n > 0 {
			share := float64(n) / float64(all)
			results = append(results, StageResult{Stage: stageNames[i], NS: share * float64(cpu) / float64(count), Share: share})
		}
	}
	return results
}
