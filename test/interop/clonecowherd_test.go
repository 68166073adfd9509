//go:build interop

package interop

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"cowherd/backend/file"
	"cowherd/block"
	"cowherd/clonemeta"
	"cowherd/dm"
	"cowherd/kcopyd"
	"cowherd/persistentdata"
	target "cowherd/target/clone"
)

// cloneParams is what the metadata has to be for.
func (c *clone) params() clonemeta.Params {
	return clonemeta.Params{
		RegionSize: block.Sector(c.regionSectors()), TargetSize: block.Sector(len(c.base) / block.SectorSize),
	}
}

// liveClone is a clone that cowherd holds.
type liveClone struct {
	t         *testing.T
	target    *target.Clone
	device    *dm.Device
	source    *gate // nil: hydration cannot be caught at work
	metadata  *clonemeta.Metadata
	engine    kcopyd.Engine
	files     []*file.Device
	completed chan struct{} // closed when all is hydrated
}

// open makes the clone live; metadata that is still empty is formatted. slow: its source has a gate, but not all the
// powers of a file.
func (c *clone) open(slow bool) (*liveClone, error) {
	l := &liveClone{t: c.t, completed: make(chan struct{})}
	if err := l.start(c, slow); err != nil {
		return nil, errors.Join(err, l.closeFiles())
	}
	return l, nil
}

func (l *liveClone) start(c *clone, slow bool) error {
	for i, path := range []string{c.sourcePath, c.destPath, c.metaPath} {
		f, err := file.Open(path, file.Options{ReadOnly: i == 0})
		if err != nil {
			return err
		}
		l.files = append(l.files, f)
	}
	var err error
	if l.metadata, err = clonemeta.Open(l.files[2], c.params()); errors.Is(err, clonemeta.ErrUnformatted) {
		l.metadata, err = clonemeta.Format(l.files[2], c.params())
	}
	if err != nil {
		return err
	}
	source := block.Device(l.files[0])
	if slow {
		l.source = &gate{Device: l.files[0]}
		source = l.source
	}
	l.engine = kcopyd.NewScaled(kcopyd.Config{})
	l.target, err = target.New(target.Config{
		Name: "clone", Source: source, Destination: l.files[1], Metadata: l.metadata, Engine: l.engine,
		Hydration: target.Hydration{Disabled: true, Threshold: c.threshold, Batch: c.batch},
		Event:     l.event,
	})
	if err != nil {
		return errors.Join(err, l.engine.Close(), l.metadata.Close())
	}
	l.device = dm.NewDevice("clone", l.target, false)
	l.target.Resume()
	return nil
}

// event takes what the target tells: nothing may fail.
func (l *liveClone) event(e target.Event) {
	if e.Kind == target.EventHydrated {
		close(l.completed)
		return
	}
	l.t.Errorf("event %d: mode %v, %v", e.Kind, e.Mode, e.Err)
}

func (l *liveClone) closeFiles() (err error) {
	for _, f := range l.files {
		err = errors.Join(err, f.Close())
	}
	return err
}

func (l *liveClone) close() {
	l.t.Helper()
	err := errors.Join(l.device.Close(context.Background()), l.target.Close(), l.engine.Close(), l.metadata.Close(),
		l.closeFiles())
	if err != nil {
		l.t.Error(err)
	}
}

// do does something to the clone.
func (l *liveClone) do(ops []cloneOp) (err error) {
	for _, o := range ops {
		if o.count > 0 {
			err = block.Do(l.device, block.OpDiscard, 0, o.start*block.SectorSize, o.count*block.SectorSize, nil)
		} else {
			err = o.workload.each(l.device.Size(), func(p []byte, offset int64) error { return block.Write(l.device, p, offset) })
		}
		if err != nil {
			return fmt.Errorf("%s%w", o.script(), err)
		}
	}
	return block.Flush(l.device)
}

// look compares the view with the model.
func (l *liveClone) look(c *clone, when string) {
	l.t.Helper()
	view := make([]byte, l.device.Size())
	for at := 0; at < len(view); at += mib {
		if err := block.Read(l.device, view[at:min(at+mib, len(view))], int64(at)); err != nil {
			l.t.Fatal(err)
		}
	}
	if at, differ := difference(view, c.model); differ {
		l.t.Errorf("%s: from byte %d (region %d) on cowherd shows another clone than the model", when, at, int64(at)/c.region)
	}
}

// hydrate hydrates in the background until percent of what was not hydrated is, or a little more; meanwhile ops are
// done.
func (l *liveClone) hydrate(percent int, ops []cloneOp) {
	l.t.Helper()
	status := l.target.Status()
	rest := status.Regions - status.Hydrated
	if percent < 100 {
		l.source.shut(int64(rest) * int64(percent) / 100 * status.RegionSize.Bytes())
	}
	done := make(chan error, 1)
	l.target.SetHydration(true)
	go func() { done <- l.do(ops) }()
	if percent < 100 {
		select {
		case <-l.source.full:
		case <-l.completed:
		}
		l.target.SetHydration(false)
		l.source.open()
	}
	if err := <-done; err != nil {
		l.t.Fatal(err)
	}
	if percent == 100 {
		if !l.target.Hydrated() { // else it may have been so from the start, and there is no event
			<-l.completed
		}
		l.target.SetHydration(false)
	}
}

// gate is a source that lets reads of so many bytes through, and keeps those that come then until it is opened. Which regions
// are hydrated when hydration is stopped then depends on nobody's speed.
type gate struct {
	*file.Device
	full chan struct{} // closed when a read is kept

	mu sync.Mutex
	// Bytes.
	left int64      // +checklocks:mu
	kept block.List // +checklocks:mu
	// isShut: it counts.
	isShut bool // +checklocks:mu
}

// shut lets reads of so many bytes more through.
func (g *gate) shut(bytes int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.full, g.left, g.isShut = make(chan struct{}), bytes, true
}

// open lets all through.
func (g *gate) open() {
	g.mu.Lock()
	kept := g.kept.Take()
	g.isShut = false
	g.mu.Unlock()
	for r := kept.PopFront(); r != nil; r = kept.PopFront() {
		g.Device.Submit(r)
	}
}

// Submit is the device's, or waits for open.
func (g *gate) Submit(r *block.Request) {
	if r.Op == block.OpRead && g.keeps(r) {
		return
	}
	g.Device.Submit(r)
}

// keeps takes a read, if there have been enough of them.
func (g *gate) keeps(r *block.Request) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.isShut {
		return false
	}
	if g.left > 0 {
		g.left -= r.Length
		return false
	}
	if g.kept.Len() == 0 {
		close(g.full)
	}
	g.kept.PushBack(r)
	return true
}

// holdCowherd is cowherd's turn. percent is how much of what is not hydrated it hydrates in the background.
func (c *clone) holdCowherd(percent int) {
	c.t.Helper()
	l, err := c.open(percent < 100)
	if err != nil {
		c.t.Fatal(err)
	}
	if got := l.target.Info(); c.status != "" && got != c.status {
		c.t.Errorf("cowherd takes the clone over with %q, it was left with %q", got, c.status)
	}
	l.look(c, "taken")
	ops := c.ops()
	if err := l.do(ops); err != nil {
		c.t.Fatal(err)
	}
	c.apply(ops)
	l.look(c, "written")
	ops = c.ops()
	l.hydrate(percent, ops)
	c.apply(ops)
	l.look(c, "left")
	if err := l.target.Suspend(); err != nil {
		c.t.Error(err)
	}
	c.status = l.target.Info()
	l.close()
	c.t.Logf("cowherd: %s", c.status)
}

// checkMetadata expects that the metadata keeps all rules of the format.
func (c *clone) checkMetadata() {
	c.t.Helper()
	f, err := file.Open(c.metaPath, file.Options{ReadOnly: true})
	if err != nil {
		c.t.Fatal(err)
	}
	defer f.Close()
	survey, err := clonemeta.Check(f, clonemeta.CheckConfig{Report: func(found *persistentdata.Finding) {
		c.t.Errorf("the check of the metadata is not silent: %s", found.What)
	}})
	if err != nil {
		c.t.Fatal(err)
	}
	got := fmt.Sprintf("%d/%d", survey.Hydrated, survey.Superblock.Regions())
	if c.status != "" && got != statusWord(c.status, 3) || survey.Superblock.Params != c.params() || survey.Lost+survey.Leaked != 0 {
		c.t.Errorf("the check of the metadata finds %+v; the clone was left with %q", survey, c.status)
	}
}

// TestCloneRelay hands clones to and fro, with writes, discards and some hydration at each turn, until one of the two has
// hydrated all.
func TestCloneRelay(t *testing.T) {
	for _, k := range cloneKinds {
		for first, name := range []string{"linux", "cowherd"} {
			t.Run(fmt.Sprintf("%s/%v", name, k), func(t *testing.T) {
				t.Parallel()
				needClone(t)
				c := newClone(t, k)
				holds := [2]func(int){c.holdLinux, c.holdCowherd}
				for i, percent := range []int{20, 40, 100} {
					holds[(first+i)%2](percent)
					c.checkFiles()
				}
				c.checkComplete()
			})
		}
	}
}

// TestCloneManyRegions: metadata that is larger than its smallest form in each part that can be.
func TestCloneManyRegions(t *testing.T) {
	t.Parallel()
	needClone(t)
	c := newClone(t, manyRegions)
	for _, hold := range []func(){
		func() { c.holdLinux(3) },
		func() { c.holdCowherd(30) },
		func() { c.holdLinux(3) },
		func() { c.holdCowherd(100) },
	} {
		hold()
		c.checkFiles()
	}
	c.checkComplete()
}
