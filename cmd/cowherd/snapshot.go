package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"cowherd/api"
	"cowherd/internal/size"
)

type snapshotCmd struct {
	outputFlags
	Name       string    `arg:"" name:"name@snap" complete:"device" help:"The live device, and the name of the snapshot behind the @."`
	Persistent bool      `help:"Keep the snapshot in a store of the kernel's format, which survives the daemon."`
	Reopen     bool      `help:"Open a persistent store as it is, cowherd's or the kernel's, as a snapshot of the device, which must not have been written since."`
	Overwrite  bool      `help:"Let a persistent store take the place of whatever a file or block device holds."`
	Chunk      size.Size `placeholder:"SIZE" help:"Unit of copying, a power of two from 4k (the default) to 1G. A store that is reopened has its own."`
	Store      string    `placeholder:"WHERE" complete:"file" help:"Where copied chunks go: temp (an unlinked file in the state directory; the default), mem, a directory (an unlinked file there), or a file or block device, whose contents are lost. Of a persistent snapshot: a file (made if there is none), a block device, or a directory for the file NAME@SNAP.cow (by default the state directory)."`
	MaxCOW     size.Size `name:"max-cow" placeholder:"SIZE" help:"Most space that copied chunks may take."`

	OnFull   string        `enum:",invalidate,grow,throttle,overflow" default:"" placeholder:"WAY" help:"When there is no room: invalidate the snapshot (the default); grow the store; throttle, which lets writes wait for room; or overflow, which fails writes to the snapshot."`
	StallMax time.Duration `placeholder:"TIME" help:"How long --on-full throttle lets a write wait before the snapshot becomes invalid (30s)."`
	WarnAt   *percents     `placeholder:"SHARES" help:"Send an event when these shares of the store are taken, such as 70%,90%; or none. By default 80% of a store that can run full."`

	ReadOnly bool `help:"Refuse writes to the snapshot."`

	DiscardZeroesCOW      bool `name:"discard-zeroes-cow" help:"A discard of a copied chunk zeroes it."`
	DiscardPassdownOrigin bool `name:"discard-passdown-origin" help:"Discards go to the origin's device too; needs --discard-zeroes-cow."`
}

func (snapshotCmd) Help() string {
	return `Examples:

    cowherd snapshot vm@nightly
    cowherd snapshot vm@nightly --chunk 64k --max-cow 4GiB --read-only
    cowherd snapshot vm@test --store mem
    cowherd snapshot vm@stable --persistent --max-cow 20GiB --on-full throttle --warn-at 70%,90%
    cowherd snapshot vm@stable --reopen --store /dev/vg0/vm-cow
    nbdcopy "nbd+unix:///vm@nightly?socket=/run/cowherd/nbd.sock" backup.img
`
}

// percents are shares in percent: 70%,90%; none is an empty list.
type percents []int

// UnmarshalText reads a list of shares.
func (p *percents) UnmarshalText(text []byte) error {
	*p = percents{}
	if string(text) == "none" {
		return nil
	}
	for word := range strings.SplitSeq(string(text), ",") {
		n, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(word), "%"))
		if err != nil || n < 1 || n > 100 {
			return fmt.Errorf("%q is not a share between 1%% and 100%%", word)
		}
		*p = append(*p, n)
	}
	return nil
}

// request checks the flags.
func (c *snapshotCmd) request() (api.SnapshotRequest, error) {
	r := api.SnapshotRequest{
		Name:                  c.Name,
		ChunkBytes:            int64(c.Chunk),
		Store:                 c.Store,
		Persistent:            c.Persistent,
		Reopen:                c.Reopen,
		Overwrite:             c.Overwrite,
		MaxCOWBytes:           int64(c.MaxCOW),
		OnFull:                c.OnFull,
		StallMaxMicroseconds:  c.StallMax.Microseconds(),
		ReadOnly:              c.ReadOnly,
		DiscardZeroesCOW:      c.DiscardZeroesCOW,
		DiscardPassdownOrigin: c.DiscardPassdownOrigin,
	}
	if c.WarnAt != nil {
		r.WarnAt = *c.WarnAt
	}
	switch {
	case c.DiscardPassdownOrigin && !c.DiscardZeroesCOW:
		return r, usagef("--discard-passdown-origin needs --discard-zeroes-cow")
	case c.Overwrite && !c.Persistent:
		return r, usagef("--overwrite needs --persistent")
	case c.Overwrite && c.Reopen:
		return r, usagef("--overwrite and --reopen contradict each other")
	case c.StallMax != 0 && c.OnFull != api.OnFullThrottle:
		return r, usagef("--stall-max needs --on-full throttle")
	case c.StallMax < 0:
		return r, usagef("--stall-max: %v is negative", c.StallMax)
	case c.Store == "" || c.Store == "temp" || c.Store == "mem":
		return r, nil
	}
	var err error
	r.Store, err = absolute(c.Store)
	return r, err
}

func (c *snapshotCmd) Run(s *session) error {
	r, err := c.request()
	if err != nil {
		return err
	}
	client, err := s.client()
	if err != nil {
		return err
	}
	defer client.Close()
	taken, err := client.TakeSnapshot(s, r)
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
