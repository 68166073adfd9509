package nbd

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/bits"
	"net"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"
)

const (
	// handshakeTimeout bounds connecting and the handshake together where the caller's context has no deadline.
	handshakeTimeout = 30 * time.Second
	// optionReplyMax is the longest answer to an option that is read, in bytes.
	optionReplyMax = 64 << 10
	// optionRepliesMax is the most answers to one option that are read.
	optionRepliesMax = 256

	// What the protocol advises where the server does not say.
	defaultLogicalBlock = 512
	defaultPreferredIO  = 4096
	// partMax is the most that one request on the wire asks for, in bytes: what every server takes.
	partMax = 32 << 20
	// logicalBlockMax is the largest minimum block size that the protocol allows.
	logicalBlockMax = 64 << 10
)

// export is what the handshake finds out.
type export struct {
	size         int64 // bytes
	flags        uint16
	structured   bool
	allocation   bool   // block status can be asked for
	context      uint32 // the number of contextAllocation on this connection
	logicalBlock int
	preferredIO  int
	partMax      int64 // bytes; a multiple of logicalBlock
}

func (e *export) has(flag uint16) bool { return e.flags&flag != 0 }

// handshake is one negotiation. It reads no byte more than it needs, so that the stream can go over to TLS.
type handshake struct {
	stream    net.Conn
	config    *Config
	simple    bool // structured replies are not wanted, nor what depends on them
	noZeroes  bool
	blockSize []byte // the payload of infoBlockSize, if it came
	export    export
}

// optionError is a server's refusal of an option: the session is in order and may go on.
type optionError struct {
	option, reply uint32
	message       string
}

func (e *optionError) Error() string {
	reason, known := map[uint32]string{
		repErrUnsupported: "not supported", repErrPolicy: "forbidden by its policy", repErrInvalid: "invalid",
		repErrPlatform: "not supported on its platform", repErrTLSRequired: "it requires TLS",
		repErrUnknown: "no such export", repErrShutdown: "it is shutting down",
		repErrBlockSize: "it requires block sizes to be heeded", repErrTooBig: "too big",
	}[e.reply]
	if !known {
		reason = fmt.Sprintf("error %#x", e.reply)
	}
	if e.message != "" {
		reason += fmt.Sprintf(" (it says %q)", e.message)
	}
	names := map[uint32]string{
		optStartTLS: "TLS", optGo: "the export", optStructuredReply: "structured replies",
		optSetMetaContext: contextAllocation,
	}
	return fmt.Sprintf("the NBD server refuses %s: %s", names[e.option], reason)
}

// Unwrap gives an errno that tells callers what they can do about it.
func (e *optionError) Unwrap() error {
	switch e.reply {
	case repErrUnknown:
		return syscall.ENOENT
	case repErrPolicy, repErrTLSRequired:
		return syscall.EACCES
	case repErrShutdown:
		return syscall.ESHUTDOWN
	}
	return syscall.ENOTSUP
}

// writeBuffer is the size in bytes of the send buffer that is asked for on unix sockets.
const writeBuffer = 1 << 20

// dial connects and negotiates. The stream that it returns is a TLS one if the configuration says so.
func dial(ctx context.Context, c *Config) (net.Conn, export, error) { return dialAs(ctx, c, false) }

// dialAs is dial. simple: structured replies, and what depends on them, are not asked for.
func dialAs(ctx context.Context, c *Config, simple bool) (net.Conn, export, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	var d net.Dialer
	stream, err := d.DialContext(ctx, c.Network, c.Address)
	if err != nil {
		return nil, export{}, err
	}
	if u, ok := stream.(*net.UnixConn); ok {
		// A large write goes out with one call and one wake-up of the server. TCP sizes its buffers itself. The kernel gives
		// what it allows; that it gives less is no error.
		_ = u.SetWriteBuffer(writeBuffer)
	}
	h := handshake{stream: stream, config: c, simple: simple}
	if err := h.runUntil(ctx); err != nil {
		return nil, export{}, errors.Join(err, h.stream.Close())
	}
	return h.stream, h.export, nil
}

// runUntil runs the handshake and breaks it off when ctx ends.
func (h *handshake) runUntil(ctx context.Context) error {
	raw := h.stream
	stop := context.AfterFunc(ctx, func() { _ = raw.SetDeadline(time.Unix(1, 0)) })
	err := h.run(ctx)
	if !stop() && ctx.Err() != nil {
		return fmt.Errorf("NBD handshake: %w", ctx.Err())
	}
	if err != nil {
		return fmt.Errorf("NBD handshake: %w", err)
	}
	return nil
}

func (h *handshake) run(ctx context.Context) error {
	fixed, err := h.greet()
	if err != nil {
		return err
	}
	if !fixed {
		if h.config.TLS != nil {
			return fmt.Errorf("the server is too old for TLS: %w", syscall.ENOTSUP)
		}
		err = h.exportName()
	} else {
		err = h.haggle(ctx)
	}
	if _, refused := errors.AsType[*optionError](err); refused {
		_ = h.sendOption(optAbort, nil) // a courtesy: the connection is closed whatever comes of it
	}
	if err != nil {
		return err
	}
	return h.export.settle(h.blockSize)
}

// greet exchanges the first messages. It tells whether the server knows fixed newstyle.
func (h *handshake) greet() (fixed bool, err error) {
	var b [18]byte
	if _, err := io.ReadFull(h.stream, b[:16]); err != nil {
		return false, fmt.Errorf("read the greeting: %w", err)
	}
	if binary.BigEndian.Uint64(b[:]) != magicInit {
		return false, violation("the greeting is not that of an NBD server")
	}
	switch binary.BigEndian.Uint64(b[8:]) {
	case magicOption:
	case magicOldstyle:
		return false, fmt.Errorf("the server speaks oldstyle NBD only: %w", syscall.ENOTSUP)
	default:
		return false, violation("the greeting is of no known style")
	}
	if _, err := io.ReadFull(h.stream, b[16:]); err != nil {
		return false, fmt.Errorf("read the greeting: %w", err)
	}
	flags := binary.BigEndian.Uint16(b[16:]) & (handshakeFixedNewstyle | handshakeNoZeroes)
	h.noZeroes = flags&handshakeNoZeroes != 0
	binary.BigEndian.PutUint32(b[:], uint32(flags))
	if _, err := h.stream.Write(b[:4]); err != nil {
		return false, fmt.Errorf("answer the greeting: %w", err)
	}
	return flags&handshakeFixedNewstyle != 0, nil
}

// haggle sends the options, in the order that the protocol demands.
func (h *handshake) haggle(ctx context.Context) error {
	if h.config.TLS != nil {
		if err := h.startTLS(ctx); err != nil {
			return err
		}
	}
	if h.simple {
		return h.goTransmit()
	}
	err := h.option(optStructuredReply, nil, nil)
	if refused(err) {
		return h.goTransmit()
	}
	if err != nil {
		return err
	}
	h.export.structured = true
	if err := h.setContext(); err != nil && !refused(err) {
		return err
	}
	return h.goTransmit()
}

// refused tells whether err is a refusal that the handshake can live with.
func refused(err error) bool {
	e, ok := errors.AsType[*optionError](err)
	return ok && e.reply != repErrTLSRequired && e.reply != repErrShutdown
}

func (h *handshake) startTLS(ctx context.Context) error {
	if err := h.option(optStartTLS, nil, nil); err != nil {
		return err
	}
	secure := tls.Client(h.stream, h.config.TLS)
	if err := secure.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	h.stream = secure
	return nil
}

// setContext asks for contextAllocation: name length 4 | name | queries 4 | query length 4 | query.
func (h *handshake) setContext() error {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(h.config.Export)))
	b = append(b, h.config.Export...)
	b = binary.BigEndian.AppendUint32(b, 1)
	b = binary.BigEndian.AppendUint32(b, uint32(len(contextAllocation)))
	b = append(b, contextAllocation...)
	err := h.option(optSetMetaContext, b, func(reply uint32, payload []byte) error {
		if reply != repMetaContext || len(payload) < 4 {
			return violationf("answer %#x of %d bytes to a choice of metadata contexts", reply, len(payload))
		}
		if string(payload[4:]) == contextAllocation {
			h.export.allocation, h.export.context = true, binary.BigEndian.Uint32(payload)
		}
		return nil
	})
	if err != nil {
		h.export.allocation = false
	}
	return err
}

// goTransmit ends the negotiation: name length 4 | name | count 2 | information wanted, 2 each.
func (h *handshake) goTransmit() error {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(h.config.Export)))
	b = append(b, h.config.Export...)
	b = binary.BigEndian.AppendUint16(b, 1)
	b = binary.BigEndian.AppendUint16(b, infoBlockSize)
	told := false
	err := h.option(optGo, b, func(reply uint32, payload []byte) error {
		if reply != repInfo || len(payload) < 2 {
			return violationf("answer %#x of %d bytes to the choice of the export", reply, len(payload))
		}
		kind, info := binary.BigEndian.Uint16(payload), payload[2:]
		switch {
		case kind == infoExport && len(info) == 10:
			told = true
			h.export.flags = binary.BigEndian.Uint16(info[8:])
			return h.export.setSize(binary.BigEndian.Uint64(info))
		case kind == infoBlockSize && len(info) == 12:
			h.blockSize = info
		case kind == infoExport || kind == infoBlockSize:
			return violationf("information %d has %d bytes", kind, len(info))
		}
		return nil
	})
	if e, ok := errors.AsType[*optionError](err); ok && e.reply == repErrUnsupported {
		return h.exportName()
	}
	if err == nil && !told {
		return violation("the export's size was not told")
	}
	return err
}

// exportName ends the negotiation with an old server, which drops the connection if it does not know the export.
func (h *handshake) exportName() error {
	if err := h.sendOption(optExportName, []byte(h.config.Export)); err != nil {
		return err
	}
	b := make([]byte, 10+exportZeroes)
	if h.noZeroes {
		b = b[:10]
	}
	if _, err := io.ReadFull(h.stream, b); err != nil {
		return fmt.Errorf("choose the export (an old server hangs up when it has none of that name): %w", err)
	}
	h.export.flags = binary.BigEndian.Uint16(b[8:])
	return h.export.setSize(binary.BigEndian.Uint64(b))
}

// sendOption sends an option: magic 8 | option 4 | length 4 | data.
func (h *handshake) sendOption(option uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, magicOption)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	if _, err := h.stream.Write(append(b, data...)); err != nil {
		return fmt.Errorf("send option %d: %w", option, err)
	}
	return nil
}

// option sends an option and reads the answers up to the last one: each goes to take, which may be nil when none is
// expected, but for the acknowledgement and a refusal, which is returned.
func (h *handshake) option(option uint32, data []byte, take func(reply uint32, payload []byte) error) error {
	if err := h.sendOption(option, data); err != nil {
		return err
	}
	for range optionRepliesMax {
		reply, payload, err := h.readReply(option)
		switch {
		case err != nil:
			return err
		case reply == repAck:
			return nil
		case reply&repErrorBit != 0:
			return &optionError{option, reply, printable(payload)}
		case take == nil:
			return violationf("answer %#x to option %d", reply, option)
		}
		if err := take(reply, payload); err != nil {
			return err
		}
	}
	return violationf("more than %d answers to option %d", optionRepliesMax, option)
}

// readReply reads one answer: magic 8 | option 4 | reply 4 | length 4 | payload.
func (h *handshake) readReply(option uint32) (reply uint32, payload []byte, err error) {
	var b [20]byte
	if _, err := io.ReadFull(h.stream, b[:]); err != nil {
		return 0, nil, fmt.Errorf("read the answer to option %d: %w", option, err)
	}
	if magic := binary.BigEndian.Uint64(b[:]); magic != magicReply {
		return 0, nil, violationf("the answer to option %d begins with %#x", option, magic)
	}
	if about := binary.BigEndian.Uint32(b[8:]); about != option {
		return 0, nil, violationf("option %d is answered where %d was sent", about, option)
	}
	length := binary.BigEndian.Uint32(b[16:])
	if length > optionReplyMax {
		return 0, nil, violationf("the answer to option %d has %d bytes", option, length)
	}
	payload = make([]byte, length)
	if _, err := io.ReadFull(h.stream, payload); err != nil {
		return 0, nil, fmt.Errorf("read the answer to option %d: %w", option, err)
	}
	return binary.BigEndian.Uint32(b[12:]), payload, nil
}

// printable is a message of the server, cut to what the protocol allows.
func printable(b []byte) string {
	b = b[:min(len(b), stringMax)]
	if !utf8.Valid(b) {
		return strings.ToValidUTF8(string(b), "\uFFFD")
	}
	return string(b)
}

func (e *export) setSize(size uint64) error {
	if size > math.MaxInt64 {
		return fmt.Errorf("an export of %d bytes is larger than a device can be: %w", size, syscall.EFBIG)
	}
	e.size = int64(size)
	return nil
}

// settle works out the block sizes from the server's: minimum 4 | preferred 4 | maximum 4, or none.
func (e *export) settle(blockSize []byte) error {
	e.logicalBlock, e.preferredIO, e.partMax = defaultLogicalBlock, defaultPreferredIO, partMax
	if len(blockSize) == 0 {
		if e.size%defaultLogicalBlock != 0 {
			e.logicalBlock = 1
		}
		return nil
	}
	least, preferred := binary.BigEndian.Uint32(blockSize), binary.BigEndian.Uint32(blockSize[4:])
	most := binary.BigEndian.Uint32(blockSize[8:])
	switch {
	case bits.OnesCount32(least) != 1 || least > logicalBlockMax:
		return violationf("a minimum block size of %d", least)
	case most < least:
		return violationf("a maximum block size of %d below the minimum of %d", most, least)
	}
	e.logicalBlock, e.preferredIO = int(least), max(int(least), defaultPreferredIO)
	if bits.OnesCount32(preferred) == 1 && preferred >= least {
		e.preferredIO = int(preferred)
	}
	e.partMax = min(int64(most), partMax) &^ int64(least-1)
	e.size &^= int64(least - 1) // what lies behind cannot be reached
	return nil
}
