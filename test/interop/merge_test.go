//go:build interop

package interop

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestMergeFromLinux: a merge that Linux has begun, while it was written, and was stopped, is ended by cowherd's tool
// and, from the same state, by its daemon.
func TestMergeFromLinux(t *testing.T) {
	for _, chunk := range []int64{4 * kib, 16 * kib} {
		t.Run(fmt.Sprint(chunk), func(t *testing.T) {
			t.Parallel()
			p := newPair(t, "P", chunk, originSize, 30*mib)
			loads, during := p.loads(), p.random(30, 1, 24)
			g := kernel(t, fmt.Sprintf(`activate %[1]s
%[2]s
deactivate
start_merge %[1]s 5
all=$(unmerged)
io write /dev/mapper/merge %[3]s
await_merge $((all / 2))
stop_merge
echo "all: $all"
activate %[1]s
look stopped
deactivate
`, p.table(), script(loads), during), p.origin, p.cow)
			p.apply(loads)
			during.apply(p.viewModel)
			p.adoptOrigin() // some of it is merged
			p.status = p.look(g, "stopped")
			t.Logf("%s sectors of exceptions, stopped at %s", g.report("all"), p.status)
			p.checkStore()
			q := p.clone()
			cowherd(t, "cow", "merge", "--origin", q.origin, q.cow)
			q.checkMerged()
			p.mergeByDaemon()
			p.checkMerged()
			g = kernel(t, fmt.Sprintf("activate %s\nlook merged\ndeactivate\n", q.table()), q.origin, q.cow)
			q.originModel = q.viewModel
			q.look(g, "merged")
		})
	}
}

// TestMergeToLinux: a merge that a daemon has begun, and has left before it was over, is ended by Linux.
func TestMergeToLinux(t *testing.T) {
	tests := []struct {
		name string
		// leave ends the daemon, which has begun to merge the pair, and keeps the model true.
		leave func(d *daemon, p *pair)
	}{
		{"stopped", func(d *daemon, _ *pair) {
			d.merge(false)
			d.stop()
		}},
		{"ended", func(d *daemon, p *pair) {
			during := p.random(2, 1, 24) // to the origin, which shows the snapshot's view by now
			d.writeTo(live, during)
			during.apply(p.viewModel)
			d.stop()
		}},
		{"killed", func(d *daemon, _ *pair) { d.kill() }},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			needLab(t)
			p := beginMerge(t, test.leave)
			if p == nil {
				t.Skipf("%d merges were over before they could be left", mergeTries)
			}
			p.checkStore()
			p.mergeByLinux()
		})
	}
}

// mergeByLinux has Linux look at the store as it was left, and end its merge.
func (p *pair) mergeByLinux() {
	p.t.Helper()
	g := kernel(p.t, fmt.Sprintf(`activate %[1]s
look left
deactivate
start_merge %[1]s
await_merge 0
echo "merged status: $(status merge)"
stop_merge
`, p.table()), p.origin, p.cow)
	if got := p.look(g, "left"); got != p.status {
		p.t.Errorf("Linux takes the store over with %q, it was left with %q", got, p.status)
	}
	p.status = g.report("merged status")
	p.checkMerged()
}

// mergeTries is how often a merge is begun that is to be left before it is over.
const mergeTries = 5

// beginMerge has a daemon make a store, begin to merge it, and leave it when some has been merged. nil: each time the
// merge was over before.
func beginMerge(t *testing.T, leave func(*daemon, *pair)) *pair {
	t.Helper()
	made := newPair(t, "P", 4*kib, 2*originSize, 60*mib) // large, so that the merge takes its time
	d := newDaemon(t)
	d.start()
	d.take(made, true)
	for range 6 {
		loads := made.loads()
		d.write(loads)
		made.apply(loads)
	}
	d.stop()
	begun := made.info()
	for range mergeTries {
		p, d := made.clone(), newDaemon(t)
		d.start()
		d.take(p, false)
		d.merge(true)
		for d.isUntouched() {
			time.Sleep(time.Millisecond) // what is waited for happens in another process
		}
		leave(d, p)
		if p.info().Exceptions > 0 {
			p.adoptOrigin()
			p.status = ""
			t.Logf("%+v became %+v", begun, p.info())
			return p
		}
	}
	return nil
}

// adoptOrigin takes what the origin holds for the model.
func (p *pair) adoptOrigin() {
	p.t.Helper()
	var err error
	if p.originModel, err = os.ReadFile(p.origin); err != nil {
		p.t.Fatal(err)
	}
}

// clone is a copy of the pair.
func (p *pair) clone() *pair {
	p.t.Helper()
	q, dir := *p, p.t.TempDir()
	q.originModel, q.viewModel, q.status = bytes.Clone(p.originModel), bytes.Clone(p.viewModel), ""
	q.origin, q.cow = filepath.Join(dir, "origin.img"), filepath.Join(dir, "cow.img")
	for from, to := range map[string]string{p.origin: q.origin, p.cow: q.cow} {
		data, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(to, data, 0o600)
		}
		if err != nil {
			p.t.Fatal(err)
		}
	}
	return &q
}

// mergeByDaemon has a daemon end the merge.
func (p *pair) mergeByDaemon() {
	p.t.Helper()
	p.status = ""
	d := newDaemon(p.t)
	d.start()
	d.take(p, false)
	d.do("merge", snap, "--wait")
	if !bytes.Equal(d.contents(live), p.viewModel) {
		p.t.Error("after the merge cowherd shows another origin than the model of the snapshot")
	}
	d.stop()
}

// checkMerged expects that all of the snapshot is in the origin, and nothing in the store.
func (p *pair) checkMerged() {
	p.t.Helper()
	p.adoptOrigin()
	if !bytes.Equal(p.originModel, p.viewModel) {
		p.t.Error("the merged origin is another than the model of the snapshot")
	}
	p.checkFormat()
	if info := p.info(); info.Exceptions != 0 || p.status != "" && info.Status != p.status {
		p.t.Errorf("cow info says %+v of a store that is merged and was left with %q", info, p.status)
	}
}

// merge begins or stops a merge, without the time that the command line takes to start. That it may be over is no error.
func (d *daemon) merge(run bool) {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	if _, err := d.api.MergeSnapshot(ctx, snap, run); err != nil && (run || !errors.Is(err, syscall.ENOENT)) {
		d.t.Fatal(err)
	}
}

// isUntouched tells whether the merge has yet to merge something.
func (d *daemon) isUntouched() bool {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	x, err := d.api.Device(ctx, snap)
	if err != nil && !errors.Is(err, syscall.ENOENT) {
		d.t.Fatal(err)
	}
	return err == nil && x.Snapshot.Merge != nil && x.Snapshot.Merge.MergedChunks == 0
}
