// Package linear is the device mapper's linear target: a range of another device.
package linear

import (
	"fmt"

	"cowherd/block"
	"cowherd/target"
)

// Type is made by
//
//	linear <device> <start sector>
func Type() *target.Type {
	return &target.Type{Name: "linear", Version: [3]int{1, 4, 0}, New: func(b *target.Build) (target.Target, error) {
		if b.Args.Len() != 2 {
			return nil, target.Errorf("invalid argument count")
		}
		name := b.Args.Next()
		start, err := b.Args.Sector()
		if err != nil {
			return nil, err
		}
		lower, err := b.Open(name)
		if err != nil {
			return nil, err
		}
		if err := b.Within(lower, start, b.Length); err != nil {
			return nil, err
		}
		return New(lower, start.Bytes(), b.Size()), nil
	}}
}

// Target maps all of itself to a range of one device.
type Target struct {
	lower target.Lower
	start int64
	size  int64
}

// New maps size bytes to lower from offset start on; the caller has checked that they lie within the device and are
// multiples of its logical block. The device stays the caller's.
func New(lower target.Lower, start, size int64) *Target {
	return &Target{lower: lower, start: start, size: size}
}

// Map moves r to the device.
func (t *Target) Map(r *block.Request) block.Device {
	r.Offset += t.start
	return t.lower.Device
}

// Size is the length of the range in bytes.
func (t *Target) Size() int64 { return t.size }

// Limits are the device's.
func (t *Target) Limits() block.Limits { return t.lower.Limits() }

// Remap is Map for a copy.
func (t *Target) Remap(offset, length int64) (to block.Device, at, n int64, ok bool) {
	return t.lower.Device, t.start + offset, length, true
}

// TableLine is the device and where the range starts there.
func (t *Target) TableLine() string {
	return fmt.Sprintf("%s %d", t.lower.Name, block.SectorFloor(t.start))
}

// StatusLine is empty.
func (t *Target) StatusLine() string { return "" }

// Extents are the device's; everything is data if it does not know.
func (t *Target) Extents(offset, length int64, yield func(block.Extent) bool) error {
	return block.ExtentsOf(t.lower.Device, t.start+offset, length, func(e block.Extent) bool {
		e.Offset -= t.start
		return yield(e)
	})
}
