package nbd

import (
	"encoding/binary"
	"strings"
)

// The numbers of the protocol (NetworkBlockDevice/nbd, doc/proto.md). All integers on the wire are big endian.

const (
	magicServer  = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption  = 0x49484156454F5054 // "IHAVEOPT"
	magicReply   = 0x0003e889045565a9 // reply to an option
	magicRequest = 0x25609513
	magicSimple  = 0x67446698
	magicChunk   = 0x668e33ef
)

// Handshake flags, the server's and the client's.
const (
	handshakeFixedNewstyle = 1 << 0
	handshakeNoZeroes      = 1 << 1
)

// Options of the handshake.
const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optStartTLS        = 5
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMetaContext = 9
	optSetMetaContext  = 10
)

// Replies to options.
const (
	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4

	repErrUnsupported = 1<<31 + 1
	repErrPolicy      = 1<<31 + 2
	repErrInvalid     = 1<<31 + 3
	repErrTLSRequired = 1<<31 + 5
	repErrUnknown     = 1<<31 + 6
	repErrShutdown    = 1<<31 + 7
	repErrTooBig      = 1<<31 + 9
)

// Information items of optInfo and optGo.
const (
	infoExport      = 0
	infoName        = 1
	infoDescription = 2
	infoBlockSize   = 3
)

// Transmission flags of an export.
const (
	flagHasFlags        = 1 << 0
	flagReadOnly        = 1 << 1
	flagSendFlush       = 1 << 2
	flagSendFUA         = 1 << 3
	flagSendTrim        = 1 << 5
	flagSendWriteZeroes = 1 << 6
	flagSendDF          = 1 << 7
	flagCanMultiConn    = 1 << 8
	flagSendCache       = 1 << 10
	flagSendFastZero    = 1 << 11
)

// Commands of the transmission phase.
const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisconnect  = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdCache       = 5
	cmdWriteZeroes = 6
	cmdBlockStatus = 7
	cmdCount       = 8
)

// Flags of a command.
const (
	cmdFlagFUA      = 1 << 0
	cmdFlagNoHole   = 1 << 1
	cmdFlagDF       = 1 << 2
	cmdFlagReqOne   = 1 << 3
	cmdFlagFastZero = 1 << 4
)

// Chunks of a structured reply.
const (
	chunkFlagDone = 1 << 0

	chunkNone        = 0
	chunkOffsetData  = 1
	chunkOffsetHole  = 2
	chunkBlockStatus = 5
	chunkError       = 1<<15 + 1
)

// Flags of base:allocation.
const (
	stateHole = 1 << 0
	stateZero = 1 << 1
)

// Sizes in bytes.
const (
	optionHeaderSize = 16 // magic 8, option 4, length 4
	requestSize      = 28 // magic 4, flags 2, command 2, cookie 8, offset 8, length 4
	simpleSize       = 16 // magic 4, error 4, cookie 8
	chunkSize        = 20 // magic 4, flags 2, type 2, cookie 8, length 4
	dataHeaderSize   = chunkSize + 8

	stringMax = 4096 // of the protocol: names, descriptions, messages
)

var be = binary.BigEndian

// command is a decoded request header:
//
//	| magic 4 | flags 2 | command 2 | cookie 8 | offset 8 | length 4 |
type command struct {
	flags  uint16
	number uint16
	cookie uint64
	offset uint64
	length uint32
}

// decodeCommand decodes the requestSize bytes of b. It is false when the magic is wrong: the stream is then out of
// step and cannot be used any more.
func decodeCommand(b []byte, q *command) bool {
	_ = b[requestSize-1]
	if be.Uint32(b) != magicRequest {
		return false
	}
	q.flags = be.Uint16(b[4:])
	q.number = be.Uint16(b[6:])
	q.cookie = be.Uint64(b[8:])
	q.offset = be.Uint64(b[16:])
	q.length = be.Uint32(b[24:])
	return true
}

// putSimple encodes the header of a simple reply in the simpleSize bytes of b.
func putSimple(b []byte, cookie uint64, wireError uint32) {
	_ = b[simpleSize-1]
	be.PutUint32(b, magicSimple)
	be.PutUint32(b[4:], wireError)
	be.PutUint64(b[8:], cookie)
}

// putChunk encodes the header of a chunk with a payload of length bytes in the chunkSize bytes of b.
func putChunk(b []byte, flags, kind uint16, cookie uint64, length uint32) {
	_ = b[chunkSize-1]
	be.PutUint32(b, magicChunk)
	be.PutUint16(b[4:], flags)
	be.PutUint16(b[6:], kind)
	be.PutUint64(b[8:], cookie)
	be.PutUint32(b[16:], length)
}

// putData encodes what stands before the data of a data chunk in the dataHeaderSize bytes of b.
func putData(b []byte, flags uint16, cookie, offset uint64, length uint32) {
	putChunk(b, flags, chunkOffsetData, cookie, length+8)
	be.PutUint64(b[chunkSize:], offset)
}

// appendHole appends a hole chunk.
func appendHole(b []byte, flags uint16, cookie, offset uint64, length uint32) []byte {
	var h [chunkSize]byte
	putChunk(h[:], flags, chunkOffsetHole, cookie, 12)
	b = append(b, h[:]...)
	b = be.AppendUint64(b, offset)
	return be.AppendUint32(b, length)
}

// appendSimple appends a simple reply without data.
func appendSimple(b []byte, cookie uint64, wireError uint32) []byte {
	var h [simpleSize]byte
	putSimple(h[:], cookie, wireError)
	return append(b, h[:]...)
}

// appendError appends the last chunk of a reply that failed, with a message for people.
func appendError(b []byte, cookie uint64, wireError uint32, message string) []byte {
	message = cut(message, errorTextMax)
	var h [chunkSize]byte
	putChunk(h[:], chunkFlagDone, chunkError, cookie, uint32(6+len(message)))
	b = append(b, h[:]...)
	b = be.AppendUint32(b, wireError)
	b = be.AppendUint16(b, uint16(len(message)))
	return append(b, message...)
}

// errorTextMax is the longest error message sent, in bytes.
const errorTextMax = 256

// cut makes a string of the protocol of s: at most n bytes of valid UTF-8.
func cut(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	return strings.ToValidUTF8(s, "")
}
