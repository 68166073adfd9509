package clonemeta

import (
	"errors"
	"fmt"
	"iter"
	"math/bits"
	"syscall"

	"cowherd/block"
	"cowherd/persistentdata"
)

// Choice is what becomes of regions of which it cannot be told whether they are hydrated.
type Choice uint8

const (
	// LostRefuse: nothing is written if there are such regions.
	LostRefuse Choice = iota
	// LostHydrated: they are as the destination has them. Right where the region had been copied or written. Else it shows
	// what happened to be on the destination, and never what the source has.
	LostHydrated
	// LostUnhydrated: they are copied from the source once more. Right where nothing has been written to the region. Else
	// what was written is lost.
	LostUnhydrated
)

// RepairConfig says what a repair may do.
type RepairConfig struct {
	// Lost is what becomes of regions of which it cannot be told.
	Lost Choice
	// Report is called for each finding, as by Check. May be nil.
	Report func(*persistentdata.Finding)
}

// LostError says that a repair was not done for want of a Choice. Its errno is EUCLEAN.
type LostError struct{ Regions uint64 }

func (e *LostError) Error() string {
	return fmt.Sprintf("of %d regions it cannot be told whether they are hydrated: someone has to choose", e.Regions)
}

// Unwrap gives the errno.
func (e *LostError) Unwrap() error { return syscall.EUCLEAN }

// PlanRepair looks at the metadata on d as Check does, and tells whether Repair can be done: nil, a *LostError, a
// *SuperblockError, ErrUnformatted or an error of reading. Nothing is written.
func PlanRepair(d block.Device, c RepairConfig) (*Survey, error) {
	s, err := survey(d, c.Report, visitor{})
	switch {
	case err != nil:
		return s, err
	case !s.Readable:
		_, err := ReadSuperblock(d)
		return s, fmt.Errorf("%w: nothing that it leads to can be found", err)
	case s.Lost > 0 && c.Lost == LostRefuse:
		return s, &LostError{Regions: s.Lost}
	}
	return s, nil
}

// RepairSize is how many bytes Repair needs for its result, if it is to be no smaller than d, from which s was made.
func RepairSize(d block.Device, s *Survey) int64 {
	return max(Size(s.Superblock.Params), min(d.Size()/persistentdata.BlockSize, persistentdata.BlocksMax)*persistentdata.BlockSize)
}

// Repair writes fresh metadata to the device to, with every bit that can be read of the metadata on from, for which
// PlanRepair has given s and no error, and returns when it is durable. Tree and space map are made anew, so that nothing is
// damaged, leaked or too often counted afterwards; bits that belong to no region are dropped. from is not written, and is
// not to.
//
// A bit must not be made up. One that is lost and taken for zero has the region copied from the source again, over what was
// written to it since; one taken for one leaves a region that was never copied as it happens to be. So what cannot be
// read is decided by who knows the clone: see Choice. What is damaged in the superblock cannot be repaired at all: it
// alone says where the bitset is, and an older bitset, if one were found, would be one with bits lost.
func Repair(to, from block.Device, s *Survey, c RepairConfig) error {
	blocks := func(yield func([]uint64, error) bool) {
		v := visitor{words: func(_ uint64, words []uint64) error {
			if !yield(words, nil) {
				return errStopped
			}
			return nil
		}}
		v.lost = func(first, count uint64) error { return yieldLost(first, count, s.Superblock.Params, c.Lost, yield) }
		if _, err := survey(from, nil, v); err != nil && err != errStopped {
			yield(nil, err)
		}
	}
	next, stop := iter.Pull2(blocks)
	defer stop()
	m, err := format(to, s.Superblock.Params, persistentdata.Options{}, func(first uint64, words []uint64) error {
		got, err, ok := next()
		switch {
		case err != nil:
			return err
		case !ok || len(got) != len(words):
			return fmt.Errorf("words from %d on were not found again: has the metadata changed meanwhile?", first)
		}
		copy(words, got)
		return nil
	})
	if err != nil {
		return err
	}
	return m.Close()
}

var errStopped = errors.New("stopped")

// yieldLost gives words that are lost, in the pieces of array blocks.
func yieldLost(first, count uint64, p Params, choice Choice, yield func([]uint64, error) bool) error {
	if choice == LostRefuse {
		return &LostError{Regions: count * 64}
	}
	words := make([]uint64, persistentdata.ArrayWords)
	for count > 0 {
		n := min(count, persistentdata.ArrayWords)
		for i := range words {
			words[i] = 0
			if choice == LostHydrated {
				words[i] = ^uint64(0)
			}
		}
		if first += n; first == p.words() {
			words[n-1] &= p.tailMask()
		}
		if !yield(words[:n], nil) {
			return errStopped
		}
		count -= n
	}
	return nil
}

// Run is regions that follow one another and are all hydrated, or all lost: of these it cannot be told.
type Run struct {
	First, Count uint64
	Lost         bool
}

// Runs calls yield for each run of regions that are hydrated or lost in the metadata on d, in order, until it gives an error,
// which is returned. It reads what can be read of damaged metadata.
func Runs(d block.Device, yield func(Run) error) (*Survey, error) {
	var run Run
	put := func(first, count uint64, lost bool) error {
		if run.Count > 0 && run.First+run.Count == first && run.Lost == lost {
			run.Count += count
			return nil
		}
		last := run
		run = Run{first, count, lost}
		if last.Count == 0 {
			return nil
		}
		return yield(last)
	}
	var regions uint64
	v := visitor{
		words: func(first uint64, words []uint64) error {
			for i, word := range words {
				if err := runsOf(word, (first+uint64(i))*64, put); err != nil {
					return err
				}
			}
			return nil
		},
	}
	if s, err := ReadSuperblock(d); err == nil {
		regions = s.Regions()
	}
	v.lost = func(first, count uint64) error {
		return put(first*64, min((first+count)*64, regions)-first*64, true)
	}
	s, err := survey(d, nil, v)
	if err == nil && run.Count > 0 {
		err = yield(run)
	}
	return s, err
}

// runsOf calls put for each run of bits that are set in word, whose first bit has number at.
func runsOf(word, at uint64, put func(first, count uint64, lost bool) error) error {
	for word != 0 {
		skip := uint64(bits.TrailingZeros64(word))
		word >>= skip
		n := uint64(bits.TrailingZeros64(^word))
		if err := put(at+skip, n, false); err != nil {
			return err
		}
		at += skip + n
		word >>= n
	}
	return nil
}
