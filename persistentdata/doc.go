// Package persistentdata is what the metadata of the kernel's newer targets is made of: blocks of 4096 bytes with
// checksums, a space map that says which are in use, btrees and arrays of them, and transactions that never overwrite
// what the last one has left. dm-clone's metadata (package clonemeta) is one such tree; the formats are described in
// docs/formats/clone-metadata.md.
//
//	superblock (block 0, the caller's)
//	 |- space map root -> index block -> bitmap blocks      two bits a block: in use never, once, twice, or
//	 |                 -> btree of reference counts         three times and more, which is looked up here
//	 `- array root     -> btree: index -> array block       509 words of 64 bits in each block
//
// # Invariants
//
//  1. A block that the last superblock on disk can reach is never written. A transaction writes only to blocks that are
//     free both in the last committed space map and in its own.
//  2. Blocks reach the disk sealed with number and checksum, and are believed only when both are right for the kind of
//     block that is expected there, and all that its header says is within bounds.
//  3. A superblock is written only after everything that it reaches has been flushed, and is then flushed itself.
//     It is the only block written in place. All that it holds lies in its first sector; the rest is zero, always.
//  4. A transaction that fails, for want of room or by an error of the device, leaves the last commit as it was. The
//     Manager is then of no use until it is opened anew.
//  5. Memory is bounded by the cache, and by the space map: at most 2 MiB, for the largest device.
//
// # The life of a transaction
//
//	Array.Set     descend: shadow root, inner nodes, leaf, array block: those that are not new are allocated anew,
//	              copied, and the old ones given up
//	...           when the cache is full, new blocks are written early: nothing on disk points to them yet
//	Commit        reference counts go to their btree; space map goes to blocks; all blocks are written, flush;
//	              superblock, flush; what was given up is free from here on
//
// # Why the space map does not recur
//
// Writing the space map takes blocks from the space map. The kernel queues such changes and works them off. Here the
// whole map lies in memory while a transaction runs, so that to take and give up a block is an assignment; which of
// its blocks must be written is found at commit, as a fixed point: every bitmap block that differs from the committed
// one gets a new place, which may change another bitmap block, and so on. A bitmap block moves once in a transaction, so
// the end comes after as many rounds as there are bitmap blocks (255 at most), before the first of them is written.
//
// A Manager and its trees are not safe for concurrent use.
package persistentdata
