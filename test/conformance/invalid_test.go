package conformance

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"cowherd/api"
	"cowherd/block"
)

// TestInvalidUnderLoad lets a snapshot run out of its COW space while fio writes the origin: fio notices nothing, all
// I/O of the snapshot fails, everybody is told why, and the origin's other snapshot stays right.
func TestInvalidUnderLoad(t *testing.T) {
	need(t, "fio", "qemu-io", "nbdcopy")
	for _, engine := range engines {
		for _, store := range []string{"temp", "mem"} {
			t.Run(engine+"-"+store, func(t *testing.T) {
				t.Parallel()
				overflow(t, startDaemon(t, "--engine", engine), store)
			})
		}
	}
}

func overflow(t *testing.T, d *daemon, store string) {
	const size = 16 * mib
	image := randomImage(t, size, 12)
	d.do("attach", "vm", image)
	before := sumFile(t, image)
	d.do("snapshot", "vm@large", "--chunk", "16k")
	d.do("snapshot", "vm@small", "--chunk", "4k", "--store", store, "--max-cow", "2MiB")
	reader := startInteractive(t, "qemu-io", "-f", "raw", d.uri("vm@small"))
	reader.say("read 0 64k")
	reader.expect("read 65536/65536")
	invalid := watch(t, d, api.EventSnapshotInvalid)

	fio(t, d.uri("vm"), size, "--rw=randwrite", "--bs=4k", "--verify_backlog=500")

	event := <-invalid
	if event.err != nil || event.Name != "vm@small" || !strings.Contains(event.Cause, "no room") {
		t.Errorf("the event: %+v", event)
	}
	x := d.status("vm@small")
	if x.State != api.StateInvalid || x.Snapshot.Invalid != event.Cause || x.Snapshot.AllocatedBytes > 2*mib {
		t.Errorf("the status: %+v, %+v", x, x.Snapshot)
	}
	if out := d.do("ls"); !strings.Contains(out, "invalid") {
		t.Errorf("the list:\n%s", out)
	}
	for _, text := range []string{"invalid", event.Cause} {
		if out := d.do("status", "vm@small"); !strings.Contains(out, text) {
			t.Errorf("no %q in the status:\n%s", text, out)
		}
	}
	// Who has been there since before, and who comes now.
	reader.say("read 0 64k")
	reader.expect("read failed: Input/output error")
	reader.end()
	for _, command := range []string{"read 0 512", "write 8M 4k", "write -z 1M 64k"} {
		if out, failed := tryQemuIO(t, d.uri("vm@small"), command); !failed {
			t.Errorf("%s of an invalid snapshot: %s", command, out)
		}
	}
	toolFails(t, "nbdcopy", d.uri("vm@small"), "null:")
	everyReadFails(t, d, "vm@small")

	if got := sumFile(t, fetch(t, d.uri("vm@large"))); got != before {
		t.Error("the other snapshot is not what the image was")
	}
	d.drop("vm@small")
	d.do("snapshot", "vm@small", "--chunk", "4k", "--store", store, "--max-cow", "2MiB")
	fioVerify(t, d.uri("vm@small"), size)
	fioVerify(t, d.uri("vm"), size)
}

// everyReadFails checks that no block of an export can be read, whether its chunk was copied or not.
func everyReadFails(t testing.TB, d *daemon, export string) {
	t.Helper()
	x := d.open(export, 1)
	p := make([]byte, 4*kib)
	for at := int64(0); at < x.Size(); at += int64(len(p)) {
		if err := block.Read(x, p, at); !errors.Is(err, syscall.EIO) {
			t.Fatalf("a read at %d of the invalid %s gives %v", at, export, err)
		}
	}
	if err := x.Close(); err != nil {
		t.Error(err)
	}
}

// told is an event, or why there is none.
type told struct {
	api.Event
	err error
}

// watch waits in the background for the next event of a type. Events from this call on count.
func watch(t testing.TB, d *daemon, kind string) <-chan told {
	t.Helper()
	now, err := d.api.Version(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	found := make(chan told, 1)
	ctx, cancel := context.WithTimeout(context.Background(), endLimit)
	t.Cleanup(cancel)
	go func() {
		for e, err := range d.api.Events(ctx, api.EventsQuery{Since: &now.LastEvent, Follow: true}) {
			if err != nil || e.Type == kind {
				found <- told{e, err}
				return
			}
		}
		found <- told{err: fmt.Errorf("the stream of events has ended without %s", kind)}
	}()
	return found
}

// TestFullDevice puts the COW space of a snapshot on a file that is too small: a COW device has as much room as it has.
func TestFullDevice(t *testing.T) {
	t.Parallel()
	need(t, "qemu-io", "nbdcopy")
	const size = 4 * mib
	d := startDaemon(t)
	d.do("attach", "vm", randomImage(t, size, 13))
	d.do("snapshot", "vm@a", "--store", emptyImage(t, mib))
	d.do("snapshot", "vm@b", "--store", emptyImage(t, 5*mib), "--chunk", "64k")
	before := sumFile(t, fetch(t, d.uri("vm@b")))
	qemuIO(t, d.uri("vm"), "write -P 1 0 4M", "read -P 1 0 4M")
	eventually(t, "the snapshot to become invalid", func() bool { return d.status("vm@a").State == api.StateInvalid })
	if after := sumFile(t, fetch(t, d.uri("vm@b"))); after != before {
		t.Error("the other snapshot has changed")
	}
}

// TestInUse: who removes a thing that is in use is told by whom, and may insist.
func TestInUse(t *testing.T) {
	t.Parallel()
	need(t, "qemu-io")
	d := startDaemon(t)
	image := emptyImage(t, mib)
	d.do("attach", "vm", image)
	d.do("snapshot", "vm@a")
	onOrigin := startInteractive(t, "qemu-io", "-f", "raw", d.uri("vm"))
	onSnapshot := startInteractive(t, "qemu-io", "-f", "raw", d.uri("vm@a"))
	for _, p := range []*interactive{onOrigin, onSnapshot} {
		p.say("write -P 1 0 64k")
		p.expect("wrote 65536/65536")
	}
	pid := func(p *interactive) string { return fmt.Sprintf("pid %d", p.cmd.Process.Pid) }
	d.refused([]string{"rm", "vm@a"}, "vm@a is in use by", pid(onSnapshot))
	d.refused([]string{"detach", "vm"}, "vm has snapshots: vm@a")
	d.refused([]string{"attach", "other", image}, "in use by device \"vm\"")
	d.refused([]string{"snapshot", "vm@b", "--store", image}, "in use by device \"vm\"")
	for name, p := range map[string]*interactive{"vm": onOrigin, "vm@a": onSnapshot} {
		users := d.status(name).Users
		if len(users) != 1 || !strings.Contains(users[0].Client, pid(p)) {
			t.Errorf("users of %s: %+v", name, users)
		}
	}
	onSnapshot.say("read -P 1 0 64k") // what was refused has changed nothing
	onSnapshot.expect("read 65536/65536")

	begin := time.Now()
	d.do("rm", "--force", "vm@a")
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("a client that is idle held up its removal for %v", took)
	}
	onSnapshot.say("read 0 4k")
	onSnapshot.expect("read failed")
	onSnapshot.end()
	d.refused([]string{"detach", "vm"}, "vm is in use by", pid(onOrigin))
	onOrigin.say("write -P 2 64k 64k")
	onOrigin.expect("wrote 65536/65536 bytes at offset 65536")
	onOrigin.end()
	d.do("detach", "vm")
	d.refused([]string{"detach", "vm"}, `there is no device "vm"`)
	d.do("attach", "other", image)
	qemuIO(t, d.uri(""), "read -P 1 0 64k", "read -P 2 64k 64k")
}

// TestCommandsOfIdleClient: what a client has asked for is counted when it has been answered, however long the client
// is silent then.
func TestCommandsOfIdleClient(t *testing.T) {
	t.Parallel()
	need(t, "qemu-io")
	d := startDaemon(t)
	d.do("attach", "vm", emptyImage(t, 8*mib))
	client := startInteractive(t, "qemu-io", "-f", "raw", d.uri("vm"))
	for _, x := range []struct{ line, answer string }{
		{"write 0 4k", "wrote 4096/4096 bytes at offset 0"},
		{"write 1M 2M", "wrote 2097152/2097152 bytes at offset 1048576"},
		{"read 1M 1M", "read 1048576/1048576 bytes at offset 1048576"},
		{"write -z 4M 1M", "wrote 1048576/1048576 bytes at offset 4194304"},
	} {
		client.say(x.line)
		client.expect(x.answer)
	}
	want := map[string]api.Command{
		"write":        {Requests: 2, Bytes: 2*mib + 4*kib},
		"read":         {Requests: 1, Bytes: mib},
		"write_zeroes": {Requests: 1, Bytes: mib},
	}
	users := d.status("vm").Users
	for kind, n := range want {
		if len(users) != 1 || users[0].Commands[kind] != n {
			t.Errorf("%s: the users are %+v, want one with %+v", kind, users, n)
		}
	}
	client.end()
}
