package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"

	"cowherd/block"
	"cowherd/clonemeta"
)

type cloneMetadataDumpCmd struct {
	outputFlags
	metadataArgument
}

func (cloneMetadataDumpCmd) Help() string {
	return `One line for each run of regions that are hydrated, in order; with --json one object for each line, after one
with the sizes. Of regions that are lost it cannot be told.

Examples:

    cowherd clone-metadata dump vm.clone-metadata
    cowherd clone-metadata dump vm.clone-metadata --json | jq -s 'map(.count // 0) | add'
`
}

func (c *cloneMetadataDumpCmd) Run(s *session) error {
	d, err := c.open()
	if err != nil {
		return err
	}
	return errors.Join(c.wrap(c.dump(s.stdout, d)), d.Close())
}

// dump writes sizes and runs; what comes before an error is written too.
func (c *cloneMetadataDumpCmd) dump(w io.Writer, d block.Device) error {
	super, err := clonemeta.ReadSuperblock(d)
	if err != nil {
		return err
	}
	out := bufio.NewWriterSize(w, 64<<10)
	appendRun := appendRunText
	if c.JSON {
		appendRun = appendRunJSON
		fmt.Fprintf(out, `{"region_sectors":%d,"target_sectors":%d,"regions":%d}`+"\n", super.RegionSize, super.TargetSize, super.Regions())
	} else {
		fmt.Fprintf(out, "# %d regions of %d sectors, %d sectors in all\n", super.Regions(), super.RegionSize, super.TargetSize)
		fmt.Fprintf(out, "%20s %20s %20s\n", "FIRST", "LAST", "COUNT")
	}
	var line []byte
	survey, err := clonemeta.Runs(d, func(r clonemeta.Run) error {
		line = appendRun(line[:0], r)
		_, err := out.Write(line)
		return err
	})
	if err == nil && survey.Lost > 0 {
		err = fmt.Errorf("of %s it cannot be told whether they are hydrated", plural(survey.Lost, "region"))
	}
	return errors.Join(err, out.Flush())
}

// appendRunText appends a line for people.
func appendRunText(p []byte, r clonemeta.Run) []byte {
	p = fmt.Appendf(p, "%20d %20d %20d", r.First, r.First+r.Count-1, r.Count)
	if r.Lost {
		p = append(p, "  lost"...)
	}
	return append(p, '\n')
}

// appendRunJSON appends a line for programs.
func appendRunJSON(p []byte, r clonemeta.Run) []byte {
	p = strconv.AppendUint(append(p, `{"first":`...), r.First, 10)
	p = strconv.AppendUint(append(p, `,"count":`...), r.Count, 10)
	if r.Lost {
		p = append(p, `,"lost":true`...)
	}
	return append(p, "}\n"...)
}
