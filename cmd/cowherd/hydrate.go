package main

import (
	"context"
	"fmt"

	"cowherd/api"
)

type hydrateCmd struct {
	outputFlags
	Name      string `arg:"" complete:"device" help:"Name of the clone."`
	Start     bool   `xor:"run" help:"Copy in the background."`
	Stop      bool   `xor:"run" help:"Copy nothing in the background any more; what is being copied ends."`
	Threshold uint32 `placeholder:"N" help:"Most regions that are copied at the same time."`
	Batch     uint32 `name:"batch-size" placeholder:"N" help:"Most regions in one copy."`
	Retry     bool   `help:"Try again the regions that could not be copied and were given up."`
	Wait      bool   `help:"Wait until everything is hydrated, or hydration cannot go on."`
}

func (hydrateCmd) Help() string {
	return `Without options it only shows how far the clone is.

Examples:

    cowherd hydrate web
    cowherd hydrate web --start --wait
    cowherd hydrate web --stop
    cowherd hydrate web --threshold 512 --batch-size 64
`
}

func (c *hydrateCmd) Run(s *session) error {
	client, err := s.client()
	if err != nil {
		return err
	}
	defer client.Close()
	d, err := c.apply(s, client)
	if err != nil {
		return err
	}
	if c.JSON {
		return printJSON(s.stdout, d)
	}
	_, err = fmt.Fprintf(s.stdout, "%s: %s, %s\n", d.Name, hydrated(d.Clone), hydrationState(d.Clone))
	return err
}

// apply does what the flags say, and gives the clone as it is then.
func (c *hydrateCmd) apply(s *session, client *api.Client) (api.Device, error) {
	// What happens from here on must not be missed.
	from, err := client.Version(s)
	if err != nil {
		return api.Device{}, err
	}
	r := api.HydrationRequest{Threshold: c.Threshold, Batch: c.Batch, Retry: c.Retry}
	if c.Start || c.Stop {
		r.Running = &c.Start
	}
	d, err := client.Hydrate(s, c.Name, r)
	if err == nil && c.Wait {
		d, err = c.wait(s, client, d, from.LastEvent)
	}
	return d, err
}

// wait waits for an event after which there is nothing to wait for.
func (c *hydrateCmd) wait(s *session, client *api.Client, d api.Device, since uint64) (api.Device, error) {
	ctx, cancel := context.WithCancel(s)
	defer cancel()
	if err := c.hopeless(&d); !d.Clone.SourceInUse || err != nil {
		return d, err
	}
	for e, err := range client.Events(ctx, api.EventsQuery{Since: &since, Follow: true}) {
		if err != nil {
			return d, err
		}
		if e.Name != c.Name && e.Type != api.EventMissed {
			continue
		}
		if e.Type == api.EventDeviceDetached {
			return d, fmt.Errorf("%s was detached", c.Name)
		}
		if d, err = client.Device(s, c.Name); err != nil {
			return d, err
		}
		if err := c.hopeless(&d); !d.Clone.SourceInUse || err != nil {
			return d, err
		}
	}
	return d, fmt.Errorf("the daemon has ended, and %s is not hydrated", c.Name)
}

// hopeless is why waiting is of no use, if it is.
func (c *hydrateCmd) hopeless(d *api.Device) error {
	x := d.Clone
	switch {
	case x == nil:
		return fmt.Errorf("%s is not a clone", c.Name)
	case !x.SourceInUse:
		return nil
	case x.Mode != api.CloneReadWrite:
		return fmt.Errorf("%s is in mode %s: %s", c.Name, x.Mode, x.Cause)
	case !x.Running:
		return fmt.Errorf("hydration of %s is stopped", c.Name)
	case x.Stopped:
		return fmt.Errorf("%d regions of %s could not be copied, and hydration has stopped: %s", x.FailedRegions, c.Name, x.FirstError)
	case x.FailedRegions > 0 && x.Hydrated+x.FailedRegions >= x.Regions:
		return fmt.Errorf("%d regions of %s could not be copied: %s", x.FailedRegions, c.Name, x.FirstError)
	}
	return nil
}

// hydrationState is what hydration does, in a word or some.
func hydrationState(x *api.Clone) string {
	switch {
	case !x.SourceInUse:
		return "done, the source is no longer used"
	case x.Mode != api.CloneReadWrite:
		return "mode " + x.Mode
	case x.Stopped:
		return "stopped: too many regions could not be copied"
	case !x.Running:
		return "stopped"
	}
	return "running"
}
