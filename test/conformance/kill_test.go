package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"cowherd/api"
	"cowherd/block"
)

// killRounds in the environment is how often the daemon is killed in each of these tests; `make kill` sets it.
const killRounds = "COWHERD_KILLS"

// rounds is how often to kill the daemon.
func rounds(t testing.TB) int {
	t.Helper()
	text := os.Getenv(killRounds)
	if text == "" {
		return 2
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q: a number is wanted", killRounds, text)
	}
	return n
}

// The device of these tests has three parts:
//
//	fioPart        fio writes to the origin, as fast as it can
//	originPart     scribes write to the origin, and keep books
//	snapshotPart   scribes write to the snapshot, and keep books; the origin is not written
const (
	fioPart      = 8 * mib
	originPart   = 2 * mib
	snapshotPart = 2 * mib
	killSize     = fioPart + originPart + snapshotPart
)

// victim is a daemon that is killed again and again, and what must be there each time.
type victim struct {
	*daemon
	frozen           []byte // what vm held when vm@p was taken
	origin, snapshot *scribbler
	stopFio          context.CancelFunc
	fio              chan struct{} // closed when fio has ended
}

// TestKillPersistent kills the daemon while fio and others write to an origin and to its persistent snapshot. After each
// start both are there: the snapshot shows what was frozen and all that was acknowledged since, and so does the origin.
func TestKillPersistent(t *testing.T) {
	need(t, "fio")
	for _, engine := range engines {
		t.Run(engine, func(t *testing.T) {
			t.Parallel()
			v := &victim{daemon: prepare(t)}
			v.start("--engine", engine)
			v.do("attach", "vm", randomImage(t, killSize, 21))
			for i := range rounds(t) {
				if i%3 != 1 { // else the same goes on, with what the last kill has left on the COW device
					v.takeAgain(i)
				}
				v.load("vm@p")
				v.end(syscall.SIGKILL, -1)
				v.start("--engine", engine)
				v.verify()
			}
			// An orderly end in the middle of everything leaves as much.
			v.load("vm@p")
			v.end(syscall.SIGTERM, 0)
			v.checkLog()
			v.start("--engine", engine)
			v.verify()
			v.drop("vm@p")
		})
	}
}

// takeAgain takes vm@p anew.
func (v *victim) takeAgain(i int) {
	v.t.Helper()
	if v.frozen != nil {
		v.drop("vm@p")
	}
	v.do("snapshot", "vm@p", "--persistent", "--chunk", []string{"4k", "16k", "64k", "8k"}[i%4])
	v.frozen = v.read("vm")
}

// read is all that an export holds.
func (v *victim) read(export string) []byte {
	v.t.Helper()
	x := v.open(export, 1)
	held, err := contents(x)
	if err := errors.Join(err, x.Close()); err != nil {
		v.t.Fatal(err)
	}
	return held
}

// clear fills a part of an export with zeroes, from where scribes count.
func (d *daemon) clear(export string, base, size int64) {
	d.t.Helper()
	x := d.open(export, 1)
	if err := errors.Join(block.Write(x, make([]byte, size), base), block.Flush(x), x.Close()); err != nil {
		d.t.Fatal(err)
	}
}

// load lets everybody write, and returns when they have for a while. snapshot is where the snapshot's scribes write.
func (v *victim) load(snapshot string) {
	v.t.Helper()
	v.clear("vm", fioPart, originPart)
	v.clear(snapshot, fioPart+originPart, snapshotPart)
	ctx, stop := context.WithCancel(context.Background())
	v.stopFio = stop
	cmd := exec.CommandContext(ctx, "fio", "--name=load", "--ioengine=nbd", "--uri="+v.uri("vm"), "--rw=randwrite", "--bs=4k",
		"--iodepth=16", "--size="+strconv.Itoa(fioPart), "--time_based", "--runtime=60", "--norandommap", "--randrepeat=0",
		"--fsync=64")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	log, ended := &lockedBuffer{}, make(chan struct{})
	cmd.Stdout, cmd.Stderr, v.fio = log, log, ended
	go func() {
		defer close(ended)
		_ = cmd.Run() // it fails when the daemon is killed, or is killed itself
	}()
	v.origin = scribbleAt(v.daemon, "vm", fioPart, originPart)
	v.snapshot = scribbleAt(v.daemon, snapshot, fioPart+originPart, snapshotPart)
	v.origin.waitEnough()
	v.snapshot.waitEnough()
	eventually(v.t, "fio to write", func() bool {
		select {
		case <-ended:
			v.t.Fatalf("fio has ended: %s", log)
		default:
		}
		return v.othersWrite()
	})
}

// othersWrite tells whether a client other than this process has written something to vm.
func (v *victim) othersWrite() bool {
	v.t.Helper()
	x, err := v.api.Device(v.t.Context(), "vm")
	if err != nil {
		v.t.Fatal(err)
	}
	for _, u := range x.Users {
		if !strings.Contains(u.Client, fmt.Sprintf("pid %d,", os.Getpid())) && u.Commands["write"].Requests >= scribeEnough {
			return true
		}
	}
	return false
}

// end ends the daemon by a signal in the middle of everything.
func (v *victim) end(sig syscall.Signal, want int) {
	v.t.Helper()
	v.signal(sig)
	if status := v.wait(); status != want {
		v.t.Errorf("exit status %d after %v, want %d", status, sig, want)
	}
	v.origin.running.Wait()
	v.snapshot.running.Wait()
	v.stopFio()
	<-v.fio
}

// verify checks origin and snapshot.
func (v *victim) verify() {
	t := v.t
	t.Helper()
	if x := v.status("vm@p"); x.State != api.StateValid || !x.Snapshot.Persistent {
		t.Fatalf("the snapshot is %+v", x)
	}
	snapshot, origin := v.read("vm@p"), v.read("vm")
	const shared = fioPart + originPart
	sameBytes(t, "the snapshot", snapshot[:shared], v.frozen[:shared])
	v.snapshot.checkBytes(snapshot)
	v.origin.checkBytes(origin)
	sameBytes(t, "what only the snapshot's scribes write", origin[shared:], v.frozen[shared:])
	if bytes.Equal(origin[:fioPart], v.frozen[:fioPart]) {
		t.Error("fio has written nothing")
	}
}

// mergePart is what a snapshot is merged into in TestKillMerge; scribes write behind it.
const mergePart = 32 * mib

// TestKillMerge kills the daemon while it merges a snapshot that differs from its origin everywhere, and while both are
// written: each start goes on with it, the view is one all the while, and in the end the origin is it.
func TestKillMerge(t *testing.T) {
	t.Parallel()
	v := &victim{daemon: prepare(t)}
	v.start()
	const size = mergePart + originPart + snapshotPart
	v.do("attach", "vm", randomImage(t, size, 22))
	kills := 0
	for i := 0; kills < rounds(t); i++ {
		v.frozen = nil
		v.takeAgain(i)
		v.overwrite(byte(i + 1))
		v.do("merge", "vm@p")
		for v.merging() {
			v.scribbleMerged()
			v.end(syscall.SIGKILL, -1)
			v.start()
			v.verifyMerged()
			kills++
		}
		v.verifyMerged()
	}
}

// overwrite changes all of mergePart on the origin.
func (v *victim) overwrite(with byte) {
	v.t.Helper()
	x := v.open("vm", 1)
	var err error
	for at := int64(0); at < mergePart; at += mib {
		err = errors.Join(err, block.Write(x, bytes.Repeat([]byte{with}, mib), at))
	}
	if err := errors.Join(err, x.Close()); err != nil {
		v.t.Fatal(err)
	}
}

// merging tells whether the merge is not over.
func (v *victim) merging() bool {
	v.t.Helper()
	x, err := v.api.Device(v.t.Context(), "vm@p")
	if errors.Is(err, syscall.ENOENT) {
		return false
	}
	if err != nil {
		v.t.Fatal(err)
	}
	if m := x.Snapshot.Merge; m != nil {
		v.t.Logf("%d of %d chunks are merged", m.MergedChunks, m.TotalChunks)
	}
	return true
}

// scribbleMerged writes to the view behind mergePart.
func (v *victim) scribbleMerged() {
	v.t.Helper()
	v.clear("vm", mergePart, originPart+snapshotPart)
	v.stopFio, v.fio = func() {}, make(chan struct{})
	close(v.fio) // there is none
	v.origin = scribbleAt(v.daemon, "vm", mergePart, originPart)
	v.snapshot = scribbleAt(v.daemon, "vm", mergePart+originPart, snapshotPart)
	v.origin.waitAny()
}

// verifyMerged checks the view.
func (v *victim) verifyMerged() {
	v.t.Helper()
	held := v.read("vm")
	sameBytes(v.t, "the view", held[:mergePart], v.frozen[:mergePart])
	if v.origin != nil {
		v.origin.checkBytes(held)
		v.snapshot.checkBytes(held)
	}
}

// TestKillTakeAndRemove kills the daemon while a persistent snapshot is taken and removed, again and again, of an origin
// that is written: the next one has the snapshot, and that is a frozen view, or has it not, and nothing is left of it.
func TestKillTakeAndRemove(t *testing.T) {
	t.Parallel()
	const size = 2 * mib
	d := prepare(t)
	d.start()
	d.do("attach", "vm", emptyImage(t, size))
	there := 0
	for i := range 2 * rounds(t) {
		d.clear("vm", 0, size)
		s := scribble(d, "vm", size)
		turns := make(chan struct{})
		go func() {
			defer close(turns)
			for takeOrRemove(d) == nil {
				turns <- struct{}{}
			}
		}()
		for range 1 + i%4 { // so that it is there, or not, when the next turn begins
			<-turns
		}
		d.signal(syscall.SIGKILL)
		d.wait()
		for range turns { // until one has failed
		}
		s.running.Wait()
		d.start()
		if keepsWhatItShows(d, s, size) {
			there++
		}
		if left, err := os.ReadDir(d.state); err != nil || len(left) != 2 {
			t.Errorf("left in the state directory: %v (%v)", left, err)
		}
	}
	t.Logf("the snapshot was there %d times", there)
}

// takeOrRemove takes a persistent snapshot, or removes it when it is there.
func takeOrRemove(d *daemon) error {
	_, err := d.api.TakeSnapshot(context.Background(), api.SnapshotRequest{Name: "vm@p", Persistent: true})
	if errors.Is(err, syscall.EEXIST) {
		return d.api.RemoveSnapshot(context.Background(), "vm@p", false)
	}
	return err
}

// keepsWhatItShows tells whether there is a snapshot. If so it must show whole blocks that s has written, and go on
// showing them when the origin is cleared; then it is removed.
func keepsWhatItShows(d *daemon, s *scribbler, size int64) bool {
	t := d.t
	t.Helper()
	if _, err := d.api.Device(t.Context(), "vm@p"); errors.Is(err, syscall.ENOENT) {
		return false
	}
	if x := d.status("vm@p"); x.State != api.StateValid {
		t.Errorf("the snapshot is %+v", x)
	}
	x := d.open("vm@p", 1)
	first, err := contents(x)
	if err != nil {
		t.Fatal(err)
	}
	s.checkOlder(first)
	d.clear("vm", 0, size)
	second, err := contents(x)
	if err := errors.Join(err, x.Close()); err != nil {
		t.Fatal(err)
	}
	sameBytes(t, "the snapshot when its origin is cleared", second, first)
	d.drop("vm@p")
	return true
}
