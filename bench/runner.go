package bench

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"slices"
	"time"

	"cowherd/backend/mem"
	"cowherd/kcopyd"
)

// Runner runs the cells of a plan.
type Runner struct {
	Cells []*Cell
	Seed  uint64
	// Progress is told before each run; may be nil.
	Progress func(done, all int, what string)
	// Profile is a directory for CPU profiles of the runs of jobs; it is made if need be. "": nothing is profiled.
	Profile string

	calibration int                // requests by which the harness is measured; 0: calibrationDefault
	harness     map[[3]int]float64 // processor time of the harness for a request in nanoseconds, by jobs, depth and CPUs
}

// Run runs all cells, group by group. Cells that are compared with each other are a group. Each repetition runs its cells
// in order and then in reverse, A B B A, so that what changes with time falls on all of them alike, and each run has one
// of every other cell near by. A cell that is compared with none is run once in a repetition.
//
// Each run begins with a collection of garbage and with new devices, but for memory, which is touched beforehand.
func (x *Runner) Run(ctx context.Context) (*Outcome, error) {
	x.harness = map[[3]int]float64{}
	groups := groupsOf(x.Cells)
	all, done := 0, 0
	for _, g := range groups {
		all += len(order(len(g))) * repetitions(g)
	}
	samples := map[*Cell][]*sampled{}
	media := &windows{memory: map[string][]byte{}}
	for _, g := range groups {
		devices := pool{kept: map[poolKey]*mem.Device{}, windows: media}
		for range repetitions(g) {
			for _, i := range order(len(g)) {
				c := g[i]
				if x.Progress != nil {
					x.Progress(done, all, c.Label())
				}
				done++
				s, err := x.run(ctx, c, devices, len(samples[c]))
				if err != nil {
					return nil, errors.Join(fmt.Errorf("bench: %s: %w", c.Label(), err), devices.close())
				}
				samples[c] = append(samples[c], s)
			}
		}
		if err := devices.close(); err != nil {
			return nil, fmt.Errorf("bench: %w", err)
		}
		debug.FreeOSMemory() // a group's devices are not the next one's to pay for
	}
	return x.outcome(groups, samples), nil
}

// order is the order in which one repetition runs a group of n cells.
func order(n int) []int {
	list := make([]int, 0, 2*n)
	for i := range n {
		list = append(list, i)
	}
	if n > 1 {
		for i := range n {
			list = append(list, n-1-i)
		}
	}
	return list
}

// repetitions is how often a group is repeated: as often as the most demanding of its cells.
func repetitions(group []*Cell) int {
	most := 1
	for _, c := range group {
		most = max(most, c.Repetitions)
	}
	return most
}

// conditions are the fields that cells of different stacks have in common when they are compared with each other.
var conditions = []string{
	"device", "size", "range", "latency", "bandwidth", "queues", "dir", "direct", "uri", "block", "pattern", "theta", "read", "jobs",
	"depth", "rate", "foreground", "foreground-rate", "cpus",
}

// groupsOf puts cells that are compared with each other in one group, and keeps the order of the plan.
func groupsOf(cells []*Cell) [][]*Cell {
	group := make([]int, len(cells)) // the first cell of the group
	for i, c := range cells {
		group[i] = i
		for k, o := range cells[:i] {
			if group[k] != group[i] && (comparedBy(c, o) || isAgainst(c, o) || isAgainst(o, c)) {
				from, to := max(group[i], group[k]), min(group[i], group[k])
				for n := range group[:i+1] {
					if group[n] == from {
						group[n] = to
					}
				}
			}
		}
	}
	var groups [][]*Cell
	for first := range cells {
		var g []*Cell
		for i, c := range cells {
			if group[i] == first {
				g = append(g, c)
			}
		}
		if g != nil {
			groups = append(groups, g)
		}
	}
	return groups
}

// comparedBy tells whether cells of one name differ in nothing but the field that both compare, and in what concerns only
// one of them.
func comparedBy(c, o *Cell) bool {
	if c.Compare == "" || c.Compare != o.Compare {
		return false
	}
	for _, f := range fields() {
		both := f.used == nil || f.used(c) && f.used(o)
		if f.key == c.Compare && !both || f.key != c.Compare && f.key != "name" && both && f.value(c).String() != f.value(o).String() {
			return false
		}
	}
	return c.Name == o.Name || c.Compare == "stack"
}

// isAgainst tells whether c is to be compared with o, which has the name that c asks for, in the same conditions.
func isAgainst(c, o *Cell) bool {
	return c.Against != "" && c.Against == o.Name && c != o && sameIn(c, o, conditions) &&
		(!hasController(c) || !hasController(o) || sameIn(c, o, []string{"copy-latency", "copy-bandwidth"}))
}

func sameIn(c, o *Cell, keys []string) bool {
	return !slices.ContainsFunc(keys, func(key string) bool { return c.get(key) != o.get(key) })
}

// run runs a cell once.
func (x *Runner) run(ctx context.Context, c *Cell, devices pool, number int) (s *sampled, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if c.CPUs > 0 {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(c.CPUs))
	}
	k, err := newKit(c, devices)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, k.close()) }()
	r := rand.New(rand.NewPCG(x.Seed, c.hash()+uint64(number)))
	if drive := drivers()[c.Stack]; drive != nil {
		runtime.GC()
		if s, err = drive(ctx, c, k, r); err == nil {
			s.countIO(k, nil)
			err = s.offloaded(c)
		}
		return s, err
	}
	b, err := build(c, k)
	defer func() { err = errors.Join(err, b.close()) }()
	if err != nil {
		return nil, err
	}
	l := &load{cell: c, rand: r}
	if isCopyOnWrite(c) && c.Writes == writesLater {
		if _, err := runJobs(l.jobs(b.device, nil, true)); err != nil {
			return nil, fmt.Errorf("prepare: %w", err)
		}
	}
	if s, err = x.measure(ctx, c, k, b, l, number); err == nil && b.check != nil {
		err = b.check()
	}
	if err == nil {
		err = s.offloaded(c)
	}
	return s, err
}

// hash tells cells apart, but for what they are compared in: those of a group go over the same offsets.
func (c *Cell) hash() uint64 {
	h := fnv.New64a()
	for _, key := range conditions {
		h.Write([]byte(c.get(key) + "\n")) // it never fails
	}
	return h.Sum64()
}

// measure runs the jobs of a cell over its stack.
func (x *Runner) measure(ctx context.Context, c *Cell, k *kit, b *stack, l *load, number int) (*sampled, error) {
	jobs, beside := l.jobs(b.device, b.copies, false), l.foreground(b)
	harness, err := x.harnessCost(c)
	if err != nil {
		return nil, err
	}
	runtime.GC() // what earlier runs left is not this one's to pay for
	stats, queues := statsOf(b.engines)
	before := k.totals()
	if b.started != nil {
		b.started()
	}
	stop := context.AfterFunc(ctx, func() {
		for _, j := range jobs {
			j.until.Store(0)
		}
		if beside != nil {
			beside.until.Store(0)
		}
	})
	defer stop()
	m, profile, err := x.profile(c, number, func() (measurement, error) { return runBeside(jobs, beside) })
	if err := cmp.Or(ctx.Err(), err); err != nil {
		return nil, err
	}
	s := &sampled{
		elapsed: m.elapsed, count: int64(m.count), bytes: int64(m.count) * c.Block, latency: m.latency, written: m.written,
		writes: m.written / c.Block, sent: int64(m.sent), harness: harness, cpu: max(0, m.cpu-m.spun-time.Duration(harness*float64(m.count))),
		profile: profile,
	}
	s.stats, s.queues = statsOf(b.engines)
	subStats(&s.stats, stats)
	for i := range queues {
		s.queues[i] -= queues[i]
	}
	if len(b.engines) == 0 {
		for _, n := range m.each {
			s.queues = append(s.queues, uint64(n))
		}
	}
	s.countIO(k, before)
	if beside != nil {
		s.foreground = beside.latency
		for i, role := range s.roles {
			s.io[i] = s.io[i].sub(foregroundIO(beside, role))
		}
	}
	return s, nil
}

const calibrationDefault = 1 << 16

// harnessCost is the processor time in nanoseconds that the harness takes for a request: that of the same jobs on a
// device that does nothing. What it costs a job to sleep and be woken, on devices that complete elsewhere, is not in it.
func (x *Runner) harnessCost(c *Cell) (float64, error) {
	key := [3]int{c.Jobs, c.Depth, c.CPUs}
	if cost, ok := x.harness[key]; ok {
		return cost, nil
	}
	requests := int64(cmp.Or(x.calibration, calibrationDefault))
	like := Cell{
		Stack: stackBare, Size: max(requests, int64(c.Jobs)) * 4096, Block: 4096, Pattern: patternRandom, Jobs: c.Jobs, Depth: c.Depth,
	}
	like.normalise()
	l := &load{cell: &like, rand: rand.New(rand.NewPCG(x.Seed, 0))}
	var costs []float64
	for range 3 {
		m, err := runJobs(l.jobs(blank{like.Size}, nil, false))
		if err != nil {
			return 0, err
		}
		costs = append(costs, float64(m.cpu)/float64(m.count))
	}
	x.harness[key] = slices.Min(costs)
	return x.harness[key], nil
}

// statsOf adds up what engines have counted.
func statsOf(list []engine) (kcopyd.Stats, []uint64) {
	var sum kcopyd.Stats
	var queues []uint64
	for n, e := range list {
		st := e.Stats()
		sum.Jobs += st.Jobs
		sum.BytesRead += st.BytesRead
		sum.BytesWritten += st.BytesWritten
		sum.Errors += st.Errors
		for _, m := range st.Methods {
			i := slices.IndexFunc(sum.Methods, sameMethod(m))
			if i < 0 {
				i, sum.Methods = len(sum.Methods), append(sum.Methods, kcopyd.MethodStats{Class: m.Class, Method: m.Method})
			}
			sum.Methods[i].Operations += m.Operations
			sum.Methods[i].Bytes += m.Bytes
			sum.Methods[i].Errors += m.Errors
		}
		for i, jobs := range e.QueueJobs() {
			if n == 0 {
				queues = append(queues, jobs)
			} else {
				queues[i] += jobs
			}
		}
	}
	return sum, queues
}

func sameMethod(m kcopyd.MethodStats) func(kcopyd.MethodStats) bool {
	return func(o kcopyd.MethodStats) bool { return o.Class == m.Class && o.Method == m.Method }
}

// subStats takes off what had been counted before.
func subStats(s *kcopyd.Stats, before kcopyd.Stats) {
	s.Jobs -= before.Jobs
	s.BytesRead -= before.BytesRead
	s.BytesWritten -= before.BytesWritten
	s.Errors -= before.Errors
	for _, m := range before.Methods {
		if i := slices.IndexFunc(s.Methods, sameMethod(m)); i >= 0 {
			s.Methods[i].Operations -= m.Operations
			s.Methods[i].Bytes -= m.Bytes
			s.Methods[i].Errors -= m.Errors
		}
	}
	s.Methods = slices.DeleteFunc(s.Methods, func(m kcopyd.MethodStats) bool { return m.Operations == 0 && m.Errors == 0 })
}

// offloaded tells whether anything was read and written that should have been offloaded.
func (s *sampled) offloaded(c *Cell) error {
	if c.Offload != offloadOnly && c.Offload != offloadEmulated && c.Offload != offloadWorker {
		return nil
	}
	for _, m := range s.stats.Methods {
		if hasForeground(c) && m.Class == kcopyd.CopyOnWrite.String() {
			continue // the foreground's own
		}
		if m.Method == "readwrite" && m.Bytes > 0 {
			return fmt.Errorf("%d bytes were read and written, not offloaded", m.Bytes)
		}
	}
	return nil
}

// totals are what the leaves have counted.
func (k *kit) totals() []ioCount {
	var list []ioCount
	for _, c := range k.counts {
		list = append(list, c.total())
	}
	return list
}

// countIO keeps what the leaves have counted since before.
func (s *sampled) countIO(k *kit, before []ioCount) {
	for i, total := range k.totals() {
		if i < len(before) {
			total = total.sub(before[i])
		}
		s.io, s.roles = append(s.io, total), append(s.roles, k.counts[i].role)
	}
}
