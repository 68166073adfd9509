package trace

import (
	"errors"
	"sync"
	"testing"
	"time"

	"cowherd/block"
	"cowherd/internal/invariant"
	"cowherd/kcopyd"
)

// lives drains t.
func lives(a *Analyzer) (all []Life) {
	a.Poll(func(l *Life) { all = append(all, *l) })
	return all
}

func TestLife(t *testing.T) {
	tests := []struct {
		name    string
		stages  []block.Stage
		hasHeld bool
		hasWait bool
		hasDev  bool
	}{
		{"mapped at once", []block.Stage{block.StageIssued}, false, false, true},
		{"held", []block.Stage{block.StageHeld, block.StageAdmitted, block.StageIssued}, true, false, true},
		{"copied", []block.Stage{block.StageWaiting, block.StageIssued}, false, true, true},
		{"copied twice", []block.Stage{block.StageWaiting, block.StageWaiting, block.StageIssued}, false, true, true},
		{"issued to a device that copies", []block.Stage{block.StageIssued, block.StageWaiting, block.StageIssued}, false, true, true},
		{"never issued", []block.Stage{block.StageWaiting}, false, true, false},
		{"dropped", nil, false, false, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			tracer := New()
			a := NewAnalyzer(tracer)
			r := block.Request{Op: block.OpWrite, Queue: 3, Offset: 4096, Length: 512, Data: make([]byte, 512)}
			tracer.Begin(&r)
			for _, s := range test.stages {
				time.Sleep(time.Millisecond)
				r.Mark(s)
			}
			time.Sleep(time.Millisecond)
			r.Offset = 1 << 40 // it was mapped
			tracer.End(&r, nil)
			if r.Span() != (block.Span{}) {
				t.Error("the request still carries a span")
			}
			all := lives(a)
			if len(all) != 1 {
				t.Fatalf("%d lives, want 1", len(all))
			}
			l := all[0]
			if l.Op != "write" || l.Offset != 4096 || l.Length != 512 || l.Queue != 3 || l.Failed {
				t.Errorf("life %+v", l)
			}
			if got := l.Held + l.Map + l.Wait + l.Device; got != l.Total {
				t.Errorf("parts add up to %v of %v", got, l.Total)
			}
			for _, x := range []struct {
				part string
				got  time.Duration
				want bool
			}{{"held", l.Held, test.hasHeld}, {"wait", l.Wait, test.hasWait}, {"device", l.Device, test.hasDev}} {
				if (x.got >= time.Millisecond) != x.want {
					t.Errorf("%s took %v, want any: %v", x.part, x.got, x.want)
				}
			}
			if (l.CPU >= 0) != test.hasDev {
				t.Errorf("issued on CPU %d", l.CPU)
			}
			if s := a.Summary(); len(s.Flows) != 1 || s.Flows[0].Count != 1 || s.Queues[3].Requests != 1 || s.Broken+s.Dropped != 0 {
				t.Errorf("summary %+v", s)
			}
		})
	}
}

func TestCopies(t *testing.T) {
	tracer := New()
	a := NewAnalyzer(tracer)
	j := kcopyd.Job{Length: 65536, Queue: 1, Class: kcopyd.Hydration, To: []kcopyd.Region{{Offset: 1 << 20}}}
	w := tracer.CopyBegan(&j)
	j.WriteErr = errors.New("planted")
	tracer.CopyEnded(&j, w)
	all := lives(a)
	if len(all) != 1 || all[0].Op != "copy" || all[0].Class != "hydration" || all[0].Offset != 1<<20 || !all[0].Failed || all[0].CPU < 0 {
		t.Fatalf("lives %+v", all)
	}
	s := a.Summary()
	if f := s.Flows[0]; f.Failed != 1 || f.Bytes != 65536 || s.Queues[1].Copies != 1 || s.Queues[1].Requests != 0 {
		t.Errorf("flow %+v, queues %+v", f, s.Queues)
	}
}

// TestFull: nobody reads; records are dropped, and a reader who comes late still makes sense of the rest.
func TestFull(t *testing.T) {
	tracer := New()
	a := NewAnalyzer(tracer)
	for range ringSize {
		r := block.Request{Op: block.OpRead}
		tracer.Begin(&r)
		r.Mark(block.StageIssued)
		tracer.End(&r, nil)
	}
	all := lives(a)
	if want := ringSize / 3; len(all) != want {
		t.Errorf("%d lives, want %d", len(all), want)
	}
	if got, want := tracer.Dropped(), uint64(2*ringSize); got != want {
		t.Errorf("%d records were dropped, want %d", got, want)
	}
	// The one that was cut off by the end of the ring is not taken for another.
	r := block.Request{Op: block.OpRead}
	tracer.Begin(&r)
	tracer.End(&r, nil)
	if all = lives(a); len(all) != 1 || all[0].Device != 0 {
		t.Errorf("lives after that: %+v", all)
	}
}

// TestConcurrent has many goroutines on each queue, and one reader.
func TestConcurrent(t *testing.T) {
	const each = 20000
	tracer := New()
	a := NewAnalyzer(tracer)
	var writers sync.WaitGroup
	for i := range 8 {
		writers.Go(func() {
			for range each {
				r := block.Request{Op: block.OpWrite, Queue: block.Queue(i % 3), Length: 1}
				tracer.Begin(&r)
				r.Mark(block.StageIssued)
				tracer.End(&r, nil)
			}
		})
	}
	over := make(chan struct{})
	go func() { writers.Wait(); close(over) }()
	for running := true; running; {
		select {
		case <-over:
			running = false
		default:
		}
		a.Poll(nil)
	}
	s := a.Summary()
	f := s.Flows[0]
	if whole := f.Count + s.Broken; whole > 8*each || f.Count+s.Broken+s.Dropped < 8*each || f.Parts[Total].Count != f.Count {
		t.Errorf("%d whole, %d broken of %d; %d records dropped", f.Count, s.Broken, 8*each, s.Dropped)
	}
	if s.Dropped == 0 && f.Count != 8*each {
		t.Errorf("%d requests of %d, with nothing dropped", f.Count, 8*each)
	}
}

func TestAllocations(t *testing.T) {
	if invariant.Enabled {
		t.Skip("the race detector allocates")
	}
	tracer := New()
	a := NewAnalyzer(tracer)
	r := block.Request{Op: block.OpWrite, Length: 1}
	one := func() {
		tracer.Begin(&r)
		r.Mark(block.StageIssued)
		tracer.End(&r, nil)
		a.Poll(nil)
	}
	one()
	if n := testing.AllocsPerRun(1000, one); n > 0 {
		t.Errorf("%v allocations a request", n)
	}
}

// BenchmarkRequest is what a traced request costs, the reader included.
func BenchmarkRequest(b *testing.B) {
	tracer := New()
	a := NewAnalyzer(tracer)
	r := block.Request{Op: block.OpWrite, Length: 4096}
	for i := 0; b.Loop(); i++ {
		tracer.Begin(&r)
		r.Mark(block.StageIssued)
		tracer.End(&r, nil)
		if i%1000 == 0 {
			a.Poll(nil)
		}
	}
	b.ReportMetric(float64(tracer.Dropped()), "dropped")
}

// BenchmarkOff is a mark on a request that is not traced.
func BenchmarkOff(b *testing.B) {
	r := &block.Request{Op: block.OpWrite, Length: 4096}
	for b.Loop() {
		r.Mark(block.StageIssued)
	}
}
