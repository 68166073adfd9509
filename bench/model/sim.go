package model

import (
	"math"
	"slices"
)

// requests is how many requests of each job are simulated. The first tenth of all is not counted, and the last third is not
// run: jobs that share a CPU with the worker are late. Many jobs need fewer of each, but some turns of its depth.
func (l Load) requests() int { return max(2000/max(l.Jobs, 1), 4*l.Depth, 100) }

// Run simulates a load.
func Run(p Params, l Load) Result {
	s := newSim(p, l)
	for s.finished < s.total*2/3 {
		s.step()
	}
	return s.result()
}

// line is a cache line that many CPUs write, or a lock.
type line struct {
	owner int
	free  float64
}

// job is a submitter.
type job struct {
	cpu    *cpu
	idle   int       // request slots
	back   []float64 // when slots come back that the worker has finished with
	left   int       // requests that have not been submitted
	asleep bool
	used   float64 // CPU time, for the worker's share of a CPU
}

// cpu does one thing after the other. What touches a line is a phase of its own, so that lines are touched in the order of
// time.
type cpu struct {
	number int
	clock  float64
	phases []phase
	jobs   []*job
	turn   int
	issued int // copies
}

// phase changes what is, at the clock of its CPU.
type phase func(c *cpu)

// copying is a copy that waits for the worker.
type copying struct {
	at    float64 // when the worker can have it
	begun float64
	job   *job
}

// sim is a simulation. The CPU whose clock is behind takes the next step.
type sim struct {
	p    Params
	load Load
	cpus []*cpu
	jobs []*job

	batch, list, lock line

	worker       *cpu // where it runs
	queue        []copying
	workerAsleep bool
	workerUsed   float64

	latencies []float64
	total     int
	finished  int
	from, to  float64 // what is counted
}

func newSim(p Params, l Load) *sim {
	s := &sim{p: p, load: l, workerAsleep: true, total: l.Jobs * l.requests()}
	for i := range l.CPUs {
		s.cpus = append(s.cpus, &cpu{number: i})
	}
	for i := range l.Jobs {
		c := s.cpus[i%l.CPUs]
		j := &job{cpu: c, idle: l.Depth, left: l.requests()}
		c.jobs, s.jobs = append(c.jobs, j), append(s.jobs, j)
	}
	s.worker = s.cpus[0]
	if p.WorkerAlone {
		s.worker = &cpu{number: l.CPUs}
		s.cpus = append(s.cpus, s.worker)
	}
	for _, x := range []*line{&s.batch, &s.list, &s.lock} {
		x.owner = -1
	}
	return s
}

// step lets the CPU that is behind do one thing.
func (s *sim) step() {
	var first *cpu
	at := math.Inf(1)
	for _, c := range s.cpus {
		if t := s.next(c); t < at {
			first, at = c, t
		}
	}
	first.clock = at
	if len(first.phases) > 0 {
		do := first.phases[0]
		first.phases = first.phases[1:]
		do(first)
		return
	}
	j := first.runnable(at)
	switch {
	case s.workerIsDue(first, at) && (j == nil || s.workerUsed <= j.used):
		s.work(first)
	case s.load.Scheme == Scaled:
		s.scaled(j)
	default:
		s.submit(j)
	}
}

// next is when a CPU has something to do; infinity: never, as things are.
func (s *sim) next(c *cpu) float64 {
	if len(c.phases) > 0 {
		return c.clock
	}
	at := math.Inf(1)
	if c == s.worker && len(s.queue) > 0 {
		at = max(c.clock, s.queue[0].at)
	}
	for _, j := range c.jobs {
		switch {
		case j.left == 0:
		case j.idle > 0:
			return c.clock
		case len(j.back) > 0:
			at = min(at, max(c.clock, slices.Min(j.back)))
		}
	}
	return at
}

func (s *sim) workerIsDue(c *cpu, at float64) bool {
	return c == s.worker && len(s.queue) > 0 && s.queue[0].at <= at
}

// runnable is a job that can submit; those of one CPU take turns.
func (c *cpu) runnable(at float64) *job {
	for range c.jobs {
		c.turn++
		j := c.jobs[c.turn%len(c.jobs)]
		if j.left > 0 && (j.idle > 0 || len(j.back) > 0 && slices.Min(j.back) <= at) {
			return j
		}
	}
	return nil
}

func (c *cpu) then(p ...phase) { c.phases = append(c.phases, p...) }

// spend is work that touches nothing of others.
func spend(ns float64) phase { return func(c *cpu) { c.clock += ns } }

// touch writes a line, and holds it.
func (s *sim) touch(x *line, hold float64) phase {
	return func(c *cpu) {
		c.clock = max(c.clock, x.free)
		if x.owner != c.number && x.owner >= 0 {
			c.clock += s.p.Transfer
		}
		c.clock += hold
		x.owner, x.free = c.number, c.clock
	}
}

// scaled does one request from beginning to end.
func (s *sim) scaled(j *job) {
	c, begin := j.cpu, j.cpu.clock
	j.left--
	c.then(spend(s.p.Private))
	if j.left%max(s.p.BatchSize, 1) == 0 {
		c.then(s.touch(&s.batch, 0))
	}
	c.then(func(*cpu) { s.done(c, begin, c.clock) })
}

// submit hands one copy to the worker.
func (s *sim) submit(j *job) {
	c, begin := j.cpu, j.cpu.clock
	j.back = slices.DeleteFunc(j.back, func(at float64) bool {
		if at <= begin {
			j.idle++
		}
		return at <= begin
	})
	j.idle--
	j.left--
	c.then(spend(s.p.Submit))
	if s.load.Scheme == OneLock {
		c.then(s.touch(&s.lock, s.p.Hold))
	}
	c.then(s.touch(&s.list, 0), func(*cpu) {
		there := c.clock
		if s.workerAsleep {
			s.workerAsleep = false
			c.clock += s.p.WakeCost
			there = c.clock + s.p.WakeDelay
		}
		s.queue = append(s.queue, copying{there, begin, j})
		j.asleep = j.idle == 0 && len(j.back) == 0
		j.used += c.clock - begin
	})
}

// work does one copy.
func (s *sim) work(c *cpu) {
	begin := c.clock
	x := s.queue[0]
	s.queue = s.queue[1:]
	c.then(s.touch(&s.list, 0))
	if x.job.cpu != c {
		c.then(spend(2 * s.p.Transfer)) // the job comes, and its end goes back
	}
	c.then(spend(s.p.Worker))
	if s.load.Scheme == OneLock {
		c.then(s.touch(&s.lock, s.p.Hold))
	}
	c.then(func(*cpu) {
		back := c.clock
		if x.job.asleep {
			x.job.asleep = false
			c.clock += s.p.WakeCost
			back = c.clock + s.p.WakeDelay
		}
		x.job.back = append(x.job.back, back)
		s.workerUsed += c.clock - begin
		s.workerAsleep = len(s.queue) == 0
		s.done(c, x.begun, back)
	})
}

// done counts a request.
func (s *sim) done(c *cpu, begin, end float64) {
	s.finished++
	if s.finished <= s.total/10 {
		s.from = max(s.from, end)
		return
	}
	c.issued++
	s.to = max(s.to, end)
	s.latencies = append(s.latencies, end-begin)
}

func (s *sim) result() Result {
	slices.Sort(s.latencies)
	sum, most := 0.0, 0
	for _, x := range s.latencies {
		sum += x
	}
	for _, c := range s.cpus {
		most = max(most, c.issued)
	}
	n := float64(len(s.latencies))
	return Result{
		IOPS: n / (s.to - s.from) * 1e9, MeanNS: sum / n, P50NS: s.latencies[len(s.latencies)/2], Busiest: float64(most) / n,
	}
}
