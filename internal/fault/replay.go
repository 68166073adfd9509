package fault

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"

	"cowherd/block"
)

// Replay goes once more through what a Recorder has recorded, event by event, and gives at each step what the disks
// would hold after a crash there. To step costs what the event wrote, and an image what differs from the one before:
// there is one pair of contents for each disk, which grows with the steps, and images lie over them.
//
//	now       all writes so far
//	durable   the writes so far, up to the first that a power failure may lose
//	tail      the others, in order: those that may be lost, and durable ones behind them
//
// A durable write stays in the tail while an older one is there that may be lost, so that the older one can never be
// laid over it. That the disk has grown is in the tail like a write.
type Replay struct {
	log   []event
	at    int // the number of events that have happened
	disks []replayed
}

// replayed is the state of one disk.
type replayed struct {
	disk    *Disk
	now     []byte
	durable []byte
	tail    []unsettled
}

// unsettled is a write in a tail.
type unsettled struct {
	index   int // in the log
	durable bool
}

// Replay is at the beginning of the log, before its first event. No request may be in flight on the disks.
func (r *Recorder) Replay() *Replay {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := &Replay{log: slices.Clone(r.log)}
	for _, d := range r.disks {
		p.disks = append(p.disks, replayed{disk: d, now: slices.Clone(d.first), durable: slices.Clone(d.first)})
	}
	return p
}

// Len is the number of events in the log.
func (p *Replay) Len() int { return len(p.log) }

// At is the number of events that have happened.
func (p *Replay) At() int { return p.at }

// Peek is the event that Step comes to; false: the log is at its end.
func (p *Replay) Peek() (Event, bool) {
	if p.at == len(p.log) {
		return Event{}, false
	}
	return p.log[p.at].Event, true
}

// Last are the last n events that have happened, for a message.
func (p *Replay) Last(n int) []Event {
	var last []Event
	for _, e := range p.log[max(0, p.at-n):p.at] {
		last = append(last, e.Event)
	}
	return last
}

// Step makes the next event happen. Images that were made before are void.
func (p *Replay) Step() {
	e := &p.log[p.at]
	p.at++
	if e.Kind == EventMark {
		return
	}
	d := &p.disks[e.Disk.index]
	switch e.Kind {
	case EventWrite:
		copy(d.now[e.Offset:], e.data)
		d.tail = append(d.tail, unsettled{index: p.at - 1})
	case EventGrow:
		d.now = append(d.now, make([]byte, e.Length-int64(len(d.now)))...)
		d.tail = append(d.tail, unsettled{index: p.at - 1})
	case EventFlush:
		for i := range d.tail {
			if done := p.log[d.tail[i].index].completed; done != 0 && done < e.submitted {
				d.tail[i].durable = true
			}
		}
	case EventDurable:
		for i := range d.tail {
			if at := d.tail[i].index; at == e.write || at < e.write && p.log[at].Kind == EventGrow {
				d.tail[i].durable = true
			}
		}
	}
	d.settle(p.log)
}

// settle moves the durable writes from the front of the tail to durable.
func (d *replayed) settle(log []event) {
	n := 0
	for n < len(d.tail) && d.tail[n].durable {
		switch e := &log[d.tail[n].index]; e.Kind {
		case EventGrow:
			d.durable = append(d.durable, make([]byte, e.Length-int64(len(d.durable)))...)
		default:
			copy(d.durable[e.Offset:], e.data)
		}
		n++
	}
	d.tail = slices.Delete(d.tail, 0, n)
}

// Volatile is the number of writes that a power failure at this point may lose, on all disks.
func (p *Replay) Volatile() int {
	n := 0
	for i := range p.disks {
		for _, u := range p.disks[i].tail {
			if !u.durable {
				n++
			}
		}
	}
	return n
}

// Kill is what the disks hold, in the order in which they were added to the recorder, when only the program dies: every
// write that has taken effect is there.
func (p *Replay) Kill() []*Image {
	var images []*Image
	for i := range p.disks {
		images = append(images, newImage(p, p.disks[i].disk, p.disks[i].now))
	}
	return images
}

// PowerCut is what the disks hold, in the order in which they were added to the recorder, after a power failure: what is
// durable, and of the writes that are not what chance leaves: all, some or none of them, and of some only some sectors.
func (p *Replay) PowerCut(random *rand.Rand) []*Image {
	var images []*Image
	for i := range p.disks {
		d := &p.disks[i]
		x := newImage(p, d.disk, d.durable)
		luck := newLuck(random)
		for _, u := range d.tail {
			luck.lay(x, &p.log[u.index], u.durable)
		}
		images = append(images, x)
	}
	return images
}

// luck decides what survives a power failure on one disk.
type luck struct {
	random *rand.Rand
	keep   float64 // the share of the writes that survive as a whole
	tear   float64 // the share of the others of which some sectors do
}

func newLuck(random *rand.Rand) luck {
	shares := []float64{0, 0.1, 0.5, 0.9, 1}
	return luck{random: random, keep: shares[random.IntN(5)], tear: shares[random.IntN(5)]}
}

// lay puts on x what survives of a write, or of a growth. What was written behind the end is lost with the growth.
func (l luck) lay(x *Image, e *event, durable bool) {
	keep := durable || l.random.Float64() < l.keep
	if e.Kind == EventGrow {
		if keep {
			x.grow(e.Length)
		}
		return
	}
	if e.Offset+e.Length > x.Size() {
		return
	}
	if keep {
		x.write(e.data, e.Offset)
		return
	}
	if l.random.Float64() >= l.tear {
		return
	}
	share := l.random.Float64()
	for at := int64(0); at < e.Length; at += block.SectorSize {
		if l.random.Float64() < share {
			x.write(e.data[at:min(at+block.SectorSize, e.Length)], e.Offset+at)
		}
	}
}

// imagePage is the unit in bytes in which an image keeps what differs from what it lies over.
const imagePage = 4 << 10

// Image is a disk after a crash, as a value: it can be read and written, and lies over a replay's contents, which it
// leaves as they are. It is void when the replay has gone on. Safe for concurrent use.
type Image struct {
	replay *Replay
	at     int // the step that it was made at
	limits block.Limits
	under  []byte

	mu sync.Mutex
	// As large as the disk, which may have grown since under was.
	size int64 // +checklocks:mu
	// What was written, by page; nil: the page is as it is below.
	pages []*[imagePage]byte // +checklocks:mu
}

func newImage(p *Replay, d *Disk, under []byte) *Image {
	x := &Image{replay: p, at: p.at, limits: d.limits, under: under}
	x.grow(int64(len(under)))
	return x
}

// Size is the disk's.
func (x *Image) Size() int64 {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.size
}

// Limits are the disk's.
func (x *Image) Limits() block.Limits { return x.limits }

// Grow makes the image at least size bytes long.
func (x *Image) Grow(size int64) error {
	x.grow(size)
	return nil
}

func (x *Image) grow(size int64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.size = max(x.size, size)
	if more := (x.size+imagePage-1)/imagePage - int64(len(x.pages)); more > 0 {
		x.pages = append(x.pages, make([]*[imagePage]byte, more)...)
	}
}

// Submit does r and completes it before it returns.
func (x *Image) Submit(r *block.Request) {
	if err := block.CheckRange(r, x.Size(), x.limits); err != nil {
		r.Complete(err)
		return
	}
	switch r.Op {
	case block.OpRead:
		x.read(r.Data, r.Offset)
	case block.OpWrite:
		x.write(r.Data, r.Offset)
	case block.OpWriteZeroes:
		x.write(make([]byte, r.Length), r.Offset)
	case block.OpDiscard:
		x.write(slices.Repeat([]byte{discarded}, int(r.Length)), r.Offset)
	}
	r.Complete(nil)
}

// Content is a copy of all that the image holds.
func (x *Image) Content() []byte {
	p := make([]byte, x.Size())
	x.read(p, 0)
	return p
}

// check panics when the image is void.
func (x *Image) check() {
	if x.at != x.replay.at {
		panic(fmt.Sprintf("fault: an image of step %d is used at step %d", x.at, x.replay.at))
	}
}

// below is what the image lies over, from offset on.
func (x *Image) below(offset int64) []byte { return x.under[min(offset, int64(len(x.under))):] }

func (x *Image) read(p []byte, offset int64) {
	x.check()
	x.mu.Lock()
	defer x.mu.Unlock()
	for len(p) > 0 {
		n := int(min(int64(len(p)), imagePage-offset%imagePage))
		if page := x.pages[offset/imagePage]; page != nil {
			copy(p[:n], page[offset%imagePage:])
		} else {
			clear(p[copy(p[:n], x.below(offset)):n])
		}
		p, offset = p[n:], offset+int64(n)
	}
}

func (x *Image) write(p []byte, offset int64) {
	x.check()
	x.mu.Lock()
	defer x.mu.Unlock()
	for len(p) > 0 {
		page := x.pages[offset/imagePage]
		if page == nil {
			page = new([imagePage]byte)
			copy(page[:], x.below(offset/imagePage*imagePage))
			x.pages[offset/imagePage] = page
		}
		n := copy(page[offset%imagePage:], p)
		p, offset = p[n:], offset+int64(n)
	}
}
