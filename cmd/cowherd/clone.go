package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"cowherd/api"
	"cowherd/backend/nbd"
	"cowherd/internal/size"
)

type cloneCmd struct {
	outputFlags
	Name        string    `arg:"" help:"Name of the clone, and of its export."`
	Destination string    `arg:"" optional:"" complete:"file" help:"Where the clone ends up: an image file, which is made if there is none, or a block device."`
	From        string    `placeholder:"SRC" complete:"any" help:"What is cloned, and must not change: an image file, a block device, an NBD URI, or the name of a snapshot, or of a device that nobody can write."`
	RegionSize  size.Size `placeholder:"SIZE" help:"Unit of copying, a power of two from 4k to 1G (64k). A clone that is gone on with has its own."`
	Metadata    string    `placeholder:"FILE" complete:"file" help:"Where it is noted what has been copied: a file or block device (DST.clone-metadata). A clone that is noted there is gone on with."`
	Overwrite   bool      `help:"Let the clone take the place of whatever the destination holds."`
	Direct      bool      `help:"Do I/O on the destination past the page cache (O_DIRECT)."`

	NoHydration       bool   `help:"Copy nothing in the background, until \"cowherd hydrate\" says so."`
	NoDiscardPassdown bool   `help:"Do not pass discards to the destination."`
	Threshold         uint32 `name:"hydration-threshold" placeholder:"N" help:"Most regions that are copied in the background at the same time (16 MiB)."`
	Batch             uint32 `name:"hydration-batch-size" placeholder:"N" help:"Most regions in one copy (1 MiB)."`
	PromoteOnRead     string `enum:"on,off" default:"on" placeholder:"on|off" help:"Copy regions that were read before others (${default})."`
	DestinationIsZero bool   `help:"The destination reads as zeroes: holes of the source need not be written. A file that is made is zero anyway."`
	Order             string `enum:"sequential,hottest" default:"sequential" placeholder:"ORDER" help:"sequential: from the first region to the last; hottest: what lies near what is read goes first (${default})."`

	DetachSource bool `help:"Let go of the source of a clone that is hydrated: commit, close the source, say so. NAME alone is given."`
	Wait         bool `help:"With --detach-source: hydrate the rest first."`
}

func (cloneCmd) Help() string {
	return `Examples:

    cowherd clone web --from golden.img /var/lib/images/web.img
    cowherd clone web --from "nbd://images.example/golden" web.img --order hottest
    cowherd clone test --from vm@nightly test.img --no-hydration
    cowherd hydrate web --wait
    cowherd clone --detach-source web --wait
`
}

func (c *cloneCmd) Run(s *session) error {
	if c.DetachSource {
		return c.detachSource(s)
	}
	if err := c.complete(); err != nil {
		return err
	}
	r := api.AttachRequest{Name: c.Name, Direct: c.Direct, Clone: api.CloneRequest{
		RegionBytes: int64(c.RegionSize), Overwrite: c.Overwrite, DestinationIsZero: c.DestinationIsZero,
		NoHydration: c.NoHydration, NoDiscardPassdown: c.NoDiscardPassdown, NoPromoteOnRead: c.PromoteOnRead == "off",
		Threshold: c.Threshold, Batch: c.Batch, Order: c.Order,
	}}
	var err error
	if r.Device, err = absolute(c.Destination); err != nil {
		return err
	}
	if c.Metadata != "" {
		if r.Clone.Metadata, err = absolute(c.Metadata); err != nil {
			return err
		}
	}
	client, err := s.client()
	if err != nil {
		return err
	}
	defer client.Close()
	if r.Clone.Source, err = sourceArgument(s, client, c.From); err != nil {
		return err
	}
	made, err := client.Attach(s, r)
	if err != nil {
		return err
	}
	if c.JSON {
		return printJSON(s.stdout, made)
	}
	_, err = fmt.Fprintf(s.stdout, "%s: cloned from %s, %s, %s%s\n", made.Name, c.From, size.Human(made.SizeBytes),
		hydrated(made.Clone), where(made))
	return err
}

// sourceArgument makes what a user calls a source good for the daemon. A name without a slash that is a device's means
// that, as for cowherd copy.
func sourceArgument(ctx context.Context, client *api.Client, source string) (string, error) {
	if nbd.IsURI(source) {
		return source, nil
	}
	if strings.ContainsRune(source, filepath.Separator) {
		return absolute(source)
	}
	_, err := liveDevice(ctx, client, source)
	known, unknown := err == nil, errors.Is(err, syscall.ENOENT)
	if !known && !unknown {
		return "", err
	}
	_, err = os.Stat(source)
	switch {
	case known && err == nil:
		return "", usagef("%s is a file and a device: write .%c%s for the file, or give the device's URI", source,
			filepath.Separator, source)
	case known || errors.Is(err, fs.ErrNotExist) && strings.Contains(source, "@"):
		return source, nil
	}
	return absolute(source)
}

// hydrated is how much of a clone is, in words.
func hydrated(x *api.Clone) string {
	if x == nil {
		return ""
	}
	share := 100 * float64(x.Hydrated) / float64(max(1, x.Regions))
	return fmt.Sprintf("%d of %d regions hydrated (%.1f%%)", x.Hydrated, x.Regions, share)
}
