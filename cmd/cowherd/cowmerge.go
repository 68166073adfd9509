package main

import (
	"context"
	"errors"
	"fmt"
	"os/signal"
	"syscall"
	"time"

	"cowherd/internal/size"
	"cowherd/target/snapshot"
)

type cowMergeCmd struct {
	outputFlags
	progressFlag
	viewArguments
}

func (cowMergeCmd) Help() string {
	return `Afterwards the origin holds what the snapshot showed, and the store is empty. What the origin held before is lost.
A merge that was interrupted, by whatever means, is finished by the same command.

Examples:

    cowherd cow merge --origin vm.img vm-nightly.cow
    cowherd cow merge --origin /dev/vg0/vm /dev/vg0/cow
`
}

// mergeReport is what was done, as JSON.
type mergeReport struct {
	File         string  `json:"file"`
	Origin       string  `json:"origin"`
	MergedChunks uint64  `json:"merged_chunks"`
	MergedBytes  int64   `json:"merged_bytes"` // in whole chunks
	Seconds      float64 `json:"seconds"`
}

func (c *cowMergeCmd) Run(s *session) error {
	ctx, stop := signal.NotifyContext(s, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	start := time.Now()
	v, err := c.openSnapshot(false)
	if err != nil {
		return err
	}
	merged, err := c.merge(ctx, s, v)
	chunkSize := int64(v.snapshot.Status().ChunkSize)
	if err = errors.Join(err, v.close()); err != nil {
		return err
	}
	report := mergeReport{c.File, c.Origin, merged, int64(merged) * chunkSize, time.Since(start).Seconds()}
	if c.JSON {
		return printJSON(s.stdout, report)
	}
	_, err = fmt.Fprintf(s.stdout, "%s: merged into %s, %s of %s\n", c.File, c.Origin, plural(merged, "chunk"), size.Human(chunkSize))
	return err
}

// merge moves everything to the origin. When ctx ends it stops at the next place where it can go on later.
func (c *cowMergeCmd) merge(ctx context.Context, s *session, v *view) (merged uint64, err error) {
	ended := make(chan error, 1)
	m, err := snapshot.NewMerge(v.snapshot, snapshot.MergeConfig{
		Failed:   func(err error) { ended <- err },
		Finished: func() { ended <- nil },
	})
	if err != nil {
		return 0, err
	}
	chunkSize := int64(v.snapshot.Status().ChunkSize)
	_, total := m.Progress()
	p := c.newProgress(s, c.File, int64(total)*chunkSize)
	defer p.end()
	defer m.Stop()
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	m.Start()
	for {
		select {
		case err := <-ended:
			merged, _ = m.Progress()
			p.reach(int64(merged) * chunkSize)
			return merged, err
		case <-ctx.Done():
			m.Stop()
			merged, _ = m.Progress()
			if m.Finished() {
				return merged, nil
			}
			return merged, fmt.Errorf("%s: interrupted with %d of %s merged: the same command goes on", c.File, merged,
				plural(total, "chunk"))
		case <-ticker.C:
			merged, _ = m.Progress()
			p.reach(int64(merged) * chunkSize)
		}
	}
}
