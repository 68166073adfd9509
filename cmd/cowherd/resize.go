package main

import (
	"fmt"

	"cowherd/internal/size"
)

type resizeCmd struct {
	outputFlags
	Name string    `arg:"" name:"name@snap" complete:"snapshot" help:"Name of the snapshot."`
	Size size.Size `arg:"" complete:"snapshot" help:"What its store may take from now on: more than before."`
}

func (resizeCmd) Help() string {
	return `A store in a file grows; a block device must have been made that large before. Writes that wait for room
(--on-full throttle) go on.

Examples:

    cowherd resize vm@stable 40GiB
    lvextend -L 40g vg0/vm-cow && cowherd resize vm@stable 40GiB
`
}

func (c *resizeCmd) Run(s *session) error {
	client, err := s.client()
	if err != nil {
		return err
	}
	defer client.Close()
	d, err := client.ResizeSnapshot(s, c.Name, int64(c.Size))
	if err != nil {
		return err
	}
	if c.JSON {
		return printJSON(s.stdout, d)
	}
	_, err = fmt.Fprintf(s.stdout, "%s: resized, %s\n", d.Name, share(d.Snapshot.AllocatedBytes, d.Snapshot.TotalBytes))
	return err
}
