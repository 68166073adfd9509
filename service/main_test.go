package service

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"cowherd/api"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testConfig is a daemon in a directory of its own with both front ends on unix sockets there.
func testConfig(t testing.TB) Config {
	dir := t.TempDir()
	return Config{
		StateDir:  filepath.Join(dir, "state"),
		Control:   filepath.Join(dir, "run", "control.sock"),
		NBD:       []string{"unix:" + filepath.Join(dir, "run", "nbd.sock")},
		BusyGrace: time.Millisecond,
		Version:   "test",
	}
}

// startDaemon starts a daemon that ends with the test.
func startDaemon(t testing.TB, c Config) *Daemon {
	t.Helper()
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Restore(nil); err != nil {
		t.Fatal(err)
	}
	d.Serve()
	t.Cleanup(func() { stopDaemon(t, d) })
	return d
}

// stopDaemon ends a daemon, unless it has ended.
func stopDaemon(t testing.TB, d *Daemon) {
	t.Helper()
	if d.bus.isClosed() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := d.Stop(ctx); err != nil {
		t.Errorf("stop: %v", err)
	}
}

// isClosed tells whether the daemon has ended.
func (b *bus) isClosed() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.closed
}

// changeState changes what a daemon that has ended remembers: as one that died in the middle of something would.
func changeState(t testing.TB, c Config, what func(*content)) {
	t.Helper()
	f, err := openStateFile(c.StateDir)
	if err == nil {
		err = f.change(what)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// put writes one block of a device through NBD.
func put(t testing.TB, d *Daemon, name string, blockNumber int64, data []byte) {
	t.Helper()
	c := mustDialNBD(t, d, name)
	c.write(t, blockNumber*4096, data)
	c.bye(t)
}

// get reads a device through NBD.
func get(t testing.TB, d *Daemon, name string, length int) []byte {
	t.Helper()
	c := mustDialNBD(t, d, name)
	defer c.bye(t)
	return c.read(t, 0, length)
}

// wantState checks the state of a device, and gives it.
func wantState(t testing.TB, d *Daemon, name, state string) api.Device {
	t.Helper()
	x, err := d.Device(name)
	if err != nil || x.State != state {
		t.Errorf("%s: %+v, %v; want state %s", name, x, err, state)
	}
	return x
}

// wantGone checks that there is no device of a name.
func wantGone(t testing.TB, d *Daemon, name string) {
	t.Helper()
	if x, err := d.Device(name); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("%s is there: %+v, %v", name, x, err)
	}
}

// wantFile checks whether a file is there.
func wantFile(t testing.TB, path string, there bool) {
	t.Helper()
	if _, err := os.Stat(path); (err == nil) != there {
		t.Errorf("%s: %v, want it to be there: %v", path, err, there)
	}
}

// image makes a file of size bytes of which block number i of 4 KiB is filled with byte(i+1).
func image(t testing.TB, size int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	data := make([]byte, size)
	for i := range data {
		data[i] = byte(i/4096 + 1)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func attach(t testing.TB, d *Daemon, name, device string) api.Device {
	t.Helper()
	x, err := d.Attach(api.AttachRequest{Name: name, Device: device})
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func take(t testing.TB, d *Daemon, r api.SnapshotRequest) api.SnapshotTaken {
	t.Helper()
	x, err := d.TakeSnapshot(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// wantErrno checks an error's errno and that the message holds some text.
func wantErrno(t testing.TB, err error, errno syscall.Errno, text string) {
	t.Helper()
	if err == nil || api.AsError(err).Errno != errno || !bytes.Contains([]byte(err.Error()), []byte(text)) {
		t.Errorf("got %v, want errno %v and %q in the message", err, errno, text)
	}
}

// allEvents is what the bus keeps.
func allEvents(t testing.TB, d *Daemon) []api.Event {
	t.Helper()
	var all []api.Event
	reader, err := d.bus.after(0)
	if err != nil {
		t.Fatal(err)
	}
	for {
		events, _ := reader.take()
		if len(events) == 0 {
			return all
		}
		all = append(all, events...)
	}
}

// waitEvent waits for an event of a type about name.
func waitEvent(t testing.TB, d *Daemon, kind, name string) api.Event {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	reader, err := d.bus.after(0)
	if err != nil {
		t.Fatal(err)
	}
	for {
		events, err := reader.read(ctx)
		if err != nil {
			t.Fatalf("no event %s of %s: %v", kind, name, err)
		}
		for _, e := range events {
			if e.Type == kind && e.Name == name {
				return e
			}
		}
	}
}

// nbdClient is as much of a client as these tests need: one request at a time, simple replies.
type nbdClient struct {
	conn net.Conn
	next uint64
}

// Numbers of the NBD protocol.
const (
	nbdOptExportName  = 1
	nbdFlagsFixed     = 1
	nbdFlagsNoZeroes  = 2
	nbdRequestMagic   = 0x25609513
	nbdSimpleReply    = 0x67446698
	nbdRead           = 0
	nbdWrite          = 1
	nbdDisc           = 2
	nbdFlush          = 3
	nbdRequestLen     = 28
	nbdSimpleReplyLen = 16
)

// dialNBD opens an export. The error is io.EOF when the server hangs up, as it does when there is no such export.
func dialNBD(t testing.TB, d *Daemon, export string) (*nbdClient, error) {
	t.Helper()
	conn, err := net.Dial(d.nbd[0].Addr().Network(), d.nbd[0].Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	var greeting [18]byte
	if _, err := io.ReadFull(conn, greeting[:]); err != nil {
		return nil, err
	}
	hello := binary.BigEndian.AppendUint32(nil, nbdFlagsFixed|nbdFlagsNoZeroes)
	hello = append(hello, "IHAVEOPT"...)
	hello = binary.BigEndian.AppendUint32(hello, nbdOptExportName)
	hello = binary.BigEndian.AppendUint32(hello, uint32(len(export)))
	if _, err := conn.Write(append(hello, export...)); err != nil {
		return nil, err
	}
	var answer [10]byte // size and flags
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return nil, err
	}
	return &nbdClient{conn: conn}, nil
}

func mustDialNBD(t testing.TB, d *Daemon, export string) *nbdClient {
	t.Helper()
	c, err := dialNBD(t, d, export)
	if err != nil {
		t.Fatalf("open export %q: %v", export, err)
	}
	return c
}

// send sends a request; length is that of a read.
func (c *nbdClient) send(command uint16, offset int64, length int, data []byte) error {
	c.next++
	r := binary.BigEndian.AppendUint32(make([]byte, 0, nbdRequestLen+len(data)), nbdRequestMagic)
	r = binary.BigEndian.AppendUint16(r, 0)
	r = binary.BigEndian.AppendUint16(r, command)
	r = binary.BigEndian.AppendUint64(r, c.next)
	r = binary.BigEndian.AppendUint64(r, uint64(offset))
	r = binary.BigEndian.AppendUint32(r, uint32(max(length, len(data))))
	_, err := c.conn.Write(append(r, data...))
	return err
}

// do sends a request and waits for its answer.
func (c *nbdClient) do(command uint16, offset int64, length int, data []byte) ([]byte, error) {
	if err := c.send(command, offset, length, data); err != nil || command == nbdDisc {
		return nil, err
	}
	var reply [nbdSimpleReplyLen]byte
	if _, err := io.ReadFull(c.conn, reply[:]); err != nil {
		return nil, err
	}
	if magic := binary.BigEndian.Uint32(reply[:]); magic != nbdSimpleReply {
		return nil, errors.New("not a simple reply")
	}
	if errno := binary.BigEndian.Uint32(reply[4:]); errno != 0 {
		return nil, syscall.Errno(errno)
	}
	out := make([]byte, length)
	_, err := io.ReadFull(c.conn, out)
	return out, err
}

func (c *nbdClient) read(t testing.TB, offset int64, length int) []byte {
	t.Helper()
	p, err := c.do(nbdRead, offset, length, nil)
	if err != nil {
		t.Fatalf("read %d bytes at %d: %v", length, offset, err)
	}
	return p
}

func (c *nbdClient) write(t testing.TB, offset int64, data []byte) {
	t.Helper()
	if _, err := c.do(nbdWrite, offset, 0, data); err != nil {
		t.Fatalf("write %d bytes at %d: %v", len(data), offset, err)
	}
}

// bye ends the connection as a client does that is done.
func (c *nbdClient) bye(t testing.TB) {
	t.Helper()
	if _, err := c.do(nbdDisc, 0, 0, nil); err != nil {
		t.Error(err)
	}
	if err := c.conn.Close(); err != nil {
		t.Error(err)
	}
}

// recordLog is a logger that keeps what it is told.
func recordLog() (*slog.Logger, *bytes.Buffer) {
	var b bytes.Buffer
	return slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelDebug})), &b
}

// taken is how many origins and snapshots are counted.
func (g *registry) taken() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.count
}
