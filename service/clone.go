package service

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"cowherd/api"
	"cowherd/backend/file"
	"cowherd/block"
	"cowherd/clonemeta"
	"cowherd/internal/size"
	"cowherd/kcopyd"
	"cowherd/target/clone"
)

// A clone is an origin whose backing is a clone target over a destination, its metadata and a source. All that can be
// done with an origin can be done with it.
//
//	cloned as a leaf -> clone.Clone -> destination
//	                                -> source            until everything is hydrated and committed
//	                                -> clonemeta         a file beside the destination
//
// The state file says that a clone was made (savedDevice.Cloned) before anybody is told of it: from then on metadata or
// destination that are not there cost the device, and are never made anew, since that would show the source's data in
// place of what was written.

const (
	// regionDefault is the region size in bytes where none is given.
	regionDefault = 64 << 10
	// hydrationBytes and batchBytes are what is in flight in the background, and in one copy, where nothing is said.
	hydrationBytes = 16 << 20
	batchBytes     = 1 << 20
	// metadataSuffix is the end of the names of files that the daemon makes for metadata.
	metadataSuffix = ".clone-metadata"
	// glance is how much of a block device must be zero for it to count as empty.
	glance = 1 << 20
)

// cloned is a clone and what it stands on, as the leaf of an origin.
type cloned struct {
	*clone.Clone
	request api.CloneRequest
	engine  kcopyd.Engine
	dest    *backing
	meta    *clonemeta.Metadata
	store   *backing // that meta is on
	made    []string // files that were made for it

	hydrated chan struct{} // closed when everything is hydrated and committed, unless it was when the clone was opened
	letGo    func() error  // see newCloned
	detached atomic.Bool   // the source is closed, or was not opened, because it is no longer needed

	mu sync.Mutex
	// nil: it is no longer used.
	source *source // +checklocks:mu
}

// Submit maps r. See block.Device.
func (x *cloned) Submit(r *block.Request) {
	if d := x.Map(r); d != nil {
		d.Submit(r)
	}
}

// openBacking opens what an origin stands on: a device, or a clone.
func (d *Daemon) openBacking(o *origin, saved *savedDevice) (*backing, error) {
	r := &o.request
	if r.Clone == (api.CloneRequest{}) {
		return d.openDevice(o.name, *r)
	}
	x, err := d.openClone(o.name, r, saved.Cloned)
	if err != nil {
		return nil, fmt.Errorf("clone: %w", err)
	}
	o.cloned, saved.Cloned = x, true
	x.Resume()
	return &backing{leaf: x}, nil
}

// openClone makes a clone, or goes on with one; known: it was made before, and nothing of it is to be made anew.
func (d *Daemon) openClone(name string, r *api.AttachRequest, known bool) (_ *cloned, err error) {
	if err := checkClone(r); err != nil {
		return nil, err
	}
	x := d.newCloned(name, r)
	defer func() {
		if err != nil {
			err = errors.Join(err, x.release())
			if !known {
				for _, path := range x.made {
					err = errors.Join(err, removeFile(path))
				}
			}
		}
	}()
	if x.request.Metadata == "" {
		x.request.Metadata = metadataPath(r.Device)
	}
	there, err := d.openMetadata(name, x)
	if err == nil && !there && known {
		err = api.Errorf(syscall.ENOENT, "the metadata %s is not there any more: which regions of %s hold data is not known",
			x.request.Metadata, r.Device)
	}
	if err != nil {
		return nil, err
	}
	zero := false
	if there {
		err = d.reopenClone(name, r, x)
	} else {
		zero, err = d.makeClone(name, r, x)
	}
	if err == nil {
		err = x.checkSizes(r.Device)
	}
	if err != nil {
		return nil, err
	}
	return x, d.startClone(name, r, x, zero)
}

// checkSizes tells whether source and destination are too short for what the metadata is of: then they are not those that
// it was made for, which it does not name. As in the kernel they may be longer.
func (x *cloned) checkSizes(destination string) error {
	length := x.meta.TargetSize().Bytes()
	for _, part := range []struct {
		what, name string
		device     block.Device
	}{{"destination", destination, x.dest}, {"source", x.request.Source, sourceDevice(x.currentSource())}} {
		if part.device != nil && part.device.Size() < length {
			return api.Errorf(syscall.EINVAL, "the metadata %s is of a clone of %s, and the %s %s has only %s: they do not belong "+
				"together", x.request.Metadata, size.Exact(length), part.what, part.name, size.Exact(part.device.Size()))
		}
	}
	return nil
}

// newCloned makes a clone that nothing of is open.
func (d *Daemon) newCloned(name string, r *api.AttachRequest) *cloned {
	x := &cloned{request: r.Clone, engine: d.newEngine(), hydrated: make(chan struct{})}
	// letGo closes the source, which is no longer needed, and tells. It may be called again; all calls wait for the first,
	// and return what it does.
	x.letGo = sync.OnceValue(func() error {
		err := x.closeSource()
		x.detached.Store(true)
		d.bus.publish(api.Event{Type: api.EventSourceDetached, Name: name, Cause: causeOf(err)})
		return err
	})
	return x
}

// checkClone tells what is wrong with a request.
func checkClone(r *api.AttachRequest) error {
	c := &r.Clone
	switch {
	case c.Source == "":
		return api.Errorf(syscall.EINVAL, "it needs a source")
	case !filepath.IsAbs(r.Device):
		return api.Errorf(syscall.EINVAL, "destination %q: an absolute path is wanted", r.Device)
	case c.Metadata != "" && !filepath.IsAbs(c.Metadata):
		return api.Errorf(syscall.EINVAL, "metadata %q: an absolute path is wanted", c.Metadata)
	case c.RegionBytes != 0 && (c.RegionBytes < clone.RegionSizeMin.Bytes() || c.RegionBytes > clone.RegionSizeMax.Bytes() ||
		c.RegionBytes&(c.RegionBytes-1) != 0):
		return api.Errorf(syscall.EINVAL, "a region size of %d bytes is not a power of two from 4 KiB to 1 GiB", c.RegionBytes)
	case c.Order != "" && c.Order != api.OrderSequential && c.Order != api.OrderHottest:
		return api.Errorf(syscall.EINVAL, "order %q: %s or %s is wanted", c.Order, api.OrderSequential, api.OrderHottest)
	}
	return nil
}

// metadataPath is where a clone's metadata is if nothing else is said: beside the destination.
func metadataPath(destination string) string { return destination + metadataSuffix }

// openMetadata opens the file or block device that holds the metadata; there tells whether it holds any. If there is no
// file, x has none.
func (d *Daemon) openMetadata(name string, x *cloned) (there bool, err error) {
	path := x.request.Metadata
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if x.store, err = d.openFile(name, path, file.Options{}); err != nil {
		return false, fmt.Errorf("metadata: %w", err)
	}
	x.meta, err = clonemeta.Open(x.store, clonemeta.Params{RegionSize: block.SectorFloor(x.request.RegionBytes)})
	switch {
	case errors.Is(err, clonemeta.ErrUnformatted):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("metadata %s: %w", path, err)
	}
	return true, nil
}

// reopenClone opens what a clone whose metadata is there needs: the source only if something is left to be copied.
func (d *Daemon) reopenClone(name string, r *api.AttachRequest, x *cloned) error {
	var err error
	if x.dest, err = d.openFile(name, r.Device, file.Options{Direct: r.Direct}); err != nil {
		return fmt.Errorf("destination: %w", err)
	}
	all, err := clone.IsHydrated(x.meta)
	if err != nil || all {
		x.detached.Store(all)
		return err
	}
	return d.openSource(name, x)
}

// makeClone opens the source and makes destination and metadata as it needs them. zero: the destination is zero.
func (d *Daemon) makeClone(name string, r *api.AttachRequest, x *cloned) (zero bool, err error) {
	if err := d.openSource(name, x); err != nil {
		return false, err
	}
	src := x.currentSource()
	length := src.Size()
	if length == 0 || length%block.SectorSize != 0 {
		return false, api.Errorf(syscall.EINVAL, "the source has %d bytes: a multiple of 512, and some, are wanted", length)
	}
	if zero, err = d.makeDestination(name, r, x, length); err != nil {
		return false, fmt.Errorf("destination: %w", err)
	}
	region := x.request.RegionBytes
	if region == 0 {
		region = regionDefault
	}
	p := clonemeta.Params{RegionSize: block.SectorFloor(region), TargetSize: block.SectorFloor(length)}
	if x.store == nil {
		if err := x.create(x.request.Metadata, clonemeta.Size(p)); err != nil {
			return false, fmt.Errorf("metadata: %w", err)
		}
		if x.store, err = d.openFile(name, x.request.Metadata, file.Options{}); err != nil {
			return false, fmt.Errorf("metadata: %w", err)
		}
	}
	if x.meta, err = clonemeta.Format(x.store, p); err != nil {
		return false, fmt.Errorf("metadata %s: %w", x.request.Metadata, err)
	}
	return zero, x.keepMade()
}

// create makes a sparse file that is to be removed if the clone is not made after all.
func (x *cloned) create(path string, length int64) error {
	made, err := file.Create(path, length, file.Options{})
	if err != nil {
		return err
	}
	x.made = append(x.made, path)
	return made.Close()
}

// keepMade makes durable that the files are there that were made, before anybody is told of the clone.
func (x *cloned) keepMade() error {
	var dirs []string
	for _, path := range x.made {
		dirs = append(dirs, filepath.Dir(path))
	}
	slices.Sort(dirs)
	var errs []error
	for _, dir := range slices.Compact(dirs) {
		errs = append(errs, syncDir(dir))
	}
	return errors.Join(errs...)
}

// makeDestination opens the destination, a file that is made if there is none.
func (d *Daemon) makeDestination(name string, r *api.AttachRequest, x *cloned, length int64) (zero bool, err error) {
	zero = x.request.DestinationIsZero
	if _, err := os.Stat(r.Device); errors.Is(err, fs.ErrNotExist) {
		if err := x.create(r.Device, length); err != nil {
			return false, err
		}
		zero = true
	}
	if x.dest, err = d.openFile(name, r.Device, file.Options{Direct: r.Direct}); err != nil {
		return false, err
	}
	if has := x.dest.Size(); has < length {
		return false, api.Errorf(syscall.EINVAL, "%s has %s, and the source %s: it is too short", r.Device, size.Exact(has),
			size.Exact(length))
	}
	if zero || x.request.Overwrite {
		return zero, nil
	}
	empty, err := isEmpty(r.Device, x.dest)
	if err == nil && !empty {
		err = api.Errorf(syscall.EEXIST, "%s holds something already, and there is no metadata of a clone that it might be: to let "+
			"the clone take its place, say so (--overwrite)", r.Device)
	}
	return false, err
}

// isEmpty tells whether a file has no data, or a block device begins with zeroes.
func isEmpty(path string, d *backing) (empty bool, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return false, err
	}
	if l, ok := d.leaf.(block.ExtentLister); ok && info.Mode().IsRegular() {
		err = l.Extents(0, d.Size(), func(e block.Extent) bool {
			empty = e.Zero
			return empty
		})
		return empty, err
	}
	p := make([]byte, min(glance, d.Size()))
	err = block.Read(d, p, 0)
	return len(bytes.Trim(p, "\x00")) == 0, err
}

// startClone puts everything together.
func (d *Daemon) startClone(name string, r *api.AttachRequest, x *cloned, zero bool) (err error) {
	c := &x.request
	batch := c.Batch
	if batch == 0 {
		batch = uint32(max(1, batchBytes/x.meta.RegionSize().Bytes()))
	}
	threshold := c.Threshold
	if threshold == 0 {
		threshold = max(batch, uint32(max(1, hydrationBytes/x.meta.RegionSize().Bytes())))
	}
	order := clone.Sequential
	if c.Order == api.OrderHottest {
		order = clone.Hottest
	}
	config := clone.Config{
		Name: name, Destination: x.dest.leaf, Metadata: x.meta, Engine: x.engine,
		Hydration: clone.Hydration{
			Disabled: c.NoHydration, Threshold: threshold, Batch: batch, PromoteOnRead: !c.NoPromoteOnRead, Order: order,
		},
		NoDiscardPassdown: c.NoDiscardPassdown, DestinationIsZero: zero,
		Event: func(e clone.Event) { d.cloneEvent(name, x, e) },
	}
	if src := x.currentSource(); src != nil {
		config.Source = src.Device
	}
	x.Clone, err = clone.New(config)
	return err
}

// cloneEvent tells what has happened to a clone.
func (d *Daemon) cloneEvent(name string, x *cloned, e clone.Event) {
	types := map[clone.EventKind]string{
		clone.EventHydrated: api.EventCloneHydrated, clone.EventMode: api.EventCloneMode,
		clone.EventRegionFailed: api.EventHydrationFailed, clone.EventStopped: api.EventHydrationStopped,
	}
	d.bus.publish(api.Event{Type: types[e.Kind], Name: name, Cause: causeOf(e.Err)})
	if e.Kind == clone.EventHydrated {
		close(x.hydrated)
		d.tasks.Go(func() { _ = x.letGo() }) // the event tells
	}
}

// Close ends a clone that nobody uses any more.
func (x *cloned) Close() error {
	err := x.breakOff()
	err = errors.Join(err, x.Clone.Close())
	if x.Status().Mode != clone.ReadWrite {
		err = nil // all have been told
	}
	return errors.Join(err, x.release())
}

// release closes everything below the target, as far as it is open.
func (x *cloned) release() error {
	err := x.engine.Close()
	if x.meta != nil {
		err = errors.Join(err, x.meta.Close())
	}
	for _, b := range []*backing{x.store, x.dest} {
		if b != nil {
			err = errors.Join(err, b.close())
		}
	}
	return errors.Join(err, x.closeSource())
}

// errNoClone is what operations on clones get for other devices.
func errNoClone() error { return api.Errorf(syscall.EINVAL, "it is not a clone") }

// Hydrate changes how a clone is hydrated.
func (d *Daemon) Hydrate(ctx context.Context, name string, r api.HydrationRequest) (api.Device, error) {
	o, err := d.lockOrigin(ctx, name)
	if err == nil {
		defer o.unlock()
		err = d.hydrate(o, &r)
	}
	if err != nil {
		return api.Device{}, fmt.Errorf("hydrate %q: %w", name, err)
	}
	return d.describeOrigin(o), nil
}

// DetachSource lets go of the source of a clone when everything is hydrated and committed, which is seen to, and returns
// when the source is closed. Again it does nothing. EBUSY: there is something left to hydrate.
func (d *Daemon) DetachSource(ctx context.Context, name string) (api.Device, error) {
	o, err := d.lockOrigin(ctx, name)
	if err == nil {
		defer o.unlock()
		err = d.detachSource(ctx, o)
	}
	if err != nil {
		return api.Device{}, fmt.Errorf("detach the source of %q: %w", name, err)
	}
	return d.describeOrigin(o), nil
}

// detachSource does it for an origin whose operations are the caller's.
func (d *Daemon) detachSource(ctx context.Context, o *origin) error {
	x := o.cloned
	if x == nil {
		return errNoClone()
	}
	if x.detached.Load() {
		return nil
	}
	if st := x.Status(); st.SourceInUse {
		if err := notHydrated(&st); err != nil {
			return err
		}
		if err := x.Commit(); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, d.config.SuspendTimeout)
	defer cancel()
	select {
	case <-x.hydrated:
		return x.letGo()
	case <-ctx.Done():
		return fmt.Errorf("reads of the source do not end: %w", ctx.Err())
	}
}

// notHydrated tells what a clone needs its source for, if it does.
func notHydrated(st *clone.Status) error {
	left := st.Regions - st.Hydrated
	switch {
	case st.Mode != clone.ReadWrite:
		return api.Errorf(syscall.EIO, "nothing is hydrated any more, as it is in mode %v: %v", st.Mode, st.Cause)
	case left > 0 && st.Failed > 0:
		return api.Errorf(syscall.EBUSY, "%d of %d regions are not hydrated; %d of them could not be copied, one because of: %v",
			left, st.Regions, st.Failed, st.FirstError)
	case left > 0 && !st.Enabled:
		return api.Errorf(syscall.EBUSY, "%d of %d regions are not hydrated, and hydration is stopped", left, st.Regions)
	case left > 0:
		return api.Errorf(syscall.EBUSY, "%d of %d regions are not hydrated yet", left, st.Regions)
	}
	return nil
}

// hydrate does it for an origin whose operations are the caller's. What changes is remembered before it does.
func (d *Daemon) hydrate(o *origin, r *api.HydrationRequest) error {
	x := o.cloned
	if x == nil {
		return errNoClone()
	}
	err := d.saved.change(func(c *content) {
		saved := c.device(o.name)
		if saved == nil {
			return
		}
		known := &saved.Request.Clone
		if r.Running != nil {
			known.NoHydration = !*r.Running
		}
		if r.Threshold != 0 {
			known.Threshold = r.Threshold
		}
		if r.Batch != 0 {
			known.Batch = r.Batch
		}
	})
	if err != nil {
		return err
	}
	if r.Threshold != 0 {
		x.SetThreshold(r.Threshold)
	}
	if r.Batch != 0 {
		x.SetBatch(r.Batch)
	}
	if r.Retry {
		if err := x.revive(d.ending); err != nil {
			return fmt.Errorf("the source does not come back: %w", err)
		}
		x.Retry()
	}
	if r.Running != nil {
		x.SetHydration(*r.Running)
	}
	return nil
}

// describeClone adds what a clone has beside other devices.
func (d *Daemon) describeClone(o *origin, to *api.Device) {
	x := o.cloned
	st := x.Status()
	to.Kind = api.KindClone
	if o.merging() == nil {
		to.Target, to.TargetStatus = "clone", st.String()
	}
	order := x.request.Order
	if order == "" {
		order = api.OrderSequential
	}
	to.Clone = &api.Clone{
		Source: x.request.Source, SourceInUse: st.SourceInUse, Detached: x.detached.Load(), Metadata: x.request.Metadata,
		RegionBytes: st.RegionSize.Bytes(), Regions: st.Regions, Hydrated: st.Hydrated, Hydrating: st.Hydrating,
		Running: st.Enabled, Threshold: st.Threshold, Batch: st.Batch, PromoteOnRead: !x.request.NoPromoteOnRead, Order: order,
		Passdown: st.Passdown, Mode: st.Mode.String(), Cause: causeOf(st.Cause), FailedRegions: st.Failed,
		FirstError: causeOf(st.FirstError), Stopped: st.Stopped, TableBytes: st.TableBytes, Commits: st.Commits,
		Kcopyd: d.describeEngine(x.engine),
	}
}
