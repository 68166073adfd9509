package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/internal/percpu"
	"cowherd/kcopyd"
)

// MergeConfig is whom a merge tells. Both may be nil; neither may block, nor call Stop.
type MergeConfig struct {
	Failed   func(error) // the merge has stopped because of an error, and can be started again
	Finished func()      // once: everything is on the origin
}

// Merge is the snapshot-merge target: the view of a persistent snapshot, while its exceptions are moved to the origin in
// the background, so that in the end the origin is the view. It takes the place of both the origin's target and the
// snapshot's, and shows both the same. Other snapshots of the origin keep what they froze. All methods are safe for
// concurrent use.
//
//	batch := the last records of the table, up to mergeBatch bytes      the table is taken back from its end
//	slots := merging                              writes to these chunks wait from here on, reads still go to the COW device
//	wait for writes to the COW device in flight there
//	for each run of chunks, in parallel:
//	    other snapshots copy what is about to be overwritten
//	    kcopyd copies COW device -> origin
//	flush the origin
//	erase the records                             durable
//	slots := none                                 reads and writes go to the origin; those that waited go on
//
//	chunk      read          write
//	none       origin        other snapshots first, then the origin
//	copied     COW device    COW device, tracked
//	merging    COW device    wait
//
// A slot that is being merged is in the state draining, with no exception. Nothing ever adds an exception to the table
// any more: none is final.
//
// # After a crash
//
// A record is erased when the origin holds the data durably, and no write to its chunk is let through to the origin
// before the record is gone, durably. So whatever part of a batch was done, copying it again gives the same: the records
// that are still there name chunks of the COW device that nobody has written since. Records that are gone name chunks
// that are on the origin.
//
// # Errors
//
// When a copy or the origin's flush fails the batch's slots are copied again: all goes on as before, and the merge can be
// started again. When records could not be erased, nobody knows whether they are there: the slots stay as they are, and
// writes to these chunks fail until the merge, started again, gets on. Reads are right all the time.
//
// The kernel merges one run of neighbouring chunks at a time, with two flushes for each; a batch shares them.
type Merge struct {
	snapshot *Snapshot
	origin   *Origin
	device   block.Device // of the origin
	cow      block.Device
	store    *cowstore.Persistent
	config   MergeConfig

	writes  trackedReads // to the COW device
	waiting block.WaitList
	total   uint64 // chunks
	merged  atomic.Uint64
	failure atomic.Pointer[error] // nil: there is none
	over    atomic.Bool           // everything is on the origin

	mu sync.Mutex
	// Ends the worker; nil: there is none.
	stop context.CancelFunc // +checklocks:mu
	// Closed when the worker has ended.
	ended chan struct{} // +checklocks:mu

	// The worker's.
	records []cowstore.Record
	runs    []*mergeRun // for use again
}

const (
	// mergeBatch is how many bytes are merged between two flushes: a write to a chunk of the batch waits for them.
	mergeBatch = 4 << 20
	// mergeWorkersMax bounds the goroutines that copy a batch on devices whose I/O is over when Submit returns.
	mergeWorkersMax = 4
)

// mergingSlot is a chunk that is being moved to the origin.
func mergingSlot(to cowstore.Chunk) slot { return drainingSlot(slotIndexMax, to) }

// NewMerge makes a merge of s into its origin. From here on s itself must serve no request: the caller has suspended
// the devices over both, has taken s out of its origin, and sets the Merge as their target. EINVAL: the store of s is
// transient. EIO: s is invalid.
func NewMerge(s *Snapshot, c MergeConfig) (*Merge, error) {
	switch {
	case s.persistent == nil:
		return nil, fmt.Errorf("snapshot %q is transient: only persistent ones can be merged: %w", s.name, syscall.EINVAL)
	case s.invalidCause() != nil:
		return nil, fmt.Errorf("snapshot %q is invalid, and cannot be merged: %w: %w", s.name, s.invalidCause(), syscall.EIO)
	case slices.Contains(s.origin.Snapshots(), s):
		return nil, fmt.Errorf("snapshot %q is still a snapshot of its origin: %w", s.name, syscall.EBUSY)
	case s.origin.device.Limits().ReadOnly || s.cow.Limits().ReadOnly:
		return nil, fmt.Errorf("merge %q: origin or COW device is read-only: %w", s.name, syscall.EROFS)
	}
	s.persistent.Wait()
	return &Merge{
		snapshot: s,
		origin:   s.origin,
		device:   s.origin.device,
		cow:      s.cow,
		store:    s.persistent,
		config:   c,
		writes:   trackedReads{shards: percpu.New[trackShard]()},
		total:    s.persistent.Records(),
		records:  make([]cowstore.Record, max(1, mergeBatch>>s.chunkShift)),
	}, nil
}

// Size is the snapshot's, in bytes.
func (m *Merge) Size() int64 { return m.snapshot.size }

// Limits take whatever the limits of the origin and of the snapshot let in.
func (m *Merge) Limits() block.Limits {
	origin, cow := m.device.Limits(), m.cow.Limits()
	l := origin
	l.WriteZeroesMax, l.DiscardMax, l.DiscardGranularity = math.MaxInt64, math.MaxInt64, int64(m.snapshot.chunkSize)
	l.NeedsFlush = origin.NeedsFlush || cow.NeedsFlush
	return l
}

// Map remaps r, or takes it (nil). A discard does nothing, as in the kernel.
func (m *Merge) Map(r *block.Request) block.Device {
	switch r.Op {
	case block.OpFlush:
		m.flush(r)
	case block.OpRead:
		return m.mapRead(r)
	case block.OpDiscard:
		r.Complete(nil)
	default:
		m.write(r)
	}
	return nil
}

// flush flushes both devices: the view is on both.
func (m *Merge) flush(r *block.Request) {
	f := block.NewFan(r)
	for _, d := range []block.Device{m.device, m.cow} {
		d.Submit(f.Part(r.Offset, 0))
	}
	f.Done(nil)
}

// mapRead remaps a read that lies in one place, and splits others (nil).
func (m *Merge) mapRead(r *block.Request) block.Device {
	s := m.snapshot
	if r.Length == 0 {
		return m.device
	}
	x := s.runAt(r.Offset, r.End())
	if x.end == r.End() {
		if x.readable && !m.fitsCOW(r) {
			return nil
		}
		d, offset := m.place(x, r.Offset)
		r.Offset = offset
		return d
	}
	f := block.NewFan(r)
	for offset, last := r.Offset, r.End(); offset < last; offset = x.end {
		x = s.runAt(offset, last)
		p := f.Part(offset, x.end-offset)
		if x.readable && !m.fitsCOW(p) {
			continue
		}
		d, at := m.place(x, offset)
		p.Offset = at
		d.Submit(p)
	}
	f.Done(nil)
	return nil
}

// place is where the run x, which begins at offset, lies.
func (m *Merge) place(x run, offset int64) (block.Device, int64) {
	if x.readable {
		return m.cow, m.snapshot.moveTo(offset, x.to)
	}
	return m.device, offset
}

// Wake maps a write anew that waited for its chunk to be merged.
func (m *Merge) Wake(r *block.Request) { m.write(r) }

// write takes a write, or a write of zeroes. A piece of it is what lies in one place.
func (m *Merge) write(r *block.Request) {
	if r.Length == 0 {
		r.Complete(nil)
		return
	}
	x := m.snapshot.runAt(r.Offset, r.End())
	if x.end == r.End() {
		m.writePiece(r, x)
		return
	}
	f := block.NewFan(r)
	for offset, last := r.Offset, r.End(); offset < last; offset = x.end {
		x = m.snapshot.runAt(offset, last)
		m.writePiece(f.Part(offset, x.end-offset), x)
	}
	f.Done(nil)
}

// writePiece writes a piece that lay in one place, x, a moment ago.
func (m *Merge) writePiece(r *block.Request, x run) {
	if !x.readable {
		if preserved(r, m.origin.Snapshots(), originWrite{m}) {
			submitWrite(m.device, r)
		}
		return
	}
	if !m.fitsCOW(r) {
		return
	}
	s := m.snapshot
	start, end := s.chunksOf(r.Offset, r.Length)
	n := m.writes.begin(s, r.Queue, start, end)
	// Only from here on is it certain that a batch which begins now waits for this write.
	for chunk := start; chunk < end; chunk++ {
		at := s.table.find(chunk)
		if slot(at.Load()).state() == copied {
			continue
		}
		n.finish()
		m.await(at, r)
		return
	}
	r.Push(n)
	r.Offset = s.moveTo(r.Offset, x.to)
	submitWrite(m.cow, r)
}

// fitsCOW fails a request to the COW device, which is to be remapped, if it is not a multiple of its logical blocks: those
// of the origin may be smaller (an image file has none).
func (m *Merge) fitsCOW(r *block.Request) bool {
	unit := int64(m.cow.Limits().LogicalBlock)
	if (r.Offset|r.Length)&(unit-1) == 0 {
		return true
	}
	r.Complete(block.NewError(r, syscall.EINVAL, fmt.Sprintf(
		"%q is being merged, from a COW device whose logical block has %d bytes: this is no multiple of it", m.snapshot.name, unit)))
	return false
}

// submitWrite submits a write; one of zeroes may be longer than d takes at a time.
func submitWrite(d block.Device, r *block.Request) {
	if r.Op == block.OpWriteZeroes {
		block.SubmitZeroes(d, r)
		return
	}
	d.Submit(r)
}

// originWrite wakes writes to the origin that waited for other snapshots' copies.
type originWrite struct{ m *Merge }

func (w originWrite) Wake(r *block.Request) {
	if preserved(r, w.m.origin.Snapshots(), w) {
		submitWrite(w.m.device, r)
	}
}

// await keeps r until the chunk of the slot at is no longer being merged. It fails r when that may never be.
func (m *Merge) await(at *atomic.Uint64, r *block.Request) {
	if err := m.Err(); err != nil && slot(at.Load()).state() == draining {
		r.Complete(&block.Error{
			Op: r.Op, Offset: r.Offset, Length: r.Length, Errno: syscall.EIO,
			Err: fmt.Errorf("the merge of %q has failed: %w", m.snapshot.name, err),
		})
		return
	}
	m.waiting.Add(r, m)
	if slot(at.Load()).state() != draining || m.Err() != nil {
		m.wakeAll()
	}
}

// wakeAll maps anew all that wait.
func (m *Merge) wakeAll() {
	if waiting := m.waiting.Take(); waiting.Len() > 0 {
		m.origin.retry.add(waiting)
	}
}

// Extents are those of the view: what is on the COW device is data, elsewhere the origin knows.
func (m *Merge) Extents(offset, length int64, yield func(block.Extent) bool) error {
	more := true
	for end := offset + length; offset < end && more; {
		x := m.snapshot.runAt(offset, end)
		if x.readable {
			more = yield(block.Extent{Offset: offset, Length: x.end - offset})
		} else if err := block.ExtentsOf(m.device, offset, x.end-offset, func(e block.Extent) bool {
			more = yield(e)
			return more
		}); err != nil {
			return err
		}
		offset = x.end
	}
	return nil
}

// Err is why the merge has stopped; nil while it has not failed.
func (m *Merge) Err() error {
	if p := m.failure.Load(); p != nil {
		return *p
	}
	return nil
}

// Progress is how many of the chunks that had to be merged, when the Merge was made, are on the origin.
func (m *Merge) Progress() (merged, total uint64) { return m.merged.Load(), m.total }

// Finished tells whether everything is on the origin.
func (m *Merge) Finished() bool { return m.over.Load() }

// Status is the kernel's status line: "Merge failed", or "allocated/total metadata" in sectors. The merge is finished
// when allocated is metadata.
func (m *Merge) Status() string {
	if m.Err() != nil {
		return "Merge failed"
	}
	allocated, total, metadata := m.store.Usage()
	return fmt.Sprintf("%d/%d %d", allocated, total, metadata)
}

// Start lets the merge go on in the background, after NewMerge, Stop or an error. It does nothing while it runs.
func (m *Merge) Start() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stop != nil {
		select {
		case <-m.ended:
			m.stop()
		default:
			return
		}
	}
	var ctx context.Context
	ctx, m.stop = context.WithCancel(context.Background())
	ended := make(chan struct{})
	m.ended = ended
	m.failure.Store(nil)
	go func() {
		defer close(ended)
		m.run(ctx)
	}()
}

// Stop ends the background work, after the batch that is under way. Requests are served as before. It must not be
// called from a completion.
func (m *Merge) Stop() {
	m.mu.Lock()
	stop, ended := m.stop, m.ended
	m.mu.Unlock()
	if stop != nil {
		stop()
		<-ended
	}
}

// Running tells whether the background work goes on.
func (m *Merge) Running() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stop == nil {
		return false
	}
	select {
	case <-m.ended:
		return false
	default:
		return true
	}
}

// run merges batches until there are none, ctx ends, or one fails.
func (m *Merge) run(ctx context.Context) {
	for ctx.Err() == nil {
		n, err := m.store.Last(m.records)
		if err == nil && n == 0 {
			if !m.over.Swap(true) && m.config.Finished != nil {
				m.config.Finished()
			}
			return
		}
		if err == nil {
			err = m.batch(m.records[:n])
		}
		if err != nil {
			err = fmt.Errorf("merge %q: %w", m.snapshot.name, err)
			m.failure.Store(&err)
			m.wakeAll()
			if m.config.Failed != nil {
				m.config.Failed(err)
			}
			return
		}
	}
}

// batch moves the chunks of records, the last of the table, to the origin.
func (m *Merge) batch(records []cowstore.Record) error {
	erased := len(records)
	sorted := slices.Clone(records)
	slices.SortFunc(sorted, func(a, b cowstore.Record) int { return cmp.Compare(a.Old, b.Old) })
	if err := m.mark(sorted); err != nil {
		return err
	}
	m.drainWrites(sorted)
	err := m.copyRuns(sorted)
	if err == nil {
		err = block.Flush(m.device)
	}
	if err != nil {
		m.release(sorted, func(r cowstore.Record) slot { return copiedSlot(r.New) })
		return err
	}
	if err := m.store.Erase(erased); err != nil {
		return err // whether the records are there nobody knows
	}
	m.merged.Add(uint64(erased))
	m.release(sorted, func(cowstore.Record) slot { return 0 })
	return nil
}

// errStrange is the error of a table that is not what was loaded from it.
var errStrange = errors.New("the records on the COW device are not those that were loaded")

// mark makes the chunks of records known as being merged.
func (m *Merge) mark(records []cowstore.Record) error {
	for _, r := range records {
		at := m.snapshot.table.find(r.Old)
		if at == nil || !slot(at.Load()).readable() || slot(at.Load()).chunk() != r.New {
			return fmt.Errorf("chunk %d: %w", r.Old, errStrange)
		}
	}
	for _, r := range records {
		m.snapshot.table.find(r.Old).Store(uint64(mergingSlot(r.New)))
	}
	return nil
}

// release gives the slots of records another state, and wakes who waited.
func (m *Merge) release(records []cowstore.Record, state func(cowstore.Record) slot) {
	for _, r := range records {
		m.snapshot.table.find(r.Old).Store(uint64(state(r)))
	}
	m.wakeAll()
}

// drainWrites waits for the writes to the COW device in flight in the chunks of records, which are sorted.
func (m *Merge) drainWrites(records []cowstore.Record) {
	drained := make(chan struct{})
	x := &drain{done: func() { close(drained) }}
	x.begin()
	for start := 0; start < len(records); {
		end := start + 1
		for end < len(records) && records[end].Old == records[end-1].Old+1 {
			end++
		}
		m.writes.block(records[start].Old, records[end-1].Old+1, x)
		start = end
	}
	x.end()
	<-drained
}

// mergeRun is a run of chunks that are neighbours on both devices, on its way to the origin. Its request is never
// submitted: it stands for the write that other snapshots are to be protected from, and completes when they are, or
// with the error that makes the write impossible.
type mergeRun struct {
	m      *Merge
	from   cowstore.Record // the first
	count  int
	r      block.Request
	job    kcopyd.Job
	dest   [1]kcopyd.Region
	copied chan<- error
}

// copyRuns copies the chunks of records, which are sorted, to the origin.
func (m *Merge) copyRuns(records []cowstore.Record) error {
	runs := m.makeRuns(records)
	copied := make(chan error, len(runs))
	var next atomic.Int64
	var workers sync.WaitGroup
	for queue := range min(percpu.Count(), mergeWorkersMax, len(runs)) {
		workers.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(runs)); i = next.Add(1) - 1 {
				runs[i].start(block.Queue(queue), copied)
			}
		})
	}
	workers.Wait()
	var first error
	for range runs {
		if err := <-copied; err != nil && first == nil {
			first = err
		}
	}
	return first
}

// makeRuns cuts records in runs of at most runMax bytes. They are good until the next call.
func (m *Merge) makeRuns(records []cowstore.Record) []*mergeRun {
	most := max(1, int(runMax>>m.snapshot.chunkShift))
	used := 0
	for i := 0; i < len(records); used++ {
		first, count := records[i], cowstore.Chunk(1)
		for rest := records[i:]; int(count) < min(len(rest), most); count++ {
			if (rest[count] != cowstore.Record{Old: first.Old + count, New: first.New + count}) {
				break
			}
		}
		if used == len(m.runs) {
			x := &mergeRun{m: m}
			x.job.Done = x.done
			m.runs = append(m.runs, x)
		}
		m.runs[used].from, m.runs[used].count = first, int(count)
		i += int(count)
	}
	return m.runs[:used]
}

// start copies the run as soon as the other snapshots have copied what it overwrites.
func (x *mergeRun) start(queue block.Queue, copied chan<- error) {
	s := x.m.snapshot
	x.copied = copied
	offset := s.chunkSize.Offset(x.from.Old)
	x.r.Reset()
	x.r.Op, x.r.Queue, x.r.Offset = block.OpWrite, queue, offset
	x.r.Length = min(int64(x.count)<<s.chunkShift, s.size-offset)
	x.r.Push(x)
	x.Wake(&x.r)
}

// Wake copies, unless another snapshot has to copy first.
func (x *mergeRun) Wake(r *block.Request) {
	if preserved(r, x.m.origin.Snapshots(), x) {
		r.Complete(nil)
	}
}

// Complete copies, now that the other snapshots have what the run overwrites.
func (x *mergeRun) Complete(_ *block.Request, err error) {
	if err != nil {
		x.copied <- err
		return
	}
	m := x.m
	x.job.From = kcopyd.Region{Device: m.cow, Offset: m.snapshot.chunkSize.Offset(x.from.New)}
	x.dest[0] = kcopyd.Region{Device: m.device, Offset: x.r.Offset}
	x.job.To, x.job.Length, x.job.Queue = x.dest[:], x.r.Length, x.r.Queue
	x.job.Class = kcopyd.Merge
	m.snapshot.engine.Submit(&x.job)
}

func (x *mergeRun) done(j *kcopyd.Job) { x.copied <- j.Err() }
