// Package transfer copies a whole device to another one: images, block devices, exports. It is what "cowherd copy" is.
//
// # Design
//
// A planner walks the source once, from the start to the end, by its extents, and cuts it into pieces: data to be
// copied, and ranges to be made zero. What the destination holds as zeroes already is no piece at all. A worker takes
// pieces in batches, of about PieceSize bytes of data, owns one buffer, and does one thing at a time:
//
//	worker      batch := next of the planner, which looks up, a window at a time, the extents of the source, and of
//	            the destination unless it is known to be zero
//	            for each piece:
//	              offload   a clone, or a job of kcopyd; where that is not possible, the next line
//	              relay     moved by a block.Relay; where there is none, or it has broken, the next line
//	              data      read the source; look for zeroes; write what is not
//	              zero      write zeroes
//	            the batch is done: the low-water mark rises to the start of the first one that is not
//	keeper      starts the write-back of what lies below the mark; records the mark in the journal, when it is durable
//
// There are Queues times InFlight workers, each a goroutine on a queue of its own choice, so that I/O of one worker
// stays on one queue of both devices (a connection, a CPU's shard). A worker waits for its I/O; what overlaps is what
// different workers do. The hand-over from a completion to a worker costs a microsecond or two, for pieces that take
// a hundred.
//
// # Why data passes through buffers of this package
//
// kcopyd copies what it is told to and does not look at the bytes. Looking costs little while they are in a cache: a
// piece lies in the second or the third one from the read to the write, and a unit of 4 KiB that is not zero is nearly
// always known by its first eight bytes. Copied by kcopyd and looked at by somebody else, each byte would cross
// the memory once more, of four times in all. So read and write are here, and only what is moved without being seen (the
// device's and the server's copy, clones among other ways) is kcopyd's. Where a clone is the only way there is nothing to
// choose: it is one call, which the first worker makes itself.
//
// # Arithmetic
//
// From one file in memory to another, a byte is copied twice: 1 GiB is 0.35 s of copying at 6 GB/s, and 262144 pages
// to be allocated. Writers of one file wait for each other, on the lock of its inode, so the floor is the write: reading
// has to happen meanwhile, on another CPU, which takes two workers and gains nothing from more. A buffer is touched for
// the first time once, not once for each piece, as a page fault costs as much as copying 64 KiB.
//
// To a disk, the copy in memory is faster than the disk; what counts is that the disk begins early. So the write-back of
// what has been copied is started every few megabytes, and the flush at the end finds most of it done.
//
// # Invariants
//
//  1. All below the low-water mark has been copied; a journal names a mark only when a flush that began later is over.
//  2. A range of the destination is left as it is only if it reads as zeroes: it is told to be new (Zeroed), or its own
//     extents say so, and nobody else writes to it.
//  3. Memory is bounded: a buffer and a batch for each worker, the extents of one window.
//  4. The first error ends the transfer, and is the one that is returned; nothing is submitted after Run has returned.
//
// Lock order: planner.mu and limiter.mu are leaves. planner.mu is held while extents are looked up.
package transfer

import (
	"context"
	"fmt"
	"math/bits"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"cowherd/block"
)

const (
	// PieceSizeDefault is the size in bytes of reads and writes from file to file, and of any other device that does its
	// work on the worker's goroutine. Writers of one file take turns, and a longer turn costs less: from memory to
	// memory, 1 MiB took 0.40 s where 256 KiB took 0.43, though a buffer fills the second-level cache then.
	PieceSizeDefault = 1 << 20
	// PieceSizeRemote is the same where a connection is between, as replies of this size come as fast as longer ones and
	// take less memory, and where there is a limit on the rate, so that it goes on evenly.
	PieceSizeRemote = 256 << 10
	// PieceSizeMax bounds Options.PieceSize.
	PieceSizeMax = 16 << 20
	// SparseDefault is the unit in bytes in which zeroes are looked for, as other tools have it.
	SparseDefault = 4 << 10
	// WorkersMax bounds Queues times InFlight.
	WorkersMax = 1024
)

// Options say what is copied, and how. Source and Destination must be set.
type Options struct {
	Source, Destination block.Device

	// Start is where to begin, in bytes: all before it has been copied. A multiple of PieceSizeMax.
	Start int64
	// Zeroed: the destination reads as zeroes from Start on. Otherwise its extents are asked, if it has any.
	Zeroed bool
	// Allocated: the destination is to have room for every byte of the source, zeroes included.
	Allocated bool
	// Sparse is the unit in bytes, a power of two, in which data is looked at for zeroes; 0: it is copied as it is.
	Sparse int64

	// Queues is how many queues of the devices are used; 0: the connections of the devices, or the CPUs.
	Queues int
	// InFlight is how many pieces each queue has in flight; 0: what suits the devices.
	InFlight int
	// PieceSize is the size in bytes of reads and writes, a power of two up to PieceSizeMax; 0: what suits the
	// devices, PieceSizeDefault or PieceSizeRemote.
	PieceSize int64
	// Rate is the most that is copied in a second, in bytes; 0: no limit. Clones do not count.
	Rate int64
	// Method is how data may be copied.
	Method Method
	// Relay allows Auto to have data go from one server to another without passing through this program's memory, where
	// both can (block.Relayer). Zeroes are then looked for only in pieces, of up to 1 MiB, that begin with some.
	Relay bool

	// Flush makes the destination durable before Run returns.
	Flush bool
	// Verify reads the destination again, and compares it with the source.
	Verify bool
	// Journal, if there is one, is told of what is durable while the copy runs. Nothing is, without Flush, in the end.
	Journal *Journal
	// Progress is told of each part that is done, in bytes, which add up to the size of the source less Start; and with
	// Verify once more, and of how. It is called by several goroutines at the same time. nil: nobody.
	Progress func(how How, n int64)
}

// How is what is done to a part of a device.
type How uint8

const (
	Zeroing     How = iota // nothing is read: it is zero already, or made so
	Cloning                // by block.CopyClone
	Offloading             // by a device or a server
	Splicing               // by a block.Relay
	ReadWriting            // read and written
	Verifying              // compared
)

// Result is what a transfer did. The counts are bytes of the source, and add up to Size with Resumed.
type Result struct {
	Size      int64         `json:"size_bytes"`
	Resumed   int64         `json:"resumed_bytes"`   // before Start
	Clone     int64         `json:"clone_bytes"`     // by clones, holes included
	Device    int64         `json:"device_bytes"`    // by the device's own copy
	Server    int64         `json:"server_bytes"`    // by the server of a file system
	Splice    int64         `json:"splice_bytes"`    // by a relay: through the kernel, from server to server
	ReadWrite int64         `json:"readwrite_bytes"` // read and written
	Zeroes    int64         `json:"zeroes_bytes"`    // made zero
	Skipped   int64         `json:"skipped_bytes"`   // zeroes where the destination had them already
	Verified  int64         `json:"verified_bytes"`  // compared
	Took      time.Duration `json:"-"`               // flush and verification included
}

// Run copies all of the source from o.Start on. The destination must have room for it, and should not be used by anybody
// else meanwhile. When ctx ends the transfer does, with the cause as its error. What had been done by then is in the
// result as far as it is known.
func Run(ctx context.Context, o Options) (Result, error) {
	start := time.Now()
	t, err := newTransfer(o)
	if err != nil {
		return Result{}, err
	}
	if err = t.prepareOffload(); err == nil {
		t.prepareRelay()
		err = t.run(ctx)
		if end := t.endOffload(); err == nil {
			err = end
		}
	}
	r := t.result()
	r.Took = time.Since(start)
	return r, err
}

// transfer is one call of Run.
type transfer struct {
	Options
	size    int64 // of the source
	end     int64 // size, in whole blocks of the destination: what is not is the tail
	unit    int64 // what offsets and lengths of pieces are multiples of
	cut     int64 // the longest piece of data that is planned, unless it is to be offloaded: PieceSize, or more for relays
	workers []*worker
	limiter *limiter

	relay    *relaying // nil: there is none
	offload  offloading
	coarse   atomic.Bool      // pieces are as long as an offload likes them
	absences atomic.Int32     // offloads in a row that turned out to be impossible
	moved    map[string]int64 // what the engine has moved by each method, in bytes
}

// newTransfer checks the options and completes them.
func newTransfer(o Options) (*transfer, error) {
	t := &transfer{Options: o, size: o.Source.Size(), moved: map[string]int64{}}
	from, to := o.Source.Limits(), o.Destination.Limits()
	t.unit = int64(max(from.LogicalBlock, to.LogicalBlock, 1))
	t.end = t.size &^ (int64(max(to.LogicalBlock, 1)) - 1)
	t.chooseQueues()
	switch {
	case to.ReadOnly:
		return nil, fmt.Errorf("the destination is read-only: %w", syscall.EROFS)
	case o.Destination.Size() < t.size:
		return nil, fmt.Errorf("the destination is too small: it has %d bytes, and the source %d: %w",
			o.Destination.Size(), t.size, syscall.ENOSPC)
	case !isPower(t.PieceSize) || t.PieceSize < t.unit || t.PieceSize > PieceSizeMax:
		return nil, fmt.Errorf("a piece of %d bytes is not a power of two from %d to %d: %w", t.PieceSize, t.unit, PieceSizeMax,
			syscall.EINVAL)
	case o.Sparse < 0 || o.Sparse > 0 && !isPower(o.Sparse):
		return nil, fmt.Errorf("a unit of %d bytes for zeroes is not a power of two: %w", o.Sparse, syscall.EINVAL)
	case o.Start < 0 || o.Start > t.size || o.Start%PieceSizeMax != 0 && o.Start != t.size:
		return nil, fmt.Errorf("a start at byte %d is not possible: %w", o.Start, syscall.EINVAL)
	case t.Queues < 1 || t.InFlight < 1 || t.Queues > WorkersMax || t.InFlight > WorkersMax || t.Queues*t.InFlight > WorkersMax:
		return nil, fmt.Errorf("%d queues with %d pieces in flight are not from 1 to %d: %w", t.Queues, t.InFlight, WorkersMax,
			syscall.EINVAL)
	case o.Rate < 0:
		return nil, fmt.Errorf("a rate of %d bytes a second is negative: %w", o.Rate, syscall.EINVAL)
	}
	t.cut = t.PieceSize
	if t.Sparse > 0 {
		t.Sparse = min(max(t.Sparse, t.unit), t.PieceSize)
	}
	if t.Rate > 0 {
		t.limiter = newLimiter(t.Rate)
	}
	for i := range t.Queues * t.InFlight {
		t.workers = append(t.workers, newWorker(t, block.Queue(i%t.Queues)))
	}
	return t, nil
}

// connected is a device that is reached over connections: queues beyond their number gain nothing.
type connected interface{ Connections() int }

// chooseQueues completes Queues, InFlight and PieceSize. A device behind connections answers later, and has to be kept
// busy meanwhile; others do most of their work on the worker's goroutine.
func (t *transfer) chooseQueues() {
	connections := 0
	for _, d := range []block.Device{t.Source, t.Destination} {
		if c, ok := d.(connected); ok {
			connections = max(connections, c.Connections())
		}
	}
	if t.Queues == 0 {
		t.Queues = max(connections, min(runtime.GOMAXPROCS(0), queuesMax))
	}
	inFlight, pieceSize := inFlightLocal, int64(PieceSizeDefault)
	if connections > 0 {
		inFlight = inFlightRemote
	}
	if connections > 0 || t.Rate > 0 {
		pieceSize = PieceSizeRemote
	}
	if t.InFlight == 0 {
		t.InFlight = inFlight
		if _, ok := t.Source.(block.Relayer); ok && t.mayRelay() && t.Queues <= WorkersMax/inFlightRelay {
			t.InFlight = inFlightRelay
		}
	}
	if t.PieceSize == 0 {
		t.PieceSize = max(pieceSize, t.unit)
	}
}

const (
	// queuesMax is the most queues that are used without being asked for: writers of one file wait for each other.
	queuesMax      = 16
	inFlightLocal  = 2
	inFlightRemote = 4
	// inFlightRelay: with a relay, who waits has no memory of its own, and two servers have to be kept busy.
	inFlightRelay = 16
)

func isPower(n int64) bool { return bits.OnesCount64(uint64(n)) == 1 }

// run copies, flushes and verifies.
func (t *transfer) run(ctx context.Context) error {
	if err := t.copyAll(ctx); err != nil {
		return err
	}
	if t.Flush || t.Verify || t.Journal != nil {
		if err := flush(t.Destination); err != nil {
			return fmt.Errorf("destination: %w", err)
		}
	}
	if t.Journal != nil {
		if err := t.Journal.Record(t.size); err != nil {
			return err
		}
	}
	if t.Verify {
		return t.verify(ctx)
	}
	return nil
}

// copyAll copies everything, with the keeper beside the workers. Clones leave nothing to be written back: without a
// journal there is no keeper beside them.
func (t *transfer) copyAll(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer t.relay.close() // before ctx ends, which would break them
	p := newPlanner(t, t.Start, t.Zeroed, true)
	k := newKeeper(p)
	if t.Journal != nil {
		k.begin(cancel)
	}
	more, err := p.clone(ctx)
	if more {
		k.begin(cancel)
		err = p.each(ctx, cancel, (*worker).copy)
	}
	k.end()
	if err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		k.last()
		return err
	}
	return t.copyTail()
}

// clone has the first worker clone, on this goroutine, for as long as that works: clones to one file wait for each other,
// and to wake the other workers takes longer than to clone a window does. more: there may be something left to be copied.
func (p *planner) clone(ctx context.Context) (more bool, err error) {
	if !p.offload.clones {
		return true, nil
	}
	return p.workers[0].run(ctx, p, (*worker).copy, p.coarse.Load)
}

// each has do called by the workers for every piece, and waits for all of them. The first error ends it.
func (p *planner) each(ctx context.Context, cancel context.CancelCauseFunc, do func(*worker, context.Context, piece) error) error {
	var all sync.WaitGroup
	for _, w := range p.workers {
		all.Go(func() {
			if _, err := w.run(ctx, p, do, nil); err != nil {
				cancel(err)
			}
		})
	}
	all.Wait()
	return context.Cause(ctx)
}

// result sums up what the workers have counted.
func (t *transfer) result() Result {
	r, offloaded := Result{Size: t.size, Resumed: t.Start}, int64(0)
	for _, w := range t.workers {
		r.Splice += w.counted.spliced
		r.ReadWrite += w.counted.readWrite
		r.Zeroes += w.counted.zeroes
		r.Skipped += w.counted.skipped
		r.Verified += w.counted.verified
		r.Clone += w.counted.cloned
		offloaded += w.counted.offloaded - w.counted.cloned
	}
	// What was begun and had to be read and written in the end is in the engine's counters too.
	for _, m := range []struct {
		method block.CopyMethod
		to     *int64
	}{{block.CopyClone, &r.Clone}, {block.CopyDevice, &r.Device}, {block.CopyServer, &r.Server}} {
		n := min(t.moved[m.method.String()], offloaded)
		*m.to += n
		offloaded -= n
	}
	return r
}

// progress tells whoever wants to know that n more bytes are done, and how.
func (t *transfer) progress(how How, n int64) {
	if t.Progress != nil && n > 0 {
		t.Progress(how, n)
	}
}
