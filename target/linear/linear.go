// Package linear is the device mapper's linear target: a range of another device.
package linear

import "cowherd/block"

// Target maps all of itself to a range of one device.
type Target struct {
	device block.Device
	start  int64
	size   int64
}

// New maps size bytes to device from offset start on; the caller has checked that they lie within the device and are
// multiples of its logical block. The device stays the caller's.
func New(device block.Device, start, size int64) *Target {
	return &Target{device: device, start: start, size: size}
}

// Map moves r to the device.
func (t *Target) Map(r *block.Request) block.Device {
	r.Offset += t.start
	return t.device
}

// Size is the length of the range in bytes.
func (t *Target) Size() int64 { return t.size }

// Limits are the device's.
func (t *Target) Limits() block.Limits { return t.device.Limits() }

// Remap is Map for a copy.
func (t *Target) Remap(offset, length int64) (to block.Device, at, n int64, ok bool) {
	return t.device, t.start + offset, length, true
}

// Extents are the device's; everything is data if it does not know.
func (t *Target) Extents(offset, length int64, yield func(block.Extent) bool) error {
	return block.ExtentsOf(t.device, t.start+offset, length, func(e block.Extent) bool {
		e.Offset -= t.start
		return yield(e)
	})
}
