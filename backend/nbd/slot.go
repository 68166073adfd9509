package nbd

import (
	"slices"
	"syscall"

	"cowherd/block"
)

// slotState is where a slot is; it changes under conn.mu.
type slotState uint8

const (
	slotFree     slotState = iota
	slotQueued             // waits to be sent; owned by the queue
	slotSending            // in the batch that is being written out; header and data owned by the sender
	slotSent               // the server has it all
	slotAnswered           // was slotSending when its last reply came: the sender settles it
)

// A slot is a request's place in the table of a connection. It goes over the wire in parts, one after the other: none
// is longer than the server takes, and a flush may follow where a write must be durable and the server has no FUA.
type slot struct {
	state      slotState
	generation uint32 // of the part, so that a stale or invented cookie is told from a good one
	index      uint16

	request *block.Request // nil: query
	query   *query         // nil: request
	done    int64          // bytes of the request that earlier parts have dealt with
	acked   uint64         // of a flush: the acknowledgements that it is to cover
	losses  int            // connections that were lost while the request was with the server

	// The part on the wire.
	command uint16
	flags   uint16
	offset  int64
	length  int64

	// The answer; the reader's.
	covered coverage
	err     error

	header [requestSize]byte
}

var commands = [...]uint16{
	block.OpRead: cmdRead, block.OpWrite: cmdWrite, block.OpFlush: cmdFlush, block.OpDiscard: cmdTrim,
	block.OpWriteZeroes: cmdWriteZeroes,
}

// cookie names the part on the wire.
func (s *slot) cookie() uint64 { return uint64(s.generation)<<16 | uint64(s.index) }

// load puts a request in the slot and prepares its first part.
func (s *slot) load(e *export, r *block.Request) {
	s.request, s.done, s.losses, s.err = r, 0, 0, nil
	s.prepare(e)
}

// loadQuery puts a query in the slot.
func (s *slot) loadQuery(q *query) {
	s.query, s.losses, s.err = q, 0, nil
	s.command, s.flags, s.offset, s.length = cmdBlockStatus, 0, q.offset, q.length
	s.generation++
}

// prepare sets the next part of the request up.
func (s *slot) prepare(e *export) {
	r := s.request
	s.generation++
	s.covered.reset()
	s.command, s.flags = commands[r.Op], 0
	s.offset, s.length = r.Offset+s.done, min(r.Length-s.done, e.partMax)
	if r.Op == block.OpFlush {
		s.offset, s.length = 0, 0
	}
	if r.Flags&block.FUA != 0 && r.Op.Writes() && e.has(flagFUA) {
		s.flags |= cmdFlagFUA
	}
	if r.Op == block.OpWriteZeroes {
		if r.Flags&block.NoUnmap != 0 {
			s.flags |= cmdFlagNoHole
		}
		if r.Flags&block.Fast != 0 {
			s.flags |= cmdFlagFastZero
		}
	}
}

// restart prepares the slot for another connection. What an earlier part of a write has done may be gone with the
// server, so it begins anew.
func (s *slot) restart(e *export) {
	s.err = nil
	if s.query != nil {
		s.query.extents, s.query.told = s.query.extents[:0], false
		s.generation++
		return
	}
	if s.request.Op.Writes() {
		s.done = 0
	}
	s.prepare(e)
}

// advance goes on after a part that went well. It is false when the request is done.
func (s *slot) advance(e *export) bool {
	r := s.request
	if r.Op == block.OpFlush || s.command == cmdFlush {
		return false
	}
	if s.done += s.length; s.done < r.Length {
		s.prepare(e)
		return true
	}
	if r.Flags&block.FUA != 0 && r.Op.Writes() && !e.has(flagFUA) && e.has(flagFlush) {
		s.generation++
		s.command, s.flags, s.offset, s.length = cmdFlush, 0, 0, 0
		return true
	}
	return false
}

// data is what the part reads into or writes from; empty for other commands.
func (s *slot) data() []byte {
	if s.command != cmdRead && s.command != cmdWrite {
		return nil
	}
	return s.request.Data[s.done : s.done+s.length]
}

// fail notes the first error of the part.
func (s *slot) fail(code uint32, message string) {
	if s.err == nil {
		s.err = &remoteError{errnoOf(code), message}
	}
}

// remoteError is an error that the server answers.
type remoteError struct {
	errno   syscall.Errno
	message string // what the server says about it; may be empty
}

func (e *remoteError) Error() string {
	if e.message == "" {
		return "the NBD server answers: " + e.errno.Error()
	}
	return "the NBD server answers: " + e.errno.Error() + " (" + e.message + ")"
}

func (e *remoteError) Unwrap() error { return e.errno }

// outcome is a request or query that is done and whose owner is yet to be told.
type outcome struct {
	request *block.Request
	query   *query
	err     error
}

// deliver tells the owner. No lock may be held.
func (o outcome) deliver() {
	switch {
	case o.query != nil:
		o.query.done <- o.err
	case o.request != nil && o.err != nil:
		o.request.Complete(block.WrapError(o.request, o.err))
	case o.request != nil:
		o.request.Complete(nil)
	}
}

// scatteredMax bounds what a coverage remembers: the ranges that came out of order and do not touch.
const scatteredMax = 1024

// coverage tells which bytes of a read the server has sent. Servers send them in order, as a rule; but they need not,
// and a byte that never came must not be taken for one that did.
type coverage struct {
	next  int64  // all before it has come; counted from the part's start
	later []span // what came too early: sorted, disjoint, behind next
}

type span struct{ start, end int64 }

func (v *coverage) reset() { v.next, v.later = 0, v.later[:0] }

// full tells whether all of length bytes have come.
func (v *coverage) full(length int64) bool { return v.next == length }

// add notes that [start, end) has come. It is false when some of it had come before, or when there is too much to
// remember.
func (v *coverage) add(start, end int64) bool {
	i, _ := slices.BinarySearchFunc(v.later, start, func(s span, start int64) int { return int(s.start - start) })
	overlaps := start < v.next || i > 0 && v.later[i-1].end > start || i < len(v.later) && v.later[i].start < end
	if overlaps || len(v.later) == scatteredMax {
		return false
	}
	if start > v.next {
		v.later = slices.Insert(v.later, i, span{start, end})
		return true
	}
	v.next = end
	joined := 0
	for joined < len(v.later) && v.later[joined].start == v.next {
		v.next = v.later[joined].end
		joined++
	}
	v.later = slices.Delete(v.later, 0, joined)
	return true
}
