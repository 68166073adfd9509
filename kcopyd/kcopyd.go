// Package kcopyd is the copy engine: every copy that cowherd makes, from breaking a chunk to copying an image, is a
// Job that an Engine runs. A job has one source and up to eight destinations, or no source (it zeroes), or no
// destination (it only runs its callback).
//
// There are two engines behind one interface. Scaled runs a job on the queue that asked for it: a job of at most
// SubJobSize on synchronous devices is over when Submit returns, on the caller's own thread. Serialised is the
// kernel's scheme, one worker that issues all I/O and runs all callbacks, kept to be compared with. What a job does
// and what it reports is the same code in both (job.go, subjob.go); they differ in who runs it, and where.
//
// # The life of a job
//
// A sub-job is what moves: it holds one buffer and copies one piece at a time. A job of at most SubJobSize has one,
// which lies in the Job itself; a larger job has up to SplitCount, from a pool, and each takes the next piece of the
// job when it is done with one.
//
//	sub-job:  more pieces?                     no: it leaves; the last to leave ends the job
//	          buffer := pool                   none: it waits in the pool's list, first come first served
//	          piece := next of the job         the buffer comes first, so that the lowest piece always has one
//	          read the source                  an error: the piece is not written
//	          wait for its turn                WriteSequentially only
//	          write to all destinations
//	          give the buffer back             who does it restarts the sub-jobs that waited and now have one
//	          from the start; but the job of one piece ends here
//	job:      count it, call Done
//
//	Scaled.run(sub-jobs):                      on the caller's goroutine, or on the one of a completion
//	    until the list is empty: take one, move it on until it waits
//	    what that set free (the next in turn, those that waited for a buffer) is added to the list
//
//	Serialised.work():                         one goroutine
//	    splice the four lists; complete: end pieces, run callbacks; pages: take buffers; io: read, write
//	    sleep when there is nothing to do
//
// Submitter and completions of an I/O meet in a barrier: whoever comes last goes on with the sub-job. A completion that
// comes before Device.Submit returns is only counted, and the submitter goes on in its loop: the stack does not grow
// with the size of a job, no list is touched, and the I/O costs one atomic addition. A completion that comes later goes
// on itself (scaled) or hands the sub-job to the worker (serialised).
//
// # Offload
//
// A job with one source and one destination, without flags, and of at least Config.OffloadFloor bytes climbs: each of its
// parts looks for a way to be copied without the data passing through the process (plan.go).
//
//	sub-job:  find the leaves below the next part (block.Remapper), and hold the layers
//	          pair := source leaf, destination leaf     unknown: the destination is asked for its offers, once
//	          the first route of the pair that is not absent, may be used, and fits the alignment:
//	              learnt to be cheaper for the job's size     none: let the layers go, read and write a piece
//	          wait in the destination's lane, call block.Copier.Copy until the part is copied
//	              short: go on; no progress: read and write the next SubJobSize, then look again;
//	              ENOTSUP, or no progress stuckMost times in a row: the route is absent for absentFor, plan anew;
//	              any other error is the job's
//	          let the layers go, start from the next part
//
// An unaligned head or tail is read and written. The calls are made by the goroutines of a lane (lane.go), as many at a
// time as the destination gains from, because they block. Layers are held while a part is in the lane, and never while a
// plain request is submitted: a layer that is being suspended would wait for the holder, who would wait for it.
//
// What is cheaper is learnt for each route and size (learn.go), from 128 KiB on being offloaded at first. Small jobs pay
// one comparison for all this.
//
// # Loans, small pieces, and the throttle
//
// A source that is a block.Lender shows its bytes where they lie: nothing is read and no buffer taken, and the piece is as
// long as the loan; what is left is the sub-job's next piece. While the throttle (throttle.go) finds the foreground busy,
// pieces may be cut short in the same way. A job of several pieces in sequence does neither: what is left for later would need
// a buffer that those behind it hold. The throttle is passed before a piece is planned and before a buffer is taken.
//
// # Buffers
//
// Each queue's shard keeps the free buffers of its jobs, in classes of powers of two from 4 KiB to SubJobSize. What
// all buffers take together is bounded by Config.BufferCeiling, which is at least SubJobSize. A shard that has no free
// buffer makes one while there is room below the ceiling; then it takes one from another shard; then the free
// buffers of all shards are dropped until there is room. In the steady state none of this happens, and a job touches
// its own shard only. Progress is certain: a sub-job holds one buffer and needs no other, so that every buffer comes
// back; those that wait are served in order, and who comes later waits behind them, so that even the largest finds
// its room in the end. A device must therefore not submit to the engine that writes to it: devices that stand on
// each other have an engine each.
//
// There is one list of waiters for all queues, rather than one for each: it is fair between queues, a buffer given
// back on any queue finds those that wait for it, and unless memory is short nobody looks at more of it than a counter
// that stays zero.
//
// # Invariants
//
//  1. Done is called exactly once for each Submit, with no lock held.
//  2. A sub-job has one owner: the goroutine that runs it, the device it is submitted to, or the list it is in.
//  3. Only what was read is written.
//  4. At most SplitCount pieces of a job are in flight; while a job waits for a buffer it holds none.
//  5. While sub-jobs wait in the pool, either nothing is free that suits the first of them, or somebody who gave a
//     buffer back has yet to look at the list.
//
// # Lock order
//
// No lock is held while a device or a callback runs, so that a callback may call the engine.
//
//	pool.mu
//	    shard.mu
//	        jobState.mu
//	            learnt.mu
//	pairs.mu
//	lane.mu
//	Throttle.mu
//	Serialised.mu
package kcopyd

import (
	"cowherd/block"
)

const (
	// SubJobSize is the size in bytes of the pieces that a large job is split in (the kernel's default since 5.3,
	// commit c663e04097f4).
	SubJobSize = 512 << 10
	// SplitCount is the largest number of pieces of one job in flight (the kernel's SPLIT_COUNT).
	SplitCount = 8
	// DestinationsMax is the largest number of destinations of one job.
	DestinationsMax = 8
	// BufferCeilingDefault is Config.BufferCeiling where none is given, in bytes.
	BufferCeilingDefault = 64 << 20
)

// Flags of a job.
type Flags uint8

const (
	// IgnoreErrors: go on after a failed read or write; the job's result still names the errors. A piece that could
	// not be read is not written (the kernel writes whatever its pages hold then).
	IgnoreErrors Flags = 1 << iota
	// WriteSequentially: the pieces reach each destination in ascending order, each when the one before it has been
	// written, and after an error none is written any more. It cancels IgnoreErrors.
	WriteSequentially
)

// Class says what a job is for. Throttles and counters are by class.
type Class uint8

// The classes. The foreground waits for the first; the others are work in the background, which yields to it.
const (
	CopyOnWrite Class = iota // breaking a chunk or a region for a request that waits
	Hydration                // filling a clone
	Merge                    // merging a snapshot
	Bulk                     // copying an image
	ClassCount  = iota
)

// String is the class's name as it stands in status, counters and on the command line.
func (c Class) String() string {
	switch c {
	case CopyOnWrite:
		return "cow"
	case Hydration:
		return "hydration"
	case Merge:
		return "merge"
	case Bulk:
		return "bulk"
	}
	return "unknown"
}

// Region is a place on a device; its length is the job's.
type Region struct {
	Device block.Device
	Offset int64 // bytes
}

// A Job copies Length bytes from one region to up to DestinationsMax others, or zeroes them (From.Device nil), or
// does nothing but run its callback (no destinations, or Length 0). It is made to be embedded in what it belongs to
// and used again and again: an engine allocates nothing for a job of at most SubJobSize.
//
// The caller fills the exported fields, calls Engine.Submit once and must not touch the job until Done is called. No
// destination may overlap the source or another destination, and all must lie within their devices and be aligned to
// their logical blocks: the engine leaves it to the devices to check that.
//
// Zeroing uses the destinations' write-zeroes operation if all of them have it, in pieces of the largest size that
// all of them take; otherwise zeroes are written.
type Job struct {
	From    Region
	To      []Region // at most DestinationsMax; the slice stays the caller's and must not change until Done
	Length  int64    // bytes; may be 0
	Flags   Flags
	Class   Class
	Offload Offload // by what it may be copied
	Queue   block.Queue

	// Done is called exactly once, with no lock held; the job is the caller's again from then on and may be
	// submitted anew. Scaled: on the goroutine that finished the last I/O, possibly before Submit returns, so that
	// a Done that always submits the next job must do so through a loop of its own, lest the stack grow. Serialised:
	// always on the engine's worker, one at a time.
	Done func(*Job)

	// The result, valid in Done.
	ReadErr  error  // the source could not be read (the first error met)
	WriteErr error  // a destination could not be written (the first error met), or the job was not valid (EINVAL)
	WriteBad uint32 // bit i: destination i was not written completely, whatever the reason

	state jobState // the engine's
}

// Err is the job's error: the read error, else the write error, else nil.
func (j *Job) Err() error {
	if j.ReadErr != nil {
		return j.ReadErr
	}
	return j.WriteErr
}

// An Engine runs jobs. All methods are safe for concurrent use.
type Engine interface {
	// Submit starts a job. It may block for as long as the job's I/O takes (scaled, synchronous devices), never for
	// want of a buffer: a job that finds none waits in a list.
	Submit(j *Job)
	// Stats are the engine's counters since it was made.
	Stats() Stats
	// Forget drops what the engine has learnt about copies from and to a device, and its references to it. Who closes
	// a device that jobs named, or that lay below one, calls it; otherwise the device is kept until it is displaced.
	Forget(d block.Device)
	// Watch has w told of every job that begins from now on, until Unwatch. What has begun by then is told of to its end.
	Watch(w Watcher)
	Unwatch(w Watcher)
	// Close waits until no job is in flight and no Done is running, and stops the engine. No job may be submitted
	// afterwards, but by the Done of a job in flight. It must not be called from a Done.
	Close() error
}

// Config is what an engine can be told. The zero value is the default.
type Config struct {
	// BufferCeiling is the most that all buffers together may take, in bytes; 0 stands for BufferCeilingDefault,
	// and less than SubJobSize for SubJobSize. What was taken is kept for use again.
	BufferCeiling int64
	// Throttle bounds what the engine does; nil: nothing. Engines may share one.
	Throttle *Throttle
	// OffloadFloor is the size in bytes below which OffloadAuto never offloads; 0: 16 KiB.
	OffloadFloor int64
	// OffloadThreshold is the size in bytes of the jobs from which on OffloadAuto offloads, for all devices alike; 0: what
	// is learnt. It is there to be compared with.
	OffloadThreshold int64
	// CopyServer lets jobs be copied by the servers of file systems (block.CopyServer). Some have corrupted data by it.
	CopyServer bool
	// OffloadInWorker has a serialised engine make the calls of offload in its worker, one after the other, as the
	// kernel patches of 2022 and 2023 did, rather than in lanes. It is there to be compared with.
	OffloadInWorker bool
}

// Stats count what an engine did. A job has been counted, in all but JobsInFlight, when its Done is called. Queues are
// read one after the other, so that while jobs run BuffersInUse is only nearly right.
type Stats struct {
	Jobs          uint64 `json:"jobs"`           // finished
	BytesRead     uint64 `json:"bytes_read"`     // from sources
	BytesWritten  uint64 `json:"bytes_written"`  // to destinations, zeroing included
	Errors        uint64 `json:"errors"`         // jobs that ended with an error
	BuffersInUse  int64  `json:"buffers_in_use"` // bytes
	JobsWaiting   int64  `json:"jobs_waiting"`   // sub-jobs that wait for a buffer
	BufferWaits   uint64 `json:"buffer_waits"`   // sub-jobs that had to wait
	JobsInFlight  int64  `json:"jobs_in_flight"` // submitted, and their Done has not returned
	BufferCeiling int64  `json:"buffer_ceiling"` // bytes

	Methods   []MethodStats   `json:"methods"`
	Fallbacks []FallbackStats `json:"fallbacks"`
	Routes    []RouteStats    `json:"routes"` // methods of offload between pairs of devices
}
