package bench

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"cowherd/block"
	"cowherd/internal/percpu"
)

// latencyMax bounds the histogram: ten seconds, in nanoseconds.
const latencyMax = int64(10 * time.Second)

// job is one submitter: a goroutine on a queue of its own that keeps depth requests in flight until each offset of
// its list has been written (or read) once.
//
// A completion may come on any goroutine; it pushes the op on a stack that the job empties, and wakes the job only if
// it sleeps. All completions take this way, whatever the device and the engine.
type job struct {
	device  block.Device
	queue   block.Queue
	op      block.Op
	size    int64    // bytes of a request
	offsets []uint32 // in units of stride
	stride  int64    // bytes
	epoch   time.Time

	ops      []op
	finished atomic.Pointer[op]
	asleep   atomic.Bool
	wake     chan struct{}

	latency *hdrhistogram.Histogram
	err     error
	_       percpu.Pad
}

// op is a request slot of a job.
type op struct {
	r          block.Request
	job        *job
	start, end int64 // nanoseconds since the job's epoch
	err        error
	next       *op
	_          percpu.Pad
}

func newJob(device block.Device, queue block.Queue, depth int, what block.Op, size, stride int64, offsets []uint32) *job {
	j := &job{
		device: device, queue: queue, op: what, size: size, stride: stride, offsets: offsets,
		ops: make([]op, depth), wake: make(chan struct{}, 1),
		latency: hdrhistogram.New(1, latencyMax, 3),
	}
	data := make([]byte, size*int64(depth))
	for i := range j.ops {
		o := &j.ops[i]
		o.job = j
		o.r.Data = data[int64(i)*size : int64(i+1)*size]
		for k := range o.r.Data {
			o.r.Data[k] = byte(i + k)
		}
	}
	return j
}

// Complete takes the time and hands the op back to its job.
func (o *op) Complete(_ *block.Request, err error) {
	j := o.job
	o.end, o.err = j.now(), err
	for {
		head := j.finished.Load()
		o.next = head
		if j.finished.CompareAndSwap(head, o) {
			break
		}
	}
	if j.asleep.Load() && j.asleep.CompareAndSwap(true, false) {
		j.wake <- struct{}{}
	}
}

func (j *job) now() int64 { return int64(time.Since(j.epoch)) }

// run does the job's work. A request that completed inside Submit costs one reading of the clock: its end is the
// beginning of the next.
func (j *job) run() {
	var idle *op
	for i := range j.ops {
		j.ops[i].next = idle
		idle = &j.ops[i]
	}
	inflight, now := 0, j.now()
	for j.err == nil && (len(j.offsets) > 0 || inflight > 0) {
		if idle == nil || len(j.offsets) == 0 {
			idle, inflight = j.reap(j.harvest(), idle, inflight)
			now = j.now()
			continue
		}
		o := idle
		idle = o.next
		j.submit(o, now)
		inflight++
		if j.finished.Load() == nil {
			now = j.now()
			continue
		}
		done := j.finished.Swap(nil)
		now = done.end
		if done != o || done.next != nil {
			now = j.now()
		}
		idle, inflight = j.reap(done, idle, inflight)
	}
}

// submit sends o to the job's next offset at time now.
func (j *job) submit(o *op, now int64) {
	o.r.Op, o.r.Queue = j.op, j.queue
	o.r.Offset, o.r.Length = int64(j.offsets[0])*j.stride, j.size
	j.offsets = j.offsets[1:]
	o.start = now
	o.r.Push(o)
	j.device.Submit(&o.r)
}

// reap records the finished ops and adds them to the idle ones.
func (j *job) reap(done, idle *op, inflight int) (*op, int) {
	for done != nil {
		next := done.next
		j.record(done)
		done.next = idle
		idle = done
		inflight--
		done = next
	}
	return idle, inflight
}

// harvest gives all finished ops, waiting for one if need be.
func (j *job) harvest() *op {
	for {
		if o := j.finished.Swap(nil); o != nil {
			return o
		}
		j.asleep.Store(true)
		if j.finished.Load() != nil && j.asleep.CompareAndSwap(true, false) {
			continue
		}
		<-j.wake
	}
}

func (j *job) record(o *op) {
	if o.err != nil && j.err == nil {
		j.err = fmt.Errorf("job %d: %w", j.queue, o.err)
	}
	// A latency beyond the histogram's end counts as its end.
	_ = j.latency.RecordValue(min(max(o.end-o.start, 1), latencyMax))
}

// measurement is the outcome of jobs that ran together.
type measurement struct {
	elapsed time.Duration
	count   int
	latency *hdrhistogram.Histogram
}

// runJobs runs jobs at the same time and waits for all.
func runJobs(jobs []*job) (measurement, error) {
	m := measurement{latency: hdrhistogram.New(1, latencyMax, 3)}
	for _, j := range jobs {
		m.count += len(j.offsets)
	}
	var wg sync.WaitGroup
	epoch := time.Now()
	for _, j := range jobs {
		j.epoch = epoch
		wg.Go(j.run)
	}
	wg.Wait()
	m.elapsed = time.Since(epoch)
	for _, j := range jobs {
		m.latency.Merge(j.latency)
		if j.err != nil {
			return m, j.err
		}
	}
	return m, nil
}
