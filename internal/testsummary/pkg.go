package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// pkg is a package whose tests are under way.
type pkg struct {
	path   string
	tests  map[string]*test
	order  []*test  // as they began
	output []string // what belongs to no test
	counts
}

// test is a test or a subtest. Its output is dropped when it passes.
type test struct {
	name        string
	output      []string
	result      string // "" while it runs, then pass, fail or skip
	parent      bool   // it has subtests
	childFailed bool
}

func newPkg(path string) *pkg {
	return &pkg{path: path, tests: map[string]*test{}}
}

// event takes an event of one test.
func (p *pkg) event(e event) {
	t := p.tests[e.Test]
	if t == nil {
		t = &test{name: e.Test}
		p.tests[e.Test] = t
		p.order = append(p.order, t)
		p.ancestors(t, func(a *test) { a.parent = true })
	}
	switch e.Action {
	case "output":
		t.output = append(t.output, e.Output)
	case "pass":
		t.result = e.Action
		t.output = nil
	case "fail", "skip":
		t.result = e.Action
	}
}

// ancestors calls f for the tests that t is a subtest of. The name of a subtest may itself contain slashes.
func (p *pkg) ancestors(t *test, f func(*test)) {
	for i, c := range t.name {
		if c == '/' && p.tests[t.name[:i]] != nil {
			f(p.tests[t.name[:i]])
		}
	}
}

// end counts the tests when the package has ended, and lists those that failed and, with their reason, those that
// were skipped.
func (p *pkg) end(packageFailed bool) (failed, skipped []string) {
	// Backwards, because subtests begin after what they are part of: whether one failed must be known there.
	for i := len(p.order) - 1; i >= 0; i-- {
		t := p.order[i]
		if t.result == "" && packageFailed {
			t.result = "fail"
			t.output = append(t.output, "the package ended before the test did\n")
		}
		switch {
		case t.result == "pass" && !t.parent:
			p.passed++
		case t.result == "skip":
			p.skipped++
			skipped = append(skipped, fmt.Sprintf("%s %s: %s", p.path, t.name, reason(t.output)))
		case t.result == "fail":
			p.ancestors(t, func(a *test) { a.childFailed = true })
			if !t.childFailed {
				p.failed++
				failed = append(failed, p.path+" "+t.name)
			}
		}
	}
	if packageFailed && p.failed == 0 {
		p.failed++
		failed = append(failed, p.path)
	}
	slices.Reverse(failed)
	slices.Reverse(skipped)
	return failed, skipped
}

// printFailures prints the whole output of the tests that failed, then what belongs to no test. It leaves out what the
// summary itself says.
func (p *pkg) printFailures(out io.Writer) {
	for _, t := range p.order {
		if t.result != "fail" {
			continue
		}
		for _, line := range t.output {
			if !strings.HasPrefix(line, "=== ") {
				fmt.Fprint(out, line)
			}
		}
	}
	for _, line := range p.output {
		if line != "PASS\n" && line != "FAIL\n" && !strings.HasPrefix(line, "FAIL\t") {
			fmt.Fprint(out, line)
		}
	}
}
