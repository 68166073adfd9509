package kcopyd

import (
	"fmt"
	"math/rand/v2"
	"syscall"

	"cowherd/block"
)

// Offload is what a job may be copied by.
type Offload uint8

const (
	// OffloadAuto: whatever is fastest, as the engine has learnt for the two devices and the size.
	OffloadAuto Offload = iota
	// OffloadOff: read and write.
	OffloadOff
	// OffloadOnly: any method of offload, whatever the size, and nothing else. What cannot be offloaded fails with
	// ENOTSUP, and the error says why.
	OffloadOnly
	// CloneOnly: as OffloadOnly, by block.CopyClone alone.
	CloneOnly
)

const (
	// offloadFloor is the size in bytes below which OffloadAuto never offloads, whatever is learnt. Each clone is an
	// extent of its own, which later overwrites and flushes pay for: 16384 random clones of 4 KiB left 24522 extents on
	// XFS, and a flush took 20 ms instead of 1.
	offloadFloor = 16 << 10
	// offloadMax bounds what one sub-job takes to a lane at a time, in bytes, so that nobody waits long behind it.
	offloadMax = 64 << 20
)

// A reason is why a part of a job was read and written although it might have been offloaded.
type reason uint8

const (
	reasonNone      reason = iota // it was offloaded, or that would have been slower
	reasonNoMethod                // the destination offers nothing for this source, or nothing that the job may use
	reasonAbsent                  // the method turned out to be absent (ENOTSUP)
	reasonStuck                   // the method copied nothing, and reported no error
	reasonAlignment               // the offsets are not aligned, or not alike
	reasonLayer                   // a layer was suspended, or does not say where its data lies
	reasonFlags                   // the job's flags, or the number of its destinations
	reasonCount     = iota
)

// reasonNames are the reasons as they stand in counters.
var reasonNames = [reasonCount]string{"", "no-method", "absent", "no-progress", "alignment", "layer", "flags"}

// String says why, in words that continue "cannot be offloaded: ".
func (r reason) String() string {
	switch r {
	case reasonNoMethod:
		return "the destination offers no method for this source"
	case reasonAbsent:
		return "the method is absent"
	case reasonStuck:
		return "the method made no progress"
	case reasonAlignment:
		return "it is not aligned to the method's granularity"
	case reasonLayer:
		return "a layer above the devices is suspended or changes the data"
	case reasonFlags:
		return "jobs of several destinations, in sequence, or that ignore errors are read and written"
	}
	return "unknown"
}

// insists tells whether the job must not be read and written.
func (j *Job) insists() bool { return j.Offload >= OffloadOnly }

// climbs tells whether the job's parts are to look for a method of offload, rather than be read and written without
// further thought. An error is for a job that insists on offload and cannot have it.
func (c *core) climbs(j *Job) (bool, error) {
	if j.Length < c.floor && !j.insists() {
		return false, nil // first, because a small job pays for no more than this
	}
	if j.Offload == OffloadOff || j.From.Device == nil {
		return false, nil
	}
	if len(j.To) > 1 || j.Flags != 0 {
		if j.insists() {
			return false, j.refusal(reasonFlags, 0, j.Length)
		}
		return false, nil
	}
	if j.insists() {
		return true, nil
	}
	to := j.To[0].Device
	if p := j.state.shard.recent.Load(); p != nil && p.between(j.From.Device, to) {
		return c.worthwhile(j, p), nil
	}
	if _, ok := to.(block.Remapper); ok {
		return true, nil
	}
	if _, ok := to.(block.Copier); !ok {
		return false, nil
	}
	if _, ok := j.From.Device.(block.Remapper); ok {
		return true, nil
	}
	p := c.pairs.find(j.From.Device, to)
	if p == nil {
		return true, nil // the pair is not known yet
	}
	j.state.shard.recent.Store(p)
	return c.worthwhile(j, p), nil
}

// worthwhile tells whether there is a method between the two leaves of the pair p that is worth a look.
func (c *core) worthwhile(j *Job, p *pair) bool {
	r := p.usable(c.allowed(j))
	if r == nil {
		j.state.why = reasonNoMethod
		return false
	}
	if c.threshold > 0 {
		return true
	}
	draw := rand.Uint32()
	if r.plain(sizeClass(j.Length), draw) {
		return false // most of what is read and written pays for no more than this
	}
	j.state.course.draw, j.state.course.drawn = draw, true
	return true
}

// allowed are the methods that the job may use, as bits.
func (c *core) allowed(j *Job) uint32 {
	if j.Offload == CloneOnly {
		return bit(block.CopyClone)
	}
	return c.methods
}

// bit is the method's bit in a set of methods.
func bit(m block.CopyMethod) uint32 { return 1 << m }

// refusal is the error of a job that insists on offload, about n bytes from its start at.
func (j *Job) refusal(why reason, at, n int64) error {
	what := "offload"
	if j.Offload == CloneOnly {
		what = "clone"
	}
	return fmt.Errorf("kcopyd: %s of %d bytes from offset %d of the source to %d of the destination is not possible: %v: %w",
		what, n, j.From.Offset+at, j.To[0].Offset+at, why, syscall.ENOTSUP)
}
