// Package metamorphic tests that a result does not depend on how cowherd is set up: one seed makes one list of
// operations on an origin and its snapshots, which is done in many configurations. Every byte that is read must be the
// same in all of them, and what a model made of plain byte slices says.
//
//	seed -> list of steps         a step is up to stepMax operations at the same time
//	seed -> configurations        route (targets called directly, over devices that complete now or later; the daemon
//	                              by NBD, with one connection or several) x engine x origin x COW store x chunk size
//	                              x copy buffers
//	for each configuration:       the steps, one after the other, in the system and in the model; what was read is
//	                              compared; at the end all devices are read, and the origin's file
//
// The operations of a step go to different queues and must not disturb each other, so that what each of them reads is
// certain: two on one device do not overlap if one of them writes, and while a snapshot is taken nobody writes to the
// origin. But they may well be on the same chunk, or on the same chunk of origin and snapshot, which is what a snapshot
// has to get right.
//
// What a discard leaves behind is not defined, and may differ between configurations: the model marks those bytes, and
// no comparison looks at them until they are written again.
//
// A failure prints the command that repeats it:
//
//	go test ./test/metamorphic -run TestSameEverywhere -seed 7
//
// -seeds N tries the seeds 1 to N, -steps N makes longer lists, -configs N takes more configurations for each.
package metamorphic

import (
	"flag"
	"testing"

	"go.uber.org/goleak"

	"cowherd/internal/invariant"
)

var (
	oneSeed     = flag.Uint64("seed", 0, "the only seed to try; 0: those that -seeds says")
	seedCount   = flag.Uint64("seeds", 4, "try the seeds from 1 to this")
	stepCount   = flag.Int("steps", stepsDefault(), "steps of a list")
	configCount = flag.Int("configs", 8, "configurations that a list is done in")
)

// stepsDefault is less under the race detector, which takes many times as long.
func stepsDefault() int {
	if invariant.Enabled {
		return 120
	}
	return 300
}

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
