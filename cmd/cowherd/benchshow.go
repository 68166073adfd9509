package main

import (
	"io"
	"os"
	"regexp"
	"strings"

	"cowherd/bench"
)

type benchShowCmd struct {
	outputFlags
	File     string   `arg:"" complete:"file" help:"What a run has printed with --json; - is standard input."`
	CSV      bool     `name:"csv" help:"Print comma-separated values: a line for each cell."`
	Report   string   `placeholder:"DIR" complete:"file" help:"Write a report to DIR."`
	Only     string   `placeholder:"REGEXP" help:"Only the cells whose labels match."`
	Where    []string `sep:"none" placeholder:"KEY=VALUE,..." help:"Only the cells that have one of the values."`
	Rows     []string `placeholder:"KEY,..." help:"Set the figures out in a table, with a row for each value of the keys."`
	Columns  []string `placeholder:"KEY,..." help:"The same for columns."`
	Quantity string   `default:"iops" placeholder:"NAME" help:"Which figures: iops, bytes/s, mean latency, p50 latency, p99 latency, p99.9 latency, max latency, CPU/op, CPU/byte, busiest queue, copied bytes, foreground p50 and the like, or what only some stacks tell (${default})."`
	Per      string   `placeholder:"KEY=VALUE" help:"Divide each figure by that of the cell that differs only in that it has the value."`
	Markdown bool     `help:"Print the table as Markdown has it."`
}

func (benchShowCmd) Help() string {
	return `Where several cells fall on one place of the table, it has the median, the least and the greatest of them.

Examples:

    cowherd bench kcopyd --json > kcopyd.json
    cowherd bench show kcopyd.json --report kcopyd-report
    cowherd bench show kcopyd.json --rows device,jobs --columns engine --quantity 'p99 latency'
    cowherd bench show kcopyd.json --where depth=32 --rows jobs --columns engine --per engine=serialised
`
}

func (c *benchShowCmd) Run(s *session) error {
	pivoted := len(c.Rows)+len(c.Columns) > 0
	switch {
	case c.JSON && c.CSV:
		return usagef("--json and --csv exclude each other")
	case pivoted && (c.CSV || c.Report != ""):
		return usagef("--rows and --columns are not for --csv and --report")
	case !pivoted && (c.Markdown || c.Per != ""):
		return usagef("--markdown and --per need --rows or --columns")
	}
	o, err := c.read(s)
	if err != nil {
		return err
	}
	if err := c.narrow(o); err != nil {
		return err
	}
	if pivoted {
		return c.pivot(s, o)
	}
	if c.Report != "" {
		if err := o.WriteReport(c.Report); err != nil {
			return err
		}
	}
	switch {
	case c.JSON:
		return printJSON(s.stdout, o)
	case c.CSV:
		return o.WriteCSV(s.stdout)
	}
	return o.WriteTable(s.stdout)
}

// read reads the outcome.
func (c *benchShowCmd) read(s *session) (*bench.Outcome, error) {
	var from io.Reader = s.stdin
	if c.File != "-" {
		f, err := os.Open(c.File)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		from = f
	}
	return bench.ReadOutcome(from)
}

// narrow keeps the cells that were asked for.
func (c *benchShowCmd) narrow(o *bench.Outcome) error {
	only, err := regexp.Compile(c.Only)
	if err != nil {
		return usagef("--only: %w", err)
	}
	where := map[string][]string{}
	for _, text := range c.Where {
		key, values, ok := strings.Cut(text, "=")
		if !ok {
			return usagef("--where: %q is not KEY=VALUE", text)
		}
		where[key] = append(where[key], strings.Split(values, ",")...)
	}
	if err := o.Select(only, where); err != nil {
		return usageError{err}
	}
	return nil
}

// pivot prints the table.
func (c *benchShowCmd) pivot(s *session, o *bench.Outcome) error {
	p := bench.Pivot{Rows: c.Rows, Columns: c.Columns, Quantity: c.Quantity}
	if c.Per != "" {
		var ok bool
		if p.Per, p.PerValue, ok = strings.Cut(c.Per, "="); !ok {
			return usagef("--per: %q is not KEY=VALUE", c.Per)
		}
	}
	g, err := o.Pivot(p)
	switch {
	case err != nil:
		return usageError{err}
	case c.JSON:
		return printJSON(s.stdout, g)
	case c.Markdown:
		return g.WriteMarkdown(s.stdout)
	}
	return g.WriteTable(s.stdout)
}
