// Package errortarget is the device mapper's error target: all I/O fails. It stands where a part of a device is to be
// missing, in tests and in what is left of a disk.
package errortarget

import (
	"syscall"

	"cowherd/block"
	"cowherd/target"
)

// Type is made by
//
//	error [<device> <start sector>]
//
// With a device, the target has that device's limits. The device is not used otherwise, and the kernel's table line does
// not show it.
func Type() *target.Type {
	return &target.Type{Name: "error", Version: [3]int{1, 7, 0}, New: func(b *target.Build) (target.Target, error) {
		t := New(b.Size())
		if b.Args.Len() == 0 {
			return t, nil
		}
		name := b.Args.Next()
		if b.Args.Len() > 0 {
			if _, err := b.Args.Sector(); err != nil { // of no use, as in the kernel
				return nil, err
			}
		}
		lower, err := b.Open(name)
		if err != nil {
			return nil, err
		}
		t.limits = lower.Limits()
		return t, nil
	}}
}

// Target has nothing but a size and limits.
type Target struct {
	size   int64
	limits block.Limits
}

// New makes size bytes that nobody can read or write.
func New(size int64) *Target { return &Target{size: size, limits: block.NoLimits()} }

// Map fails everything but a flush, as which nothing can be lost.
func (t *Target) Map(r *block.Request) block.Device {
	if r.Op == block.OpFlush {
		r.Complete(nil)
	} else {
		r.Complete(block.NewError(r, syscall.EIO, "an error target"))
	}
	return nil
}

// Size is what New was given.
func (t *Target) Size() int64 { return t.size }

// Limits are none, or the device's.
func (t *Target) Limits() block.Limits { return t.limits }
