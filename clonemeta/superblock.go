package clonemeta

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"cowherd/block"
	"cowherd/persistentdata"
)

// The superblock, block 0; all numbers are little-endian, and what is not shown is zero.
//
//	0      4       8       16     32      40        44                 172           180           188
//	+------+-------+-------+------+-------+---------+------------------+-------------+-------------+-------------+
//	| csum | flags | block | uuid | magic | version | space map root   | region size | target size | bitset root |
//	| u32  | u32   | u64   | 16   | u64   | u32     | 128, 32 in use   | u64 sectors | u64 sectors | u64 block   |
//	+------+-------+-------+------+-------+---------+------------------+-------------+-------------+-------------+
const (
	magic   = 0x8af27f64
	version = 1

	atFlags      = 4
	atMagic      = 32
	atVersion    = 40
	atSpaceMap   = 44
	atRegionSize = 172
	atTargetSize = 180
	atBitset     = 188
	superblock   = 196 // bytes in use
)

var kind = &persistentdata.Kind{Name: "clone superblock", XOR: 257649492, BlockAt: 8}

var le = binary.LittleEndian

// Sizes of regions that there may be, in sectors, and how many regions.
const (
	RegionSizeMin block.Sector = 8
	RegionSizeMax block.Sector = 2097152
	RegionsMax    uint64       = 1 << 32
)

// ErrUnformatted is the error of a device whose block 0 is all zero: it holds no metadata, and may be formatted.
var ErrUnformatted = errors.New("there is no clone metadata: block 0 of the device is zero")

// Rules of the superblock and the bitset, beside those of persistentdata.
const (
	RuleMagic      persistentdata.Rule = "magic"
	RuleVersion    persistentdata.Rule = "version"
	RuleFlags      persistentdata.Rule = "flags"
	RuleRegionSize persistentdata.Rule = "region-size"
	RuleTargetSize persistentdata.Rule = "target-size"
	RuleSuperTail  persistentdata.Rule = "superblock-tail"
	RuleLost       persistentdata.Rule = "lost"
	RuleBehindEnd  persistentdata.Rule = "bit-behind-end"
)

// Params describe a clone.
type Params struct {
	RegionSize block.Sector // a power of two from RegionSizeMin to RegionSizeMax
	TargetSize block.Sector // the clone's length; at least 1
}

// Regions is the number of regions; the last may be shorter than the others.
func (p Params) Regions() uint64 {
	if p.RegionSize == 0 {
		return 0
	}
	n := uint64(p.TargetSize / p.RegionSize)
	if p.TargetSize%p.RegionSize != 0 {
		n++
	}
	return n
}

// words is the number of words of the bitset.
func (p Params) words() uint64 { return (p.Regions() + 63) / 64 }

// check tells which rule the parameters break, and how.
func (p Params) check() (rule persistentdata.Rule, what string) {
	switch {
	case p.RegionSize < RegionSizeMin || p.RegionSize > RegionSizeMax:
		return RuleRegionSize, fmt.Sprintf("region size of %d sectors, want %d to %d", p.RegionSize, RegionSizeMin, RegionSizeMax)
	case p.RegionSize&(p.RegionSize-1) != 0:
		return RuleRegionSize, fmt.Sprintf("region size of %d sectors is not a power of 2", p.RegionSize)
	case p.TargetSize == 0:
		return RuleTargetSize, "target size is 0"
	case p.Regions() > RegionsMax:
		return RuleTargetSize, fmt.Sprintf("%d regions of %d sectors for %d sectors, at most %d: increase the region size",
			p.Regions(), p.RegionSize, p.TargetSize, RegionsMax)
	}
	return "", ""
}

// agree tells whether what is given, where it is not 0, is what the superblock says.
func (p Params) agree(given Params) error {
	switch {
	case given.RegionSize != 0 && given.RegionSize != p.RegionSize:
		return fmt.Errorf("region size of %d sectors, and the metadata was made for %d: %w", given.RegionSize, p.RegionSize, syscall.EINVAL)
	case given.TargetSize != 0 && given.TargetSize != p.TargetSize:
		return fmt.Errorf("target size of %d sectors, and the metadata was made for %d: %w", given.TargetSize, p.TargetSize, syscall.EINVAL)
	}
	return nil
}

// Superblock is what block 0 says.
type Superblock struct {
	Params
	Flags    uint32
	Version  uint32
	SpaceMap persistentdata.Root
	Bitset   uint64 // the block that the bitset's tree begins with
}

// put writes the superblock to p, which is zero, but for what sealing adds.
func (s *Superblock) put(p []byte) {
	le.PutUint32(p[atFlags:], s.Flags)
	le.PutUint64(p[atMagic:], magic)
	le.PutUint32(p[atVersion:], s.Version)
	s.SpaceMap.Put(p[atSpaceMap:])
	le.PutUint64(p[atRegionSize:], uint64(s.RegionSize))
	le.PutUint64(p[atTargetSize:], uint64(s.TargetSize))
	le.PutUint64(p[atBitset:], s.Bitset)
}

// parse reads a superblock. Nothing is checked.
func parse(p []byte) (s Superblock) {
	s.Flags, s.Version = le.Uint32(p[atFlags:]), le.Uint32(p[atVersion:])
	s.SpaceMap = persistentdata.ParseRoot(p[atSpaceMap:])
	s.RegionSize, s.TargetSize = block.Sector(le.Uint64(p[atRegionSize:])), block.Sector(le.Uint64(p[atTargetSize:]))
	s.Bitset = le.Uint64(p[atBitset:])
	return s
}

// readBlock0 reads block 0, whatever it holds. ErrUnformatted: it is all zero. EINVAL: the device has no such block.
func readBlock0(d block.Device) ([]byte, error) {
	if d.Size() < persistentdata.BlockSize || d.Limits().LogicalBlock > persistentdata.BlockSize {
		return nil, fmt.Errorf("a metadata device of %d bytes with logical blocks of %d: there is no block 0 of %d bytes: %w",
			d.Size(), d.Limits().LogicalBlock, persistentdata.BlockSize, syscall.EINVAL)
	}
	p := make([]byte, persistentdata.BlockSize)
	if err := block.Read(d, p, 0); err != nil {
		return nil, fmt.Errorf("read the superblock: %w", err)
	}
	if isZero(p) {
		return p, ErrUnformatted
	}
	return p, nil
}

func isZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// checkSuper calls report for each rule that the superblock in p breaks. fatal: what it says cannot be gone by.
func checkSuper(p []byte, report func(rule persistentdata.Rule, violation, fatal bool, what string)) Superblock {
	s := parse(p)
	if got := le.Uint64(p[atMagic:]); got != magic {
		report(RuleMagic, true, true, fmt.Sprintf("magic is %#x, want %#x", got, magic))
		return s // it is something else
	}
	if s.Version != version {
		report(RuleVersion, true, true, fmt.Sprintf("version is %d, want %d", s.Version, version))
		return s
	}
	if err := kind.Verify(p, 0); err != nil {
		e, _ := errors.AsType[*persistentdata.CorruptError](err)
		report(e.Rule, true, true, fmt.Sprintf("%s is %#x, want %#x", e.What, e.Found, e.Expected))
	}
	if s.Flags != 0 {
		report(RuleFlags, false, false, fmt.Sprintf("flags are %#x: none is known", s.Flags))
	}
	if rule, what := s.Params.check(); what != "" {
		report(rule, true, true, what)
	}
	if !isZero(p[superblock:]) {
		report(RuleSuperTail, false, false, "what lies behind its last field is not zero")
	}
	return s
}

// SuperblockError says that block 0 is no superblock that can be gone by. Its errno is EUCLEAN.
type SuperblockError struct {
	Rule persistentdata.Rule
	What string // with what was expected and found
}

// Error tells what is wrong.
func (e *SuperblockError) Error() string { return "block 0 (clone superblock): " + e.What }

// Unwrap gives the errno.
func (e *SuperblockError) Unwrap() error { return syscall.EUCLEAN }

// ReadSuperblock reads and checks the superblock on d. ErrUnformatted: block 0 is all zero. *SuperblockError: it is not
// one, or damaged, or of another version.
func ReadSuperblock(d block.Device) (Superblock, error) {
	p, err := readBlock0(d)
	if err != nil {
		return Superblock{}, err
	}
	s := checkSuper(p, func(rule persistentdata.Rule, _, fatal bool, what string) {
		if fatal && err == nil {
			err = &SuperblockError{Rule: rule, What: what}
		}
	})
	return s, err
}
