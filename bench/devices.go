package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"cowherd/backend/file"
	"cowherd/backend/mem"
	"cowherd/backend/nbd"
	"cowherd/backend/null"
	"cowherd/block"
	"cowherd/cowstore"
)

// pool keeps memory devices from run to run of a group of cells, so that their memory is touched once only, and the
// memory of media devices for all groups.
type pool struct {
	kept    map[poolKey]*mem.Device
	windows *windows
}

type poolKey struct {
	role string
	size int64
}

// mem gives a memory device all of whose memory has been touched.
func (p pool) mem(role string, size int64) (*mem.Device, error) {
	key := poolKey{role, size}
	if d := p.kept[key]; d != nil {
		return d, nil
	}
	d, err := mem.New(mem.Config{Size: size})
	if err != nil {
		return nil, err
	}
	p.kept[key] = d
	return d, fill(d)
}

func (p pool) close() error {
	var errs []error
	for key, d := range p.kept {
		errs = append(errs, d.Close())
		delete(p.kept, key)
	}
	return errors.Join(errs...)
}

// What a device of a stack is for.
const (
	roleDevice = "device" // what is measured, an origin, the source of a copy: filled
	roleCOW    = "cow"    // a COW device, sparse and new where that makes a difference
	roleOther  = "other"  // the destination of a clone or a copy, the same
)

// kit makes the leaf devices of one run, all of the kind that the cell names, and closes them.
type kit struct {
	cell       *Cell
	pool       pool
	controller *null.Controller
	link       *null.Link
	command    *mediaCommand
	counts     []*ioCounts
	closers    []io.Closer
	paths      []string
}

// newKit makes what the devices share.
func newKit(c *Cell, p pool) (*kit, error) {
	k := &kit{cell: c, pool: p}
	var err error
	if c.Device == deviceMedia && hasEngine(c) && c.Offload != offloadOff {
		k.command = newMediaCommand(c)
	}
	if onDevice(deviceNull, deviceRemote)(c) && hasController(c) {
		config := null.ControllerConfig{Latency: c.CopyLatency, Bandwidth: c.CopyBandwidth}
		if c.Device == deviceRemote {
			config.Method = block.CopyServer
		}
		if k.controller, err = null.NewController(config); err != nil {
			return nil, err
		}
	}
	if c.Bandwidth > 0 {
		k.link, err = null.NewLink(c.Bandwidth)
	}
	return k, err
}

// close closes the devices, the last made first, and removes their files.
func (k *kit) close() error {
	var errs []error
	for i := len(k.closers) - 1; i >= 0; i-- {
		errs = append(errs, k.closers[i].Close())
	}
	for _, p := range k.paths {
		if err := os.Remove(p); !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// device makes a device of a role; number tells those of one role apart.
func (k *kit) device(role string, number int, size int64) (block.Device, error) {
	d, err := k.leaf(role, number, size)
	if err != nil || !k.cell.Counted {
		return d, err
	}
	return k.counted(role, d), nil
}

// leaf makes a device by the name of its kind.
func (k *kit) leaf(role string, number int, size int64) (block.Device, error) {
	c := k.cell
	switch c.Device {
	case deviceBlank:
		return blank{size}, nil
	case deviceMem:
		return k.pool.mem(fmt.Sprintf("%s%d", role, number), size)
	case deviceMedia:
		w := k.pool.windows
		return &media{size: size, memory: w.of(fmt.Sprintf("%s%d", role, number)), windows: w, command: k.command}, nil
	case deviceFile:
		return k.file(role, size)
	case deviceNBD:
		return k.export(role, size)
	}
	d, err := null.New(null.Config{
		Size: size, Latency: c.Latency, Queues: c.Queues, Controller: k.controller, Link: k.link,
		Name: fmt.Sprintf("%s%d", role, number),
	})
	if err != nil {
		return nil, err
	}
	k.closers = append(k.closers, d)
	return d, nil
}

// file makes a new file, so that each run finds the file system's extents in the same state. COW devices of transient
// snapshots are made as the daemon makes them.
func (k *kit) file(role string, size int64) (block.Device, error) {
	c := k.cell
	if role == roleCOW && c.Store == Transient && !c.Direct && !c.Counted {
		d, err := file.TempStriped(c.Dir, size, cowstore.StripeBytes(cowstore.ChunkSize(c.Chunk)), cowstore.Shards())
		if err != nil {
			return nil, err
		}
		k.closers = append(k.closers, d)
		return d, nil
	}
	path := filepath.Join(c.Dir, fmt.Sprintf("cowherd-bench-%d-%s%d", os.Getpid(), role, len(k.paths)))
	d, err := file.Create(path, size, file.Options{Direct: c.Direct})
	if err != nil {
		return nil, err
	}
	k.paths, k.closers = append(k.paths, path), append(k.closers, d)
	if role == roleDevice && !isSparse(c) {
		err = errors.Join(fill(d), block.Flush(d))
	}
	return d, err
}

// export opens one of the two exports that the cell names.
func (k *kit) export(role string, size int64) (block.Device, error) {
	uri := k.cell.URI
	if role != roleDevice {
		uri = k.cell.OtherURI
	}
	config, err := nbd.ParseURI(uri)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	d, err := nbd.Open(ctx, config)
	if err != nil {
		return nil, err
	}
	k.closers = append(k.closers, d)
	if d.Size() < size {
		return nil, fmt.Errorf("%s has %d bytes, and %d are needed", config.URI(), d.Size(), size)
	}
	return cut{d, size}, nil
}

// cut is the beginning of a device.
type cut struct {
	block.Device
	size int64
}

func (d cut) Size() int64 { return d.size }

// blank is a device that does nothing, at once: it does not even zero what is read, as the null device does, which for
// regions of 64 KiB would cost more than everything else.
type blank struct{ size int64 }

func (d blank) Size() int64             { return d.size }
func (d blank) Limits() block.Limits    { return block.NoLimits() }
func (d blank) Submit(r *block.Request) { r.Complete(nil) }
