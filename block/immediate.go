package block

// Immediate is a device that may do requests on the caller's goroutine without waiting for anything, as memory does: an
// optional power of a leaf. What lies above it then need not push itself on a request to learn of its end.
type Immediate interface {
	// IsImmediate tells whether the device does so, which never changes. If not, Perform must not be called.
	IsImmediate() bool
	// Perform is Submit without the completion: it does r, which stays the caller's, and tells how that went. Offset,
	// Length and Data of r are as they were afterwards.
	Perform(r *Request) error
}
