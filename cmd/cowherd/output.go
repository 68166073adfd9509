package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"cowherd/internal/size"
)

// outputFlags are the flags of commands that print something.
type outputFlags struct {
	JSON bool `name:"json" help:"Print JSON for programs, with sizes in bytes."`
}

// printJSON writes v for programs.
func printJSON(w io.Writer, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n", text)
	return err
}

// table is rows of cells for people. The first row is the heading.
type table struct {
	right []bool // columns that are aligned to the right
	rows  [][]string
}

// add appends a row of as many cells as there are columns.
func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

// write aligns the columns. An empty cell is shown as a dash.
func (t *table) write(w io.Writer) error {
	widths := make([]int, len(t.right))
	for _, row := range t.rows {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell), 1)
		}
	}
	var b strings.Builder
	for _, row := range t.rows {
		var line strings.Builder
		for i, cell := range row {
			if cell == "" {
				cell = "-"
			}
			space := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if t.right[i] {
				line.WriteString(space + cell + "  ")
			} else {
				line.WriteString(cell + space + "  ")
			}
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// exactSize is a size for people with the number of bytes beside it.
func exactSize(n int64) string {
	return fmt.Sprintf("%s (%d bytes)", size.Human(n), n)
}

// share is a part of a whole for people.
func share(part, whole int64) string {
	text := size.Human(part) + " of " + size.Human(whole)
	if whole > 0 {
		text += fmt.Sprintf(" (%.1f%%)", 100*float64(part)/float64(whole))
	}
	return text
}
