package service

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cowherd/api"
	"cowherd/block"
)

// pattern is a block of 4 KiB that tells which write it was.
func pattern(writer, turn int) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "%03d:%011d\n", writer, turn), 4096/16)
}

// TestFrozenView is the main job through the front door: an image that is being written is frozen, read back, dropped.
func TestFrozenView(t *testing.T) {
	for _, engine := range []string{EngineScaled, EngineSerialised} {
		t.Run(engine, func(t *testing.T) {
			c := testConfig(t)
			c.Engine = engine
			d := startDaemon(t, c)
			const blocks = 256
			path := image(t, blocks*4096)
			attach(t, d, "vm", path)

			var writers sync.WaitGroup
			stop := make(chan struct{})
			for w := range 3 {
				client := mustDialNBD(t, d, "vm")
				writers.Go(func() {
					random := rand.New(rand.NewPCG(1, uint64(w)))
					for turn := 0; ; turn++ {
						select {
						case <-stop:
							client.bye(t)
							return
						default:
							client.write(t, random.Int64N(blocks)*4096, pattern(w, turn))
						}
					}
				})
			}
			for i := range 10 {
				name := fmt.Sprintf("vm@%d", i)
				taken := take(t, d, api.SnapshotRequest{Name: name, ChunkBytes: 4096 << (i % 5)})
				if taken.StallMicroseconds < 0 || taken.Kind != api.KindSnapshot || taken.Snapshot.Origin != "vm" {
					t.Errorf("taken: %+v", taken)
				}
				client := mustDialNBD(t, d, name)
				first, second := client.read(t, 0, blocks*4096), client.read(t, 0, blocks*4096)
				if !bytes.Equal(first, second) {
					t.Errorf("%s is not frozen", name)
				}
				client.bye(t)
				if i%3 > 0 { // some live together with later ones
					removeSoon(t, d, name)
				}
			}
			close(stop)
			writers.Wait()
			for _, x := range d.Devices() {
				if x.State == api.StateInvalid {
					t.Errorf("%s is invalid: %s", x.Name, x.Snapshot.Invalid)
				}
			}
			// With nobody writing any more, a snapshot is what the file holds.
			take(t, d, api.SnapshotRequest{Name: "vm@last"})
			client := mustDialNBD(t, d, "vm@last")
			held, err := os.ReadFile(path)
			if err != nil || !bytes.Equal(held, client.read(t, 0, blocks*4096)) {
				t.Errorf("the snapshot differs from the file (%v)", err)
			}
			client.bye(t)
		})
	}
}

// removeSoon removes a snapshot whose client has just said goodbye.
func removeSoon(t testing.TB, d *Daemon, name string) {
	t.Helper()
	for {
		err := d.RemoveSnapshot(t.Context(), name, false)
		if err == nil {
			return
		}
		if !errors.Is(err, syscall.EBUSY) {
			t.Fatal(err)
		}
	}
}

// TestTakeAndDropTogether takes and drops snapshots of several origins from several goroutines, with wrong requests
// among them.
func TestTakeAndDropTogether(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	for i := range 2 {
		attach(t, d, fmt.Sprintf("vm%d", i), "mem:1M")
	}
	var workers sync.WaitGroup
	for w := range 4 {
		workers.Go(func() {
			for i := range 15 {
				name := fmt.Sprintf("vm%d@%d", w%2, i%3) // two workers use the same names
				_, err := d.TakeSnapshot(t.Context(), api.SnapshotRequest{Name: name, Store: "mem"})
				if err != nil && !errors.Is(err, syscall.EEXIST) {
					t.Error(err)
				}
				err = d.RemoveSnapshot(t.Context(), name, false)
				if err != nil && !errors.Is(err, syscall.ENOENT) {
					t.Error(err)
				}
				d.Devices()
			}
		})
	}
	workers.Wait()
	if d.names.taken() != 2 || len(d.Devices()) != 2 {
		t.Errorf("count %d, devices %v", d.names.taken(), d.Devices())
	}
	taken := map[string]int{}
	for _, e := range allEvents(t, d) {
		switch e.Type {
		case api.EventSnapshotTaken:
			taken[e.Name]++
		case api.EventSnapshotRemoved:
			taken[e.Name]--
		}
		if taken[e.Name] < 0 || taken[e.Name] > 1 {
			t.Errorf("event %d: %s happened out of order", e.Seq, e.Type)
		}
	}
}

func TestInUse(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	attach(t, d, "vm", "mem:1M")
	take(t, d, api.SnapshotRequest{Name: "vm@a"})
	origin, snap := mustDialNBD(t, d, "vm"), mustDialNBD(t, d, "vm@a")
	who := fmt.Sprintf("pid %d", os.Getpid())

	err := d.RemoveSnapshot(t.Context(), "vm@a", false)
	wantErrno(t, err, syscall.EBUSY, "vm@a is in use by")
	wantErrno(t, err, syscall.EBUSY, who)
	err = d.Detach(t.Context(), "vm")
	wantErrno(t, err, syscall.EBUSY, "vm has snapshots: vm@a")
	snap.read(t, 0, 4096) // what was refused has changed nothing

	if err := d.RemoveSnapshot(t.Context(), "vm@a", true); err != nil {
		t.Fatal(err)
	}
	if _, err := snap.do(nbdRead, 0, 4096, nil); err == nil {
		t.Error("a client of a removed snapshot can still read")
	}
	wantErrno(t, d.Detach(t.Context(), "vm"), syscall.EBUSY, "vm is in use by")
	wantErrno(t, d.Detach(t.Context(), "vm"), syscall.EBUSY, who)
	origin.write(t, 0, make([]byte, 4096))
	origin.bye(t)
	waitEvent(t, d, api.EventClientDisconnected, "vm")
	if err := d.Detach(t.Context(), "vm"); err != nil {
		t.Error(err)
	}
	wantErrno(t, d.Detach(t.Context(), "vm"), syscall.ENOENT, `no device "vm"`)
	wantErrno(t, d.Detach(t.Context(), "vm@a"), syscall.EINVAL, "it is a snapshot")
	wantErrno(t, d.RemoveSnapshot(t.Context(), "vm@a", false), syscall.ENOENT, `no device "vm"`)
	_, err = d.TakeSnapshot(t.Context(), api.SnapshotRequest{Name: "vm@a"})
	wantErrno(t, err, syscall.ENOENT, `no device "vm"`)

	var kinds []string
	for _, e := range allEvents(t, d) {
		if e.Client != "" && !strings.Contains(e.Client, who) {
			t.Errorf("client %q", e.Client)
		}
		kinds = append(kinds, e.Type+" "+e.Name)
	}
	want := "device-attached vm,snapshot-taken vm@a,client-connected vm,client-connected vm@a," +
		"client-disconnected vm@a,snapshot-removed vm@a,client-disconnected vm,device-detached vm"
	if got := strings.Join(kinds, ","); got != want {
		t.Errorf("events\n%s, want\n%s", got, want)
	}
}

// TestForceStuck: a client that takes no replies is cut off in time.
func TestForceStuck(t *testing.T) {
	c := testConfig(t)
	c.SuspendTimeout = 8 * time.Second // a quarter of it is waited for, and the rest is for a machine that is busy
	d := startDaemon(t, c)
	attach(t, d, "vm", "mem:4M")
	take(t, d, api.SnapshotRequest{Name: "vm@a"})
	client := mustDialNBD(t, d, "vm@a")
	for range 32 { // more than the socket holds
		if err := client.send(nbdRead, 0, 4<<20, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.RemoveSnapshot(t.Context(), "vm@a", true); err != nil {
		t.Error(err)
	}
}

// TestLeavingClient: a client that says goodbye while its device is being removed is waited for.
func TestLeavingClient(t *testing.T) {
	c := testConfig(t)
	c.BusyGrace = 10 * time.Second
	d := startDaemon(t, c)
	attach(t, d, "vm", "mem:1M")
	client := mustDialNBD(t, d, "vm")
	removed := make(chan error)
	go func() { removed <- d.Detach(t.Context(), "vm") }()
	client.read(t, 0, 512)
	client.bye(t)
	if err := <-removed; err != nil {
		t.Error(err)
	}
}

func TestInvalid(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	attach(t, d, "vm", "mem:1M")
	take(t, d, api.SnapshotRequest{Name: "vm@small", MaxCOWBytes: 8192})
	client := mustDialNBD(t, d, "vm")
	for i := range 4 {
		client.write(t, int64(i)*4096, pattern(0, i)) // the origin's writes succeed
	}
	client.bye(t)
	e := waitEvent(t, d, api.EventSnapshotInvalid, "vm@small")
	if !strings.Contains(e.Cause, "no room") {
		t.Errorf("cause %q", e.Cause)
	}
	x, err := d.Device("vm@small")
	if err != nil || x.State != api.StateInvalid || x.Snapshot.Invalid != e.Cause {
		t.Errorf("got %+v, %v", x, err)
	}
	reader := mustDialNBD(t, d, "vm@small")
	if _, err := reader.do(nbdRead, 0, 512, nil); !errors.Is(err, syscall.EIO) {
		t.Errorf("a read of an invalid snapshot: %v, want EIO", err)
	}
	reader.bye(t)
	removeSoon(t, d, "vm@small")
}

// waitInFlight waits until the only client has a request in flight.
func waitInFlight(t testing.TB, d *Daemon) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if c := d.exports.server.Connections(); len(c) == 1 && c[0].InFlight > 0 {
			return
		}
	}
	t.Fatal("no request is in flight")
}

// TestSuspendTimeout: when requests in flight do not end, nothing has changed.
func TestSuspendTimeout(t *testing.T) {
	c := testConfig(t)
	c.SuspendTimeout = 10 * time.Millisecond
	d := startDaemon(t, c)
	attach(t, d, "slow", "null:1M,latency=500ms")
	client := mustDialNBD(t, d, "slow")
	flushed := make(chan error)
	go func() {
		_, err := client.do(nbdFlush, 0, 0, nil)
		flushed <- err
	}()
	waitInFlight(t, d)
	_, err := d.TakeSnapshot(t.Context(), api.SnapshotRequest{Name: "slow@a"})
	wantErrno(t, err, syscall.ETIMEDOUT, "requests in flight")
	if _, err := d.Device("slow@a"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("the snapshot is there: %v", err)
	}
	if err := <-flushed; err != nil {
		t.Errorf("the request in flight: %v", err)
	}
	take(t, d, api.SnapshotRequest{Name: "slow@a"})
	client.bye(t)
}

// TestOperationWaits: operations on one origin wait for each other, but not for longer than their context lasts, and
// not for those on other origins.
func TestOperationWaits(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	attach(t, d, "a", "mem:1M")
	attach(t, d, "b", "mem:1M")
	o, err := d.lockOrigin(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = d.TakeSnapshot(ctx, api.SnapshotRequest{Name: "a@x"})
	wantErrno(t, err, syscall.ECANCELED, "another operation")
	take(t, d, api.SnapshotRequest{Name: "b@x"})
	if n := len(d.Devices()); n != 3 {
		t.Errorf("%d devices, want 3", n)
	}
	o.unlock()
	take(t, d, api.SnapshotRequest{Name: "a@x"})
}

func TestDefaultExport(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	if _, err := dialNBD(t, d, ""); err == nil {
		t.Error("there is a default export without a device")
	}
	attach(t, d, "vm", "mem:1M")
	take(t, d, api.SnapshotRequest{Name: "vm@a"})
	mustDialNBD(t, d, "").bye(t)
	for _, name := range []string{"vm@b", "b", "vm@", "@", "vm@a@a"} {
		if _, err := dialNBD(t, d, name); err == nil {
			t.Errorf("there is an export %q", name)
		}
	}
	attach(t, d, "b", "mem:1M")
	if _, err := dialNBD(t, d, ""); err == nil {
		t.Error("there is a default export of two devices")
	}
	var names []string
	for _, x := range d.exports.List(t.Context()) {
		names = append(names, x.Name)
	}
	if got := strings.Join(names, " "); got != "b vm vm@a" {
		t.Errorf("exports %s", got)
	}
}

func TestCopiedContext(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	attach(t, d, "vm", "mem:64k")
	take(t, d, api.SnapshotRequest{Name: "vm@a", ChunkBytes: 8192})
	client := mustDialNBD(t, d, "vm")
	client.write(t, 20<<10, make([]byte, 4096))
	client.bye(t)
	x, err := d.exports.Open(t.Context(), "vm@a", "test")
	if err != nil {
		t.Fatal(err)
	}
	defer x.Release()
	var got []int64
	err = x.Contexts[0].Extents(0, 64<<10, func(length int64, flags uint32) bool {
		got = append(got, length>>10, int64(flags))
		return true
	})
	if want := "[16 0 8 1 40 0]"; err != nil || fmt.Sprint(got) != want || x.Contexts[0].Name != "cowherd:copied" {
		t.Errorf("got %v, %v; want %s", got, err, want)
	}
}

func TestReadOnly(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	if _, err := d.Attach(api.AttachRequest{Name: "vm", Device: image(t, 64<<10), ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	take(t, d, api.SnapshotRequest{Name: "vm@ro", ReadOnly: true})
	take(t, d, api.SnapshotRequest{Name: "vm@rw"})
	for name, want := range map[string]error{"vm": syscall.EPERM, "vm@ro": syscall.EPERM, "vm@rw": nil} {
		client := mustDialNBD(t, d, name)
		if _, err := client.do(nbdWrite, 0, 0, pattern(0, 0)); !errors.Is(err, want) {
			t.Errorf("write to %s: %v, want %v", name, err, want)
		}
		client.bye(t)
		if x, err := d.Device(name); err != nil || x.ReadOnly != (want != nil) {
			t.Errorf("%s: %+v, %v", name, x, err)
		}
	}
}

func TestSecondDaemon(t *testing.T) {
	c := testConfig(t)
	startDaemon(t, c)
	second := testConfig(t)
	second.StateDir = c.StateDir
	_, err := New(second)
	wantErrno(t, err, syscall.EBUSY, "another daemon")
	second = testConfig(t)
	second.Control = c.Control
	_, err = New(second)
	wantErrno(t, err, syscall.EADDRINUSE, "another process listens")
	second = testConfig(t)
	second.NBD = append(second.NBD, c.NBD...)
	_, err = New(second)
	wantErrno(t, err, syscall.EADDRINUSE, "another process listens")
	if _, err := os.Lstat(strings.TrimPrefix(second.NBD[0], "unix:")); !os.IsNotExist(err) {
		t.Errorf("a daemon that did not start has left a socket: %v", err)
	}
	second = testConfig(t)
	second.Engine = "steam"
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	second.Listeners = []net.Listener{l}
	_, err = New(second)
	wantErrno(t, err, syscall.EINVAL, "engine")
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a daemon that did not start has left a listener: %v", err)
	}
}

// TestStop: a stop in the middle of everything answers what has arrived, flushes, and leaves nothing.
func TestStop(t *testing.T) {
	c := testConfig(t)
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	log, text := recordLog()
	d.log = log
	d.Serve()
	path := image(t, 1<<20)
	attach(t, d, "vm", path)
	take(t, d, api.SnapshotRequest{Name: "vm@a"})
	mustDialNBD(t, d, "vm@a")
	client := mustDialNBD(t, d, "vm")
	acknowledged := make(chan int)
	go func() {
		for turn := 0; ; turn++ {
			if _, err := client.do(nbdWrite, int64(turn%256)*4096, 0, pattern(1, turn)); err != nil {
				acknowledged <- turn
				return
			}
		}
	}()
	waitEvent(t, d, api.EventClientConnected, "vm")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := d.Stop(ctx); err != nil {
		t.Error(err)
	}
	turns := <-acknowledged
	held, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for turn := max(0, turns-256); turn < turns; turn++ {
		at := turn % 256 * 4096
		// The block may hold a later write that was done but not answered.
		if got := held[at : at+4096]; !bytes.Equal(got, pattern(1, turn)) && !bytes.Equal(got, pattern(1, turn+256)) {
			t.Fatalf("block %d does not hold write %d, which was acknowledged", turn%256, turn)
		}
	}
	for _, dir := range []string{filepath.Dir(c.Control), c.StateDir} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Error(err)
		}
		for _, e := range entries {
			if e.Name() != "lock" && e.Name() != stateName {
				t.Errorf("the daemon has left %s", e.Name())
			}
		}
	}
	for _, want := range []string{"snapshot-removed", "device-detached", "name=vm@a"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no %q in the log:\n%s", want, text)
		}
	}
	_, err = d.Attach(api.AttachRequest{Name: "x", Device: "mem:1M"})
	wantErrno(t, err, syscall.ESHUTDOWN, "stopping")
}

// TestStopHangs: a device that does not end in time is named, and what else there is ends well.
func TestStopHangs(t *testing.T) {
	c := testConfig(t)
	c.SuspendTimeout = time.Second
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	d.Serve()
	attach(t, d, "slow", "null:1M,latency=1200ms")
	attach(t, d, "vm", image(t, 64<<10))
	client := mustDialNBD(t, d, "slow")
	flushed := make(chan error)
	go func() {
		_, err := client.do(nbdFlush, 0, 0, nil)
		flushed <- err
	}()
	waitInFlight(t, d)
	ctx, cancel := context.WithTimeout(t.Context(), 600*time.Millisecond)
	defer cancel()
	err = d.Stop(ctx)
	wantErrno(t, err, syscall.ETIMEDOUT, "")
	if err := <-flushed; err == nil || !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Logf("the client that hung got %v", err)
	}
	if _, err := d.Device("vm"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("the other device has not ended: %v", err)
	}
	// The state directory is free although a device hangs on.
	s, err := openStateDir(c.StateDir)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.close(); err != nil {
		t.Error(err)
	}
	o, err := d.names.origin("slow")
	if err == nil {
		if err := d.releaseOrigin(t.Context(), o); err != nil {
			t.Error(err)
		}
	}
}

func TestLimitOfDevices(t *testing.T) {
	g := registry{origins: map[string]*origin{}, held: map[fileID]string{}}
	for range devicesMax {
		if err := g.reserve(); err != nil {
			t.Fatal(err)
		}
	}
	wantErrno(t, g.reserve(), syscall.ENOSPC, "1024 devices")
	wantErrno(t, g.add(newOrigin(api.AttachRequest{Name: "x"}, nil)), syscall.ENOSPC, "1024 devices")
	g.unreserve()
	if err := g.add(newOrigin(api.AttachRequest{Name: "x"}, nil)); err != nil {
		t.Error(err)
	}
}

func TestURIs(t *testing.T) {
	c := testConfig(t)
	odd := filepath.Join(t.TempDir(), "a b&c%")
	c.NBD = []string{"unix:" + odd, "tcp:127.0.0.1:0"}
	d := startDaemon(t, c)
	x := attach(t, d, "vm", "mem:1M")
	want := "nbd+unix:///vm?socket=" + strings.NewReplacer(" ", "%20", "&", "%26", "%", "%25").Replace(odd)
	if len(x.URIs) != 2 || x.URIs[0] != want || !strings.HasPrefix(x.URIs[1], "nbd://127.0.0.1:") {
		t.Errorf("got %v, want %s and one of TCP", x.URIs, want)
	}
}

// lossy is a leaf whose flush fails.
type lossy struct{ leaf }

func (l lossy) Submit(r *block.Request) {
	if r.Op == block.OpFlush {
		r.Complete(block.NewError(r, syscall.EIO, "the disk is gone"))
		return
	}
	l.leaf.Submit(r)
}

// TestTakeFlushes: what a persistent snapshot shows of its origin is durable when it is taken, or it is not taken.
func TestTakeFlushes(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	attach(t, d, "vm", image(t, 64<<10))
	o, err := d.names.origin("vm")
	if err != nil {
		t.Fatal(err)
	}
	sound := o.backing.leaf
	o.backing.leaf = lossy{sound}
	_, err = d.TakeSnapshot(t.Context(), api.SnapshotRequest{Name: "vm@p", Persistent: true})
	wantErrno(t, err, syscall.EIO, "flush the origin")
	take(t, d, api.SnapshotRequest{Name: "vm@n"}) // has nothing that lasts
	o.backing.leaf = sound
	take(t, d, api.SnapshotRequest{Name: "vm@p", Persistent: true})
}

// TestDetachLoses: a device that cannot be flushed is let go of, and it is said that something may be lost.
func TestDetachLoses(t *testing.T) {
	d := startDaemon(t, testConfig(t))
	path := image(t, 64<<10)
	attach(t, d, "vm", path)
	o, err := d.names.origin("vm")
	if err != nil {
		t.Fatal(err)
	}
	o.backing.leaf = lossy{o.backing.leaf}
	wantErrno(t, d.Detach(t.Context(), "vm"), syscall.EIO, "is detached, but what was written last may be lost")
	if e := waitEvent(t, d, api.EventDeviceDetached, "vm"); !strings.Contains(e.Cause, "the disk is gone") {
		t.Errorf("cause %q", e.Cause)
	}
	attach(t, d, "vm", path)
}
