package main

import (
	"errors"
	"fmt"

	"cowherd/backend/file"
	"cowherd/cowstore"
)

type cowCmd struct {
	Info   cowInfoCmd   `cmd:"" help:"Show header, usage and state."`
	Dump   cowDumpCmd   `cmd:"" help:"List the exceptions."`
	Check  cowCheckCmd  `cmd:"" help:"Check every rule of the format."`
	Repair cowRepairCmd `cmd:"" help:"Repair what can be repaired without inventing data."`
	Export cowExportCmd `cmd:"" help:"Write the view of the snapshot to an image."`
	Merge  cowMergeCmd  `cmd:"" help:"Move the snapshot into its origin, or finish that."`
	Diff   cowDiffCmd   `cmd:"" help:"List the ranges in which the snapshot differs from its origin."`
}

func (cowCmd) Help() string {
	return `The COW device is one of cowherd's or of the kernel's, a file or a block device that nobody has in use. No daemon
is needed.

Examples:

    cowherd cow info vm-nightly.cow
    cowherd cow check vm-nightly.cow --origin vm.img
`
}

// cowArgument is the COW device that a command is about.
type cowArgument struct {
	File string `arg:"" complete:"file" help:"The COW device: a file or block device."`
}

// openCOW opens the COW device, and finds out nothing about it. Who has it open for writing keeps it from others.
func (c *cowArgument) openCOW(readOnly bool) (*file.Device, error) {
	return file.Open(c.File, file.Options{ReadOnly: readOnly})
}

// wrap says which file an error is about. Errors of the file itself name it.
func (c *cowArgument) wrap(err error) error {
	if err == nil || errors.As(err, new(usageError)) {
		return err
	}
	return fmt.Errorf("%s: %w", c.File, err)
}

// originFlag is the origin of commands that only want to know its size.
type originFlag struct {
	Origin string `type:"existingfile" complete:"file" placeholder:"FILE" help:"The origin: what is said of its chunks is checked against its size."`
}

// originSize is the origin's size in bytes; 0: it is not known.
func (c *originFlag) originSize() (size int64, err error) {
	if c.Origin == "" {
		return 0, nil
	}
	d, err := file.Open(c.Origin, file.Options{ReadOnly: true, Shared: true}) // it may be in use: only its size is looked at
	if err != nil {
		return 0, err
	}
	return d.Size(), d.Close()
}

// finding is a finding of a check as JSON.
type finding struct {
	Rule      cowstore.Rule   `json:"rule"`
	Violation bool            `json:"violation"`
	Area      *uint64         `json:"area,omitempty"`
	Slot      *int            `json:"slot,omitempty"`
	Old       *cowstore.Chunk `json:"old_chunk,omitempty"`
	New       *cowstore.Chunk `json:"new_chunk,omitempty"`
	Text      string          `json:"text"`
}

func newFinding(f *cowstore.Finding) finding {
	j := finding{Rule: f.Rule, Violation: f.Violation, Text: f.What}
	if f.HasSlot {
		j.Area, j.Slot = new(f.Area), new(f.Slot)
	}
	if f.HasRecord {
		j.Old, j.New = new(f.Record.Old), new(f.Record.New)
	}
	return j
}

// plural is a number of things.
func plural[N int | int64 | uint64](n N, thing string) string {
	if n == 1 {
		return fmt.Sprintf("%d %s", n, thing)
	}
	return fmt.Sprintf("%d %ss", n, thing)
}
