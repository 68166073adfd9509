package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"cowherd/api"
)

type mergeCmd struct {
	outputFlags
	Name string `arg:"" name:"name@snap" complete:"snapshot" help:"Name of a persistent snapshot."`
	Wait bool   `help:"Wait for the end of the merge, and show how far it is."`
	Stop bool   `help:"Stop a merge that runs. The same command without this flag lets it go on."`
}

func (mergeCmd) Help() string {
	return `What the snapshot shows becomes what the live device holds, while both are in use: from the first moment on
the device shows what the snapshot does, and in the background chunks are copied back. At the end the
snapshot is dropped. Other snapshots of the device stay as they are.

Examples:

    cowherd merge vm@before-upgrade
    cowherd merge vm@before-upgrade --wait
    cowherd merge vm@before-upgrade --stop
`
}

func (c *mergeCmd) Run(s *session) error {
	if c.Wait && c.Stop {
		return usagef("--wait and --stop contradict each other")
	}
	client, err := s.client()
	if err != nil {
		return err
	}
	defer client.Close()
	v, err := client.Version(s) // the merge may end before anything else is asked
	if err != nil {
		return err
	}
	d, err := client.MergeSnapshot(s, c.Name, !c.Stop)
	if err != nil {
		return err
	}
	if c.Wait {
		if err := c.wait(s, client, v.LastEvent); err != nil {
			return err
		}
		return c.printDone(s, c.Name, "merged")
	}
	if c.JSON {
		return printJSON(s.stdout, d)
	}
	_, err = fmt.Fprintf(s.stdout, "%s: %s\n", c.Name, mergeState(&d))
	return err
}

// mergeState is how far a merge has come, for people.
func mergeState(d *api.Device) string {
	if d.Snapshot == nil || d.Snapshot.Merge == nil {
		return "merged"
	}
	m := d.Snapshot.Merge
	text := fmt.Sprintf("merging, %d of %d chunks", m.MergedChunks, m.TotalChunks)
	switch {
	case m.Failed != "":
		return "merge failed: " + m.Failed
	case !m.Running:
		return "merge stopped, " + text[len("merging, "):]
	}
	return text
}

// progressInterval is how often a terminal is told how far a merge is.
const progressInterval = 200 * time.Millisecond

// wait returns when an event behind number since tells the end of the merge.
func (c *mergeCmd) wait(s *session, client *api.Client, since uint64) error {
	if isTerminal(s.stderr) {
		ctx, stop := context.WithCancel(s)
		shown := make(chan struct{})
		go func() {
			defer close(shown)
			c.showProgress(ctx, client, s.stderr)
		}()
		defer func() {
			stop()
			<-shown
		}()
	}
	for e, err := range client.Events(s, api.EventsQuery{Since: &since, Follow: true}) {
		switch {
		case err != nil:
			return err
		case e.Name != c.Name:
		case e.Type == api.EventMergeFinished:
			// Then the snapshot goes, at once unless somebody still has it open.
			if d, err := client.Device(s, c.Name); err != nil || len(d.Users) > 0 {
				return nil
			}
		case e.Type == api.EventSnapshotRemoved:
			return nil
		case e.Type == api.EventMergeFailed:
			return fmt.Errorf("merge %q: %s", c.Name, e.Cause)
		case e.Type == api.EventMergeStopped:
			return fmt.Errorf("merge %q: it was stopped", c.Name)
		}
	}
	return errors.New("the daemon has stopped; it goes on with the merge when it is started again")
}

// showProgress draws a bar until ctx ends.
func (c *mergeCmd) showProgress(ctx context.Context, client *api.Client, w io.Writer) {
	tick := time.NewTicker(progressInterval)
	defer tick.Stop()
	defer fmt.Fprint(w, "\r\x1b[K")
	for {
		d, err := client.Device(ctx, c.Name)
		if err == nil && d.Snapshot != nil && d.Snapshot.Merge != nil {
			m := d.Snapshot.Merge
			fmt.Fprintf(w, "\r\x1b[K%s  %s", bar(m.MergedChunks, m.TotalChunks), mergeState(&d))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// barWidth is the number of characters of a bar.
const barWidth = 40

// bar shows a part of a whole.
func bar(part, whole uint64) string {
	filled := barWidth
	if whole > 0 {
		filled = int(barWidth * min(part, whole) / whole)
	}
	text := make([]byte, barWidth)
	for i := range text {
		text[i] = ' '
		if i < filled {
			text[i] = '='
		}
	}
	return "[" + string(text) + "]"
}
