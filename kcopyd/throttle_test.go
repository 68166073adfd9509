package kcopyd

import (
	"errors"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"cowherd/block"
	"cowherd/internal/invariant"
)

// inBubble runs a test for each engine with a clock that jumps whenever all wait.
func inBubble(t *testing.T, test func(t *testing.T, e testEngine, throttle *Throttle)) {
	for _, engine := range engines {
		t.Run(engine.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				throttle := NewThrottle()
				e := engine.make(Config{Throttle: throttle})
				test(t, e, throttle)
				closeClean(t, e)
			})
		})
	}
}

func set(t *testing.T, throttle *Throttle, class Class, l Limit) {
	t.Helper()
	if err := throttle.Set(class, l); err != nil {
		t.Fatal(err)
	}
}

func near(got, want time.Duration) bool {
	return math.Abs(float64(got-want)) <= 0.01*float64(want)
}

// TestThrottleRate: however the bytes are cut into jobs, they take the time that the rate allows, and no buffer is held
// meanwhile. Other classes take none.
func TestThrottleRate(t *testing.T) {
	for _, length := range []int64{4096, 64 << 10, 1 << 20, 20 << 20} {
		inBubble(t, func(t *testing.T, e testEngine, throttle *Throttle) {
			set(t, throttle, Bulk, Limit{Rate: 10 << 20, Burst: 1 << 20})
			start := time.Now()
			for range (20 << 20) / length {
				run(e, &Job{From: Region{null{}, 0}, To: []Region{{null{}, 0}}, Length: length, Class: Bulk})
			}
			// The burst is free, and the last piece is let in while it is still owed: at most a piece.
			took, least := time.Since(start), 1900*time.Millisecond-50*time.Millisecond
			if took < least || took > 1910*time.Millisecond {
				t.Errorf("jobs of %d bytes took %v, want 1.9 s", length, took)
			}
			start = time.Now()
			run(e, &Job{From: Region{null{}, 0}, To: []Region{{null{}, 0}}, Length: 100 << 20, Class: Hydration})
			if took := time.Since(start); took > 0 {
				t.Errorf("another class took %v", took)
			}
			if s := throttle.Stats(); s[Bulk].Waits == 0 || s[Hydration].Waits != 0 || s[Bulk].Waiting != 0 {
				t.Errorf("stats: %+v", s)
			}
		})
	}
}

// TestThrottleManyJobs: jobs of several queues and engines share the rate.
func TestThrottleManyJobs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		throttle := NewThrottle()
		set(t, throttle, Hydration, Limit{Rate: 100 << 20})
		one, other := NewScaled(Config{Throttle: throttle}), NewSerialised(Config{Throttle: throttle})
		start := time.Now()
		var wg sync.WaitGroup
		for i := range 8 {
			e := []Engine{one, other}[i%2]
			wg.Go(func() {
				for range 50 {
					run(e, &Job{From: Region{null{}, 0}, To: []Region{{null{}, 0}}, Length: 1 << 20, Class: Hydration,
						Queue: block.Queue(i)})
				}
			})
		}
		wg.Wait()
		if took := time.Since(start); !near(took, 3900*time.Millisecond) {
			t.Errorf("400 MiB took %v, want 3.9 s", took)
		}
		closeClean(t, one)
		closeClean(t, other)
	})
}

// TestThrottleShare: with a share of the time, jobs take so much longer.
func TestThrottleShare(t *testing.T) {
	for _, share := range []int{10, 50, 90, 100} {
		inBubble(t, func(t *testing.T, e testEngine, throttle *Throttle) {
			set(t, throttle, Merge, Limit{Share: share})
			slow := &hooked{null{}, func(r *block.Request) {
				time.Sleep(time.Millisecond)
				r.Complete(nil)
			}}
			start := time.Now()
			for range 500 {
				run(e, &Job{From: Region{slow, 0}, To: []Region{{null{}, 0}}, Length: 4096, Class: Merge})
			}
			want := 500 * time.Millisecond * 100 / time.Duration(share)
			if took := time.Since(start); took > want*102/100 || took < want*98/100 {
				t.Errorf("share %d: took %v, want %v", share, took, want)
			}
		})
	}
}

// TestThrottleSet: a limit that is lifted lets go what waits for it; Close does as well, and so does time.
func TestThrottleSet(t *testing.T) {
	inBubble(t, func(t *testing.T, e testEngine, throttle *Throttle) {
		for _, l := range []Limit{{Rate: -1}, {Burst: -1}, {Share: -1}, {Share: 101}} {
			if err := throttle.Set(Bulk, l); !errors.Is(err, syscall.EINVAL) {
				t.Errorf("%+v: %v", l, err)
			}
		}
		if err := throttle.Set(ClassCount, Limit{}); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("unknown class: %v", err)
		}
		var done atomic.Int64
		submit := func() {
			e.Submit(&Job{From: Region{null{}, 0}, To: []Region{{null{}, 0}}, Length: 4 << 20, Class: Bulk,
				Done: func(*Job) { done.Add(1) }})
		}
		set(t, throttle, Bulk, Limit{Rate: 1})
		start := time.Now()
		submit()
		synctest.Wait()
		if s := e.Stats(); done.Load() != 0 || s.BuffersInUse != 0 || s.JobsInFlight != 1 {
			t.Errorf("%d done, stats %+v", done.Load(), s)
		}
		if throttle.Stats()[Bulk].Waiting == 0 {
			t.Error("nobody waits")
		}
		set(t, throttle, Bulk, Limit{})
		synctest.Wait()
		if done.Load() != 1 {
			t.Errorf("%d done after the limit was lifted", done.Load())
		}
		set(t, throttle, Bulk, Limit{Rate: 1})
		submit()
		synctest.Wait()
		if done.Load() != 1 {
			t.Errorf("%d done under the limit", done.Load())
		}
		if err := e.Close(); err != nil || done.Load() != 2 {
			t.Errorf("closed: %v, %d done", err, done.Load())
		}
		if time.Since(start) != 0 {
			t.Errorf("it took %v", time.Since(start))
		}
	})
}

// TestThrottleOffload: what a device copies is paid for, clones are not.
func TestThrottleOffload(t *testing.T) {
	inBubble(t, func(t *testing.T, e testEngine, throttle *Throttle) {
		from, to := newLeaf(t, "a", 8<<20), newLeaf(t, "b", 8<<20, cloneOffer(4096))
		other := newLeaf(t, "c", 8<<20,
			block.CopyOffer{Method: block.CopyDevice, Granularity: 4096, LengthMax: 1 << 30, Concurrency: 2})
		set(t, throttle, Bulk, Limit{Rate: 1 << 20})
		start := time.Now()
		for range 20 {
			run(e, &Job{From: Region{from, 0}, To: []Region{{to, 0}}, Length: 8 << 20, Class: Bulk, Offload: CloneOnly})
		}
		if took := time.Since(start); took > time.Second {
			t.Errorf("clones took %v", took)
		}
		start = time.Now()
		run(e, &Job{From: Region{from, 0}, To: []Region{{other, 0}}, Length: 8 << 20, Class: Bulk, Offload: OffloadOnly})
		if took := time.Since(start); took < 7*time.Second || took > 8*time.Second {
			t.Errorf("8 MiB by the device took %v", took)
		}
	})
}

// busyFor sets for how long the foreground counts as busy after its last request.
func busyFor(t *Throttle, d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.busyFor = d
}

// TestYield: while the foreground is busy, few background pieces are in flight; work that a request waits for is not held
// up, and when the foreground is silent nothing is.
func TestYield(t *testing.T) {
	for _, engine := range engines {
		t.Run(engine.name, func(t *testing.T) {
			throttle := NewThrottle()
			busyFor(throttle, time.Hour) // whether its goroutine runs in time is not what is tested
			e := engine.make(Config{Throttle: throttle})
			held := newAsync(t, null{}, 0, 1)
			var wg sync.WaitGroup
			jobs := make([]Job, 3*yieldedMost())
			stop := make(chan struct{})
			var foreground sync.WaitGroup
			foreground.Go(func() {
				for i := 0; ; i++ {
					select {
					case <-stop:
						return
					default:
						throttle.Foreground(block.Queue(i))
						yield()
					}
				}
			})
			waitUntil(func() bool { return throttle.active.Load() != 0 })
			for i := range jobs {
				jobs[i] = Job{From: Region{held, 0}, To: []Region{{null{}, 0}}, Length: []int64{3 << 20, 16 << 20}[i%2],
					Class: Hydration, Done: func(*Job) { wg.Done() }}
				wg.Add(1)
				e.Submit(&jobs[i])
			}
			waitUntil(func() bool { return held.count() == yieldedMost() && throttle.Yields() > 0 })
			run(e, &Job{From: Region{null{}, 0}, To: []Region{{null{}, 0}}, Length: 1 << 20})
			for range 20 {
				waitUntil(func() bool { return held.count() > 0 })
				if n := held.count(); n > yieldedMost() {
					t.Fatalf("%d pieces in flight, want at most %d", n, yieldedMost())
				}
				held.step(false)
			}
			close(stop)
			foreground.Wait()
			busyFor(throttle, busyForDefault)
			var finished atomic.Bool
			go func() { wg.Wait(); finished.Store(true) }()
			waitUntil(func() bool { held.step(false); return finished.Load() })
			var longest atomic.Int64
			measured := &hooked{null{}, func(r *block.Request) {
				longest.Store(max(longest.Load(), r.Length))
				r.Complete(nil)
			}}
			waitUntil(func() bool { // until the foreground has been silent for long enough
				run(e, &Job{From: Region{measured, 0}, To: []Region{{null{}, 0}}, Length: 1 << 20, Class: Bulk})
				return longest.Load() == SubJobSize
			})
			closeClean(t, e)
		})
	}
}

// TestPace: a slow foreground meets small pieces; of a fast one many requests are served between two bursts of whole
// pieces, or much time passes; and nobody waits for a silent one.
func TestPace(t *testing.T) {
	for _, test := range []struct {
		every                 time.Duration // from one request to the next
		gentle                bool
		piecesLeast           int // in a second
		burstsLeast, gapLeast int // bursts in a second, and requests between them
	}{
		{every: 100 * time.Millisecond, piecesLeast: 30000},
		{every: time.Millisecond, gentle: true, piecesLeast: 19000},
		{every: 4 * time.Microsecond, piecesLeast: 250, burstsLeast: 26, gapLeast: apartFor},
		{every: 50 * time.Microsecond, piecesLeast: 170, burstsLeast: 18, gapLeast: int(apartMost/(50*time.Microsecond)) - 1},
	} {
		t.Run(test.every.String(), func(t *testing.T) {
			inBubble(t, func(t *testing.T, e testEngine, throttle *Throttle) {
				p := paced{throttle: throttle}
				p.copy(e, test.every)
				p.mu.Lock()
				defer p.mu.Unlock()
				if p.pieces < test.piecesLeast || test.gentle && p.whole > 0 {
					t.Errorf("%d pieces, %d of them whole, want at least %d", p.pieces, p.whole, test.piecesLeast)
				}
				if len(p.gaps) < test.burstsLeast || slices.ContainsFunc(p.gaps, func(n int) bool { return n < test.gapLeast }) {
					t.Errorf("%d bursts with gaps of %v requests, want %d with %d", len(p.gaps)+1, p.gaps, test.burstsLeast,
						test.gapLeast)
				}
			})
		})
	}
}

// paced is a copy beside requests in the foreground.
type paced struct {
	throttle *Throttle

	mu sync.Mutex
	// +checklocks:mu
	served int // requests
	// +checklocks:mu
	servedThen int // when the last piece began
	// +checklocks:mu
	pieces int
	// +checklocks:mu
	whole int
	// +checklocks:mu
	gaps []int // requests between bursts
}

// copy copies for a second, by pieces that take 50 us, or 200 us if they are whole.
func (p *paced) copy(e Engine, every time.Duration) {
	stop := make(chan struct{})
	var foreground sync.WaitGroup
	foreground.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(every):
				p.mu.Lock()
				p.served++
				p.mu.Unlock()
				p.throttle.Foreground(0)
			}
		}
	})
	source := &hooked{null{}, func(r *block.Request) {
		p.note(r)
		time.AfterFunc(50*time.Microsecond*time.Duration(min(r.Length/gentlePiece, 4)), func() { r.Complete(nil) })
	}}
	time.Sleep(every + time.Microsecond)
	for start := time.Now(); time.Since(start) < time.Second; {
		run(e, &Job{From: Region{source, 0}, To: []Region{{null{}, 0}}, Length: 4 << 20, Class: Bulk})
	}
	close(stop)
	foreground.Wait()
}

// note counts a piece, which begins.
func (p *paced) note(r *block.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pieces++
	if r.Length > gentlePiece {
		p.whole++
	}
	if gap := p.served - p.servedThen; gap > 100 { // in a burst there are 50
		p.gaps = append(p.gaps, gap)
	}
	p.servedThen = p.served
}

// TestGentleCopies: small pieces copy all bytes, whatever the length and the flags.
func TestGentleCopies(t *testing.T) {
	for _, engine := range engines {
		t.Run(engine.name, func(t *testing.T) {
			throttle := NewThrottle()
			e := engine.make(Config{Throttle: throttle})
			from, to := newRAM(t, 2<<20), newRAM(t, 2<<20)
			for i := range from.data {
				from.data[i] = byte(i>>12) | 1
			}
			for _, length := range []int64{1, gentlePiece - 1, gentlePiece, gentlePiece + 1, 300000, SubJobSize, 1500000} {
				for flags := range Flags(4) {
					blank(to.data)
					throttle.Foreground(0)
					bad := failing(to, func(r *block.Request) bool {
						return flags&IgnoreErrors != 0 && r.Offset <= gentlePiece && r.End() > gentlePiece
					})
					j := &Job{From: Region{from, 0}, To: []Region{{bad, 0}}, Length: length, Class: Bulk, Flags: flags}
					run(e, j)
					failed := flags&IgnoreErrors != 0 && length > gentlePiece
					if failed != (j.WriteErr != nil) || (j.WriteBad != 0) != failed {
						t.Fatalf("length %d, flags %d: %v", length, flags, j.Err())
					}
					for i := range length {
						want := from.data[i]
						if failed && to.data[i] == sentinel {
							continue
						}
						if to.data[i] != want {
							t.Fatalf("length %d, flags %d: byte %d is %d", length, flags, i, to.data[i])
						}
					}
					if failed && flags == IgnoreErrors && length == 1500000 && to.data[length-1] == sentinel {
						t.Error("the pieces after an ignored error were not copied")
					}
				}
			}
			closeClean(t, e)
		})
	}
}

// TestThrottleAllocations: waiting allocates nothing in the steady state.
func TestThrottleAllocations(t *testing.T) {
	if invariant.Enabled {
		t.Skip("under the race detector pools drop some of what they are given")
	}
	throttle := NewThrottle()
	set(t, throttle, Bulk, Limit{Rate: 1 << 40, Burst: 1})
	e := NewScaled(Config{Throttle: throttle})
	done := make(chan struct{}, 1)
	j := &Job{From: Region{null{}, 0}, To: []Region{{null{}, 0}}, Length: SubJobSize, Class: Bulk,
		Done: func(*Job) { done <- struct{}{} }}
	n := testing.AllocsPerRun(1000, func() {
		e.Submit(j)
		<-done
	})
	if n >= 1 {
		t.Errorf("%v allocations a job", n)
	}
	if throttle.Stats()[Bulk].Waits == 0 {
		t.Error("nothing waited")
	}
	closeClean(t, e)
}
