package main

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"unicode/utf8"

	"cowherd/api"
)

// treeSymbols are what a tree is drawn with.
type treeSymbols struct {
	branch, last, bar string // in front of a device, and beside what is below one
	only, first       string // on the line of the device above, if that is drawn compactly
}

func treeSets() map[string]treeSymbols {
	return map[string]treeSymbols{
		"ascii": {"|-", "`-", "| ", "---", "-+-"},
		"utf":   {"├─", "└─", "│ ", "───", "─┬─"},
		"vt100": {vt100("tq"), vt100("mq"), vt100("x") + " ", vt100("qqq"), vt100("qwq")},
	}
}

// vt100 is text in a terminal's set of line-drawing characters.
func vt100(text string) string { return "\x1b(0\x0f" + text + "\x1b(B" }

// treeSet is how options, or else the locale, want a tree to be drawn.
func treeSet(options map[string]bool) treeSymbols {
	sets := treeSets()
	for name, symbols := range sets {
		if options[name] {
			return symbols
		}
	}
	locale := strings.ToLower(cmp.Or(os.Getenv("LC_ALL"), os.Getenv("LC_CTYPE"), os.Getenv("LANG")))
	if strings.HasSuffix(locale, ".utf-8") || strings.HasSuffix(locale, ".utf8") {
		return sets["utf"]
	}
	return sets["ascii"]
}

// dmTree draws what lies on what.
type dmTree struct {
	options map[string]bool
	symbols treeSymbols
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
	t.symbols = treeSet(t.options)
	roots := t.link(devices)
	compact := t.options["compact"] && !t.options["active"] && !t.options["open"] && !t.options["rw"] && !t.options["uuid"]
	for _, root := range roots {
		if compact {
			t.compact("", root)
			t.out.WriteByte('\n')
			continue
		}
		t.out.WriteString(t.label(root) + "\n")
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
		symbol, deeper := t.symbols.branch, indent+" "+t.symbols.bar
		if i+1 == len(next) {
			symbol, deeper = t.symbols.last, indent+"   "
		}
		t.out.WriteString(indent + " " + symbol + t.label(x) + "\n")
		t.below(deeper, x)
	}
}

// compact draws d, and the first of what is below it on the same line. The next lines are to begin with indent.
func (t *dmTree) compact(indent string, d api.DMDep) {
	label := t.label(d)
	t.out.WriteString(label)
	indent += strings.Repeat(" ", utf8.RuneCountInString(label))
	next := t.next[treeKey(d)]
	for i, x := range next {
		isLast := i+1 == len(next)
		switch {
		case i == 0 && isLast:
			t.out.WriteString(t.symbols.only)
		case i == 0:
			t.out.WriteString(t.symbols.first)
		default:
			t.out.WriteString("\n" + indent + " " + either(isLast, t.symbols.last, t.symbols.branch))
		}
		t.compact(indent+" "+either(isLast, "  ", t.symbols.bar), x)
	}
}

// label is what stands for a device.
func (t *dmTree) label(x api.DMDep) string {
	label := x.Name
	d := t.devices[treeKey(x)]
	if t.options["blkdevname"] && (d == nil || d.Live) { // the kernel's device has none before its first table
		label += " <" + blkdevname(x) + ">"
	}
	if !t.options["nodevice"] {
		label += " (" + treeKey(x) + ")"
	}
	if d == nil {
		return label
	}
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
		label += " [" + strings.Join(words, ", ") + "]"
	}
	return label
}

// either is one of two words.
func either(is bool, yes, no string) string {
	if is {
		return yes
	}
	return no
}
