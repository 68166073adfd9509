package trace

import (
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"cowherd/block"
	"cowherd/internal/percpu"
	"cowherd/kcopyd"
)

// ringSize is the number of records that a ring holds, a power of two: at a million records a second, what a reader who
// comes every few milliseconds must not miss.
const ringSize = 1 << 14

// noCPU stands for a CPU that is not known.
const noCPU = ^uint16(0)

// kind tells what a record says: a block.Stage, or of a copy.
type kind uint8

const kindCopy kind = 0xff

// record is a stage of a request, or a copy. It is a cache line.
type record struct {
	at     int64 // ns since the tracer's epoch
	id     uint64
	offset int64 // bytes
	length int64 // bytes
	took   int64 // ns; kindCopy
	cpu    uint16
	queue  block.Queue
	kind   kind
	op     block.Op
	class  kcopyd.Class // kindCopy
	failed bool
}

// Tracer collects what happens to the requests of one device. It is safe for concurrent use, but for drain, which has one
// caller at a time.
type Tracer struct {
	epoch   time.Time
	shards  percpu.Shards[ring]
	dropped atomic.Uint64
}

var (
	_ block.Tracer   = (*Tracer)(nil)
	_ kcopyd.Watcher = (*Tracer)(nil)
)

// New makes a Tracer whose time begins now. It takes about a megabyte for each CPU.
func New() *Tracer {
	t := &Tracer{epoch: time.Now(), shards: percpu.New[ring]()}
	for i := range t.shards.Len() {
		t.shards.Index(i).slots = make([]slot, ringSize)
	}
	return t
}

// Begin gives r a span, and tells of its first stage.
func (t *Tracer) Begin(r *block.Request) {
	sh := t.shards.At(uint(r.Queue))
	r.Trace(block.Span{Tracer: t, ID: sh.last.Add(1)<<spanShift | uint64(r.Queue)&(1<<spanShift-1)})
	t.Stage(r, block.StageQueued)
}

// spanShift: the low bits of an identity are those of the queue, so that no two shards give the same.
const spanShift = 6

// End tells of the last stage, and takes the span away.
func (t *Tracer) End(r *block.Request, err error) {
	rec := t.record(r, kind(block.StageCompleted))
	rec.failed = err != nil
	r.Trace(block.Span{})
	t.put(&rec)
}

// Stage records a stage of r. See block.Tracer.
func (t *Tracer) Stage(r *block.Request, s block.Stage) {
	rec := t.record(r, kind(s))
	if s == block.StageIssued {
		rec.cpu = cpu()
	}
	t.put(&rec)
}

func (t *Tracer) record(r *block.Request, k kind) record {
	return record{
		at: int64(time.Since(t.epoch)), id: r.Span().ID, offset: r.Offset, length: r.Length, cpu: noCPU, queue: r.Queue,
		kind: k, op: r.Op,
	}
}

// CopyBegan tells where a copy is issued. See kcopyd.Watcher.
func (t *Tracer) CopyBegan(*kcopyd.Job) kcopyd.Watch {
	return kcopyd.Watch{At: int64(time.Since(t.epoch)), CPU: cpu()}
}

// CopyEnded records a copy. See kcopyd.Watcher.
func (t *Tracer) CopyEnded(j *kcopyd.Job, w kcopyd.Watch) {
	rec := record{
		at: w.At, took: int64(time.Since(t.epoch)) - w.At, length: j.Length, cpu: w.CPU, queue: j.Queue,
		kind: kindCopy, class: j.Class, failed: j.Err() != nil,
	}
	if len(j.To) > 0 {
		rec.offset = j.To[0].Offset
	}
	t.put(&rec)
}

// put adds a record to its queue's ring.
func (t *Tracer) put(rec *record) {
	if !t.shards.At(uint(rec.queue)).put(rec) {
		t.dropped.Add(1)
	}
}

// Dropped is how many records found no room.
func (t *Tracer) Dropped() uint64 { return t.dropped.Load() }

// drain gives everything that has been recorded to yield.
func (t *Tracer) drain(yield func(*record)) {
	for i := range t.shards.Len() {
		t.shards.Index(i).drain(yield)
	}
}

// cpu is the CPU that the caller runs on, which may be another one a moment later.
func cpu() uint16 {
	var n uint32
	if _, _, errno := syscall.RawSyscall(unix.SYS_GETCPU, uintptr(unsafe.Pointer(&n)), 0, 0); errno != 0 || n >= uint32(noCPU) {
		return noCPU
	}
	return uint16(n)
}
