package main

import (
	"fmt"

	"cowherd/api"
)

type versionCmd struct {
	outputFlags
}

func (versionCmd) Help() string {
	return `The daemon's version is left out when none answers.

Example:

    cowherd version --json
`
}

// versions is what the command prints as JSON.
type versions struct {
	Version string       `json:"version"`
	Daemon  *api.Version `json:"daemon,omitempty"`
}

func (c *versionCmd) Run(s *session) error {
	v := versions{Version: orUnknown(version)}
	if client := s.clientIfThere(); client != nil {
		defer client.Close()
		if daemon, err := client.Version(s); err == nil {
			v.Daemon = &daemon
		}
	}
	if c.JSON {
		return printJSON(s.stdout, v)
	}
	text := "cowherd " + v.Version + "\n"
	if v.Daemon != nil {
		text += fmt.Sprintf("daemon  %s, process %d\n", orUnknown(v.Daemon.Version), v.Daemon.PID)
	}
	_, err := fmt.Fprint(s.stdout, text)
	return err
}
