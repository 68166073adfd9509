package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"syscall"
	"testing"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/kcopyd"
)

const (
	kib    = 1 << 10
	errEIO = syscall.EIO
)

var errInjected = errors.New("injected")

const errNoRoom = syscall.ENOSPC

// TestReadAgainstCompletion: a read of the snapshot is on its way to the origin when the chunk's copy ends. The write
// to the origin that asked for the copy must not be let through before the read has ended.
func TestReadAgainstCompletion(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRigWith(t, engine, 64*kib, 4*kib)
		x := g.snaps[0]
		g.upper.Hold(matching(block.OpRead, 100, 1))
		read := start(x.dev, block.OpRead, 1, 100, make([]byte, 512))
		g.upper.WaitHeld(1)
		g.upper.Hold(nil)

		fresh := pattern(2, 4096)
		write := g.write(0, fresh)
		x.waitState(t, 0, draining)
		// The copy is readable; new reads and writes of the snapshot do not wait.
		start(x.dev, block.OpRead, 0, 200, make([]byte, 100)).wantData(t, g.frozen[200:300])
		own := []byte("the snapshot's own")
		start(x.dev, block.OpWrite, 0, 3000, own).want(t, nil)
		second := g.write(512, fresh[512:1024])
		write.pending(t, "write to the origin during a tracked read")
		second.pending(t, "second write")
		if n := g.upper.Seen(block.OpWrite); n != 0 {
			t.Fatalf("%d writes reached the origin", n)
		}
		read.pending(t, "held read")

		g.upper.Release()
		read.wantData(t, g.frozen[100:612])
		write.want(t, nil)
		second.want(t, nil)
		same(t, g.reads(g.dev, 0, 4096), fresh)
		copy(g.frozen[3000:], own)
		g.wantFrozen(x)
		if n := x.upper.Seen(block.OpWrite); n != 2 {
			t.Errorf("%d writes to the COW device, want one copy and one write", n)
		}
	})
}

// TestReadsAgainstCompletion: a write waits for the last of several reads, one of which spans many chunks; reads of
// other chunks do not matter.
func TestReadsAgainstCompletion(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRigWith(t, engine, 64*kib, 4*kib)
		x := g.snaps[0]
		start(g.dev, block.OpWrite, 0, 8192, pattern(3, 100)).want(t, nil) // the wide read has three pieces
		g.upper.Hold(func(r *block.Request) bool { return r.Op == block.OpRead && r.Length == 1000 })
		g.lower.Hold(func(r *block.Request) bool { return r.Op == block.OpRead && r.Length == 10_000-(12288-5000) })
		narrow := start(x.dev, block.OpRead, 0, 13_000, make([]byte, 1000))
		wide := start(x.dev, block.OpRead, 1, 5000, make([]byte, 10_000))
		other := start(x.dev, block.OpRead, 2, 20_000, make([]byte, 1000))
		g.upper.WaitHeld(2)
		g.lower.WaitHeld(1)

		write := g.write(12_288, pattern(2, 4096))
		x.waitState(t, 3, draining)
		elsewhere := g.write(40_000, pattern(4, 1))
		elsewhere.want(t, nil)
		write.pending(t, "write during two reads")
		g.upper.Release()
		narrow.wantData(t, g.frozen[13_000:14_000])
		other.wantData(t, g.frozen[20_000:21_000])
		write.pending(t, "write during one read")
		g.lower.Release()
		wide.wantData(t, g.frozen[5000:15_000])
		write.want(t, nil)
		g.wantFrozen(x)
	})
}

// TestReadWhilePending: while a chunk is copied, reads of the snapshot go to the origin and the write waits for those
// that the end of the copy overtakes.
func TestReadWhilePending(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRigWith(t, engine, 64*kib, 8*kib)
		x := g.snaps[0]
		x.upper.Hold(matching(block.OpWrite, 0, 64*kib))
		write := g.write(8192, pattern(2, 8192))
		x.upper.WaitHeld(1)
		start(x.dev, block.OpRead, 0, 8000, make([]byte, 1000)).wantData(t, g.frozen[8000:9000])
		g.upper.Hold(matching(block.OpRead, 9000, 1))
		read := start(x.dev, block.OpRead, 0, 9000, make([]byte, 10))
		g.upper.WaitHeld(1)
		x.upper.Release()
		x.waitState(t, 1, draining)
		write.pending(t, "write during a tracked read")
		g.upper.Release()
		read.wantData(t, g.frozen[9000:9010])
		write.want(t, nil)
		g.wantFrozen(x)
	})
}

// TestReadBeforeTracking: a read finds that its chunk has no exception, and before it is tracked the chunk is copied
// and the origin overwritten. It must look again.
func TestReadBeforeTracking(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRigWith(t, engine, 64*kib, 4*kib)
		x := g.snaps[0]
		const queue = 1
		shard := x.reads.shards.At(queue)
		shard.mu.Lock()
		got := make(chan *call)
		go func() { got <- start(x.dev, block.OpRead, queue, 100, make([]byte, 512)) }()
		eventually(t, "the read is about to be tracked", func() bool {
			stacks := make([]byte, 1<<20)
			return bytes.Contains(stacks[:runtime.Stack(stacks, true)], []byte("(*trackedReads).begin("))
		})
		g.write(0, pattern(2, 4096)).want(t, nil)
		shard.mu.Unlock()
		(<-got).wantData(t, g.frozen[100:612])
	})
}

// TestTwoWriters: many writes to one chunk need one copy, whoever comes while it is made waits.
func TestTwoWriters(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRigWith(t, engine, 64*kib, 16*kib)
		x := g.snaps[0]
		x.upper.Hold(matching(block.OpWrite, 0, 64*kib))
		var writes []*call
		for i := range 5 {
			offset := 16*kib + int64(i)*1000
			writes = append(writes, start(g.dev, block.OpWrite, block.Queue(i), offset, pattern(2, 1000)))
		}
		own := start(x.dev, block.OpWrite, 1, 17*kib, pattern(3, 1000))
		zeroes := startRange(x.dev, block.OpWriteZeroes, 30*kib, 2*kib)
		x.upper.WaitHeld(1)
		for _, c := range append(writes, own, zeroes) {
			c.pending(t, "write during the copy")
		}
		if n := g.upper.Seen(block.OpWrite); n != 0 {
			t.Fatalf("%d writes reached the origin", n)
		}
		x.upper.Release()
		for _, c := range append(writes, own, zeroes) {
			c.want(t, nil)
		}
		if n := x.upper.Seen(block.OpWrite); n != 2 {
			t.Errorf("%d writes to the COW device, want the copy and the snapshot's own", n)
		}
		if n := g.upper.Seen(block.OpRead); n != 1 {
			t.Errorf("the origin was read %d times", n)
		}
		copy(g.frozen[17*kib:], pattern(3, 1000))
		clear(g.frozen[30*kib : 32*kib])
		g.wantFrozen(x)
		if st := x.Status(); st.Copied != 1 || st.Overwritten != 0 || st.Allocated != 32 {
			t.Errorf("status %+v", st)
		}
	})
}

// TestDropDuringCopy: a snapshot can be dropped only when its copies have ended; afterwards nobody touches its COW
// device any more.
func TestDropDuringCopy(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRigWith(t, engine, 64*kib, 4*kib, 8*kib)
		x, other := g.snaps[0], g.snaps[1]
		x.upper.Hold(matching(block.OpWrite, 0, 64*kib))
		write := g.write(0, pattern(2, 4096))
		own := start(x.dev, block.OpWrite, 0, 20_000, pattern(3, 10))
		x.upper.WaitHeld(2)
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		for _, d := range []interface{ Suspend(context.Context) error }{g.dev, x.dev} {
			if err := d.Suspend(ctx); !errors.Is(err, context.Canceled) {
				t.Fatalf("suspended with a copy in flight: %v", err)
			}
		}
		// Both devices are in service again.
		start(g.dev, block.OpRead, 0, 0, make([]byte, 100)).wantData(t, g.frozen[:100])
		start(x.dev, block.OpRead, 0, 0, make([]byte, 100)).wantData(t, g.frozen[:100])

		dropped := make(chan struct{})
		go func() {
			defer close(dropped)
			g.drop(x)
		}()
		x.upper.Release()
		<-dropped
		write.want(t, nil)
		own.want(t, nil)
		fill(x.ram.data, 0xEE) // a race, if a copy were still in flight
		seen := x.upper.Seen(block.OpWrite)
		start(g.dev, block.OpWrite, 0, 0, pattern(4, 64*kib)).want(t, nil)
		if n := x.upper.Seen(block.OpWrite); n != seen {
			t.Errorf("%d writes to the COW device after the drop", n-seen)
		}
		start(x.dev, block.OpRead, 0, 0, make([]byte, 1)).want(t, syscall.ESHUTDOWN)
		g.wantFrozen(other)
	})
}

// TestFailedWriteWaitsForItsCopy: a write to the snapshot that fails because the snapshot becomes invalid meanwhile
// still waits for the copy that it has started. Else the snapshot could be suspended and dropped, and its COW device
// closed, with that copy in flight.
func TestFailedWriteWaitsForItsCopy(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRigWith(t, engine, 64*kib, 4*kib)
		x := g.snaps[0]
		x.lower.Hold(func(r *block.Request) bool { return r.Op == block.OpWrite && r.Offset == 0 })
		x.upper.Fail(failing(func(r *block.Request) bool { return r.Op == block.OpWrite && r.Offset != 0 }, errInjected))
		own := start(x.dev, block.OpWrite, 0, 100, []byte("own"))
		x.lower.WaitHeld(1)
		waiting := start(x.dev, block.OpWrite, 0, 200, []byte("own"))
		g.write(8192, []byte("x")).want(t, nil) // its copy fails
		g.wantInvalid(x, errInjected)
		late := start(x.dev, block.OpWrite, 0, 300, []byte("own"))
		late.want(t, errEIO)
		own.pending(t, "write whose copy is in flight")
		waiting.pending(t, "write that waits for the copy")
		x.lower.Release()
		own.want(t, errEIO)
		waiting.want(t, errEIO)
	})
}

// TestInvalidDuringSubmit is the same, when the snapshot becomes invalid while the write that starts a copy is still
// on its way: the copy is in flight before the write could wait for it.
func TestInvalidDuringSubmit(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRigWith(t, engine, 64*kib, 4*kib)
		x := g.snaps[0]
		inner := x.engine
		x.engine = hookedEngine{inner, func() { x.invalidate(errInjected) }}
		x.upper.Hold(matching(block.OpWrite, 0, 64*kib))
		own := start(x.dev, block.OpWrite, 0, 100, []byte("own"))
		x.upper.WaitHeld(1)
		own.pending(t, "write whose copy is in flight")
		x.upper.Release()
		own.want(t, errEIO)
		g.wantInvalid(x, errInjected)
	})
}

// TestInvalidWaitsForAllCopies: a write to the origin has started two copies, one of which fails. It waits for the
// other all the same, for the reason above.
func TestInvalidWaitsForAllCopies(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRigWith(t, engine, 64*kib, 4*kib)
		x := g.snaps[0]
		g.write(4096, []byte("x")).want(t, nil) // so that the chunks around it are two exceptions
		x.lower.Fail(failing(matching(block.OpWrite, 2*4096, 4096), errInjected))
		x.lower.Hold(matching(block.OpWrite, 1*4096, 4096))
		x.upper.Hold(matching(block.OpWrite, 2*4096, 4096))
		write := g.write(0, pattern(2, 12*kib))
		x.lower.WaitHeld(1)
		x.upper.WaitHeld(1)
		x.upper.Release()
		g.wantInvalid(x, errInjected)
		late := g.write(0, pattern(3, 4096)) // the copy still reads there
		late.pending(t, "write whose copy is in flight")
		write.pending(t, "write one of whose copies is in flight")
		x.lower.Release()
		write.want(t, nil)
		late.want(t, nil)
	})
}

// TestFullChunkWrite: a write to the snapshot that covers a chunk needs no copy. A write to the origin meanwhile waits
// for it, and a read of the snapshot meanwhile sees the old data.
func TestFullChunkWrite(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		for _, fails := range []bool{false, true} {
			g := newRigWith(t, engine, 64*kib, 4*kib)
			x := g.snaps[0]
			if fails {
				x.lower.Fail(failing(matching(block.OpWrite, 0, 64*kib), errInjected))
			}
			x.upper.Hold(matching(block.OpWrite, 0, 64*kib))
			own, fresh := pattern(2, 8192), pattern(3, 8192)
			ownWrite := start(x.dev, block.OpWrite, 0, 4096, own)
			x.upper.WaitHeld(1)
			write := g.write(6000, fresh)
			again := start(x.dev, block.OpWrite, 0, 5000, []byte("again"))
			start(x.dev, block.OpRead, 0, 4096, make([]byte, 8192)).wantData(t, g.frozen[4096:12288])
			write.pending(t, "write to the origin during a full-chunk write")
			again.pending(t, "write to a pending chunk")
			if n := g.upper.Seen(block.OpWrite); n != 0 {
				t.Fatalf("%d writes reached the origin", n)
			}
			x.upper.Release()
			write.want(t, nil)
			same(t, g.reads(g.dev, 6000, 8192), fresh)
			if fails {
				ownWrite.want(t, errEIO)
				again.want(t, errEIO)
				g.wantInvalid(x, errInjected)
				continue
			}
			ownWrite.want(t, nil)
			again.want(t, nil)
			copy(g.frozen[4096:], own)
			copy(g.frozen[5000:], "again")
			g.wantFrozen(x)
			if st := x.Status(); st.Overwritten != 2 || st.Copied != 1 {
				t.Errorf("%d chunks overwritten and %d copied, want 2 and 1", st.Overwritten, st.Copied)
			}
		}
	})
}

// TestFullChunkWriteTracked: the same while a read of the snapshot is on its way to the origin.
func TestFullChunkWriteTracked(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRigWith(t, engine, 64*kib, 4*kib)
		x := g.snaps[0]
		g.upper.Hold(matching(block.OpRead, 0, 64*kib))
		read := start(x.dev, block.OpRead, 0, 4096, make([]byte, 4096))
		g.upper.WaitHeld(1)
		own := start(x.dev, block.OpWrite, 0, 4096, pattern(2, 4096))
		x.waitState(t, 1, draining)
		write := g.write(4096, pattern(3, 4096))
		write.pending(t, "write to the origin during a tracked read")
		g.upper.Release()
		read.wantData(t, g.frozen[4096:8192]) // it began before the write; the old data is right
		own.want(t, nil)
		write.want(t, nil)
		copy(g.frozen[4096:], pattern(2, 4096))
		g.wantFrozen(x)
	})
}

// TestOverwriteDuringCopy: a full-chunk write to the snapshot finds a copy in flight. It waits for it, lest the copy
// end later and put the old data over it.
func TestOverwriteDuringCopy(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRigWith(t, engine, 64*kib, 4*kib)
		x := g.snaps[0]
		x.upper.Hold(matching(block.OpWrite, 0, 64*kib))
		write := g.write(4096, pattern(3, 4096))
		x.upper.WaitHeld(1)
		own := start(x.dev, block.OpWrite, 0, 0, pattern(2, 12*kib))
		own.pending(t, "write over a chunk that is copied")
		x.upper.Release()
		own.want(t, nil)
		write.want(t, nil)
		copy(g.frozen, pattern(2, 12*kib))
		g.wantFrozen(x)
	})
}

// TestInvalidationAgainstCommit: one copy fails while another is in flight and while reads are on their way to the
// origin. Writes to the origin succeed; what is in flight is waited for; a read that a write may have overtaken fails.
func TestInvalidationAgainstCommit(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRigWith(t, engine, 64*kib, 4*kib, 8*kib)
		x, other := g.snaps[0], g.snaps[1]
		const a, b, c, d = 0, 8192, 16384, 24576
		// A read of c and one of d are on their way; d's copy has ended and waits for its read.
		g.upper.Hold(func(r *block.Request) bool { return r.Op == block.OpRead && r.Length == 100 })
		readC := start(x.dev, block.OpRead, 0, c, make([]byte, 100))
		readD := start(x.dev, block.OpRead, 0, d, make([]byte, 100))
		g.upper.WaitHeld(2)
		writeD := g.write(d, pattern(2, 4096))
		x.waitState(t, d/4096, draining)
		// The copy of a is in flight.
		x.upper.Hold(matching(block.OpWrite, 0, 64*kib))
		writeA := g.write(a, pattern(3, 4096))
		x.upper.WaitHeld(1)
		x.upper.Hold(nil)
		// The copy of b fails.
		x.upper.Fail(failing(matching(block.OpWrite, 0, 64*kib), errInjected))
		g.write(b, pattern(4, 4096)).want(t, nil)
		x.upper.Fail(nil)
		g.wantInvalid(x, errInjected)
		// Nothing keeps a write to c any more: it overtakes the read.
		g.write(c, pattern(5, 4096)).want(t, nil)
		same(t, g.reads(g.dev, c, 4096), pattern(5, 4096))
		writeA.pending(t, "write whose copy is in flight")
		writeD.pending(t, "write during a tracked read")

		g.upper.Release()
		readC.want(t, errEIO)
		readD.want(t, errEIO)
		writeD.want(t, nil)
		x.upper.Release()
		writeA.want(t, nil)
		g.wantInvalid(x, errInjected)
		for i, offset := range []int64{d, a, b, c} {
			same(t, g.reads(g.dev, offset, 4096), pattern(uint64(i)+2, 4096))
		}
		g.wantFrozen(other)
	})
}

// TestOriginReadFails: a chunk that cannot be read costs the snapshot, not the write to the origin.
func TestOriginReadFails(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRigWith(t, engine, 64*kib, 4*kib, 4*kib, 16*kib)
		start(g.snaps[1].dev, block.OpWrite, 0, 4096, pattern(9, 4096)).want(t, nil) // needs no copy any more
		start(g.snaps[2].dev, block.OpWrite, 0, 0, pattern(9, 16*kib)).want(t, nil)
		g.upper.Fail(failing(matching(block.OpRead, 4096, 4096), errInjected))
		start(g.snaps[0].dev, block.OpRead, 0, 4096, make([]byte, 10)).want(t, errInjected)
		if err := g.snaps[0].Status().Invalid; err != nil {
			t.Fatalf("a read made the snapshot invalid: %v", err)
		}
		g.write(4096, pattern(2, 4096)).want(t, nil)
		g.upper.Fail(nil)
		same(t, g.reads(g.dev, 4096, 4096), pattern(2, 4096))
		g.wantInvalid(g.snaps[0], errInjected)
		copy(g.frozen[4096:], pattern(9, 4096))
		g.wantFrozen(g.snaps[1])
		copy(g.frozen, pattern(9, 16*kib))
		g.wantFrozen(g.snaps[2])
	})
}

// TestNoRoom: the COW device is full. The write to the origin succeeds, the snapshot is invalid, others are not.
func TestNoRoom(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRigWith(t, engine, 64*kib, 4*kib)
		x := g.take(Config{ChunkSize: 4 * kib, Store: cowstore.NewTransient(3*4*kib, 0, 4*kib)})
		g.write(0, pattern(2, 8192)).want(t, nil)
		start(x.dev, block.OpWrite, 0, 20_480, pattern(3, 4096)).want(t, nil)
		start(x.dev, block.OpWrite, 0, 0, pattern(4, 100)).want(t, nil) // has an exception already
		want := bytes.Clone(g.frozen)
		copy(want[20_480:], pattern(3, 4096))
		copy(want, pattern(4, 100))
		same(t, g.reads(x.dev, 0, 64*kib), want)
		if st := x.Status(); st.String() != "24/24 0" {
			t.Errorf("status %q", st)
		}
		g.write(20_000, pattern(5, 1000)).want(t, nil)
		g.wantInvalid(x, syscall.ENOSPC)
		g.write(40_000, pattern(5, 1000)).want(t, nil)
		same(t, g.reads(g.dev, 20_000, 1000), pattern(5, 1000))
		g.wantFrozen(g.snaps[0])
	})
}

// TestThreeChunkSizes: a write crosses chunks of three snapshots. Each copies the chunks that the write touches, once,
// and no others.
func TestThreeChunkSizes(t *testing.T) {
	const size = 300*kib + 777
	tests := []struct{ offset, length int64 }{
		{0, 1}, {0, size}, {4095, 2}, {32*kib - 1, 2}, {3*4096 + 100, 40_000}, {8192, 8192}, {8192, 8191},
		{size - 1, 1}, {size - 778, 778}, {100_000, 0}, {0, 0}, {size, 0},
	}
	forEachEngine(t, func(t *testing.T, engine string) {
		for _, test := range tests {
			for _, op := range []block.Op{block.OpWrite, block.OpWriteZeroes} {
				g := newRigWith(t, engine, size, 4*kib, 8*kib, 32*kib)
				data := make([]byte, test.length)
				if op == block.OpWrite {
					data = pattern(2, test.length)
				}
				c := newCall(op, 0, test.offset, test.length, nil)
				if op == block.OpWrite {
					c.r.Data = data
				}
				g.dev.Submit(&c.r)
				c.want(t, nil)
				want := bytes.Clone(g.frozen)
				copy(want[test.offset:], data)
				same(t, g.reads(g.dev, 0, size), want)
				for _, x := range g.snaps {
					g.wantFrozen(x)
					x.wantCopied(t, test.offset, test.length)
				}
			}
		}
	})
}

// wantCopied checks that the chunks which the bytes [offset, offset+length) touch are copied, and no others.
func (x *rigSnap) wantCopied(t *testing.T, offset, length int64) {
	t.Helper()
	start, end := x.chunkSize.Offset(x.chunkSize.ChunkFloor(offset)), x.chunkSize.Offset(x.chunkSize.ChunkCeil(offset+length))
	start, end = min(start, x.Size()), min(end, x.Size())
	next := int64(0)
	x.Copied(0, x.Size(), func(at, n int64, copied bool) bool {
		if at != next || n <= 0 {
			t.Fatalf("chunks of %d: range of %d bytes at %d, want one at %d", x.chunkSize, n, at, next)
		}
		next += n
		if inside := start <= at && next <= end; length > 0 && inside != copied || length == 0 && copied {
			t.Fatalf("chunks of %d: [%d, %d) copied=%v, want [%d, %d)", x.chunkSize, at, next, copied, start, end)
		}
		return true
	})
	if next != x.Size() {
		t.Fatalf("the ranges end at %d of %d", next, x.Size())
	}
}

// TestLastPartialChunk: only what there is of the last chunk is copied, and a write that covers that much needs no
// copy.
func TestLastPartialChunk(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		for _, chunkSize := range []cowstore.ChunkSize{4 * kib, 1 << 20} {
			const size = 5*4096 + 777
			last := chunkSize.Offset(chunkSize.ChunkFloor(size))
			g := newRigWith(t, engine, size, chunkSize, chunkSize)
			x, y := g.snaps[0], g.snaps[1]
			start(y.dev, block.OpWrite, 0, last, pattern(3, size-last)).want(t, nil)
			if st := y.Status(); st.Overwritten != 1 || st.Copied != 0 || g.upper.Seen(block.OpRead) != 0 {
				t.Errorf("chunks of %d: %+v", chunkSize, st)
			}
			fill(x.ram.data, 0xEE)
			g.write(size-1, []byte{1}).want(t, nil)
			same(t, x.ram.data[:size-last], g.frozen[last:])
			for i, b := range x.ram.data[size-last:] {
				if b != 0xEE {
					t.Fatalf("chunks of %d: byte %d behind the end was written", chunkSize, i)
				}
			}
			g.wantFrozen(x)
			copy(g.frozen[last:], pattern(3, size-last))
			g.wantFrozen(y)
			start(x.dev, block.OpRead, 0, size-1, make([]byte, 2)).want(t, errEIO)
			start(x.dev, block.OpWrite, 0, size-1, make([]byte, 2)).want(t, syscall.ENOSPC)
		}
	})
}

// TestBeyondTheSnapshot: what is written to the origin behind the end of a snapshot does not concern it.
func TestBeyondTheSnapshot(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRig(t, engine, 64*kib)
		const size = 20_000
		x := g.take(Config{ChunkSize: 4 * kib}, func(x *rigSnap) { x.size = size })
		for _, offset := range []int64{size, size + 1, 20_480, 60_000} {
			g.write(offset, pattern(2, 100)).want(t, nil)
		}
		if n := x.upper.Seen(block.OpWrite); n != 0 {
			t.Fatalf("%d writes to the COW device", n)
		}
		g.write(15_000, pattern(3, 40_000)).want(t, nil)
		g.wantFrozen(x)
		x.wantCopied(t, 15_000, size-15_000)
		if st := x.Status(); st.Allocated != 2*8 {
			t.Errorf("status %q, want 2 chunks", st)
		}
	})
}

// TestExhaustedExceptions: with a few exceptions, many writes wait for one. None is lost and, on one queue, none is
// overtaken.
func TestExhaustedExceptions(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		for _, most := range []int{1, 2, 7} {
			const count = 40
			g := newRig(t, engine, 1<<20)
			x := g.take(Config{ChunkSize: 4 * kib, PendingMax: most})
			y := g.take(Config{ChunkSize: 8 * kib, PendingMax: 1})
			x.upper.Hold(matching(block.OpWrite, 0, 1<<20))
			y.upper.Hold(matching(block.OpWrite, 0, 1<<20))
			var writes []*call
			var order []int64
			g.lower.Fail(func(r *block.Request) error {
				if r.Op == block.OpWrite {
					order = append(order, r.Offset)
				}
				return nil
			})
			for i := range int64(count) {
				writes = append(writes, g.write(i*16*kib, pattern(2, 8192)))
				writes = append(writes, start(x.dev, block.OpWrite, block.Queue(i), i*16*kib+8192, pattern(3, 5000)))
			}
			y.upper.WaitHeld(1)
			x.upper.WaitHeld(1)
			if n := x.exceptions.inUse(); n > most {
				t.Fatalf("%d exceptions in use, the limit is %d", n, most)
			}
			x.upper.Release()
			y.upper.Release()
			for _, c := range writes {
				c.want(t, nil)
			}
			if len(order) != count {
				t.Fatalf("the origin was written %d times", len(order))
			}
			g.wantFrozen(y)
			for i := range int64(count) {
				copy(g.frozen[i*16*kib+8192:], pattern(3, 5000))
			}
			g.wantFrozen(x)
		}
	})
}

// TestFirstComeFirstServed: with one exception and one queue, writes reach the origin in the order of their coming.
func TestFirstComeFirstServed(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		const count = 100
		g := newRig(t, engine, count*4*kib)
		x := g.take(Config{ChunkSize: 4 * kib, PendingMax: 1})
		var order []int64
		g.lower.Fail(func(r *block.Request) error {
			if r.Op == block.OpWrite {
				order = append(order, r.Offset)
			}
			return nil
		})
		x.upper.Hold(matching(block.OpWrite, 0, count*4*kib))
		var writes []*call
		for i := range int64(count) {
			writes = append(writes, g.write(i*4*kib, pattern(2, 100)))
		}
		x.upper.WaitHeld(1)
		x.upper.Release()
		for _, c := range writes {
			c.want(t, nil)
		}
		for i, offset := range order {
			if offset != int64(i)*4*kib {
				t.Fatalf("write %d was overtaken by the one at %d", i, offset)
			}
		}
	})
}

// TestOneExceptionForMuch: one request needs far more exceptions than there are.
func TestOneExceptionForMuch(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		const size = 8<<20 + 100
		g := newRig(t, engine, size)
		x := g.take(Config{ChunkSize: 4 * kib, PendingMax: 1})
		y := g.take(Config{ChunkSize: 4 * kib, PendingMax: 1})
		startRange(g.dev, block.OpWriteZeroes, 1, size-1).want(t, nil)
		start(y.dev, block.OpWrite, 0, 3, pattern(5, size-3)).want(t, nil)
		g.wantFrozen(x)
		copy(g.frozen[3:], pattern(5, size-3))
		g.wantFrozen(y)
	})
}

// TestStaleException: a request waits on an exception that has ended, or serves other chunks by now. It looks again,
// and nobody who waits there for a good reason is lost.
func TestStaleException(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRig(t, engine, 64*kib)
		x := g.take(Config{ChunkSize: 4 * kib, PendingMax: 2})
		g.write(0, pattern(2, 100)).want(t, nil)
		eventually(t, "the exception is idle", func() bool { return x.exceptions.inUse() == 0 })

		stale := func(chunk cowstore.Chunk, index uint32) *call {
			c := newCall(block.OpWrite, 0, int64(chunk)*4*kib, 100, pattern(3, 100))
			x.await(pendingChunk{x.table.find(chunk), pendingSlot(index)}, &c.r, g.origin)
			return c
		}
		stale(0, 0).want(t, nil) // the exception is idle

		x.upper.Hold(matching(block.OpWrite, 0, 64*kib))
		write := g.write(8192, pattern(4, 100))
		x.upper.WaitHeld(1)
		index := x.lookup(2).index()
		stale(0, index).want(t, nil) // it serves chunk 2
		write.pending(t, "write whose copy is in flight")
		second := g.write(12_288, pattern(4, 100))
		x.upper.WaitHeld(2)
		wrong := stale(3, index) // chunk 3 belongs to another
		wrong.pending(t, "write whose copy is in flight")
		x.upper.Release()
		write.want(t, nil)
		second.want(t, nil)
		wrong.want(t, nil)
		g.wantFrozen(x)
	})
}

// TestWaitForAnIdleException: a request found no exception, and before it waits for one all have become idle. Nobody
// would wake it later.
func TestWaitForAnIdleException(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRig(t, engine, 64*kib)
		x := g.take(Config{ChunkSize: 4 * kib, PendingMax: 1})
		g.write(0, []byte("x")).want(t, nil)
		eventually(t, "the exception is idle", func() bool { return x.exceptions.inUse() == 0 })
		c := newCall(block.OpWrite, 0, 8192, 1, []byte("y"))
		x.exceptions.wait(&c.r, g.origin)
		c.want(t, nil)
		own := newCall(block.OpWrite, 0, 20_000, 1, []byte("z"))
		x.exceptions.wait(&own.r, x)
		own.want(t, nil)
		g.frozen[20_000] = 'z'
		g.wantFrozen(x)
	})
}

// TestSuspendWithWaiters: what waits inside the targets when a suspend begins is served; what comes later is kept.
func TestSuspendWithWaiters(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		g := newRig(t, engine, 1<<20)
		x := g.take(Config{ChunkSize: 4 * kib, PendingMax: 3})
		x.upper.Hold(matching(block.OpWrite, 0, 1<<20))
		var calls []*call
		for i := range int64(50) {
			queue := block.Queue(i % 5)
			calls = append(calls,
				start(g.dev, block.OpWrite, queue, i%10*4096, pattern(2, 4096)),
				start(x.dev, block.OpWrite, queue, i%15*4096+100, pattern(3, 100)),
				start(x.dev, block.OpWrite, queue, 100*4096+i%15*4096, pattern(3, 4096)))
		}
		x.upper.WaitHeld(1)
		suspended := make(chan struct{})
		go func() {
			defer close(suspended)
			mustSuspend(t, g.dev, x.dev)
		}()
		x.upper.Release()
		<-suspended
		kept := start(g.dev, block.OpWrite, 0, 0, pattern(4, 1))
		for _, c := range calls {
			c.want(t, nil)
		}
		kept.pending(t, "write to a suspended device")
		g.origin.Remove(x.Snapshot)
		g.dev.Resume()
		x.dev.Resume()
		kept.want(t, nil)
	})
}

// TestStackDepth: thousands of requests that wait for each other are mapped anew in a loop, not by recursion.
func TestStackDepth(t *testing.T) {
	forEachEngine(t, func(t *testing.T, engine string) {
		const count = 500
		g := newRig(t, engine, count*4*kib)
		x := g.take(Config{ChunkSize: 4 * kib, PendingMax: 1})
		x.upper.Hold(matching(block.OpWrite, 0, count*4*kib))
		var depths []*depthCall
		for i := range int64(count) {
			c := &depthCall{done: make(chan int, 1)}
			c.r = block.Request{Op: block.OpWrite, Queue: block.Queue(i), Offset: i * 4 * kib, Length: 1, Data: []byte{1}}
			c.r.Push(c)
			g.dev.Submit(&c.r)
			depths = append(depths, c)
		}
		x.upper.WaitHeld(1)
		x.upper.Release()
		for _, c := range depths {
			if depth := <-c.done; depth > 200 {
				t.Fatalf("completed in a stack of %d calls", depth)
			}
		}
	})
}

// TestFlush: a flush goes where the writes went.
func TestFlush(t *testing.T) {
	g := newRigWith(t, "scaled", 64*kib, 4*kib)
	x := g.snaps[0]
	for i, test := range []struct {
		dev          block.Device
		origin, cow_ int
	}{{g.dev, 1, 0}, {x.dev, 1, 1}} {
		if err := block.Flush(test.dev); err != nil {
			t.Fatal(err)
		}
		if o, c := g.upper.Seen(block.OpFlush), x.upper.Seen(block.OpFlush); o != test.origin || c != test.cow_ {
			t.Errorf("flush %d: the origin saw %d, the COW device %d", i, o, c)
		}
	}
}

// TestFUA: a write to the snapshot carries its flags to the COW device on every way that it may take.
func TestFUA(t *testing.T) {
	for _, test := range []struct{ offset, length int64 }{{0, 4096}, {100, 100}, {4000, 9000}, {0, 64 * kib}} {
		g := newRigWith(t, "scaled", 64*kib, 4*kib)
		x := g.snaps[0]
		x.upper.Fail(func(r *block.Request) error {
			if copying := r.Length == 4096 && test.length != 4096; r.Op == block.OpWrite && r.Flags&block.FUA == 0 && !copying {
				return fmt.Errorf("a write of %d bytes at %d without FUA", r.Length, r.Offset)
			}
			return nil
		})
		for range 2 {
			if err := block.Do(x.dev, block.OpWrite, block.FUA, test.offset, test.length, make([]byte, test.length)); err != nil {
				t.Error(err)
			}
		}
	}
}

// hookedEngine calls a function after each Submit.
type hookedEngine struct {
	kcopyd.Engine
	hook func()
}

func (e hookedEngine) Submit(j *kcopyd.Job) {
	e.Engine.Submit(j)
	e.hook()
}

// depthCall reports how deep the stack was when it completed.
type depthCall struct {
	r    block.Request
	done chan int
}

func (c *depthCall) Complete(*block.Request, error) {
	var stack [1000]uintptr
	c.done <- runtime.Callers(0, stack[:])
}
