package nbd

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"sync/atomic"
	"testing"

	"cowherd/block"
)

// sink is a serve function that answers 4 KiB reads and writes of nothing without allocating, with one write for what
// it finds in its input at once.
func sink(s *session) {
	in, out := bufio.NewReaderSize(s.net, 256<<10), make([]byte, 0, 512<<10)
	var b [requestSize]byte
	for {
		if _, err := io.ReadFull(in, b[:]); err != nil {
			return
		}
		length := int(binary.BigEndian.Uint32(b[24:]))
		switch binary.BigEndian.Uint16(b[6:]) {
		case cmdDisconnect:
			return
		case cmdWrite:
			if _, err := in.Discard(length); err != nil {
				return
			}
			out = binary.BigEndian.AppendUint32(out, magicSimple)
			out = append(append(out, 0, 0, 0, 0), b[8:16]...)
		case cmdRead:
			out = binary.BigEndian.AppendUint32(out, magicStructured)
			out = append(append(out, 0, replyFlagDone, 0, chunkData), b[8:16]...)
			out = binary.BigEndian.AppendUint32(out, uint32(length)+8)
			out = append(out, b[16:24]...)
			out = out[:len(out)+length]
		}
		if in.Buffered() < requestSize || len(out) > 256<<10 {
			if _, err := s.net.Write(out); err != nil {
				return
			}
			out = out[:0]
		}
	}
}

// load keeps requests in flight on one queue.
type load struct {
	d      block.Device
	size   int64
	left   atomic.Int64 // yet to be submitted
	flying atomic.Int64
	done   chan error
}

func (l *load) Complete(r *block.Request, err error) {
	if err == nil && l.left.Add(-1) >= 0 {
		r.Offset = (r.Offset + 7*4096) % (l.size - r.Length + 4096)
		r.Push(l)
		l.d.Submit(r)
		return
	}
	if l.flying.Add(-1) == 0 || err != nil {
		l.done <- err
	}
}

// loads makes depth requests for each of count queues.
type loads struct {
	all      []*load
	requests [][]block.Request
}

func newLoads(d block.Device, count, depth int, op block.Op, length int64) *loads {
	l := &loads{}
	for q := range count {
		l.all = append(l.all, &load{d: d, size: d.Size(), done: make(chan error, depth)})
		list := make([]block.Request, depth)
		for i := range list {
			list[i] = block.Request{Op: op, Queue: block.Queue(q), Offset: int64(i) * length, Length: length,
				Data: make([]byte, length)}
		}
		l.requests = append(l.requests, list)
	}
	return l
}

// run does n requests.
func (l *loads) run(n int) error {
	for q, one := range l.all {
		share := (q+1)*n/len(l.all) - q*n/len(l.all)
		list := l.requests[q]
		list = list[:min(len(list), max(share, 1))]
		one.left.Store(int64(share - len(list)))
		one.flying.Store(int64(len(list)))
		for i := range list {
			list[i].Push(one)
			one.d.Submit(&list[i])
		}
	}
	for _, one := range l.all {
		if err := <-one.done; err != nil {
			return err
		}
	}
	return nil
}

func TestNoAllocations(t *testing.T) {
	f := (&fake{size: 64 << 20, flags: fakeFlags, serve: sink}).start(t)
	d := f.open(t, func(c *Config) { c.Connections = 2 })
	for _, op := range []block.Op{block.OpRead, block.OpWrite} {
		l := newLoads(d, 2, 3*depth/2, op, 4096) // more than the slots
		if err := l.run(10000); err != nil {
			t.Fatal(err)
		}
		const requests = 5000
		perRun := testing.AllocsPerRun(5, func() {
			if err := l.run(requests); err != nil {
				t.Fatal(err)
			}
		})
		if perRun/requests > 0.01 {
			t.Errorf("%v: %.3f allocations per request", op, perRun/requests)
		}
	}
}

func benchmark(b *testing.B, d *Device, op block.Op, depth int, length int64) {
	l := newLoads(d, d.Connections(), depth, op, length)
	if err := l.run(1000); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	b.SetBytes(length)
	b.ResetTimer()
	if err := l.run(b.N); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkSink measures the client against a server in this process that does nothing.
func BenchmarkSink(b *testing.B) {
	for _, op := range []block.Op{block.OpRead, block.OpWrite} {
		for _, connections := range []int{1, 2} {
			for _, depth := range []int{1, 32} {
				b.Run(fmt.Sprintf("%v/connections=%d/depth=%d", op, connections, depth), func(b *testing.B) {
					f := (&fake{size: 64 << 20, flags: fakeFlags, serve: sink}).start(b)
					benchmark(b, f.open(b, func(c *Config) { c.Connections = connections }), op, depth, 4096)
				})
			}
		}
	}
}

// BenchmarkNbdkit measures the client against nbdkit's memory plugin.
func BenchmarkNbdkit(b *testing.B) {
	for _, op := range []block.Op{block.OpRead, block.OpWrite} {
		for _, connections := range []int{1, 2} {
			for _, length := range []int64{4096, 256 << 10} {
				b.Run(fmt.Sprintf("%v/connections=%d/size=%d", op, connections, length), func(b *testing.B) {
					socket, _ := nbdkit(b, "memory", "64M")
					benchmark(b, connectTo(b, "nbd+unix:///?socket="+socket, connections), op, 32, length)
				})
			}
		}
	}
}
