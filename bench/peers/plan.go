package main

import "fmt"

const (
	blockBytes  = 4 << 10  // of every request, and the chunk of every snapshot
	strideBytes = 64 << 10 // a cluster of qemu's copy-before-write
	depth       = 32       // requests in flight on each connection

	// A stride touches one block in sixteen, so it goes over more bytes in order to last long enough; and a clone is as
	// large for the same reason.
	strideSpan = 4
)

// connections are the numbers of connections that scenarios are measured with.
var connections = []int{1, 4}

// job is what fio does in a step.
type job struct {
	rw string // as fio calls it
	// once: every block once, in random order, each connection having its share of the blocks; else blocks at random
	// from all of them, for a time.
	once bool
	// stride: the first block of each stride, in ascending order, each connection having its share. 0: all blocks.
	stride int64
}

var (
	nothing      = job{}
	randomReads  = job{rw: "randread"}
	randomWrites = job{rw: "randwrite"}
	eachOnce     = job{rw: "randwrite", once: true}
	eachStride   = job{rw: "write", once: true, stride: strideBytes}
)

// requests is how many requests the job makes of span bytes; 0 if that is a matter of time.
func (j job) requests(span int64) int64 {
	switch {
	case !j.once:
		return 0
	case j.stride > 0:
		return span / j.stride
	}
	return span / blockBytes
}

// step is one run of fio.
type step struct {
	name   string
	job    job
	frozen bool   // the snapshot is there
	on     export // that fio talks to
	// hydrate: the clone hydrates from the beginning of the step, which ends when all is hydrated. If the job is nothing, a
	// block that was hydrated counts as a request.
	hydrate bool
	// own: the step is cowherd's alone.
	own bool
	// against is the step of cowherd's that the bars are for; "": the first peer's same step.
	against string
	// bars are the least ratios that are good enough, by the number of connections.
	bars map[int]float64
}

// export tells the two exports of a server apart.
type export int

const (
	live     export = iota // the device that has a snapshot, or is to have one
	snapshot               // the snapshot
)

// scenario is what a freshly started server goes through.
type scenario struct {
	name  string
	peers []string // the stacks that cowherd is measured beside; bars are for the first
	clone bool     // the server has a clone of the image instead of the image
	steps []step
}

// Steps that others are compared with, or that the kernel's are.
const (
	bareOnce    = "bare, each block once"
	firstWrites = "first writes with a snapshot"
	laterWrites = "later writes with a snapshot"
)

// barePeers are servers without snapshots, or with none taken.
var barePeers = []string{nbdkitFile, nbdkitMemory, qemuNBD, nbdServer}

var plan = []scenario{
	{name: "bare-read", peers: barePeers, steps: []step{
		{name: "bare random reads", job: randomReads, bars: map[int]float64{1: 1.3, 4: 1.5}},
	}},
	{name: "bare-write", peers: barePeers, steps: []step{
		{name: "bare random writes", job: randomWrites, bars: map[int]float64{1: 1, 4: 1.3}},
	}},
	{name: "first-write", peers: []string{qsdCBW}, steps: []step{
		{name: bareOnce, job: eachOnce, own: true},
		{name: "reads of snapshot, none copied", job: randomReads, frozen: true, on: snapshot},
		{name: firstWrites, job: eachOnce, frozen: true, bars: map[int]float64{1: 3, 4: 3.5}},
		{name: laterWrites, job: eachOnce, frozen: true, against: bareOnce, bars: map[int]float64{1: 0.9, 4: 0.9}},
		{name: "reads of snapshot, all copied", job: randomReads, frozen: true, on: snapshot},
	}},
	{name: "stride", peers: []string{qsdCBW}, steps: []step{
		{name: firstWrites + ", 4k in each 64k", job: eachStride, frozen: true, bars: map[int]float64{1: 8}},
	}},
	{name: "snapshot-write", peers: []string{nbdkitCow, qemuNBDSnapshot}, steps: []step{
		{name: "writes to snapshot, first", job: eachOnce, frozen: true, on: snapshot, bars: map[int]float64{1: 1, 4: 1.2}},
		{name: "writes to snapshot, later", job: eachOnce, frozen: true, on: snapshot},
	}},
	// The clone of a scenario is fresh, because the writes of an earlier step would leave less to hydrate.
	{name: "clone-write", peers: []string{qsdStream, qemuNBDOverlay}, clone: true, steps: []step{
		{name: "writes to clone, none hydrated", job: randomWrites},
	}},
	{name: "clone-hydrate", peers: []string{qsdStream}, clone: true, steps: []step{
		{name: "writes to clone while it hydrates", job: randomWrites, hydrate: true, bars: map[int]float64{1: 3}},
	}},
	{name: "clone-idle", peers: []string{qsdStream}, clone: true, steps: []step{
		{name: "hydration alone", job: nothing, hydrate: true},
	}},
}

// span is how many bytes of the image the scenario uses.
func (s *scenario) span(bytes int64) int64 {
	if s.clone {
		return strideSpan * bytes
	}
	for _, st := range s.steps {
		if st.job.stride > 0 {
			return strideSpan * bytes
		}
	}
	return bytes
}

// chunks is how many chunks a snapshot has of its own at the end of the scenario.
func (s *scenario) chunks(bytes int64) int64 {
	n := int64(0)
	for _, st := range s.steps {
		if st.frozen {
			n = max(n, st.job.requests(s.span(bytes)))
		}
	}
	return n
}

// connections are the numbers of connections that the scenario is measured with: one is enough for those that use none.
func (s *scenario) connections() []int {
	for _, st := range s.steps {
		if st.job != nothing {
			return connections
		}
	}
	return connections[:1]
}

// cells are those of the plan, unmeasured.
func cells() (all []*cell) {
	for i := range plan {
		for _, n := range plan[i].connections() {
			all = append(all, &cell{scenario: &plan[i], connections: n, failed: map[string]error{}})
		}
	}
	return all
}

// cellNames are what -only can match.
func cellNames() []string {
	return each(cells(), (*cell).name)
}

// cell is one scenario with one number of connections, and what came of it.
type cell struct {
	scenario    *scenario
	connections int
	rounds      []round
	failed      map[string]error // the stacks that failed, by name: they are not measured further
}

func (c *cell) name() string { return fmt.Sprintf("%s/%d", c.scenario.name, c.connections) }

// stacks are the names of those that are measured in the cell.
func (c *cell) stacks() []string { return append([]string{ours}, c.scenario.peers...) }
