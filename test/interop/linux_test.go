//go:build interop

package interop

import (
	"fmt"
	"strings"
	"testing"
)

// TestInvalid: what Linux has made invalid, for want of room, is invalid for cowherd too, and the origin is whole.
func TestInvalid(t *testing.T) {
	for _, device := range []string{"origin", "snap"} {
		t.Run(device, func(t *testing.T) {
			t.Parallel()
			p := newPair(t, "P", 4*kib, originSize, 1*mib)
			fill := p.random(400, 1, 24)
			g := kernel(t, fmt.Sprintf(`activate %s
echo "error: $(io fill $%s %s)"
echo "status: $(status snap)"
echo "view: $(io sum $snap)"
echo "origin: $(io sum $origin)"
deactivate
`, p.table(), device, fill), p.origin, p.cow)
			if device == "origin" {
				fill.apply(p.originModel)
			} else if g.report("error") == "" {
				t.Error("no write to the snapshot fails")
			}
			if g.report("status") != "Invalid" || !strings.HasPrefix(g.report("view"), "unreadable") ||
				g.report("origin") != sumBytes(p.originModel) {
				t.Fatalf("the guest reports:\n%s", g.Output)
			}
			p.status = "Invalid"
			p.checkInvalid()
		})
	}
}

// TestOverflow: a store of the type PO that a write to the snapshot has filled stays readable and valid.
func TestOverflow(t *testing.T) {
	t.Parallel()
	p := newPair(t, "PO", 4*kib, originSize, 1*mib)
	before, fill := p.random(40, 1, 8), p.random(400, 1, 24)
	g := kernel(t, fmt.Sprintf(`activate %s
io write $origin %s
echo "error: $(io fill $snap %s)"
echo "overflow: $(status snap)"
echo "view: $(io sum $snap)"
deactivate
activate %s
echo "again: $(io sum $snap)"
echo "status: $(status snap)"
deactivate
`, p.table(), before, fill, p.table()), p.origin, p.cow)
	before.apply(p.originModel)
	if g.report("error") == "" || g.report("overflow") != "Overflow" || g.report("view") != g.report("again") {
		t.Fatalf("the guest reports:\n%s", g.Output)
	}
	p.status = g.report("status")
	p.adopt()
	if got := sumBytes(p.viewModel); got != g.report("view") {
		t.Errorf("the exported view has the checksum %s, under Linux it has %s", got, g.report("view"))
	}
	p.checkStore()
	p.checkDaemon()
}

// TestLinuxCrash: Linux stops in the midst of writes to the origin. The snapshot is whole, and cowherd goes on with it.
func TestLinuxCrash(t *testing.T) {
	t.Parallel()
	p := newPair(t, "P", 4*kib, originSize, 30*mib)
	before := p.random(100, 1, 24)
	g := kernel(t, fmt.Sprintf(`activate %s
io write $snap %s
io write $origin %s &
io write $origin %s &
sleep 1
`, p.table(), before, p.random(1e6, 1, 8), p.random(1e6, 8, 16)), p.origin, p.cow)
	before.apply(p.viewModel)
	p.adoptOrigin()
	p.checkStore()
	t.Logf("stopped: %+v %s", p.info(), g.Output)
	p.holdCowherd(false)
	p.checkStore()
}
