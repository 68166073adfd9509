package conformance

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cowherd/api"
)

// fio runs one fio job on an export, which must report no error.
func fio(t testing.TB, uri string, size int64, args ...string) {
	t.Helper()
	if err := runFio(uri, size, args...); err != nil {
		t.Error(err)
	}
}

// runFio is fio for any goroutine.
func runFio(uri string, size int64, args ...string) error {
	r, err := tryProgram(nil, "fio", append([]string{
		"--output-format=json", "--name=job", "--ioengine=nbd", "--uri=" + uri, "--size=" + strconv.FormatInt(size, 10),
		"--bs=4k", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
	}, args...)...)
	if err != nil {
		return err
	}
	var report struct {
		Jobs []struct{ Error int }
	}
	text := r.stdout
	if i := strings.IndexByte(text, '{'); i > 0 {
		text = text[i:]
	}
	err = json.Unmarshal([]byte(text), &report)
	if err == nil && len(report.Jobs) == 0 {
		err = errors.New("no job is reported")
	}
	for _, job := range report.Jobs {
		if job.Error != 0 {
			err = errors.Join(err, fmt.Errorf("a job reports error %d", job.Error))
		}
	}
	if r.status != 0 {
		err = errors.Join(err, fmt.Errorf("exit status %d", r.status))
	}
	if err != nil {
		return fmt.Errorf("fio %s: %w\n%s%s", strings.Join(args, " "), err, r.stdout, r.stderr)
	}
	return nil
}

// fioVerify reads all of an export and checks fio's checksum of every block.
func fioVerify(t testing.TB, uri string, size int64) {
	t.Helper()
	fio(t, uri, size, "--rw=randread")
}

// TestFioWhileSnapshotsComeAndGo lets fio write and verify an origin while every 100 ms a snapshot is taken and another
// dropped. All blocks have a checksum before the first snapshot is taken, so every snapshot, whenever it was taken,
// must hold a block with a right checksum everywhere: the origin's writes are wholly in it or not at all.
func TestFioWhileSnapshotsComeAndGo(t *testing.T) {
	need(t, "fio")
	for _, engine := range engines {
		for _, read := range []bool{false, true} {
			t.Run(fmt.Sprintf("engine=%s,read=%v", engine, read), func(t *testing.T) {
				t.Parallel()
				churn(t, engine, read)
			})
		}
	}
}

// churnEnough is how many snapshots are taken at least while fio writes.
const churnEnough = 10

func churn(t *testing.T, engine string, read bool) {
	size := int64(32 * mib)
	if underRace() {
		size /= 4
	}
	d := startDaemon(t, "--engine", engine)
	image := emptyImage(t, size)
	d.do("attach", "vm", image)
	fio(t, d.uri("vm"), size, "--rw=write", "--bs=4k", "--do_verify=0")

	// A quiet moment: nobody writes, so the snapshot is what the file holds.
	before := sumFile(t, image)
	d.do("snapshot", "vm@quiet", "--chunk", "64k")

	var taken atomic.Int64
	finished := make(chan error, 1)
	go func() { finished <- churnFio(d.uri("vm"), size, &taken) }()
	if err := comeAndGo(d, &taken, finished, read); err != nil {
		t.Error(err)
	}
	t.Logf("%d snapshots", taken.Load())
	fioVerify(t, d.uri("vm"), size)
	fioVerify(t, d.uri("vm@quiet"), size)
	if after := sumFile(t, image); after == before {
		t.Error("fio has written nothing new")
	}
	quiet := d.open("vm@quiet", 2)
	defer quiet.Close()
	if held, err := contents(quiet); err != nil || sum(held) != before {
		t.Errorf("the snapshot differs from what the image was at the quiet moment (%v)", err)
	}
}

// churnFio has two jobs, each with a connection and half of the blocks, which it writes in random order and reads back,
// more than once. The rate makes it last, however fast the machine is; and it is done again until enough snapshots were
// taken meanwhile, however slow the machine is.
func churnFio(uri string, size int64, taken *atomic.Int64) error {
	for {
		err := runFio(uri, size/2, "--rw=randwrite", "--numjobs=2", "--offset_increment=50%",
			"--loops=6", "--rate_iops=,5500", "--verify_backlog=1000", "--fsync=500")
		if err != nil || taken.Load() >= churnEnough {
			return err
		}
	}
}

func sum(p []byte) string {
	h := sha256.Sum256(p)
	return hex.EncodeToString(h[:])
}

// comeAndGo takes a snapshot every 100 ms, and drops the one before the last two, until something comes from finished.
// It counts them in taken.
func comeAndGo(d *daemon, taken *atomic.Int64, finished <-chan error, read bool) (err error) {
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	const alive = 3
	count := 0
	for err == nil {
		select {
		case fioErr := <-finished:
			for i := max(0, count-alive); i < count; i++ {
				err = errors.Join(err, dropValid(d, i))
			}
			return errors.Join(fioErr, err)
		case <-ticker.C:
		}
		if err = takeNumber(d, count); err == nil && read {
			err = readTwice(d, count)
		}
		count++
		if err == nil && count > alive {
			err = dropValid(d, count-alive-1)
		}
		taken.Store(int64(count))
	}
	taken.Store(churnEnough) // fio need not go on
	return errors.Join(err, <-finished)
}

func churnName(i int) string { return fmt.Sprintf("vm@%d", i) }

// takeNumber takes a snapshot whose chunk size and store depend on its number.
func takeNumber(d *daemon, i int) error {
	_, err := d.api.TakeSnapshot(d.t.Context(), api.SnapshotRequest{
		Name: churnName(i), ChunkBytes: 4 * kib << (2 * (i % 5)), Store: []string{"temp", "mem"}[i%2],
		ReadOnly: i%3 == 0,
	})
	return err
}

// dropValid drops a snapshot, which must have stayed valid.
func dropValid(d *daemon, i int) error {
	x, err := d.api.Device(d.t.Context(), churnName(i))
	if err != nil {
		return err
	}
	if x.State != api.StateValid {
		return fmt.Errorf("%s is %s: %s", x.Name, x.State, x.Snapshot.Invalid)
	}
	return removeSoon(d, churnName(i))
}

// removeSoon removes a snapshot whose last client may not have been counted off yet.
func removeSoon(d *daemon, name string) error {
	for {
		if err := d.api.RemoveSnapshot(d.t.Context(), name, false); !errors.Is(err, syscall.EBUSY) {
			return err
		}
	}
}

// readTwice reads a snapshot twice, which must give the same, and every fourth by fio, which checks the blocks.
func readTwice(d *daemon, i int) error {
	if i%4 == 0 {
		x, err := d.api.Device(d.t.Context(), churnName(i))
		if err != nil {
			return err
		}
		return runFio(d.uri(x.Name), x.SizeBytes, "--rw=randread")
	}
	x, err := d.openErr(churnName(i), 2)
	if err != nil {
		return err
	}
	defer x.Close()
	first, err := contents(x)
	if err != nil {
		return err
	}
	second, err := contents(x)
	if err == nil && !bytes.Equal(first, second) {
		err = fmt.Errorf("%s is not frozen", churnName(i))
	}
	return err
}

// TestSnapshotWrittenByFio lets fio write and verify a snapshot while another fio writes its origin.
func TestSnapshotWrittenByFio(t *testing.T) {
	t.Parallel()
	need(t, "fio")
	const size = 16 * mib
	for _, engine := range engines {
		d := startDaemon(t, "--engine", engine)
		image := emptyImage(t, size)
		d.do("attach", "vm", image)
		fio(t, d.uri("vm"), size, "--rw=write", "--do_verify=0")
		d.do("snapshot", "vm@a", "--chunk", "16k")
		d.do("snapshot", "vm@b", "--chunk", "4k", "--store", "mem")
		before := sumFile(t, image)
		finished := make(chan error, 2)
		go func() {
			finished <- runFio(d.uri("vm@a"), size, "--rw=randwrite", "--bsrange=512-64k", "--randrepeat=0")
		}()
		go func() { finished <- runFio(d.uri("vm"), size, "--rw=randwrite", "--bs=8k", "--randrepeat=0") }()
		for range cap(finished) {
			if err := <-finished; err != nil {
				t.Error(err)
			}
		}
		if after := sumFile(t, fetch(t, d.uri("vm@b"))); after != before {
			t.Errorf("%s: the snapshot that nobody wrote is not what the image was", engine)
		}
		d.stop()
		if err := os.Remove(image); err != nil {
			t.Error(err)
		}
	}
}
