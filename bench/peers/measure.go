package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"cowherd/internal/size"
)

// noisy is the share of one CPU above which what others used spoils a round.
const noisy = 0.25

// runner measures cells one after the other.
type runner struct {
	options
	stacks   map[string]*stack
	progress io.Writer
	work     string // directory of everything that is written
	image    string
	started  int // servers
}

// key names what is measured in a round.
type key struct{ stack, step string }

// measurement is what one step did on one server.
type measurement struct {
	result
	cpu      float64 // of the server, in µs for each request
	foreign  float64 // CPU time of other processes, as a share of one CPU
	hydrated float64 // seconds until all was hydrated, in a step that hydrates
}

// round is one measurement of each step on each server of a cell.
type round map[key]measurement

// noise is the most foreign CPU time of some of a round's measurements.
func (r round) noise(keys []key) float64 {
	most := 0.0
	for _, k := range keys {
		most = max(most, r[k].foreign)
	}
	return most
}

// quietest returns the n rounds with the least noise in the measurements that matter, in the order of measuring.
func quietest(rounds []round, keys []key, n int) []round {
	order := make([]int, len(rounds))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int {
		return cmp.Compare(rounds[a].noise(keys), rounds[b].noise(keys))
	})
	order = order[:min(n, len(order))]
	slices.Sort(order)
	kept := make([]round, len(order))
	for i, index := range order {
		kept[i] = rounds[index]
	}
	return kept
}

// quiet tells whether each step of a cell has been measured n times without much noise.
func (c *cell) quiet(n int) bool {
	for _, st := range c.scenario.steps {
		count := 0
		for _, found := range c.rounds {
			if found.noise(c.keys(st)) <= noisy {
				count++
			}
		}
		if count < n {
			return false
		}
	}
	return true
}

// keys are the measurements that are compared in a step.
func (c *cell) keys(st step) []key {
	var keys []key
	for _, name := range c.stacks() {
		keys = append(keys, key{name, st.name})
	}
	if st.against != "" {
		keys = append(keys, key{ours, st.against})
	}
	return keys
}

// look finds out what is installed. Without the client nothing can be measured.
func (r *runner) look() error {
	if _, err := exec.LookPath("fio"); err != nil {
		return fmt.Errorf("the client is missing: %w", err)
	}
	for _, s := range r.stacks {
		if s.name != ours && !slices.Contains(r.peers, s.name) {
			s.skipped = notAsked
			continue
		}
		for _, program := range append([]string{s.program}, s.needs...) {
			if _, err := exec.LookPath(program); err != nil {
				s.skipped = "no " + program
				break
			}
		}
	}
	return nil
}

// notAsked is why a stack is skipped that -peers does not name.
const notAsked = "not asked for"

// measureCell measures the rounds of a cell. What fails is kept in the cell; the error is for what ends the program.
func (r *runner) measureCell(ctx context.Context, c *cell) error {
	for n := 1; n <= r.repetitions+r.retries && !c.quiet(r.repetitions); n++ {
		found := r.measureRound(ctx, c, n)
		if ctx.Err() != nil {
			return errors.New("interrupted")
		}
		c.rounds = append(c.rounds, found)
	}
	return nil
}

// measureRound measures each server of a cell once, in random order, but for those that are skipped or have failed.
func (r *runner) measureRound(ctx context.Context, c *cell, n int) round {
	found, names := round{}, c.stacks()
	rand.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	for _, name := range names {
		k := r.stacks[name]
		if k.skipped != "" || c.failed[name] != nil {
			continue
		}
		label := fmt.Sprintf("%s round %d %s", c.name(), n, name)
		err := r.measureServer(ctx, c, k, label, found)
		if ctx.Err() != nil {
			break
		}
		if err != nil {
			fmt.Fprintf(r.progress, "%s: %v\n", label, err)
			c.failed[name] = err
		}
	}
	return found
}

// measureServer starts a server, puts it through the steps of a cell, and stops it.
func (r *runner) measureServer(ctx context.Context, c *cell, k *stack, label string, found round) (err error) {
	r.started++
	s, err := startServer(ctx, k, c.scenario.clone, filepath.Join(r.work, fmt.Sprintf("%03d-%s", r.started, k.name)), r.image)
	if err != nil {
		return err
	}
	defer func() {
		if log := s.stop(); err != nil {
			err = withLog(err, log)
		}
	}()
	frozen := false
	for i, st := range c.scenario.steps {
		if st.own && k.name != ours {
			continue
		}
		if st.frozen && !frozen && s.freeze != nil {
			if err := s.freeze(ctx); err != nil {
				return err
			}
		}
		frozen = frozen || st.frozen
		m, err := r.measureStep(ctx, s, c, i)
		if err != nil {
			return fmt.Errorf("%s: %w", st.name, err)
		}
		found[key{k.name, st.name}] = m
		fmt.Fprintf(r.progress, "%s: %s: %.1f kIOPS, %.1f µs of CPU a request, foreign %.0f%%\n",
			label, st.name, m.iops/1e3, m.cpu, 100*m.foreign)
	}
	if frozen && s.check != nil {
		return s.check(ctx, c.scenario.chunks(r.bytes))
	}
	return nil
}

// measureStep runs fio over a server. Its output goes to a file beside the server's log.
func (r *runner) measureStep(ctx context.Context, s *server, c *cell, index int) (m measurement, err error) {
	st, span := c.scenario.steps[index], c.scenario.span(r.bytes)
	output := fmt.Sprintf("%s-%d.json", s.dir, index+1)
	before, err := readClocks(s)
	if err != nil {
		return m, err
	}
	found, client, hydrated, err := r.runStep(ctx, s, c, st, output)
	if err != nil {
		return m, err
	}
	after, err := readClocks(s)
	if err != nil {
		return m, err
	}
	if want := st.job.requests(span); want > 0 && found.requests != want {
		return m, fmt.Errorf("fio made %d requests instead of %d", found.requests, want)
	}
	used := after.server - before.server
	return measurement{
		result: found, hydrated: hydrated.Seconds(),
		cpu:     float64(used.Nanoseconds()) / 1e3 / float64(found.requests),
		foreign: foreignShare(after.machine-before.machine, used+client, after.wall.Sub(before.wall)),
	}, nil
}

// hydrationLimit is the most time that a hydration may take.
const hydrationLimit = 2 * time.Minute

// runStep runs fio, the clone hydrating meanwhile or not, and returns what it found, the CPU time it used, and how long
// the hydration took.
func (r *runner) runStep(ctx context.Context, s *server, c *cell, st step, output string) (found result, client,
	hydrated time.Duration, err error) {
	uri, span := s.exports[st.on], c.scenario.span(r.bytes)
	if !st.hydrate {
		found, client, err = runFio(ctx, r.work, output, st.job.arguments(uri, c.connections, span, r.seconds), nil)
		return found, client, 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, hydrationLimit)
	defer cancel()
	start := time.Now()
	if err := s.hydrate(ctx); err != nil {
		return found, 0, 0, err
	}
	done := make(chan struct{})
	var waiting error
	go func() {
		defer close(done)
		waiting = s.hydrated(ctx)
		hydrated = time.Since(start)
	}()
	if st.job != nothing {
		args := st.job.arguments(uri, c.connections, span, int(hydrationLimit.Seconds()))
		found, client, err = runFio(ctx, r.work, output, args, done)
	}
	if err != nil {
		cancel()
	}
	<-done
	if st.job == nothing && waiting == nil {
		found.requests = span / blockBytes
		found.iops = float64(found.requests) / hydrated.Seconds()
	}
	return found, client, hydrated, cmp.Or(err, waiting)
}

// clocks are read around a run of fio.
type clocks struct {
	wall            time.Time
	machine, server time.Duration
}

func readClocks(s *server) (c clocks, err error) {
	c.wall = time.Now()
	if c.machine, err = machineCPU(); err != nil {
		return c, err
	}
	c.server, err = processCPU(s.process.cmd.Process.Pid)
	return c, err
}

// foreignShare is what others than the server and the client used, as a share of one CPU.
func foreignShare(machine, own, elapsed time.Duration) float64 {
	return max(0, float64(machine-own)/float64(elapsed))
}

// roomFor fails unless a directory has room for the image and a copy of it, and says so if it is not in memory.
func roomFor(dir string, span int64, stderr io.Writer) error {
	const spare = 64 << 20
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	if free, need := int64(fs.Bavail)*fs.Bsize, 2*span+spare; free < need {
		return fmt.Errorf("%s has %s free, %s are needed: a smaller -size or another -dir helps",
			dir, size.Human(free), size.Human(need))
	}
	if fs.Type != unix.TMPFS_MAGIC {
		fmt.Fprintf(stderr, "%s is not a tmpfs: the bars are for images in memory\n", dir)
	}
	return nil
}

// fillImage makes an image without holes or zeroes, because servers may treat both in ways of their own.
func fillImage(ctx context.Context, path string, bytes int64) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	random := rand.NewChaCha8([32]byte{})
	buffer := make([]byte, 1<<20)
	for bytes > 0 {
		part := buffer[:min(bytes, int64(len(buffer)))]
		_, _ = random.Read(part) // never fails
		n, err := f.Write(part)
		if err != nil {
			return err
		}
		bytes -= int64(n)
		if ctx.Err() != nil {
			return errors.New("interrupted")
		}
	}
	return nil
}
