package nbd

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"strings"
)

// handshakePadding is what EXPORT_NAME's reply ends with for clients that have not learnt to do without, in bytes.
const handshakePadding = 124

// exportName opens an export without telling more than size and flags. It has no reply for an error.
func (n *negotiation) exportName(ctx context.Context, data []byte) error {
	if len(data) > stringMax {
		return errors.New("the export's name is too long")
	}
	e, err := n.open(ctx, string(data))
	if err != nil {
		return err
	}
	n.reply = be.AppendUint64(n.reply, uint64(e.size()))
	n.reply = be.AppendUint16(n.reply, e.flags(n.structured))
	if !n.noZeroes {
		n.reply = append(n.reply, make([]byte, handshakePadding)...)
	}
	n.export, n.name = e, string(data)
	return nil
}

// open opens an export and makes sure that the protocol can express it.
func (n *negotiation) open(ctx context.Context, name string) (*Export, error) {
	e, err := n.server.config.Exports.Open(ctx, name, n.client)
	if err != nil {
		return nil, err
	}
	if err := e.check(); err != nil {
		e.release()
		return nil, err
	}
	return e, nil
}

// refuseExport answers an option whose export could not be opened.
func (n *negotiation) refuseExport(number uint32, err error) {
	kind := uint32(repErrPolicy)
	if errors.Is(err, fs.ErrNotExist) {
		kind = repErrUnknown
	}
	n.refuse(number, kind, err.Error())
}

// list names the exports:
//
//	reply: | length of the name 4 | name | description |
func (n *negotiation) list(ctx context.Context, data []byte) error {
	if len(data) != 0 {
		n.refuse(optList, repErrInvalid, "LIST has no data")
		return nil
	}
	for _, info := range n.server.config.Exports.List(ctx) {
		if len(info.Name) > stringMax {
			continue // no client could ask for it
		}
		b := be.AppendUint32(nil, uint32(len(info.Name)))
		b = append(b, info.Name...)
		b = append(b, cut(info.Description, stringMax)...)
		n.add(optList, repServer, b)
		if len(n.reply) >= optionMax {
			if err := n.flush(); err != nil {
				return err
			}
		}
	}
	n.add(optList, repAck, nil)
	return nil
}

// structuredReply turns structured replies on.
func (n *negotiation) structuredReply(data []byte) error {
	if len(data) != 0 {
		n.refuse(optStructuredReply, repErrInvalid, "STRUCTURED_REPLY has no data")
		return nil
	}
	n.structured = true
	n.add(optStructuredReply, repAck, nil)
	return nil
}

// info answers INFO and GO, which opens the export as well.
func (n *negotiation) info(ctx context.Context, number uint32, data []byte) error {
	name, wanted, ok := decodeInfo(data)
	if !ok {
		n.refuse(number, repErrInvalid, "the option's data is malformed")
		return nil
	}
	e, err := n.open(ctx, name)
	if err != nil {
		n.refuseExport(number, err)
		return nil
	}
	n.describe(number, e, wanted)
	n.add(number, repAck, nil)
	if number == optInfo {
		e.release()
		return nil
	}
	n.export, n.name = e, name
	return nil
}

// describe adds the items of information about e: size and flags and block sizes always, the rest when asked for.
func (n *negotiation) describe(number uint32, e *Export, wanted []uint16) {
	b := be.AppendUint16(nil, infoExport)
	b = be.AppendUint64(b, uint64(e.size()))
	b = be.AppendUint16(b, e.flags(n.structured))
	n.add(number, repInfo, b)

	minimum, preferred, maximum := e.blockSizes()
	b = be.AppendUint16(nil, infoBlockSize)
	b = be.AppendUint32(b, minimum)
	b = be.AppendUint32(b, preferred)
	b = be.AppendUint32(b, maximum)
	n.add(number, repInfo, b)

	if slices.Contains(wanted, infoName) {
		n.add(number, repInfo, append(be.AppendUint16(nil, infoName), e.Name...))
	}
	if slices.Contains(wanted, infoDescription) && e.Description != "" {
		b = be.AppendUint16(nil, infoDescription)
		n.add(number, repInfo, append(b, cut(e.Description, stringMax)...))
	}
}

// decodeInfo decodes the data of INFO and GO:
//
//	| length of the name 4 | name | count 2 | items 2 each |
func decodeInfo(data []byte) (name string, wanted []uint16, ok bool) {
	name, data, ok = decodeString(data)
	if !ok || len(data) < 2 {
		return "", nil, false
	}
	count := int(be.Uint16(data))
	data = data[2:]
	if len(data) != 2*count {
		return "", nil, false
	}
	for ; len(data) > 0; data = data[2:] {
		wanted = append(wanted, be.Uint16(data))
	}
	return name, wanted, true
}

// decodeString takes a length of 4 bytes and as many bytes of text off the front of data.
func decodeString(data []byte) (text string, rest []byte, ok bool) {
	if len(data) < 4 {
		return "", nil, false
	}
	length := be.Uint32(data)
	data = data[4:]
	if length > stringMax || uint64(length) > uint64(len(data)) {
		return "", nil, false
	}
	return string(data[:length]), data[length:], true
}

// decodeMetaContext decodes the data of LIST_META_CONTEXT and SET_META_CONTEXT:
//
//	| length of the name 4 | name | count 4 | queries: | length 4 | query | each |
func decodeMetaContext(data []byte) (name string, queries []string, ok bool) {
	name, data, ok = decodeString(data)
	if !ok || len(data) < 4 {
		return "", nil, false
	}
	count := be.Uint32(data)
	data = data[4:]
	if uint64(count) > uint64(len(data))/4 {
		return "", nil, false
	}
	for range count {
		var query string
		if query, data, ok = decodeString(data); !ok {
			return "", nil, false
		}
		queries = append(queries, query)
	}
	return name, queries, len(data) == 0
}

// metaContext lists the contexts that match the client's queries, and with SET selects them.
//
//	reply: | identifier 4 | name |
func (n *negotiation) metaContext(ctx context.Context, number uint32, data []byte) error {
	set := number == optSetMetaContext
	if set {
		n.contextsFor, n.selection = "", nil
	}
	if !n.structured {
		n.refuse(number, repErrInvalid, "metadata needs structured replies")
		return nil
	}
	name, queries, ok := decodeMetaContext(data)
	if !ok {
		n.refuse(number, repErrInvalid, "the option's data is malformed")
		return nil
	}
	if slices.ContainsFunc(queries, func(q string) bool { return !strings.Contains(q, ":") }) {
		n.refuse(number, repErrInvalid, "a query without a namespace")
		return nil
	}
	e, err := n.open(ctx, name)
	if err != nil {
		n.refuseExport(number, err)
		return nil
	}
	defer e.release()
	for i, c := range e.contexts() {
		if !contextWanted(c.Name, queries, set) {
			continue
		}
		id := uint32(0)
		if set {
			id = uint32(i)
			n.contextsFor, n.selection = name, append(n.selection, selection{id, c.Name})
		}
		n.add(number, repMetaContext, append(be.AppendUint32(nil, id), c.Name...))
	}
	n.add(number, repAck, nil)
	return nil
}

// contextWanted tells whether one of the queries is for the context of this name. A listing takes a namespace alone
// for all contexts in it, and no query at all for every context.
func contextWanted(name string, queries []string, set bool) bool {
	if !set && len(queries) == 0 {
		return true
	}
	return slices.ContainsFunc(queries, func(q string) bool {
		return q == name || !set && strings.HasSuffix(q, ":") && strings.HasPrefix(name, q)
	})
}

// selectedContexts are the contexts that the client selected for the export that it then opened, with the identifiers
// that it was told. A context that has gone meanwhile reports nothing but zero flags.
func (n *negotiation) selectedContexts() []selectedContext {
	if n.contextsFor != n.name {
		return nil
	}
	offered := n.export.contexts()
	var contexts []selectedContext
	for _, s := range n.selection {
		c := Context{Name: s.name, Extents: allData}
		if i := slices.IndexFunc(offered, func(c Context) bool { return c.Name == s.name }); i >= 0 {
			c = offered[i]
		}
		contexts = append(contexts, selectedContext{id: s.id, Context: c})
	}
	return contexts
}

// selection is a context selected in the handshake.
type selection struct {
	id   uint32
	name string
}

// selectedContext is a context that block status reports on.
type selectedContext struct {
	id uint32
	Context
}
