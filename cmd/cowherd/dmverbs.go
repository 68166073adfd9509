package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"time"

	"cowherd/api"
)

type dmCreateCmd struct {
	Name string `arg:"" optional:"" name:"device" help:"Name of the new device."`
	File string `arg:"" optional:"" name:"table_file" complete:"file" help:"File with the table; by default it is read from standard input."`
}

func (c *dmCreateCmd) Run(s *session) error {
	r, err := s.dm()
	if err != nil {
		return err
	}
	defer r.client.Close()
	if r.flags.Concise {
		return r.createConcise(c.Name)
	}
	if c.Name == "" {
		return usagef("please provide a name for the new device")
	}
	table := ""
	if r.flags.Notable && r.flags.Table != "" {
		return usagef("--table and --notable are incompatible")
	}
	if !r.flags.Notable {
		if table, err = r.tableText(c.File); err != nil {
			return err
		}
	}
	name := strings.TrimPrefix(c.Name, mapperDir)
	request := api.DMCreate{Name: name, UUID: r.flags.UUID, Minor: r.flags.Minor}
	if err := r.create(request, api.DMTable{Table: table, ReadOnly: r.flags.Readonly}); err != nil {
		return err
	}
	return r.showVerbose(name)
}

// create makes a device with a live table, or without one if the table has no lines. After an error nothing is left.
func (r *dmRun) create(request api.DMCreate, table api.DMTable) error {
	if err := r.client.DMCreate(r, request); err != nil {
		return err
	}
	if isEmptyTable(table.Table) {
		return nil
	}
	err := r.client.DMLoad(r, request.Name, table)
	if err == nil {
		err = r.client.DMSuspend(r, request.Name, api.DMSuspend{})
	}
	if err != nil {
		err = errors.Join(err, r.client.DMRemove(r, request.Name, false))
	}
	return err
}

// showVerbose shows a device's state with --verbose.
func (r *dmRun) showVerbose(name string) error {
	if r.flags.Verbose == 0 {
		return nil
	}
	devices, _, err := r.devices([]string{name})
	if err != nil {
		return err
	}
	return r.printInfo(&devices[0])
}

type dmRemoveCmd struct {
	Names []string `arg:"" optional:"" name:"device" help:"Names of devices."`
}

// removeTries and removePause are how --retry tries again.
const (
	removeTries = 25
	removePause = 200 * time.Millisecond
)

func (c *dmRemoveCmd) Run(s *session) error {
	r, err := s.dm()
	if err != nil {
		return err
	}
	defer r.client.Close()
	return r.each(c.Names, func(name string) error {
		if r.flags.Force {
			if err := r.wipe(name); err != nil {
				return err
			}
		}
		err := r.client.DMRemove(r, name, r.flags.Deferred)
		for range removeTries {
			if !r.flags.Retry || !errors.Is(err, syscall.EBUSY) {
				break
			}
			time.Sleep(removePause)
			err = r.client.DMRemove(r, name, r.flags.Deferred)
		}
		return err
	})
}

type dmRemoveAllCmd struct{}

func (c *dmRemoveAllCmd) Run(s *session) error {
	r, err := s.dm()
	if err != nil {
		return err
	}
	defer r.client.Close()
	for removed := true; removed; {
		removed = false
		devices, err := r.client.DMDevices(r)
		if err != nil {
			return err
		}
		for i := range devices {
			d := &devices[i]
			switch err := r.removeOne(d); {
			case err == nil:
				removed = removed || !d.Managed && !d.Deferred && !r.flags.Deferred
			case !errors.Is(err, syscall.EBUSY) && !errors.Is(err, syscall.ENXIO):
				return err
			}
		}
	}
	return nil
}

// removeOne removes a device that was made from a table.
func (r *dmRun) removeOne(d *api.DMDevice) error {
	if d.Managed {
		return nil
	}
	if d.Open > 0 && r.flags.Force && !(len(d.Table) == 1 && d.Table[0].Type == "error") {
		if err := r.wipe(d.Name); err != nil {
			return err
		}
	}
	return r.client.DMRemove(r, d.Name, r.flags.Deferred)
}

type dmSuspendCmd struct {
	Names []string `arg:"" optional:"" name:"device" complete:"any" help:"Names of devices."`
}

func (c *dmSuspendCmd) Run(s *session) error {
	r, err := s.dm()
	if err != nil {
		return err
	}
	defer r.client.Close()
	return r.each(c.Names, func(name string) error {
		return r.client.DMSuspend(r, name, api.DMSuspend{Suspended: true, NoFlush: r.flags.Noflush || r.flags.Nolockfs})
	})
}

type dmResumeCmd struct {
	Names []string `arg:"" optional:"" name:"device" complete:"any" help:"Names of devices."`
}

func (c *dmResumeCmd) Run(s *session) error {
	r, err := s.dm()
	if err != nil {
		return err
	}
	defer r.client.Close()
	return r.each(c.Names, func(name string) error {
		return r.client.DMSuspend(r, name, api.DMSuspend{NoFlush: r.flags.Noflush || r.flags.Nolockfs})
	})
}

type dmLoadCmd struct {
	Name string `arg:"" optional:"" name:"device" help:"Name of the device."`
	File string `arg:"" optional:"" name:"table_file" complete:"file" help:"File with the table; by default it is read from standard input."`
}

func (c *dmLoadCmd) Run(s *session) error {
	r, err := s.dm()
	if err != nil {
		return err
	}
	defer r.client.Close()
	name, err := r.name(c.Name)
	if err != nil {
		return err
	}
	table, err := r.tableText(c.File)
	if err != nil {
		return err
	}
	return r.client.DMLoad(r, name, api.DMTable{Table: table, ReadOnly: r.flags.Readonly})
}

type dmClearCmd struct {
	Name string `arg:"" optional:"" name:"device" help:"Name of the device."`
}

func (c *dmClearCmd) Run(s *session) error {
	r, err := s.dm()
	if err != nil {
		return err
	}
	defer r.client.Close()
	return r.each([]string{c.Name}, func(name string) error { return r.client.DMClear(r, name) })
}

type dmWipeCmd struct {
	Names []string `arg:"" optional:"" name:"device" help:"Names of devices."`
}

func (c *dmWipeCmd) Run(s *session) error {
	r, err := s.dm()
	if err != nil {
		return err
	}
	defer r.client.Close()
	return r.each(c.Names, r.wipe)
}

// wipe puts a table of the same length in place that fails all I/O.
func (r *dmRun) wipe(name string) error {
	devices, _, err := r.devices([]string{name})
	if err != nil {
		return err
	}
	length := devices[0].SizeBytes / 512
	if length == 0 {
		return nil
	}
	if err := r.client.DMLoad(r, name, api.DMTable{Table: fmt.Sprintf("0 %d error", length)}); err != nil {
		return err
	}
	return r.client.DMSuspend(r, name, api.DMSuspend{NoFlush: r.flags.Noflush || r.flags.Nolockfs})
}

type dmRenameCmd struct {
	Name string `arg:"" name:"device" help:"Name of the device."`
	To   string `arg:"" name:"new_name" help:"Its new name or, with --setuuid, its UUID."`
}

func (c *dmRenameCmd) Run(s *session) error {
	r, err := s.dm()
	if err != nil {
		return err
	}
	defer r.client.Close()
	name, err := r.name(c.Name)
	if err != nil {
		return err
	}
	request := api.DMRename{Name: strings.TrimPrefix(c.To, mapperDir)}
	if r.flags.Setuuid {
		request = api.DMRename{UUID: c.To}
	}
	return r.client.DMRename(r, name, request)
}

type dmMessageCmd struct {
	Name   string   `arg:"" name:"device" help:"Name of the device."`
	Sector uint64   `arg:"" name:"sector" help:"A sector of the target; 0 if there is just one."`
	Words  []string `arg:"" name:"message" passthrough:"" help:"The message."`
}

func (c *dmMessageCmd) Run(s *session) error {
	r, err := s.dm()
	if err != nil {
		return err
	}
	defer r.client.Close()
	name, err := r.name(c.Name)
	if err != nil {
		return err
	}
	words := strings.Fields(strings.Join(c.Words, " "))
	answer, err := r.client.DMMessage(r, name, api.DMMessage{Sector: c.Sector, Words: words})
	if err != nil || answer == "" {
		return err
	}
	_, err = fmt.Fprintln(r.stdout, answer)
	return err
}

type dmWaitCmd struct {
	Name  string `arg:"" name:"device" help:"Name of the device."`
	Event string `arg:"" optional:"" name:"event_nr" help:"Wait until the number of events is another; 0 by default."`
}

func (c *dmWaitCmd) Run(s *session) error {
	r, err := s.dm()
	if err != nil {
		return err
	}
	defer r.client.Close()
	name, err := r.name(c.Name)
	if err != nil {
		return err
	}
	seen := uint64(0)
	if c.Event != "" {
		if seen, err = strconv.ParseUint(c.Event, 10, 32); err != nil {
			return usagef("event_nr %q: a number is wanted", c.Event)
		}
	}
	event, err := r.client.DMWait(r, name, uint32(seen))
	if err != nil || r.flags.Verbose == 0 {
		return err
	}
	_, err = fmt.Fprintf(r.stdout, "Event number:      %d\n", event)
	return err
}

type dmNothingCmd struct {
	Words []string `arg:"" optional:"" name:"word"`
}

// Run has nothing to do: there are no nodes, and no udev.
func (dmNothingCmd) Run(*session) error { return nil }
