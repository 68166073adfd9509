package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"cowherd/backend/devicetest"
	"cowherd/block"
)

// spawn runs another server on a socket until the test ends. arguments has SOCKET where its path belongs.
func spawn(t testing.TB, program string, arguments ...string) (socket string, process *os.Process) {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Skipf("%s is not installed", program)
	}
	dir, err := os.MkdirTemp("", "nbd") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "s"), spawnAt(t, path, filepath.Join(dir, "s"), arguments...)
}

// spawnAt is spawn on a given socket.
func spawnAt(t testing.TB, path, socket string, arguments ...string) *os.Process {
	t.Helper()
	arguments = slices.Clone(arguments)
	for i, a := range arguments {
		arguments[i] = strings.ReplaceAll(a, "SOCKET", socket)
	}
	var output bytes.Buffer
	c := exec.Command(path, arguments...)
	c.Stdout, c.Stderr = &output, &output
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = c.Wait() // killed, as a rule
		close(ended)
	}()
	t.Cleanup(func() {
		_ = c.Process.Kill() // it may have ended by itself
		<-ended
	})
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if stream, err := net.Dial("unix", socket); err == nil {
			_ = stream.Close()
			return c.Process
		}
		select {
		case <-ended:
			t.Fatalf("%s ended: %s", path, output.String())
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s does not listen: %s", path, output.String())
		}
	}
}

func nbdkit(t testing.TB, arguments ...string) (socket string, process *os.Process) {
	t.Helper()
	return spawn(t, "nbdkit", append([]string{"-f", "-U", "SOCKET"}, arguments...)...)
}

// connectTo opens an export on a socket until the test ends.
func connectTo(t testing.TB, uri string, connections int, change ...func(*Config)) *Device {
	t.Helper()
	c, err := ParseURI(uri)
	if err != nil {
		t.Fatal(err)
	}
	c.Connections = connections
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

func TestNbdkitModel(t *testing.T) {
	tests := []struct {
		name      string
		arguments []string
	}{
		{"plain", []string{"memory", "2M"}},
		{"simple replies", []string{"--no-sr", "memory", "2M"}},
		{"not fixed", []string{"--mask-handshake=0", "memory", "2M"}},
		{"blocks", []string{"--filter=blocksize-policy", "memory", "2M", "blocksize-minimum=4096", "blocksize-maximum=64k",
			"blocksize-error-policy=error"}},
		{"no FUA", []string{"--filter=fua", "memory", "2M"}},
		{"no zeroes", []string{"--filter=nozero", "memory", "2M", "zeromode=emulate"}},
		{"delays", []string{"--filter=delay", "memory", "2M", "delay-read=1ms"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			socket, _ := nbdkit(t, test.arguments...)
			model(t, connectTo(t, "nbd+unix:///?socket="+socket, 4), 5, 100)
		})
	}
	t.Run("TLS", func(t *testing.T) {
		dir := directory(t)
		socket, _ := nbdkit(t, "--tls=require", "--tls-certificates="+dir, "--tls-verify-peer", "memory", "2M")
		model(t, connectTo(t, "nbds+unix:///?socket="+socket+"&tls-certificates="+dir, 2), 6, 100)
		if _, err := Open(context.Background(), Config{Network: "unix", Address: socket}); err == nil ||
			!strings.Contains(err.Error(), "requires TLS") {
			t.Errorf("without TLS: %v", err)
		}
	})
}

func TestQemuModel(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 2<<20); err != nil {
		t.Fatal(err)
	}
	socket, _ := spawn(t, "qemu-nbd", "-f", "raw", "-t", "-e", "8", "-x", "disk", "-k", "SOCKET", "--discard=unmap", image)
	d := connectTo(t, "nbd+unix:///disk?socket="+socket, 4)
	model(t, d, 7, 200)
	if _, err := Open(context.Background(), Config{Network: "unix", Address: socket, Export: "other"}); err == nil {
		t.Error("an export that does not exist was opened")
	}
}

// TestNbdkitExtents compares extents with what is read: what is said to be zero is, and all is told.
func TestNbdkitExtents(t *testing.T) {
	const size = 64 << 20
	socket, _ := nbdkit(t, "sparse-random", "64M", "seed=1", "percent=30")
	d := connectTo(t, "nbd+unix:///?socket="+socket, 2)
	at, holes, data := int64(0), 0, 0
	err := d.Extents(0, size, func(e block.Extent) bool {
		if e.Offset != at {
			t.Fatalf("extent %+v does not follow on %d", e, at)
		}
		at += e.Length
		if !e.Zero {
			data++
			return true
		}
		holes++
		for part := e; part.Length > 0; {
			p := make([]byte, min(part.Length, 1<<20))
			if err := block.Read(d, p, part.Offset); err != nil {
				t.Fatal(err)
			}
			if bytes.IndexFunc(p, func(r rune) bool { return r != 0 }) >= 0 {
				t.Fatalf("extent %+v is not zero", e)
			}
			part.Offset, part.Length = part.Offset+int64(len(p)), part.Length-int64(len(p))
		}
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	if at != size || holes == 0 || data == 0 {
		t.Errorf("%d holes and %d extents of data end at %d", holes, data, at)
	}
}

// TestNbdkitPattern reads at exabytes, over the longest reads.
func TestNbdkitPattern(t *testing.T) {
	socket, _ := nbdkit(t, "pattern", "7E")
	d := connectTo(t, "nbd+unix:///?socket="+socket, 1)
	p := make([]byte, partMax+1<<20)
	const offset = 7<<60 - (partMax + 1<<20)
	if err := block.Read(d, p, offset); err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(p); i += 8 {
		if got := binary.BigEndian.Uint64(p[i:]); got != uint64(offset+i) {
			t.Fatalf("at %d: %d", offset+i, got)
		}
	}
	if !d.Limits().ReadOnly {
		t.Error("the export should be read-only")
	}
}

func TestNbdkitErrors(t *testing.T) {
	socket, _ := nbdkit(t, "--filter=error", "memory", "1M", "error=ENOSPC", "error-rate=0%", "error-pwrite-rate=100%")
	d := connectTo(t, "nbd+unix:///?socket="+socket, 1)
	for range 3 {
		wantErrno(t, block.Write(d, make([]byte, 512), 0), syscall.ENOSPC)
		if err := block.Read(d, make([]byte, 512), 0); err != nil {
			t.Error(err)
		}
	}
}

// TestNbdkitInFlight checks that requests to a slow server overlap.
func TestNbdkitInFlight(t *testing.T) {
	const count = 64
	socket, _ := nbdkit(t, "-t", "64", "--filter=delay", "memory", "1M", "delay-read=50ms")
	d := connectTo(t, "nbd+unix:///?socket="+socket, 1)
	done, begun := newCollector(), time.Now()
	for i := range count {
		done.submit(d, block.OpRead, 0, int64(i)*512, make([]byte, 512))
	}
	done.wait(t, count)
	if took := time.Since(begun); took > count*50*time.Millisecond/2 {
		t.Errorf("%d reads of 50 ms took %v: they do not overlap", count, took)
	}
}

func TestNbdkitKilled(t *testing.T) {
	socket, process := nbdkit(t, "--filter=delay", "memory", "1M", "delay-read=60")
	d := connectTo(t, "nbd+unix:///?reconnect-timeout=0&socket="+socket, 2)
	done := newCollector()
	for i := range 10 {
		r := &block.Request{Op: block.OpRead, Queue: block.Queue(i), Length: 512, Data: make([]byte, 512)}
		r.Push(done)
		d.Submit(r)
	}
	if err := process.Kill(); err != nil {
		t.Fatal(err)
	}
	for _, err := range done.wait(t, 10) {
		wantErrno(t, err, syscall.EIO)
	}
}

// TestKilledServers kills a server and starts it again, several times, while requests run and are compared. What the
// servers write to is a file that outlives them, in the page cache.
func TestKilledServers(t *testing.T) {
	const size = 4 << 20
	certificates := directory(t)
	image := filepath.Join(t.TempDir(), "image")
	tests := []struct {
		name, program, uri string
		connections        int
		arguments          []string
	}{
		{"nbdkit", "nbdkit", "nbd+unix:///?socket=", 2, []string{"-f", "-U", "SOCKET", "file", image}},
		{"nbdkit with TLS", "nbdkit", "nbds+unix:///?tls-certificates=" + certificates + "&socket=", 2,
			[]string{"-f", "-U", "SOCKET", "--tls=require", "--tls-certificates=" + certificates, "--tls-verify-peer",
				"file", image}},
		{"qemu-nbd", "qemu-nbd", "nbd+unix:///disk?socket=", 3,
			[]string{"-f", "raw", "-t", "-e", "8", "-x", "disk", "-k", "SOCKET", "--discard=unmap", image}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if err := os.WriteFile(image, make([]byte, size), 0o600); err != nil {
				t.Fatal(err)
			}
			socket, process := spawn(t, test.program, test.arguments...)
			path, err := exec.LookPath(test.program)
			if err != nil {
				t.Fatal(err)
			}
			back := make(chan struct{}, 1000)
			d := connectTo(t, test.uri+socket+"&keeps-writes=1", test.connections, func(c *Config) {
				c.OnEvent = func(e Event) {
					if e.Kind == ConnectionBack {
						back <- struct{}{}
					}
				}
			})
			done := make(chan struct{})
			go func() {
				defer close(done)
				devicetest.Disjoint(t, d, 4, 100)
			}()
			kills := 0
			for running := true; running; kills++ {
				for i := range 300 { // time in the units of what the server does
					if err := block.Read(d, make([]byte, 4096), int64(i)*4096); err != nil {
						t.Fatal(err)
					}
				}
				if err := process.Kill(); err != nil {
					t.Fatal(err)
				}
				if err := os.Remove(socket); err != nil && !os.IsNotExist(err) {
					t.Fatal(err)
				}
				process = spawnAt(t, path, socket, test.arguments...)
				for range test.connections {
					<-back
				}
				select {
				case <-done:
					running = false
				default:
				}
			}
			<-done
			if s := d.Stats(); kills == 0 || s.Reconnects == 0 || s.Failed != nil {
				t.Errorf("%d kills: %+v", kills, s)
			}
			t.Logf("%d kills, %d connections made anew", kills, d.Stats().Reconnects)
		})
	}
}
