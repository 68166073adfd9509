package main

import (
	"errors"
	"fmt"

	"cowherd/backend/file"
	"cowherd/persistentdata"
)

type cloneMetadataCmd struct {
	Info   cloneMetadataInfoCmd   `cmd:"" help:"Show sizes, usage and how much is hydrated."`
	Dump   cloneMetadataDumpCmd   `cmd:"" help:"List the regions that are hydrated."`
	Check  cloneMetadataCheckCmd  `cmd:"" help:"Check every rule of the format."`
	Repair cloneMetadataRepairCmd `cmd:"" help:"Write what can be read of damaged metadata to a new file."`
}

func (cloneMetadataCmd) Help() string {
	return `The metadata is cowherd's or that of the kernel's dm-clone, a file or a block device that nobody has in use. No
daemon is needed.

Examples:

    cowherd clone-metadata info vm.clone-metadata
    cowherd clone-metadata check vm.clone-metadata
`
}

// metadataArgument is the metadata device that a command is about.
type metadataArgument struct {
	File string `arg:"" complete:"file" help:"The metadata: a file or block device."`
}

// open opens the device for reading. Who has it open for writing keeps it from others.
func (c *metadataArgument) open() (*file.Device, error) {
	return file.Open(c.File, file.Options{ReadOnly: true})
}

// wrap says which file an error is about. Errors of the file itself name it.
func (c *metadataArgument) wrap(err error) error {
	if err == nil || errors.As(err, new(usageError)) {
		return err
	}
	return fmt.Errorf("%s: %w", c.File, err)
}

// blockFinding is a finding of a check of metadata as JSON.
type blockFinding struct {
	Rule      persistentdata.Rule `json:"rule"`
	Violation bool                `json:"violation"`
	Block     *uint64             `json:"block,omitempty"` // the first of Count
	Count     uint64              `json:"count,omitempty"`
	Text      string              `json:"text"`
}

func newBlockFinding(f *persistentdata.Finding) blockFinding {
	j := blockFinding{Rule: f.Rule, Violation: f.Violation, Count: f.Count, Text: f.What}
	if f.Count > 0 {
		j.Block = new(f.Block)
	}
	return j
}
