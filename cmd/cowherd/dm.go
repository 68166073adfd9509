package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/alecthomas/kong"

	"cowherd/api"
)

// dmCmd is dmsetup's command line: its flags may stand anywhere, before the verb and behind it, and each verb takes
// those that mean something to it.
type dmCmd struct {
	outputFlags
	dmFlags

	Create     dmCreateCmd    `cmd:"" help:"Make a device, load its table and resume it."`
	Remove     dmRemoveCmd    `cmd:"" help:"Remove devices."`
	RemoveAll  dmRemoveAllCmd `cmd:"" name:"remove_all" help:"Remove all devices that are not in use."`
	Suspend    dmSuspendCmd   `cmd:"" help:"Keep new requests waiting, and wait for those in flight."`
	Resume     dmResumeCmd    `cmd:"" help:"Let requests go on, by the inactive table if there is one."`
	Load       dmLoadCmd      `cmd:"" aliases:"reload" help:"Put a table in a device's inactive slot. Also: reload."`
	Clear      dmClearCmd     `cmd:"" help:"Empty a device's inactive slot."`
	WipeTable  dmWipeCmd      `cmd:"" name:"wipe_table" help:"Put a table in place that fails all I/O."`
	Rename     dmRenameCmd    `cmd:"" help:"Give a device another name or, with --setuuid, a UUID."`
	Message    dmMessageCmd   `cmd:"" help:"Send a message to the target at a sector."`
	Table      dmTableCmd     `cmd:"" help:"Show tables."`
	Status     dmStatusCmd    `cmd:"" help:"Show the state of targets."`
	Info       dmInfoCmd      `cmd:"" help:"Show the state of devices."`
	Deps       dmDepsCmd      `cmd:"" help:"Show what devices lie on."`
	Ls         dmLsCmd        `cmd:"" help:"List devices."`
	Targets    dmTargetsCmd   `cmd:"" help:"List the types of targets."`
	Wait       dmWaitCmd      `cmd:"" help:"Wait for an event of a device."`
	Splitname  dmSplitCmd     `cmd:"" help:"Take a name of LVM's apart."`
	Version    dmTypeCmd      `cmd:"" name:"target-version" help:"Show the versions of types of targets."`
	Mknodes    dmNothingCmd   `cmd:"" hidden:""`
	UdevCreate dmNothingCmd   `cmd:"" name:"udevcreatecookie" hidden:""`
	UdevEnd    dmNothingCmd   `cmd:"" name:"udevreleasecookie" hidden:""`
	UdevDone   dmNothingCmd   `cmd:"" name:"udevcomplete" hidden:""`
	UdevAll    dmNothingCmd   `cmd:"" name:"udevcomplete_all" hidden:""`
	DMVersion  dmVersionCmd   `cmd:"" name:"version" help:"Show versions."`
	ShowFields dmFieldsCmd    `cmd:"" name:"help" hidden:""`
}

// dmFlags are dmsetup's options.
type dmFlags struct {
	Table    string `placeholder:"TABLE" help:"create, load: the table, on the command line."`
	Notable  bool   `short:"n" help:"create: load no table."`
	Readonly bool   `short:"r" help:"create, load: the table is read-only."`
	Concise  bool   `help:"create: devices in the concise format. table: print them in it."`
	UUID     string `name:"uuid" short:"u" placeholder:"UUID" help:"create: the device's UUID. Else: the device, by its UUID."`
	Major    uint32 `short:"j" placeholder:"N" help:"With --minor: the device, by its numbers."`
	Minor    *int   `short:"m" placeholder:"N" help:"create: the device's minor number. Else with --major: the device."`
	Setuuid  bool   `help:"rename: set the UUID, not the name."`

	Noflush  bool `help:"suspend, resume: do not make durable what was written."`
	Nolockfs bool `help:"The same."`
	Force    bool `short:"f" help:"remove, remove_all: where a device is in use, let all its I/O fail from now on."`
	Deferred bool `help:"remove, remove_all: remove a device that is in use when it is not any more."`
	Retry    bool `help:"remove: try again for some seconds while a device is in use."`

	Target   string `placeholder:"TYPE" help:"table, status, ls: only targets of this type, and devices with one."`
	Inactive bool   `help:"table, status: the inactive table."`
	Verbose  int    `short:"v" type:"counter" help:"create, table, status, deps: show the device's state too. wait: show the number of the event."`
	Tree     bool   `help:"ls: show what lies on what."`
	Select   string `short:"S" placeholder:"SELECTION" help:"info -c, table, status, deps, remove, suspend, resume, wipe_table: only devices whose columns are so, 'open>0 && name!~tmp' say."`

	Columns      bool   `short:"c" help:"info: one line for each device."`
	ColumnsToo   bool   `short:"C" hidden:"" name:"columns-too"`
	Options      string `short:"o" placeholder:"LIST" help:"info: the columns, with + in front: besides the usual ones. ls, deps: devno, blkdevname, devname; ls --tree: its options."`
	Sort         dashed `short:"O" placeholder:"LIST" help:"info -c: sort by these columns, with - in front: downwards."`
	Noheadings   bool   `help:"info -c: no headings."`
	Separator    string `placeholder:"TEXT" help:"info -c: what stands between columns, which are then not aligned."`
	Nameprefixes bool   `help:"info -c: NAME='VALUE' for each column."`
	Unquoted     bool   `help:"With --nameprefixes: no quotes."`

	// What the kernel's devices need and these do not: taken, and passed over.
	Yes              bool   `short:"y" hidden:""`
	Checks           bool   `hidden:""`
	Noopencount      bool   `hidden:""`
	Noudevrules      bool   `hidden:""`
	Noudevsync       bool   `hidden:""`
	Verifyudev       bool   `hidden:""`
	Addnodeoncreate  bool   `hidden:""`
	Addnodeonresume  bool   `hidden:""`
	Showkeys         bool   `hidden:""`
	Manglename       string `hidden:""`
	Readahead        string `hidden:""`
	Udevcookie       string `hidden:""`
	UID              string `name:"uid" short:"U" hidden:""`
	GID              string `name:"gid" short:"G" hidden:""`
	Mode             string `short:"M" hidden:""`
	LibraryAndDriver bool   `name:"version" hidden:""`
}

// dashed is the value of a flag that may begin with a dash.
type dashed string

// Decode takes the next word, whatever it looks like.
func (d *dashed) Decode(ctx *kong.DecodeContext) error {
	token := ctx.Scan.Pop()
	if token.IsEOL() {
		return fmt.Errorf("missing value, expecting a list")
	}
	*d = dashed(token.String())
	return nil
}

func (dmCmd) Help() string {
	return `The verbs and options are dmsetup's, and so is what they print: alias dmsetup='cowherd dm'.

A device in a table is the name of a mapped device, a live device or a snapshot, an absolute path (or one that begins
with ./), MAJOR:MINOR, mem:SIZE, null:SIZE, or an NBD URI. Every mapped device is exported over NBD.

Examples:

    cowherd dm create big --table '0 2048 linear /images/a.img 0
    2048 2048 linear /images/b.img 0'
    echo 0 8192 striped 2 128 mem:4M 0 null:4M 0 | cowherd dm create fast
    cowherd dm suspend big && cowherd dm load big --table '0 8192 linear fast 0' && cowherd dm resume big
    cowherd dm ls --tree
    cowherd dm info -c -o name,open,attr
`
}

// dmRun is what a verb runs with: the session, the flags, and a client.
type dmRun struct {
	*session
	flags  *dmFlags
	json   bool
	client *api.Client
}

// dm begins a verb. The client is to be closed.
func (s *session) dm() (*dmRun, error) {
	client, err := s.client()
	if err != nil {
		return nil, err
	}
	return &dmRun{session: s, flags: &s.cli.Dm.dmFlags, json: s.cli.Dm.JSON, client: client}, nil
}

// mapperDir is where the kernel's devices are: a name may stand behind it.
const mapperDir = "/dev/mapper/"

// name is the device that an argument or, if that is empty, the flags name.
func (r *dmRun) name(arg string) (string, error) {
	if arg != "" {
		return strings.TrimPrefix(arg, mapperDir), nil
	}
	if r.flags.UUID == "" && r.flags.Minor == nil {
		return "", usagef("no device specified")
	}
	devices, err := r.client.DMDevices(r)
	if err != nil {
		return "", err
	}
	for i := range devices {
		d := &devices[i]
		if r.flags.UUID != "" && d.UUID == r.flags.UUID || r.flags.UUID == "" && int64(d.Minor) == int64(*r.flags.Minor) {
			return d.Name, nil
		}
	}
	return "", errNoDevice()
}

func errNoDevice() error { return fmt.Errorf("device does not exist: %w", syscall.ENXIO) }

// each runs f for each device that the arguments or the flags name, and goes on behind an error.
func (r *dmRun) each(args []string, f func(name string) error) error {
	if len(args) == 0 {
		args = []string{""}
		if r.flags.Select != "" && r.flags.UUID == "" && r.flags.Minor == nil {
			devices, err := r.selected()
			if err != nil {
				return err
			}
			args = nil
			for i := range devices {
				args = append(args, devices[i].Name)
			}
		}
	}
	var errs []error
	for _, arg := range args {
		name, err := r.name(arg)
		if err == nil {
			err = f(name)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// selected are the devices that --select wants.
func (r *dmRun) selected() ([]api.DMDevice, error) {
	wanted, err := parseSelection(r.flags.Select)
	if err != nil {
		return nil, err
	}
	all, err := r.client.DMDevices(r)
	if err != nil {
		return nil, err
	}
	var devices []api.DMDevice
	for i := range all {
		if wanted(&all[i], all) {
			devices = append(devices, all[i])
		}
	}
	return devices, nil
}

// devices are those that the arguments or flags name; all without.
func (r *dmRun) devices(args []string) (found []api.DMDevice, all bool, err error) {
	devices, err := r.client.DMDevices(r)
	if err != nil {
		return nil, false, err
	}
	if len(args) == 0 && r.flags.UUID == "" && r.flags.Minor == nil {
		return devices, true, nil
	}
	err = r.each(args, func(name string) error {
		for i := range devices {
			if devices[i].Name == name {
				found = append(found, devices[i])
				return nil
			}
		}
		return fmt.Errorf("%s: %w", name, errNoDevice())
	})
	return found, false, err
}

// tableText is the table that a verb is given: by --table, which wins, in a file, or on standard input.
func (r *dmRun) tableText(file string) (string, error) {
	var text []byte
	var err error
	switch {
	case r.flags.Table != "":
		text = []byte(r.flags.Table)
	case file != "":
		text, err = os.ReadFile(file)
	default:
		text, err = io.ReadAll(io.LimitReader(r.stdin, api.DMBodyMax))
	}
	if err != nil {
		return "", fmt.Errorf("table: %w", err)
	}
	return absoluteWords(string(text))
}

// absoluteWords makes words that begin with ./ or ../ absolute paths: the daemon runs in another directory.
func absoluteWords(text string) (string, error) {
	var b bytes.Buffer
	for len(text) > 0 {
		end := strings.IndexAny(text, " \t\n")
		if end < 0 {
			end = len(text)
		}
		word := text[:end]
		if strings.HasPrefix(word, "./") || strings.HasPrefix(word, "../") {
			path, err := filepath.Abs(word)
			if err != nil {
				return "", err
			}
			word = path
		}
		b.WriteString(word)
		if end < len(text) {
			b.WriteByte(text[end])
			end++
		}
		text = text[end:]
	}
	return b.String(), nil
}

// isEmptyTable tells whether a table has no lines.
func isEmptyTable(text string) bool {
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
			return false
		}
	}
	return true
}
