package clonemeta

import (
	"fmt"
	"math/bits"

	"cowherd/block"
	"cowherd/persistentdata"
)

// Survey is what a pass over metadata finds.
type Survey struct {
	Superblock Superblock
	Hydrated   uint64 // regions that are, as far as that can be told
	Lost       uint64 // regions of which it cannot be told
	Reached    uint64 // blocks in use
	Leaked     uint64 // blocks counted as in use that nothing refers to

	Violations, Remarks int
	// Readable tells whether the superblock can be gone by; if not, nothing else was looked at.
	Readable bool
}

// CheckConfig is what Check can be told.
type CheckConfig struct {
	// Report is called for each finding. May be nil.
	Report func(*persistentdata.Finding)
}

// Check looks at all of the metadata on d, reports every rule of the format that it breaks, and writes nothing. It goes on
// behind what is damaged. A violation means that the metadata is refused, or is not what it seems; a remark that something is
// unusual. The error is ErrUnformatted, or one of reading block 0; other blocks that cannot be read are findings.
func Check(d block.Device, c CheckConfig) (*Survey, error) {
	return survey(d, c.Report, visitor{})
}

// visitor is told what the bitset holds.
type visitor struct {
	words func(first uint64, words []uint64) error // without bits behind the end; valid during the call
	lost  func(first, count uint64) error          // words that cannot be told
}

// survey is Check, with a visitor whose errors end it.
func survey(d block.Device, report func(*persistentdata.Finding), v visitor) (*Survey, error) {
	s := &Survey{}
	put := func(f *persistentdata.Finding) {
		if f.Violation {
			s.Violations++
		} else {
			s.Remarks++
		}
		if report != nil {
			report(f)
		}
	}
	p, err := readBlock0(d)
	if err != nil {
		return s, err
	}
	s.Readable = true
	s.Superblock = checkSuper(p, func(rule persistentdata.Rule, violation, fatal bool, what string) {
		s.Readable = s.Readable && !fatal
		put(&persistentdata.Finding{Rule: rule, Violation: violation, Block: 0, Count: 1, What: "block 0 (clone superblock): " + what})
	})
	if !s.Readable {
		return s, nil
	}
	b := &bitsChecker{s: s, params: s.Superblock.Params, put: put, visitor: v}
	k := persistentdata.NewChecker(d, s.Superblock.SpaceMap, put)
	k.SpaceMap()
	if err := k.Array(s.Superblock.Bitset, b.params.words(), b.visit, b.lost); err != nil {
		return s, err
	}
	k.Finish()
	s.Reached, s.Leaked = k.Reached, k.Leaked
	return s, nil
}

// bitsChecker checks the words of the bitset.
type bitsChecker struct {
	s      *Survey
	params Params
	put    func(*persistentdata.Finding)
	visitor
}

func (b *bitsChecker) visit(n, first uint64, words []uint64) error {
	if last := b.params.words() - 1; last-first < uint64(len(words)) {
		word := &words[last-first]
		if *word&^b.params.tailMask() != 0 {
			b.put(&persistentdata.Finding{Rule: RuleBehindEnd, Violation: true, Block: n, Count: 1, What: fmt.Sprintf(
				"block %d (array block): a bit behind region %d, the last, is set", n, b.params.Regions()-1)})
		}
		*word &= b.params.tailMask()
	}
	for _, word := range words {
		b.s.Hydrated += uint64(bits.OnesCount64(word))
	}
	if b.words == nil {
		return nil
	}
	return b.words(first, words)
}

func (b *bitsChecker) lost(first, count uint64) error {
	start, end := first*64, min((first+count)*64, b.params.Regions())
	b.s.Lost += end - start
	b.put(&persistentdata.Finding{Rule: RuleLost, Violation: true, What: fmt.Sprintf(
		"regions %d to %d: whether they are hydrated cannot be told, because their array blocks cannot be read", start, end-1)})
	if b.visitor.lost == nil {
		return nil
	}
	return b.visitor.lost(first, count)
}
