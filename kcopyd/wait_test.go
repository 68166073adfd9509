package kcopyd

import (
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cowherd/block"
	"cowherd/internal/invariant"
)

// waitUntil lets others run until the condition holds. The test's own time limit ends it if it never does.
func waitUntil(condition func() bool) {
	for n := 0; !condition(); n++ {
		if n < 1000 {
			yield()
		} else {
			time.Sleep(50 * time.Microsecond) // so as not to take a CPU from those it waits for
		}
	}
}

// TestWaitAcrossQueues gives a buffer back on one queue while a job waits on another.
func TestWaitAcrossQueues(t *testing.T) {
	forEngines(t, Config{BufferCeiling: 1}, func(t *testing.T, e testEngine) {
		held := newAsync(t, null{}, 0, 1)
		var done atomic.Int64
		first := &Job{From: Region{held, 0}, To: []Region{{null{}, 0}}, Length: SubJobSize, Queue: 0}
		first.Done = func(*Job) { done.Add(1) }
		e.Submit(first)
		waitUntil(func() bool { return held.count() == 1 })

		const count = 20
		jobs := make([]Job, count)
		for i := range jobs {
			j := &jobs[i]
			j.From, j.To = Region{null{}, 0}, []Region{{null{}, 0}}
			j.Length, j.Queue = SubJobSize>>(i%8), block.Queue(i+1)
			j.Done = func(*Job) { done.Add(1) }
			e.Submit(j)
		}
		waitUntil(func() bool { return e.Stats().JobsWaiting == count })
		if s := e.Stats(); s.BufferWaits != count || s.JobsInFlight != count+1 || s.BuffersInUse != SubJobSize {
			t.Errorf("stats: %+v", s)
		}
		held.step(false)
		waitUntil(func() bool { return done.Load() == count+1 })
	})
}

// TestNoLostWakeup has goroutines on different queues fight for one buffer: whoever does not get it must be woken by
// the one who does, at whatever moment it begins to wait.
func TestNoLostWakeup(t *testing.T) {
	forEngines(t, Config{BufferCeiling: 1}, func(t *testing.T, e testEngine) {
		const goroutines, rounds = 4, 2000
		var wg sync.WaitGroup
		for g := range goroutines {
			wg.Go(func() {
				done := make(chan struct{}, 1)
				j := &Job{From: Region{null{}, 0}, To: []Region{{null{}, 0}}, Queue: block.Queue(g)}
				j.Done = func(*Job) { done <- struct{}{} }
				for i := range rounds {
					j.Length = SubJobSize >> (i * g % 8)
					e.Submit(j)
					<-done
				}
			})
		}
		wg.Wait()
	})
}

// TestPoolNoLostWakeup is the same on the pool alone, where giving back and beginning to wait come closest.
func TestPoolNoLostWakeup(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(8))
	const goroutines = 2
	rounds := 2000000
	if invariant.Enabled {
		rounds /= 20 // the race detector has much to do
	}
	var p pool
	p.init(1)
	var jobs [goroutines]Job
	var granted [goroutines]atomic.Bool
	var wg sync.WaitGroup
	for g := range goroutines {
		j := &jobs[g]
		j.From, j.Length, j.Queue = Region{null{}, 0}, SubJobSize, block.Queue(g)
		j.state.shard, j.state.step = p.shards.At(uint(g)), SubJobSize
		wg.Go(func() {
			s := &j.state.whole
			for range rounds {
				s.start(j)
				if !p.acquire(s) {
					waitUntil(func() bool { return granted[g].Load() })
					granted[g].Store(false)
				}
				var todo subJobs
				j.state.shard.give(s)
				p.restart(&todo)
				for s := todo.pop(); s != nil; s = todo.pop() {
					granted[s.job.Queue].Store(true)
				}
			}
		})
	}
	wg.Wait()
}

// TestInOrder checks that who comes later waits behind who waits already, though there is a buffer for him: the Done of
// the job that has just given it back asks for it on the same queue.
func TestInOrder(t *testing.T) {
	forEngines(t, Config{BufferCeiling: 1}, func(t *testing.T, e testEngine) {
		held := newAsync(t, null{}, 0, 1)
		var order []string // of the jobs that are done; one at a time is
		var count atomic.Int64
		submit := func(name string, from block.Device, length int64, queue block.Queue, then func()) {
			e.Submit(&Job{From: Region{from, 0}, To: []Region{{null{}, 0}}, Length: length, Queue: queue,
				Done: func(*Job) {
					order = append(order, name)
					then()
					count.Add(1)
				}})
		}
		submit("first", held, 4096, 3, func() {
			submit("last", null{}, 4096, 3, func() {})
		})
		waitUntil(func() bool { return held.count() == 1 })
		submit("waiting", null{}, SubJobSize, 2, func() {})
		waitUntil(func() bool { return e.Stats().JobsWaiting == 1 })
		held.step(false)
		waitUntil(func() bool { return count.Load() == 3 })
		if want := []string{"first", "waiting", "last"}; !slices.Equal(order, want) {
			t.Errorf("jobs were done in the order %v, want %v", order, want)
		}
	})
}

// TestLargeJobYields checks that a large job does not keep those waiting that have got their buffer from it.
func TestLargeJobYields(t *testing.T) {
	forEngines(t, Config{BufferCeiling: SubJobSize + 4096}, func(t *testing.T, e testEngine) {
		held := newAsync(t, null{}, 0, 1)
		first := &Job{From: Region{held, 0}, To: []Region{{null{}, 0}}, Length: 4096, Done: func(*Job) {}}
		e.Submit(first)
		waitUntil(func() bool { return held.count() == 1 })
		smallDone := false
		small := &Job{From: Region{null{}, 0}, To: []Region{{null{}, 0}}, Length: 4096}
		small.Done = func(*Job) { smallDone = true }
		large := &Job{To: []Region{{null{}, 0}}, Length: 100 * SubJobSize}
		large.From.Device = &hooked{null{}, func(r *block.Request) {
			if r.Offset == SubJobSize {
				e.Submit(small)
			}
			if r.Offset > (SplitCount+2)*SubJobSize && !smallDone {
				t.Errorf("still waiting at byte %d of the large job", r.Offset)
			}
			r.Complete(nil)
		}}
		run(e, large)
		held.step(false)
	})
}

// TestShortOfMemory runs jobs of all sizes on all queues, with I/O that completes here and there, below ceilings that
// force buffers to go from queue to queue and from class to class.
func TestShortOfMemory(t *testing.T) {
	for _, ceiling := range []int64{1, 5*SubJobSize + 4096} {
		forEngines(t, Config{BufferCeiling: ceiling}, func(t *testing.T, e testEngine) {
			slow := newAsync(t, null{}, 2, 2)
			var wg sync.WaitGroup
			for g := range 6 {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(3, uint64(g)))
					jobs := make([]Job, 16)
					free := make(chan *Job, len(jobs))
					for i := range jobs {
						jobs[i].Done = func(j *Job) { free <- j }
						free <- &jobs[i]
					}
					for range 1000 {
						j := <-free
						j.From, j.To = Region{null{}, 0}, []Region{{null{}, 0}}
						if g%2 == 0 {
							j.From.Device = slow
						}
						j.Length, j.Queue = 1<<rng.IntN(22), block.Queue(rng.IntN(8))
						e.Submit(j)
					}
					for range jobs {
						<-free
					}
				})
			}
			wg.Wait()
			if s := e.Stats(); s.BufferWaits == 0 || s.Jobs != 6000 {
				t.Errorf("stats: %+v", s)
			}
		})
	}
}

// depth is the number of stack frames of its caller.
func depth() int64 {
	var frames [512]uintptr
	return int64(runtime.Callers(2, frames[:]))
}

// deepest is a null device that notes the deepest stack it was called on.
func deepest() (block.Device, *atomic.Int64) {
	max := new(atomic.Int64)
	return &hooked{null{}, func(r *block.Request) {
		for d, m := depth(), max.Load(); d > m && !max.CompareAndSwap(m, d); m = max.Load() {
		}
		r.Complete(nil)
	}}, max
}

// TestStackLargeJob copies 1 GiB between devices that complete at once: no deeper than 4 KiB, and with one buffer.
func TestStackLargeJob(t *testing.T) {
	for _, flags := range []Flags{0, WriteSequentially} {
		forEngines(t, Config{}, func(t *testing.T, e testEngine) {
			d, max := deepest()
			j := &Job{From: Region{d, 0}, To: []Region{{d, 1 << 40}}, Length: 4096, Flags: flags}
			run(e, j)
			small := max.Load()
			j.Length = 1 << 30
			run(e, j)
			if max.Load() > small+1 {
				t.Errorf("%d frames for 1 GiB, %d for 4 KiB", max.Load(), small)
			}
			if s := e.Stats(); s.BytesWritten != 1<<30+4096 || s.BytesRead != s.BytesWritten {
				t.Errorf("stats: %+v", s)
			}
		})
	}
}

// TestStackWaiters ends a job that thousands wait for, on devices that complete at once.
func TestStackWaiters(t *testing.T) {
	forEngines(t, Config{BufferCeiling: 1}, func(t *testing.T, e testEngine) {
		const count = 3000
		d, max := deepest()
		held := newAsync(t, null{}, 0, 1)
		first := &Job{From: Region{held, 0}, To: []Region{{d, 0}}, Length: SubJobSize, Done: func(*Job) {}}
		e.Submit(first)
		waitUntil(func() bool { return held.count() == 1 })
		var done atomic.Int64
		jobs := make([]Job, count)
		for i := range jobs {
			jobs[i] = Job{From: Region{d, 0}, To: []Region{{d, 0}}, Length: SubJobSize + int64(i%2)*8192}
			jobs[i].Queue, jobs[i].Done = block.Queue(i), func(*Job) { done.Add(1) }
			e.Submit(&jobs[i])
		}
		held.step(false)
		waitUntil(func() bool { return done.Load() == count })
		if max.Load() > 24 {
			t.Errorf("%d frames", max.Load())
		}
	})
}

// TestSubmitNotKept checks that who gives a buffer back is not kept working for those that wait, however many.
func TestSubmitNotKept(t *testing.T) {
	e := NewScaled(Config{BufferCeiling: 1})
	const count, stuck = 200, 3 * restartsMax
	var started, done atomic.Int64
	gate := make(chan struct{})
	waiting := make([]Job, count)
	d := &hooked{null{}, func(r *block.Request) {
		if r.Op == block.OpRead && started.Add(1) == stuck {
			<-gate
		}
		r.Complete(nil)
	}}
	first := &Job{To: []Region{{null{}, 0}}, Length: SubJobSize, Done: func(*Job) {}}
	first.From.Device = &hooked{null{}, func(r *block.Request) {
		for i := range waiting {
			j := &waiting[i]
			*j = Job{From: Region{d, 0}, To: []Region{{d, 0}}, Length: SubJobSize, Done: func(*Job) { done.Add(1) }}
			e.Submit(j)
		}
		r.Complete(nil)
	}}
	e.Submit(first) // hangs if it runs all of them
	close(gate)
	closeClean(t, e)
	if done.Load() != count {
		t.Errorf("%d jobs done, want %d", done.Load(), count)
	}
}

// TestClose checks that Close waits for jobs in flight and for what their Done submits.
func TestClose(t *testing.T) {
	forEngines(t, Config{}, func(t *testing.T, e testEngine) {
		held := newAsync(t, null{}, 0, 1)
		var closed atomic.Bool
		generations := 5
		j := &Job{From: Region{held, 0}, To: []Region{{null{}, 0}}, Length: 4096}
		j.Done = func(j *Job) {
			if closed.Load() {
				t.Error("Close did not wait")
			}
			if generations--; generations > 0 {
				e.Submit(j)
			}
		}
		e.Submit(j)
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				if err := e.Close(); err != nil {
					t.Error(err)
				}
				closed.Store(true)
			})
		}
		for range 5 {
			waitUntil(func() bool { return held.step(false) })
		}
		wg.Wait()
		if s := e.Stats(); s.Jobs != 5 {
			t.Errorf("stats: %+v", s)
		}
	})
}
