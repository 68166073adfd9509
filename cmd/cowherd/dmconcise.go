package main

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"cowherd/api"
)

// The concise format has devices on one line, with a semicolon between them, and the fields of each with a comma between
// them: name, UUID, minor number, ro or rw, and the lines of the table. A backslash takes the meaning from what follows.

// createConcise makes the devices of a specification, or of one on standard input.
func (r *dmRun) createConcise(specification string) error {
	if specification == "" {
		text, err := io.ReadAll(io.LimitReader(r.stdin, api.DMBodyMax))
		if err != nil {
			return fmt.Errorf("specification: %w", err)
		}
		specification = strings.TrimSpace(string(text))
	}
	for _, device := range splitUnescaped(specification, ';') {
		if strings.TrimSpace(device) == "" {
			continue
		}
		if err := r.createFields(splitUnescaped(device, ',')); err != nil {
			return err
		}
	}
	return nil
}

// createFields makes a device of its fields.
func (r *dmRun) createFields(fields []string) error {
	for i := range fields {
		fields[i] = strings.TrimSpace(unescape(fields[i]))
	}
	for len(fields) < 4 {
		fields = append(fields, "")
	}
	request := api.DMCreate{Name: fields[0], UUID: fields[1]}
	if fields[2] != "" {
		minor, err := strconv.Atoi(fields[2])
		if err != nil {
			return usagef("minor number %q of %s: a number is wanted", fields[2], fields[0])
		}
		request.Minor = &minor
	}
	if flags := fields[3]; flags != "" && flags != "ro" && flags != "rw" {
		return usagef("flags %q of %s: ro or rw is wanted", flags, fields[0])
	}
	table, err := absoluteWords(strings.Join(fields[4:], "\n"))
	if err != nil {
		return err
	}
	return r.create(request, api.DMTable{Table: table, ReadOnly: fields[3] == "ro" || r.flags.Readonly})
}

// splitUnescaped cuts text at each separator that has no backslash before it.
func splitUnescaped(text string, separator byte) []string {
	var parts []string
	start := 0
	for i := 0; i < len(text); i++ {
		switch text[i] {
		case '\\':
			i++
		case separator:
			parts = append(parts, text[start:i])
			start = i + 1
		}
	}
	return append(parts, text[start:])
}

// unescape takes backslashes away.
func unescape(text string) string {
	var b strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] == '\\' && i+1 < len(text) {
			i++
		}
		b.WriteByte(text[i])
	}
	return b.String()
}

func newEscaper() *strings.Replacer { return strings.NewReplacer(`\`, `\\`, `,`, `\,`, `;`, `\;`) }

// printConcise prints devices in the concise format.
func (r *dmRun) printConcise(devices []api.DMDevice) error {
	var all []string
	escaper := newEscaper()
	for i := range devices {
		d := &devices[i]
		flags := "rw"
		if d.ReadOnly {
			flags = "ro"
		}
		fields := []string{escaper.Replace(d.Name), escaper.Replace(d.UUID), strconv.FormatUint(uint64(d.Minor), 10), flags}
		for _, t := range d.Table {
			fields = append(fields, escaper.Replace(fmt.Sprintf("%d %d %s %s", t.Start, t.Length, t.Type, t.Table)))
		}
		all = append(all, strings.Join(fields, ","))
	}
	_, err := fmt.Fprintln(r.stdout, strings.Join(all, ";"))
	return errors.Join(err)
}
