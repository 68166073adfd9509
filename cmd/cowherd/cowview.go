package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"cowherd/backend/file"
	"cowherd/cowstore"
	"cowherd/dm"
	"cowherd/kcopyd"
	"cowherd/target/snapshot"
)

// viewArguments are the COW device and the origin of commands that look at a snapshot's view.
type viewArguments struct {
	Origin string `required:"" type:"existingfile" complete:"file" placeholder:"FILE" help:"The origin of the snapshot, a file or block device."`
	cowArgument
}

// view is the view of a persistent snapshot over a COW device and an origin that nobody else has open.
type view struct {
	origin, cow *file.Device
	engine      *kcopyd.Scaled
	snapshot    *snapshot.Snapshot
	device      *dm.Device // nil: it was opened for merging
}

// openView opens the snapshot for reading only. The error says what is wrong with which file.
func (c *viewArguments) openView() (*view, error) {
	v, err := c.openSnapshot(true)
	if err != nil {
		return nil, err
	}
	v.device = dm.NewDevice(c.File, v.snapshot, true)
	return v, nil
}

// openSnapshot opens the snapshot, and serves it to nobody.
func (c *viewArguments) openSnapshot(readOnly bool) (_ *view, err error) {
	if same, err := sameFile(c.Origin, c.File); err != nil || same {
		return nil, errors.Join(err, c.wrap(errors.New("it is given as the origin and as the COW device")))
	}
	v := &view{}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.close())
		}
	}()
	if v.cow, err = c.openCOW(readOnly); err != nil {
		return nil, err
	}
	if v.origin, err = file.Open(c.Origin, file.Options{ReadOnly: readOnly}); err != nil {
		return nil, err
	}
	store, err := cowstore.OpenPersistent(v.cow, cowstore.PersistentConfig{ReadOnly: readOnly})
	if err != nil {
		return nil, c.wrap(err)
	}
	if !store.Valid() {
		return nil, c.wrap(errInvalid)
	}
	v.engine = kcopyd.NewScaled(kcopyd.Config{})
	v.snapshot, err = snapshot.New(snapshot.Config{
		Name: c.File, Origin: snapshot.NewOrigin(v.origin), COW: v.cow, Store: store, Engine: v.engine, ReadOnly: readOnly,
	})
	return v, err
}

// errInvalid is why there is no view.
var errInvalid = errors.New("the snapshot is invalid: chunks of it were lost, and its view with them")

// close lets go of everything.
func (v *view) close() error {
	var errs []error
	if v.device != nil {
		errs = append(errs, v.device.Close(context.Background()))
	}
	if v.engine != nil {
		errs = append(errs, v.engine.Close())
	}
	if v.snapshot != nil {
		errs = append(errs, v.snapshot.Close())
	}
	for _, d := range []*file.Device{v.origin, v.cow} {
		if d != nil {
			errs = append(errs, d.Close())
		}
	}
	return errors.Join(errs...)
}

// sameFile tells whether two paths lead to one file or block device.
func sameFile(a, b string) (bool, error) {
	statA, err := os.Stat(a)
	if err != nil {
		return false, err
	}
	statB, err := os.Stat(b)
	if err != nil {
		return false, err
	}
	if os.SameFile(statA, statB) {
		return true, nil
	}
	sysA, okA := statA.Sys().(*syscall.Stat_t)
	sysB, okB := statB.Sys().(*syscall.Stat_t)
	if !okA || !okB {
		return false, fmt.Errorf("%s, %s: what they are is not known", a, b)
	}
	// Two names of one block device are two files.
	return sysA.Mode&syscall.S_IFMT == syscall.S_IFBLK && sysB.Mode&syscall.S_IFMT == syscall.S_IFBLK && sysA.Rdev == sysB.Rdev, nil
}
