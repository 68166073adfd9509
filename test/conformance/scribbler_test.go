package conformance

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"

	"cowherd/block"
)

// A scribbler writes to an export until that fails, and keeps books. A block belongs to one goroutine, which writes one
// block at a time: each write fills the block with its number and the number of the write, from 1. So whatever becomes
// of the daemon, a block must hold the last write that was acknowledged, or the one that was on its way.
type scribbler struct {
	d       *daemon
	workers []*scribe
	running sync.WaitGroup
}

// scribe is one goroutine with a connection of its own. Its fields are its own until the scribbler has been waited for.
type scribe struct {
	base   int64    // the byte at which block 0 lies
	first  int      // its first block; the others are every scribes-th
	issued []uint32 // by block of its own: the last write that was sent
	acked  []uint32 // the last that was acknowledged
	err    error
	begun  chan struct{} // closed when it has written once, or can write no more
	enough chan struct{} // closed when it has written something worth losing, or can write no more
}

const (
	scribes     = 4
	scribeBlock = 4 * kib
	// scribeFlush is how many writes come before a flush.
	scribeFlush = 32
	// scribeEnough is how many writes are enough for a test to go on.
	scribeEnough = 200
)

// scribble starts to write to all of an export of size bytes.
func scribble(d *daemon, export string, size int64) *scribbler {
	d.t.Helper()
	return scribbleAt(d, export, 0, size)
}

// scribbleAt starts to write to size bytes of an export from byte base on.
func scribbleAt(d *daemon, export string, base, size int64) *scribbler {
	d.t.Helper()
	s := &scribbler{d: d}
	for i := range scribes {
		device := d.open(export, 1)
		count := int(size) / scribeBlock / scribes
		w := &scribe{base: base, first: i, issued: make([]uint32, count), acked: make([]uint32, count)}
		w.begun, w.enough = make(chan struct{}), make(chan struct{})
		s.workers = append(s.workers, w)
		s.running.Go(func() {
			w.run(device)
			w.err = errors.Join(w.err, device.Close())
		})
	}
	return s
}

// run writes until a write fails.
func (w *scribe) run(device block.Device) {
	random := rand.New(rand.NewPCG(uint64(w.first), 0))
	p := make([]byte, scribeBlock)
	n := 0
	defer func() {
		if n == 0 {
			close(w.begun)
		}
		if n < scribeEnough {
			close(w.enough)
		}
	}()
	for {
		i := random.IntN(len(w.issued))
		w.issued[i]++
		w.fill(p, i, w.issued[i])
		if block.Write(device, p, w.offset(i)) != nil {
			return
		}
		w.acked[i] = w.issued[i]
		n++
		switch n {
		case 1:
			close(w.begun)
		case scribeEnough:
			close(w.enough)
		}
		if n%scribeFlush == 0 && block.Flush(device) != nil {
			return
		}
	}
}

// offset is where the scribe's block i lies.
func (w *scribe) offset(i int) int64 { return w.base + int64(i*scribes+w.first)*scribeBlock }

// fill makes p write number n of block i.
func (w *scribe) fill(p []byte, i int, n uint32) {
	for at := 0; at < len(p); at += 8 {
		binary.LittleEndian.PutUint32(p[at:], uint32(i*scribes+w.first))
		binary.LittleEndian.PutUint32(p[at+4:], n)
	}
}

// waitEnough waits until every scribe has written something.
func (s *scribbler) waitEnough() {
	for _, w := range s.workers {
		<-w.enough
	}
}

// waitAny waits until some scribe has written something.
func (s *scribbler) waitAny() { <-s.workers[0].begun }

// check waits until the scribes have ended, and compares the image with their books.
func (s *scribbler) check(image string) {
	t := s.d.t
	t.Helper()
	s.running.Wait()
	held, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	s.checkBytes(held)
}

// checkBytes compares what a device holds with the books of scribes that have ended.
func (s *scribbler) checkBytes(held []byte) {
	t := s.d.t
	t.Helper()
	s.running.Wait()
	writes := 0
	for _, w := range s.workers {
		if w.err != nil {
			t.Error(w.err)
		}
		for i := range w.issued {
			writes += int(w.acked[i])
			if err := w.checkBlock(i, held[w.offset(i):w.offset(i)+scribeBlock]); err != nil {
				t.Error(err)
			}
		}
	}
	t.Logf("%d writes were acknowledged", writes)
}

// checkOlder checks that a device holds what scribes that have ended had written at some moment, each block wholly.
func (s *scribbler) checkOlder(held []byte) {
	t := s.d.t
	t.Helper()
	for _, w := range s.workers {
		older := *w
		older.acked = make([]uint32, len(w.acked))
		for i := range w.issued {
			if err := older.checkBlock(i, held[w.offset(i):w.offset(i)+scribeBlock]); err != nil {
				t.Error(err)
			}
		}
	}
}

// checkBlock checks what the image holds of block i.
func (w *scribe) checkBlock(i int, p []byte) error {
	n := binary.LittleEndian.Uint32(p[4:])
	if n < w.acked[i] || n > w.issued[i] {
		return fmt.Errorf("block %d holds write %d; %d was acknowledged, %d sent", i*scribes+w.first, n, w.acked[i],
			w.issued[i])
	}
	if n == 0 {
		return nil // never written
	}
	want := make([]byte, scribeBlock)
	w.fill(want, i, n)
	if string(want) != string(p) {
		return fmt.Errorf("block %d is torn", i*scribes+w.first)
	}
	return nil
}
