package trace

import "sync/atomic"

// ring is a bounded queue of records with many writers and one reader, who never wait for each other.
//
// A slot's turn tells whose it is: at a round n (0, 1, ...) of slot i the writer waits for turn 2n and leaves 2n+1, the
// reader waits for 2n+1 and leaves 2n+2. A writer takes a place by moving head on, so that a record which two writers
// want to put at the same place is one of them's; a place whose turn has not come means that the ring is full.
type ring struct {
	head  atomic.Uint64 // places that writers have taken
	last  atomic.Uint64 // identities that have been given
	tail  uint64        // the reader's
	slots []slot
}

type slot struct {
	turn atomic.Uint64
	rec  record
}

// put adds a record; false: there is no room.
func (g *ring) put(rec *record) bool {
	size := uint64(len(g.slots))
	for {
		at := g.head.Load()
		s := &g.slots[at%size]
		switch turn, mine := s.turn.Load(), 2*(at/size); {
		case turn == mine:
			if g.head.CompareAndSwap(at, at+1) {
				s.rec = *rec
				s.turn.Store(mine + 1)
				return true
			}
		case turn < mine: // the reader has not been here
			return false
		}
	}
}

// drain gives all records that are there to yield, oldest first.
func (g *ring) drain(yield func(*record)) {
	size := uint64(len(g.slots))
	for {
		s, full := &g.slots[g.tail%size], 2*(g.tail/size)+1
		if s.turn.Load() != full {
			return
		}
		yield(&s.rec)
		s.turn.Store(full + 1)
		g.tail++
	}
}
