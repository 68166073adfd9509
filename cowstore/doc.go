// Package cowstore keeps exceptions: it allocates the chunks of a COW device and remembers, or forgets, which chunk of
// the origin went where. An exception store is given out in runs of consecutive chunks, so that one copy can serve
// many chunks, and from batches that belong to a queue, so that queues share no lock.
//
// The transient store (the kernel's type "N") remembers nothing: its exceptions live in memory and end with the
// snapshot. It therefore commits at once, in any order and in parallel.
//
// Lock order: Transient.mu is a leaf.
package cowstore
