package nbd

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"cowherd/block"
)

// script is a stream that gives bytes and takes everything.
type script struct {
	begin  chan struct{} // closed: reads may begin
	mu     sync.Mutex
	rest   []byte // +checklocks:mu
	closed bool   // +checklocks:mu
}

func newScript(b []byte) *script { return &script{begin: make(chan struct{}), rest: b} }

func (s *script) Read(p []byte) (int, error) {
	<-s.begin
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.rest) == 0 || s.closed {
		return 0, io.EOF
	}
	n := copy(p, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

func (s *script) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, net.ErrClosed
	}
	return len(p), nil
}

func (s *script) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return nil
}

func (s *script) LocalAddr() net.Addr              { return nil }
func (s *script) RemoteAddr() net.Addr             { return nil }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

// reply is a structured reply for the seeds.
func reply(flags, kind uint16, cookie uint64, payload ...byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, magicStructured)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...)
}

// FuzzReplies has a server send any bytes while a read, a write, a flush and a query are in flight, in slots 127 to
// 124 and 128. Each must be completed once, and no goroutine may be left.
func FuzzReplies(f *testing.F) {
	const readCookie, writeCookie, flushCookie, queryCookie = 1<<16 | 127, 1<<16 | 126, 1<<16 | 125, 1<<16 | statusSlot
	simple := func(cookie uint64, code uint32, data ...byte) []byte {
		b := binary.BigEndian.AppendUint32(nil, magicSimple)
		b = binary.BigEndian.AppendUint32(b, code)
		return append(binary.BigEndian.AppendUint64(b, cookie), data...)
	}
	at := binary.BigEndian.AppendUint64(nil, 4096)
	data := append(at, make([]byte, 16)...)
	hole := binary.BigEndian.AppendUint32(at, 16)
	status := []byte{0, 0, 0, fakeContext, 0, 0, 16, 0, 0, 0, 0, 3}
	f.Add(true, reply(1, chunkData, readCookie, data...))
	f.Add(true, append(reply(0, chunkHole, readCookie, hole...), reply(1, chunkNone, readCookie)...))
	f.Add(true, append(reply(0, chunkData, readCookie, data[:16]...),
		reply(1, chunkError, readCookie, 0, 0, 0, 5, 0, 1, 'x')...))
	f.Add(true, append(reply(1, chunkStatus, queryCookie, status...), simple(writeCookie, 28)...))
	f.Add(true, reply(1, chunkErrorOffset, writeCookie, 0, 0, 0, 108, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))
	f.Add(false, append(simple(readCookie, 0, make([]byte, 16)...), simple(flushCookie, 0)...))
	f.Add(false, append(simple(writeCookie, 0), simple(writeCookie, 0)...))
	f.Fuzz(func(t *testing.T, structured bool, b []byte) {
		e := export{size: 1 << 20, flags: fakeFlags, structured: structured, allocation: structured, context: fakeContext}
		if err := e.settle(nil); err != nil {
			t.Fatal(err)
		}
		s := newScript(b)
		d := newDevice(Config{}, []net.Conn{s}, []export{e})
		c := d.conns[0]
		done, requests := newCollector(), []block.Request{
			{Op: block.OpRead, Offset: 4096, Length: 16, Data: make([]byte, 16)},
			{Op: block.OpWrite, Offset: 0, Length: 16, Data: make([]byte, 16)},
			{Op: block.OpFlush},
		}
		for i := range requests {
			requests[i].Push(done)
			d.conns[0].submit(&requests[i])
		}
		queried := make(chan struct{})
		if structured {
			go func() {
				defer close(queried)
				_ = d.Extents(0, 4096, func(block.Extent) bool { return true }) // nil or not, as the bytes have it
			}()
		} else {
			close(queried)
		}
		for sent := false; !sent; runtime.Gosched() {
			c.mu.Lock()
			sent = c.inflight == 3 && !structured || c.inflight == 4
			sent = sent && c.queueLen == 0 && !c.sending
			c.mu.Unlock()
		}
		close(s.begin)
		done.wait(t, len(requests))
		<-queried
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
}

// FuzzHandshake has a server send any bytes in the handshake.
func FuzzHandshake(f *testing.F) {
	greeting := binary.BigEndian.AppendUint64(nil, magicInit)
	greeting = binary.BigEndian.AppendUint64(greeting, magicOption)
	answer := func(option, reply uint32, payload ...byte) []byte {
		b := binary.BigEndian.AppendUint64(nil, magicReply)
		b = binary.BigEndian.AppendUint32(b, option)
		b = binary.BigEndian.AppendUint32(b, reply)
		return append(binary.BigEndian.AppendUint32(b, uint32(len(payload))), payload...)
	}
	join := func(parts ...[]byte) (all []byte) {
		for _, p := range parts {
			all = append(all, p...)
		}
		return all
	}
	info := answer(optGo, repInfo, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 1)
	sizes := answer(optGo, repInfo, 0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 0, 1, 0, 0)
	f.Add(join(greeting, []byte{0, 3}, answer(optStructuredReply, repAck),
		answer(optSetMetaContext, repMetaContext, 0, 0, 0, 1, 'x'),
		answer(optSetMetaContext, repAck), info, sizes, answer(optGo, repAck)))
	f.Add(join(greeting, []byte{0, 1}, answer(optStructuredReply, repErrUnsupported),
		answer(optGo, repErrUnsupported), make([]byte, 134)))
	f.Add(join(greeting, []byte{0, 0}, make([]byte, 134)))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := newScript(b)
		close(s.begin)
		h := handshake{stream: s, config: &Config{Network: "unix", Export: "disk"}}
		if err := h.runUntil(context.Background()); err != nil {
			return
		}
		e := &h.export
		if e.size < 0 || e.size%int64(e.logicalBlock) != 0 || e.partMax <= 0 || e.partMax%int64(e.logicalBlock) != 0 ||
			e.preferredIO < e.logicalBlock {
			t.Errorf("the handshake agreed on %+v", *e)
		}
	})
}
