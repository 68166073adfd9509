//go:build interop

package interop

import (
	"fmt"
	"testing"
)

// hand is who has a store: it takes it as the one before has left it (fresh: it makes a new one), looks at it, writes
// on, looks again and leaves it.
type hand struct {
	name string
	hold func(p *pair, fresh bool)
}

var (
	linuxHand   = hand{"linux", (*pair).holdLinux}
	cowherdHand = hand{"cowherd", (*pair).holdCowherd}
)

// TestRelay hands stores from Linux to cowherd and back, and the other way round. Each sees what the model holds and
// counts the usage that the one before has counted.
func TestRelay(t *testing.T) {
	for _, c := range stores {
		for _, hands := range [][2]hand{{linuxHand, cowherdHand}, {cowherdHand, linuxHand}} {
			if hands[0].name == cowherdHand.name && c.chunk < newChunkMin {
				continue // cowherd makes no such store, and uses those that there are
			}
			t.Run(fmt.Sprintf("%s-%d-%s", c.kind, c.chunk, hands[0].name), func(t *testing.T) {
				t.Parallel()
				needLab(t)
				p := newPair(t, c.kind, c.chunk, originSize, c.cow)
				for i := range 3 {
					hands[i%2].hold(p, i == 0)
					p.checkStore()
				}
			})
		}
	}
}

// holdLinux is Linux's turn.
func (p *pair) holdLinux(fresh bool) {
	p.t.Helper()
	loads := p.loads()
	g := kernel(p.t, fmt.Sprintf("activate %s\nlook taken\n%slook left\ndeactivate\n", p.table(), script(loads)),
		p.origin, p.cow)
	if got := p.look(g, "taken"); !fresh && got != p.status {
		p.t.Errorf("Linux takes the store over with %q, it was left with %q", got, p.status)
	}
	p.apply(loads)
	p.status = p.look(g, "left")
	if got, want := g.report("left table"), p.table(); got != want {
		p.t.Errorf("Linux has the table %q, want %q", got, want)
	}
}

// holdCowherd is cowherd's turn.
func (p *pair) holdCowherd(fresh bool) {
	p.t.Helper()
	d := newDaemon(p.t)
	d.start()
	d.take(p, fresh)
	if got := d.status(); !fresh && got != p.status {
		p.t.Errorf("cowherd takes the store over with %q, it was left with %q", got, p.status)
	}
	d.look(p, "taken")
	loads := p.loads()
	d.write(loads)
	p.apply(loads)
	d.look(p, "left")
	p.status = d.status()
	d.stop()
}
