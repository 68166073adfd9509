package main

import "fmt"

type detachCmd struct {
	outputFlags
	Name string `arg:"" complete:"device" help:"Name of the device."`
}

func (detachCmd) Help() string {
	return `A device that has snapshots or is in use is refused.

Example:

    cowherd detach vm
`
}

func (c *detachCmd) Run(s *session) error {
	client, err := s.client()
	if err != nil {
		return err
	}
	defer client.Close()
	if err := client.Detach(s, c.Name); err != nil {
		return err
	}
	return c.printDone(s, c.Name, "detached")
}

// printDone tells of something that has no other result.
func (o *outputFlags) printDone(s *session, name, what string) error {
	if o.JSON {
		return printJSON(s.stdout, map[string]string{"name": name, "result": what})
	}
	_, err := fmt.Fprintf(s.stdout, "%s: %s\n", name, what)
	return err
}
