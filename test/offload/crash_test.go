package offload

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"cowherd/backend/file"
	"cowherd/block"
	"cowherd/internal/invariant"
	"cowherd/kcopyd"
)

const (
	crashWriters  = 2
	crashRegions  = 64        // of a writer's file
	crashRegion   = 64 * kib  // bytes
	crashVersions = 200       // that there are of a region, 0 being zeroes
	crashMoments  = 6         // at which the disk is looked at
	crashBlock    = 4 * kib   // each has its version in it
	crashImage    = 512 * mib // the disk, which is a file on another file system
)

// TestCrash: at any moment, what had been cloned or written and then flushed is on the disk, and whatever a block of the
// destination holds was meant for it at some time since.
//
// The disk is a file on an XFS, which clones it in an instant: that is the disk as a crash would have left it, and after
// the recovery of its log it is compared with the books. What the disk's own cache might lose is not played.
func TestCrash(t *testing.T) {
	for _, kind := range sharing {
		t.Run(kind.name, func(t *testing.T) {
			below := mounted(t, xfs, 4*gib)
			d := mountedOver(t, kind, crashImage, below.dir)
			source := d.create("source", crashVersions*crashRegion, file.Options{})
			if err := writeVersions(source); err != nil {
				t.Fatal(err)
			}
			engine := kcopyd.NewScaled(kcopyd.Config{})
			defer func() {
				if err := engine.Close(); err != nil {
					t.Error(err)
				}
			}()
			stop := make(chan struct{})
			var writers [crashWriters]*crashWriter
			var running sync.WaitGroup
			for i := range writers {
				w := &crashWriter{
					name: fmt.Sprint(i), source: source, engine: engine, random: rand.New(rand.NewPCG(uint64(i), 1)),
					flushed: make(chan struct{}),
				}
				w.file = d.create(w.name, crashRegions*crashRegion, file.Options{Direct: i%2 == 1})
				if err := block.Flush(w.file); err != nil {
					t.Fatal(err)
				}
				writers[i] = w
				running.Go(func() {
					defer close(w.flushed)
					if err := w.run(stop); err != nil {
						t.Error(err)
					}
				})
			}
			var moments []*moment
			for i := range momentCount() {
				for range 1 + i*3 {
					for _, w := range writers {
						<-w.flushed
					}
				}
				moments = append(moments, d.moment(below.dir, writers[:]))
			}
			close(stop)
			for _, w := range writers {
				for range w.flushed { // until it ends
				}
			}
			running.Wait()
			for _, m := range moments {
				if !t.Failed() {
					m.check(t, kind)
				}
			}
		})
	}
}

// momentCount is less under the race detector.
func momentCount() int {
	if invariant.Enabled {
		return crashMoments / 2
	}
	return crashMoments
}

// writeVersions writes all versions of a region to the source, one after the other: block b of version v has both
// numbers in it.
func writeVersions(source *file.Device) error {
	p := make([]byte, crashRegion)
	for v := uint32(1); v < crashVersions; v++ {
		for at := 0; at < len(p); at += 8 {
			binary.LittleEndian.PutUint32(p[at:], v)
			binary.LittleEndian.PutUint32(p[at+4:], uint32(at/crashBlock))
		}
		if err := block.Write(source, p, int64(v)*crashRegion); err != nil {
			return err
		}
	}
	return block.Flush(source)
}

// crashWriter gives the regions of its file ever higher versions, and keeps books.
type crashWriter struct {
	name    string
	source  *file.Device
	file    *file.Device
	engine  kcopyd.Engine
	random  *rand.Rand
	flushed chan struct{} // a message for each flush, closed at the end

	mu     sync.Mutex
	issued [crashRegions]uint32 // +checklocks:mu
	acked  [crashRegions]uint32 // +checklocks:mu
}

// run works until it is told to stop or a version is the last.
func (w *crashWriter) run(stop <-chan struct{}) error {
	for {
		for range 1 + w.random.IntN(12) {
			if err := w.step(); err != nil {
				return err
			}
		}
		w.mu.Lock()
		durable := w.issued
		w.mu.Unlock()
		if err := block.Flush(w.file); err != nil {
			return err
		}
		w.mu.Lock()
		w.acked = durable
		w.mu.Unlock()
		select {
		case <-stop:
			return nil
		case w.flushed <- struct{}{}:
		}
	}
}

// step gives a region its next version: by a clone, by the engine's, or by reading and writing.
func (w *crashWriter) step() error {
	i := w.random.IntN(crashRegions)
	w.mu.Lock()
	if w.issued[i] < crashVersions-1 {
		w.issued[i]++
	}
	version := w.issued[i]
	w.mu.Unlock()
	from, to := int64(version)*crashRegion, int64(i)*crashRegion
	switch w.random.IntN(4) {
	case 0:
		return readWrite(w.file, w.source, to, from, crashRegion)
	case 1:
		return run(w.engine, kcopyd.CloneOnly, w.file, w.source, to, from, crashRegion)
	}
	n, err := w.file.Copy(block.CopyClone, w.source, from, to, crashRegion)
	if err == nil && n != crashRegion {
		err = fmt.Errorf("clone of version %d to region %d: %d bytes", version, i, n)
	}
	return err
}

// books are a writer's at some time.
func (w *crashWriter) books() (issued, acked [crashRegions]uint32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.issued, w.acked
}

// moment is a disk as a crash would have left it, and what was certain and what was possible then, by writer.
type moment struct {
	image  *os.File
	acked  map[string][crashRegions]uint32
	issued map[string][crashRegions]uint32
}

// moment takes the disk as it is now; its copy is a file in dir.
func (d *disk) moment(dir string, writers []*crashWriter) *moment {
	d.t.Helper()
	m := &moment{
		image: image(d.t, dir, 0),
		acked: map[string][crashRegions]uint32{}, issued: map[string][crashRegions]uint32{},
	}
	for _, w := range writers {
		_, m.acked[w.name] = w.books()
	}
	if err := unix.IoctlFileClone(int(m.image.Fd()), int(d.image.Fd())); err != nil {
		d.t.Fatal(err)
	}
	for _, w := range writers {
		m.issued[w.name], _ = w.books()
	}
	return m
}

// check looks at what a mount of the disk finds.
func (m *moment) check(t *testing.T, kind fileSystem) {
	t.Helper()
	d := remounted(t, kind, m.image)
	defer d.unmount()
	certain := 0
	for name, acked := range m.acked {
		data, err := os.ReadFile(filepath.Join(d.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		for i := range crashRegions {
			certain += int(acked[i])
			if err := checkRegion(data[i*crashRegion:][:crashRegion], acked[i], m.issued[name][i]); err != nil {
				t.Errorf("file %s, region %d: %v", name, i, err)
			}
		}
	}
	t.Logf("%d versions were certain", certain)
}

// checkRegion checks that each block has a version from acked to issued.
func checkRegion(p []byte, acked, issued uint32) error {
	var all error
	for b := uint32(0); len(p) > 0; b++ {
		version := binary.LittleEndian.Uint32(p)
		if version < acked || version > issued {
			all = errors.Join(all, fmt.Errorf("block %d has version %d, not %d to %d", b, version, acked, issued))
		}
		number := b
		if version == 0 {
			number = 0
		}
		for at := 0; at < crashBlock; at += 8 {
			if binary.LittleEndian.Uint32(p[at:]) != version || binary.LittleEndian.Uint32(p[at+4:]) != number {
				return errors.Join(all, fmt.Errorf("block %d is of no version", b))
			}
		}
		p = p[crashBlock:]
	}
	return all
}
