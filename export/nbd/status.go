package nbd

// extentsMax bounds the descriptors of one context in a reply.
const extentsMax = 2048

// blockStatus makes the whole reply to a block status request: for each context that the client selected a chunk
//
//	| header 20 | identifier 4 | descriptors: | length 4 | flags 4 | each |
func (c *conn) blockStatus(q *command) ([]byte, error) {
	most := extentsMax
	if q.flags&cmdFlagReqOne != 0 {
		most = 1
	}
	var reply []byte
	for i, context := range c.contexts {
		list := descriptorList{
			offset: int64(q.offset), end: int64(q.offset) + int64(q.length), start: int64(q.offset),
			blockMask: int64(c.blockMask), most: most,
		}
		if err := context.Extents(int64(q.offset), int64(q.length), list.add); err != nil {
			return nil, err
		}
		list.finish()
		flags := uint16(0)
		if i == len(c.contexts)-1 {
			flags = chunkFlagDone
		}
		var h [chunkSize]byte
		putChunk(h[:], flags, chunkBlockStatus, q.cookie, uint32(4+len(list.encoded)))
		reply = append(reply, h[:]...)
		reply = be.AppendUint32(reply, context.id)
		reply = append(reply, list.encoded...)
	}
	return reply, nil
}

// descriptorList gathers consecutive extents from offset on into descriptors: neighbours with the same flags become
// one, and a logical block that several extents share gets the flags that all of them have.
type descriptorList struct {
	offset, end int64 // of the request
	blockMask   int64
	most        int // descriptors

	length  int64  // of the extents so far, from offset on
	start   int64  // of the current run; a block boundary
	flags   uint32 // of the current run
	encoded []byte
	last    uint32 // flags of the last descriptor
	full    bool
}

// add takes the next extent. It is false when no more are wanted.
func (l *descriptorList) add(length int64, flags uint32) bool {
	if length <= 0 || l.full {
		return !l.full
	}
	at := l.offset + l.length
	length = min(length, l.end-at)
	l.length += length
	next := at + length
	switch floor := at &^ l.blockMask; {
	case at == l.start:
		l.flags = flags
	case flags == l.flags:
	case floor == at:
		l.emit(at)
		l.flags = flags
	default:
		l.emit(floor)
		ceil := floor + l.blockMask + 1
		l.flags &= flags
		if next >= ceil {
			l.emit(ceil)
			l.flags = flags
		}
	}
	return !l.full && next < l.end
}

// emit ends the current run at end and starts the next one there.
func (l *descriptorList) emit(end int64) {
	length := uint32(end - l.start)
	n := len(l.encoded)
	switch {
	case length == 0 || l.full:
	case n > 0 && l.last == l.flags:
		be.PutUint32(l.encoded[n-8:], be.Uint32(l.encoded[n-8:])+length)
	case n == 8*l.most:
		l.full = true
	default:
		l.encoded = be.AppendUint32(l.encoded, length)
		l.encoded = be.AppendUint32(l.encoded, l.flags)
		l.last = l.flags
	}
	l.start = end
}

// finish ends the last run. A context that had nothing to say has no flags anywhere.
func (l *descriptorList) finish() {
	if l.length == 0 {
		l.add(l.end-l.offset, 0)
	}
	l.emit((l.offset + l.length + l.blockMask) &^ l.blockMask)
}
