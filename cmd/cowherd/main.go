// Command cowherd takes snapshots of block devices and disk images that are in use. "cowherd serve" is the daemon that
// serves them over NBD; the other commands talk to it.
//
// Each command is a struct with its flags and a Run method, in a file of its own; cli lists them.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strings"
	"unicode"

	"github.com/alecthomas/kong"

	_ "cowherd/internal/stack"
)

// version is set when the program is linked.
var version string

// Exit statuses.
const (
	exitOK    = 0
	exitError = 1 // the command failed; why is on standard error
	exitUsage = 2 // the command line is wrong
)

// common are the flags that all commands have.
type common struct {
	Control string `env:"COWHERD_CONTROL" placeholder:"SOCKET" complete:"file" help:"The daemon's control socket; by default control.sock in /run/cowherd (root) or in the directory cowherd of XDG_RUNTIME_DIR."`
}

// cli is the grammar of the command line.
type cli struct {
	common

	Serve         serveCmd         `cmd:"" help:"Run the daemon."`
	Attach        attachCmd        `cmd:"" help:"Make a disk image or block device a live device."`
	Detach        detachCmd        `cmd:"" help:"Flush a live device and let go of it."`
	Snapshot      snapshotCmd      `cmd:"" help:"Freeze what a live device holds."`
	Clone         cloneCmd         `cmd:"" help:"Make a copy of an image, device or export that can be used at once."`
	Hydrate       hydrateCmd       `cmd:"" help:"Say how a clone is copied in the background, or wait for it."`
	Rm            rmCmd            `cmd:"" help:"Drop a snapshot."`
	Resize        resizeCmd        `cmd:"" help:"Give a snapshot more room for copied chunks."`
	Merge         mergeCmd         `cmd:"" help:"Roll a live device back to a snapshot."`
	Throttle      throttleCmd      `cmd:"" help:"Show and limit how fast copies are made."`
	Ls            lsCmd            `cmd:"" help:"List devices and snapshots."`
	Status        statusCmd        `cmd:"" help:"Show all that is known of devices and snapshots."`
	Trace         traceCmd         `cmd:"" help:"Follow the requests of a device: where their time goes, and which CPU issues how much."`
	Events        eventsCmd        `cmd:"" help:"Show what happens in the daemon."`
	Cow           cowCmd           `cmd:"" help:"Inspect, check, repair, export and merge persistent snapshots, without a daemon."`
	Dm            dmCmd            `cmd:"" help:"The device mapper's verbs: tables, mapped devices, targets."`
	CloneMetadata cloneMetadataCmd `cmd:"" help:"Inspect, check and repair the metadata of clones, without a daemon."`
	Demo          demoCmd          `cmd:"" help:"Freeze a disk while it is written, prove it, and see what it costs."`
	Copy          copyCmd          `cmd:"" help:"Copy an image, a block device, an export or a live device."`
	Bench         benchCmd         `cmd:"" help:"Measure cowherd from the inside."`
	Version       versionCmd       `cmd:"" help:"Show the versions of this program and of the daemon."`
	Completion    completionCmd    `cmd:"" help:"Print a completion script for a shell."`
}

// session is what a command runs with.
type session struct {
	context.Context
	stdin          io.Reader
	stdout, stderr io.Writer
	cli            *cli
	model          *kong.Application // nil: the line was plain
	exit           func(status int)  // ends the process without more ado
}

// usageError is a mistake on the command line that the grammar does not catch.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// exited is what a parser that wants to exit panics with.
type exited int

// run runs one command line and returns the exit status.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) (status int) {
	defer func() {
		if code, ok := recover().(exited); ok {
			status = int(code)
		}
	}()
	c := &cli{}
	s := &session{Context: ctx, stdin: stdin, stdout: stdout, stderr: stderr, cli: c, exit: os.Exit}
	command, plain := c.parsePlain(args)
	if !plain {
		if command, status = s.parse(args); command == nil {
			return status
		}
	}
	err := command.Run(s)
	if err != nil {
		fmt.Fprintf(stderr, "cowherd: %v\n", err)
	}
	if errors.As(err, new(usageError)) {
		return exitUsage
	}
	if err != nil {
		return exitError
	}
	return exitOK
}

// kongs is a command that kong has parsed.
type kongs struct{ *kong.Context }

// Run runs the command.
func (k kongs) Run(s *session) error { return k.Context.Run(s) }

// parse has kong read a command line. Without a command the process ends with a status.
func (s *session) parse(args []string) (command runner, status int) {
	s.cli = &cli{} // what has been tried before has left its marks
	options := []kong.Option{
		kong.Name("cowherd"),
		kong.Description("Snapshots and clones of block devices and disk images that are in use."),
		kong.Writers(s.stdout, s.stderr),
		kong.Exit(func(code int) { panic(exited(code)) }),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, WrapUpperBound: 120}),
	}
	root, one := s.cli.grammarFor(args)
	parser, err := kong.New(root, append(options, one...)...)
	if err != nil {
		fmt.Fprintf(s.stderr, "cowherd: %v\n", err)
		return nil, exitError
	}
	s.model = parser.Model
	if len(args) > 0 && args[0] == "help" { // as other programs have it
		args = append(slices.Clone(args[1:]), "--help")
	}
	parsed, err := parser.Parse(args)
	if err != nil {
		fmt.Fprintf(s.stderr, "cowherd: %v\nTry \"%s --help\".\n", err, helpFor(err))
		return nil, exitUsage
	}
	return kongs{parsed}, exitOK
}

// grammarFor is what a command line is parsed by: all of c, or, where the line begins with the name of a command, no more
// than that command, with the flags that all have. To build the grammar of all commands takes ten times as long as that of
// one (10 ms), which is longer than a clone of an image takes. What is parsed is in c, either way.
func (c *cli) grammarFor(args []string) (root any, options []kong.Option) {
	if len(args) == 0 || args[0] == "completion" { // which prints all
		return c, nil
	}
	for i := range reflect.TypeFor[cli]().NumField() {
		field := reflect.TypeFor[cli]().Field(i)
		if _, command := field.Tag.Lookup("cmd"); command && commandName(field.Name) == args[0] {
			target := reflect.ValueOf(c).Elem().Field(i).Addr().Interface()
			return &c.common, []kong.Option{kong.DynamicCommand(args[0], field.Tag.Get("help"), "", target)}
		}
	}
	return c, nil
}

// commandName is what kong calls the command of a field of cli: CloneMetadata is clone-metadata.
func commandName(field string) string {
	var b strings.Builder
	for i, r := range field {
		if unicode.IsUpper(r) && i > 0 {
			b.WriteByte('-')
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}

// helpFor is the command whose help is about a mistake.
func helpFor(err error) string {
	if p, ok := errors.AsType[*kong.ParseError](err); ok && p.Context != nil {
		if selected := p.Context.Selected(); selected != nil {
			return selected.FullPath()
		}
	}
	return "cowherd"
}
