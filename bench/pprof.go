package bench

import (
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// errProfile is the error of a profile that is not as expected.
var errProfile = errors.New("not a CPU profile as this program writes it")

// readProfile calls yield for each sample of a CPU profile: the names of its functions, the innermost first, and how often
// it was taken. The profile is package runtime/pprof's: gzip of a protocol buffer, of which these fields are read.
//
//	Profile   2 Sample  4 Location  5 Function  6 string_table
//	Sample    1 location_id...  2 value...        the first value counts
//	Location  1 id  4 Line                        the innermost first
//	Line      1 function_id
//	Function  1 id  2 name                        an index of string_table
func readProfile(r io.Reader, yield func(stack []string, count int64)) error {
	z, err := gzip.NewReader(r)
	if err != nil {
		return fmt.Errorf("%w: %w", errProfile, err)
	}
	text, err := io.ReadAll(z)
	if err != nil {
		return fmt.Errorf("%w: %w", errProfile, err)
	}
	var table []string
	var samples [][]byte
	locations, functions := map[uint64][]uint64{}, map[uint64]uint64{}
	err = eachField(text, func(field int, value uint64, part []byte) error {
		switch field {
		case 2:
			samples = append(samples, part)
		case 4:
			id, lines, err := readLocation(part)
			locations[id] = lines
			return err
		case 5:
			ids, err := numbers(part)
			functions[first(ids[1])] = first(ids[2])
			return err
		case 6:
			table = append(table, string(part))
		}
		return nil
	})
	for _, s := range samples {
		if err != nil {
			break
		}
		var fields map[int][]uint64
		if fields, err = numbers(s); err != nil {
			break
		}
		var stack []string
		for _, location := range fields[1] {
			for _, function := range locations[location] {
				if name := functions[function]; name < uint64(len(table)) {
					stack = append(stack, table[name])
				}
			}
		}
		yield(stack, int64(first(fields[2])))
	}
	return err
}

// readLocation is the id and the functions of a Location.
func readLocation(part []byte) (id uint64, functions []uint64, err error) {
	err = eachField(part, func(field int, value uint64, line []byte) error {
		switch field {
		case 1:
			id = value
		case 4:
			ids, err := numbers(line)
			functions = append(functions, first(ids[1]))
			return err
		}
		return nil
	})
	return id, functions, err
}

// numbers are the numbers of a message by field, be they packed or not.
func numbers(part []byte) (map[int][]uint64, error) {
	all := map[int][]uint64{}
	err := eachField(part, func(field int, value uint64, packed []byte) error {
		if packed == nil {
			all[field] = append(all[field], value)
		}
		for len(packed) > 0 {
			v, n := binary.Uvarint(packed)
			if n <= 0 {
				return errProfile
			}
			all[field], packed = append(all[field], v), packed[n:]
		}
		return nil
	})
	return all, err
}

// first is the first of some numbers; 0: there is none.
func first(list []uint64) uint64 {
	if len(list) == 0 {
		return 0
	}
	return list[0]
}

// eachField calls yield for each field of a message: its number and its value, or its bytes, which are not nil then.
func eachField(text []byte, yield func(field int, value uint64, part []byte) error) error {
	for len(text) > 0 {
		key, n := binary.Uvarint(text)
		if n <= 0 {
			return errProfile
		}
		value, m := binary.Uvarint(text[n:])
		if m <= 0 {
			return errProfile
		}
		text = text[n+m:]
		var part []byte
		switch key & 7 {
		case 0:
		case 2:
			if value > uint64(len(text)) {
				return errProfile
			}
			part, text = text[:value:value], text[value:]
		default:
			return errProfile
		}
		if err := yield(int(key>>3), value, part); err != nil {
			return err
		}
	}
	return nil
}
