package dm_test

import (
	"errors"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"cowherd/block"
)

// TestCloneTables: a clone by tables, reloaded under its user, hydrated by a message, removed, and there again.
func TestCloneTables(t *testing.T) {
	x := newRig(t, map[string]block.Device{"m": memory(t, 4<<20), "d": memory(t, 1<<20), "s": memory(t, 1<<20)})
	mustWrite(t, x.devices["s"], 0, 1<<20, 7)
	x.mustCreate("c", "0 2048 clone m d s 8 1 no_hydration")
	h, err := x.Mapper.Open("c", "a user")
	do(t, err)
	c := h.Device()
	wantBytes(t, c, 0, 1<<20, 7)
	mustWrite(t, c, 4096, 4096, 8)
	if err := x.create("e", "0 2048 clone m d s 8"); !errors.Is(err, syscall.EBUSY) || !strings.Contains(err.Error(), "metadata") {
		t.Errorf("a second clone of the same metadata: %v", err)
	}
	do(t, x.load("c", "0 2048 clone m d s 8 1 no_hydration 2 hydration_threshold 4"))
	do(t, x.Resume(inTime(t), "c", true))
	if info := x.info("c"); info.LiveTable[0].Args != "m d s 8 1 no_hydration 2 hydration_threshold 4" ||
		!strings.Contains(info.LiveState[0].Args, " 8 1/256 0 1 no_hydration 4 hydration_threshold 4 hydration_batch_size 1 rw") {
		t.Errorf("table %v, status %v", info.LiveTable, info.LiveState)
	}
	wantBytes(t, c, 0, 4096, 7)
	wantBytes(t, c, 4096, 4096, 8)
	_, err = x.Message(inTime(t), "c", 0, []string{"enable_hydration"})
	do(t, err)
	for deadline := time.Now().Add(patience); !strings.Contains(x.info("c").LiveState[0].Args, " 256/256 "); runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("hydration does not end: %v", x.info("c").LiveState)
		}
	}
	h.Close()
	do(t, x.Remove(inTime(t), "c", false))
	x.mustCreate("c", "0 2048 clone m d s 8")
	wantBytes(t, x.open("c"), 4096, 4096, 8)
	wantBytes(t, x.devices["d"], 8192, 4096, 7)
}

// TestCloneTablesRefused: what is wrong with a clone's line.
func TestCloneTablesRefused(t *testing.T) {
	x := newRig(t, map[string]block.Device{"m": memory(t, 4<<20), "d": memory(t, 1<<20), "s": memory(t, 1<<20)})
	for args, want := range map[string]string{
		"m d s":                       "invalid number of arguments",
		"no d s 8":                    "failed to open metadata device",
		"m no s 8":                    "failed to open destination device",
		"m d no 8":                    "failed to open source device",
		"m d s 7":                     "invalid region size",
		"m d s 24":                    "region size is not a power of 2",
		"m d s 8 3 a b c":             "invalid number of feature arguments",
		"m d s 8 1 nonsense":          "invalid feature argument",
		"m d s 8 0 1 x":               "number of core arguments must be even",
		"m d s 8 0 2 nonsense 1":      "invalid core argument",
		"m d s 8 0 6 a 1 b 1 c 1 d 1": "invalid number of core arguments",
	} {
		if err := x.create("c", "0 2048 clone "+args); !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOENT) ||
			!strings.Contains(strings.ToLower(err.Error()), want) {
			t.Errorf("%q: %v, want %q", args, err, want)
		}
	}
	if err := x.create("c", "0 4096 clone m d s 8"); err == nil || !strings.Contains(err.Error(), "larger than destination") {
		t.Errorf("too long: %v", err)
	}
}
