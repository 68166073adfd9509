package persistentdata

import (
	"cmp"
	"fmt"
	"slices"

	"cowherd/block"
)

// CacheBlocks is how many blocks a Manager keeps in memory when it is not told otherwise: 8 MiB.
const CacheBlocks = 2048

// runBlocks is how many neighbouring blocks are read or written at once: 1 MiB.
const runBlocks = 256

// frame is a block in memory. Its owner is the cache; who holds a pointer to one uses it within one operation.
type frame struct {
	n     uint64
	kind  *Kind
	dirty bool // is not on disk as it is here
	used  uint64
	data  [BlockSize]byte
}

// cache keeps blocks in memory, those that are not on disk yet too. It grows while an operation runs, by the few blocks
// that it needs, and is cut down to its limit before the next one (trim), so that no frame goes while somebody has it.
type cache struct {
	device block.Device
	limit  int
	frames map[uint64]*frame
	dirty  []*frame // those that are, each at least once, and others
	spare  []*frame
	clock  uint64
	run    []byte // what is read and written goes through here; made when needed
}

func newCache(d block.Device, limit int) *cache {
	return &cache{device: d, limit: max(limit, 16), frames: make(map[uint64]*frame)}
}

// change says that f is not on disk as it is in memory.
func (c *cache) change(f *frame) {
	if !f.dirty {
		f.dirty = true
		c.dirty = append(c.dirty, f)
	}
}

// look is the frame of a block that is in memory, or nil.
func (c *cache) look(n uint64) *frame {
	f := c.frames[n]
	if f != nil {
		c.clock++
		f.used = c.clock
	}
	return f
}

// add is a new frame for block n, in place of one that there may be. Its content is undefined.
func (c *cache) add(n uint64, kind *Kind) *frame {
	f := c.frames[n]
	if f == nil {
		if last := len(c.spare) - 1; last >= 0 {
			f, c.spare = c.spare[last], c.spare[:last]
		} else {
			f = new(frame)
		}
		c.frames[n] = f
	}
	c.clock++
	f.n, f.kind, f.used, f.dirty = n, kind, c.clock, false
	return f
}

// read is block n, read unless it is in memory, verified in either case to be of this kind.
func (c *cache) read(n uint64, kind *Kind, check func(n uint64, p []byte) error) (*frame, error) {
	if f := c.look(n); f != nil {
		if f.kind != kind {
			return nil, &CorruptError{Block: n, Kind: kind.Name, Rule: RuleReachedTwice, What: "the number of kinds that it is referred to as",
				Expected: 1, Found: 2}
		}
		return f, nil
	}
	f := c.add(n, kind)
	err := readBlock(c.device, f.data[:], n, kind)
	if err == nil && check != nil {
		err = check(n, f.data[:])
	}
	if err != nil {
		c.drop(n)
		return nil, err
	}
	return f, nil
}

// readBlock reads block n to p and verifies it.
func readBlock(d block.Device, p []byte, n uint64, kind *Kind) error {
	if err := checkRange(d, n, kind); err != nil {
		return err
	}
	if err := block.Read(d, p, int64(n)*BlockSize); err != nil {
		return fmt.Errorf("read block %d (%s): %w", n, kind.Name, err)
	}
	return kind.Verify(p, n)
}

// checkRange tells whether block n lies on the device.
func checkRange(d block.Device, n uint64, kind *Kind) error {
	if blocks := uint64(d.Size() / BlockSize); n >= blocks {
		return &CorruptError{Block: n, Kind: kind.Name, Rule: RuleBlockRange, What: "the number of blocks of the device", Want: atLeast,
			Expected: n + 1, Found: blocks}
	}
	return nil
}

// drop forgets a block, whether it is on disk or not.
func (c *cache) drop(n uint64) {
	if f := c.frames[n]; f != nil {
		delete(c.frames, n)
		f.kind, f.dirty = nil, false
		if len(c.spare) < c.limit {
			c.spare = append(c.spare, f)
		}
	}
}

// trim makes room when there are more blocks than there may be: everything is written, and the half that was used least
// recently is forgotten.
func (c *cache) trim() error {
	if len(c.frames) <= c.limit {
		return nil
	}
	if err := c.writeDirty(); err != nil {
		return err
	}
	frames := make([]*frame, 0, len(c.frames))
	for _, f := range c.frames {
		frames = append(frames, f)
	}
	slices.SortFunc(frames, func(a, b *frame) int { return cmp.Compare(a.used, b.used) })
	for _, f := range frames[:len(frames)-c.limit/2] {
		c.drop(f.n)
	}
	return nil
}

// writeDirty seals and writes all that is not on disk, in ascending order, neighbours together.
func (c *cache) writeDirty() error {
	dirty := slices.DeleteFunc(c.dirty, func(f *frame) bool { return !f.dirty })
	slices.SortFunc(dirty, func(a, b *frame) int { return cmp.Compare(a.n, b.n) })
	dirty = slices.Compact(dirty)
	c.dirty = dirty
	for len(dirty) > 0 {
		n := 1
		for n < len(dirty) && n < runBlocks && dirty[n].n == dirty[0].n+uint64(n) {
			n++
		}
		if err := c.writeRun(dirty[:n]); err != nil {
			return err // what was written is not dirty any more, and the rest still listed
		}
		dirty = dirty[n:]
	}
	c.dirty = c.dirty[:0]
	return nil
}

// writeRun writes blocks that are neighbours.
func (c *cache) writeRun(run []*frame) error {
	p := c.buffer(len(run))
	for i, f := range run {
		f.kind.Seal(f.data[:], f.n)
		copy(p[i*BlockSize:], f.data[:])
	}
	if err := block.Write(c.device, p, int64(run[0].n)*BlockSize); err != nil {
		return fmt.Errorf("write %d blocks at block %d: %w", len(run), run[0].n, err)
	}
	for _, f := range run {
		f.dirty = false
	}
	return nil
}

// buffer is the memory that n blocks, at most a run of them, go through. Who reads to it uses it before anything is written.
func (c *cache) buffer(n int) []byte {
	if need := n * BlockSize; len(c.run) < need {
		c.run = make([]byte, min(max(need, 2*len(c.run)), runBlocks*BlockSize))
	}
	return c.run[:n*BlockSize]
}
