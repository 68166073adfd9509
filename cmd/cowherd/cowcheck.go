package main

import (
	"errors"
	"fmt"
	"io"

	"cowherd/cowstore"
)

type cowCheckCmd struct {
	outputFlags
	cowArgument
	originFlag
	Max int `default:"1000" placeholder:"N" help:"Findings that are shown at most; the rest is only counted (${default})."`
}

func (cowCheckCmd) Help() string {
	return `A store that keeps all rules gives no output and status 0; each violation is named with its place and
values, and the status is then 1. A remark is about what is unusual and breaks no rule.

Examples:

    cowherd cow check vm-nightly.cow --origin vm.img
    cowherd cow check vm-nightly.cow --json | jq -r '.findings[].text'
`
}

// checkReport is the outcome of a check, as JSON.
type checkReport struct {
	File       string    `json:"file"`
	Exceptions uint64    `json:"exceptions"`
	Violations int       `json:"violations"`
	Remarks    int       `json:"remarks"`
	Findings   []finding `json:"findings"` // the first ones
}

func (c *cowCheckCmd) Run(s *session) error {
	if c.Max < 0 {
		return usagef("--max: %d is negative", c.Max)
	}
	originSize, err := c.originSize()
	if err != nil {
		return err
	}
	d, err := c.openCOW(true)
	if err != nil {
		return err
	}
	l := findingList{file: c.File, left: c.Max}
	if !c.JSON {
		l.out = s.stdout
	}
	survey, err := cowstore.Check(d, cowstore.CheckConfig{OriginSize: originSize, Report: l.report})
	if err = errors.Join(c.wrap(err), d.Close(), l.end()); err != nil {
		return err
	}
	if c.JSON {
		report := checkReport{c.File, survey.Exceptions, survey.Violations, survey.Remarks, append([]finding{}, l.list...)}
		if err := printJSON(s.stdout, report); err != nil {
			return err
		}
	}
	if survey.Violations > 0 {
		return c.wrap(errors.New(plural(survey.Violations, "violation") + " of the format"))
	}
	return nil
}

// findingList shows findings as they come, or keeps them; at most as many as are wanted.
type findingList struct {
	file    string
	out     io.Writer // nil: they are kept in list
	left    int       // that may still be shown
	skipped int
	list    []finding
	err     error
}

func (l *findingList) report(f *cowstore.Finding) {
	kind := "violation"
	if !f.Violation {
		kind = "remark"
	}
	switch {
	case l.err != nil:
	case l.left == 0:
		l.skipped++
	case l.out == nil:
		l.left--
		l.list = append(l.list, newFinding(f))
	default:
		l.left--
		_, l.err = fmt.Fprintf(l.out, "%s: %s: %s: %s\n", l.file, kind, f.Rule, f)
	}
}

// end says how many findings were left out.
func (l *findingList) end() error {
	if l.err == nil && l.out != nil && l.skipped > 0 {
		_, l.err = fmt.Fprintf(l.out, "%s: %d more\n", l.file, l.skipped)
	}
	return l.err
}
