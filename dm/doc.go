// Package dm makes named devices out of targets, as the device mapper does: a Device holds a live target and can be
// suspended, given another target and resumed, atomically against the I/O that runs through it.
//
// # Lock order
//
//	Device.mu    a leaf: never held across I/O or a completion
package dm
