package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/term"

	"cowherd/demo"
)

type demoCmd struct {
	outputFlags
	Image string `arg:"" optional:"" type:"existingfile" complete:"file" help:"A disk image or block device to work on a copy of. Without it an image of 256 MiB is made."`
	Dir   string `type:"existingdir" complete:"file" placeholder:"DIR" help:"Where the temporary directory is made: by default /dev/shm if there is room, else where the system keeps temporary files."`
}

func (demoCmd) Help() string {
	return `Nothing but a temporary directory is written to, which is removed at the end, also after an
interrupt. The exit status is 1 if anything could not be proven.

Examples:

    cowherd demo
    cowherd demo /var/lib/images/vm.img
    cowherd demo --json | jq .rates
`
}

func (c *demoCmd) Run(s *session) error {
	ctx, stop := signal.NotifyContext(s, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	out := s.stdout
	if c.JSON {
		out = io.Discard
		if isTerminal(s.stderr) {
			out = s.stderr
		}
	}
	report, err := demo.Run(ctx, demo.Config{Image: c.Image, Dir: c.Dir, Out: out, Live: isTerminal(out)})
	if report != nil && c.JSON {
		err = errors.Join(err, printJSON(s.stdout, report))
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return errors.New("demo: interrupted; what it had made is removed")
	}
	return err
}

// isTerminal tells whether what is written to w is shown at once.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
