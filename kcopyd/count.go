package kcopyd

import (
	"time"

	"cowherd/block"
	"cowherd/metrics"
)

// A method is how bytes were copied, as it is counted.
type method uint8

const (
	methodReadWrite method = iota
	methodZero
	methodClone
	methodDevice
	methodServer
	methodCount
)

var methodNames = [methodCount]string{"readwrite", "zero", "clone", "device", "server"}

// methodOf is the method of an offload.
func methodOf(m block.CopyMethod) method { return method(m-block.CopyClone) + methodClone }

const (
	// timedAlways is the size in bytes from which every piece is timed. Of smaller ones, each of which takes little more
	// than reading the clock does, one in timedShare is, and counts for so many.
	timedAlways = 128 << 10
	timedShift  = 6
	timedShare  = 1 << timedShift
)

// counter is what is counted of one class and method. It is in a shard, under the shard's lock.
type counter struct {
	operations, bytes, errors uint64
	latency                   *metrics.Histogram // nil until it is used
}

// counters are those of a shard.
type counters struct {
	by        [ClassCount][methodCount]counter
	fallbacks [reasonCount]uint64
}

// MethodStats tell what was copied by one method for one class of jobs. An operation is a piece of a job; its latency is
// from the first request of it to the last completion, waiting for a lane included, and for a buffer excluded. Of small
// pieces one in 64 is timed and counts for 64.
type MethodStats struct {
	Class      string           `json:"class"`  // cow, hydration, merge, bulk
	Method     string           `json:"method"` // readwrite, zero, clone, device, server
	Operations uint64           `json:"operations"`
	Bytes      uint64           `json:"bytes"` // once, however many destinations; of failed operations none
	Errors     uint64           `json:"errors"`
	Latency    metrics.Snapshot `json:"latency"`
}

// FallbackStats tell how many pieces were read and written that might have been offloaded, and why.
type FallbackStats struct {
	Reason string `json:"reason"` // no-method, absent, no-progress, alignment, layer, flags
	Count  uint64 `json:"count"`
}

// RouteStats tell of one method between two devices.
type RouteStats struct {
	Source      string `json:"source"`
	Destination string `json:"destination"`
	Method      string `json:"method"`
	Absent      string `json:"absent,omitempty"`    // why it is not used for now
	Threshold   int64  `json:"threshold,omitempty"` // bytes; from there on it is faster; 0: nowhere
	Waiting     int    `json:"waiting"`             // pieces in the destination's lane that have no call yet
}

// startClock begins to time the piece of s, or not.
func (s *subJob) startClock() {
	if s.weight = s.draw(); s.weight > 0 {
		s.began = s.job.state.core.now()
	}
}

// draw is how many pieces the time of the piece of s counts for. It is random enough: which ones are timed depends on
// where they lie, and on those that the sub-job copied before.
func (s *subJob) draw() uint8 {
	if s.length >= timedAlways {
		return 1
	}
	s.noise = (s.noise+uint32(s.job.From.Offset>>9))*2654435769 + 1
	if s.noise>>(32-timedShift) != 0 {
		return 0
	}
	return timedShare
}

// countLocked counts the piece of s, which has ended.
//
// +checklocks:sh.mu
func (sh *shard) countLocked(s *subJob) {
	j := s.job
	if why := j.state.why; why != reasonNone {
		j.state.why = reasonNone // here, because sub-jobs come in turn
		sh.fallbacks[why]++
	}
	if s.isWhole() && (s.rest == 0 || !s.goesOn()) {
		sh.counted.jobs++
		if j.ReadErr != nil || j.WriteErr != nil {
			sh.counted.errors++
		}
	}
	if s.length == 0 && s.bad == 0 {
		return
	}
	c := &sh.by[j.Class%ClassCount][s.method]
	if s.unread || s.cut || s.bad > 0 {
		sh.countBadLocked(s, c)
		return
	}
	length := uint64(s.length)
	c.operations++
	c.bytes += length
	if s.method == methodReadWrite {
		sh.counted.bytesRead += length
	}
	sh.counted.bytesWritten += length * uint64(len(j.To))
	if s.weight > 0 {
		c.time(s)
	}
}

// countBadLocked counts the piece of s, which was not copied completely.
//
// +checklocks:sh.mu
func (sh *shard) countBadLocked(s *subJob, c *counter) {
	if !s.cut {
		c.errors++
	}
	if s.unread {
		return
	}
	if s.method == methodReadWrite {
		sh.counted.bytesRead += uint64(s.length)
	}
	if !s.cut {
		sh.counted.bytesWritten += uint64(s.length) * uint64(len(s.job.To)-int(s.bad))
	}
}

// time adds the time of the piece of s, which has ended.
func (c *counter) time(s *subJob) {
	if c.latency == nil {
		c.latency = new(metrics.Histogram)
	}
	c.latency.Record(time.Duration(s.job.state.core.now()-s.began), uint64(s.weight))
}

// fellBack counts a piece that might have been offloaded.
func (sh *shard) fellBack(why reason) {
	sh.mu.Lock()
	sh.fallbacks[why]++
	sh.mu.Unlock()
}

// addStats adds the shard's counters to sums.
func (sh *shard) addStats(sum *counters, latency *[ClassCount][methodCount]metrics.Snapshot) {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	for i, n := range sh.fallbacks {
		sum.fallbacks[i] += n
	}
	for class := range sh.by {
		for m := range sh.by[class] {
			from, to := &sh.by[class][m], &sum.by[class][m]
			to.operations += from.operations
			to.bytes += from.bytes
			to.errors += from.errors
			if from.latency != nil {
				from.latency.AddTo(&latency[class][m])
			}
		}
	}
}

// detail fills in what Stats tell by method, reason and pair of devices.
func (c *core) detail(stats *Stats) {
	var sum counters
	latency := new([ClassCount][methodCount]metrics.Snapshot)
	for i := range c.pool.shards.Len() {
		c.pool.shards.Index(i).addStats(&sum, latency)
	}
	for class := range sum.by {
		for m, n := range sum.by[class] {
			if n.operations+n.errors > 0 {
				stats.Methods = append(stats.Methods, MethodStats{
					Class: Class(class).String(), Method: methodNames[m],
					Operations: n.operations, Bytes: n.bytes, Errors: n.errors, Latency: latency[class][m],
				})
			}
		}
	}
	for why, n := range sum.fallbacks {
		if n > 0 {
			stats.Fallbacks = append(stats.Fallbacks, FallbackStats{reasonNames[why], n})
		}
	}
	threshold := func(r *route) int64 {
		if c.threshold > 0 {
			return max(c.threshold, c.floor)
		}
		return r.threshold(c.floor)
	}
	for _, p := range c.pairs.list() {
		for _, r := range p.routes {
			stats.Routes = append(stats.Routes, RouteStats{
				Source: nameOf(p.source), Destination: nameOf(p.target), Method: r.offer.Method.String(),
				Absent: reasonNames[r.absent.Load()], Threshold: threshold(r), Waiting: r.lane.waiting(),
			})
		}
	}
}
