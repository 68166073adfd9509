package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"cowherd/api"
	"cowherd/internal/size"
)

type traceCmd struct {
	outputFlags
	Name    string        `arg:"" complete:"device" help:"The device: one that was attached, a snapshot, a clone, or a mapped device."`
	For     time.Duration `placeholder:"TIME" help:"How long, such as 10s; otherwise until it is interrupted."`
	Every   time.Duration `default:"1s" placeholder:"TIME" help:"How often the table is shown anew on a terminal (${default})."`
	Summary bool          `help:"With --json: one line at the end, and none for each request."`
}

func (traceCmd) Help() string {
	return `On a terminal a table is shown while the trace runs; elsewhere only what it has seen at the end. With --json each
request and each copy is a line, and the last line is the summary. Requests never wait for the trace: what is too much for
it is dropped, and how much that was is said.

Examples:

    cowherd trace vm --for 10s
    cowherd trace vm@nightly
    cowherd trace vm --for 5s --json | jq -c 'select(.request.total_us > 1000).request'
    cowherd trace vm --for 5s --json --summary | jq .summary.cpus
`
}

func (c *traceCmd) Run(s *session) error {
	q := api.TraceQuery{For: c.For, Every: c.Every, Requests: c.JSON && !c.Summary}
	switch {
	case c.For < 0:
		return usagef("--for: %v is negative", c.For)
	case c.Every < 100*time.Millisecond:
		return usagef("--every: %v is less than 100ms", c.Every)
	case c.Summary && !c.JSON:
		return usagef("--summary is for --json")
	}
	client, err := s.client()
	if err != nil {
		return err
	}
	defer client.Close()
	// The first interrupt ends the trace, which then tells what it has seen; the second ends the process.
	interrupted, stop := signal.NotifyContext(s, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	t := tracePrinter{out: s.stdout, json: c.JSON, live: !c.JSON && isTerminal(s.stdout)}
	for line, err := range client.Trace(interrupted, c.Name, q) {
		if interrupted.Err() != nil {
			break
		}
		if err != nil {
			return err
		}
		if err := t.take(&line); err != nil {
			return err
		}
	}
	return t.finish()
}

// tracePrinter shows a trace: requests and tables as they come, and the last summary.
type tracePrinter struct {
	out     io.Writer
	json    bool
	live    bool              // tables are written over one another
	rows    int               // of the table before
	pending *api.TraceSummary // that was not shown
}

// take takes one line.
func (t *tracePrinter) take(line *api.TraceLine) error {
	switch {
	case line.Request != nil:
		return json.NewEncoder(t.out).Encode(line)
	case line.Summary == nil: // a newer daemon's
		return nil
	case t.live || line.Summary.Last:
		t.pending = nil
		return t.show(line.Summary)
	}
	t.pending = line.Summary
	return nil
}

// show shows a summary.
func (t *tracePrinter) show(s *api.TraceSummary) error {
	if t.json {
		return json.NewEncoder(t.out).Encode(api.TraceLine{Summary: s})
	}
	var text strings.Builder
	if err := printTrace(&text, s); err != nil {
		return err
	}
	over := ""
	if t.live && t.rows > 0 {
		over = fmt.Sprintf("\x1b[%dA\x1b[J", t.rows)
	}
	t.rows = strings.Count(text.String(), "\n")
	_, err := io.WriteString(t.out, over+text.String())
	return err
}

// finish shows what an interrupted trace has seen last, if it was not shown.
func (t *tracePrinter) finish() error {
	if t.pending == nil {
		return nil
	}
	return t.show(t.pending)
}

// printTrace shows a summary for people.
func printTrace(w io.Writer, s *api.TraceSummary) error {
	if _, err := fmt.Fprintf(w, "%.1f s\n\n", s.Seconds); err != nil {
		return err
	}
	flows := table{right: []bool{false, true, true, true, true, true, true, true, true, true, true}}
	flows.add("WHAT", "COUNT", "PER SECOND", "BYTES", "FAILED", "PART", "OF", "MEAN", "P50", "P99", "MAX")
	for i := range s.Flows {
		f := &s.Flows[i]
		head := []string{
			strings.TrimSpace(f.Op + " " + f.Class), strconv.FormatUint(f.Count, 10), fmt.Sprintf("%.0f", float64(f.Count)/max(s.Seconds, 1e-9)),
			size.Human(int64(f.Bytes)), strconv.FormatUint(f.Failed, 10),
		}
		for _, p := range f.Parts {
			flows.add(append(head, p.Part, strconv.FormatUint(p.Count, 10), traceTime(p.MeanUS), traceTime(p.P50US), traceTime(p.P99US),
				traceTime(p.MaxUS))...)
			head = []string{" ", " ", " ", " ", " "}
		}
	}
	if err := flows.write(w); err != nil {
		return err
	}
	for _, x := range []struct {
		what   string
		shares []api.TraceShare
	}{{"CPU", s.CPUs}, {"QUEUE", s.Queues}} {
		shares := table{right: []bool{true, true, true, true, true, true}}
		shares.add(x.what, "SHARE", "REQUESTS", "BYTES", "COPIES", "BYTES")
		for _, c := range x.shares {
			number := strconv.Itoa(c.Number)
			if c.Number < 0 {
				number = "none"
			}
			shares.add(number, fmt.Sprintf("%.0f%%", 100*c.Share), strconv.FormatUint(c.Requests, 10), size.Human(int64(c.RequestBytes)),
				strconv.FormatUint(c.Copies, 10), size.Human(int64(c.CopyBytes)))
		}
		if _, err := fmt.Fprintln(w); err != nil {
			return err
		}
		if err := shares.write(w); err != nil {
			return err
		}
	}
	if s.Dropped > 0 {
		_, err := fmt.Fprintf(w, "\n%d records were dropped: requests came faster than they could be told of; %d of them are missing\n",
			s.Dropped, s.Broken)
		return err
	}
	return nil
}

// traceTime is a time of us microseconds for people.
func traceTime(us float64) string {
	switch {
	case us < 10:
		return fmt.Sprintf("%.2f µs", us)
	case us < 1000:
		return fmt.Sprintf("%.0f µs", us)
	case us < 1e6:
		return fmt.Sprintf("%.2f ms", us/1000)
	}
	return fmt.Sprintf("%.2f s", us/1e6)
}
