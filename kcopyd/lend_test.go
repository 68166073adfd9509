package kcopyd

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cowherd/backend/mem"
	"cowherd/block"
)

// lender is a ram that shows its bytes, a page at a time.
type lender struct {
	*ram
	page  int64
	loans atomic.Int64
}

func (l *lender) Lend(offset, length int64) []byte {
	if offset < 0 || length <= 0 || offset > l.Size()-length {
		return nil
	}
	l.loans.Add(1)
	n := min(length, l.page-offset%l.page)
	return l.data[offset : offset+n : offset+n]
}

// TestLend copies from a device that lends: all bytes, no buffers, whatever the flags, and up to where an error is.
func TestLend(t *testing.T) {
	const size = 4 << 20
	rng := rand.New(rand.NewPCG(1, 1))
	from := &lender{ram: newRAM(t, size), page: 64 << 10}
	fill(from.data, rng)
	for _, kind := range []string{"sync", "async"} {
		for _, bad := range []int64{-1, 0, 100 << 10, 2 << 20} {
			for flags := range Flags(4) {
				name := fmt.Sprintf("%s/bad=%d/flags=%d", kind, bad, flags)
				t.Run(name, func(t *testing.T) {
					forEngines(t, Config{}, func(t *testing.T, e testEngine) {
						to, other := newRAM(t, size), newRAM(t, size)
						target := failing(to, func(r *block.Request) bool { return r.Offset <= bad && bad < r.End() })
						if kind == "async" {
							target = newAsync(t, target, 2, 1)
						}
						for _, length := range []int64{1, 4096, 64 << 10, 64<<10 + 1, SubJobSize, SubJobSize + 1, 3 << 20} {
							testLoan(t, e, from, to, other, target, length, flags, bad)
						}
						if s := e.Stats(); flags&WriteSequentially == 0 && (s.BufferWaits != 0 || poolSize(e) != 0) {
							t.Errorf("buffers of %d bytes were made", poolSize(e))
						}
					})
				})
			}
		}
	}
}

func testLoan(t *testing.T, e testEngine, from *lender, to, other *ram, target block.Device, length int64, flags Flags, bad int64) {
	blank(to.data)
	blank(other.data)
	at := 5000 % (from.Size() - length)
	j := &Job{From: Region{from, at}, To: []Region{{target, 0}, {other, 0}}, Length: length, Flags: flags}
	run(e, j)
	want := from.data[at : at+length]
	failed := bad >= 0 && bad < length
	switch {
	case failed != errors.Is(j.WriteErr, errInjected) || failed != (j.WriteBad&1 != 0):
		t.Errorf("%d bytes: error %v, bad %b", length, j.WriteErr, j.WriteBad)
	case !failed && !bytes.Equal(to.data[:length], want):
		t.Errorf("%d bytes: wrong bytes", length)
	case (j.WriteBad&2 == 0) != bytes.Equal(other.data[:length], want):
		t.Errorf("%d bytes: bad %b, but the other destination does not agree", length, j.WriteBad)
	case flags == IgnoreErrors && j.WriteBad&2 != 0:
		t.Errorf("%d bytes: an ignored error stopped the other destination", length)
	}
	if !all(other.data[length:], sentinel) || !all(to.data[length:], sentinel) {
		t.Error("wrote outside")
	}
}

// poolSize is what an engine's buffers take, those in use included.
func poolSize(e testEngine) int64 {
	p := poolOf(e)
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ceiling - p.room
}

// TestLendOutside: a range that is not within the device is an error of the source, whatever the flags.
func TestLendOutside(t *testing.T) {
	forEngines(t, Config{}, func(t *testing.T, e testEngine) {
		from := &lender{ram: newRAM(t, 1<<20), page: 4096}
		for _, flags := range []Flags{0, IgnoreErrors} {
			for _, length := range []int64{4096, 1 << 20} {
				j := &Job{From: Region{from, 1 << 20}, To: []Region{{null{}, 0}}, Length: length, Flags: flags}
				run(e, j)
				if !errors.Is(j.ReadErr, syscall.EIO) || j.WriteBad != 1 {
					t.Errorf("%d bytes, flags %d: %v, bad %b", length, flags, j.ReadErr, j.WriteBad)
				}
			}
		}
	})
}

// BenchmarkHydration compares a stream of 1 MiB jobs from two queues between devices in memory with copying the same
// bytes between the same pages, in turn for 16 MiB each, so that who else uses the machine harms both. Both devices are
// larger than any cache. An operation is one turn; what counts is lent/memcpy, the median of the ratios of neighbours.
func BenchmarkHydration(b *testing.B) {
	const job, turn = 1 << 20, 16 << 20
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), 2)))
	source, target := benchDevice(b, "mem").(*mem.Device), benchDevice(b, "mem").(*mem.Device)
	memcpy := func(_ int, at int64) {
		for done := int64(0); done < job; { // page by page, as the device has it
			from := source.Lend(at+done, job-done)
			copy(target.Lend(at+done, job-done), from)
			done += int64(len(from))
		}
	}
	e := NewScaled(Config{})
	var jobs [2]Job
	var ended [2]chan struct{}
	for g := range jobs {
		ended[g] = make(chan struct{}, 1)
		jobs[g] = Job{Class: Hydration, Queue: block.Queue(g), To: make([]Region, 1), Length: job,
			Done: func(*Job) { ended[g] <- struct{}{} }}
	}
	from := func(d block.Device) func(int, int64) {
		return func(g int, at int64) {
			j := &jobs[g]
			j.From, j.To[0] = Region{d, at}, Region{target, at}
			e.Submit(j)
			<-ended[g]
		}
	}
	ways := []func(int, int64){memcpy, from(source), from(struct{ block.Device }{source})}
	var rates [3][]float64 // MB/s
	for i := range b.N {
		for w, copyOne := range ways {
			start := time.Now()
			var both sync.WaitGroup
			for g := range jobs {
				both.Go(func() {
					for at := int64(g) * job; at < turn; at += 2 * job {
						copyOne(g, (int64(i)*turn+at)%benchSize)
					}
				})
			}
			both.Wait()
			rates[w] = append(rates[w], turn/time.Since(start).Seconds()/1e6)
		}
	}
	closeBench(b, e)
	for w, name := range []string{"memcpy", "lent", "buffered"} {
		ratios := slices.Clone(rates[w])
		for i := range ratios {
			ratios[i] /= rates[0][i]
		}
		slices.Sort(ratios)
		slices.Sort(rates[w])
		b.ReportMetric(rates[w][b.N/2], name+"-MB/s")
		b.ReportMetric(slices.Max(rates[w]), name+"-most-MB/s")
		if w > 0 {
			b.ReportMetric(ratios[b.N/2], name+"/memcpy")
		}
	}
}

func closeBench(b *testing.B, e Engine) {
	if err := e.Close(); err != nil {
		b.Fatal(err)
	}
}
