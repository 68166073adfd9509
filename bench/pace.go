package bench

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// spinTime is how long before a request is due its job stops sleeping and looks at the clock: a sleep of the kernel ends
// late by as much, and Go's own timers by up to a millisecond.
const spinTime = 30 * time.Microsecond

// sleepMax bounds a sleep, so that a job can be stopped.
const sleepMax = 100 * time.Millisecond

// runPaced submits a request at each interval, whatever became of those before it. A latency is counted from the time at
// which the request was due, so that a device that stalls is not spared the requests that nobody could make meanwhile
// (coordinated omission): with all ops in flight, those that are due wait, and that counts.
//
// It sleeps in the kernel, on a thread of its own. What completes meanwhile has had its time taken, and is found later.
func (j *job) runPaced(idle *op) {
	runtime.LockOSThread() // its timers become exact; the thread ends with the goroutine
	// Without exact timers it spins a little longer.
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	inflight := 0
	for j.err == nil {
		due := int64(float64(j.sent) * j.interval)
		switch {
		case !j.more(due) && inflight == 0:
			return
		case idle == nil || !j.more(due):
			idle, inflight = j.reap(j.harvest(), idle, inflight)
		case j.now() < due:
			j.await(due)
			idle, inflight = j.reap(j.finished.Swap(nil), idle, inflight)
		default:
			o := idle
			idle = o.next
			j.submit(o, due)
			inflight++
			idle, inflight = j.reap(j.finished.Swap(nil), idle, inflight)
		}
	}
	for inflight > 0 {
		idle, inflight = j.reap(j.harvest(), idle, inflight)
	}
}

// await waits until due, or for a while if that is far away.
func (j *job) await(due int64) {
	if left := time.Duration(due-j.now()) - spinTime; left > 0 {
		t := unix.NsecToTimespec(int64(min(left, sleepMax)))
		_ = unix.Nanosleep(&t, nil) // a signal only makes it spin
		if left > sleepMax {
			return
		}
	}
	if begin := j.now(); begin < due {
		before := threadTime()
		for j.now() < due {
			runtime.Gosched()
		}
		if begin >= j.from {
			j.spun += threadTime() - before
		}
	}
}

// threadTime is the processor time of this thread: that of others who run while the job yields is not in it.
func threadTime() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t) // the clock is always there
	return time.Duration(t.Nano())
}
