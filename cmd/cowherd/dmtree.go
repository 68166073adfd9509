package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"cowherd/api"
)

// dmTree draws what lies on what.
type dmTree struct {
	options map[string]bool
	devices map[string]*api.DMDevice // mapped devices, by name
	next    map[string][]api.DMDep   // what is drawn below each device, by its key
	out     strings.Builder
}

// treeOptions are the words of ls --tree -o.
var treeOptions = []string{
	"device", "nodevice", "blkdevname", "active", "open", "rw", "uuid", "ascii", "utf", "vt100", "compact", "inverted",
	"notrunc",
}

// checkTreeOptions checks the words of ls --tree -o.
func (r *dmRun) checkTreeOptions() error {
	for word := range strings.SplitSeq(r.flags.Options, ",") {
		if word != "" && !slices.Contains(treeOptions, word) {
			return usagef("--options %q: of a tree: %s", word, strings.Join(treeOptions, ", "))
		}
	}
	return nil
}

// printTree draws devices from the top down or, inverted, from the bottom up.
func (r *dmRun) printTree(devices []api.DMDevice) error {
	t := dmTree{options: map[string]bool{}, devices: map[string]*api.DMDevice{}, next: map[string][]api.DMDep{}}
	for word := range strings.SplitSeq(r.flags.Options, ",") {
		t.options[word] = true
	}
	roots := t.link(devices)
	for _, root := range roots {
		t.line("", root)
		t.below("", root)
	}
	_, err := io.WriteString(r.stdout, t.out.String())
	return err
}

// treeKey tells devices apart, which may have the same name in several tables.
func treeKey(d api.DMDep) string { return fmt.Sprintf("%d:%d", d.Major, d.Minor) }

// link finds out what is below each device, and what is at the top.
func (t *dmTree) link(devices []api.DMDevice) (roots []api.DMDep) {
	isBelow := map[string]bool{}
	var leaves []api.DMDep
	for i := range devices {
		d := &devices[i]
		t.devices[treeKey(depOf(d))] = d
	}
	for i := range devices {
		above := depOf(&devices[i])
		for _, dep := range devices[i].Dependencies {
			isBelow[treeKey(dep)] = true
			if t.options["inverted"] {
				t.next[treeKey(dep)] = append(t.next[treeKey(dep)], above)
			} else {
				t.next[treeKey(above)] = append(t.next[treeKey(above)], dep)
			}
			if t.devices[treeKey(dep)] == nil && !slices.Contains(leaves, dep) {
				leaves = append(leaves, dep)
			}
		}
	}
	if t.options["inverted"] {
		roots = leaves
	}
	for i := range devices {
		d := &devices[i]
		if t.options["inverted"] && len(d.Dependencies) == 0 || !t.options["inverted"] && !isBelow[treeKey(depOf(d))] {
			roots = append(roots, depOf(d))
		}
	}
	return roots
}

// below draws what is below d, behind indent.
func (t *dmTree) below(indent string, d api.DMDep) {
	next := t.next[treeKey(d)]
	for i, x := range next {
		if i+1 < len(next) {
			t.line(indent+" |-", x)
			t.below(indent+" | ", x)
		} else {
			t.line(indent+" `-", x)
			t.below(indent+"   ", x)
		}
	}
}

// line draws one device.
func (t *dmTree) line(prefix string, x api.DMDep) {
	t.out.WriteString(prefix + x.Name)
	if t.options["blkdevname"] {
		t.out.WriteString(" <" + blkdevname(x) + ">")
	}
	if !t.options["nodevice"] {
		t.out.WriteString(" (" + treeKey(x) + ")")
	}
	if d := t.devices[treeKey(x)]; d != nil {
		var words []string
		for _, o := range []struct{ option, word string }{
			{"active", either(d.Suspended, "SUSPENDED", "ACTIVE")}, {"rw", either(d.ReadOnly, "RO", "RW")},
			{"open", fmt.Sprint(d.Open)}, {"uuid", d.UUID},
		} {
			if t.options[o.option] {
				words = append(words, o.word)
			}
		}
		if words != nil {
			t.out.WriteString(" [" + strings.Join(words, ", ") + "]")
		}
	}
	t.out.WriteByte('\n')
}

// either is one of two words.
func either(is bool, yes, no string) string {
	if is {
		return yes
	}
	return no
}
