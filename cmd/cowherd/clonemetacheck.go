package main

import (
	"errors"
	"fmt"
	"io"

	"cowherd/clonemeta"
	"cowherd/persistentdata"
)

type cloneMetadataCheckCmd struct {
	outputFlags
	metadataArgument
	Max int `default:"1000" placeholder:"N" help:"Findings that are shown at most; the rest is only counted (${default})."`
}

func (cloneMetadataCheckCmd) Help() string {
	return `Metadata that keeps all rules gives no output and status 0; each violation is named with its block and values, and
the status is then 1. A remark is about what is unusual and breaks no rule.

Examples:

    cowherd clone-metadata check vm.clone-metadata
    cowherd clone-metadata check vm.clone-metadata --json | jq -r '.findings[].text'
`
}

// metadataReport is the outcome of a check of metadata, as JSON.
type metadataReport struct {
	File       string         `json:"file"`
	Regions    uint64         `json:"regions"`
	Hydrated   uint64         `json:"hydrated"`
	Lost       uint64         `json:"lost"` // regions of which it cannot be told
	Violations int            `json:"violations"`
	Remarks    int            `json:"remarks"`
	Findings   []blockFinding `json:"findings"` // the first ones
}

func (c *cloneMetadataCheckCmd) Run(s *session) error {
	if c.Max < 0 {
		return usagef("--max: %d is negative", c.Max)
	}
	d, err := c.open()
	if err != nil {
		return err
	}
	l := blockFindings{file: c.File, left: c.Max, list: []blockFinding{}}
	if !c.JSON {
		l.out = s.stdout
	}
	survey, err := clonemeta.Check(d, clonemeta.CheckConfig{Report: l.report})
	if err = errors.Join(c.wrap(err), d.Close(), l.end()); err != nil {
		return err
	}
	if c.JSON {
		report := metadataReport{c.File, survey.Superblock.Regions(), survey.Hydrated, survey.Lost, survey.Violations, survey.Remarks, l.list}
		if err := printJSON(s.stdout, report); err != nil {
			return err
		}
	}
	if survey.Violations > 0 {
		return c.wrap(errors.New(plural(survey.Violations, "violation") + " of the format"))
	}
	return nil
}

// blockFindings shows findings as they come, or keeps them; at most as many as are wanted.
type blockFindings struct {
	file    string
	out     io.Writer // nil: they are kept in list
	left    int       // that may still be shown
	skipped int
	list    []blockFinding
	err     error
}

func (l *blockFindings) report(f *persistentdata.Finding) {
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
		l.list = append(l.list, newBlockFinding(f))
	default:
		l.left--
		_, l.err = fmt.Fprintf(l.out, "%s: %s: %s: %s\n", l.file, kind, f.Rule, f.What)
	}
}

// end says how many findings were left out.
func (l *blockFindings) end() error {
	if l.err == nil && l.out != nil && l.skipped > 0 {
		_, l.err = fmt.Fprintf(l.out, "%s: %d more\n", l.file, l.skipped)
	}
	return l.err
}
