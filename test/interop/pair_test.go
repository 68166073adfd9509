//go:build interop

package interop

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cowherd/block"
)

const (
	kib = 1 << 10
	mib = 1 << 20
	// originSize is that of most origins: the last chunk, whatever its size, is not whole.
	originSize = 20*mib + 7*block.SectorSize
)

// newChunkMin is the least chunk size of a store that cowherd makes.
const newChunkMin = 4 * kib

// stores are the kinds of stores that are handed over: type and chunk size, and the size of a COW device on which
// everything has room.
var stores = []struct {
	kind  string
	chunk int64
	cow   int64
}{
	{"P", block.SectorSize, 30 * mib},
	{"P", 4 * kib, 30 * mib},
	{"PO", 16 * kib, 30*mib + 3*block.SectorSize},
	{"P", 64 * kib, 30 * mib},
	{"P", 1 * mib, 30 * mib},
}

// pair is an origin and its COW device, as files, and a model of what origin and snapshot must show.
type pair struct {
	t           *testing.T
	kind        string // of the store: P or PO
	chunk       int64  // bytes
	origin, cow string // paths
	originModel []byte
	viewModel   []byte
	status      string // the line with which the store was left
	writes      uint64 // workloads so far: each has a seed of its own
}

// newPair makes an origin with data in most places and an empty COW device.
func newPair(t *testing.T, kind string, chunk, originSize, cowSize int64) *pair {
	t.Helper()
	dir := t.TempDir()
	p := &pair{t: t, kind: kind, chunk: chunk, origin: filepath.Join(dir, "origin.img"), cow: filepath.Join(dir, "cow.img")}
	p.originModel = make([]byte, originSize)
	p.random(int(originSize/mib)*8, 1, 500).apply(p.originModel)
	p.viewModel = bytes.Clone(p.originModel)
	if err := os.WriteFile(p.origin, p.originModel, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.cow, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(p.cow, cowSize); err != nil {
		t.Fatal(err)
	}
	return p
}

// table is the end of the snapshot's table line: store type and chunk size in sectors.
func (p *pair) table() string { return fmt.Sprintf("%s %d", p.kind, p.chunk/block.SectorSize) }

// random is a workload that is like no other of the pair.
func (p *pair) random(count, least, most int) workload {
	p.writes++
	return workload{Seed: uint64(p.chunk)<<16 | p.writes, Count: count, Min: least, Max: most}
}

// load is a part of what is written to a pair: to the snapshot, or to the origin.
type load struct {
	snap bool
	workload
}

// loads are writes to both, by turns: small ones, whole chunks, and long ones.
func (p *pair) loads() []load {
	chunk := int(p.chunk / block.SectorSize)
	small, long := min(120, int(8*mib/p.chunk)), min(8, int(8*mib/p.chunk))
	var loads []load
	for range 2 {
		for _, snap := range []bool{true, false} {
			loads = append(loads,
				load{snap, p.random(small, 1, 24)},
				load{snap, p.random(small, chunk, chunk)},
				load{snap, p.random(long, 64, 600)})
		}
	}
	return loads
}

// apply does what was written to the model.
func (p *pair) apply(loads []load) {
	for _, l := range loads {
		if l.snap {
			l.apply(p.viewModel)
		} else {
			l.apply(p.originModel)
		}
	}
}

// script does loads in the guest.
func script(loads []load) (text string) {
	for _, l := range loads {
		device := "origin"
		if l.snap {
			device = "snap"
		}
		text += fmt.Sprintf("io write $%s %s\n", device, l)
	}
	return text
}

// look checks what the guest has seen under a name of a look against the model, and returns the status line.
func (p *pair) look(g *guest, name string) (status string) {
	p.t.Helper()
	if got, want := g.report(name+" view"), sumBytes(p.viewModel); got != want {
		p.t.Errorf("%s: under Linux the snapshot has the checksum %s, the model %s", name, got, want)
	}
	if got, want := g.report(name+" origin"), sumBytes(p.originModel); got != want {
		p.t.Errorf("%s: under Linux the origin has the checksum %s, the model %s", name, got, want)
	}
	return g.report(name + " status")
}

// checkStore asks cowherd's tools what they think of the store. When nobody has left a status line, what they count is
// the line with which it is left.
func (p *pair) checkStore() {
	p.t.Helper()
	p.checkFormat()
	info := p.info()
	if p.status == "" {
		p.status = info.Status
	}
	if info.Status != p.status || info.ChunkBytes != p.chunk || !info.Valid {
		p.t.Errorf("cow info says %+v; the store was left with %q and has chunks of %d", info, p.status, p.chunk)
	}
	p.checkExport()
}

// checkFormat expects that the store keeps all rules of the format.
func (p *pair) checkFormat() {
	p.t.Helper()
	if out := cowherd(p.t, "cow", "check", "--origin", p.origin, p.cow); out != "" {
		p.t.Errorf("cow check is not silent:\n%s", out)
	}
}

// info is what cow info says of the store.
func (p *pair) info() (info struct {
	State, Status string
	Valid         bool
	ChunkBytes    int64 `json:"chunk_bytes"`
	Exceptions    uint64
	GapChunks     uint64 `json:"gap_chunks"`
}) {
	p.t.Helper()
	if err := json.Unmarshal([]byte(cowherd(p.t, "cow", "info", "--json", p.cow)), &info); err != nil {
		p.t.Fatal(err)
	}
	return info
}

// checkExport expects that the exported view is the model's.
func (p *pair) checkExport() {
	p.t.Helper()
	if got, want := sumBytes(p.export()), sumBytes(p.viewModel); got != want {
		p.t.Errorf("the exported view has the checksum %s, the model %s", got, want)
	}
}

// export is the view that cow export writes.
func (p *pair) export() []byte {
	p.t.Helper()
	path := filepath.Join(p.t.TempDir(), "view.img")
	cowherd(p.t, "cow", "export", "--origin", p.origin, p.cow, path)
	view, err := os.ReadFile(path)
	if err != nil {
		p.t.Fatal(err)
	}
	return view
}

// adopt takes the exported view and what the origin holds for the model, where nobody knows exactly what was written.
func (p *pair) adopt() {
	p.t.Helper()
	p.adoptOrigin()
	p.viewModel = p.export()
}

// checkInvalid asks cowherd's tools and a daemon what they think of a store that is invalid.
func (p *pair) checkInvalid() {
	p.t.Helper()
	p.checkFormat()
	if info := p.info(); info.Status != "Invalid" || info.Valid {
		p.t.Errorf("cow info says %+v of an invalid store", info)
	}
	view := filepath.Join(p.t.TempDir(), "view.img")
	if status, _, stderr := tryCowherd(p.t, "cow", "export", "--origin", p.origin, p.cow, view); status != 1 ||
		!strings.Contains(stderr, "invalid") {
		p.t.Errorf("cow export of an invalid store: status %d, %q", status, stderr)
	}
	d := newDaemon(p.t)
	d.start()
	d.do("attach", live, p.origin)
	d.refuses("invalid", "snapshot", snap, "--reopen", "--store", p.cow)
	if !bytes.Equal(d.contents(live), p.originModel) {
		p.t.Error("cowherd shows another origin than the model")
	}
	d.stop()
}

// checkDaemon asks a daemon, which writes nothing.
func (p *pair) checkDaemon() {
	p.t.Helper()
	d := newDaemon(p.t)
	d.start()
	d.take(p, false)
	if got := d.status(); got != p.status {
		p.t.Errorf("cowherd takes the store over with %q, it was left with %q", got, p.status)
	}
	d.look(p, "taken")
	d.stop()
}
