package main

import (
	"errors"
	"fmt"
	"syscall"
)

// complete tells what is missing on a command line that makes a clone.
func (c *cloneCmd) complete() error {
	switch {
	case c.Wait:
		return usagef("--wait is for --detach-source; \"cowherd hydrate %s --wait\" waits for a clone", c.Name)
	case c.Destination == "":
		return usageError{errors.New("expected \"<name> <destination>\"")}
	case c.From == "":
		return usageError{errors.New("missing flags: --from=SRC")}
	}
	return nil
}

// detachSource is the command with --detach-source.
func (c *cloneCmd) detachSource(s *session) error {
	alone := cloneCmd{
		outputFlags: c.outputFlags, Name: c.Name, DetachSource: true, Wait: c.Wait,
		PromoteOnRead: c.PromoteOnRead, Order: c.Order, // which are never empty
	}
	if *c != alone {
		return usagef("--detach-source is for a clone that is there: it takes its name, --wait and --json, and nothing else")
	}
	client, err := s.client()
	if err != nil {
		return err
	}
	defer client.Close()
	if c.Wait {
		hydrate := hydrateCmd{Name: c.Name, Start: true, Wait: true}
		if _, err := hydrate.apply(s, client); err != nil {
			return err
		}
	}
	d, err := client.DetachSource(s, c.Name)
	if errors.Is(err, syscall.EBUSY) && !c.Wait {
		err = fmt.Errorf("%w (--wait hydrates the rest first)", err)
	}
	if err != nil {
		return err
	}
	if c.JSON {
		return printJSON(s.stdout, d)
	}
	_, err = fmt.Fprintf(s.stdout, "%s: detached from %s, %s\n", d.Name, d.Clone.Source, hydrated(d.Clone))
	return err
}
