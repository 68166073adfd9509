package nbd

import (
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"cowherd/block"
)

func dupOf(f *os.File) (int, error) { return unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0) }

// loopWire is a wire whose client sends the same requests for ever and takes all replies: what remains is the server.
type loopWire struct {
	requests []byte // one round of them
	idle     func() error
	at       int
	left     int // requests to hand out
	out      int64
}

func (w *loopWire) Read(p []byte) (int, error) {
	if w.left <= 0 {
		if err := w.idle(); err != nil {
			return 0, err
		}
		return 0, io.EOF
	}
	n := copy(p, w.requests[w.at:])
	if w.at += n; w.at == len(w.requests) {
		w.at = 0
		w.left -= loopDepth
		if err := w.idle(); err != nil {
			return 0, err
		}
	}
	return n, nil
}

func (w *loopWire) Write(p []byte) (int, error) {
	w.out += int64(len(p))
	return len(p), nil
}

func (w *loopWire) limitWrite(time.Duration) error { return nil }
func (w *loopWire) hangUp()                        {}
func (w *loopWire) kill()                          {}
func (w *loopWire) Close() error                   { return nil }

const loopDepth = 32

// loopConn is a connection over a loopWire that is to do count requests.
func loopConn(t testing.TB, e *Export, number uint16, structured bool, count int) (*conn, *loopWire) {
	var round []byte
	for i := range loopDepth {
		round = append(round, message(uint32(magicRequest), uint16(0), number, uint64(i), uint64(i*4096), uint32(4096))...)
		if number == cmdWrite {
			round = append(round, make([]byte, 4096)...)
		}
	}
	s, err := NewServer(Config{Exports: exportsOf(e)})
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := net.Pipe()
	t.Cleanup(func() { ours.Close(); theirs.Close() })
	c, err := newConn(s, &negotiation{server: s, export: e, structured: structured}, theirs)
	if err != nil {
		t.Fatal(err)
	}
	w := &loopWire{requests: round, idle: c.idleFunc, left: count}
	c.wire = w
	return c, w
}

// BenchmarkServer is the server's own work for a request of 4 KiB, without system calls: the device does nothing.
func BenchmarkServer(b *testing.B) {
	for _, bc := range []struct {
		name       string
		number     uint16
		structured bool
		device     block.Device
	}{
		{"write", cmdWrite, true, nowDevice{}},
		{"read/simple", cmdRead, false, nowDevice{}},
		{"read/structured", cmdRead, true, nowDevice{}},
		{"write/later", cmdWrite, true, newHandOver(b)},
		{"read/later", cmdRead, true, newHandOver(b)},
	} {
		b.Run(bc.name, func(b *testing.B) {
			b.ReportAllocs()
			c, _ := loopConn(b, &Export{Device: bc.device}, bc.number, bc.structured, b.N)
			b.ResetTimer()
			if err := c.run(); !errors.Is(err, io.EOF) {
				b.Fatal(err)
			}
		})
	}
}

// TestNoAllocations: a request allocates nothing in steady state, whether the device completes it now or later.
func TestNoAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	for _, device := range []block.Device{nowDevice{}, newHandOver(t)} {
		for _, number := range []uint16{cmdRead, cmdWrite} {
			const few, many = 20 * loopDepth, 2000 * loopDepth
			allocated := func(count int) uint64 {
				c, w := loopConn(t, &Export{Device: device}, number, true, count)
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				if err := c.run(); !errors.Is(err, io.EOF) {
					t.Fatal(err)
				}
				runtime.ReadMemStats(&after)
				if w.out == 0 {
					t.Fatal("no replies")
				}
				return after.Mallocs - before.Mallocs
			}
			warm := allocated(few)
			if extra := int64(allocated(many)) - int64(warm); extra > (many-few)/1000 {
				t.Errorf("%T, command %d: %d allocations in %d requests", device, number, extra, many-few)
			}
		}
	}
}

// nowDevice completes at once and moves nothing.
type nowDevice struct{}

func (nowDevice) Submit(r *block.Request) { r.Complete(nil) }
func (nowDevice) Size() int64             { return 1 << 30 }
func (nowDevice) Limits() block.Limits    { return block.NoLimits() }

// handOver completes on another goroutine, without allocating.
type handOver struct {
	nowDevice
	queue chan *block.Request
}

func newHandOver(t testing.TB) *handOver {
	d := &handOver{queue: make(chan *block.Request, 1024)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for r := range d.queue {
			r.Complete(nil)
		}
	}()
	t.Cleanup(func() {
		close(d.queue)
		<-ended
	})
	return d
}

func (d *handOver) Submit(r *block.Request) { d.queue <- r }
