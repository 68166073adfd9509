package dm_test

import (
	"bufio"
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"

	"cowherd/block"
	"cowherd/dm"
)

// A recorded table, and what Linux made of it.
type recorded struct {
	table   string
	refused string   // why; "" if it was taken
	lines   []string // table and status, one behind the other
}

// readRecorded reads testdata/tables.txt.
func readRecorded(t testing.TB) []recorded {
	t.Helper()
	f, err := os.Open("testdata/tables.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var all []recorded
	for scan := bufio.NewScanner(f); scan.Scan(); {
		line := scan.Text()
		if table, ok := strings.CutPrefix(line, "== "); ok {
			all = append(all, recorded{table: strings.ReplaceAll(table, `\n`, "\n")})
			continue
		}
		if len(all) == 0 || line == "" {
			continue
		}
		x := &all[len(all)-1]
		if cause, ok := strings.CutPrefix(line, "refused: "); ok {
			x.refused = cause
		} else {
			x.lines = append(x.lines, line)
		}
	}
	if len(all) < 100 {
		t.Fatalf("%d tables were read", len(all))
	}
	return all
}

// TestRecorded: what Linux takes is taken, and shown in the same words; what it refuses is refused, with its words for
// why.
func TestRecorded(t *testing.T) {
	x := newRig(t, map[string]block.Device{"$A": memory(t, 64<<20), "$B": memory(t, 64<<20)})
	for _, want := range readRecorded(t) {
		if err := block.Do(x.devices["$B"], block.OpWriteZeroes, 0, 0, 64<<10, nil); err != nil {
			t.Fatal(err)
		}
		err := x.create("x", want.table)
		if want.refused != "" {
			if err == nil {
				t.Errorf("%q is taken; Linux: %s", want.table, want.refused)
			} else if !strings.Contains(strings.ToLower(err.Error()), strings.ToLower(strings.TrimSuffix(want.refused, "."))) {
				t.Errorf("%q: %v; Linux: %s", want.table, err, want.refused)
			}
		} else if err != nil {
			t.Errorf("%q: %v; Linux takes it", want.table, err)
		}
		if err != nil {
			continue
		}
		info := x.info("x")
		var got []string
		for _, line := range append(info.LiveTable, info.LiveState...) {
			got = append(got, line.String())
		}
		if strings.Join(got, "\n") != strings.Join(want.lines, "\n") {
			t.Errorf("%q is shown as\n%s\nLinux:\n%s", want.table, strings.Join(got, "\n"), strings.Join(want.lines, "\n"))
		}
		if err := x.Remove(inTime(t), "x", false); err != nil {
			t.Fatal(err)
		}
	}
}

// TestParseBounds: tables that are too much to read.
func TestParseBounds(t *testing.T) {
	for table, words := range map[string]string{
		strings.Repeat("#", 2<<20):             "2097152 bytes",
		strings.Repeat("0 1 zero\n", 1<<15):    "targets",
		"0 18446744073709551616 zero":          "18446744073709551616 is too large",
		"\n0 8 zero\n0 18014398509481984 zero": "line 3", // 8 EiB
		"18014398509481984 8 zero":             "has 18014398509481983 sectors at most",
		"0 1":                                  "are wanted",
		"0 1x zero":                            "are wanted",
		"\x00":                                 "are wanted",
		"-1 1 zero":                            "are wanted",
	} {
		if _, err := dm.Parse(table); !errors.Is(err, syscall.EINVAL) || !strings.Contains(err.Error(), words) {
			t.Errorf("%.30q: %v", table, err)
		}
	}
	lines, err := dm.Parse("\n # x\n\t5\t6  a\\ b   c d \r\n")
	if err != nil || len(lines) != 1 || lines[0] != (dm.Line{Start: 5, Length: 6, Type: `a\`, Args: "b   c d"}) {
		t.Errorf("got %+v, %v", lines, err)
	}
}

// TestComments: where one begins.
func TestComments(t *testing.T) {
	for args, want := range map[string]string{
		"": "", "a # b": "a", "#": "", "# a": "", "a#b 0": "a#b 0", "a\t#b": "a", "a \\# b": "a \\# b", "a b#": "a b#", "a b #": "a b",
	} {
		lines, err := dm.Parse(" 0 8 x " + args + "\n#0 8 x")
		if err != nil || len(lines) != 1 || lines[0].Args != want {
			t.Errorf("%q: %q, %v", args, lines, err)
		}
	}
}

// TestNumbers: what is wrong with a number is said.
func TestNumbers(t *testing.T) {
	x := newRig(t, map[string]block.Device{"a": memory(t, 64<<20)})
	for table, words := range map[string]string{
		"0 8 linear a 18446744073709551616": "invalid device sector: 18446744073709551616 is more than 18014398509481983",
		"0 8 linear a 18014398509481984":    "invalid device sector: 18014398509481984 is more than 18014398509481983",
		"0 8 linear a 0x8":                  `invalid device sector: "0x8" is no number`,
		"0 8 linear a -1":                   `invalid device sector: "-1" is no number`,
		"0 8 delay a 0 4294967296":          "invalid delay: 4294967296 is more than 4294967295",
		"0 8 striped 0 8 a 0":               "invalid stripe count: 0 is less than 1",
	} {
		if err := x.create("x", table); !errors.Is(err, syscall.EINVAL) || !strings.Contains(err.Error(), words) {
			t.Errorf("%q: %v", table, err)
		}
	}
}

// FuzzTable: whatever is loaded is either refused, with an errno, and leaves nothing behind, or is shown by a table that
// is taken and shown alike.
func FuzzTable(f *testing.F) {
	for _, x := range readRecorded(f) {
		f.Add(x.table)
	}
	devices := map[string]block.Device{"$A": memory(f, 64<<20), "$B": memory(f, 64<<20)}
	f.Fuzz(func(t *testing.T, table string) {
		x := newRig(t, devices)
		err := x.create("x", table)
		if err != nil {
			if errno := syscall.Errno(0); !errors.As(err, &errno) {
				t.Fatalf("%q: %v has no errno", table, err)
			}
			return
		}
		shown := x.info("x").LiveTable
		var text strings.Builder
		for _, line := range shown {
			text.WriteString(line.String() + "\n")
		}
		if err := x.load("x", text.String()); err != nil {
			t.Fatalf("%q is shown as %q, which is refused: %v", table, text.String(), err)
		}
		for i, line := range x.info("x").NextTable {
			if line != shown[i] {
				t.Fatalf("%q is shown as %q, and that as %q", table, shown[i], line)
			}
		}
		if err := x.Remove(t.Context(), "x", false); err != nil {
			t.Fatal(err)
		}
	})
}
