package nbd

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cowherd/block"
)

// heldDevice keeps the requests that hold chooses until they are let go.
type heldDevice struct {
	*fileDevice
	hold func(*block.Request) bool
	held chan *block.Request
}

func newHeldDevice(t testing.TB, hold func(*block.Request) bool) *heldDevice {
	return &heldDevice{fileDevice: newFileDevice(t, testSize), hold: hold, held: make(chan *block.Request, 1024)}
}

func (d *heldDevice) Submit(r *block.Request) {
	if d.hold(r) {
		d.held <- r
		return
	}
	d.fileDevice.Submit(r)
}

func holdWrites(r *block.Request) bool { return r.Op == block.OpWrite }

// next waits for a request that is held.
func (d *heldDevice) next(t testing.TB) *block.Request {
	t.Helper()
	select {
	case r := <-d.held:
		return r
	case <-time.After(testTimeout):
		t.Fatal("no request reached the device")
		return nil
	}
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	t.Cleanup(cancel)
	return ctx
}

// TestShutdownFinishesRequests: what is in flight is finished and answered before the connection ends.
func TestShutdownFinishesRequests(t *testing.T) {
	d := newHeldDevice(t, holdWrites)
	s := startServer(t, Config{}, &Export{Name: "disk", Device: d})
	c, handshake := s.dial(), s.dial()
	handshake.greet()
	c.enter("disk", true)
	c.request(cmdWrite, 0, 1, 0, 512, make([]byte, 512))
	r := d.next(t)
	ended := make(chan error, 1)
	go func() { ended <- s.Shutdown(testContext(t)) }()
	handshake.expectEnd()
	select {
	case err := <-ended:
		t.Fatalf("Shutdown did not wait: %v", err)
	default:
	}
	d.fileDevice.Submit(r)
	c.expectSimple(1, 0)
	c.expectEnd()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if _, err := net.Dial("unix", s.socket); err == nil {
		t.Error("the server still accepts connections")
	}
	l, err := net.Listen("unix", socketPath(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Serve(l); !errors.Is(err, ErrServerClosed) {
		t.Errorf("Serve after Shutdown: %v", err)
	}
}

// TestShutdownServesWhatArrived: requests that the client sent before are answered, though the server is stopping.
func TestShutdownServesWhatArrived(t *testing.T) {
	d := newHeldDevice(t, func(r *block.Request) bool { return r.Op == block.OpFlush })
	blocked := make(chan struct{})
	slow := &blockingDevice{heldDevice: d, until: blocked}
	s := startServer(t, Config{}, &Export{Name: "disk", Device: slow})
	c := s.dial()
	c.enter("disk", false)
	c.request(cmdFlush, 0, 1, 0, 0)
	d.next(t) // the connection's goroutine is in Submit now
	for i := range 20 {
		c.request(cmdWrite, 0, uint64(10+i), 0, 512, make([]byte, 512))
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Shutdown(testContext(t)) }()
	for s.phaseOf(0) == nil || !s.phaseOf(0).stopping.Load() {
		runtime.Gosched()
	}
	close(blocked)
	c.expectSimple(1, 0)
	for i := range 20 {
		c.expectSimple(uint64(10+i), 0)
	}
	c.expectEnd()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// blockingDevice makes the submitter of a held request wait, then does it.
type blockingDevice struct {
	*heldDevice
	until chan struct{}
}

func (d *blockingDevice) Submit(r *block.Request) {
	if d.hold(r) {
		d.held <- r
		<-d.until
	}
	d.fileDevice.Submit(r)
}

// phaseOf is the i-th connection's transmission phase.
func (s *testServer) phaseOf(i int) *conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	for p := range s.peers {
		if p.phase == nil {
			continue
		}
		if i == 0 {
			return p.phase
		}
		i--
	}
	return nil
}

// connections waits for so many connections: a client is told of its own a little before the server's side begins.
func (s *testServer) connections(count int) []ConnectionInfo {
	for s.phaseOf(count-1) == nil {
		time.Sleep(time.Millisecond)
	}
	return s.Connections()
}

// TestShutdownGivesUp: a client that takes no replies is cut off when the context ends.
func TestShutdownGivesUp(t *testing.T) {
	s := startServer(t, Config{}, &Export{Name: "disk", Device: newFileDevice(t, 8<<20)})
	c := s.dial()
	c.enter("disk", false)
	for s.phaseOf(0) == nil { // the client is told a little before the server's side begins
		time.Sleep(time.Millisecond)
	}
	for i := range 8 {
		c.request(cmdRead, 0, uint64(i), 0, 8<<20)
	}
	ctx, cancel := context.WithCancel(testContext(t))
	cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Shutdown: %v", err)
	}
	if err := s.Shutdown(testContext(t)); err != nil {
		t.Errorf("second Shutdown: %v", err)
	}
}

func TestDisconnect(t *testing.T) {
	d := newHeldDevice(t, holdWrites)
	s := startServer(t, Config{}, &Export{Name: "a", Device: d}, &Export{Name: "b", Device: newFileDevice(t, testSize)})
	a1, a2, b := s.dial(), s.dial(), s.dial()
	a1.enter("a", true)
	a2.enter("", true) // the default, which is a
	b.enter("b", true)
	a1.request(cmdWrite, 0, 1, 0, 512, make([]byte, 512))
	r := d.next(t)
	ended := make(chan error, 1)
	go func() { ended <- s.Disconnect(testContext(t), "a") }()
	a2.expectEnd()
	d.fileDevice.Submit(r)
	a1.expectSimple(1, 0)
	a1.expectEnd()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if got := s.exports.released.Load(); got != 2 {
		t.Errorf("%d references given back", got)
	}
	b.request(cmdRead, 0, 1, 0, 1)
	b.expectChunk(chunkFlagDone, chunkOffsetData, 1, uint64(0), "\x00")
	b.disconnect()
	if err := s.Disconnect(testContext(t), "a"); err != nil {
		t.Error(err)
	}
}

// TestStalledClient: who does not read replies keeps nobody else from being served.
func TestStalledClient(t *testing.T) {
	for _, kind := range []string{"now", "later"} {
		d := newLaterDevice(t, 64<<20, kind)
		s := startServer(t, Config{MemoryMax: LengthMax}, &Export{Name: "disk", Device: d})
		bad := s.dial()
		bad.enter("disk", false)
		for i := range 40 { // more than the memory of all connections, if all were read at once
			bad.request(cmdRead, 0, uint64(i), 0, 1<<20)
			bad.request(cmdRead, 0, uint64(1000+i), 0, 4096)
		}
		good := s.dial()
		good.enter("disk", true)
		for i := range 50 {
			good.request(cmdRead, 0, uint64(i), 4096, 4096)
			good.expectChunk(chunkFlagDone, chunkOffsetData, uint64(i), uint64(4096), make([]byte, 4096))
			good.request(cmdWrite, 0, uint64(i), 1<<20, 300<<10, make([]byte, 300<<10))
			good.expectSimple(uint64(i), 0)
			good.request(cmdRead, 0, uint64(i), 1<<20, 300<<10)
			good.readReply(true, uint64(i), 1<<20, 300<<10)
		}
		good.disconnect()
		bad.conn.Close()
	}
}

// TestWriteTimeout: a client that takes no replies is cut off, if that is wanted.
func TestWriteTimeout(t *testing.T) {
	s := startServer(t, Config{WriteTimeout: 20 * time.Millisecond},
		&Export{Name: "disk", Device: newFileDevice(t, 8<<20)})
	c := s.dial()
	c.enter("disk", false)
	for s.phaseOf(0) == nil { // the client is told a little before the server's side begins
		time.Sleep(time.Millisecond)
	}
	for i := range 8 {
		c.request(cmdRead, 0, uint64(i), 0, 8<<20)
	}
	for s.phaseOf(0) != nil {
		time.Sleep(time.Millisecond)
	}
	if _, err := io.Copy(io.Discard, c.conn); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Error(err)
	}
}

// TestRequestsMax: no more requests are taken from the stream than may be in flight.
func TestRequestsMax(t *testing.T) {
	d := newHeldDevice(t, holdWrites)
	s := startServer(t, Config{RequestsMax: 4}, &Export{Name: "disk", Device: d})
	c := s.dial()
	c.enter("disk", false)
	c.request(cmdRead, 0, 100, 0, 1)
	for i := range 10 {
		c.request(cmdWrite, 0, uint64(i), uint64(512*i), 512, make([]byte, 512))
	}
	c.expectSimple(100, 0, "\x00") // not kept back while the rest waits
	var held []*block.Request
	for range 4 {
		held = append(held, d.next(t))
	}
	for s.Connections()[0].InFlight != 4 {
		runtime.Gosched()
	}
	if len(d.held) != 0 {
		t.Error("a fifth request reached the device")
	}
	done := map[uint64]bool{}
	for range 10 {
		d.fileDevice.Submit(held[0])
		held = held[1:]
		b := c.receive(simpleSize)
		done[be.Uint64(b[8:])] = true
		if len(held)+len(done) < 10 {
			held = append(held, d.next(t))
		}
	}
	if len(done) != 10 {
		t.Errorf("replies to %v", done)
	}
	c.disconnect()
}

func TestConnections(t *testing.T) {
	s := startServer(t, Config{}, testExport(t))
	if got := s.Connections(); len(got) != 0 {
		t.Errorf("%+v", got)
	}
	a, b := s.dial(), s.dial()
	a.enter("disk", true)
	b.enter("", false)
	a.request(cmdWrite, 0, 1, 0, 4096, make([]byte, 4096))
	a.expectSimple(1, 0)
	a.request(cmdRead, 0, 1, testSize, 1)
	a.expectError(true, 1, wireInvalid)
	got := s.connections(2)
	if len(got) != 2 {
		t.Fatalf("%+v", got)
	}
	i := got[0]
	if i.Export != "disk" || i.TLS || i.BytesIn != 4096 || i.BytesOut != 0 || i.InFlight != 0 || i.Since.IsZero() ||
		!strings.HasPrefix(i.Client, "unix (pid ") {
		t.Errorf("%+v", i)
	}
	if w, r := i.Commands["write"], i.Commands["read"]; w != (Command{1, 4096, 0}) || r != (Command{1, 0, 1}) {
		t.Errorf("write %+v, read %+v", w, r)
	}
	if got[1].Export != "disk" || got[1].Queue == i.Queue || got[1].ID <= i.ID {
		t.Errorf("%+v", got[1])
	}
	a.disconnect()
	b.disconnect()
}

// queueDevice notes the queues of its requests.
type queueDevice struct {
	*fileDevice
	seen sync.Map
}

func (d *queueDevice) Submit(r *block.Request) {
	d.seen.Store(r.Queue, true)
	d.fileDevice.Submit(r)
}

func TestQueues(t *testing.T) {
	d := &queueDevice{fileDevice: newFileDevice(t, testSize)}
	s := startServer(t, Config{}, &Export{Name: "disk", Device: d})
	for range 3 {
		c := s.dial()
		c.enter("disk", false)
		c.request(cmdWrite, 0, 1, 0, 4, "abcd")
		c.expectSimple(1, 0)
		c.request(cmdTrim, 0, 2, 0, 4)
		c.expectSimple(2, 0)
		c.request(cmdRead, 0, 3, 0, 256<<10)
		c.readReply(false, 3, 0, 256<<10)
		c.disconnect()
	}
	for q := range 3 {
		if _, ok := d.seen.LoadAndDelete(block.Queue(q)); !ok {
			t.Errorf("no request on queue %d", q)
		}
	}
	d.seen.Range(func(q, _ any) bool {
		t.Errorf("a request on queue %v", q)
		return true
	})
}

// TestSlowDeviceIsParallel: requests of one connection to a device that keeps its submitter are handed to several
// goroutines, and to none again when it has become fast.
func TestSlowDeviceIsParallel(t *testing.T) {
	d := &gatedDevice{fileDevice: newFileDevice(t, testSize)}
	d.slow.Store(true)
	s := startServer(t, Config{}, &Export{Name: "disk", Device: d})
	c := s.dial()
	c.enter("disk", false)
	const count = 64
	for round := 0; d.most.Load() < 4; round++ {
		for i := range count {
			c.request(cmdRead, 0, uint64(i), uint64(i*512), 512)
		}
		for range count {
			c.receive(simpleSize + 512)
		}
		if round > 50 {
			t.Fatalf("at most %d at a time", d.most.Load())
		}
	}
	d.slow.Store(false)
	p := &s.phaseOf(0).pace[paceRead]
	for round := 0; p.slow(); round++ {
		for i := range count {
			c.request(cmdRead, 0, uint64(i), uint64(i*512), 512)
		}
		for range count {
			c.receive(simpleSize + 512)
		}
		if round > 1000 {
			t.Fatal("the workers keep a fast device")
		}
	}
	c.disconnect()
}

// gatedDevice takes a while for each request and counts how many wait at a time.
type gatedDevice struct {
	*fileDevice
	slow      atomic.Bool
	now, most atomic.Int64
}

func (d *gatedDevice) Submit(r *block.Request) {
	n := d.now.Add(1)
	for m := d.most.Load(); n > m && !d.most.CompareAndSwap(m, n); m = d.most.Load() {
	}
	if d.slow.Load() {
		time.Sleep(10 * slowAfter)
	}
	d.now.Add(-1)
	d.fileDevice.Submit(r)
}

func TestPace(t *testing.T) {
	var p pace
	for range 7 {
		p.note(time.Second, 0)
	}
	if p.slow() {
		t.Error("slow too soon")
	}
	p.note(time.Second, 0)
	if !p.slow() {
		t.Error("not slow")
	}
	for range 1000 {
		p.note(time.Second, 0)
	}
	n := 0
	for ; p.slow(); n++ {
		p.note(slowAfter+100*time.Microsecond, 100<<10)
	}
	if n != paceLimit-paceFast {
		t.Errorf("fast again after %d", n)
	}
	for range 10000 { // one in ten
		p.note(time.Second, 0)
		for range 9 {
			p.note(time.Microsecond, 0)
		}
	}
	if p.slow() {
		t.Error("now and then is not slow")
	}
}

func TestMemory(t *testing.T) {
	for _, tc := range []struct{ size, round int }{
		{1, 4096}, {4096, 4096}, {4097, 8192}, {pieceSize, pieceSize}, {pieceSize + 1, pieceSize + 1},
	} {
		if got := roundSize(tc.size); got != tc.round {
			t.Errorf("%d: rounded to %d, want %d", tc.size, got, tc.round)
		}
	}
	s, err := NewServer(Config{Exports: exportsOf(), BytesMax: 1, MemoryMax: 1})
	if err != nil {
		t.Fatal(err)
	}
	a, b := &conn{server: s}, &conn{server: s}
	a.freed.L, b.freed.L = &a.mu, &b.mu
	all := a.tryAcquire(LengthMax)
	if all == nil || a.tryAcquire(1) != nil {
		t.Fatal("the limits do not hold")
	}
	reserve := b.tryAcquire(pieceSize)
	if reserve == nil || b.tryAcquire(1) != nil || b.tryAcquire(pieceSize+1) != nil {
		t.Fatal("the reserve is one piece for each connection")
	}
	b.release(reserve)
	a.release(all)
	if got := s.memory.Load(); got != LengthMax || a.bytes != 0 || b.bytes != 0 {
		t.Errorf("%d bytes left of %d, %d and %d held", got, LengthMax, a.bytes, b.bytes)
	}
	if again := b.tryAcquire(pieceSize); again != reserve || again.reserve {
		t.Error("a free buffer is not used again")
	}
	var buffers []*buffer
	for range keptMax/pieceSize + 4 {
		buffers = append(buffers, a.tryAcquire(pieceSize))
	}
	for _, x := range buffers {
		a.release(x)
	}
	if a.keptBytes != keptMax {
		t.Errorf("%d free bytes are kept", a.keptBytes)
	}
	a.broken = true
	if _, err := a.acquire(LengthMax+1, nil); !errors.Is(err, errBroken) {
		t.Errorf("acquire on a broken connection: %v", err)
	}
}

// TestPipe serves a stream that has no descriptor.
func TestPipe(t *testing.T) {
	s := startServer(t, Config{}, testExport(t))
	ours, theirs := net.Pipe()
	s.accept(theirs)
	c := newClient(t, ours)
	c.enter("disk", true)
	c.request(cmdWrite, 0, 1, 0, 4, "abcd")
	c.expectSimple(1, 0)
	c.request(cmdRead, 0, 2, 0, 4)
	c.expectChunk(chunkFlagDone, chunkOffsetData, 2, uint64(0), "abcd")
	c.disconnect()
}

func TestTCP(t *testing.T) {
	s := startServer(t, Config{}, testExport(t))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Skip(err)
	}
	served := make(chan error)
	go func() { served <- s.Serve(l) }()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c := newClient(t, conn)
	c.enter("disk", true)
	c.request(cmdWrite, 0, 1, 0, 4, "abcd")
	c.expectSimple(1, 0)
	if got := s.connections(1)[0].Client; got != conn.LocalAddr().String() {
		t.Errorf("client %q", got)
	}
	if err := s.Shutdown(testContext(t)); err != nil {
		t.Error(err)
	}
	c.expectEnd()
	if err := <-served; !errors.Is(err, ErrServerClosed) {
		t.Errorf("Serve: %v", err)
	}
}

// TestServeEnds: a listener that breaks ends Serve with the reason.
func TestServeEnds(t *testing.T) {
	s := startServer(t, Config{}, testExport(t))
	l, err := net.Listen("unix", filepath.Join(filepath.Dir(s.socket), "other"))
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := s.Serve(l); err == nil || errors.Is(err, ErrServerClosed) {
		t.Errorf("Serve: %v", err)
	}
	if !outOfResources(os.NewSyscallError("accept4", syscall.EMFILE)) || outOfResources(net.ErrClosed) {
		t.Error("outOfResources")
	}
}
