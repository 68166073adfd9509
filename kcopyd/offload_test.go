package kcopyd

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"cowherd/block"
	"cowherd/internal/invariant"
)

// leaf is a ram that can be filled by offload from another leaf.
type leaf struct {
	*ram
	name   string
	offers []block.CopyOffer
	asked  atomic.Int64 // calls of CopyOffers

	// fault answers a call before it copies: how many of its bytes are copied, and the error; nil: all of them.
	fault func(m block.CopyMethod, from, to, length int64) (int64, error)

	mu sync.Mutex
	// +checklocks:mu
	calls int
	// +checklocks:mu
	running int
	// +checklocks:mu
	runningMost int
}

func newLeaf(t testing.TB, name string, size int64, offers ...block.CopyOffer) *leaf {
	return &leaf{ram: newRAM(t, size), name: name, offers: offers}
}

// cloneOffer is what a file on XFS offers.
func cloneOffer(granularity int64) block.CopyOffer {
	return block.CopyOffer{Method: block.CopyClone, Granularity: granularity, TailAtEnd: true, LengthMax: 1 << 30,
		Concurrency: 1}
}

func (l *leaf) String() string { return l.name }

func (l *leaf) CopyOffers(source block.Device) []block.CopyOffer {
	l.asked.Add(1)
	if _, ok := source.(*leaf); !ok {
		return nil
	}
	return l.offers
}

func (l *leaf) Copy(m block.CopyMethod, source block.Device, from, to, length int64) (int64, error) {
	l.mu.Lock()
	l.calls++
	l.running++
	l.runningMost = max(l.runningMost, l.running)
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		l.running--
		l.mu.Unlock()
	}()
	s := source.(*leaf)
	l.checkCall(m, s, from, to, length)
	n, err := length, error(nil)
	if l.fault != nil {
		n, err = l.fault(m, from, to, length)
	}
	copy(l.data[to:to+n], s.data[from:from+n])
	return n, err
}

// checkCall checks a call against the offer.
func (l *leaf) checkCall(m block.CopyMethod, s *leaf, from, to, length int64) {
	for _, o := range l.offers {
		if o.Method != m {
			continue
		}
		ends := o.TailAtEnd && from+length == s.Size() && to+length == l.Size()
		if from%o.Granularity != 0 || to%o.Granularity != 0 || (length%o.Granularity != 0 && !ends) ||
			length > o.LengthMax || length <= 0 {
			l.t.Errorf("copy by %v of %d bytes from %d to %d does not fit the offer %+v", m, length, from, to, o)
		}
		return
	}
	l.t.Errorf("copy by %v, which was not offered", m)
}

func (l *leaf) callCount() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.calls
}

// mosaic is a layer whose pieces of a fixed size lie in any order on any devices.
type mosaic struct {
	t         testing.TB
	unit      int64
	pieces    []Region
	suspended atomic.Bool
	held      atomic.Int64
}

func (m *mosaic) Size() int64          { return m.unit * int64(len(m.pieces)) }
func (m *mosaic) Limits() block.Limits { return block.Limits{LogicalBlock: 1, PreferredIO: 4096} }

func (m *mosaic) Submit(r *block.Request) {
	f := block.NewFan(r)
	for at, end := r.Offset, r.End(); at < end; {
		p := m.pieces[at/m.unit]
		n := min(m.unit-at%m.unit, end-at)
		part := f.Part(at, n)
		part.Offset = p.Offset + at%m.unit
		p.Device.Submit(part)
		at += n
	}
	f.Done(nil)
}

func (m *mosaic) Remap(_ block.Queue, offset, length int64) (block.Device, int64, int64, bool) {
	if m.suspended.Load() {
		return nil, 0, 0, false
	}
	m.held.Add(1)
	p := m.pieces[offset/m.unit]
	return p.Device, p.Offset + offset%m.unit, min(m.unit-offset%m.unit, length), true
}

func (m *mosaic) Release(block.Queue) {
	if m.held.Add(-1) < 0 {
		m.t.Error("released more often than held")
	}
}

// methodBytes is what was copied by one method, for all classes.
func methodBytes(s Stats, name string) (bytes uint64) {
	for _, m := range s.Methods {
		if m.Method == name {
			bytes += m.Bytes
		}
	}
	return bytes
}

func fallbacks(s Stats, name string) uint64 {
	for _, f := range s.Fallbacks {
		if f.Reason == name {
			return f.Count
		}
	}
	return 0
}

// forLanes is forEngines, and once more for a serialised engine that offloads in its worker.
func forLanes(t *testing.T, c Config, test func(t *testing.T, e testEngine)) {
	c.OffloadThreshold = 64 << 10 // what is learnt depends on the machine
	forEngines(t, c, test)
	t.Run("worker", func(t *testing.T) {
		c := c
		c.OffloadInWorker = true
		e := NewSerialised(c)
		test(t, e)
		closeClean(t, e)
	})
}

// TestOffload copies ranges of all alignments and policies, and checks the bytes and by what they were copied.
func TestOffload(t *testing.T) {
	const size = 1<<20 + 700
	tests := []struct {
		name             string
		from, to, length int64
		offload          Offload
		flags            Flags
		cloned           int64
		err              string
	}{
		{"all", 0, 0, 1 << 20, OffloadAuto, 0, 1 << 20, ""},
		{"to the end", 0, 0, size, OffloadAuto, 0, size, ""},
		{"head and tail", 1000, 1000, 200000, OffloadAuto, 0, 196608, ""},
		{"nearly to the end", 4096, 4096, size - 4096 - 1, OffloadAuto, 0, 1<<20 - 4096, ""},
		{"shifted", 0, 512, 1 << 20, OffloadAuto, 0, 0, ""},
		{"shifted by the granularity", 0, 4096, 1<<20 - 4096, OffloadAuto, 0, 1<<20 - 4096, ""},
		{"small", 0, 0, 8192, OffloadAuto, 0, 0, ""},
		{"below the first threshold", 0, 0, 32 << 10, OffloadAuto, 0, 0, ""},
		{"off", 0, 0, 1 << 20, OffloadOff, 0, 0, ""},
		{"small, insisted", 0, 0, 8192, OffloadOnly, 0, 8192, ""},
		{"small clone", 4096, 8192, 4096, CloneOnly, 0, 4096, ""},
		{"misaligned, insisted", 512, 512, 8192, OffloadOnly, 0, 0, "not aligned"},
		{"shifted, insisted", 0, 512, 8192, CloneOnly, 0, 0, "clone of 8192 bytes"},
		{"tail, insisted", 0, 0, 8192 + 512, CloneOnly, 0, 8192, "from offset 8192"},
		{"in sequence", 0, 0, 1 << 20, OffloadAuto, WriteSequentially, 0, ""},
		{"ignoring errors, insisted", 0, 0, 1 << 20, OffloadOnly, IgnoreErrors, 0, "ignore errors"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			forLanes(t, Config{}, func(t *testing.T, e testEngine) {
				from, to := newLeaf(t, "a", size), newLeaf(t, "b", size, cloneOffer(4096))
				fill(from.data, rand.New(rand.NewPCG(1, 1)))
				blank(to.data)
				j := &Job{From: Region{from, test.from}, To: []Region{{to, test.to}}, Length: test.length,
					Offload: test.offload, Flags: test.flags, Class: Bulk}
				run(e, j)
				s := e.Stats()
				if got := methodBytes(s, "clone"); got != uint64(test.cloned) {
					t.Errorf("%d bytes were cloned, want %d: %+v", got, test.cloned, s.Fallbacks)
				}
				if test.err != "" {
					if !errors.Is(j.WriteErr, syscall.ENOTSUP) || !strings.Contains(j.WriteErr.Error(), test.err) || j.WriteBad != 1 {
						t.Errorf("error %v, bad %b, want %q", j.WriteErr, j.WriteBad, test.err)
					}
					return
				}
				if j.Err() != nil || !bytes.Equal(to.data[test.to:][:test.length], from.data[test.from:][:test.length]) {
					t.Errorf("error %v, or wrong bytes", j.Err())
				}
				if !all(to.data[:test.to], sentinel) || !all(to.data[test.to+test.length:], sentinel) {
					t.Error("wrote outside")
				}
				if s.BytesWritten != uint64(test.length) || s.BytesRead != uint64(test.length-test.cloned) {
					t.Errorf("%d bytes read, %d written", s.BytesRead, s.BytesWritten)
				}
			})
		})
	}
}

// TestOffloadFaults: absence falls back and is remembered, short copies go on, errors of I/O surface.
func TestOffloadFaults(t *testing.T) {
	const length = 3 << 20
	offers := []block.CopyOffer{cloneOffer(4096),
		{Method: block.CopyDevice, Granularity: 512, LengthMax: 1 << 20, Concurrency: 4}}
	tests := []struct {
		name          string
		fault         func(m block.CopyMethod, from, to, length int64) (int64, error)
		clone, device int64 // bytes
		calls         int   // of two jobs
		reason        string
		err           error
	}{
		{"absent", func(block.CopyMethod, int64, int64, int64) (int64, error) { return 0, syscall.ENOTSUP },
			0, 0, 2, "absent", nil},
		{"clone absent", func(m block.CopyMethod, _, _, n int64) (int64, error) {
			if m == block.CopyClone {
				return 0, &block.Error{Errno: syscall.ENOTSUP}
			}
			return n, nil
		}, 0, 2 * length, 7, "absent", nil},
		{"absent in the middle", func(m block.CopyMethod, _, _, n int64) (int64, error) {
			if m == block.CopyClone {
				return 1 << 20, syscall.ENOTSUP
			}
			return n, nil
		}, 1 << 20, 2*length - 1<<20, 6, "absent", nil},
		{"stuck", func(m block.CopyMethod, _, _, n int64) (int64, error) { return 0, nil }, 0, 0, 12, "no-progress", nil},
		{"short", func(m block.CopyMethod, _, _, n int64) (int64, error) { return min(n, 1<<20+100), nil },
			2 * length, 0, 6, "", nil},
		{"too short", func(m block.CopyMethod, _, _, n int64) (int64, error) { return min(n, 500), nil },
			0, 0, 12, "no-progress", nil},
		{"more than asked", func(m block.CopyMethod, _, _, n int64) (int64, error) { return n, nil }, 2 * length, 0, 2, "", nil},
		{"I/O error", func(block.CopyMethod, int64, int64, int64) (int64, error) { return 4096, syscall.EIO },
			0, 0, 2, "", syscall.EIO},
		{"no space", func(block.CopyMethod, int64, int64, int64) (int64, error) { return 0, syscall.ENOSPC },
			0, 0, 2, "", syscall.ENOSPC},
		{"unknown error", func(block.CopyMethod, int64, int64, int64) (int64, error) { return 0, errInjected },
			0, 0, 2, "", errInjected},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			forLanes(t, Config{}, func(t *testing.T, e testEngine) {
				from, to := newLeaf(t, "a", length), newLeaf(t, "b", length, offers...)
				fill(from.data, rand.New(rand.NewPCG(1, 1)))
				to.fault = test.fault
				for range 2 {
					blank(to.data)
					j := &Job{From: Region{from, 0}, To: []Region{{to, 0}}, Length: length}
					run(e, j)
					if !errors.Is(j.WriteErr, test.err) || (j.WriteErr != nil) != (j.WriteBad == 1) || j.ReadErr != nil {
						t.Fatalf("errors %v, %v, bad %b, want %v", j.ReadErr, j.WriteErr, j.WriteBad, test.err)
					}
					if test.err == nil && !bytes.Equal(from.data, to.data) {
						t.Fatal("wrong bytes")
					}
				}
				s := e.Stats()
				if c, d := methodBytes(s, "clone"), methodBytes(s, "device"); c != uint64(test.clone) || d != uint64(test.device) {
					t.Errorf("%d bytes cloned, %d by the device, want %d and %d", c, d, test.clone, test.device)
				}
				if n := to.callCount(); n != test.calls {
					t.Errorf("%d calls, want %d", n, test.calls)
				}
				if test.reason != "" && fallbacks(s, test.reason) == 0 {
					t.Errorf("reason %q is not among %+v", test.reason, s.Fallbacks)
				}
				if to.asked.Load() != 1 {
					t.Errorf("offers were asked for %d times", to.asked.Load())
				}
			})
		})
	}
}

// TestOffloadStuck: where one range makes no progress, what lies around it is cloned all the same, and a job that insists
// fails.
func TestOffloadStuck(t *testing.T) {
	forLanes(t, Config{}, func(t *testing.T, e testEngine) {
		length, hole := int64(32<<20), int64(20<<20)
		if invariant.Enabled {
			length, hole = 12<<20, 7<<20
		}
		from, to := newLeaf(t, "a", length), newLeaf(t, "b", length, cloneOffer(4096))
		fill(from.data, rand.New(rand.NewPCG(1, 1)))
		to.fault = func(_ block.CopyMethod, _, at, n int64) (int64, error) {
			if at <= hole {
				return min(n, hole-at), nil // short in front of it, and 0 there
			}
			return n, nil
		}
		for range 2 * stuckMost {
			run(e, &Job{From: Region{from, hole}, To: []Region{{to, hole}}, Length: SubJobSize})
			j := &Job{From: Region{from, 0}, To: []Region{{to, 0}}, Length: length}
			if run(e, j); j.Err() != nil || !bytes.Equal(from.data, to.data) {
				t.Fatalf("error %v, or wrong bytes", j.Err())
			}
		}
		s := e.Stats()
		if n := methodBytes(s, "clone"); n < 2*stuckMost*uint64(length-SubJobSize) || s.Routes[0].Absent != "" {
			t.Errorf("%d bytes cloned, routes %+v", n, s.Routes)
		}
		if n := fallbacks(s, "no-progress"); n < 2*stuckMost {
			t.Errorf("%d fallbacks", n)
		}
		j := &Job{From: Region{from, hole}, To: []Region{{to, hole}}, Length: SubJobSize, Offload: CloneOnly}
		if run(e, j); !errors.Is(j.WriteErr, syscall.ENOTSUP) || !strings.Contains(j.WriteErr.Error(), "no progress") {
			t.Errorf("a clone of what makes no progress: %v", j.Err())
		}
	})
}

// TestOffloadAgain: a method that was absent is asked for again after a while, by one job, and used when it is there.
func TestOffloadAgain(t *testing.T) {
	for _, stuck := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			e := NewScaled(Config{})
			from, to := newLeaf(t, "a", 1<<20), newLeaf(t, "b", 1<<20, cloneOffer(4096))
			gone := true
			to.fault = func(_ block.CopyMethod, _, _, n int64) (int64, error) {
				switch {
				case gone && stuck:
					return 0, nil
				case gone:
					return 0, syscall.ENOTSUP
				}
				return n, nil
			}
			copies := func(n int) (calls int) {
				before := to.callCount()
				for range n {
					j := &Job{From: Region{from, 0}, To: []Region{{to, 0}}, Length: 256 << 10}
					if run(e, j); j.Err() != nil {
						t.Fatal(j.Err())
					}
				}
				return to.callCount() - before
			}
			first := 1
			if stuck {
				first = stuckMost
			}
			if n := copies(20); n != first {
				t.Errorf("%d calls, want %d", n, first)
			}
			time.Sleep(absentFor - 1)
			if n := copies(3); n != 0 {
				t.Errorf("%d calls before the time is over", n)
			}
			time.Sleep(time.Nanosecond)
			if n := copies(3); n != 1 {
				t.Errorf("%d calls after it, want 1", n)
			}
			gone = false
			time.Sleep(absentFor)
			if n := copies(5); n != 5 || e.Stats().Routes[0].Absent != "" {
				t.Errorf("%d calls, want 5; routes %+v", n, e.Stats().Routes)
			}
			if err := e.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestOffloadLayers copies through layers that cut and mix devices, of which some can be cloned and some not, and
// through one that is suspended.
func TestOffloadLayers(t *testing.T) {
	forLanes(t, Config{}, func(t *testing.T, e testEngine) {
		const unit = 256 << 10
		a, b := newLeaf(t, "a", 4<<20), newLeaf(t, "b", 4<<20, cloneOffer(4096))
		c := newRAM(t, 4<<20)
		fill(a.data, rand.New(rand.NewPCG(1, 1)))
		source := &mosaic{t: t, unit: unit}
		for i := range 8 {
			source.pieces = append(source.pieces, Region{a, int64(7-i) * unit})
		}
		low := &mosaic{t: t, unit: unit}
		for i := range 8 {
			low.pieces = append(low.pieces, Region{b, int64(i) * unit})
		}
		high := &mosaic{t: t, unit: unit * 2, pieces: []Region{{low, unit}, {c, 0}, {low, 4 * unit}}}
		j := &Job{From: Region{source, 4096}, To: []Region{{high, 4096}}, Length: 6*unit - 8192}
		run(e, j)
		if j.Err() != nil {
			t.Fatal(j.Err())
		}
		want, have := make([]byte, j.Length), make([]byte, j.Length)
		if err := errors.Join(block.Read(source, want, 4096), block.Read(high, have, 4096)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(want, have) {
			t.Error("wrong bytes")
		}
		s := e.Stats()
		if n := methodBytes(s, "clone"); n != 4*unit-8192 {
			t.Errorf("%d bytes were cloned: %+v", n, s)
		}
		if fallbacks(s, "no-method") == 0 {
			t.Errorf("fallbacks %+v", s.Fallbacks)
		}
		high.suspended.Store(true)
		run(e, j)
		if j.Err() != nil || fallbacks(e.Stats(), "layer") == 0 {
			t.Errorf("suspended: %v, %+v", j.Err(), e.Stats().Fallbacks)
		}
		if source.held.Load()+low.held.Load()+high.held.Load() != 0 {
			t.Error("a layer is held")
		}
	})
}

// TestLaneBounded: never more calls at a time than the device gains from, and all of them where there is enough to do.
func TestLaneBounded(t *testing.T) {
	forEngines(t, Config{OffloadThreshold: 1}, func(t *testing.T, e testEngine) {
		offer := cloneOffer(4096)
		offer.Concurrency = 3
		from, to := newLeaf(t, "a", 16<<20), newLeaf(t, "b", 16<<20, offer)
		gate := make(chan struct{})
		to.fault = func(_ block.CopyMethod, _, _, n int64) (int64, error) {
			<-gate
			return n, nil
		}
		const count = 40
		var wg sync.WaitGroup
		jobs := make([]Job, count)
		for i := range jobs {
			jobs[i] = Job{From: Region{from, int64(i) << 18}, To: []Region{{to, int64(i) << 18}}, Length: 1 << 18,
				Queue: block.Queue(i), Done: func(*Job) { wg.Done() }}
			wg.Add(1)
			e.Submit(&jobs[i]) // does not block
		}
		waitUntil(func() bool { return to.callCount() == 3 })
		waitUntil(func() bool { return e.Stats().Routes[0].Waiting == count-3 })
		close(gate)
		wg.Wait()
		to.mu.Lock()
		defer to.mu.Unlock()
		if to.runningMost != 3 {
			t.Errorf("%d calls at a time, want 3", to.runningMost)
		}
	})
}

// TestLaneUrgent: what a request waits for goes before work in the background.
func TestLaneUrgent(t *testing.T) {
	forEngines(t, Config{}, func(t *testing.T, e testEngine) {
		from, to := newLeaf(t, "a", 1<<20), newLeaf(t, "b", 1<<20, cloneOffer(4096))
		gate := make(chan struct{})
		to.fault = func(_ block.CopyMethod, _, _, n int64) (int64, error) {
			<-gate
			return n, nil
		}
		var mu sync.Mutex
		var order []Class
		var wg sync.WaitGroup
		submit := func(class Class) {
			wg.Add(1)
			e.Submit(&Job{From: Region{from, 0}, To: []Region{{to, 0}}, Length: 1 << 18, Class: class, Offload: CloneOnly,
				Done: func(*Job) {
					mu.Lock()
					order = append(order, class)
					mu.Unlock()
					wg.Done()
				}})
		}
		submit(Bulk)
		waitUntil(func() bool { return to.callCount() == 1 })
		submit(Hydration)
		waitUntil(func() bool { return e.Stats().Routes[0].Waiting == 1 })
		submit(CopyOnWrite)
		waitUntil(func() bool { return e.Stats().Routes[0].Waiting == 2 })
		for range 3 {
			mu.Lock()
			n := len(order)
			mu.Unlock()
			gate <- struct{}{}
			waitUntil(func() bool { mu.Lock(); defer mu.Unlock(); return len(order) > n })
		}
		wg.Wait()
		if fmt.Sprint(order) != "[bulk cow hydration]" {
			t.Errorf("order %v", order)
		}
	})
}

// TestPairs: the engine forgets devices when it is told to, and the oldest when there are too many.
func TestPairs(t *testing.T) {
	e := NewScaled(Config{})
	from := newLeaf(t, "a", 1<<16)
	var to []*leaf
	for i := range pairsMax + 10 {
		to = append(to, newLeaf(t, fmt.Sprint(i), 1<<16, cloneOffer(4096)))
		run(e, &Job{From: Region{from, 0}, To: []Region{{to[i], 0}}, Length: 1 << 16})
	}
	if s := e.Stats(); len(s.Routes) != pairsMax || s.Routes[0].Destination != "10" || s.Routes[0].Source != "a" {
		t.Errorf("%d routes, first %+v", len(s.Routes), s.Routes[0])
	}
	e.Forget(to[20])
	if n := len(e.Stats().Routes); n != pairsMax-1 {
		t.Errorf("%d routes", n)
	}
	e.Forget(from)
	if n := len(e.Stats().Routes); n != 0 {
		t.Errorf("%d routes", n)
	}
	e.pairs.mu.Lock()
	if len(e.pairs.lanes) != 0 {
		t.Errorf("%d lanes", len(e.pairs.lanes))
	}
	e.pairs.mu.Unlock()
	closeClean(t, e)
}

// TestOffloadAllocations: nothing is allocated for a job in the steady state, whichever way it goes.
func TestOffloadAllocations(t *testing.T) {
	if invariant.Enabled {
		t.Skip("under the race detector pools drop some of what they are given")
	}
	for _, length := range []int64{4096, 32 << 10, 256 << 10, 2 << 20} {
		e := NewScaled(Config{})
		from, to := newLeaf(t, "a", 4<<20), newLeaf(t, "b", 4<<20, cloneOffer(4096))
		done := make(chan struct{}, 1)
		j := &Job{From: Region{from, 0}, To: []Region{{to, 0}}, Length: length, Done: func(*Job) { done <- struct{}{} }}
		n := testing.AllocsPerRun(500, func() {
			e.Submit(j)
			<-done
		})
		if n >= 1 {
			t.Errorf("%d bytes: %v allocations a job", length, n)
		}
		closeClean(t, e)
	}
}

// TestForgetRecent: what a shard remembers of the last pair of devices is worth no more than what the engine does.
func TestForgetRecent(t *testing.T) {
	e := NewScaled(Config{})
	from, to, other := newLeaf(t, "a", 1<<20), newLeaf(t, "b", 1<<20), newLeaf(t, "c", 1<<20, cloneOffer(4096))
	copyTo := func(d block.Device) {
		t.Helper()
		j := &Job{From: Region{from, 0}, To: []Region{{d, 0}}, Length: 256 << 10}
		if run(e, j); j.Err() != nil {
			t.Fatal(j.Err())
		}
	}
	for range 3 {
		copyTo(to)
	}
	copyTo(other)
	copyTo(to)
	if s := e.Stats(); len(s.Fallbacks) != 1 || s.Fallbacks[0] != (FallbackStats{"no-method", 4}) {
		t.Errorf("fallbacks %+v, want 4 for want of a method", s.Fallbacks)
	}
	to.offers = other.offers
	e.Forget(to)
	copyTo(to)
	if to.asked.Load() != 2 || to.callCount() != 1 || other.callCount() != 1 {
		t.Errorf("asked %d times, %d and %d calls", to.asked.Load(), to.callCount(), other.callCount())
	}
	e.Forget(from)
	for i := range e.pool.shards.Len() {
		if p := e.pool.shards.Index(i).recent.Load(); p != nil {
			t.Errorf("shard %d remembers %v", i, p.target)
		}
	}
	closeClean(t, e)
}
