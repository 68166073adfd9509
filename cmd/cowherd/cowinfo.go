package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/internal/size"
)

type cowInfoCmd struct {
	outputFlags
	cowArgument
}

func (cowInfoCmd) Help() string {
	return `Examples:

    cowherd cow info vm-nightly.cow
    cowherd cow info /dev/vg0/cow --json | jq .exceptions
`
}

// States of a store.
const (
	stateFresh   = "fresh"   // valid, without exceptions: new, or merged
	stateValid   = "valid"   // with exceptions
	stateInvalid = "invalid" // marked so in the header
	stateDamaged = "damaged" // breaks rules of the format
)

// cowInfo is what is known of a store, as JSON.
type cowInfo struct {
	File             string         `json:"file"`
	State            string         `json:"state"`
	Valid            bool           `json:"valid"`
	Version          int            `json:"version"`
	ChunkBytes       int64          `json:"chunk_bytes"`
	SizeBytes        int64          `json:"size_bytes"`
	Chunks           cowstore.Chunk `json:"chunks"`
	Exceptions       uint64         `json:"exceptions"`
	AreaRecords      int            `json:"area_records"`
	Areas            []areaRun      `json:"areas"`
	HighestChunk     cowstore.Chunk `json:"highest_chunk"`
	GapChunks        uint64         `json:"gap_chunks"`
	AllocatedSectors block.Sector   `json:"allocated_sectors"`
	TotalSectors     block.Sector   `json:"total_sectors"`
	MetadataSectors  block.Sector   `json:"metadata_sectors"`
	Status           string         `json:"status"`
	Violations       int            `json:"violations"`
	Remarks          int            `json:"remarks"`
}

// areaRun is areas that follow one another and hold as many exceptions each.
type areaRun struct {
	First      uint64 `json:"first"`
	Count      uint64 `json:"count"`
	Exceptions int    `json:"exceptions"` // in each
}

// newCOWInfo is the survey of a store for output.
func newCOWInfo(file string, sizeBytes int64, s *cowstore.Survey) *cowInfo {
	i := &cowInfo{
		File: file, Valid: s.Header.Valid, Version: cowstore.FormatVersion, ChunkBytes: int64(s.Header.ChunkSize),
		SizeBytes: sizeBytes, Chunks: s.Layout.Chunks, Exceptions: s.Exceptions, AreaRecords: s.Layout.AreaRecords(),
		HighestChunk: s.NewMax, GapChunks: s.Gaps, Status: s.Status(), Violations: s.Violations, Remarks: s.Remarks,
	}
	i.AllocatedSectors, i.TotalSectors, i.MetadataSectors = s.Usage()
	if s.Area > 0 {
		i.Areas = append(i.Areas, areaRun{0, s.Area, s.Layout.AreaRecords()})
	}
	if s.Ended {
		i.Areas = append(i.Areas, areaRun{s.Area, 1, s.Slot})
	}
	switch {
	case s.Violations > 0:
		i.State = stateDamaged
	case !s.Header.Valid:
		i.State = stateInvalid
	case s.Exceptions == 0:
		i.State = stateFresh
	default:
		i.State = stateValid
	}
	return i
}

func (c *cowInfoCmd) Run(s *session) error {
	d, err := c.openCOW(true)
	if err != nil {
		return err
	}
	var first error // what is wrong with the header, if that keeps from going on
	survey, err := cowstore.Check(d, cowstore.CheckConfig{Report: func(f *cowstore.Finding) {
		if first == nil {
			first = errors.New(f.String())
		}
	}})
	if err == nil && survey.Layout == (cowstore.Layout{}) {
		err = first
	}
	if err = errors.Join(c.wrap(err), d.Close()); err != nil {
		return err
	}
	info := newCOWInfo(c.File, d.Size(), survey)
	if c.JSON {
		return printJSON(s.stdout, info)
	}
	return info.write(s.stdout)
}

// write shows it to people.
func (i *cowInfo) write(w io.Writer) error {
	t := newSheet(i.File)
	t.put("state", i.State)
	t.putf("version", "%d", i.Version)
	t.put("size", exactSize(i.SizeBytes))
	t.putf("chunk", "%s, %d on the device", size.Human(i.ChunkBytes), i.Chunks)
	t.putf("exceptions", "%d", i.Exceptions)
	t.put("areas", i.areas())
	if i.HighestChunk > 0 {
		t.putf("highest chunk", "%d, %d free below it", i.HighestChunk, i.GapChunks)
	}
	t.put("used", share(i.AllocatedSectors.Bytes(), i.SizeBytes)+", "+size.Human(i.MetadataSectors.Bytes())+" of it metadata")
	t.put("kernel's status", i.Status)
	if i.Violations+i.Remarks > 0 {
		t.putf("check", "%s of the format, %s", plural(i.Violations, "violation"), plural(i.Remarks, "remark"))
	}
	return t.write(w)
}

// areas tells how many exceptions each area holds.
func (i *cowInfo) areas() string {
	var parts []string
	for _, run := range i.Areas {
		if run.Count > 1 {
			parts = append(parts, fmt.Sprintf("%d to %d: %d each of %d", run.First, run.First+run.Count-1, run.Exceptions, i.AreaRecords))
		} else {
			parts = append(parts, fmt.Sprintf("%d: %d of %d", run.First, run.Exceptions, i.AreaRecords))
		}
	}
	return strings.Join(parts, "; ")
}
