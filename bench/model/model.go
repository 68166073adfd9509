// Package model is a model of the copy engines, to tell what they would do on more CPUs than there are.
//
// # What is modelled
//
// Jobs keep depth requests in flight each. A request is a first write: its chunk is copied, on a device that takes no time,
// or no more than one copy in DeviceGap. What it costs is made of
//
//	Private   work on data that no other CPU touches
//	a line    that many CPUs write (a lock, a list, a counter): it is at one CPU at a time, and takes Transfer to come from
//	          another. Who waits for it keeps its CPU
//	Submit    with the worker: to map the request and to hand its copy over
//	Worker    the worker's part: the copy, and all that follows from its end
//	Lines     what of a request goes to the worker's CPU and back, if that is another
//	Hold      with one lock: how long a request holds the lock of all exceptions, in two parts
//	WakeCost  a thread that sleeps is woken: what it costs who wakes it
//
// Jobs and the worker are threads. One runs on its CPU until it has nothing to do: a job until all its requests are in
// flight, the worker until no copy waits. Who is woken runs on the CPU of who woke it, Switch after that one has gone to
// sleep, or, if that takes WakeDelay, on another CPU that is idle: so Go's scheduler does it. With Bound a job stays on its
// CPU, as a kernel would have it, and with WorkerAlone the worker has a CPU to itself.
//
// # Schemes
//
//	Scaled      Private, and a shared line for every BatchSize-th request (chunks are allocated in batches)
//	Serialised  Submit and a line (the job list) at the submitter's; Worker, the line and the request's own Lines at the
//	            worker's
//	OneLock     the same, with the lock at both
//
// It is a simulation of single requests in time, without randomness but for what the interleaving brings. What it leaves
// out: memory bandwidth, caches that are shared or far (a second socket), hyper-threads, interrupts, and whatever else a
// kernel does in a request's time.
package model

// A Scheme is an engine with its locks.
type Scheme int

// The schemes, in the order of the kernel's history.
const (
	OneLock    Scheme = iota // one worker, one lock over all exceptions: before 2019
	Serialised               // one worker: today's kernel
	Scaled                   // copies where the requests are
)

// String is the name that the bench suites use.
func (s Scheme) String() string { return [...]string{"onelock", "serialised", "scaled"}[s] }

// Params are the costs, in ns.
type Params struct {
	Private   float64 `json:"private_ns"`    // of a request of the scaled engine
	Submit    float64 `json:"submit_ns"`     // of a request with a worker, at the submitter's
	Worker    float64 `json:"worker_ns"`     // at the worker's
	Hold      float64 `json:"hold_ns"`       // of the one lock, at each of the two
	Transfer  float64 `json:"transfer_ns"`   // of a line, from another CPU
	WakeCost  float64 `json:"wake_cost_ns"`  // of waking a goroutine, for who does it
	WakeDelay float64 `json:"wake_delay_ns"` // until it runs on another CPU, if one is idle
	Switch    float64 `json:"switch_ns"`     // until it runs on the CPU of who woke it, when that goes to sleep
	Lines     float64 `json:"lines"`         // of a request that go from its CPU to the worker's and back
	// BatchSize is how many requests of the scaled engine share one access to a line of all CPUs.
	BatchSize int `json:"batch_size"`
	// WorkerAlone gives the worker a CPU that no job uses.
	WorkerAlone bool `json:"worker_alone"`
	// Bound keeps each job on its CPU: no idle one takes it.
	Bound bool `json:"bound"`
	// DeviceGap is the least time between two copies that the device takes; 0: it has no limit.
	DeviceGap float64 `json:"device_gap_ns"`
}

// A Load is what is simulated.
type Load struct {
	Scheme Scheme `json:"-"`
	CPUs   int    `json:"cpus"`
	Jobs   int    `json:"jobs"` // bound to CPUs in turn
	Depth  int    `json:"depth"`
}

// A Result is what comes out.
type Result struct {
	IOPS   float64 `json:"iops"`
	MeanNS float64 `json:"latency_mean_ns"`
	P50NS  float64 `json:"latency_p50_ns"`
	// Busiest is the part of all copies that the busiest CPU issued.
	Busiest float64 `json:"busiest_share"`
}
