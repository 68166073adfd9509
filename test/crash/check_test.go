package crash

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"cowherd/block"
	"cowherd/cowstore"
	"cowherd/internal/fault"
	"cowherd/kcopyd"
)

// walker goes through the log of a run, and looks at the disks after a crash at each event.
type walker struct {
	c        *config
	random   *rand.Rand
	replay   *fault.Replay
	watching bool
	crashes  int

	mark func(mark any) error                           // takes over what the run knew at this point
	look func(images []*fault.Image, killed bool) error // checks everything that must hold
}

// The number of power failures that are tried before each flush, and where writes of the table have many sectors.
const (
	cutsAtFlush     = 3
	cutsAtFlushMany = 16
)

// walk goes through the whole log.
func (w *walker) walk() error {
	for {
		e, more := w.replay.Peek()
		switch {
		case !more || e.Kind != fault.EventMark:
			if err := w.crash(e); err != nil || !more {
				return err
			}
		case e.Mark == watch{}:
			w.watching = true
		default:
			if err := w.mark(e.Mark); err != nil {
				return w.explain("without a crash", err)
			}
		}
		w.replay.Step()
	}
}

// crash looks at the disks here, before the next event.
func (w *walker) crash(next fault.Event) error {
	if !w.watching || w.replay.At()%w.c.every() != 0 && w.replay.At() != w.replay.Len() {
		return nil
	}
	w.crashes++
	if err := w.look(w.replay.Kill(), true); err != nil {
		return w.explain("the program is killed", err)
	}
	for range w.cuts(next) {
		w.crashes++
		if err := w.look(w.replay.PowerCut(w.random), false); err != nil {
			return w.explain("the power fails", err)
		}
	}
	return nil
}

// cuts is the number of power failures to try before the next event.
func (w *walker) cuts(next fault.Event) int {
	switch {
	case w.replay.Volatile() == 0:
		return 0
	case next.Kind != fault.EventFlush && next.Kind != fault.EventDurable:
		return w.random.IntN(3) / 2
	case w.c.longest > 0:
		return cutsAtFlushMany
	}
	return cutsAtFlush
}

// explain adds where it was.
func (w *walker) explain(what string, err error) error {
	var log strings.Builder
	for _, e := range w.replay.Last(30) {
		line := e.String()
		if e.Kind == fault.EventMark {
			line = fmt.Sprintf("mark     %T %v", e.Mark, e.Mark)
		}
		log.WriteString("\n  " + line)
	}
	return fmt.Errorf("%s after event %d of %d: %w; the last events:%s", what, w.replay.At(), w.replay.Len(), err, log.String())
}

// checker looks at the disks of a generation.
type checker struct {
	walker
	engine  kcopyd.Engine
	views   [2]*view
	taken   bool
	dropped bool // or about to be
	// The chunks that have an exception, or may have.
	touched map[cowstore.Chunk]bool
	before  []byte // what the COW device held at first

	invalid, rests int
	next           start // where the next generation begins
	nextAt         int   // the event after which it does, unless
	nextRest       bool  // there is a rest behind the table

	origin, cow, expect, got []byte // buffers
}

func newChecker(g *generation, engine kcopyd.Engine) *checker {
	k := &checker{
		walker: walker{c: g.c, random: g.random, replay: g.rec.Replay()},
		engine: engine, touched: map[cowstore.Chunk]bool{}, before: g.start.cow,
	}
	k.walker.mark, k.walker.look = k.mark, k.look
	k.nextAt = g.random.IntN(k.replay.Len())
	k.views[onOrigin] = newView("origin", slices.Clone(g.start.origin))
	if g.start.snapshot != nil {
		k.taken = true
		k.views[onSnapshot] = newView("snapshot", slices.Clone(g.start.snapshot))
		if t, err := parseTable(g.start.cow); err == nil {
			for _, old := range t.old {
				k.touched[cowstore.Chunk(old)] = true
			}
		}
	}
	for _, p := range []*[]byte{&k.origin, &k.expect, &k.got} {
		*p = make([]byte, g.c.origin)
	}
	return k
}

// mark takes over what the run knew at this point.
func (k *checker) mark(mark any) error {
	switch m := mark.(type) {
	case began:
		k.views[m.on].begin(m.op)
		if m.kind != block.OpFlush && k.taken {
			for chunk := k.c.chunk.ChunkFloor(m.offset); chunk < k.c.chunk.ChunkCeil(m.offset+m.length); chunk++ {
				k.touched[chunk] = true
			}
		}
	case ended:
		k.views[m.on].end(m.op)
	case taken:
		if !k.taken {
			k.taken = true
			k.views[onSnapshot] = newView("snapshot", slices.Clone(k.views[onOrigin].newest))
		}
	case dropping:
		k.dropped = true
	case over:
		return k.compareEnd(m)
	}
	return nil
}

// compareEnd compares what the devices held with what they should.
func (k *checker) compareEnd(m over) error {
	if at := differs(m.origin, k.views[onOrigin].newest); at >= 0 {
		return fmt.Errorf("byte %d of the origin is wrong", at)
	}
	if m.snapshot == nil || k.mayBeInvalid() {
		return nil // the model does not know which writes have failed
	}
	if at := differs(m.snapshot, k.views[onSnapshot].newest); at >= 0 {
		return fmt.Errorf("byte %d of the snapshot is wrong", at)
	}
	return nil
}

// look checks everything that must hold of the images of the origin and the COW device.
func (k *checker) look(images []*fault.Image, killed bool) error {
	k.cow = slices.Grow(k.cow[:0], int(images[1].Size()))[:images[1].Size()]
	if err := errors.Join(read(images[0], k.origin), read(images[1], k.cow)); err != nil {
		return err
	}
	if err := k.views[onOrigin].check(k.origin, killed); err != nil {
		return err
	}
	t, err := parseTable(k.cow)
	if !k.taken {
		k.keep(nil, false)
		return k.lookUnmade(t, err)
	}
	switch {
	case err != nil:
		return fmt.Errorf("the kernel would not like the store: %w", err)
	case !t.there:
		return errors.New("there is no store")
	case !t.valid:
		return k.lookInvalid(images)
	}
	if err := errors.Join(examine(images[1], k.c), t.view(k.expect, k.origin, k.cow)); err != nil {
		return err
	}
	if err := k.views[onSnapshot].check(k.expect, killed); err != nil {
		return fmt.Errorf("in the kernel: %w", err)
	}
	k.keep(k.expect, t.rest)
	if t.rest {
		k.rests++
	}
	return k.reopen(images, t.rest)
}

// examine runs cowherd's own checker over a COW device.
func examine(cow block.Device, c *config) error {
	var violations []error
	_, err := cowstore.Check(cow, cowstore.CheckConfig{OriginSize: c.origin, Report: func(f *cowstore.Finding) {
		if f.Violation {
			violations = append(violations, fmt.Errorf("the checker says: %v", f))
		}
	}})
	return errors.Join(append(violations, err)...)
}

// lookUnmade checks a device on which a store was being made: it holds none, an empty one, or still the one before.
func (k *checker) lookUnmade(t *table, err error) error {
	empty := err == nil && len(t.old) == 0
	if !empty && !bytes.Equal(k.cow[k.c.chunk:], k.before[k.c.chunk:]) {
		return errors.New("the device holds something between two stores")
	}
	return nil
}

// mayBeInvalid tells whether the snapshot may be invalid by now.
func (k *checker) mayBeInvalid() bool { return k.dropped || len(k.touched)+1 >= k.c.capacity() }

// lookInvalid checks a store that says that it is invalid.
func (k *checker) lookInvalid(images []*fault.Image) error {
	k.invalid++
	if !k.mayBeInvalid() {
		return fmt.Errorf("the store is invalid, with %d chunks touched and room for %d", len(k.touched), k.c.capacity())
	}
	s, err := k.open(images)
	if err != nil {
		return fmt.Errorf("open an invalid store: %w", err)
	}
	if s.snaps[onSnapshot].Status().Invalid == nil || read(s.devices[onSnapshot], k.got) == nil {
		err = errors.New("an invalid snapshot can be read")
	}
	k.keep(nil, false)
	return errors.Join(err, s.close())
}

// open puts a stack on images, as after a restart.
func (k *checker) open(images []*fault.Image) (*stack, error) {
	store, err := cowstore.OpenPersistent(images[1], cowstore.PersistentConfig{})
	if err != nil {
		return nil, err
	}
	s := openStack(images[0], k.engine)
	return s, s.take(onSnapshot, images[1], store, k.c, func() error { return nil })
}

// reopen compares the reopened snapshot with what the kernel would show, which is right, and now and then goes on with
// it for a while; always if there is a rest behind the table, which must not come back.
func (k *checker) reopen(images []*fault.Image, rest bool) error {
	s, err := k.open(images)
	if err != nil {
		return fmt.Errorf("open the store: %w", err)
	}
	if invalid := s.snaps[onSnapshot].Status().Invalid; invalid != nil {
		return fmt.Errorf("the reopened snapshot is invalid: %w", invalid)
	}
	if err := read(s.devices[onSnapshot], k.got); err != nil {
		return fmt.Errorf("the reopened snapshot: %w", err)
	}
	if at := differs(k.got, k.expect); at >= 0 {
		return fmt.Errorf("byte %d of the reopened snapshot is %#x; the kernel would show %#x", at, k.got[at], k.expect[at])
	}
	if !rest && k.random.IntN(8) > 0 {
		return s.close()
	}
	short, err := k.goOn(s)
	if err = errors.Join(err, s.close()); err == nil && !short {
		err = k.lookAgain(images)
	}
	if err != nil {
		return fmt.Errorf("the reopened snapshot is written: %w", err)
	}
	return nil
}

// lookAgain compares what the kernel would show with k.expect, and the origin with k.origin.
func (k *checker) lookAgain(images []*fault.Image) error {
	t, err := parseTable(images[1].Content())
	if err != nil {
		return err
	}
	if at := differs(images[0].Content(), k.origin); at >= 0 {
		return fmt.Errorf("byte %d of the origin is wrong", at)
	}
	if err := errors.Join(examine(images[1], k.c), t.view(k.got, k.origin, images[1].Content())); err != nil {
		return err
	}
	if at := differs(k.got, k.expect); at >= 0 {
		return fmt.Errorf("byte %d is %#x in the kernel instead of %#x", at, k.got[at], k.expect[at])
	}
	return nil
}

// differs is the index of the first difference, or -1.
func differs(got, want []byte) int {
	if bytes.Equal(got, want) {
		return -1
	}
	for i := range got {
		if got[i] != want[i] {
			return i
		}
	}
	return len(got)
}

// goOn writes to both devices of a reopened stack; k.origin and k.expect are what they hold. short: there is no room.
func (k *checker) goOn(s *stack) (short bool, err error) {
	m := maker{random: k.random, c: k.c, stamp: new(uint64), devices: []int{onOrigin, onSnapshot}}
	for range 6 {
		for _, o := range m.step() {
			err := k.doOne(s, o)
			if st := s.snaps[onSnapshot].Status(); k.c.isShort() && (st.Invalid != nil || st.Overflowed) {
				return true, nil
			}
			if err != nil {
				return false, err
			}
		}
	}
	if err := read(s.devices[onSnapshot], k.got); err != nil {
		return false, err
	}
	if at := differs(k.got, k.expect); at >= 0 {
		return false, fmt.Errorf("byte %d is %#x instead of %#x", at, k.got[at], k.expect[at])
	}
	return false, nil
}

// doOne does an operation on a reopened stack and in k.origin or k.expect.
func (k *checker) doOne(s *stack, o *op) error {
	var data []byte
	content := [][]byte{k.origin, k.expect}[o.on][o.offset:][:o.length]
	if o.kind != block.OpFlush {
		o.fill(content)
	}
	if o.kind == block.OpWrite {
		data = content
	}
	return block.Do(s.devices[o.on], o.kind, o.flags, o.offset, o.length, data)
}

// keep makes these disks the start of the next generation, unless there are others that are more to the point: a store
// with a rest behind its table, or a crash at the event that was chosen. snapshot is the view; nil: there is none.
func (k *checker) keep(snapshot []byte, rest bool) {
	end := k.replay.At() == k.replay.Len()
	better := k.next.origin == nil && (end || k.replay.At() >= k.nextAt && k.random.IntN(2) == 0)
	if rest {
		better = !k.nextRest || k.random.IntN(4) == 0
	}
	if better {
		k.next = start{origin: slices.Clone(k.origin), cow: slices.Clone(k.cow), snapshot: slices.Clone(snapshot)}
		k.nextRest = rest
	}
}
