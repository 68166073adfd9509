package invariant

import "sync/atomic"

// crossing is passed by all that goes through a socket.
var crossing atomic.Int64

// Crossing is called before bytes are sent and after they are received by system calls that the race detector does
// not see: what happened before the one has happened before the other, as the standard library tells the detector of
// its own calls. It does nothing where invariants are not checked.
func Crossing() {
	if Enabled {
		crossing.Add(1)
	}
}
