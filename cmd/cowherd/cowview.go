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
	"cowherd/target/snapshot"
)

// viewArguments are the COW device and the origin of commands that look at a snapshot's view.
type viewArguments struct {
	Origin string `required:"" type:"existingfile" complete:"file" placeholder:"FILE" help:"The origin of the snapshot, a file or block device."`
	cowArgument
}

// view is the view of a persistent snapshot over a COW device and an origin that are not changed.
type view struct {
	origin, cow *file.Device
	snapshot    *snapshot.Snapshot
	device      *dm.Device
}

// openView opens the snapshot for reading only.
func (c *viewArguments) openView() (v *view, err error) {
	if same, err := sameFile(c.Origin, c.File); err != nil || same {
		return nil, errors.Join(err, c.wrap(errors.New("it is given as the origin and as the COW device")))
	}
	v = &view{}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.close())
		}
	}()
	if v.cow, err = c.openCOW(true); err != nil {
		return v, err
	}
	if v.origin, err = file.Open(c.Origin, file.Options{ReadOnly: true}); err != nil {
		return v, err
	}
	store, err := cowstore.OpenPersistent(v.cow, cowstore.PersistentConfig{ReadOnly: true})
	if err != nil {
		return v, c.wrap(err)
	}
	if !store.Valid() {
		return v, c.wrap(errInvalid)
	}
	v.snapshot, err = snapshot.New(snapshot.Config{ // without an engine: what is only read is never copied
		Name: c.File, Origin: snapshot.NewOrigin(v.origin), COW: v.cow, Store: store, ReadOnly: true,
	})
	if err != nil {
		return v, err
	}
	v.device = dm.NewDevice(c.File, v.snapshot, true)
	return v, nil
}

// errInvalid is why there is no view.
var errInvalid = errors.New("the snapshot is invalid: chunks of it were lost, and its view with them")

// close lets go of everything.
func (v *view) close() error {
	var errs []error
	if v.device != nil {
		errs = append(errs, v.device.Close(context.Background()))
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
