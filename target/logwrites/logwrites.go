// Package logwrites is the device mapper's log-writes target: a device whose writes, flushes and discards are recorded
// on another device, in the kernel's format, so that its replay tools can show what a crash at any moment would have
// left.
//
// What is logged when is what makes the log worth something:
//
//	a write is done           its entry waits: it may be lost in a crash until a flush
//	a flush comes             it takes along what waits at that moment
//	the flush is done         what it took along is logged, then the flush
//	a write with FUA is done  it is logged at once, behind what it overwrites (where the kernel lets a replay bring back
//	                          what was overwritten)
//	a mark                    is logged at once, behind what was logged before
//	the target ends           what waits is logged, then the mark "dm-log-writes-end"
//
// A flush that fails gives back what it took along. Data is copied when the write comes. What waits, for a flush or with one
// that is in flight, is bounded: beyond waitMax bytes it is logged without a flush, which for a replay is as if the device
// had written it early.
//
// Entries are written by one goroutine, in order, which exists while there is something to write. When the log is full,
// or cannot be written, logging ends for good, the status says so, and the device goes on.
//
// # Lock order
//
//	Target.mu    a leaf: never held across I/O
package logwrites

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"

	"cowherd/block"
	"cowherd/target"
)

// waitMax is the most bytes that wait for a flush, or for the end of one.
const waitMax = 64 << 20

// Type is made by
//
//	log-writes <device> <log device>
func Type() *target.Type {
	return &target.Type{Name: "log-writes", Version: [3]int{1, 1, 0}, New: func(b *target.Build) (target.Target, error) {
		if b.Args.Len() < 2 {
			return nil, target.Errorf("invalid argument count")
		}
		device, err := b.Open(b.Args.Next())
		if err != nil {
			return nil, err
		}
		log, err := b.OpenAs(b.Args.Next(), "log device")
		if err != nil {
			return nil, err
		}
		if err := b.Within(device, 0, b.Length); err != nil {
			return nil, err
		}
		return New(device, log, b.Size())
	}}
}

// Target passes everything on to its device and logs what changes it.
type Target struct {
	device      target.Lower
	log         target.Lower
	size        int64
	limits      block.Limits
	sectorBytes int64
	blank       []byte         // a sector of zeroes, never written to
	entries     sync.Pool      // of *entry
	writing     sync.WaitGroup // the goroutine that writes the log
	super       []byte         // the goroutine's
	waitMax     int64

	mu sync.Mutex
	// What is done and not flushed.
	unflushed []*entry // +checklocks:mu
	// Flushes in flight, with what they have taken along.
	flushes []*entry // +checklocks:mu
	// The bytes of what is unflushed, and of what flushes have taken along.
	waiting int64 // +checklocks:mu
	// What is to be logged.
	queue []*entry // +checklocks:mu
	// Somebody writes the log.
	busy bool // +checklocks:mu
	// Why nothing is logged any more; nil: it is.
	ended error // +checklocks:mu
	// Entries in the log, and where the next one goes, in bytes.
	count uint64 // +checklocks:mu
	next  int64  // +checklocks:mu
}

// New logs what is written to the first size bytes of device. Both stay the caller's.
func New(device, log target.Lower, size int64) (*Target, error) {
	sector := int64(max(device.Limits().LogicalBlock, block.SectorSize))
	t := &Target{
		device: device, log: log, size: size, limits: device.Limits(), sectorBytes: sector, next: sector, waitMax: waitMax,
	}
	if t.sectorBytes%int64(log.Limits().LogicalBlock) != 0 {
		return nil, target.Errorf("the logical block size of the log device %s is larger than that of %s", log.Name, device.Name)
	}
	t.limits.LogicalBlock = int(t.sectorBytes)
	t.limits.WriteZeroesMax = 0 // the log holds data
	t.limits.NeedsFlush = true  // or users would leave out what the log is about
	t.super, t.blank = make([]byte, t.sectorBytes), make([]byte, t.sectorBytes)
	t.entries.New = func() any { return &entry{t: t} }
	return t, nil
}

// Size is what New was given.
func (t *Target) Size() int64 { return t.size }

// Limits are the device's, without writes of zeroes.
func (t *Target) Limits() block.Limits { return t.limits }

// Map passes r on, and sees to it that it is logged.
func (t *Target) Map(r *block.Request) block.Device {
	if r.Op != block.OpRead && (r.Length > 0 || r.Op == block.OpFlush) && t.isLogging() {
		r.Push(t.newEntry(r))
	}
	return t.device.Device
}

// isLogging tells whether the log takes anything.
func (t *Target) isLogging() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.ended == nil
}

// newEntry is what is to be logged of r.
func (t *Target) newEntry(r *block.Request) *entry {
	e := t.entries.Get().(*entry)
	e.sector, e.sectors, e.flags, e.textLen = 0, 0, 0, 0
	e.contents = append(e.contents[:0], t.blank...)
	switch r.Op {
	case block.OpFlush:
		e.flags = flagFlush
		t.mu.Lock()
		e.covered = append(e.covered[:0], t.unflushed...)
		t.flushes = append(t.flushes, e)
		clear(t.unflushed)
		t.unflushed = t.unflushed[:0]
		t.mu.Unlock()
		return e
	case block.OpDiscard:
		e.flags = flagDiscard
	}
	e.sector, e.sectors = r.Offset/t.sectorBytes, r.Length/t.sectorBytes
	e.contents = append(e.contents, r.Data...)
	if r.Flags&block.FUA != 0 {
		e.flags |= flagFUA
	}
	return e
}

// Complete says that an entry's request is done.
func (e *entry) Complete(r *block.Request, err error) {
	e.t.done(e, err)
	r.Complete(err)
}

// done puts an entry where it belongs.
func (t *Target) done(e *entry, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e.flags&flagFlush != 0 {
		at := slices.Index(t.flushes, e)
		if err == nil { // what flushes took along that came before it is durable as well
			for _, f := range t.flushes[:at] {
				f.covered = t.queueWaitingLocked(f.covered)
			}
		}
		t.flushes = slices.Delete(t.flushes, at, at+1)
	}
	switch {
	case err != nil:
		t.unflushed = append(e.covered, t.unflushed...)
		e.covered = nil
		t.free(e)
	case e.flags&flagFlush != 0:
		e.covered = t.queueWaitingLocked(e.covered)
		t.queue = append(t.queue, e)
		t.startLocked()
	case e.flags&flagFUA != 0:
		t.queueOverwrittenLocked(e)
		t.queue = append(t.queue, e)
		t.startLocked()
	default:
		t.unflushed = append(t.unflushed, e)
		if t.waiting += int64(len(e.contents)); t.waiting > t.waitMax {
			t.queueAllLocked()
			t.startLocked()
		}
	}
}

// queueWaitingLocked has logged what waits in a list, and gives back the list, which is empty.
//
// +checklocks:t.mu
func (t *Target) queueWaitingLocked(list []*entry) []*entry {
	for _, e := range list {
		t.waiting -= int64(len(e.contents))
	}
	t.queue = append(t.queue, list...)
	clear(list)
	return list[:0]
}

// queueOverwrittenLocked has logged what e overwrites, and what that overwrites, and so on.
//
// +checklocks:t.mu
func (t *Target) queueOverwrittenLocked(e *entry) {
	later := markOverwritten(t.unflushed, []*entry{e})
	for _, f := range slices.Backward(t.flushes) {
		later = markOverwritten(f.covered, later)
	}
	var taken []*entry
	for _, f := range t.flushes {
		f.covered, taken = takeOverwritten(f.covered, taken)
	}
	t.unflushed, taken = takeOverwritten(t.unflushed, taken)
	t.queueWaitingLocked(taken)
}

// markOverwritten marks those of a list that one of later overwrites, or one behind them that is marked itself, and adds
// them to later.
func markOverwritten(list, later []*entry) []*entry {
	for _, x := range slices.Backward(list) {
		if slices.ContainsFunc(later, x.overlaps) {
			x.overwritten = true
			later = append(later, x)
		}
	}
	return later
}

// takeOverwritten moves what is marked from a list to another.
func takeOverwritten(list, taken []*entry) (rest, longer []*entry) {
	rest = slices.DeleteFunc(list, func(x *entry) bool {
		if !x.overwritten {
			return false
		}
		x.overwritten = false
		taken = append(taken, x)
		return true
	})
	return rest, taken
}

// overlaps tells whether both are about a sector.
func (e *entry) overlaps(x *entry) bool {
	return x.sector < e.sector+e.sectors && e.sector < x.sector+x.sectors
}

// queueAllLocked has everything logged that waits.
//
// +checklocks:t.mu
func (t *Target) queueAllLocked() {
	for _, f := range t.flushes {
		f.covered = t.queueWaitingLocked(f.covered)
	}
	t.unflushed = t.queueWaitingLocked(t.unflushed)
}

// free keeps an entry for later, unless it is large.
func (t *Target) free(e *entry) {
	e.logged = nil
	if cap(e.contents) <= 1<<20 {
		t.entries.Put(e)
	}
}

// startLocked lets the queue be written.
//
// +checklocks:t.mu
func (t *Target) startLocked() {
	if !t.busy {
		t.busy = true
		t.writing.Go(t.write)
	}
}

// write writes the queue to the log until it is empty.
func (t *Target) write() {
	for {
		t.mu.Lock()
		if len(t.queue) == 0 {
			t.busy = false
			t.mu.Unlock()
			return
		}
		batch := t.queue
		t.queue = nil
		t.mu.Unlock()
		for _, e := range batch {
			err := t.writeEntry(e)
			if e.logged != nil {
				e.logged <- err
			}
			t.free(e)
		}
	}
}

// writeEntry writes one entry, and behind one that is durable by itself the super.
func (t *Target) writeEntry(e *entry) error {
	at, count, err := t.place(e)
	if err != nil {
		return err
	}
	e.encode()
	if err := t.writeLog(e.contents, at); err != nil {
		return err
	}
	if e.flags&(flagFUA|flagMark) == 0 {
		return nil
	}
	encodeSuper(t.super, count)
	return t.writeLog(t.super, 0)
}

// place finds room for an entry.
func (t *Target) place(e *entry) (at int64, count uint64, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended != nil {
		return 0, 0, t.ended
	}
	at = t.next
	t.next += int64(len(e.contents))
	// The kernel leaves the last sector of 512 bytes alone.
	if t.next >= t.log.Size()/block.SectorSize*block.SectorSize-block.SectorSize {
		t.ended = fmt.Errorf("log-writes: no room left on the log device %s: %w", t.log.Name, syscall.ENOSPC)
		return 0, 0, t.ended
	}
	t.count++
	return at, t.count, nil
}

// writeLog writes to the log, and ends it if that fails.
func (t *Target) writeLog(p []byte, at int64) error {
	err := block.Write(t.log, p, at)
	if err != nil {
		err = fmt.Errorf("log-writes: the log device %s: %w", t.log.Name, err)
		t.mu.Lock()
		t.ended = err
		t.mu.Unlock()
	}
	return err
}

// endMark is the text of the mark at the end of a log.
const endMark = "dm-log-writes-end"

// mark logs a mark, and returns when it is in the log. The last one has everything logged before that waits.
func (t *Target) mark(text string, last bool) error {
	if most := int(t.sectorBytes) - headerBytes - 1; len(text) > most {
		text = text[:most]
	}
	logged := make(chan error, 1)
	e := t.entries.Get().(*entry)
	e.sector, e.sectors, e.flags, e.textLen, e.logged = 0, 0, flagMark, len(text), logged
	e.contents = append(e.contents[:0], t.blank...)
	copy(e.contents[headerBytes:], text)
	t.mu.Lock()
	if last {
		t.queueAllLocked()
	}
	t.queue = append(t.queue, e)
	t.startLocked()
	t.mu.Unlock()
	return <-logged
}

// Message takes "mark TEXT".
func (t *Target) Message(words []string) (string, error) {
	if len(words) != 2 {
		return "", target.Errorf("invalid log-writes message arguments, expect 2 arguments, got %d", len(words))
	}
	if !strings.EqualFold(words[0], "mark") {
		return "", target.Errorf("unrecognised log writes target message received: %s", words[0])
	}
	return "", t.mark(words[1], false)
}

// Close ends the log.
func (t *Target) Close() error {
	err := t.mark(endMark, true)
	t.writing.Wait()
	if errors.Is(err, syscall.ENOSPC) {
		return nil // which the status has told
	}
	return errors.Join(err, block.Flush(t.log))
}

// TableLine is the devices.
func (t *Target) TableLine() string { return fmt.Sprintf("%s %s", t.device.Name, t.log.Name) }

// StatusLine is the number of entries and the last sector of the log (of 512 bytes), and whether it has ended.
func (t *Target) StatusLine() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	line := fmt.Sprintf("%d %d", t.count, t.next/block.SectorSize-1)
	if t.ended != nil {
		line += " logging_disabled"
	}
	return line
}
