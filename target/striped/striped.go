// Package striped is the device mapper's striped target: chunks of a fixed size that lie on several devices in turn.
//
//	chunk       0    1    2    3    4    5
//	two stripes A0   B0   A1   B1   A2   B2
package striped

import (
	"fmt"
	"math"
	"strings"
	"sync/atomic"
	"syscall"

	"cowherd/block"
	"cowherd/target"
)

// Type is made by
//
//	striped <number of stripes> <sectors of a chunk> [<device> <start sector>]...
func Type() *target.Type {
	return &target.Type{Name: "striped", Version: [3]int{1, 6, 0}, New: parse}
}

// parse makes a target of a line of a table.
func parse(b *target.Build) (target.Target, error) {
	if b.Args.Len() < 2 {
		return nil, target.Errorf("not enough arguments")
	}
	count, err := b.Args.Number(1, math.MaxUint32, "invalid stripe count")
	if err != nil {
		return nil, err
	}
	chunk, err := b.Args.Number(1, math.MaxUint32, "invalid chunk_size")
	if err != nil {
		return nil, err
	}
	width := uint64(b.Length) / count
	switch {
	case uint64(b.Length)%count != 0:
		return nil, target.Errorf("target length not divisible by number of stripes")
	case width%chunk != 0:
		return nil, target.Errorf("target length not divisible by chunk size")
	case uint64(b.Args.Len()) != 2*count:
		return nil, target.Errorf("not enough destinations specified")
	}
	stripes := make([]Stripe, count) // no more than there are arguments
	for i := range stripes {
		if stripes[i], err = parseStripe(b, block.Sector(width), block.Sector(chunk)); err != nil {
			return nil, fmt.Errorf("couldn't parse stripe destination: %w", err)
		}
	}
	return New(stripes, block.Sector(chunk).Bytes(), b.Size()), nil
}

// parseStripe reads one device and start, from which width sectors on are the stripe.
func parseStripe(b *target.Build, width, chunk block.Sector) (Stripe, error) {
	name := b.Args.Next()
	start, err := b.Args.Sector()
	if err != nil {
		return Stripe{}, err
	}
	lower, err := b.Open(name)
	if err != nil {
		return Stripe{}, err
	}
	if chunk.Bytes()%int64(lower.Limits().LogicalBlock) != 0 {
		return Stripe{}, target.Errorf("a chunk of %d sectors is no multiple of the logical block size of %s", chunk, lower.Name)
	}
	return Stripe{Lower: lower, Start: start.Bytes()}, b.Within(lower, start, width)
}

// A Stripe is a range of one device, as long as the target's size divided by the number of stripes.
type Stripe struct {
	target.Lower
	Start int64 // bytes
}

// Target maps chunk i to chunk i/count of stripe i%count. A read or a write that Map sees lies in one chunk (SplitAt);
// a discard or a write of zeroes becomes one request for each stripe, and a flush goes to all of them.
type Target struct {
	stripes []*stripe
	chunk   int64 // bytes
	size    int64
	limits  block.Limits
}

// stripe is a Stripe that counts its failures: it is told of all that goes to its device.
type stripe struct {
	Stripe
	failures atomic.Uint32
}

// Complete ends a request.
func (s *stripe) Complete(r *block.Request, err error) {
	if err != nil && block.Errno(err) != syscall.ENOTSUP {
		s.failures.Add(1)
	}
	r.Complete(err)
}

// New makes a target of size bytes. The caller has checked that size is a multiple of chunk (bytes, at least a logical
// block) for each stripe, and that the ranges lie within their devices. The devices stay the caller's.
func New(stripes []Stripe, chunk, size int64) *Target {
	t := &Target{chunk: chunk, size: size, limits: block.NoLimits()}
	for _, s := range stripes {
		t.stripes = append(t.stripes, &stripe{Stripe: s})
		t.limits = t.limits.Stack(s.Device.Limits())
	}
	t.limits.PreferredIO = max(t.limits.PreferredIO, int(min(chunk*int64(len(stripes)), preferredMax)))
	return t
}

// preferredMax bounds what is told to users as the preferred size of I/O, in bytes.
const preferredMax = 32 << 20

// Size is the length of all stripes together, in bytes.
func (t *Target) Size() int64 { return t.size }

// Limits are those of all devices together.
func (t *Target) Limits() block.Limits { return t.limits }

// SplitAt is the size of a chunk.
func (t *Target) SplitAt() int64 { return t.chunk }

// place tells where the byte at offset lies.
func (t *Target) place(offset int64) (s *stripe, at int64) {
	chunk, within := offset/t.chunk, offset%t.chunk
	count := int64(len(t.stripes))
	s = t.stripes[chunk%count]
	return s, s.Start + chunk/count*t.chunk + within
}

// Map moves a read or a write to its stripe, and takes everything else.
func (t *Target) Map(r *block.Request) block.Device {
	if r.Op == block.OpRead || r.Op == block.OpWrite {
		s, at := t.place(r.Offset)
		r.Offset = at
		r.Push(s)
		return s.Device
	}
	f := block.NewFan(r)
	for i, s := range t.stripes {
		if p := t.part(f, r, i); p != nil {
			p.Push(s)
			s.Device.Submit(p)
		}
	}
	f.Done(nil)
	return nil
}

// part is what stripe i has to do of r, which is no read and no write; nil: nothing.
func (t *Target) part(f *block.Fan, r *block.Request, i int) *block.Request {
	if r.Op == block.OpFlush {
		return f.Part(0, 0)
	}
	start, end := t.within(i, r.Offset), t.within(i, r.End())
	if start == end {
		return nil
	}
	p := f.Part(r.Offset, 0)
	p.Offset, p.Length = t.stripes[i].Start+start, end-start
	return p
}

// within is how many bytes of stripe i lie before offset.
func (t *Target) within(i int, offset int64) int64 {
	chunk := offset / t.chunk
	count := int64(len(t.stripes))
	row, column := chunk/count, int(chunk%count)
	switch {
	case i < column:
		return (row + 1) * t.chunk
	case i > column:
		return row * t.chunk
	}
	return row*t.chunk + offset%t.chunk
}

// Remap is Map for a copy: to the end of the chunk at most.
func (t *Target) Remap(offset, length int64) (to block.Device, at, n int64, ok bool) {
	s, at := t.place(offset)
	return s.Device, at, min(length, t.chunk-offset%t.chunk), true
}

// TableLine is the stripes.
func (t *Target) TableLine() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d %d", len(t.stripes), block.SectorFloor(t.chunk))
	for _, s := range t.stripes {
		fmt.Fprintf(&b, " %s %d", s.Name, block.SectorFloor(s.Start))
	}
	return b.String()
}

// StatusLine is the devices, and for each of them A (alive) or D (dead): a request to it has failed.
func (t *Target) StatusLine() string {
	var b, states strings.Builder
	fmt.Fprintf(&b, "%d ", len(t.stripes))
	for _, s := range t.stripes {
		fmt.Fprintf(&b, "%s ", s.Name)
		if s.failures.Load() > 0 {
			states.WriteByte('D')
		} else {
			states.WriteByte('A')
		}
	}
	return b.String() + "1 " + states.String()
}

// Extents are those of the devices, chunk by chunk.
func (t *Target) Extents(offset, length int64, yield func(block.Extent) bool) error {
	goOn := true
	for end := offset + length; offset < end && goOn; {
		device, at, n, _ := t.Remap(offset, end-offset)
		shift := offset - at
		err := block.ExtentsOf(device, at, n, func(e block.Extent) bool {
			e.Offset += shift
			goOn = yield(e)
			return goOn
		})
		if err != nil {
			return err
		}
		offset += n
	}
	return nil
}
