// Package size reads and writes sizes in bytes: what people type on a command line or in a configuration file, and
// what they are shown. Reading is exact: a size that is not a whole number of bytes is refused, never rounded.
//
//	4096        bytes, also 4096B
//	512s        sectors of 512 bytes
//	4k 64KiB    powers of 1024: k, M, G, T, P, E, alone or followed by iB, in upper or lower case
//	1.5G        a fraction is fine where the result is a whole number of bytes
//
// The decimal spellings (kB, MB and so on) are refused: to one half of their readers they mean 1024, to the other 1000.
package size

import (
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
)

// sectorSize is the size of a sector in bytes.
const sectorSize = 512

// units are the letters of the powers of 1024, from the first.
const units = "KMGTPE"

// fractionMax is the most digits behind a decimal point that Parse reads: 1 EiB has 60 factors of two, so that no
// fraction with more digits than that is a whole number of bytes.
const fractionMax = 60

// Parse reads a size in bytes. The error names what is wrong with s.
func Parse(s string) (int64, error) {
	n, err := parse(s)
	if err != nil {
		return 0, fmt.Errorf("size %q %w", s, err)
	}
	return n, nil
}

// parse is Parse without the name of what it reads.
func parse(s string) (int64, error) {
	digits := strings.IndexFunc(s, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
	if digits < 0 {
		digits = len(s)
	}
	number, suffix := s[:digits], s[digits:]
	if number == "" {
		return 0, fmt.Errorf("does not start with a digit")
	}
	unit, err := unitOf(suffix)
	if err != nil {
		return 0, err
	}
	whole, fraction, hasFraction := strings.Cut(number, ".")
	if hasFraction && (fraction == "" || whole == "" || strings.Contains(fraction, ".")) {
		return 0, fmt.Errorf("is not a number")
	}
	if hasFraction && unit <= sectorSize {
		return 0, fmt.Errorf("is not a whole number of bytes or sectors")
	}
	n, err := strconv.ParseUint(whole, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("is too large")
	}
	part, err := fractionOf(fraction, unit)
	if err != nil {
		return 0, err
	}
	high, low := bits.Mul64(n, uint64(unit))
	if high != 0 || low > math.MaxInt64-uint64(part) {
		return 0, fmt.Errorf("is too large")
	}
	return int64(low) + part, nil
}

// unitOf is the number of bytes that a suffix stands for.
func unitOf(suffix string) (int64, error) {
	switch suffix {
	case "", "B":
		return 1, nil
	case "s":
		return sectorSize, nil
	}
	letter := strings.IndexByte(units, upper(suffix[0]))
	if rest := suffix[1:]; letter >= 0 && (rest == "" || strings.EqualFold(rest, "ib")) {
		return 1 << (10 * (letter + 1)), nil
	} else if letter >= 0 && strings.EqualFold(rest, "b") {
		return 0, fmt.Errorf("has a unit with two meanings: write %ciB for powers of 1024", upper(suffix[0]))
	}
	return 0, fmt.Errorf("has an unknown unit %q: s (sectors), k, M, G, T, P or E are known", suffix)
}

func upper(c byte) byte {
	if c >= 'a' && c <= 'z' {
		return c - 'a' + 'A'
	}
	return c
}

// fractionOf is the number of bytes that the digits behind a decimal point stand for. It halves the unit and doubles
// the digits in decimal, so that nothing is ever rounded.
func fractionOf(digits string, unit int64) (int64, error) {
	digits = strings.TrimRight(digits, "0")
	if len(digits) > fractionMax {
		return 0, fmt.Errorf("is not a whole number of bytes")
	}
	fraction := []byte(digits)
	var n int64
	for unit /= 2; unit > 0; unit /= 2 {
		if double(fraction) {
			n += unit
		}
	}
	for _, d := range fraction {
		if d != '0' {
			return 0, fmt.Errorf("is not a whole number of bytes")
		}
	}
	return n, nil
}

// double doubles a decimal fraction in place and tells whether it came to 1 or more; what is above 1 is dropped.
func double(fraction []byte) (carry bool) {
	for i := len(fraction) - 1; i >= 0; i-- {
		d := 2 * (fraction[i] - '0')
		if carry {
			d++
		}
		carry = d >= 10
		fraction[i] = '0' + d%10
	}
	return carry
}

// Exact writes n in the largest unit of which it is a whole number, so that Parse gives n again: 4KiB, 1000, 256MiB.
func Exact(n int64) string {
	unit := 0
	for unit < len(units) && n != 0 && n%1024 == 0 {
		n /= 1024
		unit++
	}
	if unit == 0 {
		return strconv.FormatInt(n, 10)
	}
	return strconv.FormatInt(n, 10) + units[unit-1:unit] + "iB"
}

// Human writes n for people, rounded to four digits or so: 4 KiB, 1.5 GiB, 999 B.
func Human(n int64) string {
	if n > -1024 && n < 1024 {
		return strconv.FormatInt(n, 10) + " B"
	}
	value, unit := float64(n)/1024, 0
	for math.Abs(value) >= 1023.95 && unit+1 < len(units) {
		value /= 1024
		unit++
	}
	number := strings.TrimSuffix(strconv.FormatFloat(value, 'f', 1, 64), ".0")
	return number + " " + units[unit:unit+1] + "iB"
}

// Size is a number of bytes that flags and configuration files spell as Parse reads it.
type Size int64

// UnmarshalText reads a size.
func (s *Size) UnmarshalText(text []byte) error {
	n, err := Parse(string(text))
	if err != nil {
		return err
	}
	*s = Size(n)
	return nil
}

// String is the exact size.
func (s Size) String() string { return Exact(int64(s)) }
