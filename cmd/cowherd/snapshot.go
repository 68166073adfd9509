package main

import (
	"fmt"
	"time"

	"cowherd/api"
	"cowherd/internal/size"
)

type snapshotCmd struct {
	outputFlags
	Name     string    `arg:"" name:"name@snap" complete:"device" help:"The live device, and the name of the snapshot behind the @."`
	Chunk    size.Size `default:"4k" placeholder:"SIZE" help:"Unit of copying, a power of two from 4k to 1G (${default})."`
	Store    string    `default:"temp" placeholder:"WHERE" complete:"file" help:"Where copied chunks go: temp (an unlinked file in the state directory), mem, a directory (an unlinked file there), or a file or block device, whose contents are lost."`
	MaxCOW   size.Size `name:"max-cow" placeholder:"SIZE" help:"Most space that copied chunks may take; a snapshot that needs more becomes invalid."`
	ReadOnly bool      `help:"Refuse writes to the snapshot."`

	DiscardZeroesCOW      bool `name:"discard-zeroes-cow" help:"A discard of a copied chunk zeroes it."`
	DiscardPassdownOrigin bool `name:"discard-passdown-origin" help:"Discards go to the origin's device too; needs --discard-zeroes-cow."`
}

func (snapshotCmd) Help() string {
	return `Examples:

    cowherd snapshot vm@nightly
    cowherd snapshot vm@nightly --chunk 64k --max-cow 4GiB --read-only
    cowherd snapshot vm@test --store mem
    nbdcopy "nbd+unix:///vm@nightly?socket=/run/cowherd/nbd.sock" backup.img
`
}

func (c *snapshotCmd) Run(s *session) error {
	if c.DiscardPassdownOrigin && !c.DiscardZeroesCOW {
		return usagef("--discard-passdown-origin needs --discard-zeroes-cow")
	}
	store := c.Store
	if store != "temp" && store != "mem" {
		var err error
		if store, err = absolute(store); err != nil {
			return err
		}
	}
	client, err := s.client()
	if err != nil {
		return err
	}
	defer client.Close()
	taken, err := client.TakeSnapshot(s, api.SnapshotRequest{
		Name:                  c.Name,
		ChunkBytes:            int64(c.Chunk),
		Store:                 store,
		MaxCOWBytes:           int64(c.MaxCOW),
		ReadOnly:              c.ReadOnly,
		DiscardZeroesCOW:      c.DiscardZeroesCOW,
		DiscardPassdownOrigin: c.DiscardPassdownOrigin,
	})
	if err != nil {
		return err
	}
	if c.JSON {
		return printJSON(s.stdout, taken)
	}
	_, err = fmt.Fprintf(s.stdout, "%s: taken, %s waited for %v%s\n", taken.Name, taken.Snapshot.Origin,
		time.Duration(taken.StallMicroseconds)*time.Microsecond, where(taken.Device))
	return err
}
