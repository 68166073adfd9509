package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"cowherd/internal/size"
	"cowherd/transfer"
)

type copyCmd struct {
	outputFlags
	progressFlag
	Source      string `arg:"" complete:"file" help:"What is copied: an image file, a block device, an NBD URI, or the name of a live device or snapshot."`
	Destination string `arg:"" complete:"file" help:"Where it goes: the same; a file that is not there is made."`

	Force             bool   `help:"Overwrite an image or a block device that holds data, or a live device."`
	Shared            bool   `help:"Read a source that another program is writing to. What is copied is of no single moment."`
	Allocated         bool   `help:"Give the destination room for every byte, zeroes included."`
	DestinationIsZero bool   `help:"Take it for granted that the destination reads as zeroes."`
	Sparse            string `placeholder:"SIZE" help:"The unit in which data is looked at for zeroes, which are not written; 0 writes all. Default: 4k, but between two NBD servers only data that begins with zeroes is looked at."`

	Method      string `enum:"auto,clone,offload,readwrite" default:"auto" help:"auto: clone, or have the device copy, where that is possible, else read and write; clone: nothing else; offload: nothing but what devices and file servers do by themselves; readwrite."`
	Connections int    `default:"0" help:"Connections to each NBD server, if it allows several. Default: the CPUs, up to 8."`
	Queues      int    `default:"0" help:"Queues that are worked on in parallel. Default: the connections, or the CPUs."`
	Requests    int    `default:"0" help:"Requests in flight on each queue. Default: what suits the devices."`
	RequestSize string `placeholder:"SIZE" help:"Size of reads and writes. Default: 1M; 256k where an export or a live device is an end."`
	Rate        string `placeholder:"SIZE" help:"Copy no more than so many bytes a second."`
	Direct      bool   `help:"Do I/O on files and block devices past the page cache (O_DIRECT)."`

	Flush   bool   `default:"true" negatable:"" help:"Make the destination durable before the command ends (default); --no-flush leaves that to the system."`
	Verify  bool   `help:"Read the destination again, and compare it with the source."`
	Resume  bool   `help:"Keep a journal, and go on with a copy that was begun with it."`
	Journal string `complete:"file" placeholder:"FILE" help:"Where the journal is; by default beside a destination that is a file, with .cowherd-copy behind its name."`
	Quiet   bool   `short:"q" help:"Print nothing but errors."`
}

func (copyCmd) Help() string {
	return `Holes and zeroes are left out. The command ends when the copy is durable, unless --no-flush is given.

Examples:

    cowherd copy vm.img /backup/vm.img
    cowherd copy vm@nightly /backup/vm.img --verify
    cowherd copy nbd://storage/vm /dev/vg0/vm --connections 8
    cowherd copy vm.img /mnt/slow/vm.img --resume --rate 50M
`
}

// copyReport is what was done, as JSON.
type copyReport struct {
	Source      string `json:"source"`
	Destination string `json:"destination"`
	transfer.Result
	Flushed bool    `json:"flushed"`
	Changed bool    `json:"source_changed,omitempty"`
	Seconds float64 `json:"seconds"`
}

func (c *copyCmd) Run(s *session) (err error) {
	o, err := c.options()
	if err != nil {
		return err
	}
	start := time.Now()
	if report, done, err := c.cloneNew(s, o); err != nil {
		return fmt.Errorf("copy %s to %s: %w; %s was removed", c.Source, c.Destination, err, c.Destination)
	} else if done {
		report.Seconds = time.Since(start).Seconds()
		return c.print(s, report)
	}
	ctx, armed, stop := s.interruptible()
	defer stop()
	p, err := c.openPair(ctx, s, armed)
	if err != nil {
		return err
	}
	r, err := c.copy(ctx, s, p, o)
	if err != nil {
		return c.failed(p, err)
	}
	report := copyReport{
		Source: p.source.name, Destination: p.destination.name, Result: r,
		Flushed: o.Flush, Changed: p.source.changed(), Seconds: time.Since(start).Seconds(),
	}
	if err := p.keep(o.Flush); err != nil {
		return fmt.Errorf("copy %s to %s: %w", c.Source, c.Destination, err)
	}
	return c.print(s, report)
}

// copyMethods are the values of --method.
func copyMethods() map[string]transfer.Method {
	return map[string]transfer.Method{
		"auto": transfer.Auto, "clone": transfer.Clone, "offload": transfer.Offload, "readwrite": transfer.ReadWrite,
	}
}

// connectionsMax is the most connections to one server.
const connectionsMax = 64

// options reads the flags.
func (c *copyCmd) options() (o transfer.Options, err error) {
	o = transfer.Options{
		Allocated: c.Allocated, Queues: c.Queues, InFlight: c.Requests, Flush: c.Flush, Verify: c.Verify,
	}
	for _, x := range []struct {
		flag, text string
		to         *int64
	}{{"--sparse", c.Sparse, &o.Sparse}, {"--request-size", c.RequestSize, &o.PieceSize}, {"--rate", c.Rate, &o.Rate}} {
		if x.text == "" {
			continue
		}
		if *x.to, err = size.Parse(x.text); err != nil {
			return o, usagef("%s: %w", x.flag, err)
		}
	}
	if c.Sparse == "" {
		o.Sparse = transfer.SparseDefault
	}
	o.Method, o.Relay = copyMethods()[c.Method], c.Sparse == "" || o.Sparse == 0
	switch {
	case c.Queues < 0 || c.Requests < 0 || c.Connections < 0 || c.Connections > connectionsMax:
		return o, usagef("--queues, --requests and --connections are not negative, --connections at most %d", connectionsMax)
	case max(c.Queues, 1)*max(c.Requests, 1) > transfer.WorkersMax:
		return o, usagef("--queues times --requests is more than %d", transfer.WorkersMax)
	case o.Sparse&(o.Sparse-1) != 0:
		return o, usagef("--sparse: %s is not a power of two", c.Sparse)
	case c.RequestSize != "" && o.PieceSize < 4096 || o.PieceSize > transfer.PieceSizeMax || o.PieceSize&(o.PieceSize-1) != 0:
		return o, usagef("--request-size: %s is not a power of two from 4k to %s", c.RequestSize, size.Human(transfer.PieceSizeMax))
	case c.Rate != "" && o.Rate == 0:
		return o, usagef("--rate: 0 would never end")
	case c.Allocated && c.DestinationIsZero:
		return o, usagef("--allocated and --destination-is-zero contradict each other")
	case c.Allocated && c.Method == "clone":
		return o, usagef("--allocated and --method clone contradict each other: a clone shares its blocks")
	case c.Resume && !c.Flush:
		return o, usagef("--resume and --no-flush contradict each other")
	case c.Journal != "" && !c.Resume:
		return o, usagef("--journal needs --resume")
	case c.Quiet && c.JSON:
		return o, usagef("--quiet and --json contradict each other")
	}
	return o, nil
}

// copyHow is what the progress says of how a part is copied; nothing where nothing has to be moved.
var copyHow = [...]string{
	transfer.Cloning: "clone", transfer.Offloading: "offload", transfer.Splicing: "splice", transfer.ReadWriting: "readwrite",
	transfer.Verifying: "verify",
}

// copy copies from one end of the pair to the other, and shows how far it is.
func (c *copyCmd) copy(ctx context.Context, s *session, p *pair, o transfer.Options) (transfer.Result, error) {
	total := p.source.device.Size() - p.start
	if c.Verify {
		total += p.source.device.Size()
	}
	var bar *progress
	if !c.Quiet {
		bar = c.newProgress(s, p.destination.name, total)
	}
	o.Source, o.Destination = p.source.device, p.destination.device
	o.Start, o.Zeroed = p.start, p.zeroed || c.DestinationIsZero
	if c.Resume {
		o.Journal = p.journal
	}
	o.Progress = func(how transfer.How, n int64) { bar.addBy(copyHow[how], n) }
	r, err := transfer.Run(ctx, o)
	bar.end()
	return r, err
}

// failed ends a copy that came to nothing, and says what is left of it.
func (c *copyCmd) failed(p *pair, err error) error {
	if errors.Is(err, context.Canceled) {
		err = errors.New("interrupted")
	}
	left, end := p.abandon(c.Resume)
	return errors.Join(fmt.Errorf("copy %s to %s: %w; %s", c.Source, c.Destination, err, left), end)
}

// print says what was done.
func (c *copyCmd) print(s *session, r copyReport) error {
	if r.Changed {
		if _, err := fmt.Fprintf(s.stderr, "cowherd: warning: %s was written while it was copied\n", r.Source); err != nil {
			return err
		}
	}
	if c.JSON {
		return printJSON(s.stdout, r)
	}
	if c.Quiet {
		return nil
	}
	var parts []string
	for _, x := range []struct {
		n    int64
		what string
	}{
		{r.Resumed, "done before"}, {r.Clone, "cloned"}, {r.Device, "copied by the device"}, {r.Server, "copied by the server"},
		{r.Splice, "spliced"}, {r.ReadWrite, "read and written"}, {r.Zeroes, "made zero"}, {r.Skipped, "zero already"},
		{r.Verified, "verified"},
	} {
		if x.n > 0 {
			parts = append(parts, size.Human(x.n)+" "+x.what)
		}
	}
	rate := ""
	if r.Took > 0 && r.Size > 0 {
		rate = fmt.Sprintf(", %s/s", size.Human(int64(float64(r.Size-r.Resumed)/r.Took.Seconds())))
	}
	what := ""
	if len(parts) > 0 {
		what = ": " + strings.Join(parts, ", ")
	}
	_, err := fmt.Fprintf(s.stdout, "%s: %s in %.2f s%s%s\n", r.Destination, size.Human(r.Size), r.Seconds, rate, what)
	return err
}
