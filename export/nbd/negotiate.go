package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

const (
	// optionMax is the longest option data that is looked at, in bytes: a few of the longest names fit.
	optionMax = 64 << 10
	// drainMax is the longest option data that is read away, in bytes; who sends more is cut off.
	drainMax = 16 << 20
)

// errAborted ends a handshake that the client did not want to go on with.
var errAborted = errors.New("nbd: the client left the handshake")

// negotiation is the handshake of one connection: fixed newstyle, one option after the other, until one of them opens
// an export. It runs on one goroutine, with a deadline over all of it.
//
//	server: | NBDMAGIC 8 | IHAVEOPT 8 | handshake flags 2 |
//	client: | client flags 4 |
//	client: | IHAVEOPT 8 | option 4 | length 4 | data |                  any number of times
//	server: | magic 8 | option 4 | reply 4 | length 4 | data |           one or more for each option
type negotiation struct {
	server *Server
	client string

	stream    net.Conn // the connection, or TLS over it
	relay     *relay   // below TLS; nil without
	fixed     bool     // the client knows more options than EXPORT_NAME
	noZeroes  bool
	encrypted bool

	structured  bool
	contextsFor string // the export that contexts were selected for
	selection   []selection

	reply []byte // replies that have not been sent yet

	export *Export // what was opened in the end, with its reference
	name   string  // as the client called it
}

// run negotiates. Without an error n.export is open and its reference the caller's.
func (n *negotiation) run() error {
	ctx, cancel := context.WithTimeout(context.Background(), n.server.config.HandshakeTimeout)
	defer cancel()
	deadline, _ := ctx.Deadline()
	if err := n.stream.SetDeadline(deadline); err != nil {
		return fmt.Errorf("nbd: handshake deadline: %w", err)
	}
	if err := n.greet(); err != nil {
		return err
	}
	for n.export == nil {
		if err := n.option(ctx); err != nil {
			return err
		}
	}
	if err := n.stream.SetDeadline(time.Time{}); err != nil {
		n.export.release()
		return fmt.Errorf("nbd: handshake deadline: %w", err)
	}
	return nil
}

// greet sends the server's flags and takes the client's.
func (n *negotiation) greet() error {
	hello := be.AppendUint64(nil, magicServer)
	hello = be.AppendUint64(hello, magicOption)
	hello = be.AppendUint16(hello, handshakeFixedNewstyle|handshakeNoZeroes)
	if _, err := n.stream.Write(hello); err != nil {
		return fmt.Errorf("nbd: greeting: %w", err)
	}
	var b [4]byte
	if _, err := io.ReadFull(n.stream, b[:]); err != nil {
		return fmt.Errorf("nbd: client flags: %w", err)
	}
	flags := be.Uint32(b[:])
	if flags&^(handshakeFixedNewstyle|handshakeNoZeroes) != 0 {
		return fmt.Errorf("nbd: unknown client flags %#x", flags)
	}
	n.fixed = flags&handshakeFixedNewstyle != 0
	n.noZeroes = flags&handshakeNoZeroes != 0
	return nil
}

// option reads one option and answers it. The error ends the connection.
func (n *negotiation) option(ctx context.Context) error {
	var h [optionHeaderSize]byte
	if _, err := io.ReadFull(n.stream, h[:]); err != nil {
		return fmt.Errorf("nbd: option: %w", err)
	}
	if magic := be.Uint64(h[:]); magic != magicOption {
		return fmt.Errorf("nbd: option with magic %#x", magic)
	}
	number, length := be.Uint32(h[8:]), be.Uint32(h[12:])
	data, fits, err := n.optionData(length)
	if err != nil {
		return fmt.Errorf("nbd: data of option %d: %w", number, err)
	}
	if !n.fixed && number != optExportName {
		return fmt.Errorf("nbd: option %d from a client without fixed newstyle", number)
	}
	if err := n.answer(ctx, number, data, fits); err != nil {
		return fmt.Errorf("nbd: option %d: %w", number, err)
	}
	return n.flush()
}

// optionData reads the data of an option. What is longer than optionMax is read away and fits is false.
func (n *negotiation) optionData(length uint32) (data []byte, fits bool, err error) {
	if length > drainMax {
		return nil, false, fmt.Errorf("%d bytes are too many", length)
	}
	if length > optionMax {
		_, err := io.CopyN(io.Discard, n.stream, int64(length))
		return nil, false, err
	}
	data = make([]byte, length)
	_, err = io.ReadFull(n.stream, data)
	return data, true, err
}

// answer does what one option asks for.
func (n *negotiation) answer(ctx context.Context, number uint32, data []byte, fits bool) error {
	switch {
	case number == optAbort:
		n.add(number, repAck, nil)
		_ = n.flush() // the client may have gone already, which is what it wants
		return errAborted
	case n.server.config.TLSMode == TLSRequire && !n.encrypted && number != optStartTLS:
		return n.refuseOr(number, repErrTLSRequired, "this server wants TLS", errors.New("no TLS"))
	case !fits:
		return n.refuseOr(number, repErrTooBig, "the option's data is too long", errors.New("the data is too long"))
	case n.server.isStopping():
		return n.refuseOr(number, repErrShutdown, "the server is stopping", ErrServerClosed)
	}
	switch number {
	case optExportName:
		return n.exportName(ctx, data)
	case optList:
		return n.list(ctx, data)
	case optStartTLS:
		return n.startTLS(ctx, data)
	case optInfo, optGo:
		return n.info(ctx, number, data)
	case optStructuredReply:
		return n.structuredReply(data)
	case optListMetaContext, optSetMetaContext:
		return n.metaContext(ctx, number, data)
	}
	n.add(number, repErrUnsupported, nil)
	return nil
}

// refuseOr answers an option with an error. EXPORT_NAME has no reply for errors: it ends the connection with err.
func (n *negotiation) refuseOr(number, kind uint32, text string, err error) error {
	if number == optExportName {
		return err
	}
	n.refuse(number, kind, text)
	return nil
}

// refuse adds an error reply with a message for people.
func (n *negotiation) refuse(number, kind uint32, text string) {
	n.add(number, kind, []byte(cut(text, stringMax)))
}

// add adds a reply; option sends all that an option has got.
func (n *negotiation) add(number, kind uint32, data []byte) {
	n.reply = be.AppendUint64(n.reply, magicReply)
	n.reply = be.AppendUint32(n.reply, number)
	n.reply = be.AppendUint32(n.reply, kind)
	n.reply = be.AppendUint32(n.reply, uint32(len(data)))
	n.reply = append(n.reply, data...)
}

// flush sends the replies that have gathered.
func (n *negotiation) flush() error {
	if len(n.reply) == 0 {
		return nil
	}
	_, err := n.stream.Write(n.reply)
	n.reply = n.reply[:0]
	if err != nil && n.export != nil {
		n.export.release()
	}
	return err
}

// startTLS turns the connection into a TLS session. All that was negotiated before is forgotten.
func (n *negotiation) startTLS(ctx context.Context, data []byte) error {
	switch {
	case len(data) != 0:
		n.refuse(optStartTLS, repErrInvalid, "STARTTLS has no data")
		return nil
	case n.encrypted:
		n.refuse(optStartTLS, repErrInvalid, "TLS is on")
		return nil
	case n.server.config.TLSMode == TLSOff:
		n.refuse(optStartTLS, repErrPolicy, "this server has no TLS")
		return nil
	}
	n.add(optStartTLS, repAck, nil)
	if err := n.flush(); err != nil {
		return err
	}
	n.relay = &relay{Conn: n.stream}
	session := tls.Server(n.relay, n.server.config.TLS)
	if err := session.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS handshake: %w", err)
	}
	n.stream, n.encrypted = session, true
	n.structured, n.contextsFor, n.selection = false, "", nil
	return nil
}
