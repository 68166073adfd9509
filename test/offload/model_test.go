package offload

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"cowherd/backend/devicetest"
	"cowherd/backend/file"
	"cowherd/block"
	"cowherd/kcopyd"
)

const (
	modelSize    = 8*mib + 3000 // not a whole number of blocks
	modelWorkers = 4
	modelUnit    = 4 * kib
)

// TestModel does random operations on two files, in all combinations of file system and way to open them.
func TestModel(t *testing.T) {
	for _, kind := range fileSystems {
		for _, direct := range []bool{false, true} {
			if direct && kind.mkfs == nil {
				continue
			}
			t.Run(fmt.Sprintf("%s/direct=%v", kind.name, direct), func(t *testing.T) {
				d := mounted(t, kind, diskSize)
				for seed := uint64(1); seed <= *seedCount; seed++ {
					if *oneSeed != 0 {
						seed = *oneSeed
					}
					d.model(t, seed, direct)
					if *oneSeed != 0 || t.Failed() {
						return
					}
				}
			})
		}
	}
}

// model does one seed's operations. Several goroutines work side by side, each on a range of its own of both files.
func (d *disk) model(t *testing.T, seed uint64, direct bool) {
	size := int64(modelSize)
	if direct {
		size &^= modelUnit - 1
	}
	// Copies of a block and more are offloaded where they can be, whatever is faster.
	config := kcopyd.Config{OffloadFloor: modelUnit, OffloadThreshold: modelUnit}
	p := &pair{t: t, direct: direct}
	if seed%2 == 0 {
		p.engine = kcopyd.NewSerialised(config)
	} else {
		p.engine = kcopyd.NewScaled(config)
	}
	defer func() {
		if err := p.engine.Close(); err != nil {
			t.Error(err)
		}
	}()
	for i := range p.files {
		p.files[i] = d.create(fmt.Sprintf("%d-%d", seed, i), size, file.Options{Direct: direct})
		p.models[i] = make([]byte, size)
	}
	var wg sync.WaitGroup
	part := size / modelWorkers &^ (modelUnit - 1)
	for i := range int64(modelWorkers) {
		w := worker{pair: p, start: i * part, end: (i + 1) * part}
		if i == modelWorkers-1 {
			w.end = size
		}
		var key [32]byte
		binary.LittleEndian.PutUint64(key[:], seed)
		key[8] = byte(i)
		w.source = rand.NewChaCha8(key)
		w.random = rand.New(w.source)
		wg.Go(func() {
			for range *stepCount / modelWorkers {
				if err := w.step(); err != nil {
					t.Errorf("%v\ngo test ./test/offload -run '%s' -seed %d", err, t.Name(), seed)
					return
				}
			}
		})
	}
	wg.Wait()
	for i, f := range p.files {
		holds(t, f, 0, p.models[i])
		devicetest.Extents(t, f, 0, size)
	}
	clones := bytesBy(p.engine, "clone")
	t.Logf("seed %d: cloned %d bytes, %d by the engine, which read and wrote %d", seed, p.cloned.Load(), clones, bytesBy(p.engine, "readwrite"))
	if want := d.kind.shares; (clones > 0) != want || (p.cloned.Load() > 0) != want {
		t.Errorf("cloned %d bytes, %d by the engine", p.cloned.Load(), clones)
	}
}

// pair is two files and what they must hold.
type pair struct {
	t      *testing.T
	direct bool
	files  [2]*file.Device
	models [2][]byte
	engine kcopyd.Engine
	cloned atomic.Int64 // bytes, by calls of Copy
}

// worker does random operations on [start, end) of both files.
type worker struct {
	*pair
	start, end int64
	source     *rand.ChaCha8
	random     *rand.Rand // from the same source
}

// span is a random range within the worker's, of bytes by the page cache and of blocks else, or of blocks anyway.
func (w *worker) span(blocks bool) (offset, length int64) {
	unit := int64(1)
	if w.direct || blocks {
		unit = modelUnit
	}
	count := (w.end - w.start) / unit
	first := w.random.Int64N(count)
	length = 1 + w.random.Int64N(count-first)
	if w.random.IntN(2) == 0 { // mostly small ones, as in life
		length = min(length, 1+w.random.Int64N(max(64*kib/unit, 1)))
	}
	offset, length = w.start+first*unit, length*unit
	if w.end-offset-length < modelUnit && w.random.IntN(2) == 0 {
		length = w.end - offset // up to the end, which need not be a block's
	}
	return offset, length
}

// step does one operation.
func (w *worker) step() error {
	which := w.random.IntN(2)
	f, model := w.files[which], w.models[which]
	offset, length := w.span(false)
	part := model[offset : offset+length]
	switch n := w.random.IntN(20); {
	case n < 8:
		return w.copy()
	case n < 13:
		_, _ = w.source.Read(part)
		return block.Write(f, part, offset)
	case n < 15:
		got := make([]byte, length)
		if err := block.Read(f, got, offset); err != nil {
			return err
		}
		if !bytes.Equal(got, part) {
			return fmt.Errorf("read of %d bytes at %d of file %d: not what it should be", length, offset, which)
		}
		return nil
	case n < 17:
		clear(part)
		return block.Do(f, block.OpWriteZeroes, block.Flags(w.random.IntN(2))*block.NoUnmap, offset, length, nil)
	case n < 18:
		if f.Limits().DiscardMax == 0 {
			return nil
		}
		if err := block.Do(f, block.OpDiscard, 0, offset, length, nil); err != nil {
			return err
		}
		return block.Read(f, part, offset) // it may read as anything
	}
	return block.Flush(f)
}

// copy copies from one of the files to one of them: by a clone as far as that goes, or by the engine.
func (w *worker) copy() error {
	to, from := w.random.IntN(2), w.random.IntN(2)
	blocks := w.random.IntN(8) != 0
	source, length := w.span(blocks)
	target, limit := w.span(blocks)
	if w.random.IntN(3) == 0 {
		target = source // which also a tail can be cloned with
	}
	if to == from && target == source {
		return nil
	}
	length = min(length, w.end-target, w.end-source)
	if w.random.IntN(4) == 0 {
		length = min(length, limit)
	}
	if to == from { // ranges that do not overlap
		length = min(length, max(target-source, source-target))
	}
	want := bytes.Clone(w.models[from][source : source+length])
	var err error
	if w.random.IntN(3) == 0 {
		err = w.byCalls(w.files[to], w.files[from], target, source, length)
	} else {
		err = w.byEngine(w.files[to], w.files[from], target, source, length)
	}
	if err != nil {
		return err
	}
	copy(w.models[to][target:], want)
	return nil
}

// byCalls copies by one clone, and the rest by reading and writing.
func (w *worker) byCalls(to, from *file.Device, target, source, length int64) error {
	n, err := to.Copy(block.CopyClone, from, source, target, length)
	if err != nil && !errors.Is(err, syscall.ENOTSUP) {
		return err
	}
	w.cloned.Add(n)
	return readWrite(to, from, target+n, source+n, length-n)
}

// byEngine copies by a job of any kind. One that insists on a clone, and cannot have it, says so.
func (w *worker) byEngine(to, from *file.Device, target, source, length int64) error {
	policy := kcopyd.Offload(w.random.IntN(4))
	err := run(w.engine, policy, to, from, target, source, length)
	if policy >= kcopyd.OffloadOnly && block.Errno(err) == syscall.ENOTSUP {
		return readWrite(to, from, target, source, length) // parts may have been cloned
	}
	return err
}

// run does a job of the engine's.
func run(e kcopyd.Engine, policy kcopyd.Offload, to, from block.Device, target, source, length int64) error {
	done := make(chan error, 1)
	e.Submit(&kcopyd.Job{
		From: kcopyd.Region{Device: from, Offset: source}, To: []kcopyd.Region{{Device: to, Offset: target}}, Length: length,
		Class: kcopyd.Bulk, Offload: policy, Done: func(j *kcopyd.Job) { done <- j.Err() },
	})
	return <-done
}

// bytesBy is how many bytes the engine has copied by a method.
func bytesBy(e kcopyd.Engine, method string) (n uint64) {
	for _, m := range e.Stats().Methods {
		if m.Method == method {
			n += m.Bytes
		}
	}
	return n
}

// readWrite copies a range by reading and writing.
func readWrite(to, from block.Device, target, source, length int64) error {
	p := make([]byte, length)
	if err := block.Read(from, p, source); err != nil {
		return err
	}
	return block.Write(to, p, target)
}
