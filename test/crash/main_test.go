// Package crash tests that a persistent snapshot survives a crash at any moment. Random operations on an origin and a
// snapshot of it run over disks whose every write and flush is recorded (fault.Recorder). Then, for each event of the
// log, the disks are taken as they would be had the program been killed there, and at flushes and now and then as they
// might be had the power failed; the store is opened again and compared with a model:
//
//	origin     each sector holds the last write to it that was acknowledged and then flushed, or a later one
//	snapshot   the same for its own writes, and else what the origin held when it was taken; never anything else
//	store      opens; it may be invalid only where there was no room
//
// After a kill, "acknowledged" is enough. The table is read by the test itself too, as the kernel would, in order that
// a mistake of the store is not hidden by one that undoes it. A run has generations: each goes on from the disks that a
// crash of the one before has left, so that gaps, and rests of records, are met again. See TestPersistent for what is
// varied. TestMerge does the same while a snapshot is merged, and lets the merge go on after each crash. TestClone does it
// with clones.
//
// A failure prints the command that repeats it:
//
//	go test ./test/crash -run '^TestPersistent$/^seed=7$/^areas$' -seed 7
//
// -seeds N tries that many seeds for each case, -for 2h goes on with new ones for so long (make crash).
package crash

import (
	"flag"
	"testing"

	"go.uber.org/goleak"
)

var (
	oneSeed   = flag.Uint64("seed", 0, "the only seed to try; 0: those that -seeds says")
	seedCount = flag.Uint64("seeds", 1, "try the seeds from 1 to this")
	crashTime = flag.Duration("for", 0, "go on with further seeds for so long")
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
