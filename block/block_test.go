package block

import (
	"errors"
	"fmt"
	"math"
	"sync"
	"syscall"
	"testing"
)

// log is a Completer that notes its name.
type log struct {
	name string
	to   *[]string
	pass bool
}

func (l log) Complete(r *Request, err error) {
	*l.to = append(*l.to, fmt.Sprint(l.name, ":", err))
	if l.pass {
		r.Complete(err)
	}
}

func TestCompletersAreToldInReverseOrder(t *testing.T) {
	var r Request
	var told []string
	r.Push(log{"submitter", &told, false})
	r.Push(log{"upper", &told, true})
	r.Push(log{"lower", &told, true})
	r.Complete(syscall.EIO)
	want := fmt.Sprint([]string{"lower:input/output error", "upper:input/output error", "submitter:input/output error"})
	if fmt.Sprint(told) != want {
		t.Errorf("told %v, want %v", told, want)
	}
	defer func() {
		if recover() == nil {
			t.Error("a second completion did not panic")
		}
	}()
	r.Complete(nil)
}

func TestResetOfARequestInFlightPanics(t *testing.T) {
	var r Request
	r.Push(log{})
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	r.Reset()
}

func TestRequestDoesNotAllocate(t *testing.T) {
	var r Request
	c := &nothing{}
	allocs := testing.AllocsPerRun(100, func() {
		r.Op, r.Length = OpDiscard, 4096
		for range 4 {
			r.Push(c)
		}
		for range 4 {
			r.Complete(nil)
		}
		r.Reset()
	})
	if allocs != 0 {
		t.Errorf("%v allocations for each request", allocs)
	}
}

type nothing struct{}

func (*nothing) Complete(*Request, error) {}

func TestList(t *testing.T) {
	var l List
	reqs := make([]Request, 3)
	for i := range reqs {
		l.PushBack(&reqs[i])
	}
	taken := l.Take()
	if l.Len() != 0 || l.PopFront() != nil || taken.Len() != 3 {
		t.Fatalf("after Take: %d left, %d taken", l.Len(), taken.Len())
	}
	for i := range reqs {
		if got := taken.PopFront(); got != &reqs[i] {
			t.Errorf("element %d is another request", i)
		}
	}
	if taken.PopFront() != nil {
		t.Error("an empty list gave a request")
	}
}

// counter is a Waker that counts.
type counter struct {
	mu    sync.Mutex
	woken map[*Request]int
}

func (c *counter) Wake(r *Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.woken[r]++
}

func TestWaitListLosesNobody(t *testing.T) {
	const goroutines, each = 8, 1000
	var w WaitList
	c := &counter{woken: map[*Request]int{}}
	var wg sync.WaitGroup
	for range goroutines {
		wg.Go(func() {
			reqs := make([]Request, each)
			for i := range reqs {
				w.Add(&reqs[i], c)
				if i%7 == 0 {
					wakeAll(w.Take())
				}
			}
		})
	}
	wg.Wait()
	wakeAll(w.Take())
	if len(c.woken) != goroutines*each {
		t.Errorf("%d requests woken, want %d", len(c.woken), goroutines*each)
	}
	for _, n := range c.woken {
		if n != 1 {
			t.Fatalf("a request was woken %d times", n)
		}
	}
}

func wakeAll(l List) {
	for r := l.PopFront(); r != nil; r = l.PopFront() {
		r.Wake()
	}
}

func TestWaitListKeepsOrder(t *testing.T) {
	var w WaitList
	c := &counter{woken: map[*Request]int{}}
	reqs := make([]Request, 5)
	for i := range reqs {
		w.Add(&reqs[i], c)
	}
	l := w.Take()
	for i := range reqs {
		if l.PopFront() != &reqs[i] {
			t.Errorf("element %d is another request", i)
		}
	}
}

func TestCheckRange(t *testing.T) {
	limits := NoLimits()
	limits.LogicalBlock = 512
	readOnly, poor := limits, limits
	readOnly.ReadOnly = true
	poor.DiscardMax, poor.WriteZeroesMax = 0, 1024
	const size = 1 << 20
	for _, c := range []struct {
		name   string
		r      Request
		limits Limits
		want   syscall.Errno
	}{
		{"read", Request{Op: OpRead, Length: 512, Data: make([]byte, 512)}, limits, 0},
		{"zero length", Request{Op: OpWrite, Offset: 512}, limits, 0},
		{"at the end", Request{Op: OpDiscard, Offset: size - 512, Length: 512}, limits, 0},
		{"flush ignores the range", Request{Op: OpFlush, Offset: -1, Length: 7}, readOnly, 0},
		{"read behind the end", Request{Op: OpRead, Offset: size, Length: 512, Data: make([]byte, 512)}, limits, syscall.EIO},
		{"write behind the end", Request{Op: OpDiscard, Offset: size - 512, Length: 1024}, limits, syscall.ENOSPC},
		{"negative offset", Request{Op: OpDiscard, Offset: -512, Length: 512}, limits, syscall.EINVAL},
		{"negative length", Request{Op: OpDiscard, Offset: 512, Length: -512}, limits, syscall.EINVAL},
		{"overflow", Request{Op: OpDiscard, Offset: math.MaxInt64 - 511, Length: 1024}, limits, syscall.EINVAL},
		{"misaligned offset", Request{Op: OpDiscard, Offset: 1, Length: 512}, limits, syscall.EINVAL},
		{"misaligned length", Request{Op: OpDiscard, Length: 513}, limits, syscall.EINVAL},
		{"short buffer", Request{Op: OpRead, Length: 1024, Data: make([]byte, 512)}, limits, syscall.EINVAL},
		{"unknown operation", Request{Op: opCount}, limits, syscall.EINVAL},
		{"read-only", Request{Op: OpWriteZeroes, Length: 512}, readOnly, syscall.EROFS},
		{"no discard", Request{Op: OpDiscard, Length: 512}, poor, syscall.ENOTSUP},
		{"too many zeroes", Request{Op: OpWriteZeroes, Length: 1536}, poor, syscall.EINVAL},
		{"as many zeroes as may be", Request{Op: OpWriteZeroes, Length: 1024}, poor, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := Errno(CheckRange(&c.r, size, c.limits)); got != c.want {
				t.Errorf("errno %v, want %v", got, c.want)
			}
		})
	}
}

func TestErrors(t *testing.T) {
	r := &Request{Op: OpWrite, Offset: 4096, Length: 512}
	for _, c := range []struct {
		err  error
		want string
		is   syscall.Errno
	}{
		{NewError(r, syscall.EROFS, "the device is read-only"),
			"write of 512 bytes at offset 4096: the device is read-only (read-only file system)", syscall.EROFS},
		{WrapError(r, fmt.Errorf("disk.img: %w", syscall.ENOSPC)),
			"write of 512 bytes at offset 4096: disk.img: no space left on device", syscall.ENOSPC},
		{WrapError(&Request{Op: OpFlush}, errors.New("gone")), "flush: gone (input/output error)", syscall.EIO},
		{fmt.Errorf("outer: %w", WrapError(r, syscall.EPERM)),
			"outer: write of 512 bytes at offset 4096: operation not permitted", syscall.EPERM},
	} {
		if c.err.Error() != c.want {
			t.Errorf("message %q, want %q", c.err, c.want)
		}
		if !errors.Is(c.err, c.is) || Errno(c.err) != c.is {
			t.Errorf("%v: errno %v, want %v", c.err, Errno(c.err), c.is)
		}
	}
	if Errno(nil) != 0 {
		t.Error("no error has an errno")
	}
}

func TestLimitsStack(t *testing.T) {
	top := NoLimits()
	below := Limits{LogicalBlock: 512, PreferredIO: 65536, DiscardMax: 1 << 20, DiscardGranularity: 4096,
		ReadOnly: true, NeedsFlush: true}
	if got := top.Stack(below); got != below {
		t.Errorf("no limits over %+v give %+v", below, got)
	}
	if got := below.Stack(top); got != below {
		t.Errorf("%+v over no limits give %+v", below, got)
	}
}

func TestSectors(t *testing.T) {
	if SectorFloor(1023) != 1 || SectorCeil(1023) != 2 || SectorCeil(1024) != 2 || Sector(3).Bytes() != 1536 {
		t.Error("sectors are rounded wrongly")
	}
}
