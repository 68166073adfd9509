package bench

import (
	"encoding/json"
	"io"
	"maps"
	"slices"
	"strconv"
)

// briefDigits is how many digits of a number WriteBrief keeps: more than any measurement can repeat.
const briefDigits = 4

// WriteBrief writes the outcome as JSON, in the fields of the whole one, but to be kept: a line for each result and each
// ratio, numbers of briefDigits digits, and no curves of percentiles.
func (o *Outcome) WriteBrief(w io.Writer) error {
	head := *o
	head.Cells, head.Compared = nil, nil
	text, err := json.Marshal(&head)
	if err != nil {
		return err
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(text, &fields); err != nil {
		return err
	}
	b := []byte("{\n")
	for _, key := range []string{"title", "command", "seed", "machine"} {
		b = append(append(append(b, '"'), key...), '"', ':')
		b = append(append(b, fields[key]...), ',', '\n')
	}
	b = append(b, `"results":[`...)
	for i := range o.Cells {
		if b, err = appendLine(b, i, o.Cells[i].brief()); err != nil {
			return err
		}
	}
	b = append(b, "\n],\n\"ratios\":["...)
	for i, c := range o.Compared {
		c.Value, c.Min, c.Max = rounded(c.Value), rounded(c.Min), rounded(c.Max)
		if b, err = appendLine(b, i, c); err != nil {
			return err
		}
	}
	_, err = w.Write(append(b, "\n]\n}\n"...))
	return err
}

// appendLine appends element i of an array on a line of its own.
func appendLine(b []byte, i int, v any) ([]byte, error) {
	if i > 0 {
		b = append(b, ',')
	}
	text, err := json.Marshal(v)
	return append(append(b, '\n'), text...), err
}

// brief is the result without its curve, and with rounded numbers.
func (r CellResult) brief() CellResult {
	r.Percentiles, r.Harness = nil, rounded(r.Harness)
	for _, q := range quantities() {
		f := q.set(&r)
		*f = f.rounded()
	}
	r.Queues, r.Methods, r.Leaves = slices.Clone(r.Queues), slices.Clone(r.Methods), slices.Clone(r.Leaves)
	r.Further = maps.Clone(r.Further)
	for name, f := range r.Further {
		r.Further[name] = f.rounded()
	}
	for i := range r.Queues {
		r.Queues[i] = rounded(r.Queues[i])
	}
	for i := range r.Methods {
		r.Methods[i].Share = rounded(r.Methods[i].Share)
	}
	for i := range r.Leaves {
		l := &r.Leaves[i]
		for _, v := range []*float64{&l.Reads, &l.ReadBytes, &l.Writes, &l.WriteBytes, &l.Flushes, &l.Copies, &l.CopiedBytes} {
			*v = rounded(*v)
		}
	}
	return r
}

func (f Figure) rounded() Figure { return Figure{rounded(f.Median), rounded(f.Min), rounded(f.Max)} }

// rounded is v with briefDigits digits.
func rounded(v float64) float64 {
	v, _ = strconv.ParseFloat(strconv.FormatFloat(v, 'g', briefDigits, 64), 64) // it has just been written
	return v
}
