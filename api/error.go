package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"syscall"

	"golang.org/x/sys/unix"
)

// Error is the answer to a request that failed.
type Error struct {
	// Message says what failed, where and why.
	Message string
	// Errno is the reason as a number; never 0.
	Errno syscall.Errno
}

// Errorf makes an Error.
func Errorf(errno syscall.Errno, format string, args ...any) *Error {
	return &Error{Message: fmt.Sprintf(format, args...), Errno: errno}
}

// Error is the message.
func (e *Error) Error() string { return e.Message }

// Unwrap gives the errno, so that errors.Is(err, syscall.EBUSY) holds.
func (e *Error) Unwrap() error { return e.Errno }

// errorBody is an Error on the wire.
type errorBody struct {
	Error string `json:"error"`
	Errno string `json:"errno"`
}

// errnoMax is behind the last errno of Linux.
const errnoMax = 134

// errnoName is the name of errno, such as EBUSY; EIO stands for those without one.
func errnoName(errno syscall.Errno) string {
	if name := unix.ErrnoName(errno); name != "" {
		return name
	}
	return "EIO"
}

// errnoNamed is the errno with a name; EIO for a name that is not known here.
func errnoNamed(name string) syscall.Errno {
	for errno := syscall.Errno(1); errno < errnoMax; errno++ {
		if name != "" && unix.ErrnoName(errno) == name {
			return errno
		}
	}
	return syscall.EIO
}

// AsError is err as an Error: itself, or its message with the errno found in it. A deadline is ETIMEDOUT, a request
// that was given up ECANCELED, everything without an errno EIO.
func AsError(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return &Error{Message: err.Error(), Errno: e.Errno}
	}
	e := &Error{Message: err.Error(), Errno: syscall.EIO}
	if errors.Is(err, context.DeadlineExceeded) {
		e.Errno = syscall.ETIMEDOUT
	} else if errors.Is(err, context.Canceled) {
		e.Errno = syscall.ECANCELED
	} else if errno, ok := errors.AsType[syscall.Errno](err); ok && errno != 0 {
		e.Errno = errno
	}
	return e
}

// Status is the HTTP status that goes with an errno.
func Status(errno syscall.Errno) int {
	switch errno {
	case syscall.EINVAL, syscall.ENAMETOOLONG, syscall.ERANGE:
		return http.StatusBadRequest
	case syscall.EPERM, syscall.EACCES, syscall.EROFS:
		return http.StatusForbidden
	case syscall.ENOENT, syscall.ENODEV, syscall.ENXIO:
		return http.StatusNotFound
	case syscall.EEXIST, syscall.EBUSY:
		return http.StatusConflict
	case syscall.EMSGSIZE:
		return http.StatusRequestEntityTooLarge
	case syscall.ENOSPC, syscall.EDQUOT:
		return http.StatusInsufficientStorage
	case syscall.ESHUTDOWN, syscall.EAGAIN:
		return http.StatusServiceUnavailable
	case syscall.ETIMEDOUT:
		return http.StatusGatewayTimeout
	}
	return http.StatusInternalServerError
}
