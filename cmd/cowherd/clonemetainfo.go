package main

import (
	"errors"
	"fmt"
	"io"

	"cowherd/block"
	"cowherd/clonemeta"
	"cowherd/internal/size"
)

type cloneMetadataInfoCmd struct {
	outputFlags
	metadataArgument
}

func (cloneMetadataInfoCmd) Help() string {
	return `Examples:

    cowherd clone-metadata info vm.clone-metadata
    cowherd clone-metadata info /dev/vg0/meta --json | jq .hydrated
`
}

// States of a clone's metadata, beside stateFresh and stateDamaged.
const (
	statePartial  = "partial"  // some regions are hydrated
	stateComplete = "complete" // all are
)

// metadataInfo is what is known of metadata, as JSON.
type metadataInfo struct {
	File         string       `json:"file"`
	State        string       `json:"state"`
	Version      uint32       `json:"version"`
	SizeBytes    int64        `json:"size_bytes"`
	RegionBytes  int64        `json:"region_bytes"`
	TargetBytes  int64        `json:"target_bytes"`
	Regions      uint64       `json:"regions"`
	Hydrated     uint64       `json:"hydrated"`
	Lost         uint64       `json:"lost"`
	UsedBlocks   uint64       `json:"used_blocks"`
	TotalBlocks  uint64       `json:"total_blocks"`
	LeakedBlocks uint64       `json:"leaked_blocks"`
	RegionSize   block.Sector `json:"region_sectors"`
	TargetSize   block.Sector `json:"target_sectors"`
	Status       string       `json:"status"`
	Violations   int          `json:"violations"`
	Remarks      int          `json:"remarks"`
}

// newMetadataInfo is the survey of metadata for output.
func newMetadataInfo(file string, sizeBytes int64, s *clonemeta.Survey) *metadataInfo {
	b := &s.Superblock
	i := &metadataInfo{
		File: file, Version: b.Version, SizeBytes: sizeBytes, RegionBytes: b.RegionSize.Bytes(), TargetBytes: b.TargetSize.Bytes(),
		Regions: b.Regions(), Hydrated: s.Hydrated, Lost: s.Lost, UsedBlocks: b.SpaceMap.Allocated, TotalBlocks: b.SpaceMap.Blocks,
		LeakedBlocks: s.Leaked, RegionSize: b.RegionSize, TargetSize: b.TargetSize, Violations: s.Violations, Remarks: s.Remarks,
	}
	i.Status = fmt.Sprintf("8 %d/%d %d %d/%d", i.UsedBlocks, i.TotalBlocks, i.RegionSize, i.Hydrated, i.Regions)
	switch {
	case s.Violations > 0:
		i.State = stateDamaged
	case s.Hydrated == 0:
		i.State = stateFresh
	case s.Hydrated < i.Regions:
		i.State = statePartial
	default:
		i.State = stateComplete
	}
	return i
}

func (c *cloneMetadataInfoCmd) Run(s *session) error {
	d, err := c.open()
	if err != nil {
		return err
	}
	survey, err := clonemeta.Check(d, clonemeta.CheckConfig{})
	if err == nil && !survey.Readable {
		_, err = clonemeta.ReadSuperblock(d)
	}
	if err = errors.Join(c.wrap(err), d.Close()); err != nil {
		return err
	}
	info := newMetadataInfo(c.File, d.Size(), survey)
	if c.JSON {
		return printJSON(s.stdout, info)
	}
	return info.write(s.stdout)
}

// write shows it to people.
func (i *metadataInfo) write(w io.Writer) error {
	t := newSheet(i.File)
	t.put("state", i.State)
	t.putf("version", "%d", i.Version)
	t.put("size", exactSize(i.SizeBytes))
	t.put("clone", exactSize(i.TargetBytes))
	t.putf("regions", "%d of %s", i.Regions, size.Human(i.RegionBytes))
	t.putf("hydrated", "%d (%.1f%%)", i.Hydrated, 100*float64(i.Hydrated)/float64(i.Regions))
	if i.Lost > 0 {
		t.putf("lost", "%d: whether they are hydrated cannot be told", i.Lost)
	}
	t.putf("used", "%d of %d blocks of 4 KiB", i.UsedBlocks, i.TotalBlocks)
	t.put("kernel's status", i.Status)
	if i.Violations+i.Remarks > 0 {
		t.putf("check", "%s of the format, %s", plural(i.Violations, "violation"), plural(i.Remarks, "remark"))
	}
	return t.write(w)
}
