package main

import (
	"encoding/json"
	"fmt"
	"strings"

	"cowherd/api"
)

type eventsCmd struct {
	outputFlags
	Follow bool    `default:"true" negatable:"" help:"Wait for more (the default)."`
	Since  *uint64 `placeholder:"SEQ" help:"Begin behind the event of this number; 0: with the oldest that is kept."`
}

func (eventsCmd) Help() string {
	return `Without --since, events are shown from now on, or with --no-follow all that are kept. With --json each
event is a line of JSON.

Examples:

    cowherd events
    cowherd events --since 0 --no-follow
    cowherd events --json | jq --unbuffered 'select(.type == "snapshot-invalid")'
`
}

func (c *eventsCmd) Run(s *session) error {
	client, err := s.client()
	if err != nil {
		return err
	}
	defer client.Close()
	lines := json.NewEncoder(s.stdout)
	for e, err := range client.Events(s, api.EventsQuery{Since: c.Since, Follow: c.Follow}) {
		if err == nil && c.JSON {
			err = lines.Encode(e)
		} else if err == nil {
			_, err = fmt.Fprintln(s.stdout, eventLine(&e))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// eventLine is an event for people.
func eventLine(e *api.Event) string {
	line := fmt.Sprintf("%6d  %s  %-19s  %s", e.Seq, localTime(e.Time), e.Type, e.Name)
	if e.Client != "" {
		line += "  " + e.Client
	}
	if e.Cause != "" {
		line += "  " + e.Cause
	}
	if e.Percent > 0 {
		line += fmt.Sprintf("  %d%%", e.Percent)
	}
	if e.Missed > 0 {
		line += fmt.Sprintf("%d events are no longer kept", e.Missed)
	}
	return strings.TrimRight(line, " ")
}
