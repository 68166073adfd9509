package conformance

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"cowherd/block"
)

// load is an image with a snapshot that is written by a scribbler.
func load(d *daemon, size int64) (*scribbler, string) {
	d.t.Helper()
	image := emptyImage(d.t, size)
	d.do("attach", "vm", image)
	s := scribble(d, "vm", size)
	d.do("snapshot", "vm@a", "--chunk", "16k")
	s.waitEnough()
	return s, image
}

// TestTerminate ends a daemon by SIGTERM while it is written: it ends well, and what was acknowledged is in the image.
func TestTerminate(t *testing.T) {
	for _, engine := range engines {
		t.Run(engine, func(t *testing.T) {
			t.Parallel()
			d := startDaemon(t, "--engine", engine)
			s, image := load(d, 8*mib)
			d.stop()
			s.check(image)
		})
	}
}

// TestTerminateFlushes: what nobody has asked to be flushed is flushed at the end.
func TestTerminateFlushes(t *testing.T) {
	t.Parallel()
	need(t, "strace")
	d := prepare(t)
	trace := filepath.Join(d.dir, "trace")
	if r := runProgram(t, nil, "strace", "-o", trace, "true"); r.status != 0 {
		t.Skipf("strace does not work here: %s", r.stderr)
	}
	d.launch(exec.Command("strace", append([]string{"-f", "-y", "-e", "trace=fdatasync,fsync", "-o", trace},
		d.command("--ready-fd", "3").Args...)...))
	v, err := d.api.Version(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	stop := func() {
		if err := syscall.Kill(v.PID, syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		if status := d.wait(); status != 0 { // strace ends as the daemon does
			t.Errorf("exit status %d", status)
		}
	}
	t.Cleanup(func() {
		if d.running() {
			stop()
		}
	})
	image := filepath.Join(d.dir, "flushed.img")
	if err := os.WriteFile(image, make([]byte, mib), 0o600); err != nil {
		t.Fatal(err)
	}
	d.do("attach", "vm", image)
	device := d.open("vm", 1) // unlike others, this client does not flush when it goes
	if err := errors.Join(block.Write(device, []byte("not flushed"), 0), device.Close()); err != nil {
		t.Error(err)
	}
	if text, err := os.ReadFile(trace); err != nil || strings.Contains(string(text), image) {
		t.Errorf("flushed before the end (%v): %s", err, text)
	}
	stop()
	d.checkLog()
	d.checkLeft()
	if text, err := os.ReadFile(trace); err != nil || !strings.Contains(string(text), image) {
		t.Errorf("not flushed at the end (%v): %s", err, text)
	}
}

// TestKill kills a daemon while it is written: what was acknowledged is in the image, and the next daemon has the device
// again, without the transient snapshot.
func TestKill(t *testing.T) {
	for _, engine := range engines {
		t.Run(engine, func(t *testing.T) {
			t.Parallel()
			killTwice(t, engine)
		})
	}
}

func killTwice(t *testing.T, engine string) {
	const size = 8 * mib
	d := prepare(t)
	for range 2 {
		d.start("--engine", engine)
		s, image := load(d, size)
		d.signal(syscall.SIGKILL)
		if status := d.wait(); status != -1 {
			t.Errorf("exit status %d of a daemon that was killed", status)
		}
		s.check(image)
		if left, err := os.ReadDir(d.state); err != nil || len(left) != 2 || left[1].Name() != "state.json" {
			t.Errorf("left in the state directory: %v (%v)", left, err)
		}
		if _, err := os.Lstat(d.socket); err != nil {
			t.Errorf("the test wants a dead socket to be left: %v", err)
		}
		d.start("--engine", engine)
		if x := d.status("vm"); x.Device != image || len(x.Snapshots) != 0 {
			t.Errorf("the device is there as %+v", x)
		}
		d.do("snapshot", "vm@a")
		held, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		snapshot := d.open("vm@a", 1)
		got, err := contents(snapshot)
		if err != nil {
			t.Error(err)
		}
		sameBytes(t, "the snapshot after the restart", got, held)
		if err := snapshot.Close(); err != nil {
			t.Error(err)
		}
		d.drop("vm@a")
		d.do("detach", "vm")
		d.stop()
	}
}

// TestSecondDaemon: a daemon does not take what another one has, leaves that alone, and leaves nothing itself.
func TestSecondDaemon(t *testing.T) {
	t.Parallel()
	need(t, "nbdinfo")
	d := startDaemon(t)
	image := emptyImage(t, mib)
	d.do("attach", "vm", image)
	for _, test := range []struct {
		what string
		set  func(other *daemon)
		want string
	}{
		{"state directory", func(o *daemon) { o.state = d.state },
			fmt.Sprintf("another daemon (process %d) uses it", d.cmd.Process.Pid)},
		{"control socket", func(o *daemon) { o.control = d.control }, "another process listens on it"},
		{"NBD socket", func(o *daemon) { o.socket = d.socket }, "another process listens on it"},
	} {
		other := prepare(t)
		control, socket := other.control, other.socket
		test.set(other)
		other.spawn(other.command())
		if status := other.wait(); status != 1 || !strings.Contains(other.log.String(), test.want) {
			t.Errorf("%s of another: status %d, want 1 and %q in\n%s", test.what, status, test.want, other.log)
		}
		for _, path := range []string{control, socket} {
			if _, err := os.Lstat(path); !os.IsNotExist(err) {
				t.Errorf("%s of another: it has left %s (%v)", test.what, path, err)
			}
		}
		tool(t, "nbdinfo", d.uri("vm"))
		d.do("status", "vm")
	}
	other := startDaemon(t)
	other.refused([]string{"attach", "vm", image}, "locked by another program")
	d.do("detach", "vm")
	other.do("attach", "vm", image)
}

// TestSocketsArePrivate: whatever the umask, nobody else may open the sockets; what is at a socket's path and is none
// is left alone.
func TestSocketsArePrivate(t *testing.T) {
	t.Parallel()
	d := prepare(t)
	cmd := d.command("--ready-fd", "3")
	d.launch(exec.Command("/bin/sh", append([]string{"-c", `umask 0; exec "$0" "$@"`}, cmd.Args...)...))
	for path, want := range map[string]os.FileMode{
		d.control: os.ModeSocket | 0o600, d.socket: os.ModeSocket | 0o600, d.state: os.ModeDir | 0o700,
		filepath.Dir(d.socket): os.ModeDir | 0o700, filepath.Join(d.state, "lock"): 0o600,
	} {
		if info, err := os.Lstat(path); err != nil || info.Mode() != want {
			t.Errorf("%s: %v (%v), want %v", path, info.Mode(), err, want)
		}
	}
	d.stop()

	const note = "not a socket"
	if err := os.WriteFile(d.socket, []byte(note), 0o600); err != nil {
		t.Fatal(err)
	}
	d.spawn(d.command())
	if status := d.wait(); status != 1 || !strings.Contains(d.log.String(), "something else at this path") {
		t.Errorf("status %d, %s", status, d.log)
	}
	if text, err := os.ReadFile(d.socket); err != nil || string(text) != note {
		t.Errorf("the file at the socket's path holds %q (%v)", text, err)
	}
	if err := os.Remove(d.socket); err != nil {
		t.Fatal(err)
	}
}

// TestPassedSockets passes listening sockets to the daemon as a service manager does, one of each kind.
func TestPassedSockets(t *testing.T) {
	t.Parallel()
	need(t, "nbdinfo", "qemu-io")
	d := prepare(t)
	passed := filepath.Join(d.dir, "passed.sock")
	local, err := net.Listen("unix", passed)
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	remote, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer remote.Close()
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=2 exec "$0" "$@"`, program(t), "serve", "--control",
		d.control, "--state", d.state, "--ready-fd", "5")
	for _, l := range []interface{ File() (*os.File, error) }{local.(*net.UnixListener), remote.(*net.TCPListener)} {
		f, err := l.File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	ready, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer ready.Close()
	cmd.ExtraFiles = append(cmd.ExtraFiles, theirs)
	d.spawn(cmd)
	_ = theirs.Close()
	d.awaitReady(ready)
	if _, err := os.Lstat(d.socket); !os.IsNotExist(err) {
		t.Errorf("a socket that nobody asked for: %v", err)
	}
	d.do("attach", "vm", emptyImage(t, mib))
	tcp := "nbd://" + remote.Addr().String() + "/vm"
	qemuIO(t, "nbd+unix:///vm?socket="+passed, "write -P 5 0 4k")
	qemuIO(t, tcp, "read -P 5 0 4k")
	if uris := d.status("vm").URIs; len(uris) != 2 || uris[0] != "nbd+unix:///vm?socket="+passed || uris[1] != tcp {
		t.Errorf("URIs %q", uris)
	}
}

// TestSocketActivation has systemd's own program start the daemon when the first client comes.
func TestSocketActivation(t *testing.T) {
	t.Parallel()
	need(t, "systemd-socket-activate", "nbdinfo")
	d := prepare(t)
	passed := filepath.Join(d.dir, "passed.sock")
	image := emptyImage(t, 2*mib)
	config := filepath.Join(d.dir, "config.toml")
	text := fmt.Sprintf("control = %q\nstate = %q\n[[device]]\nname = \"vm\"\npath = %q\n", d.control, d.state, image)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	d.spawn(exec.Command("systemd-socket-activate", "--listen="+passed, program(t), "serve", "--config", config))
	eventually(t, "systemd-socket-activate", func() bool { _, err := os.Lstat(passed); return err == nil || !d.running() })
	if !d.running() {
		t.Skipf("systemd-socket-activate does not run here: %s", d.log)
	}
	size := tool(t, "nbdinfo", "--size", "nbd+unix:///vm?socket="+passed) // starts it
	if strings.TrimSpace(size) != fmt.Sprint(2*mib) {
		t.Errorf("size %q", size)
	}
	if x := d.status("vm"); x.Device != image {
		t.Errorf("%+v", x)
	}
}

// TestLocalNetwork serves on TCP, on a port that the system picks.
func TestLocalNetwork(t *testing.T) {
	t.Parallel()
	need(t, "nbdcopy", "nbdinfo")
	d := startDaemon(t, "--nbd", "tcp:127.0.0.1:0", "--nbd", "tcp:[::1]:0")
	image := randomImage(t, 4*mib, 14)
	d.do("attach", "vm", image)
	d.do("snapshot", "vm@a")
	uris := d.status("vm@a").URIs
	if len(uris) != 3 {
		t.Fatalf("URIs %q", uris)
	}
	for _, uri := range uris {
		tool(t, "nbdcopy", "--connections=2", image, strings.Replace(uri, "vm@a", "vm", 1))
		tool(t, "cmp", image, fetch(t, uri))
	}
}
