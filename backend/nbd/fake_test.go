package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"cowherd/block"
)

// fake is an NBD server for tests: it does what it is told to, right or wrong.
type fake struct {
	size       uint64
	flags      uint16
	blockSize  []uint32 // minimum, preferred, maximum; nil: not told
	simple     bool     // refuses structured replies
	noContext  bool     // refuses contextAllocation
	tls        *tls.Config
	greet      func(s *session) bool                                  // instead of the usual greeting; false: hang up
	answer     func(s *session, option uint32, data []byte) (ok bool) // takes an option; false: the usual answer
	serve      func(s *session)                                       // the transmission phase
	wrap       func(number int, c net.Conn) net.Conn                  // what becomes of a connection, counted from 0; nil: itself
	path       string
	done       sync.WaitGroup
	listener   net.Listener
	mu         sync.Mutex
	disconnect int // +checklocks:mu
}

const fakeContext = 77

// session is one connection of a fake.
type session struct {
	fake       *fake
	net        net.Conn
	in         *bufio.Reader
	structured bool
	noZeroes   bool
}

// wireRequest is a request as it came.
type wireRequest struct {
	flags, command uint16
	cookie, offset uint64
	length         uint32
	data           []byte
}

const fakeFlags = 1 | flagFlush | flagFUA | flagTrim | flagWriteZeroes | flagMultiConn | flagFastZero

// start makes the fake listen until the test ends.
func (f *fake) start(t testing.TB) *fake {
	t.Helper()
	f.path = filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", f.path)
	if err != nil {
		t.Fatal(err)
	}
	f.listener = l
	f.done.Go(func() {
		for number := 0; ; number++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if f.wrap != nil {
				c = f.wrap(number, c)
			}
			f.done.Go(func() {
				defer c.Close()
				f.change(func() {}) // what earlier sessions have changed is seen from here on
				s := &session{fake: f, net: c, in: bufio.NewReader(c)}
				if s.handshake() && f.serve != nil {
					f.serve(s)
				}
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		f.done.Wait()
	})
	return f
}

func (f *fake) config() Config { return Config{Network: "unix", Address: f.path, Export: "disk"} }

// open opens the fake's export and closes it when the test ends.
func (f *fake) open(t testing.TB, change ...func(*Config)) *Device {
	t.Helper()
	c := f.config()
	for _, f := range change {
		f(&c)
	}
	d, err := Open(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func (s *session) send(parts ...any) {
	var b []byte
	for _, p := range parts {
		switch p := p.(type) {
		case uint16:
			b = binary.BigEndian.AppendUint16(b, p)
		case uint32:
			b = binary.BigEndian.AppendUint32(b, p)
		case uint64:
			b = binary.BigEndian.AppendUint64(b, p)
		case string:
			b = append(b, p...)
		case []byte:
			b = append(b, p...)
		default:
			panic(fmt.Sprintf("%T", p))
		}
	}
	_, _ = s.net.Write(b) // a client that has gone is the test's own doing
}

func (s *session) handshake() bool {
	if s.fake.greet != nil {
		if !s.fake.greet(s) {
			return false
		}
	} else {
		s.send(uint64(magicInit), uint64(magicOption), uint16(handshakeFixedNewstyle|handshakeNoZeroes))
	}
	var flags [4]byte
	if _, err := io.ReadFull(s.in, flags[:]); err != nil {
		return false
	}
	s.noZeroes = flags[3]&handshakeNoZeroes != 0
	for {
		var head [16]byte
		if _, err := io.ReadFull(s.in, head[:]); err != nil {
			return false
		}
		option := binary.BigEndian.Uint32(head[8:])
		data := make([]byte, binary.BigEndian.Uint32(head[12:]))
		if _, err := io.ReadFull(s.in, data); err != nil {
			return false
		}
		if s.fake.answer != nil && s.fake.answer(s, option, data) {
			continue
		}
		if done, ok := s.option(option, data); done {
			return ok
		}
	}
}

// reply answers an option.
func (s *session) reply(option, reply uint32, parts ...any) {
	var payload []byte
	for _, p := range parts {
		switch p := p.(type) {
		case uint16:
			payload = binary.BigEndian.AppendUint16(payload, p)
		case uint32:
			payload = binary.BigEndian.AppendUint32(payload, p)
		case uint64:
			payload = binary.BigEndian.AppendUint64(payload, p)
		case string:
			payload = append(payload, p...)
		}
	}
	s.send(uint64(magicReply), option, reply, uint32(len(payload)), payload)
}

// option answers as a good server does. done: the handshake is over; ok: the transmission phase begins.
func (s *session) option(option uint32, data []byte) (done, ok bool) {
	f := s.fake
	switch option {
	case optStartTLS:
		if f.tls == nil {
			s.reply(option, repErrUnsupported)
			return false, false
		}
		s.reply(option, repAck)
		s.net = tls.Server(s.net, f.tls)
		s.in = bufio.NewReader(s.net)
	case optStructuredReply:
		if s.structured = !f.simple; f.simple {
			s.reply(option, repErrUnsupported, "too old")
			return false, false
		}
		s.reply(option, repAck)
	case optSetMetaContext:
		if f.noContext {
			s.reply(option, repErrUnsupported)
			return false, false
		}
		s.reply(option, repMetaContext, uint32(fakeContext), contextAllocation)
		s.reply(option, repAck)
	case optGo:
		s.reply(option, repInfo, uint16(1), "a name that nobody asked for")
		s.reply(option, repInfo, uint16(infoExport), f.size, f.flags)
		if f.blockSize != nil {
			s.reply(option, repInfo, uint16(infoBlockSize), f.blockSize[0], f.blockSize[1], f.blockSize[2])
		}
		s.reply(option, repAck)
		return true, true
	case optExportName:
		s.send(f.size, f.flags)
		if !s.noZeroes {
			s.send(make([]byte, exportZeroes))
		}
		return true, true
	case optAbort:
		s.reply(option, repAck)
		return true, false
	default:
		s.reply(option, repErrUnsupported)
	}
	return false, false
}

// next reads a request; nil when the client has gone, or said goodbye.
func (s *session) next() *wireRequest {
	r := s.header()
	if r != nil && r.command == cmdWrite {
		r.data = make([]byte, r.length)
		if _, err := io.ReadFull(s.in, r.data); err != nil {
			return nil
		}
	}
	return r
}

// header is next without the data of a write.
func (s *session) header() *wireRequest {
	var b [requestSize]byte
	if _, err := io.ReadFull(s.in, b[:]); err != nil {
		return nil
	}
	if binary.BigEndian.Uint32(b[:]) != magicRequest {
		panic("the client sent a request without the magic number")
	}
	r := &wireRequest{
		flags: binary.BigEndian.Uint16(b[4:]), command: binary.BigEndian.Uint16(b[6:]),
		cookie: binary.BigEndian.Uint64(b[8:]), offset: binary.BigEndian.Uint64(b[16:]),
		length: binary.BigEndian.Uint32(b[24:]),
	}
	if r.command == cmdDisconnect {
		s.fake.mu.Lock()
		s.fake.disconnect++
		s.fake.mu.Unlock()
		return nil
	}
	return r
}

// change changes the fake for the sessions to come.
func (f *fake) change(how func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	how()
}

func (f *fake) goodbyes() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.disconnect
}

// ok answers r without an error.
func (s *session) ok(r *wireRequest) { s.send(uint32(magicSimple), uint32(0), r.cookie) }

// chunk sends a chunk of a structured reply.
func (s *session) chunk(r *wireRequest, flags, kind uint16, parts ...any) {
	var payload []byte
	for _, p := range parts {
		switch p := p.(type) {
		case uint16:
			payload = binary.BigEndian.AppendUint16(payload, p)
		case uint32:
			payload = binary.BigEndian.AppendUint32(payload, p)
		case uint64:
			payload = binary.BigEndian.AppendUint64(payload, p)
		case string:
			payload = append(payload, p...)
		case []byte:
			payload = append(payload, p...)
		}
	}
	s.send(uint32(magicStructured), flags, kind, r.cookie, uint32(len(payload)), payload)
}

// memory is a serve function over p.
func memory(p []byte) func(s *session) {
	var mu sync.Mutex
	return func(s *session) {
		for r := s.next(); r != nil; r = s.next() {
			mu.Lock()
			switch r.command {
			case cmdRead:
				data := append([]byte(nil), p[r.offset:r.offset+uint64(r.length)]...)
				if s.structured {
					half := len(data) / 2 // backwards, so that the client has to put it in order
					if half > 0 {
						s.chunk(r, 0, chunkData, r.offset+uint64(half), data[half:])
						s.chunk(r, 0, chunkData, r.offset, data[:half])
						s.chunk(r, replyFlagDone, chunkNone)
					} else {
						s.chunk(r, replyFlagDone, chunkData, r.offset, data)
					}
				} else {
					s.ok(r)
					s.send(data)
				}
			case cmdWrite:
				copy(p[r.offset:], r.data)
				s.ok(r)
			case cmdTrim, cmdWriteZeroes:
				clear(p[r.offset : r.offset+uint64(r.length)])
				s.ok(r)
			case cmdFlush:
				s.ok(r)
			case cmdBlockStatus:
				s.chunk(r, replyFlagDone, chunkStatus, uint32(fakeContext), r.length, uint32(0))
			}
			mu.Unlock()
		}
	}
}

// collector is the completer of many requests.
type collector struct {
	mu   sync.Mutex
	errs map[*block.Request]error // +checklocks:mu
	cond *sync.Cond               // +checklocks:mu
}

func newCollector() *collector {
	c := &collector{errs: map[*block.Request]error{}}
	c.cond = sync.NewCond(&c.mu)
	return c
}

func (c *collector) Complete(r *block.Request, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, again := c.errs[r]; again {
		panic("completed twice")
	}
	c.errs[r] = err
	c.cond.Broadcast()
}

// wait waits until n requests are done, and gives all results, which change no more if there were only n.
func (c *collector) wait(t testing.TB, n int) map[*block.Request]error {
	t.Helper()
	watchdog := time.AfterFunc(20*time.Second, func() { panic("requests are lost") })
	defer watchdog.Stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.errs) < n {
		c.cond.Wait()
	}
	return c.errs
}

func (c *collector) submit(d block.Device, op block.Op, flags block.Flags, offset int64, data []byte) *block.Request {
	r := &block.Request{Op: op, Flags: flags, Offset: offset, Length: int64(len(data)), Data: data}
	r.Push(c)
	d.Submit(r)
	return r
}

func wantErrno(t testing.TB, err error, want error) {
	t.Helper()
	if !errors.Is(err, want) || block.Errno(err) != want {
		t.Errorf("got error %v, want one with %v", err, want)
	}
}

// wantText wants an error that says something.
func wantText(t testing.TB, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got error %v, want one with %q", err, want)
	}
}
