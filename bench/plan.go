package bench

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// A Plan says what is to be measured. As a file it is TOML:
//
//	title = "What a snapshot costs"
//
//	[defaults]                  # for all cells
//	jobs = [1, 2]               # any field may be a list; lists multiply out
//	compare = "engine"          # cells that differ in this field only are measured in turn, and their ratios told
//
//	[[cell]]
//	name = "first-write"
//	stack = "snapshot-origin"
//	engine = ["serialised", "scaled"]
//	against = "bare-write"      # ratios to the cell of that name whose conditions are the same
type Plan struct {
	Title string

	file     string
	lines    []string
	defaults section
	cells    []section
	overrule section
}

// section is a table of the file: lists of texts by their keys.
type section map[string][]string

// cellsMax bounds what a plan may multiply out to.
const cellsMax = 10000

// A PlanError tells where a plan is wrong.
type PlanError struct {
	File string
	Line int    // 0: it is not known
	Key  string // "": it is about a whole cell
	Err  error
}

// Error tells file, line and key.
func (e *PlanError) Error() string {
	where := e.File
	if e.Line > 0 {
		where += ":" + strconv.Itoa(e.Line)
	}
	if e.Key != "" {
		where += ": " + e.Key
	}
	return where + ": " + e.Err.Error()
}

// Unwrap gives the cause.
func (e *PlanError) Unwrap() error { return e.Err }

// ParsePlan reads a plan. file is its name in errors, which are *PlanError.
func ParsePlan(file string, text []byte) (*Plan, error) {
	var d struct {
		Title    string           `toml:"title"`
		Defaults map[string]any   `toml:"defaults"`
		Cell     []map[string]any `toml:"cell"`
	}
	decoder := toml.NewDecoder(strings.NewReader(string(text))).DisallowUnknownFields()
	if err := decoder.Decode(&d); err != nil {
		e := &PlanError{File: file, Err: err}
		if strict, ok := errors.AsType[*toml.StrictMissingError](err); ok && len(strict.Errors) > 0 {
			e.Line, _ = strict.Errors[0].Position()
			e.Key, e.Err = strings.Join(strict.Errors[0].Key(), "."), errors.New("there is no such key")
		} else if wrong, ok := errors.AsType[*toml.DecodeError](err); ok {
			e.Line, _ = wrong.Position()
			e.Key = strings.Join(wrong.Key(), ".")
		}
		return nil, e
	}
	p := &Plan{Title: d.Title, file: file, lines: strings.Split(string(text), "\n"), overrule: section{}}
	var err error
	if p.defaults, err = p.section(d.Defaults, -1); err != nil {
		return nil, err
	}
	for i, c := range d.Cell {
		s, err := p.section(c, i)
		if err != nil {
			return nil, err
		}
		p.cells = append(p.cells, s)
	}
	if len(p.cells) == 0 {
		return nil, &PlanError{File: file, Err: errors.New("there is no [[cell]]")}
	}
	_, err = p.Cells()
	return p, err
}

// section reads the table of cell i, or the defaults (-1), and checks each value for itself.
func (p *Plan) section(table map[string]any, i int) (section, error) {
	s := section{}
	for key, v := range table {
		fail := func(err error) (section, error) {
			return nil, &PlanError{File: p.file, Line: p.line(i, key), Key: key, Err: err}
		}
		list, ok := v.([]any)
		if !ok {
			list = []any{v}
		}
		for _, v := range list {
			text, err := scalar(v)
			if err != nil {
				return fail(err)
			}
			s[key] = append(s[key], text)
		}
		if err := checkValues(key, s[key]); err != nil {
			return fail(err)
		}
	}
	return s, nil
}

// scalar is the text of a string, a number or a boolean.
func scalar(v any) (string, error) {
	switch v := v.(type) {
	case string:
		return v, nil
	case int64:
		return strconv.FormatInt(v, 10), nil
	case float64:
		return strconv.FormatFloat(v, 'g', -1, 64), nil
	case bool:
		return strconv.FormatBool(v), nil
	}
	return "", errors.New("neither a string, a number nor true or false, nor a list of them")
}

// checkValues tells what is wrong with the values of a key.
func checkValues(key string, values []string) error {
	f, err := fieldOf(key)
	if err != nil {
		return errors.New("there is no such key")
	}
	if len(values) == 0 {
		return errors.New("the list is empty")
	}
	if len(values) > 1 && (key == "compare" || key == "against" || key == "name") {
		return errors.New("it cannot be a list")
	}
	for _, text := range values {
		if err := f.value(&Cell{}).set(text); err != nil {
			return err
		}
	}
	return nil
}

// line is where a key stands in cell i, or in the defaults (-1); without a key, where the table begins. 0: it was not
// found, because it is written in another way.
func (p *Plan) line(i int, key string) int {
	cell, here := -1, false
	for n, line := range p.lines {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[[cell]]") {
			cell++
		}
		if strings.HasPrefix(line, "[") && !strings.Contains(line, "=") {
			here = strings.HasPrefix(line, "[[cell]]") && cell == i || i < 0 && strings.HasPrefix(line, "[defaults]")
			if here && key == "" {
				return n + 1
			}
		}
		if name, _, ok := strings.Cut(line, "="); here && ok && strings.Trim(strings.TrimSpace(name), `"'`) == key {
			return n + 1
		}
	}
	return 0
}

// Set overrules a key in all cells. The values are as they stand in a plan, without quotes.
func (p *Plan) Set(key string, values ...string) error {
	if err := checkValues(key, values); err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	p.overrule[key] = values
	return nil
}

// Cells multiplies the lists out: the cells in the order of the plan, and of fields within each of its cells. Cells that
// differ only in what does not concern them are one.
func (p *Plan) Cells() ([]*Cell, error) {
	var cells []*Cell
	seen := map[Cell]bool{}
	for i, s := range p.cells {
		fail := func(err error) error { return &PlanError{File: p.file, Line: p.line(i, ""), Err: err} }
		combined := section{}
		for _, from := range []section{p.defaults, s, p.overrule} {
			for key, values := range from {
				combined[key] = values
			}
		}
		multiplied := []Cell{defaultCell()}
		for _, f := range fields() {
			values := combined[f.key]
			if len(values) == 0 {
				continue
			}
			if len(multiplied)*len(values) > cellsMax {
				return nil, fail(fmt.Errorf("the lists multiply out to more than %d cells", cellsMax))
			}
			var next []Cell
			for _, c := range multiplied {
				for _, text := range values {
					if err := f.value(&c).set(text); err != nil {
						return nil, fail(fmt.Errorf("%s: %w", f.key, err))
					}
					next = append(next, c)
				}
			}
			multiplied = next
		}
		for _, c := range multiplied {
			c.normalise()
			if err := c.check(); err != nil {
				return nil, fail(err)
			}
			if !seen[c] {
				seen[c] = true
				cells = append(cells, &c)
			}
		}
	}
	labelCells(cells)
	return cells, p.checkAgainst(cells)
}

// checkAgainst tells which cell is compared with one that there is not.
func (p *Plan) checkAgainst(cells []*Cell) error {
	for i, s := range p.cells {
		for _, name := range slices.Concat(s["against"], p.defaults["against"]) {
			if name != "" && !slices.ContainsFunc(p.cells, func(o section) bool { return slices.Contains(o["name"], name) }) {
				return &PlanError{File: p.file, Line: p.line(i, "against"), Key: "against", Err: fmt.Errorf("no cell is named %q", name)}
			}
		}
	}
	if len(cells) > cellsMax {
		return &PlanError{File: p.file, Err: fmt.Errorf("there are more than %d cells", cellsMax)}
	}
	return nil
}
