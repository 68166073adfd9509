package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/internal/size"
)

type cowDumpCmd struct {
	outputFlags
	cowArgument
	Chunk size.Size `placeholder:"SIZE" help:"Chunk size to believe in, whatever the header says: for a store whose header is damaged."`
}

func (cowDumpCmd) Help() string {
	return `One line for each exception, in the order of the table; with --json one object for each line. What is wrong
with a record by itself stands behind it.

Examples:

    cowherd cow dump vm-nightly.cow
    cowherd cow dump vm-nightly.cow --json | jq -s 'map(.old_chunk) | max'
    cowherd cow dump damaged.cow --chunk 4k
`
}

func (c *cowDumpCmd) Run(s *session) error {
	if c.Chunk != 0 {
		if err := cowstore.CheckChunkSize(int64(c.Chunk)); err != nil {
			return usagef("--chunk: %w", err)
		}
	}
	d, err := c.openCOW(true)
	if err != nil {
		return err
	}
	layout, err := c.layout(d)
	if err == nil {
		err = c.dump(s.stdout, d, layout)
	}
	return errors.Join(c.wrap(err), d.Close())
}

// layout is where the areas are.
func (c *cowDumpCmd) layout(d block.Device) (cowstore.Layout, error) {
	if c.Chunk != 0 {
		if err := cowstore.CheckChunkSize(int64(c.Chunk), d.Limits().LogicalBlock); err != nil {
			return cowstore.Layout{}, err
		}
		return cowstore.NewLayout(d.Size(), cowstore.ChunkSize(c.Chunk)), nil
	}
	h, err := cowstore.ReadHeader(d)
	if err != nil {
		return cowstore.Layout{}, err
	}
	return cowstore.NewLayout(d.Size(), h.ChunkSize), nil
}

// dump writes the records; what comes before an error is written too.
func (c *cowDumpCmd) dump(w io.Writer, d block.Device, layout cowstore.Layout) error {
	out := bufio.NewWriterSize(w, 64<<10)
	appendRecord := appendRecordText
	if c.JSON {
		appendRecord = appendRecordJSON
	} else {
		fmt.Fprintf(out, "%8s %10s %20s %20s\n", "AREA", "SLOT", "OLD", "NEW")
	}
	var line []byte
	ended, err := layout.Records(d, func(area uint64, slot int, r cowstore.Record) error {
		line = appendRecord(line[:0], area, slot, r, layout.Check(r, 0))
		_, err := out.Write(line)
		return err
	})
	if err == nil && !ended {
		err = errors.New("the table goes on behind the end of the device")
	}
	return errors.Join(err, out.Flush())
}

// appendRecordText appends a line of the table for people, in columns of fixed width since nothing is known of what
// follows.
func appendRecordText(p []byte, area uint64, slot int, r cowstore.Record, wrong string) []byte {
	p = fmt.Appendf(p, "%8d %10d %20d %20d", area, slot, r.Old, r.New)
	if wrong != "" {
		p = append(append(p, "  "...), wrong...)
	}
	return append(p, '\n')
}

// appendRecordJSON appends a line for programs.
func appendRecordJSON(p []byte, area uint64, slot int, r cowstore.Record, wrong string) []byte {
	p = strconv.AppendUint(append(p, `{"area":`...), area, 10)
	p = strconv.AppendInt(append(p, `,"slot":`...), int64(slot), 10)
	p = strconv.AppendUint(append(p, `,"old_chunk":`...), uint64(r.Old), 10)
	p = strconv.AppendUint(append(p, `,"new_chunk":`...), uint64(r.New), 10)
	if wrong != "" {
		p = strconv.AppendQuote(append(p, `,"wrong":`...), wrong) // the words of a rule are plain ASCII
	}
	return append(p, "}\n"...)
}
