package nbd

import (
	"encoding/binary"
	"fmt"
	"syscall"
)

// The numbers of the protocol, as doc/proto.md of the NetworkBlockDevice project gives them.
const (
	magicInit       = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454f5054 // "IHAVEOPT"
	magicOldstyle   = 0x0000420281861253
	magicReply      = 0x0003e889045565a9 // of an option
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef

	handshakeFixedNewstyle = 1 << 0
	handshakeNoZeroes      = 1 << 1

	optExportName      = 1
	optAbort           = 2
	optStartTLS        = 5
	optGo              = 7
	optStructuredReply = 8
	optSetMetaContext  = 10

	repAck         = 1
	repInfo        = 3
	repMetaContext = 4
	repErrorBit    = 1 << 31

	repErrUnsupported = repErrorBit + 1
	repErrPolicy      = repErrorBit + 2
	repErrInvalid     = repErrorBit + 3
	repErrPlatform    = repErrorBit + 4
	repErrTLSRequired = repErrorBit + 5
	repErrUnknown     = repErrorBit + 6
	repErrShutdown    = repErrorBit + 7
	repErrBlockSize   = repErrorBit + 8
	repErrTooBig      = repErrorBit + 9

	infoExport    = 0
	infoBlockSize = 3

	flagReadOnly    = 1 << 1
	flagFlush       = 1 << 2
	flagFUA         = 1 << 3
	flagTrim        = 1 << 5
	flagWriteZeroes = 1 << 6
	flagMultiConn   = 1 << 8
	flagFastZero    = 1 << 11

	cmdRead        = 0
	cmdWrite       = 1
	cmdDisconnect  = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdWriteZeroes = 6
	cmdBlockStatus = 7

	cmdFlagFUA      = 1 << 0
	cmdFlagNoHole   = 1 << 1
	cmdFlagFastZero = 1 << 4

	replyFlagDone = 1 << 0

	chunkNone        = 0
	chunkData        = 1
	chunkHole        = 2
	chunkStatus      = 5
	chunkErrorBit    = 1 << 15
	chunkError       = chunkErrorBit + 1
	chunkErrorOffset = chunkErrorBit + 2

	stateHole = 1 << 0
	stateZero = 1 << 1
)

// Sizes in bytes of what goes over the wire.
const (
	requestSize    = 28
	simpleSize     = 16
	structuredSize = 20
	descriptorSize = 8
	stringMax      = 4096 // the longest string that the protocol allows
	exportZeroes   = 124  // what follows the answer to optExportName unless it was agreed to leave it out
)

// contextAllocation is the metadata context that tells holes and zeroes.
const contextAllocation = "base:allocation"

// A request header:
//
//	magic 4 | flags 2 | command 2 | cookie 8 | offset 8 | length 4 | data of a write
func putRequest(b *[requestSize]byte, flags, command uint16, cookie, offset uint64, length uint32) {
	binary.BigEndian.PutUint32(b[0:], magicRequest)
	binary.BigEndian.PutUint16(b[4:], flags)
	binary.BigEndian.PutUint16(b[6:], command)
	binary.BigEndian.PutUint64(b[8:], cookie)
	binary.BigEndian.PutUint64(b[16:], offset)
	binary.BigEndian.PutUint32(b[24:], length)
}

// A simple reply:
//
//	magic 4 | error 4 | cookie 8 | data of a read
type simpleReply struct {
	code   uint32
	cookie uint64
}

// parseSimple reads the simpleSize bytes of b, whose magic has been looked at.
func parseSimple(b []byte) simpleReply {
	return simpleReply{code: binary.BigEndian.Uint32(b[4:]), cookie: binary.BigEndian.Uint64(b[8:])}
}

// A chunk of a structured reply:
//
//	magic 4 | flags 2 | type 2 | cookie 8 | length 4 | payload
type chunk struct {
	flags, kind uint16
	cookie      uint64
	length      uint32 // bytes of payload
}

// parseChunk reads the structuredSize bytes of b, whose magic has been looked at.
func parseChunk(b []byte) chunk {
	return chunk{
		flags:  binary.BigEndian.Uint16(b[4:]),
		kind:   binary.BigEndian.Uint16(b[6:]),
		cookie: binary.BigEndian.Uint64(b[8:]),
		length: binary.BigEndian.Uint32(b[16:]),
	}
}

// errnoOf maps an error of the wire. The numbers are Linux's; what the protocol does not name counts as EINVAL, as it
// asks for.
func errnoOf(code uint32) syscall.Errno {
	switch errno := syscall.Errno(code); errno {
	case syscall.EPERM, syscall.EIO, syscall.ENOMEM, syscall.EINVAL, syscall.ENOSPC, syscall.EOVERFLOW,
		syscall.EOPNOTSUPP, syscall.ESHUTDOWN:
		return errno
	}
	return syscall.EINVAL
}

// violation is an error about a server that does not keep to the protocol.
type violation string

func (v violation) Error() string { return "the NBD server broke the protocol: " + string(v) }

func violationf(format string, args ...any) error { return violation(fmt.Sprintf(format, args...)) }
