package bench

import (
	"embed"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
)

//go:embed plans/*.toml
var plans embed.FS

// Suites are the names of the plans that come with cowherd, without those of DMTests.
func Suites() []string {
	var names []string
	entries, _ := fs.ReadDir(plans, "plans") // embedded: it is there
	for _, e := range entries {
		names = append(names, strings.TrimSuffix(e.Name(), path.Ext(e.Name())))
	}
	return names
}

// SuiteText is a suite's plan as it would stand in a file. A test of device-mapper-test-suite counts as a suite.
func SuiteText(name string) ([]byte, error) {
	if text, err := plans.ReadFile("plans/" + name + ".toml"); err == nil {
		return text, nil
	}
	if t, ok := dmTestOf(name); ok {
		return []byte(t.plan()), nil
	}
	return nil, fmt.Errorf("there is no suite %q", name)
}

// dmTest is a test of device-mapper-test-suite (lib/dmtest/tests/snapshot) in the shape that it has there, but for the
// device, which is smaller (80 GiB there), and the time.
type dmTest struct {
	name                  string
	stack, store, pattern string
	block                 string
	jobs, depth           string
	chunk                 string
	read                  int
	later                 bool
}

// DMTests are the tests of device-mapper-test-suite whose names are suites. N stands for a transient snapshot, P for a
// persistent one; without either it is N.
func DMTests() []string {
	var names []string
	for _, t := range dmTests() {
		names = append(names, t.name)
	}
	return names
}

func dmTestOf(name string) (dmTest, bool) {
	all := dmTests()
	i := slices.IndexFunc(all, func(t dmTest) bool { return t.name == name || t.name == name+"_N" })
	if i < 0 {
		return dmTest{}, false
	}
	return all[i], true
}

func dmTests() []dmTest {
	var list []dmTest
	stores := []struct{ suffix, store string }{{"_N", Transient}, {"_P", Persistent}}
	add := func(t dmTest) {
		if t.store != "" {
			list = append(list, t)
			return
		}
		name := t.name
		for _, s := range stores {
			t.name, t.store = name+s.suffix, s.store
			list = append(list, t)
		}
	}
	for _, on := range []struct{ name, stack, store string }{
		{"origin", stackSnapshotOrigin, ""}, {"snapshot", stackSnapshot, ""}, {"raw_device", stackBare, "none"},
	} {
		for _, rw := range []struct {
			name, pattern, block, depth string
			read                        int
		}{
			{"randwrite_throughput", patternRandom, "4k", "32", 0}, {"randwrite_iod", patternRandom, "4k", "32", 0},
			{"randwrite_latency", patternRandom, "4k", "1", 0}, {"seqwrite_throughput", patternSequential, "256k", "32", 0},
			{"seqwrite_iod", patternSequential, "256k", "32", 0}, {"randread_throughput", patternRandom, "4k", "32", 100},
			{"randread_latency", patternRandom, "4k", "1", 100}, {"seqread_throughput", patternSequential, "256k", "32", 100},
		} {
			if rw.read > 0 && on.name == "origin" {
				continue // reads of an origin are those of the device
			}
			add(dmTest{
				name: "fio_" + on.name + "_" + rw.name, stack: on.stack, store: on.store, pattern: rw.pattern, block: rw.block, read: rw.read,
				jobs: "[1, 2, 4, 8]", depth: rw.depth, chunk: `"4k"`,
			})
		}
	}
	sizes := dmTest{
		stack: stackSnapshotOrigin, pattern: patternSequential, jobs: "1", depth: "1", chunk: `["4k", "8k", "16k", "32k", "64k"]`,
		block: "",
	}
	breaking, broken, raw := sizes, sizes, sizes
	breaking.name = "snap_breaking_throughput"
	broken.name, broken.later = "snap_already_broken_throughput", true
	raw.name, raw.stack, raw.store = "linear_throughput", stackMapped, "none"
	add(breaking)
	add(broken)
	add(raw)
	return list
}

// plan is the test as a plan.
func (t dmTest) plan() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# %s of device-mapper-test-suite: there the device has 80 GiB and a run takes up to two minutes.\n", t.name)
	fmt.Fprintf(&b, "title = %q\n\n[[cell]]\nname = %q\nstack = %q\n", t.name, t.name, t.stack)
	device := deviceNull
	if t.store == Persistent {
		device = deviceMem // which keeps the store
	}
	fmt.Fprintf(&b, "device = %q\nsize = \"1g\"\ntime = \"2s\"\nrepetitions = 3\n", device)
	block := fmt.Sprintf("%q", t.block)
	if t.block == "" {
		block = `["64k", "128k", "256k", "512k", "1m"]`
	}
	fmt.Fprintf(&b, "block = %s\npattern = %q\nread = %d\njobs = %s\ndepth = %s\n", block, t.pattern, t.read, t.jobs, t.depth)
	if t.stack == stackMapped {
		b.WriteString("layers = 1\n")
	}
	if t.store != "none" {
		writes := writesFirst
		if t.later {
			writes = writesLater
		}
		fmt.Fprintf(&b, "store = %q\nwrites = %q\nchunk = %s\nengine = [\"serialised\", \"scaled\"]\ncompare = \"engine\"\n",
			t.store, writes, t.chunk)
	}
	return b.String()
}
