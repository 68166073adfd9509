package nbd

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"cowherd/internal/invariant"
)

// sendmsg writes the chunks, none of which may be empty, to a socket without waiting; as many as fit in iovecs. The
// wrappers of the system call that others have allocate for each call.
func sendmsg(fd uintptr, chunks [][]byte, iovecs *[2 * batchMax]unix.Iovec) (int, syscall.Errno) {
	count := min(len(chunks), len(iovecs))
	for i, part := range chunks[:count] {
		iovecs[i].Base = &part[0]
		iovecs[i].SetLen(len(part))
	}
	var message unix.Msghdr
	message.Iov = &iovecs[0]
	message.SetIovlen(count)
	invariant.Crossing()
	n, _, errno := syscall.Syscall(syscall.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&message)),
		unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	clear(iovecs[:count]) // the data is the requests' owners' again
	return int(n), errno
}
