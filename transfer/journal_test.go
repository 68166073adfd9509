package transfer

import (
	"bytes"
	"errors"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	"cowherd/block"
)

// volatile is a device that has what was written since the last flush in a cache, and loses it when the power fails. All
// of it is its own: what block.Do keeps for reuse must not come from, or get to, another bubble of synctest.
type volatile struct {
	block.Device // tells its size
	flushesLeft  int
	forgets      bool // +checklocksignore: never changed; a flush that fails loses the cache, and later ones succeed, like fsync

	mu      sync.Mutex
	durable []byte
	cached  []byte
}

func (v *volatile) Submit(r *block.Request) {
	v.mu.Lock()
	var err error
	switch r.Op {
	case block.OpWrite:
		copy(v.cached[r.Offset:], r.Data)
	case block.OpFlush:
		if v.flushesLeft--; v.flushesLeft < 0 {
			err = block.NewError(r, syscall.EIO, "the power has failed")
			if v.forgets {
				copy(v.cached, v.durable)
				v.flushesLeft = 100
			}
		} else {
			copy(v.durable, v.cached)
		}
	}
	v.mu.Unlock()
	r.Complete(err)
}

// TestJournalAfterPowerCut: whichever flush the power fails at, what the journal says is durable is, and a copy that is
// gone on with from there is whole.
func TestJournalAfterPowerCut(t *testing.T) {
	const size = 33 << 20
	content := make([]byte, size)
	for i := range content {
		content[i] = byte(i>>12) | 1
	}
	source := newDevice(t, "mem", size, &image{content: content})
	durable, cached := make([]byte, size), make([]byte, size)
	for flushes := range 2 {
		clear(durable)
		clear(cached)
		v := &volatile{Device: source, flushesLeft: flushes, durable: durable, cached: cached}
		path := filepath.Join(t.TempDir(), "journal")
		synctest.Test(t, func(t *testing.T) {
			j, err := CreateJournal(path, Identity{Size: size}, Identity{Size: size}, false)
			if err != nil {
				t.Fatal(err)
			}
			defer j.Close()
			_, err = Run(t.Context(), Options{Source: source, Destination: v, Journal: j, Zeroed: true, Rate: 20 << 20, Queues: 3})
			if !errors.Is(err, syscall.EIO) {
				t.Fatalf("%d flushes: got %v", flushes, err)
			}
			if !bytes.Equal(v.durable[:j.Done()], content[:j.Done()]) {
				t.Errorf("%d flushes: what the journal says is done is not", flushes)
			}
			if want := int64(flushes) * 16 << 20; j.Done() != want {
				t.Errorf("%d flushes: %d bytes are done, want %d", flushes, j.Done(), want)
			}
			copy(v.cached, v.durable) // the power comes back
			v.flushesLeft = 100
			if _, err := Run(t.Context(), Options{Source: source, Destination: v, Journal: j, Start: j.Done()}); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(v.durable, content) || j.Done() != size {
				t.Errorf("%d flushes: what was gone on with is not whole", flushes)
			}
		})
	}
}

// TestJournalAfterFailedFlush: a flush that succeeds after one that has failed says nothing about what the first was to
// make durable. Servers that pass fsync on behave so.
func TestJournalAfterFailedFlush(t *testing.T) {
	const size = 49 << 20
	content := bytes.Repeat([]byte{7}, size)
	source := newDevice(t, "mem", size, &image{content: content})
	v := &volatile{Device: source, flushesLeft: 1, forgets: true, durable: make([]byte, size), cached: make([]byte, size)}
	path := filepath.Join(t.TempDir(), "journal")
	synctest.Test(t, func(t *testing.T) {
		j, err := CreateJournal(path, Identity{Size: size}, Identity{Size: size}, false)
		if err != nil {
			t.Fatal(err)
		}
		defer j.Close()
		_, err = Run(t.Context(), Options{Source: source, Destination: v, Journal: j, Zeroed: true, Rate: 16 << 20, Queues: 2})
		if !errors.Is(err, syscall.EIO) {
			t.Fatalf("got %v", err)
		}
		if j.Done() != 16<<20 || !bytes.Equal(v.durable[:j.Done()], content[:j.Done()]) {
			t.Errorf("the journal says that %d bytes are durable, and they are not", j.Done())
		}
	})
}
