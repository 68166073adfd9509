package main

type rmCmd struct {
	outputFlags
	Name  string `arg:"" name:"name@snap" complete:"snapshot" help:"Name of the snapshot."`
	Force bool   `help:"Disconnect the clients that use it. Forget one that is lost although its store cannot be made invalid."`
}

func (rmCmd) Help() string {
	return `A snapshot that is in use is refused, and its users are named, unless --force is given. What it has
copied is lost.

Examples:

    cowherd rm vm@nightly
    cowherd rm vm@nightly --force
`
}

func (c *rmCmd) Run(s *session) error {
	client, err := s.client()
	if err != nil {
		return err
	}
	defer client.Close()
	if err := client.RemoveSnapshot(s, c.Name, c.Force); err != nil {
		return err
	}
	return c.printDone(s, c.Name, "removed")
}
