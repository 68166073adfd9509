package target

import (
	"context"
	"fmt"
	"strings"
	"syscall"

	"cowherd/block"
)

// Type is a kind of target.
type Type struct {
	Name    string
	Version [3]int // of the kernel's target that it does as
	// New makes a target of what a line of a table says. Its errors are the kernel's, in its words but for capitals,
	// and have an errno.
	New func(b *Build) (Target, error)
}

// Host is what a mapped device does for the targets of its table.
type Host interface {
	// Open opens the device that an argument names. It is the host's to close, after the target.
	Open(name string, write bool) (Lower, error)
	// Event tells those who wait for one that something has happened in the target. It never blocks.
	Event()
	// Hold keeps new requests from the device's live table and waits until none is in flight, until as many calls of
	// Unhold. It may be called while the device is suspended, but not by one of its requests. After an error nothing is
	// held.
	Hold(ctx context.Context) error
	Unhold()
}

// Lower is a device that a target lies on. Two Lowers of one device have the same Device, so that it tells them apart.
type Lower struct {
	block.Device
	// Name is what stands for it in a table. It may change: a device can be renamed.
	Name fmt.Stringer
}

// Name is a name that does not change.
type Name string

// String is the name.
func (n Name) String() string { return string(n) }

// Build is one line of a table, of which a target is to be made.
type Build struct {
	Start, Length block.Sector // of the target in its device
	Args          Args
	ReadOnly      bool // the table is loaded read-only
	Host          Host
}

// Size is the target's size in bytes.
func (b *Build) Size() int64 { return b.Length.Bytes() }

// Open opens the device of an argument, for writing unless the table is read-only.
func (b *Build) Open(name string) (Lower, error) { return b.OpenAs(name, "device") }

// OpenAs is Open for a device that errors call by what it is for.
func (b *Build) OpenAs(name, what string) (Lower, error) {
	l, err := b.Host.Open(name, !b.ReadOnly)
	if err != nil {
		return l, fmt.Errorf("%s lookup failed: %w", what, err)
	}
	return l, nil
}

// Within checks that length sectors from start on lie within a device and are whole logical blocks of it.
func (b *Build) Within(l Lower, start, length block.Sector) error {
	size := block.SectorFloor(l.Size())
	if start >= size || length > size-start {
		return fmt.Errorf("%s too small for target: start=%d, len=%d, dev_size=%d: %w", l.Name, start, length, size,
			syscall.EINVAL)
	}
	if block := max(1, block.SectorFloor(int64(l.Limits().LogicalBlock))); (start|length)%block != 0 {
		return fmt.Errorf("start=%d and len=%d are not aligned to the logical block size of %s, %d sectors: %w", start,
			length, l.Name, block, syscall.EINVAL)
	}
	return nil
}

// Errorf is an EINVAL in words.
func Errorf(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), syscall.EINVAL)
}

// Args are the words behind the type of a line of a table, read in order.
type Args struct{ words []string }

// NewArgs splits the rest of a line, as the kernel does: at white space, and with a backslash that takes the meaning
// from what follows it.
func NewArgs(line string) Args {
	var words []string
	for line = strings.TrimLeft(line, space); line != ""; line = strings.TrimLeft(line, space) {
		var word strings.Builder
		for line != "" && !strings.ContainsRune(space, rune(line[0])) {
			if line[0] == '\\' && len(line) > 1 {
				line = line[1:]
			}
			word.WriteByte(line[0])
			line = line[1:]
		}
		words = append(words, word.String())
	}
	return Args{words}
}

// space is what separates words.
const space = " \t\n\v\f\r"

// Len is how many words are left.
func (a *Args) Len() int { return len(a.words) }

// Next is the next word; "" when none is left.
func (a *Args) Next() string {
	if len(a.words) == 0 {
		return ""
	}
	word := a.words[0]
	a.words = a.words[1:]
	return word
}

// Number is the next word as a decimal number from least to most. The error is what, as EINVAL, and says what is wrong with
// the word.
func (a *Args) Number(least, most uint64, what string) (uint64, error) {
	word := a.Next()
	n, fits, ok := number(word)
	switch {
	case !ok:
		return 0, Errorf("%s: %.40q is no number", what, word)
	case !fits || n > most:
		return 0, Errorf("%s: %.40s is more than %d", what, word, most)
	case n < least:
		return 0, Errorf("%s: %d is less than %d", what, n, least)
	}
	return n, nil
}

// Sector is the next word as a sector.
func (a *Args) Sector() (block.Sector, error) {
	const sectorMax = 1<<63/block.SectorSize - 1
	n, err := a.Number(0, sectorMax, "invalid device sector")
	return block.Sector(n), err
}

// Group reads a number from 0 to most and cuts the reader to as many words, which must be there.
func (a *Args) Group(most uint64, what string) (Args, error) {
	n, err := a.Number(0, most, what)
	if err != nil {
		return Args{}, err
	}
	if n > uint64(len(a.words)) {
		return Args{}, Errorf("%s", what)
	}
	group := Args{a.words[:n]}
	a.words = a.words[n:]
	return group, nil
}

// number reads decimal digits and nothing else. A number that does not fit is refused; the kernel cuts it to what does.
func number(s string) (n uint64, fits, ok bool) {
	fits = true
	for _, c := range []byte(s) {
		d := uint64(c - '0')
		if c < '0' || c > '9' {
			return 0, false, false
		}
		fits = fits && n <= (1<<64-1-d)/10
		n = n*10 + d
	}
	return n, fits, s != ""
}
