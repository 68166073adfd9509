package main

import (
	"fmt"
	"slices"
	"strings"
	"syscall"

	"cowherd/api"
)

// noDevices is what is printed where there is nothing to show.
const noDevices = "No devices found"

// list runs show for the devices that the arguments name, or for all that are selected, and says so when there are none.
// With more than one, prefix is the name with a colon.
func (r *dmRun) list(args []string, show func(d *api.DMDevice, prefix string) error) error {
	devices, all, err := r.devices(args)
	if err != nil {
		return err
	}
	if len(devices) > 0 && all && r.flags.Select != "" {
		if devices, err = r.selected(); err != nil || len(devices) == 0 && !r.json {
			return err
		}
	}
	if r.json {
		return printJSON(r.stdout, api.DMDeviceList{Devices: devices})
	}
	if len(devices) == 0 {
		_, err := fmt.Fprintln(r.stdout, noDevices)
		return err
	}
	for i := range devices {
		prefix := ""
		if all || len(devices) > 1 {
			prefix = devices[i].Name + ": "
		}
		if err := show(&devices[i], prefix); err != nil {
			return err
		}
	}
	return nil
}

type dmTableCmd struct {
	Names []string `arg:"" optional:"" name:"device" complete:"any" help:"Names of devices; all by default."`
}

func (c *dmTableCmd) Run(s *session) error {
	r, err := s.dm()
	if err != nil {
		return err
	}
	defer r.client.Close()
	if r.flags.Concise {
		devices, _, err := r.devices(c.Names)
		if err != nil {
			return err
		}
		return r.printConcise(devices)
	}
	return r.list(c.Names, func(d *api.DMDevice, prefix string) error {
		return r.printTargets(d, prefix, func(t *api.DMTarget) string { return t.Table })
	})
}

type dmStatusCmd struct {
	Names []string `arg:"" optional:"" name:"device" complete:"any" help:"Names of devices; all by default."`
}

func (c *dmStatusCmd) Run(s *session) error {
	r, err := s.dm()
	if err != nil {
		return err
	}
	defer r.client.Close()
	return r.list(c.Names, func(d *api.DMDevice, prefix string) error {
		return r.printTargets(d, prefix, func(t *api.DMTarget) string { return t.Status })
	})
}

// printTargets prints a line for each target; a device without a table has an empty one. Behind its state, with --verbose,
// a device need not be named again.
func (r *dmRun) printTargets(d *api.DMDevice, prefix string, what func(*api.DMTarget) string) error {
	targets := d.Table
	if r.flags.Inactive {
		targets = d.InactiveTable
	}
	isOne := prefix == ""
	if r.flags.Verbose > 0 {
		prefix = ""
	}
	var b strings.Builder
	shown := false
	for i := range targets {
		t := &targets[i]
		if r.flags.Target == "" || r.flags.Target == t.Type {
			fmt.Fprintf(&b, "%s%d %d %s %s\n", prefix, t.Start, t.Length, t.Type, what(t))
			shown = true
		}
	}
	if r.flags.Target == "" && len(targets) == 0 {
		b.WriteString(prefix + "\n")
		shown = true
	}
	if shown && r.flags.Verbose > 0 {
		if err := r.printInfo(d); err != nil {
			return err
		}
		if !isOne {
			b.WriteByte('\n')
		}
	}
	_, err := fmt.Fprint(r.stdout, b.String())
	return err
}

type dmInfoCmd struct {
	Names []string `arg:"" optional:"" name:"device" complete:"any" help:"Names of devices; all by default."`
}

func (c *dmInfoCmd) Run(s *session) error {
	r, err := s.dm()
	if err != nil {
		return err
	}
	defer r.client.Close()
	if !r.json && (r.flags.Columns || r.flags.ColumnsToo || r.flags.Options != "") {
		return r.printColumns(c.Names)
	}
	r.flags.Select = "" // as dmsetup has it
	return r.list(c.Names, func(d *api.DMDevice, _ string) error { return r.printInfo(d) })
}

// printInfo prints the state of a device, and an empty line.
func (r *dmRun) printInfo(d *api.DMDevice) error {
	state, tables := "ACTIVE", "None"
	if d.Suspended {
		state = "SUSPENDED"
	}
	if d.ReadOnly {
		state += " (READ-ONLY)"
	}
	if d.Deferred {
		state += " (DEFERRED REMOVE)"
	}
	switch {
	case d.Live && d.Inactive:
		tables = "LIVE & INACTIVE"
	case d.Live:
		tables = "LIVE"
	case d.Inactive:
		tables = "INACTIVE"
	}
	uuid := ""
	if d.UUID != "" {
		uuid = "UUID: " + d.UUID + "\n"
	}
	_, err := fmt.Fprintf(r.stdout, `Name:              %s
State:             %s
Tables present:    %s
Open count:        %d
Event number:      %d
Major, minor:      %d, %d
Number of targets: %d
%s
`, d.Name, state, tables, d.Open, d.Event, d.Major, d.Minor, len(d.Table), uuid)
	return err
}

type dmDepsCmd struct {
	Names []string `arg:"" optional:"" name:"device" complete:"any" help:"Names of devices; all by default."`
}

func (c *dmDepsCmd) Run(s *session) error {
	r, err := s.dm()
	if err != nil {
		return err
	}
	defer r.client.Close()
	name, err := r.naming("%d, %d")
	if err != nil {
		return err
	}
	return r.list(c.Names, func(d *api.DMDevice, prefix string) error {
		end := ""
		if r.flags.Verbose > 0 {
			if err := r.printInfo(d); err != nil {
				return err
			}
			prefix, end = "", either(prefix == "", "", "\n")
		}
		line := fmt.Sprintf("%s%d dependencies\t:", prefix, len(d.Dependencies))
		for _, dep := range d.Dependencies {
			line += " (" + name(dep) + ")"
		}
		_, err := fmt.Fprintln(r.stdout, line+end)
		return err
	})
}

// naming is how --options says that devices are named; numbers is the format of their numbers.
func (r *dmRun) naming(numbers string) (func(api.DMDep) string, error) {
	switch r.flags.Options {
	case "", "devno":
		return func(d api.DMDep) string { return fmt.Sprintf(numbers, d.Major, d.Minor) }, nil
	case "devname":
		return func(d api.DMDep) string { return d.Name }, nil
	case "blkdevname":
		return blkdevname, nil
	}
	return nil, usagef("--options %q: devno, blkdevname or devname is wanted", r.flags.Options)
}

// mappedMajor is the major number of devices of the daemon.
const mappedMajor = 253

// blkdevname is what the kernel would call a mapped device, and the name of another one.
func blkdevname(d api.DMDep) string {
	if d.Major == mappedMajor {
		return fmt.Sprintf("dm-%d", d.Minor)
	}
	return strings.TrimPrefix(d.Name, "/dev/")
}

type dmLsCmd struct{}

func (c *dmLsCmd) Run(s *session) error {
	r, err := s.dm()
	if err != nil {
		return err
	}
	defer r.client.Close()
	numbers := "%d:%d"
	if r.flags.Target != "" {
		numbers, r.flags.Options = "%d, %d", ""
	}
	name, err := r.naming(numbers)
	if r.flags.Tree {
		err = r.checkTreeOptions()
	}
	if err != nil {
		return err
	}
	devices, err := r.client.DMDevices(r)
	if err != nil {
		return err
	}
	if t := r.flags.Target; t != "" {
		devices = slices.DeleteFunc(devices, func(d api.DMDevice) bool {
			return !slices.ContainsFunc(d.Table, func(x api.DMTarget) bool { return x.Type == t })
		})
	}
	switch {
	case r.json:
		return printJSON(r.stdout, api.DMDeviceList{Devices: devices})
	case len(devices) == 0:
		_, err := fmt.Fprintln(r.stdout, noDevices)
		return err
	case r.flags.Tree:
		return r.printTree(devices)
	}
	for i := range devices {
		d := &devices[i]
		as := name(depOf(d))
		if !d.Live && r.flags.Options != "" { // the kernel's device gets other names with its first table
			as = fmt.Sprintf("%d:%d", d.Major, d.Minor)
		}
		if _, err := fmt.Fprintf(r.stdout, "%s\t(%s)\n", d.Name, as); err != nil {
			return err
		}
	}
	return nil
}

// depOf is a device as others that lie on it see it.
func depOf(d *api.DMDevice) api.DMDep { return api.DMDep{Name: d.Name, Major: d.Major, Minor: d.Minor} }

type dmTargetsCmd struct{}

func (c *dmTargetsCmd) Run(s *session) error {
	r, err := s.dm()
	if err != nil {
		return err
	}
	defer r.client.Close()
	types, err := r.client.DMTypes(r)
	if err != nil {
		return err
	}
	if r.json {
		return printJSON(r.stdout, api.DMTypeList{Types: types})
	}
	for _, t := range types {
		if err := r.printType(t); err != nil {
			return err
		}
	}
	return nil
}

// printType prints a type of target and its version.
func (r *dmRun) printType(t api.DMType) error {
	v := t.Version
	_, err := fmt.Fprintf(r.stdout, "%-16s v%d.%d.%d\n", t.Name, v[0], v[1], v[2])
	return err
}

type dmTypeCmd struct {
	Types []string `arg:"" name:"target" help:"Types of targets."`
}

func (c *dmTypeCmd) Run(s *session) error {
	r, err := s.dm()
	if err != nil {
		return err
	}
	defer r.client.Close()
	types, err := r.client.DMTypes(r)
	if err != nil {
		return err
	}
	for _, name := range c.Types {
		i := slices.IndexFunc(types, func(t api.DMType) bool { return t.Name == name })
		if i < 0 {
			return fmt.Errorf("target-version: there is no type %q: %w", name, syscall.EINVAL)
		}
		if err := r.printType(types[i]); err != nil {
			return err
		}
	}
	return nil
}

// Versions of what the verbs do as: of dmsetup's library, and of the kernel's interface.
const (
	libraryVersion = "1.02.185 (2022-05-18)"
	driverVersion  = "4.48.0"
)

type dmVersionCmd struct{}

func (c *dmVersionCmd) Run(s *session) error {
	if s.cli.Dm.JSON {
		return printJSON(s.stdout, map[string]string{"library": libraryVersion, "driver": driverVersion})
	}
	_, err := fmt.Fprintf(s.stdout, "Library version:   %s\nDriver version:    %s\n", libraryVersion, driverVersion)
	return err
}
