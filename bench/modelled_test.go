package bench

import (
	"strings"
	"testing"
)

// TestModel measures little, and looks at what the model makes of it: not at figures, which a busy machine decides.
func TestModel(t *testing.T) {
	defer func(all []int) { predictedCPUs = all }(predictedCPUs)
	predictedCPUs = []int{1, 2, 8} // the others take long
	text, err := SuiteText(ModelSuite)
	if err != nil {
		t.Fatal(err)
	}
	p, err := ParsePlan(ModelSuite, text)
	if err != nil {
		t.Fatal(err)
	}
	for key, value := range map[string]string{"size": "2m", "repetitions": "1", "depth": "4", "cpus": "1", "jobs": "1"} {
		if err := p.Set(key, value); err != nil {
			t.Fatal(err)
		}
	}
	cells, err := p.Cells()
	if err != nil {
		t.Fatal(err)
	}
	o, err := (&Runner{Cells: cells, Seed: 1}).Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r, err := Model(o)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Observed) != len(cells) || len(r.Ahead) != 2*2*len(predictedCPUs) {
		t.Errorf("%d loads of %d cells, %d predictions", len(r.Observed), len(cells), len(r.Ahead))
	}
	for _, x := range r.Ahead {
		if x.Throughput.Min <= 0 || x.Throughput.Max < x.Throughput.Min || x.OtherBusiest < x.ScaledBusiest {
			t.Errorf("%+v", x)
		}
	}
	var table strings.Builder
	if err := r.WriteTable(&table); err != nil || !strings.Contains(table.String(), "onelock") {
		t.Errorf("%v\n%s", err, &table)
	}
	if _, err := Model(&Outcome{}); err == nil {
		t.Error("a model was fitted to nothing")
	}
}
