package dm_test

import (
	"context"
	"fmt"
	"sync"
	"syscall"
	"testing"

	"cowherd/backend/mem"
	"cowherd/block"
	"cowherd/dm"
	"cowherd/kcopyd"
	"cowherd/target"
	"cowherd/target/clone"
	"cowherd/target/delay"
	"cowherd/target/errortarget"
	"cowherd/target/flakey"
	"cowherd/target/linear"
	"cowherd/target/logwrites"
	"cowherd/target/snapshot"
	"cowherd/target/striped"
	"cowherd/target/zero"
)

// newEngine makes a copy engine.
func newEngine() kcopyd.Engine { return kcopyd.NewScaled(kcopyd.Config{}) }

// rig is a Mapper over a few devices in memory: the Host of its tests.
type rig struct {
	*dm.Mapper
	t       testing.TB
	devices map[string]block.Device

	mu     sync.Mutex
	opened int             // +checklocks:mu
	names  map[string]bool // +checklocks:mu
}

// newRig makes a Mapper of all small targets, and of more. At the end of the test it has no device, and has given
// everything back.
func newRig(t testing.TB, devices map[string]block.Device, more ...*target.Type) *rig {
	x := &rig{t: t, devices: devices, names: map[string]bool{}}
	x.Mapper = dm.NewMapper(x, append([]*target.Type{
		linear.Type(), striped.Type(), zero.Type(), errortarget.Type(), delay.Type(), flakey.Type(), logwrites.Type(),
		clone.NewTables(newEngine).Type(),
	}, append(more, snapshot.NewFamily(newEngine).Types()...)...))
	t.Cleanup(func() {
		if err := x.Close(context.Background()); err != nil {
			t.Error(err)
		}
		x.mu.Lock()
		defer x.mu.Unlock()
		if x.opened != 0 || len(x.names) != 0 {
			t.Errorf("%d devices are left open, names %v taken", x.opened, x.names)
		}
	})
	return x
}

// Open opens one of the devices.
func (x *rig) Open(arg string, _ bool, user string) (dm.Lower, error) {
	d := x.devices[arg]
	if d == nil {
		return dm.Lower{}, fmt.Errorf("%s: %w", arg, syscall.ENOENT)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.opened++
	return dm.Lower{Lower: target.Lower{Device: d, Name: target.Name(arg)}, Close: func() error {
		x.mu.Lock()
		defer x.mu.Unlock()
		x.opened--
		return nil
	}}, nil
}

// Claim takes a name.
func (x *rig) Claim(name string) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.names[name] {
		return fmt.Errorf("%q is taken: %w", name, syscall.EBUSY)
	}
	x.names[name] = true
	return nil
}

// Unclaim gives a name back.
func (x *rig) Unclaim(name string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.names, name)
}

// create makes a device with a live table.
func (x *rig) create(name, table string) error {
	if err := x.Create(dm.CreateRequest{Name: name, Minor: -1}); err != nil {
		return err
	}
	err := x.load(name, table)
	if err == nil {
		err = x.Resume(inTime(x.t), name, true)
	}
	if err != nil {
		if removed := x.Remove(inTime(x.t), name, false); removed != nil {
			x.t.Error(removed)
		}
	}
	return err
}

// load fills the inactive slot.
func (x *rig) load(name, table string) error {
	lines, err := dm.Parse(table)
	if err != nil {
		return err
	}
	return x.Load(inTime(x.t), name, lines, false)
}

// mustCreate is create of what must be right.
func (x *rig) mustCreate(name, table string) {
	x.t.Helper()
	if err := x.create(name, table); err != nil {
		x.t.Fatal(err)
	}
}

// open is a device in use by the test until it ends.
func (x *rig) open(name string) *dm.Device {
	x.t.Helper()
	h, err := x.Mapper.Open(name, "the test")
	if err != nil {
		x.t.Fatal(err)
	}
	x.t.Cleanup(h.Close)
	return h.Device()
}

// info is what there is to know of a device.
func (x *rig) info(name string) dm.Info {
	x.t.Helper()
	info, err := x.Info(name)
	if err != nil {
		x.t.Fatal(err)
	}
	return info
}

// memory is a device of size bytes in memory.
func memory(t testing.TB, size int64) block.Device {
	d, err := mem.New(mem.Config{Size: size})
	if err != nil {
		t.Fatal(err)
	}
	return d
}
