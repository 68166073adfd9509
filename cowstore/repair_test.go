package cowstore

import (
	"bytes"
	"errors"
	"strings"
	"syscall"
	"testing"

	"cowherd/block"
	"cowherd/internal/fault"
)

// image is all bytes of the device.
func (h *handmade) image(t *testing.T) []byte {
	t.Helper()
	p := make([]byte, h.device.Size())
	if err := block.Read(h.device, p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestRepair(t *testing.T) {
	invalid := func(t *testing.T, h *handmade) { h.field(t, 4, 0) }
	leftover := func(t *testing.T, h *handmade) {
		h.record(t, 0, 3, Record{9, 9})
		h.record(t, 0, 255, Record{9, 9})
	}
	both := func(t *testing.T, h *handmade) { invalid(t, h); leftover(t, h) }
	odd := func(t *testing.T, h *handmade) { h.field(t, 4, 7) }
	good, bad := []Record{{7, 2}, {3, 3}}, []Record{{7, 2}, {7, 4}}
	for _, test := range []struct {
		name    string
		records []Record
		spoil   func(*testing.T, *handmade)
		config  RepairConfig
		steps   []string // parts of the steps
		broken  int
		fails   string
	}{
		{"nothing to do", good, nil, RepairConfig{}, nil, 0, ""},
		{"leftover", good, leftover, RepairConfig{}, []string{"area 0 from slot 2 on"}, 0, ""},
		{"leftover of an empty table", nil, leftover, RepairConfig{}, []string{"area 0 from slot 0 on"}, 0, ""},
		{"leftover, invalid", good, both, RepairConfig{}, []string{"area 0 from slot 2 on"}, 0, ""},
		{"invalid stays so", good, invalid, RepairConfig{}, nil, 0, ""},
		{"set valid", good, invalid, RepairConfig{SetValid: true}, []string{"make the store valid"}, 0, ""},
		{"set valid a valid one", good, nil, RepairConfig{SetValid: true}, nil, 0, ""},
		{"set valid with a leftover", good, both, RepairConfig{SetValid: true}, []string{"area 0 from slot 2 on", "make the store valid"}, 0, ""},
		{"set valid a broken one", bad, invalid, RepairConfig{SetValid: true}, nil, 0, "(1 violations): the store cannot be made valid"},
		{"set valid behind the origin", good, invalid, RepairConfig{SetValid: true, OriginSize: 1 << 14}, nil, 0, "cannot be made valid"},
		{"set valid without an end", full(4096, 1), invalid, RepairConfig{SetValid: true}, nil, 0, "cannot be made valid"},
		{"broken", bad, nil, RepairConfig{}, nil, 1, ""},
		{"invalidate a broken one", bad, leftover, RepairConfig{Invalidate: true},
			[]string{"make the store invalid", "area 0 from slot 2 on"}, 1, ""},
		{"invalidate an invalid one", bad, invalid, RepairConfig{Invalidate: true}, nil, 1, ""},
		{"both", good, nil, RepairConfig{Invalidate: true, SetValid: true}, nil, 0, "at once"},
		{"odd field", good, odd, RepairConfig{}, nil, 1, ""},
		{"odd field, valid", good, odd, RepairConfig{SetValid: true}, []string{"make the store valid"}, 0, ""},
		{"odd field, invalid", good, odd, RepairConfig{Invalidate: true}, []string{"make the store invalid"}, 0, ""},
		{"no header", good, func(t *testing.T, h *handmade) { h.field(t, 0, 7) }, RepairConfig{}, nil, 1, ""},
		{"no header, invalidate", good, func(t *testing.T, h *handmade) { h.field(t, 0, 7) }, RepairConfig{Invalidate: true}, nil, 1, "the header is damaged"},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := newHandmade(t, 4096, 258, 0, test.records...)
			if test.spoil != nil {
				test.spoil(t, h)
			}
			before := h.image(t)
			r, err := PlanRepair(h.device, test.config)
			if !bytes.Equal(before, h.image(t)) {
				t.Fatal("the plan has written")
			}
			if test.fails != "" {
				if err == nil || !strings.Contains(err.Error(), test.fails) {
					t.Errorf("got %v, want %q", err, test.fails)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if len(r.Steps) != len(test.steps) || r.Broken != test.broken {
				t.Fatalf("steps %q, %d violations stay; want %q, %d", r.Steps, r.Broken, test.steps, test.broken)
			}
			for i, want := range test.steps {
				if !strings.Contains(r.Steps[i], want) {
					t.Errorf("step %q, want %q", r.Steps[i], want)
				}
			}
			if err := r.Apply(); err != nil {
				t.Fatal(err)
			}
			checkRepaired(t, h, r, test.config)
		})
	}
}

// checkRepaired checks what a repair leaves: the same records, the header as it was wanted, nothing to do.
func checkRepaired(t *testing.T, h *handmade, r *Repair, c RepairConfig) {
	t.Helper()
	s, found := h.check(t, c.OriginSize)
	if s.Violations != r.Broken || s.Remarks > 0 && s.Ended {
		t.Errorf("afterwards: %q", found)
	}
	if s.Exceptions != r.Survey.Exceptions || s.NewMax != r.Survey.NewMax {
		t.Errorf("afterwards: %+v; before: %+v", s, r.Survey)
	}
	if want := (r.Survey.Header.Valid || c.SetValid) && !c.Invalidate; s.Header.Valid != want {
		t.Errorf("valid: %v, want %v", s.Header.Valid, want)
	}
	again, err := PlanRepair(h.device, c)
	if err != nil || len(again.Steps) > 0 {
		t.Errorf("there is something to do again: %+v, %v", again, err)
	}
}

func TestRepairErrors(t *testing.T) {
	for name, op := range map[string]block.Op{"write": block.OpWrite, "flush": block.OpFlush} {
		h := newHandmade(t, 4096, 10, 0, Record{1, 2})
		h.record(t, 0, 3, Record{9, 9})
		d := fault.New(h.device)
		r, err := PlanRepair(d, RepairConfig{Invalidate: true})
		if err != nil {
			t.Fatal(err)
		}
		for i, want := range []string{"write the header: ", "erase behind the end of the table: "} {
			seen := 0
			d.Fail(func(r *block.Request) error {
				if r.Op == op {
					if seen++; seen > i {
						return syscall.EIO
					}
				}
				return nil
			})
			if err := r.Apply(); !errors.Is(err, syscall.EIO) || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("%s %d: got %v, want %q", name, i, err, want)
			}
		}
	}
}
