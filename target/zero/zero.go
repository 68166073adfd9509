// Package zero is the device mapper's zero target: reads give zeroes, and what is written is forgotten.
package zero

import (
	"cowherd/block"
	"cowherd/target"
)

// Type is made by
//
//	zero
func Type() *target.Type {
	return &target.Type{Name: "zero", Version: [3]int{1, 2, 0}, New: func(b *target.Build) (target.Target, error) {
		if b.Args.Len() != 0 {
			return nil, target.Errorf("no arguments required")
		}
		return New(b.Size()), nil
	}}
}

// Target has nothing but a size.
type Target struct{ size int64 }

// New makes size bytes of zeroes.
func New(size int64) *Target { return &Target{size: size} }

// Map completes everything.
func (t *Target) Map(r *block.Request) block.Device {
	if r.Op == block.OpRead {
		clear(r.Data)
	}
	r.Complete(nil)
	return nil
}

// Size is what New was given.
func (t *Target) Size() int64 { return t.size }

// Limits are none.
func (t *Target) Limits() block.Limits { return block.NoLimits() }

// Extents are one hole.
func (t *Target) Extents(offset, length int64, yield func(block.Extent) bool) error {
	yield(block.Extent{Offset: offset, Length: length, Hole: true, Zero: true})
	return nil
}
