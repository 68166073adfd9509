package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/signal"
	"syscall"

	"cowherd/block"
)

type cowDiffCmd struct {
	progressFlag
	viewArguments
	NoCompare bool `help:"List all chunks that have an exception, without reading them."`
	JSON      bool `name:"json" help:"Has no effect: the output is JSON anyway."`
}

func (cowDiffCmd) Help() string {
	return `The output is one JSON object; its ranges are in bytes, in ascending order, and do not touch. They are found by
comparing, a sector at a time, the chunks that have an exception.

Examples:

    cowherd cow diff --origin vm.img vm-nightly.cow
    cowherd cow diff --origin vm.img vm-nightly.cow --no-compare | jq '[.ranges[].length] | add'
`
}

func (c *cowDiffCmd) Run(s *session) error {
	ctx, stop := signal.NotifyContext(s, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	v, err := c.openView()
	if err != nil {
		return err
	}
	err = c.diff(ctx, s, v)
	if err != nil {
		err = fmt.Errorf("diff %s: %w", c.File, err)
	}
	return errors.Join(err, v.close())
}

// diff writes the whole output.
func (c *cowDiffCmd) diff(ctx context.Context, s *session, v *view) error {
	out := rangeWriter{out: bufio.NewWriter(s.stdout)}
	if err := out.begin(c.File, c.Origin, v.device.Size()); err != nil {
		return err
	}
	each := out.add
	if !c.NoCompare {
		total := int64(0)
		_ = eachCopied(v, func(_, length int64) error { total += length; return nil })
		d := differ{view: v, out: &out, progress: c.newProgress(s, c.File, total)}
		defer d.progress.end()
		each = func(offset, length int64) error { return d.compare(ctx, offset, length) }
	}
	if err := eachCopied(v, each); err != nil {
		return err
	}
	return out.end()
}

// eachCopied calls f for each range of the snapshot that is on the COW device.
func eachCopied(v *view, f func(offset, length int64) error) (err error) {
	v.snapshot.Copied(0, v.snapshot.Size(), func(offset, length int64, copied bool) bool {
		if copied {
			err = f(offset, length)
		}
		return err == nil
	})
	return err
}

// diffPiece is what is compared at a time, in bytes.
const diffPiece = 1 << 20

// differ compares a snapshot with its origin.
type differ struct {
	view     *view
	out      *rangeWriter
	progress *progress
	a, b     [diffPiece]byte // of the snapshot, of the origin
}

// compare adds what differs within a range.
func (d *differ) compare(ctx context.Context, offset, length int64) error {
	for end := offset + length; offset < end; offset += diffPiece {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(diffPiece, end-offset)
		a, b := d.a[:n], d.b[:n]
		if err := block.Read(d.view.device, a, offset); err != nil {
			return err
		}
		if err := block.Read(d.view.origin, b, offset); err != nil {
			return err
		}
		for at := int64(0); at < n; at += block.SectorSize {
			to := min(at+block.SectorSize, n)
			if bytes.Equal(a[at:to], b[at:to]) {
				continue
			}
			if err := d.out.add(offset+at, to-at); err != nil {
				return err
			}
		}
		d.progress.add(n)
	}
	return nil
}

// rangeWriter writes a JSON object with ranges, as they come; those that touch are one.
type rangeWriter struct {
	out            *bufio.Writer
	offset, length int64 // the range that may still grow
	count, bytes   int64
}

func (w *rangeWriter) begin(file, origin string, size int64) error {
	quotedFile, err := json.Marshal(file)
	if err != nil {
		return err
	}
	quotedOrigin, err := json.Marshal(origin)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w.out, "{\n  \"file\": %s,\n  \"origin\": %s,\n  \"size_bytes\": %d,\n  \"ranges\": [", quotedFile,
		quotedOrigin, size)
	return err
}

// add adds a range behind all others.
func (w *rangeWriter) add(offset, length int64) error {
	if w.length > 0 && w.offset+w.length == offset {
		w.length += length
		return nil
	}
	err := w.put()
	w.offset, w.length = offset, length
	return err
}

// put writes the range that is complete.
func (w *rangeWriter) put() error {
	if w.length == 0 {
		return nil
	}
	comma := ","
	if w.count == 0 {
		comma = ""
	}
	w.count++
	w.bytes += w.length
	_, err := fmt.Fprintf(w.out, "%s\n    {\"offset\": %d, \"length\": %d}", comma, w.offset, w.length)
	return err
}

func (w *rangeWriter) end() error {
	if err := w.put(); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(w.out, "\n  ],\n  \"different_bytes\": %d\n}\n", w.bytes); err != nil {
		return err
	}
	return w.out.Flush()
}
