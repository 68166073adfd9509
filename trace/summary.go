package trace

import (
	"time"

	"cowherd/metrics"
)

// Parts of a request's time, in the order in which they stand in a Flow.
const (
	Held   = iota // the device was suspended
	Map           // looking up where it goes, and what else cowherd does
	Wait          // for a copy, made on its behalf or on another's
	Device        // the device below
	Total
	partCount
)

// PartNames are the parts' names.
var PartNames = [partCount]string{"held", "map", "wait", "device", "total"}

// A Flow is all requests of one operation, or all copies of one class.
type Flow struct {
	Op    string // as in a Life
	Class string

	Count, Bytes, Failed uint64
	// Parts are latencies. Held and Wait are only of those that were held or waited, Device of those that came there. Copies
	// have only a Total.
	Parts [partCount]metrics.Snapshot
}

// A Share is what one CPU, or the submitters of one queue, have issued.
type Share struct{ Requests, RequestBytes, Copies, CopyBytes uint64 }

// A Summary is what a trace has seen, by operation, CPU and queue. It is the Analyzer's, and changes with the next Poll.
type Summary struct {
	Elapsed time.Duration
	Flows   []*Flow        // in the order in which they were first seen
	CPUs    map[int]*Share // -1: not known
	Queues  map[int]*Share
	Dropped uint64 // records that found no room
	Broken  uint64 // requests of which records were dropped
}

// add counts a life.
func (s *Summary) add(l *Life) {
	f := s.flow(l)
	f.Count++
	f.Bytes += uint64(l.Length)
	if l.Failed {
		f.Failed++
	}
	for part, d := range [partCount]time.Duration{l.Held, l.Map, l.Wait, l.Device, l.Total} {
		if part == Total || l.Class == "" && (d > 0 || part == Map) {
			f.Parts[part].Record(d)
		}
	}
	if s.CPUs == nil {
		s.CPUs, s.Queues = map[int]*Share{}, map[int]*Share{}
	}
	share(s.CPUs, l.CPU).add(l)
	share(s.Queues, l.Queue).add(l)
}

// flow is what l belongs to. There are a handful, and the one that is asked for is most often the one before.
func (s *Summary) flow(l *Life) *Flow {
	for _, f := range s.Flows {
		if f.Op == l.Op && f.Class == l.Class {
			return f
		}
	}
	f := &Flow{Op: l.Op, Class: l.Class}
	s.Flows = append(s.Flows, f)
	return f
}

func share(shares map[int]*Share, of int) *Share {
	x := shares[of]
	if x == nil {
		x = new(Share)
		shares[of] = x
	}
	return x
}

func (x *Share) add(l *Life) {
	if l.Class != "" {
		x.Copies++
		x.CopyBytes += uint64(l.Length)
		return
	}
	x.Requests++
	x.RequestBytes += uint64(l.Length)
}
