//go:build invariants || race

package invariant

import "fmt"

// Enabled tells whether invariants are checked in this build.
const Enabled = true

// Check panics when ok is false: a programmer's error, never an operating one.
func Check(ok bool, format string, args ...any) {
	if !ok {
		panic("invariant: " + fmt.Sprintf(format, args...))
	}
}
