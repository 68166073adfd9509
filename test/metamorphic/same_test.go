package metamorphic

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"

	"cowherd/block"
	"cowherd/service"
)

// The routes to a device.
const (
	routeNow   = "now"   // the targets, over devices that complete in Submit if they can
	routeLater = "later" // the targets, over devices that never do
	routeNBD   = "nbd"   // the daemon, by one connection
	routeNBD4  = "nbd4"  // the daemon, by four
)

// config is a way to set up a system.
type config struct {
	route   string
	engine  string
	origin  string // mem or file
	store   string // temp, mem or file
	chunk   int64  // the smallest chunk size in bytes
	buffers int64  // kcopyd's ceiling in bytes; 0: the default
}

func (c config) String() string {
	return fmt.Sprintf("%s,%s,origin=%s,store=%s,chunk=%dk,buffers=%d", c.route, c.engine, c.origin, c.store,
		c.chunk>>10, c.buffers)
}

func (c config) connections() int {
	if c.route == routeNBD4 {
		return 4
	}
	return 1
}

// allConfigs are all that take a list of this grain: devices in memory have a logical block of 512 bytes.
func allConfigs(grain int64) (all []config) {
	for _, route := range []string{routeNow, routeLater, routeNBD, routeNBD4} {
		for _, engine := range []string{service.EngineScaled, service.EngineSerialised} {
			for _, origin := range []string{"mem", "file"} {
				for _, store := range []string{"temp", "mem", "file"} {
					if grain < 512 && (origin == "mem" || store == "mem") {
						continue
					}
					for _, chunk := range []int64{4 << 10, 16 << 10, 128 << 10} {
						for _, buffers := range []int64{0, 1} { // 1: the least that an engine works with
							all = append(all, config{route, engine, origin, store, chunk, buffers})
						}
					}
				}
			}
		}
	}
	return all
}

// pick is the configurations for a list: count of them, the routes in turn.
func pick(l *list, count int) []config {
	all := allConfigs(l.grain)
	random := rand.New(rand.NewPCG(l.seed, 2))
	random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	byRoute := map[string][]config{}
	for _, c := range all {
		byRoute[c.route] = append(byRoute[c.route], c)
	}
	routes := []string{routeNow, routeNBD4, routeLater, routeNBD}
	var picked []config
	for i := range min(count, len(all)) {
		of := byRoute[routes[i%len(routes)]]
		picked = append(picked, of[i/len(routes)])
	}
	return picked
}

// TestSameEverywhere is the package's test.
func TestSameEverywhere(t *testing.T) {
	first, last := uint64(1), *seedCount
	if *oneSeed != 0 {
		first, last = *oneSeed, *oneSeed
	}
	for seed := first; seed <= last; seed++ {
		l := newList(seed, *stepCount)
		ops := 0
		for _, step := range l.steps {
			ops += len(step)
		}
		t.Logf("seed %d: %d operations, origin of %d bytes, grain %d", seed, ops, l.size, l.grain)
		for _, c := range pick(l, *configCount) {
			t.Run(fmt.Sprintf("seed=%d,%v", seed, c), func(t *testing.T) {
				t.Parallel()
				if err := l.run(t, c); err != nil {
					t.Errorf("%v\nto repeat it:\ngo test ./test/metamorphic -run TestSameEverywhere -seed %d -steps %d -configs %d",
						err, seed, *stepCount, *configCount)
				}
			})
		}
	}
}

// run does the list in a configuration.
func (l *list) run(t *testing.T, c config) (err error) {
	dir, err := os.MkdirTemp("", "same") // short enough for a socket
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	p := place{config: c, dir: dir, size: l.size}
	var s system
	if strings.HasPrefix(c.route, routeNBD) {
		s, err = openServed(p)
	} else {
		s, err = openStack(p)
	}
	if err != nil {
		return err
	}
	m := newModel(l.size)
	for i, step := range l.steps {
		if err := do(s, m, step); err != nil {
			return errors.Join(fmt.Errorf("step %d: %w\n%s", i, err, l.around(i)), s.close())
		}
	}
	for number := range m {
		step := []op{{kind: block.OpRead, on: number, length: l.size}}
		if err := do(s, m, step); err != nil {
			return errors.Join(fmt.Errorf("at the end: %w", err), s.close())
		}
	}
	if err := s.close(); err != nil || c.origin != "file" {
		return err
	}
	held, err := os.ReadFile(p.image())
	if err != nil {
		return err
	}
	return m.check(op{kind: block.OpRead, length: l.size}, held)
}

// around is what was done last before step i, for a message.
func (l *list) around(i int) string {
	var text strings.Builder
	for j := max(0, i-4); j <= i; j++ {
		for _, o := range l.steps[j] {
			fmt.Fprintf(&text, "  step %d: %v\n", j, o)
		}
	}
	return text.String()
}

// do does a step in the system and in the model, and compares.
func do(s system, m model, step []op) error {
	errs := make([]error, len(step))
	read := make([][]byte, len(step))
	extents := make([][]block.Extent, len(step))
	var running sync.WaitGroup
	for i, o := range step {
		if o.kind == opTake || o.kind == opDrop {
			continue // by this goroutine, below
		}
		device := s.device(o.on) // before the table of devices changes
		running.Go(func() { read[i], extents[i], errs[i] = o.do(device, block.Queue(i)) })
	}
	switch o := step[0]; o.kind {
	case opTake:
		errs[0] = s.take(o)
	case opDrop:
		errs[0] = s.drop(o.on)
	}
	running.Wait()
	for i, o := range step {
		if errs[i] == nil && o.kind == block.OpRead {
			errs[i] = m.check(o, read[i])
		}
		if errs[i] == nil && o.kind == opExtents {
			errs[i] = m.checkExtents(o, extents[i])
		}
		if errs[i] != nil {
			return fmt.Errorf("%v: %w", o, errs[i])
		}
	}
	for _, o := range step {
		m.apply(o)
	}
	return nil
}

// waiter is told of a request's end.
type waiter chan error

func (w waiter) Complete(_ *block.Request, err error) { w <- err }

// do does one operation on a device and returns what it has read or learnt.
func (o op) do(device block.Device, queue block.Queue) (p []byte, extents []block.Extent, err error) {
	r := &block.Request{Op: o.kind, Flags: o.flags, Queue: queue, Offset: o.offset, Length: o.length}
	switch o.kind {
	case opExtents:
		err = device.(block.ExtentLister).Extents(o.offset, o.length, func(e block.Extent) bool {
			extents = append(extents, e)
			return true
		})
		return nil, extents, err
	case block.OpRead:
		p = make([]byte, o.length)
		fill(p, 0) // not by chance what is to be read
		r.Data = p
	case block.OpWrite:
		r.Data = o.data()
	}
	done := make(waiter, 1)
	r.Push(done)
	device.Submit(r)
	return p, nil, <-done
}
