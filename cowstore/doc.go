// Package cowstore keeps exceptions: it allocates the chunks of a COW device and remembers, or forgets, which chunk of
// the origin went where. An exception store is given out in runs of consecutive chunks, so that one copy can serve
// many chunks, and from batches that belong to a queue, so that queues share no lock.
//
// The transient store (the kernel's type "N") remembers nothing: its exceptions live in memory and end with the
// snapshot. It therefore commits at once, in any order and in parallel.
//
// The persistent store (type "P") keeps a table of them on the COW device, in the kernel's format (format.go), and
// commits in groups (commit.go): any number of copies end in parallel, and their records are written in the order in
// which the copies end. What no record names when a store is opened is free (load.go), so that no order is needed for
// want of one. A merge takes the table back from its end (tail.go). Scan, Survey, Check and Repair work on stores that
// nobody uses, and on damaged ones.
//
// # Why a crash costs nothing that was promised
//
//  1. A chunk of the origin is overwritten when its record is durable (the snapshot waits for Done).
//  2. A record is written when the data of its chunk is durable: a flush that began after the data was written ends
//     before the record's write begins.
//  3. Of a write that was not flushed any sectors may be missing. The table read back ends at the first record that is
//     missing; all before it are whole (1 and 2 hold for them), and those behind it were acknowledged to nobody. They
//     are erased before the store is written again, and the area that follows a full one was zero before.
//  4. A snapshot that has become invalid says so in its header, durably, before a write that it should have preserved
//     goes to the origin.
//  5. A merge erases a record when its data is durable on the origin, and lets writes to that chunk through to the origin
//     when the erasure is durable.
//
// # Lock order
//
// Transient.mu and Persistent.gapMu come before warning.mu; committing.mu, doneShard.mu and invalidation.mu are leaves.
// None is held across I/O or a callback.
package cowstore
