package flakey

import (
	"fmt"
	"math"
	"strings"
	"time"

	"cowherd/block"
	"cowherd/target"
)

// Type is made by
//
//	flakey <device> <start sector> <up interval> <down interval> [<number of words> <feature>...]
//
// with the intervals in seconds and the features
//
//	error_reads   error_writes   drop_writes
//	corrupt_bio_byte <byte> <r|w> <value> <flags>
//	random_read_corrupt <probability>   random_write_corrupt <probability>
func Type() *target.Type {
	return &target.Type{Name: "flakey", Version: [3]int{1, 5, 0}, New: parse}
}

// parse makes a target of a line of a table.
func parse(b *target.Build) (target.Target, error) {
	if b.Args.Len() < 4 {
		return nil, target.Errorf("invalid argument count")
	}
	name := b.Args.Next()
	start, err := b.Args.Sector()
	if err != nil {
		return nil, err
	}
	up, err := b.Args.Number(0, math.MaxUint32, "invalid up interval")
	if err != nil {
		return nil, err
	}
	down, err := b.Args.Number(0, math.MaxUint32, "invalid up interval") // the kernel's word for both
	switch {
	case err != nil:
		return nil, err
	case uint32(up+down) == 0:
		return nil, target.Errorf("total (up + down) interval is zero")
	case up+down > math.MaxUint32:
		return nil, target.Errorf("interval overflow")
	}
	c := Config{
		Start: start.Bytes(), Size: b.Size(), Up: time.Duration(up) * time.Second, Down: time.Duration(down) * time.Second,
	}
	if err := parseFeatures(&b.Args, &c.Features); err != nil {
		return nil, err
	}
	lower, err := b.Open(name)
	if err != nil {
		return nil, err
	}
	c.Lower = lower
	if err := b.Within(lower, start, b.Length); err != nil {
		return nil, err
	}
	return New(c), nil
}

// featureWordsMax is the most words that features have.
const featureWordsMax = 11

// parseFeatures reads the features, if there are any.
func parseFeatures(a *target.Args, f *Features) error {
	if a.Len() == 0 {
		return nil
	}
	words, err := a.Group(featureWordsMax, "invalid number of feature args")
	if err != nil {
		return err
	}
	for words.Len() > 0 {
		if err := parseFeature(&words, f); err != nil {
			return err
		}
	}
	switch {
	case f.CorruptByte > 0 && f.CorruptWrite && f.DropWrites:
		return target.Errorf("drop_writes is incompatible with corrupt_bio_byte with the WRITE flag set")
	case f.CorruptByte > 0 && f.CorruptWrite && f.ErrorWrites:
		return target.Errorf("error_writes is incompatible with corrupt_bio_byte with the WRITE flag set")
	}
	return nil
}

// parseFeature reads one feature with its words.
func parseFeature(words *target.Args, f *Features) (err error) {
	name := words.Next()
	duplicated := func(set bool) error {
		if set {
			return target.Errorf("feature %s duplicated", name)
		}
		return nil
	}
	switch strings.ToLower(name) {
	case "drop_writes":
		if err = duplicated(f.DropWrites); err == nil && f.ErrorWrites {
			err = target.Errorf("feature drop_writes conflicts with feature error_writes")
		}
		f.DropWrites = true
	case "error_writes":
		if err = duplicated(f.ErrorWrites); err == nil && f.DropWrites {
			err = target.Errorf("feature error_writes conflicts with feature drop_writes")
		}
		f.ErrorWrites = true
	case "error_reads":
		err = duplicated(f.ErrorReads)
		f.ErrorReads = true
	case "corrupt_bio_byte":
		if words.Len() == 0 {
			return target.Errorf("feature corrupt_bio_byte requires parameters")
		}
		err = parseCorrupt(words, f)
	case "random_read_corrupt":
		f.RandomRead, err = parseProbability(words, name)
	case "random_write_corrupt":
		f.RandomWrite, err = parseProbability(words, name)
	default:
		err = target.Errorf("unrecognised flakey feature requested")
	}
	return err
}

// parseCorrupt reads <byte> <r|w> <value> <flags>.
func parseCorrupt(words *target.Args, f *Features) error {
	at, err := words.Number(1, math.MaxUint32, "invalid corrupt bio byte")
	if err != nil {
		return err
	}
	switch strings.ToLower(words.Next()) {
	case "w":
		f.CorruptWrite = true
	case "r":
		f.CorruptWrite = false
	default:
		return target.Errorf("invalid corrupt bio direction (r or w)")
	}
	value, err := words.Number(0, 255, "invalid corrupt value to write into bio byte (0-255)")
	if err != nil {
		return err
	}
	flags, err := words.Number(0, math.MaxUint32, "invalid corrupt bio flags mask")
	f.CorruptByte, f.CorruptValue, f.CorruptFlags = uint32(at), byte(value), uint32(flags)
	return err
}

// parseProbability reads <probability>.
func parseProbability(words *target.Args, name string) (uint32, error) {
	if words.Len() == 0 {
		return 0, target.Errorf("feature %s requires a parameter", name)
	}
	n, err := words.Number(0, Probability, "invalid random corrupt argument")
	return uint32(n), err
}

// TableLine is the device, the intervals and the features that are on.
func (t *Target) TableLine() string {
	f := &t.c.Features
	var words []string
	for _, x := range []struct {
		on   bool
		text string
	}{
		{f.ErrorReads, "error_reads"},
		{f.DropWrites, "drop_writes"},
		{f.ErrorWrites, "error_writes"},
		{f.CorruptByte > 0, fmt.Sprintf("corrupt_bio_byte %d %c %d %d", f.CorruptByte, direction(f.CorruptWrite),
			f.CorruptValue, f.CorruptFlags)},
		{f.RandomRead > 0, fmt.Sprintf("random_read_corrupt %d", f.RandomRead)},
		{f.RandomWrite > 0, fmt.Sprintf("random_write_corrupt %d", f.RandomWrite)},
	} {
		if x.on {
			words = append(words, strings.Fields(x.text)...)
		}
	}
	line := fmt.Sprintf("%s %d %d %d %d", t.c.Lower.Name, block.SectorFloor(t.c.Start), t.c.Up/time.Second,
		t.c.Down/time.Second, len(words))
	return strings.Join(append([]string{line}, words...), " ")
}

// StatusLine is empty.
func (t *Target) StatusLine() string { return "" }

func direction(write bool) byte {
	if write {
		return 'w'
	}
	return 'r'
}
