// Package target has the words that the device mapper and its targets share: what a Target is and what it may be able
// to do besides, what a Type of target is, and what it is made of. A target is a mapping of one range of sectors; the
// packages below target/ are one kind each, and dm makes devices of them.
//
// A Type is data with one function: New reads the arguments of a line of a table and makes a Target. Whoever makes
// devices is given a list of types; there is no global one.
//
// Every optional power of a target is an interface of its own that dm looks for once, when it puts a table together. A
// target that has none of them is complete: Map, Size and Limits suffice.
//
// # The life of a target
//
//	New         the table is loaded; nothing is asked of the target before Preresume
//	Preresume   the table is about to go live: what may fail is done here
//	Resume      it is live, but no request comes yet
//	Map         any number of times, concurrently
//	Presuspend  the device is about to be suspended; requests still come, and those that wait in the target must end
//	Postsuspend no request is in flight
//	Close       the table is gone; without Preresume if it never was live
//
// The hooks of one target are called one at a time, with no lock of its device held.
package target

import (
	"cowherd/block"
	"cowherd/kcopyd"
)

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

// A Passer can tell of a read or a write, before Map, that it would only pass it on. A mapped device then submits it to
// the device below by itself, and counts it in flight as if it were in the target.
type Passer interface {
	// Passes tells whether Map would return the device below (Passage) with r as it is. It leaves r alone and starts nothing,
	// and Map may follow all the same. r's range has been checked. The answer holds while the device above is not suspended;
	// it may be asked when that is, or the target closed, but nothing comes of it then.
	Passes(r *block.Request) bool
	// Passage is the device below, which does not change, and what is sure to pass without a question. It is asked each time
	// that the device above begins to take requests. NoPassage: everything is to be asked.
	Passage() (below block.Device, sure Passage)
}

// A Copying target has copies made by engines of its own. Watchers are told of them.
type Copying interface {
	Watch(w kcopyd.Watcher)
	Unwatch(w kcopyd.Watcher)
}

// A Splitter has a boundary that no read and no write may cross when Map sees it.
type Splitter interface {
	// SplitAt is the distance in bytes between boundaries, counted from the target's start; 0: there are none. It is
	// asked when the table is put together. A discard or a write of zeroes is not cut.
	SplitAt() int64
}

// A Reporter has something to say in the lines of "table" and "status", behind the target's range and type. Without it
// both are empty.
type Reporter interface {
	// TableLine is the arguments that would make the target again.
	TableLine() string
	// StatusLine is the target's state.
	StatusLine() string
}

// A Messenger takes messages.
type Messenger interface {
	// Message does what words ask for and may have an answer. There is at least one word. EINVAL: it is not understood.
	Message(words []string) (answer string, err error)
}

// A Suspender is told when its device is suspended, and when it is resumed.
type Suspender interface {
	Preresume() error
	Resume()
	Presuspend()
	Postsuspend()
}

// A Closer has something to let go of. Close is called once, when no request is in flight and none comes any more. The
// devices that the target has opened (Build.Open) are closed behind it.
type Closer interface {
	Close() error
}
