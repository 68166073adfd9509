package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
)

// event is a line of `go test -json`; `go doc test2json` and `go help buildjson` describe them.
type event struct {
	Action  string
	Package string
	Test    string
	Elapsed float64 // seconds
	Output  string
}

// counts are the tests of a package, of a run or of all.
type counts struct{ passed, failed, skipped int }

func (c *counts) add(d counts) {
	c.passed += d.passed
	c.failed += d.failed
	c.skipped += d.skipped
}

func (c counts) String() string {
	return fmt.Sprintf("%d passed, %d failed, %d skipped", c.passed, c.failed, c.skipped)
}

// run is the tests between one line "run: NAME" and the next.
type run struct {
	name string
	counts
}

// note is a test that failed or was skipped, and the runs in which it did.
type note struct {
	text string
	runs []string
}

// summary is what was read so far. Its memory is bounded by the output of the packages under way: a package is
// forgotten when it ends.
type summary struct {
	out      io.Writer
	packages map[string]*pkg // under way, by import path
	runs     []run
	failed   []note
	skipped  []note
}

func newSummary(out io.Writer) *summary {
	return &summary{out: out, packages: map[string]*pkg{}, runs: []run{{}}}
}

// read takes events until the end of r.
func (s *summary) read(r io.Reader) error {
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadString('\n')
		if line != "" {
			s.line(strings.TrimSuffix(line, "\n"))
		}
		if err == io.EOF {
			s.endRun()
			return nil
		}
		if err != nil {
			return fmt.Errorf("read events: %w", err)
		}
	}
}

// line takes one line: an event, the begin of a run, something that was skipped or anything else to be passed on.
func (s *summary) line(line string) {
	var e event
	if strings.HasPrefix(line, "{") && json.Unmarshal([]byte(line), &e) == nil && e.Action != "" {
		s.event(e)
		return
	}
	if name, ok := strings.CutPrefix(line, "run: "); ok {
		s.endRun()
		s.runs = append(s.runs, run{name: name})
		line = "--- " + name
	}
	if what, ok := strings.CutPrefix(line, "skipped: "); ok {
		s.skipped = append(s.skipped, note{text: what})
	}
	fmt.Fprintln(s.out, line)
}

// event passes e to the package that it is about. Output of a build has no package and is printed at once.
func (s *summary) event(e event) {
	if e.Package == "" {
		fmt.Fprint(s.out, e.Output)
		return
	}
	p := s.packages[e.Package]
	if p == nil {
		p = newPkg(e.Package)
		s.packages[e.Package] = p
	}
	if e.Test != "" {
		p.event(e)
		return
	}
	switch e.Action {
	case "output":
		p.output = append(p.output, e.Output)
	case "pass", "fail", "skip":
		delete(s.packages, e.Package)
		s.endPackage(p, e)
	}
}

// endPackage prints and counts a package whose last event is e.
func (s *summary) endPackage(p *pkg, e event) {
	failed, skipped := p.end(e.Action == "fail")
	now := &s.runs[len(s.runs)-1]
	now.add(p.counts)
	s.failed = noteAll(s.failed, failed, now.name)
	s.skipped = noteAll(s.skipped, skipped, now.name)

	took := fmt.Sprintf("%.1fs", e.Elapsed)
	if strings.Contains(strings.Join(p.output, ""), "\t(cached)") {
		took = "cached"
	}
	switch {
	case e.Action == "fail":
		p.printFailures(s.out)
		fmt.Fprintf(s.out, "FAIL  %-32s %7s  %v\n", p.path, took, p.counts)
	case p.counts == counts{}:
		fmt.Fprintf(s.out, "--    %-32s %7s  no tests\n", p.path, "")
	default:
		fmt.Fprintf(s.out, "ok    %-32s %7s  %v\n", p.path, took, p.counts)
	}
}

// endRun fails the packages that have not ended.
func (s *summary) endRun() {
	for _, p := range s.packages {
		p.output = append(p.output, "the events ended before the package did\n")
		s.endPackage(p, event{Action: "fail"})
	}
	clear(s.packages)
}

// finish prints the end of the summary and tells whether all is well.
func (s *summary) finish() bool {
	printNotes(s.out, "failed:", s.failed)
	printNotes(s.out, "skipped:", s.skipped)
	var all counts
	for _, r := range s.runs {
		if r.name != "" {
			fmt.Fprintf(s.out, "%s: %v\n", r.name, r.counts)
		}
		all.add(r.counts)
	}
	fmt.Fprintln(s.out, all)
	return all.failed == 0 && all.passed > 0
}

// noteAll adds texts to notes; one that is known already gets the run's name only.
func noteAll(notes []note, texts []string, runName string) []note {
	for _, text := range texts {
		i := slices.IndexFunc(notes, func(n note) bool { return n.text == text })
		if i < 0 {
			i = len(notes)
			notes = append(notes, note{text: text})
		}
		if runName != "" {
			notes[i].runs = append(notes[i].runs, runName)
		}
	}
	return notes
}

func printNotes(out io.Writer, title string, notes []note) {
	if len(notes) == 0 {
		return
	}
	fmt.Fprintln(out, title)
	for _, n := range notes {
		where := ""
		if len(n.runs) > 0 {
			where = " (" + strings.Join(n.runs, ", ") + ")"
		}
		fmt.Fprintf(out, "  %s%s\n", n.text, where)
	}
}

// position is what t.Skip and t.Error put before their text.
var position = regexp.MustCompile(`^\S+\.go:\d+: `)

// reason is the text that a test was skipped with, found in its output.
func reason(output []string) string {
	for _, line := range slices.Backward(output) {
		text := strings.TrimSpace(line)
		if text != "" && !isFrame(text) {
			return position.ReplaceAllString(text, "")
		}
	}
	return "no reason given"
}

// isFrame tells whether a line is the testing package's own: "=== RUN", "--- SKIP: ...".
func isFrame(line string) bool {
	return strings.HasPrefix(line, "=== ") || strings.HasPrefix(strings.TrimSpace(line), "--- ")
}
