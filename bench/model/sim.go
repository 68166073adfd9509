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

// thread is a job, or the worker.
type thread struct {
	home  *cpu    // where it runs, was woken, or last ran
	bound bool    // it runs nowhere else
	ready float64 // when it was woken
	state state

	// Of a job.
	idle int       // request slots
	back []float64 // when slots come back whose requests are done, or will be
	left int       // requests that have not been submitted
}

type state uint8

const (
	asleep state = iota
	queued
	runs
)

// cpu does one thing after the other. What touches a line is a phase of its own, so that lines are touched in the order of
// time.
type cpu struct {
	number int
	alone  bool // it is the worker's alone
	clock  float64
	phases []phase
	room   [8]phase // for them
	thread *thread  // that runs; nil: none does
	issued int      // copies
}

// phase changes what is, at the clock of its CPU.
type phase func(c *cpu)

// copying is a copy that waits for the worker.
type copying struct {
	begun float64
	from  *cpu // whose cache has it
	job   *thread
}

// sim is a simulation. The CPU whose clock is behind takes the next step.
type sim struct {
	p    Params
	load Load
	cpus []*cpu
	busy []*cpu // on which a thread runs: a heap

	batch, list, lock line
	device            float64 // when it takes the next copy

	ready  []*thread // that were woken and do not run yet
	worker *thread
	queue  []copying

	latencies []float64
	total     int
	finished  int
	from, to  float64 // what is counted
}

func newSim(p Params, l Load) *sim {
	s := &sim{p: p, load: l, total: l.Jobs * l.requests(), worker: &thread{}}
	for i := range l.CPUs {
		s.cpus = append(s.cpus, &cpu{number: i})
	}
	for i := range l.Jobs {
		c := s.cpus[i%l.CPUs]
		s.enqueue(&thread{home: c, idle: l.Depth, left: l.requests(), bound: p.Bound}, c, 0)
	}
	s.worker.home = s.cpus[0]
	if p.WorkerAlone {
		s.worker.home, s.worker.bound = &cpu{number: l.CPUs, alone: true}, true
		s.cpus = append(s.cpus, s.worker.home)
	}
	for _, x := range []*line{&s.batch, &s.list, &s.lock} {
		x.owner = -1
	}
	return s
}

// step lets the CPU that is behind do one thing.
func (s *sim) step() {
	if c, t, at := s.begin(); t != nil {
		c.clock = at
		s.start(c, t)
		s.busy = append(s.busy, c)
		s.up(len(s.busy) - 1)
		return
	}
	c := s.busy[0]
	switch {
	case len(c.phases) > 0:
		do := c.phases[0]
		if c.phases = c.phases[1:]; len(c.phases) == 0 {
			c.phases = c.room[:0]
		}
		do(c)
	case c.thread == s.worker:
		s.work(c)
	default:
		s.goOn(c, c.thread)
	}
	if c.thread == nil {
		last := len(s.busy) - 1
		s.busy[0], s.busy = s.busy[last], s.busy[:last]
	}
	s.down()
}

// begin is the next thread to begin, where, and when: nil if a CPU that is busy does something before.
func (s *sim) begin() (on *cpu, t *thread, at float64) {
	at = math.Inf(1)
	if len(s.busy) > 0 {
		at = s.busy[0].clock
	}
	for _, x := range s.ready {
		if x.ready+min(s.p.Switch, s.p.WakeDelay) >= at {
			continue
		}
		for _, c := range s.cpus {
			delay := s.p.Switch
			if x.home != c {
				delay = s.p.WakeDelay
			}
			if c.thread != nil || x.home != c && (x.bound || c.alone) {
				continue
			}
			if when := max(c.clock, x.ready+delay); when < at {
				on, t, at = c, x, when
			}
		}
	}
	return on, t, at
}

// up and down restore the order of busy, a heap with the CPU that is behind first, after its element i has come, or the
// first has changed.
func (s *sim) up(i int) {
	for i > 0 && s.busy[i].before(s.busy[(i-1)/2]) {
		s.busy[i], s.busy[(i-1)/2] = s.busy[(i-1)/2], s.busy[i]
		i = (i - 1) / 2
	}
}

func (s *sim) down() {
	for i := 0; ; {
		least := i
		for _, k := range []int{2*i + 1, 2*i + 2} {
			if k < len(s.busy) && s.busy[k].before(s.busy[least]) {
				least = k
			}
		}
		if least == i {
			return
		}
		s.busy[i], s.busy[least] = s.busy[least], s.busy[i]
		i = least
	}
}

// before tells which of two CPUs takes the next step.
func (c *cpu) before(o *cpu) bool {
	return c.clock < o.clock || c.clock == o.clock && c.number < o.number
}

// enqueue makes a thread ready on a CPU.
func (s *sim) enqueue(t *thread, c *cpu, at float64) {
	t.state, t.ready = queued, at
	if t.home == c || !t.bound && !c.alone {
		t.home = c
	} else {
		t.ready += s.p.WakeDelay - s.p.Switch // it goes home
	}
	s.ready = append(s.ready, t)
}

// start lets a thread run on a CPU.
func (s *sim) start(c *cpu, t *thread) {
	s.ready = slices.DeleteFunc(s.ready, func(x *thread) bool { return x == t })
	t.home, t.state, c.thread = c, runs, t
}

// wake makes a thread ready if it sleeps, at the cost of who is on c.
func (s *sim) wake(c *cpu, t *thread) {
	if t.state == asleep {
		c.clock += s.p.WakeCost
		s.enqueue(t, c, c.clock)
	}
}

// sleep ends the turn of what runs on c.
func (s *sim) sleep(c *cpu) { c.thread.state, c.thread = asleep, nil }

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

// goOn lets a job submit a request, or end its turn when it cannot.
func (s *sim) goOn(c *cpu, j *thread) {
	j.back = slices.DeleteFunc(j.back, func(at float64) bool {
		if at <= c.clock {
			j.idle++
		}
		return at <= c.clock
	})
	switch {
	case j.left == 0 || j.idle == 0 && len(j.back) == 0:
		s.sleep(c)
	case j.idle == 0: // the device will end one
		s.sleep(c)
		s.enqueue(j, c, slices.Min(j.back))
	case s.load.Scheme == Scaled:
		s.scaled(c, j)
	default:
		s.submit(c, j)
	}
}

// take is when the device has done a copy that it gets at the time at.
func (s *sim) take(at float64) float64 {
	s.device = max(s.device, at) + s.p.DeviceGap
	return max(s.device, at)
}

// scaled does one request from beginning to end.
func (s *sim) scaled(c *cpu, j *thread) {
	begun := c.clock
	j.left--
	j.idle--
	c.then(spend(s.p.Private))
	if j.left%max(s.p.BatchSize, 1) == 0 {
		c.then(s.touch(&s.batch, 0))
	}
	c.then(func(*cpu) {
		end := s.take(c.clock)
		j.back = append(j.back, end)
		s.done(c, begun, end)
	})
}

// submit hands one copy to the worker.
func (s *sim) submit(c *cpu, j *thread) {
	begun := c.clock
	j.left--
	j.idle--
	c.then(spend(s.p.Submit))
	if s.load.Scheme == OneLock {
		c.then(s.touch(&s.lock, s.p.Hold))
	}
	c.then(s.touch(&s.list, 0), func(*cpu) {
		s.queue = append(s.queue, copying{begun, c, j})
		s.wake(c, s.worker)
	})
}

// work does one copy, or ends the worker's turn if there is none.
func (s *sim) work(c *cpu) {
	if len(s.queue) == 0 {
		s.sleep(c)
		return
	}
	x := s.queue[0]
	s.queue = s.queue[1:]
	c.then(s.touch(&s.list, 0))
	if x.from != c {
		c.then(spend(s.p.Lines * s.p.Transfer)) // what the submitter has written comes, and goes back
	}
	c.then(spend(s.p.Worker))
	if s.load.Scheme == OneLock {
		c.then(s.touch(&s.lock, s.p.Hold))
	}
	c.then(func(*cpu) {
		end := s.take(c.clock)
		x.job.back = append(x.job.back, end)
		s.done(c, x.begun, end)
		s.wake(c, x.job)
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
