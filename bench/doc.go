// Package bench measures cowherd from the inside: closed-loop jobs over a device in this process, so that what is
// measured is the engine and not a client, a socket or a disk. The harness costs about as much as a clock reading and
// an uncontended compare-and-swap for each request.
package bench
