package metamorphic

import (
	"bytes"
	"fmt"
	"slices"

	"cowherd/block"
)

// contents are a device's bytes, as the model knows them.
type contents struct {
	data    []byte
	unknown []bool // by byte: what a discard has left there
}

// model is the origin and its snapshots, by their numbers.
type model map[int]*contents

func newModel(size int64) model {
	return model{0: {data: make([]byte, size), unknown: make([]bool, size)}}
}

// apply does an operation that changes something.
func (m model) apply(o op) {
	switch o.kind {
	case opTake:
		m[o.on] = &contents{data: slices.Clone(m[0].data), unknown: slices.Clone(m[0].unknown)}
	case opDrop:
		delete(m, o.on)
	case block.OpWrite, block.OpWriteZeroes:
		c, end := m[o.on], o.offset+o.length
		if o.kind == block.OpWrite {
			fill(c.data[o.offset:end], o.stamp)
		} else {
			clear(c.data[o.offset:end])
		}
		clear(c.unknown[o.offset:end])
	case block.OpDiscard:
		if o.on == 0 && len(m) > 1 {
			return // an origin with snapshots drops discards
		}
		unknown := m[o.on].unknown[o.offset : o.offset+o.length]
		for i := range unknown {
			unknown[i] = true
		}
	}
}

// check compares what o has read with what it must have read.
func (m model) check(o op, got []byte) error {
	c, end := m[o.on], o.offset+o.length
	if want := c.data[o.offset:end]; !bytes.Equal(got, want) {
		for i, unknown := range c.unknown[o.offset:end] {
			if !unknown && got[i] != want[i] {
				return fmt.Errorf("byte %d of device %d is %#x instead of %#x", o.offset+int64(i), o.on, got[i], want[i])
			}
		}
	}
	return nil
}

// checkExtents checks that the extents of o's range cover it, and that what they say is zero is.
func (m model) checkExtents(o op, extents []block.Extent) error {
	c, at := m[o.on], o.offset
	for _, e := range extents {
		if e.Offset != at || e.Length <= 0 || e.Offset+e.Length > o.offset+o.length {
			return fmt.Errorf("extent %+v where one at %d is wanted, up to %d", e, at, o.offset+o.length)
		}
		at += e.Length
		if !e.Zero {
			continue
		}
		for i := e.Offset; i < at; i++ {
			if c.data[i] != 0 && !c.unknown[i] {
				return fmt.Errorf("byte %d of device %d is %#x, not zero as %+v says", i, o.on, c.data[i], e)
			}
		}
	}
	if at != o.offset+o.length {
		return fmt.Errorf("the extents end at %d instead of %d", at, o.offset+o.length)
	}
	return nil
}
