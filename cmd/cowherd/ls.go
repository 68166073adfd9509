package main

import (
	"fmt"
	"strconv"

	"cowherd/api"
	"cowherd/internal/size"
)

type lsCmd struct {
	outputFlags
	Quiet bool `short:"q" help:"Print names only."`
}

func (lsCmd) Help() string {
	return `Examples:

    cowherd ls
    cowherd ls --json | jq -r '.devices[] | select(.state == "invalid") | .name'
`
}

func (c *lsCmd) Run(s *session) error {
	client, err := s.client()
	if err != nil {
		return err
	}
	defer client.Close()
	devices, err := client.Devices(s)
	if err != nil {
		return err
	}
	if c.JSON {
		return printJSON(s.stdout, api.DeviceList{Devices: devices})
	}
	if c.Quiet {
		for i := range devices {
			if _, err := fmt.Fprintln(s.stdout, devices[i].Name); err != nil {
				return err
			}
		}
		return nil
	}
	list := table{right: []bool{false, true, false, true, true, false, true}}
	list.add("NAME", "SIZE", "KIND", "CHUNK", "COW", "STATE", "USERS")
	for i := range devices {
		d := &devices[i]
		var length, chunk, cow string
		if d.State != api.StateLost {
			length = size.Human(d.SizeBytes)
		}
		if x := d.Snapshot; x != nil && d.State != api.StateLost {
			chunk, cow = size.Human(x.ChunkBytes), share(x.AllocatedBytes, x.TotalBytes)
		}
		if x := d.Clone; x != nil {
			chunk = size.Human(x.RegionBytes)
			cow = share(int64(x.Hydrated)*x.RegionBytes, int64(x.Regions)*x.RegionBytes)
		}
		list.add(d.Name, length, d.Kind, chunk, cow, d.State, strconv.Itoa(len(d.Users)))
	}
	return list.write(s.stdout)
}
