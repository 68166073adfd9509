package nbd

import (
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"cowherd/block"
)

// memoryDevice is a device over a slice. It completes a request later when its offset is odd.
type memoryDevice struct {
	mu   sync.Mutex
	data []byte
}

func (d *memoryDevice) Size() int64          { return int64(len(d.data)) }
func (d *memoryDevice) Limits() block.Limits { return block.NoLimits() }

func (d *memoryDevice) Submit(r *block.Request) {
	if r.Offset&1 != 0 {
		go d.do(r)
		return
	}
	d.do(r)
}

func (d *memoryDevice) do(r *block.Request) {
	d.mu.Lock()
	switch r.Op {
	case block.OpRead:
		copy(r.Data, d.data[r.Offset:r.End()])
	case block.OpWrite:
		copy(d.data[r.Offset:r.End()], r.Data)
	case block.OpWriteZeroes, block.OpDiscard:
		clear(d.data[r.Offset:r.End()])
	}
	d.mu.Unlock()
	r.Complete(nil)
}

func (d *memoryDevice) Extents(offset, length int64, yield func(block.Extent) bool) error {
	half := min(length, max(0, int64(len(d.data))/2-offset))
	if half > 0 && !yield(block.Extent{Offset: offset, Length: half}) {
		return nil
	}
	if half < length {
		yield(block.Extent{Offset: offset + half, Length: length - half, Hole: true, Zero: true})
	}
	return nil
}

// fuzzServer serves a small memory device, the upper half of which looks like a hole.
func fuzzServer(t testing.TB) (*Server, *testExports) {
	exports := exportsOf(&Export{Name: "disk", Device: &memoryDevice{data: make([]byte, 1<<20)}})
	s, err := NewServer(Config{Exports: exports, HandshakeTimeout: time.Second, RequestsMax: 4})
	if err != nil {
		t.Fatal(err)
	}
	return s, exports
}

// feed sends data to the server, takes all that it answers, hangs up and waits for its end.
func feed(t *testing.T, s *Server, exports *testExports, data []byte) {
	ours, theirs := net.Pipe()
	p := &peer{conn: theirs, done: make(chan struct{})}
	go s.serve(p)
	taken := make(chan struct{})
	go func() {
		defer close(taken)
		_, _ = io.Copy(io.Discard, ours)
	}()
	_, _ = ours.Write(data) // fails when the server has had enough
	ours.Close()
	select {
	case <-p.done:
	case <-time.After(testTimeout):
		t.Fatal("the connection does not end")
	}
	<-taken
	if exports.opened.Load() != exports.released.Load() {
		t.Fatal("a reference was not given back")
	}
	if s.memory.Load() != s.config.MemoryMax {
		t.Fatal("memory was not given back")
	}
}

func FuzzHandshake(f *testing.F) {
	option := func(number uint32, data ...any) []byte {
		d := message(data...)
		return message(uint64(magicOption), number, uint32(len(d)), d)
	}
	f.Add(message(uint32(3), option(optList), option(optAbort)))
	f.Add(message(uint32(1), option(optExportName, "disk")))
	f.Add(message(uint32(3), option(optStructuredReply),
		option(optSetMetaContext, text("disk"), uint32(1), text("base:allocation")),
		option(optListMetaContext, text("disk"), uint32(0)),
		option(optGo, text("disk"), uint16(1), uint16(infoBlockSize)),
		uint32(magicRequest), uint16(0), uint16(cmdBlockStatus), uint64(1), uint64(0), uint32(1<<20)))
	f.Add(message(uint32(3), option(optStartTLS), option(99, "what is this"), option(optInfo, text("none"), uint16(0))))
	f.Add(message(uint32(0xffffffff)))
	s, exports := fuzzServer(f)
	f.Fuzz(func(t *testing.T, data []byte) { feed(t, s, exports, data) })
}

func FuzzTransmission(f *testing.F) {
	request := func(number, flags uint16, offset uint64, length uint32, payload ...any) []byte {
		return message(uint32(magicRequest), flags, number, uint64(length), offset, length, message(payload...))
	}
	f.Add(true, request(cmdRead, 0, 0, 4096))
	f.Add(false, message(request(cmdWrite, cmdFlagFUA, 1, 5, "hello"), request(cmdRead, 0, 1, 5), request(cmdFlush, 0, 0, 0)))
	f.Add(true, message(request(cmdRead, cmdFlagDF, 3, 400<<10), request(cmdRead, 0, 300<<10, 400<<10)))
	f.Add(true, message(request(cmdTrim, 0, 0, 1<<20), request(cmdWriteZeroes, cmdFlagFastZero, 0, 1<<20),
		request(cmdCache, 0, 5, 1000), request(cmdBlockStatus, cmdFlagReqOne, 0, 1<<20), request(cmdDisconnect, 0, 0, 0)))
	f.Add(false, request(cmdWrite, 0, 0, 0xffffffff, "not so much"))
	f.Add(true, request(99, 0xffff, 1<<63, 0))
	s, exports := fuzzServer(f)
	f.Fuzz(func(t *testing.T, structured bool, data []byte) {
		b := message(uint32(3))
		if structured {
			b = message(b, uint64(magicOption), uint32(optStructuredReply), uint32(0))
			d := message(text("disk"), uint32(1), text("base:allocation"))
			b = message(b, uint64(magicOption), uint32(optSetMetaContext), uint32(len(d)), d)
		}
		d := message(text("disk"), uint16(0))
		b = message(b, uint64(magicOption), uint32(optGo), uint32(len(d)), d)
		feed(t, s, exports, append(b, data...))
	})
}

func FuzzOptionData(f *testing.F) {
	f.Add(message(text("disk"), uint16(1), uint16(3)))
	f.Add(message(text("disk"), uint32(2), text("base:"), text("x:y")))
	f.Fuzz(func(t *testing.T, data []byte) {
		if name, wanted, ok := decodeInfo(data); ok {
			b := message(text(name), uint16(len(wanted)))
			for _, w := range wanted {
				b = be.AppendUint16(b, w)
			}
			if string(b) != string(data) {
				t.Errorf("%x decodes to %q and %v", data, name, wanted)
			}
		}
		if name, queries, ok := decodeMetaContext(data); ok {
			b := message(text(name), uint32(len(queries)))
			for _, q := range queries {
				b = append(b, text(q)...)
			}
			if string(b) != string(data) {
				t.Errorf("%x decodes to %q and %q", data, name, queries)
			}
		}
	})
}

func FuzzCommand(f *testing.F) {
	f.Add(message(uint32(magicRequest), uint16(1), uint16(2), uint64(3), uint64(4), uint32(5)))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) < requestSize {
			return
		}
		var q command
		if ok := decodeCommand(data, &q); ok != (be.Uint32(data) == magicRequest) {
			t.Fatal("the magic number was not looked at")
		} else if !ok {
			return
		}
		b := message(uint32(magicRequest), q.flags, q.number, q.cookie, q.offset, q.length)
		if string(b) != string(data[:requestSize]) {
			t.Errorf("%x decodes to %+v", data, q)
		}
	})
}
