// Package flakey is the device mapper's flakey target: a linear mapping that behaves for some seconds, then misbehaves
// for some seconds, and so on. What goes wrong meanwhile is the features' matter; without one, all I/O fails.
package flakey

import (
	"math/rand/v2"
	"sync"
	"syscall"
	"time"

	"cowherd/block"
	"cowherd/target"
)

// Probability is what a feature's probability of 1 is written as.
const Probability = 1_000_000_000

// Features say what goes wrong.
type Features struct {
	DropWrites  bool // writes succeed and do nothing
	ErrorWrites bool
	ErrorReads  bool
	// CorruptByte counts from 1: that byte of each request of a kind becomes CorruptValue; 0: none.
	CorruptByte  uint32
	CorruptWrite bool   // the kind is writes, not reads
	CorruptValue byte   //
	CorruptFlags uint32 // that the request must have, as bits of the kernel's bi_opf
	// A byte of a read or a write becomes a random one, with this probability of Probability.
	RandomRead, RandomWrite uint32
}

// Config is what a target is made of.
type Config struct {
	Lower    target.Lower  // stays the caller's
	Start    int64         // of the target in Lower, in bytes; the caller has checked that it lies within
	Size     int64         // bytes
	Up, Down time.Duration // whole seconds
	Features Features
}

// Target maps all of itself to a range of one device, and misbehaves.
type Target struct {
	c      Config
	began  time.Time
	now    func() time.Time
	random func(n uint32) uint32 // from 0 to n-1
}

// New makes a target that begins with its Up interval.
func New(c Config) *Target {
	if f := c.Features; f.CorruptByte == 0 && !f.DropWrites && !f.ErrorReads && !f.ErrorWrites && f.RandomRead == 0 &&
		f.RandomWrite == 0 {
		c.Features.ErrorReads, c.Features.ErrorWrites = true, true
	}
	return &Target{c: c, began: time.Now(), now: time.Now, random: rand.Uint32N}
}

// Size is Config.Size.
func (t *Target) Size() int64 { return t.c.Size }

// Limits are the device's.
func (t *Target) Limits() block.Limits { return t.c.Lower.Limits() }

// isDown tells whether it misbehaves now. The kernel counts whole seconds.
func (t *Target) isDown() bool {
	elapsed := t.now().Sub(t.began).Truncate(time.Second)
	return elapsed%(t.c.Up+t.c.Down) >= t.c.Up
}

// Map moves r to the device, or does it harm.
func (t *Target) Map(r *block.Request) block.Device {
	if !t.isDown() {
		return t.remap(r)
	}
	if r.Op == block.OpRead {
		return t.mapRead(r)
	}
	f := &t.c.Features
	switch {
	case f.DropWrites:
		r.Complete(nil)
		return nil
	case f.ErrorWrites:
		r.Complete(block.NewError(r, syscall.EIO, "a flakey target in its down interval"))
		return nil
	}
	if r.Op == block.OpWrite {
		t.harmWrite(r)
	}
	return t.remap(r)
}

func (t *Target) remap(r *block.Request) block.Device {
	r.Offset += t.c.Start
	return t.c.Lower.Device
}

// mapRead fails a read, or sees to it that it is harmed at its end.
func (t *Target) mapRead(r *block.Request) block.Device {
	f := &t.c.Features
	switch {
	case f.ErrorReads:
		r.Complete(block.NewError(r, syscall.EIO, "a flakey target in its down interval"))
		return nil
	case f.CorruptByte > 0 && !f.CorruptWrite || f.RandomRead > 0:
		r.Push((*reader)(t))
	}
	return t.remap(r)
}

// reader is the target as the Completer of reads in a down interval.
type reader Target

// Complete harms what was read.
func (h *reader) Complete(r *block.Request, err error) {
	t := (*Target)(h)
	f := &t.c.Features
	if err == nil && len(r.Data) > 0 {
		if f.CorruptByte > 0 && !f.CorruptWrite && t.matches(r) {
			corrupt(r.Data, f.CorruptByte-1, f.CorruptValue)
		}
		if t.happens(f.RandomRead) {
			corrupt(r.Data, t.random(uint32(len(r.Data))), byte(t.random(256)))
		}
	}
	r.Complete(err)
}

// harmed is a copy of a write's data, with what belongs to the submitter, who sees nothing of it.
type harmed struct {
	data, own []byte
}

var copies = sync.Pool{New: func() any { return new(harmed) }}

// Complete gives the submitter's data back.
func (h *harmed) Complete(r *block.Request, err error) {
	r.Data, h.own = h.own, nil
	copies.Put(h)
	r.Complete(err)
}

// harmWrite lets r write a copy of its data that differs.
func (t *Target) harmWrite(r *block.Request) {
	f := &t.c.Features
	exact := f.CorruptByte > 0 && f.CorruptWrite && t.matches(r)
	random := t.happens(f.RandomWrite)
	if !exact && !random || len(r.Data) == 0 {
		return
	}
	h := copies.Get().(*harmed)
	h.own = r.Data
	h.data = append(h.data[:0], r.Data...)
	if exact {
		corrupt(h.data, f.CorruptByte-1, f.CorruptValue)
	}
	if random {
		corrupt(h.data, t.random(uint32(len(h.data))), byte(t.random(256)))
	}
	r.Data = h.data
	r.Push(h)
}

// corrupt sets one byte, if there is one.
func corrupt(data []byte, at uint32, value byte) {
	if int64(at) < int64(len(data)) {
		data[at] = value
	}
}

// happens tells whether something of some probability happens now.
func (t *Target) happens(probability uint32) bool {
	return probability > 0 && t.random(Probability) < probability
}

// The kernel's bits of bi_opf that a request here can have: the operation, in the low byte, and FUA.
const (
	opfWrite = 1
	opfFUA   = 1 << 17
)

// matches tells whether r has all flags that it must have.
func (t *Target) matches(r *block.Request) bool {
	var opf uint32
	if r.Op == block.OpWrite {
		opf = opfWrite
	}
	if r.Flags&block.FUA != 0 {
		opf |= opfFUA
	}
	want := t.c.Features.CorruptFlags
	return opf&want == want
}
