// Package invariant checks what must hold whatever happens, in race and test builds (tag "invariants"); elsewhere it
// costs nothing.
package invariant
