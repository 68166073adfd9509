package main

import (
	"fmt"
	"strings"

	"cowherd/api"
	"cowherd/internal/size"
)

type attachCmd struct {
	outputFlags
	Name     string `arg:"" help:"Name of the device, and of its export: letters, digits, dots, underscores, dashes."`
	Device   string `arg:"" complete:"file" help:"An image file or block device, mem:SIZE, or null:SIZE[,latency=TIME][,block=SIZE][,memory]."`
	ReadOnly bool   `help:"Refuse writes."`
	Direct   bool   `help:"Do I/O past the page cache (O_DIRECT)."`
}

func (attachCmd) Help() string {
	return `Examples:

    cowherd attach vm /var/lib/images/vm.img
    cowherd attach data /dev/vg0/data --direct
    cowherd attach scratch mem:2GiB
    cowherd attach null null:1T,latency=50us
`
}

func (c *attachCmd) Run(s *session) error {
	device, err := deviceArgument(c.Device)
	if err != nil {
		return err
	}
	client, err := s.client()
	if err != nil {
		return err
	}
	defer client.Close()
	made, err := client.Attach(s, api.AttachRequest{
		Name: c.Name, Device: device, ReadOnly: c.ReadOnly, Direct: c.Direct,
	})
	if err != nil {
		return err
	}
	if c.JSON {
		return printJSON(s.stdout, made)
	}
	_, err = fmt.Fprintf(s.stdout, "%s: attached, %s%s\n", made.Name, size.Human(made.SizeBytes), where(made))
	return err
}

// where is the export of a device, for the end of a line.
func where(d api.Device) string {
	if len(d.URIs) == 0 {
		return ""
	}
	return ", " + strings.Join(d.URIs, " ")
}
