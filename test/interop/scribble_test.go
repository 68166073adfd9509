//go:build interop

package interop

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"cowherd/backend/nbd"
	"cowherd/block"
)

const (
	scribes     = 4 // goroutines that write to one export
	scribeBlock = 4 * kib
	// scribeFlush is how many writes come before a flush.
	scribeFlush = 16
	// scribeLong is the most blocks of a long write; every fourth is one.
	scribeLong = 96
	// scribeEnough is how many writes of a round are enough to be killed.
	scribeEnough = 25
)

// scribbler writes to an export until that fails, round after round, and keeps books. A block belongs to one goroutine,
// which has one write on its way at a time: it fills each block that it covers with the block's number and the number of
// writes to it, from 1. So whatever becomes of the daemon, a block holds the last write that was acknowledged, or one
// that was sent since. Short writes among long ones make exceptions end in another order than they began, and a kill
// then leaves gaps in the store.
type scribbler struct {
	base []byte // what the export held before
	// isVolatile: a kill may cost what was not flushed.
	isVolatile bool
	scribes    [scribes]scribe
	running    sync.WaitGroup
}

// scribe is one goroutine's part. Its fields are its own while a round is on.
type scribe struct {
	first  int      // its first block; the others follow
	issued []uint32 // by block of its own: the last write that was sent
	acked  []uint32 // the last that was acknowledged
	// flushed is the last that was acknowledged before a flush that was.
	flushed []uint32
}

func newScribbler(base []byte) *scribbler {
	s := &scribbler{base: bytes.Clone(base)}
	for i := range s.scribes {
		count := len(base) / scribeBlock / scribes
		s.scribes[i] = scribe{first: i * count, issued: make([]uint32, count), acked: make([]uint32, count),
			flushed: make([]uint32, count)}
	}
	return s
}

// start starts a round and returns when every scribe has written something worth losing.
func (s *scribbler) start(d *daemon, export string, round uint64) {
	d.t.Helper()
	var enough sync.WaitGroup
	enough.Add(scribes)
	for i := range s.scribes {
		device := d.open(export)
		s.running.Go(func() {
			s.scribes[i].run(device, rand.New(rand.NewPCG(uint64(i), round)), enough.Done)
			_ = device.Close() // the daemon is gone
		})
	}
	enough.Wait()
}

// run writes until a write fails. enough is called once.
func (w *scribe) run(device *nbd.Device, random *rand.Rand, enough func()) {
	buffer := make([]byte, scribeLong*scribeBlock)
	for n := 1; ; n++ {
		blocks := 1
		if n%4 == 0 {
			blocks += random.IntN(scribeLong)
		}
		first := random.IntN(len(w.issued) - blocks + 1)
		p := buffer[:blocks*scribeBlock]
		for i := range blocks {
			w.issued[first+i]++
			w.fill(p[i*scribeBlock:][:scribeBlock], first+i, w.issued[first+i])
		}
		err := block.Write(device, p, w.offset(first))
		if err == nil {
			copy(w.acked[first:first+blocks], w.issued[first:])
			if n%scribeFlush == 0 {
				if err = block.Flush(device); err == nil {
					copy(w.flushed, w.acked)
				}
			}
		}
		if n == scribeEnough || err != nil && n < scribeEnough {
			enough()
		}
		if err != nil {
			return
		}
	}
}

// offset is where the scribe's block i lies.
func (w *scribe) offset(i int) int64 { return int64(w.first+i) * scribeBlock }

// fill makes p write number n of block i.
func (w *scribe) fill(p []byte, i int, n uint32) {
	for at := 0; at < len(p); at += 8 {
		binary.LittleEndian.PutUint32(p[at:], uint32(w.first+i))
		binary.LittleEndian.PutUint32(p[at+4:], n)
	}
}

// check waits for the end of the round and compares what the export holds with the books.
func (s *scribbler) check(t *testing.T, what string, held []byte) {
	t.Helper()
	s.running.Wait()
	if len(held) != len(s.base) {
		t.Fatalf("%s has %d bytes instead of %d", what, len(held), len(s.base))
	}
	tail := len(s.scribes[0].issued) * scribes * scribeBlock
	if !bytes.Equal(held[tail:], s.base[tail:]) {
		t.Errorf("%s has changed where nobody wrote", what)
	}
	for k := range s.scribes {
		w := &s.scribes[k]
		if s.isVolatile {
			copy(w.acked, w.flushed)
		}
		for i := range w.issued {
			at := w.offset(i)
			if err := w.checkBlock(i, held[at:at+scribeBlock], s.base[at:at+scribeBlock]); err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
}

// checkBlock checks what is held of block i.
func (w *scribe) checkBlock(i int, held, base []byte) error {
	if w.acked[i] == 0 && bytes.Equal(held, base) {
		return nil
	}
	n := binary.LittleEndian.Uint32(held[4:])
	want := make([]byte, scribeBlock)
	w.fill(want, i, n)
	switch {
	case !bytes.Equal(held, want):
		return fmt.Errorf("block %d holds no write to it; %d was acknowledged", w.first+i, w.acked[i])
	case n < w.acked[i] || n > w.issued[i]:
		return fmt.Errorf("block %d holds write %d; %d was acknowledged, %d sent", w.first+i, n, w.acked[i],
			w.issued[i])
	}
	return nil
}
