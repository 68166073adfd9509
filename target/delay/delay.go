// Package delay is the device mapper's delay target: requests reach their device some milliseconds late. Reads, writes
// and flushes may have different delays, and may go to different devices.
//
//	Map(r):     no delay, or the device is being suspended: r goes on
//	            else r joins its class's queue; the first one sets the class's timer
//	timer:      all whose time has come go on, in order; the timer is set for the next one
//	Presuspend: all that wait go on
//
// # Lock order
//
//	class.mu    a leaf: never held across I/O
package delay

import (
	"fmt"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"cowherd/block"
	"cowherd/target"
)

// Type is made by
//
//	delay <device> <start sector> <milliseconds> [for writes the same three [for flushes the same three]]
func Type() *target.Type {
	return &target.Type{Name: "delay", Version: [3]int{1, 4, 0}, New: parse}
}

// parse makes a target of a line of a table.
func parse(b *target.Build) (target.Target, error) {
	given := b.Args.Len() / 3
	if b.Args.Len()%3 != 0 || given < 1 || given > 3 {
		return nil, target.Errorf("requires exactly 3, 6 or 9 arguments")
	}
	var paths []Path
	for range given {
		p, err := parsePath(b)
		if err != nil {
			return nil, err
		}
		paths = append(paths, p)
	}
	t := New(b.Size(), paths...)
	return t, nil
}

// parsePath reads the device, the start and the delay of a class.
func parsePath(b *target.Build) (Path, error) {
	name := b.Args.Next()
	start, err := b.Args.Sector()
	if err != nil {
		return Path{}, err
	}
	delay, err := b.Args.Number(0, math.MaxUint32, "invalid delay")
	if err != nil {
		return Path{}, err
	}
	lower, err := b.Open(name)
	if err != nil {
		return Path{}, err
	}
	p := Path{Lower: lower, Start: start.Bytes(), Delay: time.Duration(delay) * time.Millisecond}
	return p, b.Within(lower, start, b.Length)
}

// Path is where the requests of a class go, and how late.
type Path struct {
	target.Lower
	Start int64 // bytes
	Delay time.Duration
}

// Classes of requests.
const (
	reads = iota
	writes
	flushes
	classCount
)

// Target delays requests.
type Target struct {
	classes [classCount]class
	given   int // how many paths were given
	size    int64
	limits  block.Limits
	hurried atomic.Bool // the device is being suspended: nothing waits any more
}

// class is what one kind of request goes through.
type class struct {
	Path
	ops atomic.Int64 // requests that wait

	mu sync.Mutex
	// What waits, in the order of its time, from head on.
	// +checklocks:mu
	queue []late
	head  int         // +checklocks:mu
	timer *time.Timer // +checklocks:mu
}

// late is a request and when it is to go on.
type late struct {
	r   *block.Request
	due time.Time
}

// New delays by paths for reads, writes (default: as reads) and flushes (default: as writes). The devices stay the
// caller's, who has checked that size bytes from each start on lie within them.
func New(size int64, paths ...Path) *Target {
	t := &Target{given: len(paths), size: size, limits: block.NoLimits()}
	for i := range t.classes {
		t.classes[i].Path = paths[min(i, len(paths)-1)]
		t.limits = t.limits.Stack(t.classes[i].Device.Limits())
	}
	return t
}

// Size is what New was given.
func (t *Target) Size() int64 { return t.size }

// Limits are those of all devices together.
func (t *Target) Limits() block.Limits { return t.limits }

// Map moves r to the device of its class, now or later.
func (t *Target) Map(r *block.Request) block.Device {
	c := &t.classes[reads]
	switch {
	case r.Op == block.OpFlush:
		c = &t.classes[flushes]
	case r.Op.Writes():
		c = &t.classes[writes]
	}
	r.Offset += c.Start
	if c.Delay == 0 || !c.wait(r, &t.hurried) {
		return c.Device
	}
	return nil
}

// wait keeps r until its time has come; false: it does not wait.
func (c *class) wait(r *block.Request, hurried *atomic.Bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if hurried.Load() { // under the lock, so that hurry finds what comes before it
		return false
	}
	if c.head > 0 && len(c.queue) == cap(c.queue) {
		c.queue = c.queue[:copy(c.queue, c.queue[c.head:])]
		c.head = 0
	}
	c.queue = append(c.queue, late{r, time.Now().Add(c.Delay)})
	c.ops.Add(1)
	switch {
	case c.timer == nil:
		c.timer = time.AfterFunc(c.Delay, c.due)
	case len(c.queue)-c.head == 1:
		c.timer.Reset(c.Delay)
	}
	return true
}

// due lets all go on whose time has come.
func (c *class) due() {
	c.mu.Lock()
	list := c.takeLocked(time.Now())
	if c.head < len(c.queue) {
		c.timer.Reset(time.Until(c.queue[c.head].due))
	}
	c.mu.Unlock()
	c.submit(list)
}

// hurry lets all go on that wait.
func (c *class) hurry() {
	c.mu.Lock()
	list := c.takeLocked(time.Now().Add(c.Delay))
	if c.timer != nil {
		c.timer.Stop()
	}
	c.mu.Unlock()
	c.submit(list)
}

// takeLocked takes what is due at some time out of the queue.
//
// +checklocks:c.mu
func (c *class) takeLocked(at time.Time) (list block.List) {
	for c.head < len(c.queue) && !c.queue[c.head].due.After(at) {
		list.PushBack(c.queue[c.head].r)
		c.queue[c.head].r = nil
		c.head++
	}
	if c.head == len(c.queue) {
		c.queue, c.head = c.queue[:0], 0
	}
	c.ops.Add(-int64(list.Len()))
	return list
}

// submit lets requests go on.
func (c *class) submit(list block.List) {
	for r := list.PopFront(); r != nil; r = list.PopFront() {
		c.Device.Submit(r)
	}
}

// Preresume has nothing to do.
func (t *Target) Preresume() error { return nil }

// Resume lets requests wait.
func (t *Target) Resume() { t.hurried.Store(false) }

// Presuspend lets all go on that wait, and whatever comes.
func (t *Target) Presuspend() {
	t.hurried.Store(true)
	for i := range t.classes {
		t.classes[i].hurry()
	}
}

// Postsuspend has nothing to do.
func (t *Target) Postsuspend() {}

// TableLine is the paths.
func (t *Target) TableLine() string {
	var words []string
	for i := range t.given {
		c := &t.classes[i]
		words = append(words, fmt.Sprintf("%s %d %d", c.Name, block.SectorFloor(c.Start), c.Delay.Milliseconds()))
	}
	return strings.Join(words, " ")
}

// StatusLine is how many reads, writes and flushes wait.
func (t *Target) StatusLine() string {
	return fmt.Sprintf("%d %d %d", t.classes[reads].ops.Load(), t.classes[writes].ops.Load(), t.classes[flushes].ops.Load())
}
