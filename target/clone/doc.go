// Package clone is the device mapper's clone target: a device that shows a read-only source at once and becomes a copy
// of it on a destination, region by region: in the background (hydration), and before the first write to a region. What
// it does is dm-clone's semantics; how it does it is not: no lock is shared between regions, there is no worker that all
// copies pass, and a write into a region that is not hydrated is run to completion on the queue that asked for it.
//
// # The life of a request
//
//	Map(r)
//	  everything hydrated and committed    the destination; one load
//	  read    hydrated                     the destination
//	          not                          the source, counted until it ends; the region may be hydrated soon (promotion)
//	          of both kinds                split where the kind changes
//	  write   settled                      the destination
//	          not, whole regions           claim, write to the destination in place of a copy, settle, complete
//	          not, part of a region        claim, kcopyd copies the region on r's queue, settle, write to the destination
//	          claimed by another           wait, look again
//	  discard                              whole regions: claim, settle; then pass down, or complete
//	  flush   nothing to commit            the destination
//	          else                         completed by the commit that begins next
//
// # States of a region
//
// Two bits a region, in pages that are made when a region of theirs is touched and dropped when all are hydrated.
//
//	hydrated claimed
//	   0        0      none       reads go to the source; anybody may claim it
//	   0        1      claimed    one hydration, or overwriting write, owns it; writes wait
//	   1        1      settling   its data is on the destination; the owner notes the change for the next commit
//	   1        0      settled    reads and writes go to the destination
//
// To claim is a compare-and-swap; whoever has claimed looks once more whether the region is hydrated, and gives it back
// if so: from then on nobody else can hydrate it. Writes wait until the region is settled, and not only hydrated, since
// a flush that follows such a write must find that there is something to commit.
//
// A request that waits adds itself to a bucket's list and looks once more; the owner settles, or gives the claim back,
// and then takes the lists of its regions' buckets. To be woken is no promise, only a reason to look again.
//
// # Commit
//
// That a region is hydrated is durable only after a commit. A commit
//
//  1. takes the pages that have changed and gives the metadata the words of their bitmaps as they are;
//  2. flushes the destination: the data of every region in these words was complete before;
//  3. commits the metadata, which flushes it.
//
// Regions that settle after step 1 belong to the next commit. So a bit on disk never stands for data that a crash can
// lose. The kernel keeps two maps of dirty words that it switches; here the values are staged before the flush, and no
// second map is needed: what is staged is not on disk before step 3.
//
// Flushes, and writes with FUA, that find anything to commit gather; one commit serves all that came before it began.
// The committer is a goroutine that exists only while there is something to do. One second after the first change it
// commits even if nobody asks.
//
// # What holds after a crash
//
//  1. A region that the metadata calls hydrated holds its data.
//  2. A region that it does not is as on the source: what was written to it was not flushed.
//  3. What was acknowledged before a flush that was acknowledged is there.
//
// # Hydration in the background
//
// Workers, at most as many as there are CPUs, take runs of regions and hand them to kcopyd; the threshold bounds the
// regions in flight, and where copies hold each other up a window does (window.go); the batch bounds the length of a run.
// Where the source says that it has a hole nothing is read. While the foreground is active a single worker goes on, with
// small pieces, and rests between them. A region that cannot be copied is tried a few times more, with growing pauses, and
// then given up until somebody asks to try again; the others go on.
//
// # When metadata or destination fail
//
// That is an error of the metadata, or of any flush of the destination while not everything is hydrated: what was copied
// before it, and is not committed yet, may be lost, and a later flush that succeeds would not tell. The transaction is
// aborted, the bitmap read anew from the metadata, and the clone is read-only in the kernel's sense: what is hydrated on
// disk can be read and written, the rest can be read from the source. No flush succeeds any more. If that fails too, or
// reading the bitmap, the clone fails for good (Fail).
//
// # Lock order
//
// Every lock is a leaf: none is held while another is taken, across I/O, or in a callback.
//
//	committer.mu, hydrator.mu, poolShard.mu, retryShard.mu
package clone
