package cowstore

import (
	"fmt"
	"sync"

	"cowherd/block"
)

const (
	// pieceBytes is the most that is read of an area at a time: areas are as large as chunks, up to a gigabyte.
	pieceBytes = 64 << 10
	// scanAhead is the number of pieces that are read ahead (the kernel's loader reads 12 areas ahead).
	scanAhead = 32
)

// Piece is a part of an area, as a scan delivers it. Its Bytes are the scan's: they hold until the visit returns.
type Piece struct {
	Area  uint64
	Slot  int // of the first record
	Bytes []byte
}

// Len is the number of records in the piece, those behind the end of the table included.
func (p *Piece) Len() int { return len(p.Bytes) / recordBytes }

// Record is the piece's record number i.
func (p *Piece) Record(i int) Record { return recordAt(p.Bytes, i) }

// place is the byte of the COW device at which a slot of an area lies.
func (l Layout) place(area uint64, slot int) int64 {
	return l.ChunkSize.Offset(l.AreaChunk(area)) + int64(slot)*recordBytes
}

// pieceSize is the size of the pieces that areas are read in.
func (l Layout) pieceSize() int { return int(min(int64(l.ChunkSize), pieceBytes)) }

// Scan reads the areas of the store on d from the first on, in pieces and in order, until visit returns false or an
// error, or the areas that fit the device end. Pieces are read ahead while visit works.
func (l Layout) Scan(d block.Device, visit func(*Piece) (more bool, err error)) error {
	s := scan{layout: l, device: d, pieces: int(int64(l.ChunkSize) / int64(l.pieceSize()))}
	defer s.drain()
	for range scanAhead {
		s.ahead()
	}
	for s.read < s.asked {
		r := &s.ring[s.read%scanAhead]
		<-r.done
		s.read++
		if r.err != nil {
			return fmt.Errorf("read area %d: %w", r.piece.Area, r.err)
		}
		more, err := visit(&r.piece)
		if err != nil || !more {
			return err
		}
		s.ahead()
	}
	return nil
}

// scan is the state of one Scan: a ring of reads in flight, in the order of the pieces.
type scan struct {
	layout Layout
	device block.Device
	pieces int // of an area

	asked, read uint64 // pieces
	ring        [scanAhead]pieceRead
}

// pieceRead is a read of a piece, and its own Completer.
type pieceRead struct {
	piece Piece
	r     block.Request
	err   error
	done  chan struct{}
}

func (p *pieceRead) Complete(_ *block.Request, err error) {
	p.err = err
	p.done <- struct{}{}
}

// pieceBuffers keeps the buffers of scans for the next one.
var pieceBuffers = sync.Pool{New: func() any { return new([pieceBytes]byte) }}

// ahead starts to read the next piece, if there is one.
func (s *scan) ahead() {
	area, index := s.asked/uint64(s.pieces), int(s.asked%uint64(s.pieces))
	if area >= s.layout.Areas() {
		return
	}
	p := &s.ring[s.asked%scanAhead]
	if p.done == nil {
		p.done = make(chan struct{}, 1)
		p.piece.Bytes = pieceBuffers.Get().(*[pieceBytes]byte)[:s.layout.pieceSize()]
	}
	s.asked++
	p.piece.Area, p.piece.Slot = area, index*len(p.piece.Bytes)/recordBytes
	p.r.Reset()
	p.r.Op, p.r.Data, p.r.Length = block.OpRead, p.piece.Bytes, int64(len(p.piece.Bytes))
	p.r.Offset = s.layout.place(area, p.piece.Slot)
	p.r.Queue = block.Queue(s.asked) // spread, so that the reads run beside each other
	p.r.Push(p)
	s.device.Submit(&p.r)
}

// drain waits for what is still being read, and gives the buffers back.
func (s *scan) drain() {
	for ; s.read < s.asked; s.read++ {
		<-s.ring[s.read%scanAhead].done
	}
	for i := range s.ring {
		if p := &s.ring[i]; p.done != nil {
			pieceBuffers.Put((*[pieceBytes]byte)(p.piece.Bytes[:pieceBytes]))
		}
	}
}
