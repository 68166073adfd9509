package dm

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"syscall"

	"cowherd/block"
)

// Line is a line of a table: which sectors, and what they are.
type Line struct {
	Start, Length block.Sector
	Type          string
	Args          string // what follows the type, as it was written
}

// String is the line as "dmsetup table" writes it: with a space behind the type whether arguments follow or not.
func (l Line) String() string { return fmt.Sprintf("%d %d %s %s", l.Start, l.Length, l.Type, l.Args) }

// Bounds of a table.
const (
	tableBytesMax = 1 << 20
	linesMax      = 1 << 14
	sectorMax     = math.MaxInt64 / block.SectorSize
)

// space is what separates words.
const space = " \t\v\f\r"

// Parse reads a table, a line for each target:
//
//	<first sector> <number of sectors> <type> [<argument>...]
//
// Empty lines are passed over, and so is what follows a # at the beginning of a line or of an argument. Errors say which line is wrong, counted from 1, and are EINVAL.
// What the types and arguments mean is not looked at.
func Parse(table string) ([]Line, error) {
	if len(table) > tableBytesMax {
		return nil, fmt.Errorf("a table of %d bytes: %d at most are read: %w", len(table), tableBytesMax, syscall.EINVAL)
	}
	var lines []Line
	number := 0
	for text := range strings.Lines(table) {
		number++
		text = strings.Trim(text, space+"\n")
		if text == "" || text[0] == '#' {
			continue
		}
		l, err := parseLine(text)
		if err != nil {
			return nil, fmt.Errorf("invalid format on line %d of table: %.80q: %w: %w", number, text, err, syscall.EINVAL)
		}
		if len(lines) == linesMax {
			return nil, fmt.Errorf("more than %d targets: %w", linesMax, syscall.EINVAL)
		}
		lines = append(lines, l)
	}
	return lines, nil
}

// errFormat is what is wrong with a line in which nothing else is.
var errFormat = errors.New("a start, a length and a type are wanted")

// parseLine reads a line without space around it.
func parseLine(text string) (l Line, err error) {
	start, text := cutWord(text)
	length, text := cutWord(text)
	if l.Type, l.Args = cutWord(text); l.Type == "" {
		return l, errFormat
	}
	l.Args = cutComment(l.Args)
	if l.Start, err = parseSector(start); err != nil {
		return l, err
	}
	l.Length, err = parseSector(length)
	return l, err
}

// cutComment cuts off what follows a # at the beginning of a word. dmsetup cuts at any; but names of devices may have one.
func cutComment(args string) string {
	for at := range len(args) {
		if args[at] == '#' && (at == 0 || strings.IndexByte(space, args[at-1]) >= 0) {
			return strings.TrimRight(args[:at], space)
		}
	}
	return args
}

// cutWord cuts the first word off.
func cutWord(text string) (word, rest string) {
	end := strings.IndexAny(text, space)
	if end < 0 {
		return text, ""
	}
	return text[:end], strings.TrimLeft(text[end:], space)
}

// parseSector reads a sector whose bytes can be counted.
func parseSector(word string) (block.Sector, error) {
	n, err := strconv.ParseUint(word, 10, 64)
	switch {
	case errors.Is(err, strconv.ErrRange) || n > sectorMax:
		return 0, fmt.Errorf("%.40s is too large: a device has %d sectors at most", word, uint64(sectorMax))
	case err != nil:
		return 0, errFormat
	}
	return block.Sector(n), nil
}
