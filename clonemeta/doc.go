// Package clonemeta is a clone's metadata in the format of the kernel's dm-clone: for every region whether it is hydrated,
// that is, whether the destination holds it. What it is made of (blocks, trees, space map, transactions) is package
// persistentdata; the format is described in docs/formats/clone-metadata.md.
//
//	block 0: superblock -> space map
//	                    -> array of words: bit r%64 of word r/64 says that region r is hydrated
//
// # Invariants
//
//  1. On disk there is, at any moment, the bitset of the last Commit, or, while one runs, that one or the next. Whatever a
//     crash or a torn write leaves, Open finds one of the two.
//  2. Whoever calls Commit has made durable what the bits that are set promise: the package knows nothing of the
//     destination.
//  3. Open believes nothing: no block that is in use can be one that the space map thinks free, so that a Metadata that was
//     opened never overwrites what it needs.
//
// # The life of a commit
//
//	SetWords   words go to array blocks, each of which is copied to a free block the first time, with all nodes above it
//	Commit     blocks, flush; superblock, flush
//	error      everything but Abort and Close fails; Abort goes back to what the superblock on disk says
//
// # Where this differs from the kernel
//
//   - A clone may have 2^32 regions, twice as many as the kernel opens: 16 TiB of 4 KiB each.
//   - Blocks are taken from the beginning of the device, again and again, so that a sparse file stays small. The kernel
//     goes round the device.
//   - Format makes one commit, the kernel two; numbers of blocks are the same but for that.
//   - Open refuses a space map by which a block in use is free. The kernel does not look.
//
// One goroutine at a time uses a Metadata; Usage may be called at any time. The package has no goroutines and no locks.
package clonemeta
