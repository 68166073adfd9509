package bench

import (
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"cowherd/block"
	"cowherd/internal/percpu"
	"cowherd/kcopyd"
)

// latencyMax bounds the histogram: ten seconds, in nanoseconds.
const latencyMax = int64(10 * time.Second)

// counter is a counter of one queue.
type counter = atomic.Uint64

// job is one submitter: a goroutine on a queue of its own that keeps depth requests in flight. It goes through the
// offsets of its list, from the beginning again at their end, until it has submitted limit requests or its time is over.
// What began before the time from is not measured.
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

	next, sent, limit int
	from              int64        // nanoseconds since epoch
	until             atomic.Int64 // the same; whoever stops the job early sets it to 0
	reads             uint64       // of 1<<32 requests so many are reads, whatever op says
	random            uint64       // state of the generator that picks them
	written           int64        // bytes of writes that were submitted
	interval          float64
	spun              time.Duration     // that a paced job has busily waited
	copies            *copies           // requests are jobs of an engine; nil: of device
	tell              func(block.Queue) // is told of each request; may be nil

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
	copy       kcopyd.Job
	to         [1]kcopyd.Region
	_          percpu.Pad
}

// newJob makes a job that goes over its offsets once. Without a device it has no data: its requests are copies.
func newJob(device block.Device, queue block.Queue, depth int, what block.Op, size, stride int64, offsets []uint32) *job {
	j := &job{
		device: device, queue: queue, op: what, size: size, stride: stride, offsets: offsets,
		ops: make([]op, depth), wake: make(chan struct{}, 1), limit: len(offsets),
		latency: hdrhistogram.New(1, latencyMax, 3),
	}
	j.until.Store(math.MaxInt64)
	var data []byte
	if device != nil {
		data = make([]byte, size*int64(depth))
	}
	for i := range j.ops {
		o := &j.ops[i]
		o.job = j
		if device == nil {
			continue
		}
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
	if j.interval > 0 {
		j.runPaced(idle)
		return
	}
	inflight, now := 0, j.now()
	for j.err == nil && (j.more(now) || inflight > 0) {
		if idle == nil || !j.more(now) {
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

// more tells whether there is anything left to submit at time now. A job that gets a CPU only after its time is over
// submits one request all the same.
func (j *job) more(now int64) bool { return j.sent < j.limit && (now < j.until.Load() || j.sent == 0) }

// submit sends o to the job's next offset at time now.
func (j *job) submit(o *op, now int64) {
	o.r.Op, o.r.Queue = j.op, j.queue
	if j.reads > 0 && j.read() {
		o.r.Op = block.OpRead
	}
	o.r.Offset, o.r.Length = int64(j.offsets[j.next])*j.stride, j.size
	if j.next++; j.next == len(j.offsets) {
		j.next = 0
	}
	j.sent++
	o.start = now
	if j.tell != nil {
		j.tell(j.queue)
	}
	if j.copies != nil {
		j.copies.submit(o)
		return
	}
	if o.r.Op == block.OpWrite {
		j.written += j.size
	}
	o.r.Push(o)
	j.device.Submit(&o.r)
}

// read picks whether the next request is a read, by a generator of xorshift's kind.
func (j *job) read() bool {
	j.random ^= j.random << 13
	j.random ^= j.random >> 7
	j.random ^= j.random << 17
	return j.random&math.MaxUint32 < j.reads
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
	if o.start < j.from {
		return
	}
	// A latency beyond the histogram's end counts as its end.
	_ = j.latency.RecordValue(min(max(o.end-o.start, 1), latencyMax))
}

// measurement is the outcome of jobs that ran together.
type measurement struct {
	elapsed time.Duration // that is measured
	count   int           // of requests that are
	latency *hdrhistogram.Histogram
	cpu     time.Duration // of the whole process meanwhile
	spun    time.Duration // of it, what paced jobs waited
	sent    int           // all requests, and the bytes of their writes
	written int64
	each    []int // requests that are measured, by job
}

// errWarmup is the error of a run that was over before anything was measured.
var errWarmup = errors.New("the run ended within its warm-up")

// runJobs runs jobs at the same time and waits for all.
func runJobs(jobs []*job) (measurement, error) {
	m := measurement{latency: hdrhistogram.New(1, latencyMax, 3)}
	var wg sync.WaitGroup
	before := processorTime()
	epoch := time.Now()
	for _, j := range jobs {
		j.epoch = epoch
		wg.Go(j.run)
	}
	done := make(chan struct{})
	go func() {
		wg.Wait()
		close(done)
	}()
	warm := time.Duration(jobs[0].from)
	if warm > 0 {
		select {
		case <-time.After(warm):
			before = processorTime()
		case <-done:
		}
	}
	<-done
	m.elapsed = time.Since(epoch) - warm
	m.cpu = processorTime() - before
	for _, j := range jobs {
		m.latency.Merge(j.latency)
		m.spun += j.spun
		m.sent += j.sent
		m.written += j.written
		m.each = append(m.each, int(j.latency.TotalCount()))
		if j.err != nil {
			return m, j.err
		}
	}
	if m.count = int(m.latency.TotalCount()); m.count == 0 {
		return m, errWarmup
	}
	return m, nil
}
