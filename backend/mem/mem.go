// Package mem is a device in memory: sparse, as large as one likes, costing only what has been written. It serves as
// a volatile disk, as COW space of a transient snapshot and as the fast device of benchmarks and tests.
//
// The bytes lie in an internal/sparse.Store. Every request is completed before Submit returns, on the caller's
// goroutine, and nothing is shared between requests but the pages that they name. The package has no locks of its own.
package mem

import (
	"fmt"
	"syscall"

	"cowherd/block"
	"cowherd/internal/invariant"
	"cowherd/internal/sparse"
)

// logicalBlock is that of most disks: what is built upon a mem device meets the alignment it will meet there.
const logicalBlock = 512

// Config describes a device.
type Config struct {
	// Size is the device's length in bytes, a multiple of 512.
	Size int64
	// Limit bounds the memory in bytes that the data may take, in steps of 64 KiB; writes that need more fail with
	// ENOSPC. 0: no limit.
	Limit int64
}

// A Device keeps its bytes in memory. It starts as zeroes. Discarded pages of 64 KiB are given back, and a discarded
// range reads as zeroes.
type Device struct {
	store  *sparse.Store
	limits block.Limits
}

var (
	_ block.Device       = (*Device)(nil)
	_ block.ExtentLister = (*Device)(nil)
	_ block.Lender       = (*Device)(nil)
	_ block.Immediate    = (*Device)(nil)
)

// New makes a device. It fails with EINVAL when the size or the limit is negative or the size is not a multiple of 512.
func New(c Config) (*Device, error) {
	if c.Size < 0 || c.Size%logicalBlock != 0 {
		return nil, fmt.Errorf("memory device: size %d is not a multiple of %d: %w", c.Size, logicalBlock, syscall.EINVAL)
	}
	if c.Limit < 0 {
		return nil, fmt.Errorf("memory device: limit %d is negative: %w", c.Limit, syscall.EINVAL)
	}
	limits := block.NoLimits()
	limits.LogicalBlock = logicalBlock
	limits.DiscardGranularity = sparse.PageSize
	return &Device{store: sparse.New(c.Size, c.Limit), limits: limits}, nil
}

// Size is the device's length in bytes.
func (d *Device) Size() int64 { return d.store.Size() }

// Limits say that the device takes everything in units of 512 bytes.
func (d *Device) Limits() block.Limits { return d.limits }

// Allocated is the memory in bytes that the data takes, a multiple of 64 KiB.
func (d *Device) Allocated() int64 { return d.store.Allocated() }

// Submit does r and completes it before it returns.
func (d *Device) Submit(r *block.Request) { r.Complete(d.Perform(r)) }

// IsImmediate is true.
func (d *Device) IsImmediate() bool { return true }

// Perform does r.
func (d *Device) Perform(r *block.Request) error {
	if invariant.Enabled {
		err := block.CheckRange(r, d.Size(), d.limits)
		invariant.Check(err == nil, "memory device: %v", err)
	}
	if err := d.do(r); err != nil {
		return block.WrapError(r, err)
	}
	return nil
}

// do does r. A flush has nothing to do, and no operation here is slow enough to heed Fast.
func (d *Device) do(r *block.Request) error {
	switch r.Op {
	case block.OpRead:
		d.store.Read(r.Data, r.Offset)
	case block.OpWrite:
		return d.store.Write(r.Data, r.Offset)
	case block.OpWriteZeroes:
		if r.Flags&block.NoUnmap != 0 {
			return d.store.Zero(r.Offset, r.Length)
		}
		d.store.Discard(r.Offset, r.Length)
	case block.OpDiscard:
		d.store.Discard(r.Offset, r.Length)
	}
	return nil
}

// Lend shows bytes where they lie, up to the next multiple of 64 KiB. See block.Lender.
func (d *Device) Lend(offset, length int64) []byte {
	if offset < 0 || length <= 0 || offset > d.Size()-length {
		return nil
	}
	return d.store.Lend(offset, length)
}

// Extents tells which ranges have memory, in steps of 64 KiB; the others are holes and read as zeroes.
func (d *Device) Extents(offset, length int64, yield func(block.Extent) bool) error {
	d.store.Extents(offset, length, func(offset, length int64, hole bool) bool {
		return yield(block.Extent{Offset: offset, Length: length, Hole: hole, Zero: hole})
	})
	return nil
}

// Close gives the memory back. No request may be in flight or follow.
func (d *Device) Close() error {
	d.store.Discard(0, d.store.Size())
	return nil
}
