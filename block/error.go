package block

import (
	"errors"
	"fmt"
	"syscall"
)

// Error is an operating error of a device: which operation on which range failed, and the errno that stands for it.
// The errno is decided where the cause is known; an export translates it to its protocol in one function.
type Error struct {
	Op             Op
	Offset, Length int64 // bytes
	Errno          syscall.Errno
	Err            error // the cause; may be nil
}

// NewError is an Error about r with a cause in words.
func NewError(r *Request, errno syscall.Errno, cause string) *Error {
	return &Error{Op: r.Op, Offset: r.Offset, Length: r.Length, Errno: errno, Err: errors.New(cause)}
}

// WrapError is an Error about r with the cause err: its errno is the one found in err, or EIO.
func WrapError(r *Request, err error) *Error {
	return &Error{Op: r.Op, Offset: r.Offset, Length: r.Length, Errno: Errno(err), Err: err}
}

// Error tells the operation, the range, the cause and the errno.
func (e *Error) Error() string {
	where := fmt.Sprintf("%s of %d bytes at offset %d", e.Op, e.Length, e.Offset)
	if e.Op == OpFlush {
		where = "flush"
	}
	if e.Err == nil || e.Err == error(e.Errno) {
		return fmt.Sprintf("%s: %v", where, e.Errno)
	}
	if errno := (syscall.Errno)(0); errors.As(e.Err, &errno) {
		return fmt.Sprintf("%s: %v", where, e.Err)
	}
	return fmt.Sprintf("%s: %v (%v)", where, e.Err, e.Errno)
}

// Unwrap gives the cause and the errno, so that errors.Is(err, syscall.ENOSPC) holds.
func (e *Error) Unwrap() []error {
	if e.Err == nil {
		return []error{e.Errno}
	}
	return []error{e.Err, e.Errno}
}

// Errno is the errno that stands for err: 0 for nil, the one of the outermost *Error or syscall.Errno in its chain,
// else EIO.
func Errno(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	if e, ok := errors.AsType[*Error](err); ok && e.Errno != 0 {
		return e.Errno
	}
	if errno, ok := errors.AsType[syscall.Errno](err); ok && errno != 0 {
		return errno
	}
	return syscall.EIO
}
