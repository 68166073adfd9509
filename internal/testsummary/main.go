// Command testsummary reads the events of `go test -json` on its standard input and prints what a person wants to
// know: one line for each package, all output of the tests that fail, and at the end which tests failed, which were
// skipped and why, and as the last line the count of all:
//
//	412 passed, 0 failed, 3 skipped
//
// A line "run: NAME" begins a new run of tests (plain, race): each run is counted and all are summed up. A line
// "skipped: WHAT" adds to the list at the end something that no event tells of. Other lines that are no events are
// printed as they come.
//
// Tests are counted as leaves: one with subtests counts only if it fails by itself. A package that fails without a
// failing test (it does not build, its TestMain found a leak) counts as one failure, and so does a test that was
// running when its package ended. The exit code is 1 if anything failed or if no test passed.
package main

import (
	"fmt"
	"os"
)

func main() {
	s := newSummary(os.Stdout)
	if err := s.read(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "testsummary:", err)
		os.Exit(1)
	}
	if !s.finish() {
		os.Exit(1)
	}
}
