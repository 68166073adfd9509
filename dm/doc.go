// Package dm makes named devices out of targets, as the device mapper does.
//
//	Device    a live target behind a gate: it can be suspended, given another target and resumed, atomically against the
//	          I/O that runs through it
//	Table     targets side by side, which is a target itself
//	Mapped    a Device whose target is a table, with a slot for the next table, a UUID, a count of its events
//	Mapper    mapped devices by their names; they may lie on each other, to any depth, but not on themselves
//
// A Mapper is given the types of targets that its tables may name, and a Host, which opens whatever is not a mapped
// device. What it takes and what it shows is what the kernel takes and shows, but for device names: testdata/tables.txt
// is recorded from a kernel.
//
// # Differences
//
// A number that does not fit its type is refused; the kernel cuts it off. Whether a target lies within its devices is
// checked when a table is loaded; the kernel checks a second table only when it is resumed. A device cannot be made to
// lie on itself by way of others; the kernel looks at the device itself only.
//
// # Lock order
//
//	Mapped.verb      a semaphore held for a whole verb, device I/O and opening of devices included: waiting for it ends
//	                 with the waiter's context
//	  Mapper.mu      names, users, what lies on what
//	    Mapped.mu    slots and events
//	  Mapped.reports held for reading while targets tell of themselves, for writing before a table is closed
//	    Mapper.mu
//	Device.ways      of a device that looks for its way past the gates below (direct.go)
//	  Device.mu      a leaf: never held across I/O or a completion, nor with that of another device
//
// A target's hooks and its Close run under its own device's verb only, its StatusLine and TableLine under reports.
package dm
