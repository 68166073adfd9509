package main

import (
	"errors"
	"fmt"

	"cowherd/block"
	"cowherd/clonemeta"
)

type cloneMetadataRepairCmd struct {
	outputFlags
	metadataArgument
	Out    string `arg:"" optional:"" complete:"file" help:"The file to be made, or with --force a block device."`
	DryRun bool   `help:"Only say what would be done; OUT may be left out."`
	Lost   string `enum:"refuse,hydrated,unhydrated" default:"refuse" placeholder:"AS" help:"What becomes of regions of which it cannot be told whether they are hydrated: refuse, hydrated or unhydrated (${default})."`
	Force  bool   `help:"Replace a file that is there, or write to a block device."`
}

func (cloneMetadataRepairCmd) Help() string {
	return `Every bit that can be read goes to OUT, into a new tree with a new space map. FILE is not changed. If there are
regions of which it cannot be told whether they are hydrated, someone has to choose: see cowherd-clone-metadata.md.

Examples:

    cowherd clone-metadata repair vm.clone-metadata --dry-run
    cowherd clone-metadata repair vm.clone-metadata mended
    cowherd clone-metadata repair vm.clone-metadata mended --lost hydrated
`
}

// choices are the values of --lost.
func choices() map[string]clonemeta.Choice {
	return map[string]clonemeta.Choice{
		"refuse": clonemeta.LostRefuse, "hydrated": clonemeta.LostHydrated, "unhydrated": clonemeta.LostUnhydrated,
	}
}

// lostWarnings say what a choice costs.
func lostWarnings() map[string]string {
	return map[string]string{
		"hydrated":   "where one was never copied, it now shows what happened to be on the destination",
		"unhydrated": "where one had been written, it will be copied from the source over what was written",
	}
}

// metadataRepair is what was or would be done, as JSON.
type metadataRepair struct {
	File       string `json:"file"`
	Out        string `json:"out,omitempty"`
	DryRun     bool   `json:"dry_run"`
	Violations int    `json:"violations"` // of FILE
	Remarks    int    `json:"remarks"`
	Regions    uint64 `json:"regions"`
	Hydrated   uint64 `json:"hydrated"` // that could be read
	Lost       uint64 `json:"lost"`
	LostAs     string `json:"lost_as"`
	Warning    string `json:"warning,omitempty"`
}

func (c *cloneMetadataRepairCmd) Run(s *session) error {
	if c.Out == "" && !c.DryRun {
		return usagef("OUT is missing: the metadata that is made goes to a file of its own")
	}
	d, err := c.open()
	if err != nil {
		return err
	}
	config := clonemeta.RepairConfig{Lost: choices()[c.Lost]}
	survey, err := clonemeta.PlanRepair(d, config)
	lost, refused := errors.AsType[*clonemeta.LostError](err)
	if refused {
		err = fmt.Errorf("%w with --lost", lost)
	}
	if err == nil && !c.DryRun {
		err = c.write(d, survey, config)
	}
	if err = errors.Join(c.wrap(err), d.Close()); err != nil {
		return err
	}
	report := metadataRepair{File: c.File, Out: c.Out, DryRun: c.DryRun, Violations: survey.Violations, Remarks: survey.Remarks,
		Regions: survey.Superblock.Regions(), Hydrated: survey.Hydrated, Lost: survey.Lost, LostAs: c.Lost}
	if survey.Lost > 0 {
		report.Warning = lostWarnings()[c.Lost]
	}
	return c.print(s, &report)
}

// write makes OUT.
func (c *cloneMetadataRepairCmd) write(d block.Device, survey *clonemeta.Survey, config clonemeta.RepairConfig) error {
	out, err := openOutput(c.Out, clonemeta.RepairSize(d, survey), c.Force, c.File)
	if err != nil {
		return err
	}
	if err := clonemeta.Repair(out.device, d, survey, config); err != nil {
		return errors.Join(err, out.discard())
	}
	return out.keep(c.Force)
}

func (c *cloneMetadataRepairCmd) print(s *session, r *metadataRepair) error {
	if c.JSON {
		return printJSON(s.stdout, r)
	}
	done := "written to " + c.Out
	if c.DryRun {
		done = "can be written to a new file"
	}
	_, err := fmt.Fprintf(s.stdout, "%s: %s, %s; %d of %d regions hydrated: %s\n", c.File, plural(r.Violations, "violation"),
		plural(r.Remarks, "remark"), r.Hydrated, r.Regions, done)
	if err == nil && r.Lost > 0 {
		_, err = fmt.Fprintf(s.stdout, "%s: warning: %s more as %s: %s\n", c.File, plural(r.Lost, "region"), r.LostAs, r.Warning)
	}
	return err
}
