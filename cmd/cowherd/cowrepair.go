package main

import (
	"errors"
	"fmt"

	"cowherd/cowstore"
)

type cowRepairCmd struct {
	outputFlags
	cowArgument
	originFlag
	DryRun     bool `help:"Only say what would be done."`
	SetValid   bool `xor:"valid" help:"Make an invalid store valid again. Only right if nothing was written to the origin since it became invalid, the write that made it so included."`
	Invalidate bool `xor:"valid" help:"Make the store invalid, so that nobody shows a wrong view of it."`
}

func (cowRepairCmd) Help() string {
	return `What lies behind the end of the table is erased. More is done only if asked for, and a table that breaks a
rule is never changed: see cowherd-cow.md for the reasons.

Examples:

    cowherd cow repair vm-nightly.cow --dry-run
    cowherd cow repair vm-nightly.cow --set-valid --origin vm.img
    cowherd cow repair truncated.cow --invalidate
`
}

// setValidWarning is said whenever a store is made valid.
const setValidWarning = "the view is right only if no write has reached the origin since the snapshot became invalid, the one " +
	"that found no room included; nothing in the store can tell"

// repairReport is what was or would be done, as JSON.
type repairReport struct {
	File       string   `json:"file"`
	DryRun     bool     `json:"dry_run"`
	Steps      []string `json:"steps"`
	Warning    string   `json:"warning,omitempty"`
	Violations int      `json:"violations"` // that stay
}

func (c *cowRepairCmd) Run(s *session) error {
	originSize, err := c.originSize()
	if err != nil {
		return err
	}
	d, err := c.openCOW(c.DryRun)
	if err != nil {
		return err
	}
	r, err := cowstore.PlanRepair(d, cowstore.RepairConfig{
		OriginSize: originSize, SetValid: c.SetValid, Invalidate: c.Invalidate,
	})
	if err == nil && !c.DryRun {
		err = r.Apply()
	}
	if err = errors.Join(c.wrap(err), d.Close()); err != nil {
		return err
	}
	report := repairReport{File: c.File, DryRun: c.DryRun, Steps: append([]string{}, r.Steps...), Violations: r.Broken}
	if c.SetValid && !r.Survey.Header.Valid {
		report.Warning = setValidWarning
	}
	if err := c.print(s, &report); err != nil {
		return err
	}
	if r.Broken > 0 {
		return c.wrap(fmt.Errorf("%s cannot be repaired: see \"cowherd cow check\"", plural(r.Broken, "violation")))
	}
	return nil
}

func (c *cowRepairCmd) print(s *session, report *repairReport) error {
	if c.JSON {
		return printJSON(s.stdout, report)
	}
	prefix := ""
	if c.DryRun {
		prefix = "would "
	}
	for _, step := range report.Steps {
		if _, err := fmt.Fprintf(s.stdout, "%s: %s%s\n", c.File, prefix, step); err != nil {
			return err
		}
	}
	if len(report.Steps) == 0 {
		_, err := fmt.Fprintf(s.stdout, "%s: nothing to do\n", c.File)
		return err
	}
	if report.Warning != "" {
		_, err := fmt.Fprintf(s.stdout, "%s: warning: %s\n", c.File, report.Warning)
		return err
	}
	return nil
}
