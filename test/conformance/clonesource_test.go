package conformance

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"cowherd/api"
)

// server serves the source of a clone from a process that can be killed.
type server struct {
	uri         string
	start, kill func()
}

// TestCloneOfKilledServer lets fio write and verify a clone of an export while it is hydrated, and kills the server of the
// export again and again, each time when somebody waits for it. It comes back on the same socket, nobody is told of an
// error, and in the end the clone is what was written over what the source holds.
func TestCloneOfKilledServer(t *testing.T) {
	need(t, "fio")
	for name, serve := range map[string]func(t *testing.T, image string) server{"cowherd": serveCowherd, "nbdkit": serveNbdkit} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cloneOfKilledServer(t, serve)
		})
	}
}

// serveCowherd is a daemon of its own.
func serveCowherd(t *testing.T, image string) server {
	d := startDaemon(t)
	d.do("attach", "golden", image, "--read-only")
	return server{
		uri:   d.uri("golden"),
		start: func() { d.start() },
		kill: func() {
			d.signal(syscall.SIGKILL)
			d.wait()
		},
	}
}

// serveNbdkit is nbdkit.
func serveNbdkit(t *testing.T, image string) server {
	need(t, "nbdkit")
	socket := filepath.Join(shortDir(t), "sock")
	out := &lockedBuffer{}
	var cmd *exec.Cmd
	kill := func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it was killed
		if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
	}
	start := func() {
		cmd = exec.Command("nbdkit", "-f", "-r", "-U", socket, "file", image)
		cmd.Stdout, cmd.Stderr = out, out
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "nbdkit", func() bool {
			_, err := os.Stat(socket)
			return err == nil
		})
	}
	start()
	t.Cleanup(func() {
		kill()
		if t.Failed() {
			t.Logf("nbdkit: %v %s", cmd.ProcessState, out)
		}
	})
	return server{uri: "nbd+unix:///?socket=" + socket, start: start, kill: kill}
}

func cloneOfKilledServer(t *testing.T, serve func(t *testing.T, image string) server) {
	const (
		size  = 32 * mib
		kills = 4
		slice = mib // that fio writes while the server is killed; from the end, where hydration comes last
		rest  = size - kills*slice
	)
	source := randomImage(t, size, 31)
	golden, err := os.ReadFile(source)
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, source)
	d := startDaemon(t)
	d.do("throttle", "--class", "hydration", "--rate", "256k") // so that it lasts
	dest := filepath.Join(t.TempDir(), "web.img")
	d.do("clone", "web", "--from", s.uri, dest, "--region-size", "16k", "--hydration-threshold", "8", "--hydration-batch-size", "4")
	missed := 0
	for i := range kills {
		if fioWhileKilled(t, d, s, slice, rest+int64(i)*slice) {
			missed++
		}
	}
	if missed == 0 {
		t.Error("fio never missed the source: this shows nothing")
	}
	if x := d.device("web").Clone; x.Hydrated > x.Regions*3/4 {
		t.Errorf("too much is hydrated before the last kill: %+v", x)
	}
	// Now in the background alone.
	s.kill()
	d.do("throttle", "--off")
	looks, before := 0, uint64(0)
	eventually(t, "hydration to miss its source", func() bool {
		now := d.device("web").Clone.Hydrated
		if looks++; now != before {
			looks, before = 0, now
		}
		return looks == stuckLooks
	})
	s.start()
	d.do("clone", "--detach-source", "web", "--wait")
	if x := d.device("web").Clone; x.Hydrated != x.Regions || x.FailedRegions != 0 || x.Mode != api.CloneReadWrite || !x.Detached {
		t.Errorf("in the end: %+v", x)
	}
	s.kill() // it is not needed any more
	for i := range kills {
		fio(t, d.uri("web"), slice, "--rw=randread", fmt.Sprintf("--offset=%d", rest+i*slice))
	}
	want := exported(t, d, "web")
	sameBytes(t, "what was not written", want[:rest], golden[:rest])
	if bytes.Equal(want[rest:], golden[rest:]) {
		t.Error("fio has written nothing")
	}
	d.do("detach", "web")
	got, err := os.ReadFile(dest)
	if err != nil {
		t.Fatal(err)
	}
	sameBytes(t, "the destination", got, want)
	if now, err := os.ReadFile(source); err != nil || !bytes.Equal(now, golden) {
		t.Errorf("the source has changed (%v)", err)
	}
}

// stuckLooks is how many looks in a row, 2 ms apart, a client must be found waiting for the same answers to count as stuck.
const stuckLooks = 20

// fioWhileKilled lets fio write a slice slowly and verify it, and kills the server in between. It tells whether fio had to
// wait for the server to come back: on a busy machine all that it needs of the source may be copied already.
func fioWhileKilled(t *testing.T, d *daemon, s server, slice, at int64) (missed bool) {
	t.Helper()
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		err = runFio(d.uri("web"), slice, "--rw=randwrite", "--do_verify=1", "--rate_iops=,500", fmt.Sprintf("--offset=%d", at))
	}()
	eventually(t, "fio to write", func() bool {
		return isDone(done) || anyUser(d, func(u *api.User) bool { return u.Commands["write"].Requests >= 32 })
	})
	s.kill()
	looks, before := 0, uint64(0)
	eventually(t, "fio to miss the source, or to end", func() bool {
		stuck := anyUser(d, func(u *api.User) bool {
			same := u.Commands["write"].Requests == before
			before = u.Commands["write"].Requests
			return same && u.InFlight > 0
		})
		looks++
		if !stuck {
			looks = 0
		}
		return looks == stuckLooks || isDone(done)
	})
	missed = !isDone(done)
	if x := d.device("web").Clone; x.Mode != api.CloneReadWrite || x.FailedRegions != 0 {
		t.Errorf("without its source: %+v", x)
	}
	s.start()
	<-done
	if err != nil {
		t.Error(err)
	}
	return missed
}

func isDone(done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
		return false
	}
}

// anyUser tells whether a client of the clone is one of those that are looked for.
func anyUser(d *daemon, is func(u *api.User) bool) bool {
	d.t.Helper()
	return slices.ContainsFunc(d.device("web").Users, func(u api.User) bool { return is(&u) })
}

// device is a device as the daemon describes it.
func (d *daemon) device(name string) api.Device {
	d.t.Helper()
	x, err := d.api.Device(d.t.Context(), name)
	if err != nil {
		d.t.Fatal(err)
	}
	return x
}
