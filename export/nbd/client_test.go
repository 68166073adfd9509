package nbd

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testTimeout ends a test that waits for something that does not come.
const testTimeout = 20 * time.Second

// testServer is a server on a unix socket, shut down at the end of the test.
type testServer struct {
	*Server
	t       testing.TB
	socket  string
	exports *testExports
}

// startServer serves exports with config (whose Exports is set here).
func startServer(t testing.TB, config Config, exports ...*Export) *testServer {
	t.Helper()
	s := &testServer{t: t, socket: socketPath(t), exports: exportsOf(exports...)}
	config.Exports = s.exports
	var err error
	if s.Server, err = NewServer(config); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", s.socket)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if err := <-served; !errors.Is(err, ErrServerClosed) {
			t.Errorf("Serve ended with %v", err)
		}
		if opened, released := s.exports.opened.Load(), s.exports.released.Load(); opened != released {
			t.Errorf("%d references taken, %d given back", opened, released)
		}
		if config := s.config; s.memory.Load() != config.MemoryMax {
			t.Errorf("%d bytes of memory were not given back", config.MemoryMax-s.memory.Load())
		}
	})
	return s
}

// client speaks the protocol byte by byte.
type client struct {
	t    testing.TB
	conn net.Conn
}

func (s *testServer) dial() *client {
	s.t.Helper()
	c, err := net.Dial("unix", s.socket)
	if err != nil {
		s.t.Fatal(err)
	}
	return newClient(s.t, c)
}

func newClient(t testing.TB, c net.Conn) *client {
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(testTimeout)); err != nil {
		t.Fatal(err)
	}
	return &client{t, c}
}

// message concatenates integers (big endian), texts and bytes.
func message(parts ...any) []byte {
	var b []byte
	for _, p := range parts {
		switch p := p.(type) {
		case uint16:
			b = be.AppendUint16(b, p)
		case uint32:
			b = be.AppendUint32(b, p)
		case uint64:
			b = be.AppendUint64(b, p)
		case string:
			b = append(b, p...)
		case []byte:
			b = append(b, p...)
		default:
			panic("message: what is this?")
		}
	}
	return b
}

func (c *client) send(parts ...any) {
	c.t.Helper()
	if _, err := c.conn.Write(message(parts...)); err != nil {
		c.t.Fatalf("send: %v", err)
	}
}

func (c *client) receive(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if k, err := io.ReadFull(c.conn, b); err != nil {
		c.t.Fatalf("receive: %v after %d of %d bytes: %x", err, k, n, b[:min(k, 64)])
	}
	return b
}

// expect receives exactly what is given.
func (c *client) expect(parts ...any) {
	c.t.Helper()
	want := message(parts...)
	got := c.receive(len(want))
	if !bytes.Equal(got, want) {
		c.t.Fatalf("received\n%x, want\n%x", got[:min(len(got), 256)], want[:min(len(want), 256)])
	}
}

// expectEnd waits for the server to close the connection, having sent nothing more.
func (c *client) expectEnd() {
	c.t.Helper()
	b, err := io.ReadAll(c.conn)
	var netErr net.Error
	if errors.As(err, &netErr) && netErr.Timeout() {
		c.t.Fatal("the connection stays open")
	}
	if len(b) > 0 {
		c.t.Fatalf("received %x before the end", b[:min(len(b), 256)])
	}
}

// greet does the start of a handshake.
func (c *client) greet() {
	c.t.Helper()
	c.expect(uint64(magicServer), uint64(magicOption), uint16(3))
	c.send(uint32(3))
}

func (c *client) option(number uint32, data ...any) {
	c.t.Helper()
	d := message(data...)
	c.send(uint64(magicOption), number, uint32(len(d)), d)
}

func (c *client) expectReply(option, kind uint32, data ...any) {
	c.t.Helper()
	d := message(data...)
	c.expect(uint64(magicReply), option, kind, uint32(len(d)), d)
}

// expectRefusal receives an error reply with any message.
func (c *client) expectRefusal(option, kind uint32) {
	c.t.Helper()
	c.expect(uint64(magicReply), option, kind)
	c.receive(int(be.Uint32(c.receive(4))))
}

// text is a string with its length in front.
func text(s string) []byte { return message(uint32(len(s)), s) }

// enter goes to the transmission phase of the export named name.
func (c *client) enter(name string, structured bool) {
	c.t.Helper()
	c.greet()
	if structured {
		c.option(optStructuredReply)
		c.expectReply(optStructuredReply, repAck)
	}
	c.goTo(name)
}

func (c *client) goTo(name string) {
	c.t.Helper()
	c.option(optGo, text(name), uint16(0))
	for {
		h := c.receive(20)
		if kind := be.Uint32(h[12:]); kind == repAck {
			return
		} else if kind != repInfo {
			c.t.Fatalf("GO: reply %#x", kind)
		}
		c.receive(int(be.Uint32(h[16:])))
	}
}

// request sends a command; payload follows for a write.
func (c *client) request(number, flags uint16, cookie, offset uint64, length uint32, payload ...any) {
	c.t.Helper()
	c.send(uint32(magicRequest), flags, number, cookie, offset, length, message(payload...))
}

func (c *client) expectSimple(cookie uint64, wireError uint32, data ...any) {
	c.t.Helper()
	c.expect(uint32(magicSimple), wireError, cookie, message(data...))
}

func (c *client) expectChunk(flags, kind uint16, cookie uint64, payload ...any) {
	c.t.Helper()
	p := message(payload...)
	c.expect(uint32(magicChunk), flags, kind, cookie, uint32(len(p)), p)
}

// expectError receives an error, in the form that the connection has for it.
func (c *client) expectError(structured bool, cookie uint64, wireError uint32) {
	c.t.Helper()
	if !structured {
		c.expectSimple(cookie, wireError)
		return
	}
	c.expect(uint32(magicChunk), uint16(chunkFlagDone), uint16(chunkError), cookie)
	b := c.receive(int(be.Uint32(c.receive(4))))
	if got := be.Uint32(b); got != wireError {
		c.t.Fatalf("error %d (%s), want %d", got, b[6:], wireError)
	}
	if n := int(be.Uint16(b[4:])); n == 0 || n != len(b)-6 {
		c.t.Fatalf("error message of %d bytes in %d", n, len(b))
	}
}

// disconnect ends the transmission phase and waits for the server to close the connection.
func (c *client) disconnect() {
	c.t.Helper()
	c.request(cmdDisconnect, 0, 0, 0, 0)
	c.expectEnd()
}

// startTLS upgrades the connection.
func (c *client) startTLS(config *tls.Config) error {
	c.t.Helper()
	c.option(optStartTLS)
	c.expectReply(optStartTLS, repAck)
	session := tls.Client(c.conn, config)
	if err := session.Handshake(); err != nil {
		return err
	}
	c.conn = session
	return nil
}
