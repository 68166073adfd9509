package main

import (
	"io"
	"strings"

	"cowherd/api"
)

// splitName takes a name apart as LVM puts it together: volume group, logical volume and layer, with hyphens between and
// those within doubled. What stands behind a third hyphen is passed over.
func splitName(name string) (parts [3]string) {
	part := 0
	for i := 0; i < len(name) && part < len(parts); i++ {
		switch {
		case strings.HasPrefix(name[i:], "--"):
			parts[part] += "-"
			i++
		case name[i] == '-':
			part++
		default:
			parts[part] += name[i : i+1]
		}
	}
	return parts
}

// componentColumns are the columns of a name's parts; those of "splitname" without --options are the last three.
var componentColumns = []dmColumn{
	{"subsystem", "Subsys", 6, false, func(d *api.DMDevice, _ []api.DMDevice) string {
		subsystem, _, ok := strings.Cut(d.UUID, "-")
		return either(ok, subsystem, "")
	}},
	{"vg_name", "VG", 4, false, func(d *api.DMDevice, _ []api.DMDevice) string { return componentOf(d, 0) }},
	{"lv_name", "LV", 4, false, func(d *api.DMDevice, _ []api.DMDevice) string { return componentOf(d, 1) }},
	{"lv_layer", "LVLayer", 7, false, func(d *api.DMDevice, _ []api.DMDevice) string { return componentOf(d, 2) }},
}

// componentOf is a part of the name of a device that is LVM's by its UUID.
func componentOf(d *api.DMDevice, part int) string {
	if !strings.HasPrefix(d.UUID, "LVM-") {
		return ""
	}
	return splitName(d.Name)[part]
}

type dmSplitCmd struct {
	Name      string `arg:"" name:"device" help:"Name of a device, which need not exist."`
	Subsystem string `arg:"" optional:"" name:"subsystem" help:"Whose names: LVM (the default), or others, of which nothing is known."`
}

// Run needs no daemon.
func (c *dmSplitCmd) Run(s *session) error {
	r := &dmRun{session: s, flags: &s.cli.Dm.dmFlags}
	if r.flags.Options == "" {
		r.flags.Options = "vg_name,lv_name,lv_layer"
	}
	columns, err := r.columns()
	if err != nil {
		return err
	}
	d := api.DMDevice{Name: strings.TrimPrefix(c.Name, mapperDir)}
	if c.Subsystem == "" || strings.EqualFold(c.Subsystem, "LVM") {
		d.UUID = "LVM-"
	}
	row := make([]string, len(columns))
	for i, x := range columns {
		row[i] = r.cell(x, x.value(&d, nil))
	}
	_, err = io.WriteString(s.stdout, r.layOut(columns, [][]string{row}))
	return err
}
