package dm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cowherd/block"
	"cowherd/dm"
	"cowherd/internal/fault"
)

// TestMapperModel: writers and readers check every byte of a device while what lies below is suspended, given other
// tables that map the same, resumed, stacked anew and removed, in random order.
func TestMapperModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	const sectors = 1024
	x := newRig(t, map[string]block.Device{"a": memory(t, sectors*512), "b": memory(t, sectors*512)})
	// Whatever the tables, sector s is on a for s < 512 and on b for others, each at s.
	bottom := []string{
		"0 512 linear a 0\n512 512 linear b 512",
		"0 256 linear a 0\n256 256 linear a 256\n512 512 linear b 512",
		"0 512 delay a 0 1\n512 512 linear b 512",
		"0 512 linear a 0\n512 512 striped 1 64 b 512",
		"0 512 linear a 0\n512 512 flakey b 512 1000000 1",
	}
	middle := []string{"0 1024 linear bottom 0", "0 100 linear bottom 0\n100 924 linear bottom 100", "0 1024 striped 1 32 bottom 0"}
	top := []string{"0 1024 linear middle 0", "0 512 linear middle 0\n512 512 linear bottom 512"}
	x.mustCreate("bottom", bottom[0])
	x.mustCreate("middle", middle[0])
	x.mustCreate("top", top[0])

	var running sync.WaitGroup
	var over atomic.Bool
	d := x.open("top")
	for w := range int64(4) {
		running.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(w)))
			model := make([]byte, sectors/4*512)
			for !over.Load() {
				offset := rnd.Int64N(sectors/4) * 512
				p := make([]byte, min((1+rnd.Int64N(8))*512, int64(len(model))-offset))
				at := w*int64(len(model)) + offset
				if rnd.IntN(2) == 0 {
					for i := range p {
						p[i] = byte(rnd.Uint32())
					}
					copy(model[offset:], p)
					if err := block.Write(d, p, at); err != nil {
						t.Errorf("write of %d at %d: %v", len(p), at, err)
						return
					}
				} else if err := block.Read(d, p, at); err != nil || !bytes.Equal(p, model[offset:][:len(p)]) {
					t.Errorf("read of %d at %d: %v, or other data", len(p), at, err)
					return
				}
			}
		})
	}
	rnd := rand.New(rand.NewPCG(seed, 99))
	tables := map[string][]string{"bottom": bottom, "middle": middle, "top": top}
	names := []string{"bottom", "middle", "top"}
	for range 150 {
		name := names[rnd.IntN(3)]
		var err error
		switch rnd.IntN(6) {
		case 0: // no device below is suspended, so that this one's requests end
			for _, below := range names {
				if below == name {
					break
				}
				do(t, x.Resume(inTime(t), below, false))
			}
			err = x.Suspend(inTime(t), name, rnd.IntN(2) == 0)
		case 1, 2:
			err = x.load(name, tables[name][rnd.IntN(len(tables[name]))])
		case 3:
			err = x.Clear(inTime(t), name)
		case 4:
			for _, below := range names {
				do(t, x.Resume(inTime(t), below, false))
			}
		default:
			extra := fmt.Sprint("extra", rnd.IntN(3))
			err = x.create(extra, "0 10 linear "+name+" 0")
			if err == nil && rnd.IntN(2) == 0 {
				err = x.Remove(inTime(t), extra, false)
			}
			if errors.Is(err, syscall.EBUSY) {
				err = x.Remove(inTime(t), extra, false)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range names {
		do(t, x.Resume(inTime(t), name, false))
	}
	over.Store(true)
	running.Wait()
}

// TestSuspendDepth: a device with many requests in flight is suspended as soon as they end, and keeps the next ones.
func TestSuspendDepth(t *testing.T) {
	slow := fault.New(memory(t, 1<<20))
	x := newRig(t, map[string]block.Device{"a": slow})
	x.mustCreate("x", "0 2048 linear a 0")
	d := x.open("x")
	slow.Hold(func(*block.Request) bool { return true })
	var calls []*call
	for i := range 256 {
		calls = append(calls, submit(d, block.OpWrite, block.Queue(i), int64(i)*512, make([]byte, 512)))
	}
	suspended := make(chan error, 1)
	go func() { suspended <- x.Suspend(inTime(t), "x", false) }()
	for { // until the gate is closed
		if _, _, _, ok := d.Remap(0, 0, 512); !ok {
			break
		}
		d.Release(0)
		runtime.Gosched()
	}
	kept := submit(d, block.OpRead, 0, 0, make([]byte, 512))
	slow.Release()
	do(t, <-suspended)
	for _, c := range calls {
		c.want(t, nil)
	}
	kept.pending(t, "suspended")
	do(t, x.Resume(inTime(t), "x", false))
	kept.want(t, nil)
}

// TestSuspendTakesTooLong: a suspend that gives up leaves the device running, and its targets as they were.
func TestSuspendTakesTooLong(t *testing.T) {
	stuck := fault.New(memory(t, 1<<20))
	x := newRig(t, map[string]block.Device{"a": stuck})
	x.mustCreate("x", "0 2048 delay a 0 1")
	d := x.open("x")
	stuck.Hold(func(*block.Request) bool { return true })
	c := submit(d, block.OpRead, 0, 0, make([]byte, 512))
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		stuck.WaitHeld(1)
		cancel()
	}()
	if err := x.Suspend(ctx, "x", false); !errors.Is(err, context.Canceled) {
		t.Errorf("suspended: %v", err)
	}
	if err := x.load("x", "0 1024 linear a 0"); err != nil {
		t.Fatal(err)
	}
	if err := x.Resume(ctx, "x", false); !errors.Is(err, context.Canceled) {
		t.Errorf("resumed with another table: %v", err)
	}
	if info := x.info("x"); info.Suspended || !info.Inactive || info.LiveTable[0].Type != "delay" {
		t.Errorf("the device is left as %+v", info)
	}
	stuck.Release()
	c.want(t, nil)
	do(t, block.Read(d, make([]byte, 512), 0))
}

// TestNames: names, UUIDs, minor numbers, who has which, and what happens to those who lie on a device.
func TestNames(t *testing.T) {
	x := newRig(t, map[string]block.Device{"a": memory(t, 1<<20)})
	create := func(name, uuid string, minor int) error {
		return x.Create(dm.CreateRequest{Name: name, UUID: uuid, Minor: minor})
	}
	do(t, create("one", "U1", 5))
	do(t, create("two", "", -1))
	for _, c := range []struct {
		err  error
		want error
		text string
	}{
		{create("one", "", -1), syscall.EBUSY, "taken"},
		{create("three", "U1", -1), syscall.EBUSY, "UUID"},
		{create("three", "", 5), syscall.EBUSY, "minor"},
		{create("three", "", 1<<20), syscall.EINVAL, "minor"},
		{create("", "", -1), syscall.EINVAL, "empty"},
		{create("a/b", "", -1), syscall.EINVAL, "slash"},
		{create(strings.Repeat("x", 128), "", -1), syscall.EINVAL, "127"},
		{create("three", strings.Repeat("x", 129), -1), syscall.EINVAL, "128"},
		{x.Rename(inTime(t), "one", "two"), syscall.EBUSY, "two"},
		{x.Rename(inTime(t), "no", "three"), syscall.ENXIO, "no"},
		{x.SetUUID(inTime(t), "one", "U2"), syscall.EINVAL, "U1"},
		{x.SetUUID(inTime(t), "two", "U1"), syscall.EBUSY, "U1"},
		{x.Suspend(inTime(t), "no", true), syscall.ENXIO, "no"},
		{x.Resume(inTime(t), "no", true), syscall.ENXIO, "no"},
		{x.Remove(inTime(t), "no", true), syscall.ENXIO, "no"},
		{x.Clear(inTime(t), "no"), syscall.ENXIO, "no"},
		{x.load("no", "0 1 zero"), syscall.ENXIO, "no"},
		{x.load("one", ""), syscall.EINVAL, "no targets"},
		{x.load("one", "0 1 linear one 0"), syscall.ELOOP, "itself"},
	} {
		if !errors.Is(c.err, c.want) || !strings.Contains(c.err.Error(), c.text) {
			t.Errorf("got %v, want %v and %q", c.err, c.want, c.text)
		}
	}
	do(t, x.load("one", "0 8 linear a 0"))
	do(t, x.Resume(inTime(t), "one", true))
	do(t, x.load("two", "0 8 linear 253:5 0"))
	do(t, x.Resume(inTime(t), "two", true))
	if err := x.load("one", "0 8 linear /dev/mapper/two 0"); !errors.Is(err, syscall.ELOOP) {
		t.Errorf("a loop of two: %v", err)
	}
	if err := x.Remove(inTime(t), "one", false); !errors.Is(err, syscall.EBUSY) || !strings.Contains(err.Error(), `"two"`) {
		t.Errorf("removed below another: %v", err)
	}
	do(t, x.Rename(inTime(t), "one", "uno"))
	if got := x.info("two").LiveTable[0].Args; got != "uno 0" {
		t.Errorf("table %q over a renamed device", got)
	}
	if info := x.info("uno"); info.Events != 1 || info.Open != 1 || info.Minor != 5 || info.UUID != "U1" {
		t.Errorf("info %+v", info)
	}
	if name, err := x.Lookup("U1", 0); err != nil || name != "uno" {
		t.Errorf("by UUID: %q, %v", name, err)
	}
	if name, err := x.Lookup("", 5); err != nil || name != "uno" {
		t.Errorf("by number: %q, %v", name, err)
	}
	if deps := x.info("two").Deps; len(deps) != 1 || deps[0] != (dm.Dep{Name: "uno", Major: dm.Major, Minor: 5}) {
		t.Errorf("dependencies %v", deps)
	}
}

// TestDeferred: a device that is in use goes with its last user.
func TestDeferred(t *testing.T) {
	x := newRig(t, map[string]block.Device{"a": memory(t, 1<<20)})
	x.mustCreate("low", "0 8 linear a 0")
	x.mustCreate("high", "0 8 linear low 0")
	h, err := x.Mapper.Open("high", "somebody")
	do(t, err)
	if err := x.Remove(inTime(t), "high", false); !errors.Is(err, syscall.EBUSY) || !strings.Contains(err.Error(), "somebody") {
		t.Errorf("removed in use: %v", err)
	}
	do(t, x.Remove(inTime(t), "low", true))
	do(t, x.Remove(inTime(t), "high", true))
	if !x.info("low").Deferred || !x.info("high").Deferred {
		t.Error("it is not said that they are to go")
	}
	do(t, block.Read(h.Device(), make([]byte, 512), 0))
	h.Close()
	for deadline := time.Now().Add(patience); len(x.Names()) > 0; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%v are left", x.Names())
		}
	}
}

// TestResize: a table of another size takes effect when it is resumed, for those who have the device open too.
func TestResize(t *testing.T) {
	x := newRig(t, map[string]block.Device{"a": memory(t, 1<<20)})
	do(t, x.Create(dm.CreateRequest{Name: "x", Minor: -1}))
	d := x.open("x")
	if err := block.Read(d, make([]byte, 512), 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("read without a table: %v", err)
	}
	if err := block.Flush(d); !errors.Is(err, syscall.EIO) {
		t.Errorf("flush without a table: %v", err)
	}
	for _, sectors := range []int64{8, 16, 4} {
		do(t, x.load("x", fmt.Sprintf("0 %d linear a 0", sectors)))
		do(t, x.Resume(inTime(t), "x", true))
		if d.Size() != sectors*512 {
			t.Errorf("size %d, want %d sectors", d.Size(), sectors)
		}
		do(t, block.Read(d, make([]byte, 512), sectors*512-512))
		if err := block.Write(d, make([]byte, 512), sectors*512); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("write behind the end: %v", err)
		}
	}
}

// TestMessages: which target gets a message, and what is said where there is none.
func TestMessages(t *testing.T) {
	x := newRig(t, map[string]block.Device{"a": memory(t, 1<<20), "b": memory(t, 1<<20)})
	x.mustCreate("x", "0 8 linear a 0\n8 8 log-writes a b")
	do(t, x.Create(dm.CreateRequest{Name: "empty", Minor: -1}))
	for _, c := range []struct {
		name   string
		sector block.Sector
		words  []string
		text   string
	}{
		{"x", 8, []string{"mark", "m"}, ""},
		{"x", 15, []string{"MARK", "m"}, ""},
		{"x", 16, []string{"mark", "m"}, "outside"},
		{"x", 0, []string{"mark", "m"}, "does not support messages"},
		{"x", 8, nil, "empty message"},
		{"empty", 0, []string{"mark", "m"}, "no table"},
		{"no", 0, []string{"mark", "m"}, "no mapped device"},
	} {
		_, err := x.Message(inTime(t), c.name, c.sector, c.words)
		if c.text == "" && err != nil || c.text != "" && (err == nil || !strings.Contains(err.Error(), c.text)) {
			t.Errorf("%s at %d: %v, want %q", c.name, c.sector, err, c.text)
		}
	}
}

// TestRemoveLate: nothing reaches what a device lay on once its removal has ended.
func TestRemoveLate(t *testing.T) {
	counted := fault.New(memory(t, 1<<20))
	x := newRig(t, map[string]block.Device{"a": counted})
	for range 30 {
		x.mustCreate("x", "0 2048 linear a 0")
		h, err := x.Mapper.Open("x", "writers")
		do(t, err)
		d := h.Device()
		var writers sync.WaitGroup
		for w := range int64(3) {
			writers.Go(func() {
				for {
					err := block.Write(d, make([]byte, 512), w*512)
					if errors.Is(err, syscall.ESHUTDOWN) {
						return
					}
					if err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		h.Close()
		do(t, x.Remove(inTime(t), "x", false))
		seen := counted.Seen(block.OpWrite)
		writers.Wait()
		if late := counted.Seen(block.OpWrite) - seen; late > 0 {
			t.Fatalf("%d writes after the removal", late)
		}
	}
}

// TestRefuse: what waits in a suspended device fails when it is told to.
func TestRefuse(t *testing.T) {
	x := newRig(t, map[string]block.Device{"a": memory(t, 1<<20)})
	x.mustCreate("x", "0 2048 linear a 0")
	d := x.open("x")
	do(t, x.Suspend(inTime(t), "x", true))
	kept := submit(d, block.OpWrite, 0, 0, make([]byte, 512))
	kept.pending(t, "suspended")
	x.Refuse()
	kept.want(t, syscall.ESHUTDOWN)
	submit(d, block.OpWrite, 0, 0, make([]byte, 512)).want(t, syscall.ESHUTDOWN)
}
