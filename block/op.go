package block

import "fmt"

// Op is what a request asks of a device.
type Op uint8

// The operations. Each acts on the bytes [Offset, Offset+Length), but for OpFlush, which has no range.
const (
	OpRead        Op = iota // device to Data
	OpWrite                 // Data to device
	OpFlush                 // everything completed before is durable when it completes
	OpDiscard               // the range is no longer needed; what it reads as afterwards is undefined
	OpWriteZeroes           // the range reads as zeroes afterwards; Data is nil
	opCount
)

var opNames = [opCount]string{"read", "write", "flush", "discard", "write zeroes"}

// String is the operation's name as it stands in messages.
func (op Op) String() string {
	if op < opCount {
		return opNames[op]
	}
	return fmt.Sprintf("op %d", uint8(op))
}

// Writes tells whether the operation may change what the device holds.
func (op Op) Writes() bool {
	return op == OpWrite || op == OpDiscard || op == OpWriteZeroes
}

// Flags refine an operation.
type Flags uint8

const (
	// FUA: the request completes only when its data is durable.
	FUA Flags = 1 << iota
	// NoUnmap: a write of zeroes must leave the range allocated (NBD's NO_HOLE).
	NoUnmap
	// Fast: a write of zeroes fails with ENOTSUP rather than write every byte (NBD's FAST_ZERO).
	Fast
)

// Queue is the number of the queue that a request belongs to. A queue stands for a CPU: all I/O made on behalf of a
// request carries its queue, and state that would be shared between CPUs is kept per queue. Any number is valid
// everywhere (shards are picked by its low bits): locality is a hint, correctness never depends on it.
type Queue uint16
