package bench

import (
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"cowherd/block"
	"cowherd/internal/invariant"
)

// mediaWindow is how much memory a media device has: more than the caches of a CPU, so that what is copied comes from
// memory and goes there.
const mediaWindow = 64 << 20

// mediaCommandMax is the most that one copy command copies, and mediaCommands how many at a time are of use: as the null
// device has it.
const (
	mediaCommandMax = 1 << 20
	mediaCommands   = 4
)

// media is a device of any length whose reads and writes move memory, as those of a disk behind a page cache do, and
// whose set-up costs nothing: offsets wrap around in mediaWindow, and nothing is kept. It lends no memory, so that a copy
// by reading and writing costs the host two passes, and it has a copy command, of one of two kinds:
//
//	by itself   the data does not pass the host's processors. The caller sleeps in the kernel, as in an ioctl, until the
//	            data has been moved at the controller's rate and the latency is over, and for as long as it takes to wake it
//	emulated    what the kernel's patches do where a device has no copy command: the processor that gives the command reads
//	            to a buffer and writes from there, and only then returns
type media struct {
	size    int64
	memory  []byte
	windows *windows
	command *mediaCommand // all devices of a run have the same; nil: there is none
}

// windows are the memory of media devices by their roles. It is kept from run to run.
type windows struct {
	memory map[string][]byte
	race   sync.Mutex // see media.move
}

// of gives the memory of a role, all of which has been touched.
func (w *windows) of(role string) []byte {
	p := w.memory[role]
	if p == nil {
		p = make([]byte, mediaWindow)
		for i := range p {
			p[i] = byte(i>>9) | 1
		}
		w.memory[role] = p
	}
	return p
}

// mediaCommand is the copy command of devices that can copy from each other.
type mediaCommand struct {
	emulated bool
	latency  time.Duration
	rate     int64 // bytes a second, of all commands together; 0: at once
	start    time.Time
	busy     atomic.Int64 // until then, in nanoseconds since start, the medium is taken
	buffers  sync.Pool    // of *[mediaCommandMax]byte
}

func newMediaCommand(c *Cell) *mediaCommand {
	return &mediaCommand{
		emulated: c.Offload == offloadEmulated, latency: c.CopyLatency, rate: c.CopyBandwidth, start: time.Now(),
		buffers: sync.Pool{New: func() any { return new([mediaCommandMax]byte) }},
	}
}

func (d *media) Size() int64          { return d.size }
func (d *media) Limits() block.Limits { return block.NoLimits() }
func (d *media) IsImmediate() bool    { return true }

// Submit does r at once.
func (d *media) Submit(r *block.Request) { r.Complete(d.Perform(r)) }

// Perform does r. What else than a read or a write it is costs nothing.
func (d *media) Perform(r *block.Request) error {
	switch r.Op {
	case block.OpRead:
		d.move(r.Data, r.Offset, false)
	case block.OpWrite:
		d.move(r.Data, r.Offset, true)
	}
	return nil
}

// move moves data from the memory at offset, or there. Requests for different places may be for the same memory, which is
// no matter, but that builds that look for races would find one.
func (d *media) move(data []byte, offset int64, write bool) {
	if invariant.Enabled {
		d.windows.race.Lock()
		defer d.windows.race.Unlock()
	}
	for len(data) > 0 {
		place := d.memory[offset%int64(len(d.memory)):]
		n := 0
		if write {
			n = copy(place, data)
		} else {
			n = copy(data, place)
		}
		data, offset = data[n:], offset+int64(n)
	}
}

// CopyOffers are the copy command, from a device that has the same.
func (d *media) CopyOffers(source block.Device) []block.CopyOffer {
	s, ok := source.(*media)
	if !ok || d.command == nil || s.command != d.command {
		return nil
	}
	return []block.CopyOffer{{Method: block.CopyDevice, Granularity: 512, LengthMax: mediaCommandMax, Concurrency: mediaCommands}}
}

// Copy is one copy command.
func (d *media) Copy(_ block.CopyMethod, source block.Device, from, to, length int64) (int64, error) {
	c := d.command
	if !c.emulated {
		c.wait(length)
		return length, nil
	}
	buffer := c.buffers.Get().(*[mediaCommandMax]byte)
	source.(*media).move(buffer[:length], from, false)
	d.move(buffer[:length], to, true)
	c.buffers.Put(buffer)
	return length, nil
}

// wait sleeps until length bytes have been moved, behind what others have begun to move, and for the latency.
func (c *mediaCommand) wait(length int64) {
	now := int64(time.Since(c.start))
	var due int64
	for {
		busy := c.busy.Load()
		due = max(busy, now)
		if c.rate > 0 {
			due += int64(float64(length) / float64(c.rate) * float64(time.Second))
		}
		if c.busy.CompareAndSwap(busy, due) {
			break
		}
	}
	sleepExactly(time.Duration(due-now) + c.latency)
}

// sleepExactly sleeps in the kernel, by a timer without slack: it wakes late by no more than that takes.
func sleepExactly(d time.Duration) {
	if d <= 0 {
		return
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0) // it would wake later
	t := unix.NsecToTimespec(int64(d))
	_ = unix.Nanosleep(&t, nil) // a signal shortens it
}
