package nbd

import (
	"syscall"

	"cowherd/block"
)

// Errors of the wire: the values that the protocol defines, whatever the system's are.
const (
	wirePermission = 1
	wireIO         = 5
	wireMemory     = 12
	wireInvalid    = 22
	wireSpace      = 28
	wireOverflow   = 75
	wireUnsupport  = 95
	wireShutdown   = 108
)

// wireErrno is the one place where an error becomes a number on the wire; 0 for nil.
func wireErrno(err error) uint32 {
	if err == nil {
		return 0
	}
	switch block.Errno(err) {
	case syscall.EPERM, syscall.EACCES, syscall.EROFS:
		return wirePermission
	case syscall.ENOMEM:
		return wireMemory
	case syscall.EINVAL:
		return wireInvalid
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
		return wireSpace
	case syscall.EOVERFLOW:
		return wireOverflow
	case syscall.ENOTSUP, syscall.ENOSYS:
		return wireUnsupport
	case syscall.ESHUTDOWN:
		return wireShutdown
	default:
		return wireIO
	}
}

// A refusal is an error of a request that the server does not even pass to the device. They are made once, so that
// refusing costs nothing.
type refusal struct {
	errno syscall.Errno
	text  string
}

func (r *refusal) Error() string { return r.text }

// Unwrap gives the errno, which is what block.Errno looks for.
func (r *refusal) Unwrap() error { return r.errno }

var (
	errUnknownCommand = &refusal{syscall.EINVAL, "unknown command"}
	errUnknownFlag    = &refusal{syscall.EINVAL, "a flag does not belong to the command or was not negotiated"}
	errReserved       = &refusal{syscall.EINVAL, "offset and length of a flush must be zero"}
	errUnaligned      = &refusal{syscall.EINVAL, "offset or length is not a multiple of the minimum block size"}
	errTooLong        = &refusal{syscall.EINVAL, "longer than the maximum block size"}
	errBeyondEnd      = &refusal{syscall.EINVAL, "beyond the end of the export"}
	errNoSpace        = &refusal{syscall.ENOSPC, "beyond the end of the export"}
	errReadOnly       = &refusal{syscall.EPERM, "the export is read-only"}
	errNoTrim         = &refusal{syscall.EINVAL, "the export has no trim"}
	errNoContext      = &refusal{syscall.EINVAL, "no metadata context was selected"}
	errEmptyStatus    = &refusal{syscall.EINVAL, "block status of an empty range"}
	errNotFast        = &refusal{syscall.ENOTSUP, "zeroes would have to be written one by one"}
	errNoMemory       = &refusal{syscall.ENOMEM, "no memory for a reply in one piece"}
	errTruncated      = &refusal{syscall.EIO, "the payload ended early"}
)
