// Package file is a device on a regular file or a block device.
//
// # Design
//
// Requests are plain system calls on a descriptor of our own (an os.File would share its lock between CPUs). Most are
// made on the caller's goroutine before Submit returns; what may take long goes to a pool of goroutines, so that it
// does not hold up the requests that the caller has behind it:
//
//	                   file in memory   page cache                 direct, or no probe of the page cache
//	                   (tmpfs)
//	read               inline           inline if it is cached     inline when alone, else pool
//	                                    (RWF_NOWAIT), else pool
//	write              inline           inline                     direct: inline when alone, else pool
//	                                                               page cache: inline
//	write with FUA     inline           pool                       as a write; page cache: pool
//	discard, zeroes    inline           pool                       pool
//	flush              inline           the flusher                the flusher
//
// "When alone": a queue runs a request inline when the requests before it found nothing in flight either. A submitter
// that waits for the end of Submit never shows whether it has more at hand; so one of probeEvery such requests goes to
// the pool, and when another arrives while it is in flight, the queue has depth and the pool takes over.
//
// The pool of a queue starts a goroutine for a request unless as many as may run do, and a goroutine ends when it
// finds nothing to do. Requests that wait are linked through themselves: the list takes no memory, and is as long as
// the submitters let it become. Waiting for room in Submit instead would let a completion that submits wait for itself.
// The flusher makes one fdatasync for all flushes that arrived before it began.
//
// # Copies from another file
//
// A device offers to be filled from another one without the data passing through this process (block.Copier): by a clone
// on XFS and btrfs (FICLONERANGE), by the server on NFS, CIFS and Ceph (copy_file_range), and by the NVMe Copy command
// between block devices of one namespace (nvme.go). A file system that would read and write by itself, as Linux does for
// copy_file_range everywhere else, is asked for nothing. The call is made on the caller's goroutine and is counted in
// queue 0 of both devices.
//
//	what the kernel says                             what Copy says
//	ENOTSUP, EXDEV, EINVAL, EBADF, EPERM, ...        ENOTSUP: these two files lack the method
//	(nothing: the range does not fit)                no progress: not aligned, overlapping, a tail that is none
//	EIO, ENOSPC, EDQUOT and all others               the same
//	EINVAL, but for less than was asked for not      a short copy, and then the true error
//	(nothing: the source has failed or is shorter)   ENOTSUP: reading finds out what there is, and tells the reader
//	(nothing: the destination is)                    EIO
//
// # Invariants
//
//  1. After a failed fdatasync, data that was acknowledged may be lost, and no later success can tell. The device has
//     then failed for good: every later write and flush gets EIO with the cause; nothing is tried again. The same holds
//     once the file is found truncated, because writing would grow it again and hide the loss. Reads go on.
//  2. The descriptor is closed only when no request, no goroutine and no look-up of extents is counted in any queue.
//  3. No copy makes a truncated file longer again, goes to a device that has failed, or comes from one: what is read of
//     it by the page cache need not be what its blocks hold.
//  4. The absence of an operation (ENOTSUP and the like) is remembered and falls back to the next one; an I/O error or
//     a lack of space surfaces.
//
// Lock order: queue.mu and flusher.mu are leaves. Neither is held across a system call, a completion or the other.
// growing is held by Grow alone, across the system calls that it makes: what it guards is their order.
package file

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"cowherd/block"
	"cowherd/internal/invariant"
	"cowherd/internal/percpu"
)

// A Device does its I/O on a regular file or a block device.
type Device struct {
	path   string
	fd     int
	size   atomic.Int64 // only Grow changes it
	limits block.Limits
	sys    calls

	id          identity
	fsType      int64 // of the file system, by statfs; 0 for a block device
	fsBlock     int64 // the file system's block in bytes; 0 for a block device
	cloneMax    int64 // Options.CloneMax, completed
	isBlock     bool  // a block device, not a regular file
	inMemory    bool  // on a file system that has its data in memory: nothing blocks for long
	direct      bool  // past the page cache
	nowait      bool  // reads can be tried without waiting for the disk
	fastZeroout bool  // the block device zeroes without writing
	workersMax  int   // goroutines of one queue
	memoryAlign int   // what addresses of buffers must be multiples of; 1 with the page cache

	queues  percpu.Shards[queue]
	flusher flusher
	failure atomic.Pointer[failure]
	closed  atomic.Bool
	idle    chan struct{}              // tells Close, which it holds one message for, that a queue may have become empty
	bounces sync.Pool                  // of *[]byte, aligned
	nvme    func() (*namespace, error) // what the block device is a part of, looked up once
	growing sync.Mutex                 // one Grow at a time

	// What has been found missing.
	noPunch, noZeroRange, noZeroout, noDsync, noSeek atomic.Bool
}

var (
	_ block.Device       = (*Device)(nil)
	_ block.ExtentLister = (*Device)(nil)
	_ block.Grower       = (*Device)(nil)
	_ block.Copier       = (*Device)(nil)
)

// identity tells files apart, and block devices by their number, whatever they are opened by.
type identity struct {
	device, inode uint64 // a block device has only the first
	isBlock       bool
}

// errClosed is the cause of what comes after Close.
var errClosed = errors.New("the device is closed")

// failure is why the device has failed for good.
type failure struct{ cause error }

func (f *failure) Error() string { return "writing is over: " + f.cause.Error() }
func (f *failure) Unwrap() error { return f.cause }

// fail lets the device fail for good; the first cause stays.
func (d *Device) fail(cause error) *failure {
	d.failure.CompareAndSwap(nil, &failure{cause})
	return d.failure.Load()
}

// Path is the name that the device was opened by.
func (d *Device) Path() string { return d.path }

// String is the name that the device was opened by.
func (d *Device) String() string { return d.path }

// Size is the length in bytes that the file had when it was opened, or that Grow gave it.
func (d *Device) Size() int64 { return d.size.Load() }

// Limits are those found when the file was opened. With the page cache a regular file takes any range of bytes; the
// logical block of a block device and the alignment of direct I/O are respected.
func (d *Device) Limits() block.Limits { return d.limits }

// Submit starts r. See the package comment for what happens where.
func (d *Device) Submit(r *block.Request) {
	if invariant.Enabled {
		l := block.NoLimits() // what the device lacks is an error here, what is out of range is the caller's mistake
		l.LogicalBlock = d.limits.LogicalBlock
		err := block.CheckRange(r, d.Size(), l)
		invariant.Check(err == nil, "file %s: %v", d.path, err)
	}
	q := d.queues.At(uint(r.Queue))
	if !d.enter(q) {
		r.Complete(&block.Error{Op: r.Op, Offset: r.Offset, Length: r.Length, Errno: unix.ESHUTDOWN, Err: errClosed})
		return
	}
	switch {
	case d.inMemory, r.Op == block.OpFlush && d.limits.ReadOnly:
		d.finish(q, r, d.perform(r))
	case r.Op == block.OpFlush:
		d.flush(r)
	case r.Op == block.OpRead && d.nowait:
		if d.readCached(r) {
			d.finish(q, r, nil)
			return
		}
		d.runInPool(q, r)
	case r.Op == block.OpRead, r.Op == block.OpWrite && d.direct:
		d.runByDepth(q, r)
	case r.Op == block.OpWrite && r.Flags&block.FUA == 0:
		d.finish(q, r, d.perform(r))
	default:
		d.runInPool(q, r)
	}
}

// finish completes r, which was counted in q.
func (d *Device) finish(q *queue, r *block.Request, err error) {
	if err != nil {
		err = d.wrap(r, err)
	}
	r.Complete(err)
	d.leave(q)
}

// wrap makes err an operating error of r that names the file.
func (d *Device) wrap(r *block.Request, err error) error {
	e := block.WrapError(r, fmt.Errorf("file %s: %w", d.path, err))
	if errors.As(err, new(*failure)) {
		e.Errno = unix.EIO // whatever the errno of the cause
	}
	return e
}

// perform does r and returns when it is done. It is the only way to the system calls for a request, but for readCached.
func (d *Device) perform(r *block.Request) error {
	if r.Op == block.OpRead {
		return d.read(r.Data, r.Offset)
	}
	if d.limits.ReadOnly {
		if r.Op == block.OpFlush {
			return nil
		}
		return unix.EROFS
	}
	if f := d.failure.Load(); f != nil {
		return f
	}
	var err error
	switch r.Op {
	case block.OpFlush:
		return d.sync()
	case block.OpWrite:
		return d.write(r.Data, r.Offset, r.Flags&block.FUA != 0)
	case block.OpDiscard:
		err = d.discard(r.Offset, r.Length)
	case block.OpWriteZeroes:
		err = d.zero(r.Offset, r.Length, r.Flags)
	default:
		return unix.EINVAL
	}
	if err == nil && r.Flags&block.FUA != 0 {
		err = d.sync()
	}
	return err
}

// Close waits for the requests in flight, their completions included, and closes the file. It must not be called from
// a completion. What was not flushed is not made durable. A request submitted afterwards fails with ESHUTDOWN.
func (d *Device) Close() error {
	if d.closed.Swap(true) {
		return fmt.Errorf("close file %s: %w", d.path, errClosed)
	}
	for i := range d.queues.Len() {
		for d.queues.Index(i).inflight.Load() != 0 {
			<-d.idle
		}
	}
	if err := unix.Close(d.fd); err != nil {
		return fmt.Errorf("close file %s: %w", d.path, err)
	}
	return nil
}
