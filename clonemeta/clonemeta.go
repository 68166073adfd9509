package clonemeta

import (
	"errors"
	"fmt"
	"iter"
	"syscall"

	"cowherd/block"
	"cowherd/persistentdata"
)

// Metadata is a clone's metadata on a device. See the package comment.
type Metadata struct {
	device  block.Device
	params  Params
	manager *persistentdata.Manager
	bitset  *persistentdata.Array
	// The first error of SetWords or Commit since the last Abort; nothing but Abort and Close is done then.
	broken error
	// unsure: a superblock was written that may not have become durable.
	unsure bool
	closed bool
	stats  *usage

	options persistentdata.Options
}

// Format writes fresh metadata for a clone whose regions are all unhydrated, whatever d held before, and returns when it is
// durable. Until then a crash leaves an unformatted device. EINVAL: the parameters, or the device's logical block, are
// out of range. ENOSPC: the device is too small; Size tells what is needed. Device errors are wrapped.
func Format(d block.Device, p Params) (*Metadata, error) {
	return format(d, p, persistentdata.Options{}, nil)
}

// format is Format with words of the bitset that fill gives, as persistentdata.NewArray asks for them.
func format(d block.Device, p Params, o persistentdata.Options, fill func(first uint64, words []uint64) error) (*Metadata, error) {
	if _, what := p.check(); what != "" {
		return nil, fmt.Errorf("%s: %w", what, syscall.EINVAL)
	}
	m := &Metadata{device: d, params: p, stats: new(usage), options: o}
	var err error
	if m.manager, err = persistentdata.Create(d, o); err != nil {
		return nil, err
	}
	// NewArray writes blocks that an old superblock may reach.
	if err := erase(d); err != nil {
		return nil, err
	}
	if m.bitset, err = persistentdata.NewArray(m.manager, p.words(), fill); err != nil {
		return nil, err
	}
	if err := m.Commit(); err != nil {
		return nil, err
	}
	return m, nil
}

// erase makes d unformatted, durably.
func erase(d block.Device) error {
	p, err := readBlock0(d)
	if errors.Is(err, ErrUnformatted) {
		return nil
	}
	if err != nil {
		return err
	}
	clear(p)
	if err := persistentdata.WriteSuperblock(d, p); err != nil {
		return fmt.Errorf("erase the superblock: %w", err)
	}
	return nil
}

// Open opens the metadata on d. Values of p that are not 0 must be those that it was formatted with (EINVAL).
// ErrUnformatted: block 0 is all zero. *SuperblockError, *persistentdata.CorruptError: it is damaged, and where. It
// reads the space map and the nodes of the bitset's tree, and no array block: LoadBits does.
func Open(d block.Device, p Params) (*Metadata, error) {
	return open(d, p, persistentdata.Options{})
}

// open is Open with options.
func open(d block.Device, p Params, o persistentdata.Options) (*Metadata, error) {
	m := &Metadata{device: d, stats: new(usage), options: o}
	if err := m.load(p); err != nil {
		return nil, err
	}
	return m, nil
}

// load opens what the superblock says.
func (m *Metadata) load(given Params) error {
	s, err := ReadSuperblock(m.device)
	if err != nil {
		return err
	}
	if err := s.Params.agree(given); err != nil {
		return err
	}
	m.params = s.Params
	if m.manager, err = persistentdata.Open(m.device, s.SpaceMap, m.options); err != nil {
		return err
	}
	if m.bitset, err = persistentdata.OpenArray(m.manager, s.Bitset, s.words()); err != nil {
		return err
	}
	err = m.bitset.Blocks(func(n uint64) error {
		count, err := m.manager.RefCount(n)
		if err == nil && count == 0 {
			err = &persistentdata.CorruptError{Block: n, Kind: "of the bitset", Rule: persistentdata.RuleInUse,
				What: "the reference count of a block in use", Expected: 1, Found: 0}
		}
		return err
	})
	if err != nil {
		return err
	}
	m.stats.set(m.manager)
	return nil
}

// RegionSize is the size of a region.
func (m *Metadata) RegionSize() block.Sector { return m.params.RegionSize }

// TargetSize is the length of the clone.
func (m *Metadata) TargetSize() block.Sector { return m.params.TargetSize }

// Regions is the number of regions; the last may be shorter than the others.
func (m *Metadata) Regions() uint64 { return m.params.Regions() }

// Usage is how many blocks of 4 KiB the last commit has in use, of how many, as the status line prints them. It may be
// called at any time.
func (m *Metadata) Usage() (used, total uint64) { return m.stats.get() }

// LoadBits calls yield for all words of the bitset, in order, until it returns false: bit r%64 of word r/64 says that
// region r is hydrated, and bits that belong to no region are zero. words is valid during the call, in which m must not be
// used. It shows what SetWords has staged. It streams: memory does not depend on the number of regions. An error says
// that what follows cannot be read or believed.
func (m *Metadata) LoadBits(yield func(firstWord uint64, words []uint64) bool) error {
	if err := m.usable(); err != nil {
		return err
	}
	last := m.params.words() - 1
	err := m.bitset.Each(func(first uint64, words []uint64) bool {
		if last-first < uint64(len(words)) {
			words[last-first] &= m.params.tailMask()
		}
		return yield(first, words)
	})
	if err != nil {
		return fmt.Errorf("read the bitset: %w", err)
	}
	return nil
}

// tailMask has the bits of the last word that belong to regions.
func (p Params) tailMask() uint64 {
	return ^uint64(0) >> (63 - (p.Regions()-1)%64)
}

// SetWords stages new values of words, given with their numbers: nothing is durable before Commit. Ascending order is
// cheapest: 509 words are in one block, and each block is copied once in a transaction. A word that has its value
// already costs nothing. Bits that belong to no region must be zero (EINVAL). ENOSPC: the metadata device has no free
// block. After an error only Abort and Close can be called.
func (m *Metadata) SetWords(words iter.Seq2[uint64, uint64]) error {
	if err := m.usable(); err != nil {
		return err
	}
	last := m.params.words() - 1
	for i, word := range words {
		var err error
		if i > last || i == last && word&^m.params.tailMask() != 0 {
			err = fmt.Errorf("a bit in word %d belongs to no region, of which there are %d: %w", i, m.Regions(), syscall.EINVAL)
		} else {
			err = m.bitset.Set(i, word)
		}
		if err != nil {
			m.broken = err
			return fmt.Errorf("change the bitset: %w", err)
		}
	}
	return nil
}

// Commit makes what was staged durable: blocks, flush; superblock, flush. If nothing has changed it does nothing. ENOSPC:
// the metadata device has no free block. After an error the last commit is as it was, or, if the superblock was
// already being written, this one may have happened; only Abort and Close can be called then.
func (m *Metadata) Commit() error {
	if err := m.usable(); err != nil {
		return err
	}
	err := m.manager.Commit(persistentdata.Superblock{Kind: kind, Fill: func(p []byte, space persistentdata.Root) {
		s := Superblock{Params: m.params, Version: version, SpaceMap: space, Bitset: m.bitset.Root()}
		s.put(p)
	}})
	if err != nil {
		m.broken = err
		_, m.unsure = errors.AsType[*persistentdata.SuperblockError](err)
		return fmt.Errorf("commit the clone's metadata: %w", err)
	}
	m.stats.set(m.manager)
	return nil
}

// Abort gives up what was staged, and goes back to what the superblock on disk says, which is read anew. If the last
// commit failed while it wrote the superblock, that may be this commit's; it is written once more and flushed, so that
// what the next commit overwrites is surely of no use to anyone. After an error m stays unusable; Abort may be called
// again.
func (m *Metadata) Abort() error {
	if m.closed {
		return errClosed()
	}
	err := m.abort()
	m.broken = err
	if err != nil {
		return fmt.Errorf("go back to the last commit of the clone's metadata: %w", err)
	}
	return nil
}

func (m *Metadata) abort() error {
	if m.unsure {
		p, err := readBlock0(m.device)
		if err != nil {
			return err
		}
		if _, err := ReadSuperblock(m.device); err != nil {
			return err
		}
		if err := persistentdata.WriteSuperblock(m.device, p); err != nil {
			return err
		}
		m.unsure = false
	}
	return m.load(m.params)
}

func errClosed() error { return fmt.Errorf("the clone's metadata is closed: %w", syscall.EINVAL) }

// usable tells whether more than Abort and Close can be done.
func (m *Metadata) usable() error {
	if m.closed {
		return errClosed()
	}
	if m.broken != nil {
		return fmt.Errorf("the clone's metadata has failed before: %w", m.broken)
	}
	return nil
}

// Close lets go of the memory. It does not commit what was staged. The device stays the caller's.
func (m *Metadata) Close() error {
	m.closed = true
	m.manager, m.bitset = nil, nil
	return nil
}
