package nbd

import (
	"fmt"

	"golang.org/x/sys/unix"

	"cowherd/internal/invariant"
)

// newPipe makes a pipe of about size bytes that nobody waits at.
func newPipe(size int) (pipe [2]int, err error) {
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return [2]int{-1, -1}, fmt.Errorf("make a pipe: %w", err)
	}
	_, _ = unix.FcntlInt(uintptr(pipe[0]), unix.F_SETPIPE_SZ, size) // a smaller one does
	return pipe, nil
}

// closePipe closes both ends of a pipe, if there are any. What it holds is dropped.
func closePipe(pipe [2]int) {
	for _, fd := range pipe {
		if fd >= 0 {
			_ = unix.Close(fd) // a pipe has nothing to write back
		}
	}
}

// splice moves up to n bytes between a socket and a pipe without waiting. more: others will follow at once.
func splice(from, to int, n int64, more bool) (int64, error) {
	flags := unix.SPLICE_F_MOVE | unix.SPLICE_F_NONBLOCK
	if more {
		flags |= unix.SPLICE_F_MORE
	}
	invariant.Crossing()
	for {
		moved, err := unix.Splice(from, nil, to, nil, int(n), flags)
		if err != unix.EINTR {
			return max(moved, 0), err
		}
	}
}
