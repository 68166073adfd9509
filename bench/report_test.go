package bench

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestReport makes a report and looks at all of it: the page is well-formed and refers to nothing outside, every plot is a
// file, and every one names the command.
func TestReport(t *testing.T) {
	_, cells := parse(t, `
[defaults]
size = "1m"
jobs = [1, 2]
depth = 1
repetitions = 2
[[cell]]
name = "bare"
counted = true
[[cell]]
name = "first"
stack = "snapshot-origin"
engine = ["serialised", "scaled"]
compare = "engine"
against = "bare"
`)
	o := runCells(t, cells)
	o.Title, o.Command, o.Machine = "A <title> & more", "cowherd bench run 'a<b>.toml'", ThisMachine("v0")
	dir := filepath.Join(t.TempDir(), "new", "report")
	if err := o.WriteReport(dir); err != nil {
		t.Fatal(err)
	}
	page := read(t, dir, "report.html")
	texts := xmlTexts(t, strings.TrimPrefix(page, "<!DOCTYPE html>\n"))
	for _, want := range []string{o.Title, o.Command, o.Machine.Go, "first, jobs 2, scaled", "Ratios", "Share of each queue", "Bytes copied by each method"} {
		if !strings.Contains(texts, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	for _, outside := range []string{"http", "src=", "href=", "@import", "url(//", "<script"} {
		if strings.Contains(page, outside) {
			t.Errorf("the page has %q", outside)
		}
	}
	svgs := 0
	for _, name := range readDir(t, dir) {
		if strings.HasSuffix(name, ".svg") {
			svgs++
			if text := xmlTexts(t, read(t, dir, name)); !strings.Contains(text, o.Command) {
				t.Errorf("%s does not name the command", name)
			}
		}
	}
	if n := strings.Count(page, "<figure"); n != svgs || n < 8 {
		t.Errorf("%d figures, %d files", n, svgs)
	}
	checkFiles(t, o, dir)
}

// checkFiles looks at the files for programs.
func checkFiles(t *testing.T, o *Outcome, dir string) {
	t.Helper()
	var back Outcome
	if err := json.Unmarshal([]byte(read(t, dir, "results.json")), &back); err != nil || len(back.Cells) != len(o.Cells) ||
		back.Cells[0].Ops != o.Cells[0].Ops || back.Seed != 1 || back.Machine != o.Machine || len(back.Compared) != len(o.Compared) {
		t.Errorf("results.json: %v", err)
	}
	for name, rows := range map[string]int{"results.csv": len(o.Cells), "ratios.csv": len(o.Compared)} {
		list, err := csv.NewReader(strings.NewReader(read(t, dir, name))).ReadAll()
		if err != nil || len(list) != rows+1 {
			t.Errorf("%s: %d rows, want %d, %v", name, len(list), rows+1, err)
		}
	}
	var table bytes.Buffer
	if err := o.WriteTable(&table); err != nil || !regexp.MustCompile(`first scaled/serialised iops +first, jobs 2, scaled`).MatchString(table.String()) {
		t.Errorf("%v\n%s", err, table.String())
	}
}

func read(t *testing.T, dir, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// xmlTexts are the texts of what must be well-formed.
func xmlTexts(t *testing.T, text string) string {
	t.Helper()
	d := xml.NewDecoder(strings.NewReader(text))
	var b strings.Builder
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return b.String()
		}
		if err != nil {
			t.Fatal(err)
		}
		if c, ok := token.(xml.CharData); ok {
			b.Write(c)
		}
	}
}
