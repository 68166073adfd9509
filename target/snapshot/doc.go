// Package snapshot is the device mapper's snapshot-origin and snapshot targets: an Origin that is written while any
// number of Snapshots keep the view of it that they froze, copying a chunk to their COW device before the origin's is
// overwritten. What they do is dm-snap.c's semantics; how they do it is not: no lock is shared between chunks, and
// everything runs on the queue that asked for it.
//
// # The life of a write to the origin
//
//	Origin.Map(r)
//	  for each snapshot, for each chunk that r touches:
//	    slot := table.find(chunk)
//	      copied    nothing to do                       the fast path: a look-up
//	      pending   r must wait for that exception      (or draining)
//	      none      claim it: CAS none -> pending; neighbours that r also writes join the same exception
//	                allocate COW chunks, kcopyd copies origin -> COW device on r's queue
//	  nothing pending: r goes to the origin
//	  else:            r waits on one pending exception and is mapped anew when that one ends
//
//	copied(exception)                                   on whichever goroutine ended the copy
//	  transient: publish; persistent: store.Commit, which calls publish when the records are durable
//
//	publish(exception)
//	  slot := draining, new chunk                       from here on readers of the snapshot go to the COW device
//	  tracked reads of these chunks in flight: the last of them goes on with finish
//	  finish: slot := copied; those who wait are mapped anew
//
// # Why a read is never wrong
//
// A read of the snapshot without an exception goes to the origin. It is first put in the tracked reads and only then
// looks at the slot; a copy first sets the slot to draining and only then looks at the tracked reads. So either the
// reader sees the new chunk, or the exception sees the reader and waits for it before any write to the origin is let
// through. If the snapshot becomes invalid meanwhile, writes to the origin no longer wait, and the read fails when it
// finds, after its I/O, that the snapshot is invalid.
//
// # Invalid, and known to be
//
// When a persistent snapshot becomes invalid its store is made to say so first; writes that the snapshot should have
// preserved wait for that (verdict). A store that cannot be written any more does not hold them up.
//
// # States of a slot
//
//	          claim                copied              no tracked reads
//	none ---------------> pending ---------> draining -----------------> copied
//	  ^                      |
//	  +----------------------+  copy failed, or no room: the snapshot is invalid
//	                            given back unused: another exception may claim it
//
//	state      reads of the snapshot   writes to the snapshot   writes to the origin
//	none       origin, tracked         claim                    claim
//	pending    origin, tracked         wait                     wait
//	draining   COW device              COW device               wait
//	copied     COW device              COW device               pass
//
// # Lock order
//
// Every lock is a leaf: none is held while another is taken, across I/O, or in a callback.
//
//	tableShard.mu, slabFiller.mu, exceptionPool.mu, exceptionShard.mu, trackShard.mu, retryShard.mu, fullness.mu, Merge.mu
//
// but for fullness.growing, which is held while the COW device grows, and fullness.mu and the store's locks in it.
package snapshot
