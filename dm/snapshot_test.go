package dm_test

import (
	"bytes"
	"errors"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cowherd/block"
)

// filled is n bytes of b.
func filled(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

// wantBytes checks that d holds b, and nothing else, at an offset.
func wantBytes(t *testing.T, d block.Device, offset int64, n int, b byte) {
	t.Helper()
	p := make([]byte, n)
	if err := block.Read(d, p, offset); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p, filled(b, n)) {
		t.Fatalf("at %d: %d, want %d", offset, p[0], b)
	}
}

// mustWrite fills n bytes of d with b.
func mustWrite(t *testing.T, d block.Device, offset int64, n int, b byte) {
	t.Helper()
	if err := block.Write(d, filled(b, n), offset); err != nil {
		t.Fatal(err)
	}
}

// do fails the test on an error.
func do(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

const snapshotTables = "0 2048 snapshot o c P 8"

// TestSnapshotTables is what a script does with dmsetup: origin and snapshot, a reload of the snapshot (which hands its
// exceptions over), its removal and coming back, and at last a merge.
func TestSnapshotTables(t *testing.T) {
	x := newRig(t, map[string]block.Device{"o": memory(t, 1<<20), "c": memory(t, 1<<20)})
	x.mustCreate("base", "0 2048 snapshot-origin o")
	base := x.open("base")
	mustWrite(t, base, 0, 1<<20, 1)
	x.mustCreate("snap", snapshotTables)
	mustWrite(t, base, 0, 8192, 2)
	h, err := x.Mapper.Open("snap", "a reader")
	do(t, err)
	snap := h.Device()
	wantBytes(t, snap, 0, 1<<20, 1)
	mustWrite(t, snap, 16384, 4096, 3)

	do(t, x.load("snap", snapshotTables+" 1 discard_zeroes_cow"))
	if err := x.load("snap", snapshotTables); err == nil || !strings.Contains(err.Error(), "pairing") {
		t.Errorf("a second heir: %v", err)
	}
	do(t, x.Resume(inTime(t), "snap", true))
	if got := x.info("snap").LiveTable[0].Args; got != "o c P 8 1 discard_zeroes_cow" {
		t.Errorf("table %q", got)
	}
	wantBytes(t, snap, 0, 16384, 1)
	wantBytes(t, snap, 16384, 4096, 3)
	mustWrite(t, base, 1<<19, 4096, 4)
	wantBytes(t, snap, 1<<19, 4096, 1)
	status := x.info("snap").LiveState[0].Args
	if status != "48/2048 16" {
		t.Errorf("status %q", status)
	}

	h.Close()
	do(t, x.Remove(inTime(t), "snap", false))
	x.mustCreate("snap", snapshotTables)
	if got := x.info("snap").LiveState[0].Args; got != status {
		t.Errorf("status %q when it has come back, %q before", got, status)
	}
	wantBytes(t, x.open("snap"), 1<<19, 4096, 1)

	do(t, x.load("base", "0 2048 snapshot-merge o c P 8"))
	if err := x.Resume(inTime(t), "base", true); !errors.Is(err, syscall.EINVAL) ||
		!strings.Contains(err.Error(), "not suspended") {
		t.Fatalf("a merge of a snapshot that runs: %v", err)
	}
	if !x.info("base").Suspended {
		t.Error("the device goes on with a table that refused to")
	}
	do(t, x.Suspend(inTime(t), "snap", true))
	do(t, x.Resume(inTime(t), "base", true))
	for deadline := time.Now().Add(patience); ; runtime.Gosched() {
		if x.info("base").LiveState[0].Args == "16/2048 16" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the merge does not end: %s", x.info("base").LiveState[0].Args)
		}
	}
	wantBytes(t, base, 0, 16384, 1)
	wantBytes(t, base, 16384, 4096, 3)
	wantBytes(t, base, 1<<19, 4096, 1)
	do(t, x.Resume(inTime(t), "snap", true))
	if err := block.Read(x.open("snap"), make([]byte, 512), 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("a snapshot that was handed over: %v", err)
	}
	do(t, x.load("base", "0 2048 snapshot-origin o"))
	do(t, x.Resume(inTime(t), "base", true))
	wantBytes(t, base, 16384, 4096, 3)
}

// TestSnapshotUnderLoad: snapshots are made, reloaded and removed by tables while the origin is written; none is ever
// anything but frozen, and nobody suspends the origin for it.
func TestSnapshotUnderLoad(t *testing.T) {
	x := newRig(t, map[string]block.Device{"o": memory(t, 1<<20), "c": memory(t, 4<<20)})
	x.mustCreate("base", "0 2048 snapshot-origin o")
	base := x.open("base")
	stop := make(chan struct{})
	var writers sync.WaitGroup
	for w := range 3 {
		writers.Go(func() {
			for turn := 0; ; turn++ {
				select {
				case <-stop:
					return
				default:
				}
				if err := block.Write(base, filled(byte(turn), 4096), int64((w*85+turn%85)*4096)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 20 {
		x.mustCreate("snap", "0 2048 snapshot o c N 8")
		h, err := x.Mapper.Open("snap", "a reader")
		do(t, err)
		first, second := make([]byte, 1<<20), make([]byte, 1<<20)
		do(t, block.Read(h.Device(), first, 0))
		do(t, x.load("snap", "0 2048 snapshot o c N 8"))
		do(t, x.Resume(inTime(t), "snap", false))
		do(t, block.Read(h.Device(), second, 0))
		if !bytes.Equal(first, second) {
			t.Error("the snapshot is not frozen")
		}
		h.Close()
		do(t, x.Remove(inTime(t), "snap", false))
	}
	close(stop)
	writers.Wait()
}

// TestSnapshotEvent: a snapshot that becomes invalid is an event of its device.
func TestSnapshotEvent(t *testing.T) {
	x := newRig(t, map[string]block.Device{"o": memory(t, 1<<20), "c": memory(t, 16<<10)})
	x.mustCreate("base", "0 2048 snapshot-origin o")
	x.mustCreate("snap", "0 2048 snapshot o c P 8")
	events := x.info("snap").Events
	waited := make(chan error, 1)
	go func() {
		_, err := x.Wait(inTime(t), "snap", events)
		waited <- err
	}()
	mustWrite(t, x.open("base"), 0, 1<<20, 1)
	do(t, <-waited)
	if got := x.info("snap").LiveState[0].Args; got != "Invalid" {
		t.Errorf("status %q", got)
	}
}
