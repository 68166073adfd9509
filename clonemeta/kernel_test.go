package clonemeta

import (
	"fmt"
	"testing"
)

// TestKernelsDevices: what the kernel has made breaks no rule, and says what the kernel said.
func TestKernelsDevices(t *testing.T) {
	for _, x := range kernelsDevices(t) {
		t.Run(x.name, func(t *testing.T) {
			d := deviceOf(t, x.image)
			m, err := Open(d, Params{})
			if err != nil {
				t.Fatal(err)
			}
			words, err := bitsOf(m)
			if err != nil {
				t.Fatal(err)
			}
			used, total := m.Usage()
			status := fmt.Sprintf("8 %d/%d %d %d/%d", used, total, m.RegionSize(), countBits(words), m.Regions())
			if status != x.status {
				t.Errorf("status %q, want %q", status, x.status)
			}
			if _, lines := findings(t, d); len(lines) > 0 {
				t.Errorf("check: %q", lines)
			}
		})
	}
}
