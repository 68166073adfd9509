package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"cowherd/api"
)

// dmColumn is a column of "dm info -c".
type dmColumn struct {
	id, heading string
	width       int
	right       bool
	value       func(d *api.DMDevice, all []api.DMDevice) string
}

// dmColumns are the columns that there are.
var dmColumns = []dmColumn{
	{"name", "Name", 16, false, nameValue},
	{"mangled_name", "MangledName", 16, false, nameValue},
	{"unmangled_name", "UnmangledName", 16, false, nameValue},
	{"uuid", "UUID", 32, false, uuidValue},
	{"mangled_uuid", "MangledUUID", 32, false, uuidValue},
	{"unmangled_uuid", "UnmangledUUID", 32, false, uuidValue},
	{"blkdevname", "BlkDevName", 16, false, func(d *api.DMDevice, _ []api.DMDevice) string { return blkdevname(depOf(d)) }},
	{"attr", "Stat", 4, false, attrValue},
	{"tables_loaded", "Tables", 6, false, tablesValue},
	{"suspended", "Suspended", 9, false, func(d *api.DMDevice, _ []api.DMDevice) string {
		return either(d.Suspended, "Suspended", "Active")
	}},
	{"readonly", "Read-only", 9, false, func(d *api.DMDevice, _ []api.DMDevice) string {
		return either(d.ReadOnly, "Read-only", "Writeable")
	}},
	{"devno", "DevNo", 5, false, func(d *api.DMDevice, _ []api.DMDevice) string { return treeKey(depOf(d)) }},
	{"major", "Maj", 3, true, func(d *api.DMDevice, _ []api.DMDevice) string { return fmt.Sprint(d.Major) }},
	{"minor", "Min", 3, true, func(d *api.DMDevice, _ []api.DMDevice) string { return fmt.Sprint(d.Minor) }},
	{"open", "Open", 4, true, func(d *api.DMDevice, _ []api.DMDevice) string { return fmt.Sprint(d.Open) }},
	{"segments", "Targ", 4, true, func(d *api.DMDevice, _ []api.DMDevice) string { return fmt.Sprint(len(d.Table)) }},
	{"events", "Event", 6, true, func(d *api.DMDevice, _ []api.DMDevice) string { return fmt.Sprint(d.Event) }},
	{"device_count", "#Devs", 5, true, func(d *api.DMDevice, _ []api.DMDevice) string {
		return fmt.Sprint(len(d.Dependencies))
	}},
	{"devs_used", "DevNamesUsed", 16, false, func(d *api.DMDevice, _ []api.DMDevice) string {
		mapped := slices.DeleteFunc(slices.Clone(d.Dependencies), func(x api.DMDep) bool { return x.Major != mappedMajor })
		return joinDeps(mapped, func(x api.DMDep) string { return x.Name })
	}},
	{"devnos_used", "DevNosUsed", 16, false, func(d *api.DMDevice, _ []api.DMDevice) string {
		return joinDeps(d.Dependencies, treeKey)
	}},
	{"blkdevs_used", "BlkDevNamesUsed", 16, false, func(d *api.DMDevice, _ []api.DMDevice) string {
		return joinDeps(d.Dependencies, blkdevname)
	}},
	{"device_ref_count", "#Refs", 5, true, func(d *api.DMDevice, all []api.DMDevice) string {
		return fmt.Sprint(len(usersOf(d, all)))
	}},
	{"names_using_dev", "RefNames", 5, false, func(d *api.DMDevice, all []api.DMDevice) string {
		return joinDeps(usersOf(d, all), func(x api.DMDep) string { return x.Name })
	}},
	{"devnos_using_dev", "RefDevNos", 9, false, func(d *api.DMDevice, all []api.DMDevice) string {
		return joinDeps(usersOf(d, all), treeKey)
	}},
}

// usualColumns are those without --options.
const usualColumns = "name,major,minor,attr,open,segments,events,uuid"

func nameValue(d *api.DMDevice, _ []api.DMDevice) string { return d.Name }

func uuidValue(d *api.DMDevice, _ []api.DMDevice) string { return d.UUID }

// attrValue is four letters: (L)ive, (I)nactive, (s)uspended, (r)ead-only or read-(w)rite.
func attrValue(d *api.DMDevice, _ []api.DMDevice) string {
	return either(d.Live, "L", "-") + either(d.Inactive, "I", "-") + either(d.Suspended, "s", "-") +
		either(d.ReadOnly, "r", "w")
}

func tablesValue(d *api.DMDevice, _ []api.DMDevice) string {
	switch {
	case d.Live && d.Inactive:
		return "Both"
	case d.Live:
		return "Live"
	case d.Inactive:
		return "Inactive"
	}
	return "None"
}

// usersOf are the devices that lie on d.
func usersOf(d *api.DMDevice, all []api.DMDevice) []api.DMDep {
	var users []api.DMDep
	for i := range all {
		if slices.ContainsFunc(all[i].Dependencies, func(x api.DMDep) bool { return treeKey(x) == treeKey(depOf(d)) }) {
			users = append(users, depOf(&all[i]))
		}
	}
	return users
}

func joinDeps(deps []api.DMDep, name func(api.DMDep) string) string {
	var names []string
	for _, x := range deps {
		names = append(names, name(x))
	}
	return strings.Join(names, ",")
}

// findColumn finds a column by its name, in which underscores do not count.
func findColumn(name string) (*dmColumn, error) {
	plain := func(s string) string { return strings.ReplaceAll(s, "_", "") }
	for _, columns := range [][]dmColumn{dmColumns, componentColumns} {
		for i := range columns {
			if plain(columns[i].id) == plain(name) {
				return &columns[i], nil
			}
		}
	}
	return nil, usagef("unrecognised field: %s: \"cowherd dm help -c\" lists them", name)
}

// columns are those that --options chooses.
func (r *dmRun) columns() ([]*dmColumn, error) {
	list := r.flags.Options
	if more, ok := strings.CutPrefix(list, "+"); ok || list == "" {
		list = strings.TrimSuffix(usualColumns+","+more, ",")
	}
	var columns []*dmColumn
	for name := range strings.SplitSeq(list, ",") {
		if name == "selected" {
			c, err := r.selectedColumn()
			if err != nil {
				return nil, err
			}
			columns = append(columns, c)
			continue
		}
		c, err := findColumn(name)
		if err != nil {
			return nil, err
		}
		columns = append(columns, c)
	}
	return columns, nil
}

// selectedColumn tells which devices --select wants, of all.
func (r *dmRun) selectedColumn() (*dmColumn, error) {
	wanted, err := parseSelection(r.flags.Select)
	return &dmColumn{"selected", "Selected", 8, true, func(d *api.DMDevice, all []api.DMDevice) string {
		return either(wanted(d, all), "1", "0")
	}}, err
}

// printColumns prints a line for each device.
func (r *dmRun) printColumns(args []string) error {
	columns, err := r.columns()
	if err != nil {
		return err
	}
	devices, _, err := r.devices(args)
	if err != nil {
		return err
	}
	if len(devices) == 0 {
		_, err := fmt.Fprintln(r.stdout, noDevices)
		return err
	}
	all, err := r.client.DMDevices(r)
	if err != nil {
		return err
	}
	if err := r.sortDevices(devices, all); err != nil {
		return err
	}
	wanted, err := parseSelection(r.flags.Select)
	if err != nil {
		return err
	}
	showsAll := slices.ContainsFunc(columns, func(c *dmColumn) bool { return c.id == "selected" })
	var rows [][]string
	for i := range devices {
		if !showsAll && !wanted(&devices[i], all) {
			continue
		}
		row := make([]string, len(columns))
		for k, c := range columns {
			row[k] = r.cell(c, c.value(&devices[i], all))
		}
		rows = append(rows, row)
	}
	if len(rows) == 0 {
		return nil
	}
	_, err = io.WriteString(r.stdout, r.layOut(columns, rows))
	return err
}

// cell is a value of a column, with its name if that is wanted.
func (r *dmRun) cell(c *dmColumn, value string) string {
	if !r.flags.Nameprefixes {
		return value
	}
	quote := either(r.flags.Unquoted, "", "'")
	return "DM_" + strings.ToUpper(c.id) + "=" + quote + value + quote
}

// sortDevices sorts by --sort; numbers by their value.
func (r *dmRun) sortDevices(devices, all []api.DMDevice) error {
	if r.flags.Sort == "" {
		return nil
	}
	type key struct {
		column *dmColumn
		down   bool
	}
	var keys []key
	for name := range strings.SplitSeq(string(r.flags.Sort), ",") {
		c, err := findColumn(strings.TrimLeft(name, "+-"))
		if err != nil {
			return err
		}
		keys = append(keys, key{c, strings.HasPrefix(name, "-")})
	}
	slices.SortStableFunc(devices, func(a, b api.DMDevice) int {
		for _, k := range keys {
			x, y := k.column.value(&a, all), k.column.value(&b, all)
			order := cmp.Compare(x, y)
			if k.column.right {
				m, _ := strconv.Atoi(x) // it is a number
				n, _ := strconv.Atoi(y)
				order = cmp.Compare(m, n)
			}
			if k.down {
				order = -order
			}
			if order != 0 {
				return order
			}
		}
		return 0
	})
	return nil
}

// layOut puts rows in columns, below headings. Without headings, with --separator or with --nameprefixes one cell stands
// behind the other.
func (r *dmRun) layOut(columns []*dmColumn, rows [][]string) string {
	var b strings.Builder
	aligned := r.flags.Separator == "" && !r.flags.Nameprefixes && !r.flags.Noheadings
	if !r.flags.Noheadings {
		headings := make([]string, len(columns))
		for i, c := range columns {
			headings[i] = c.heading
		}
		rows = append([][]string{headings}, rows...)
	}
	separator := cmp.Or(r.flags.Separator, either(r.flags.Noheadings, ":", " "))
	for line, row := range rows {
		cells := slices.Clone(row)
		for i, c := range columns {
			if !aligned {
				continue
			}
			width := c.width
			for _, other := range rows {
				width = max(width, len(other[i]))
			}
			if c.right && line > 0 {
				cells[i] = fmt.Sprintf("%*s", width, cells[i])
			} else {
				cells[i] = fmt.Sprintf("%-*s", width, cells[i])
			}
		}
		b.WriteString(strings.Join(cells, separator) + "\n")
	}
	return b.String()
}

type dmFieldsCmd struct{}

// Run lists the columns of "info -c".
func (c *dmFieldsCmd) Run(s *session) error {
	for _, columns := range [][]dmColumn{dmColumns, componentColumns} {
		for i := range columns {
			if _, err := fmt.Fprintf(s.stdout, "  %-21s - %s\n", columns[i].id, columns[i].heading); err != nil {
				return err
			}
		}
	}
	return nil
}
