// Package target has the words that the device mapper and its targets share: what a Target is, and what it may be able
// to do besides. A target is a mapping of one range of sectors; the packages below target/ are one kind each, and dm
// makes devices of them.
//
// Every optional power is an interface of its own that dm looks for once, when it puts a table together. A target that
// has none of them is complete: Map, Size and Limits suffice.
package target

import "cowherd/block"

// A Target is what a mapped device is made of. Map either remaps r (changes its offset) and returns the device that
// it goes to, or takes it and returns nil: the target then completes it, or submits it, itself. Map is called
// concurrently, on the caller's goroutine, with r's range checked against Size and Limits, neither of which changes.
// Offsets count from the target's own first byte, wherever that lies in the device. A flush has no range, and comes to
// every target of a device.
//
// A Target may also be a block.ExtentLister.
type Target interface {
	Map(r *block.Request) block.Device
	Size() int64
	Limits() block.Limits
}

// A Remapper leaves data as it is and only changes where it lies, so that a copy can be offloaded to what is below it.
type Remapper interface {
	// Remap tells where the bytes at offset lie: on which device, at which offset there, and how many bytes from there
	// on lie side by side, 1 to length. The range is within Size. Without ok nothing else is of meaning. It never
	// blocks; the answer holds while the device above is not suspended.
	Remap(offset, length int64) (to block.Device, at, n int64, ok bool)
}

// A Splitter has a boundary that no read and no write may cross when Map sees it.
type Splitter interface {
	// SplitAt is the distance in bytes between boundaries, counted from the target's start; 0: there are none. It is
	// asked when the device is resumed. A discard or a write of zeroes is not cut.
	SplitAt() int64
}
