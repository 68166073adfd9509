package clone

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"
	"syscall"

	"cowherd/block"
)

// Resume starts hydration, if it is enabled. A new clone is suspended in that regard; requests are served regardless.
func (c *Clone) Resume() { c.hydrator.resume() }

// Suspend stops hydration, waits for the copies in flight, and commits. The mapped device above must have been suspended
// before. A read-only or failed clone has nothing to commit.
func (c *Clone) Suspend() error {
	c.hydrator.suspend()
	if c.table.Load() == nil || c.mode() != ReadWrite {
		return nil
	}
	if err := c.Commit(); err != nil {
		return fmt.Errorf("suspend clone %q: %w", c.name, err)
	}
	return nil
}

// Close suspends the clone and ends it: no request may be in flight, and none may follow. Devices and metadata are the
// caller's to close from then on.
func (c *Clone) Close() error {
	err := c.Suspend()
	c.committer.close()
	return err
}

// Hydrated tells whether everything is hydrated and committed, and the source is no longer used.
func (c *Clone) Hydrated() bool { return c.detached.Load() }

// SetHydration enables or disables hydration in the background.
func (c *Clone) SetHydration(enabled bool) {
	x := &c.hydrator
	x.mu.Lock()
	defer x.mu.Unlock()
	x.enabled = enabled
	x.startLocked(x.workers)
	x.cond.Broadcast()
}

// SetThreshold sets the most regions in flight.
func (c *Clone) SetThreshold(regions uint32) {
	x := &c.hydrator
	x.mu.Lock()
	defer x.mu.Unlock()
	x.threshold = Region(max(1, regions))
	x.cond.Broadcast()
}

// SetBatch sets the most regions in one copy.
func (c *Clone) SetBatch(regions uint32) {
	x := &c.hydrator
	x.mu.Lock()
	defer x.mu.Unlock()
	x.batch = Region(max(1, regions))
	x.cond.Broadcast()
}

// Retry forgets which regions have failed, so that they are tried again.
func (c *Clone) Retry() {
	x := &c.hydrator
	x.mu.Lock()
	defer x.mu.Unlock()
	clear(x.failed)
	x.firstErr, x.stopped, x.told, x.rewind = nil, false, false, 0
	x.startLocked(x.workers)
	x.cond.Broadcast()
}

// Message does what a message of the device mapper asks for, given word by word: the kernel's enable_hydration,
// disable_hydration, hydration_threshold N and hydration_batch_size N, and retry_hydration. EINVAL: it is none of them.
func (c *Clone) Message(words []string) error {
	var word string
	if len(words) > 0 {
		word = strings.ToLower(words[0])
	}
	switch {
	case len(words) == 1 && word == "enable_hydration":
		c.SetHydration(true)
	case len(words) == 1 && word == "disable_hydration":
		c.SetHydration(false)
	case len(words) == 1 && word == "retry_hydration":
		c.Retry()
	case len(words) == 2 && (word == "hydration_threshold" || word == "hydration_batch_size"):
		n, err := strconv.ParseUint(words[1], 10, 32)
		if err != nil {
			return fmt.Errorf("invalid value for `%s': %q: %w", word, words[1], syscall.EINVAL)
		}
		if word == "hydration_threshold" {
			c.SetThreshold(uint32(n))
		} else {
			c.SetBatch(uint32(n))
		}
	default:
		return fmt.Errorf("unsupported message: %q: %w", strings.Join(words, " "), syscall.EINVAL)
	}
	return nil
}

// Status is the state of a clone.
type Status struct {
	Mode       Mode
	Cause      error // why the mode is not ReadWrite
	RegionSize block.Sector
	Regions    uint64
	Hydrated   uint64
	Hydrating  uint64 // regions in flight in the background
	// Hydration is how hydration is set now.
	Enabled          bool
	Threshold, Batch uint32
	Failed           uint64 // regions given up, see Retry
	FirstError       error  // of one of them
	Stopped          bool   // too many have failed
	Passdown         bool   // discards are told to the destination
	Waiting          uint64 // requests that wait for a region
	TableBytes       int64  // memory of the regions' state
	Commits          uint64 // since it was made
	MetadataUsed     uint64 // blocks of 4096 bytes
	MetadataTotal    uint64
	SourceInUse      bool // not all is hydrated and committed yet
}

// Status is a look at the counters; while I/O runs they need not agree with each other.
func (c *Clone) Status() Status {
	st := Status{
		Mode: c.mode(), RegionSize: block.SectorFloor(c.regionSize), Regions: uint64(c.count), Hydrated: uint64(c.count),
		Passdown: c.passdown, Commits: c.committer.commits.Load(), SourceInUse: !c.detached.Load(),
		Waiting: uint64(max(0, c.waiting.count.Load())),
	}
	if p := c.cause.Load(); p != nil {
		st.Cause = *p
	}
	if t := c.table.Load(); t != nil {
		st.Hydrated, st.TableBytes = uint64(t.count()), t.bytes()
	}
	st.MetadataUsed, st.MetadataTotal = c.meta.Usage()
	x := &c.hydrator
	x.mu.Lock()
	defer x.mu.Unlock()
	st.Enabled, st.Hydrating, st.Stopped = x.enabled, uint64(x.regions), x.stopped
	st.Threshold, st.Batch = uint32(x.threshold), uint32(x.batch)
	st.Failed, st.FirstError = uint64(len(x.failed)), x.firstErr
	return st
}

// String is the kernel's status line, with a space behind every word but the last, as there.
func (st Status) String() string {
	if st.Mode == Fail {
		return "Fail"
	}
	var features []string
	if !st.Enabled {
		features = append(features, "no_hydration")
	}
	if !st.Passdown {
		features = append(features, "no_discard_passdown")
	}
	return fmt.Sprintf("8 %d/%d %d %d/%d %d %s4 hydration_threshold %d hydration_batch_size %d %v",
		st.MetadataUsed, st.MetadataTotal, st.RegionSize, st.Hydrated, st.Regions, st.Hydrating,
		counted(features), st.Threshold, st.Batch, st.Mode)
}

// counted is the number of words and the words, each with a space behind it.
func counted(words []string) string {
	s := strconv.Itoa(len(words)) + " "
	for _, w := range words {
		s += w + " "
	}
	return s
}

// Info is the kernel's status line after a commit, as it is when the status is asked for without noflush.
func (c *Clone) Info() string {
	if c.mode() == ReadWrite && c.uncommitted() {
		_ = c.Commit() // the mode tells
	}
	return c.Status().String()
}

// Table is what the kernel's table line says behind the devices.
func (c *Clone) Table() string {
	if c.arguments != nil {
		return strings.Join(c.arguments, " ")
	}
	st := c.Status()
	o := Options{RegionSize: st.RegionSize, Hydration: Hydration{Disabled: !st.Enabled, Threshold: st.Threshold, Batch: st.Batch}}
	o.NoDiscardPassdown = c.noDiscard
	return o.String()
}

// Options are the arguments of a table line behind the devices.
type Options struct {
	RegionSize block.Sector
	Hydration
	NoDiscardPassdown bool
}

// String is o as arguments of a table line, with what is as by default left out.
func (o Options) String() string {
	var features, core []string
	if o.Disabled {
		features = append(features, "no_hydration")
	}
	if o.NoDiscardPassdown {
		features = append(features, "no_discard_passdown")
	}
	if o.Threshold > 1 {
		core = append(core, "hydration_threshold", strconv.FormatUint(uint64(o.Threshold), 10))
	}
	if o.Batch > 1 {
		core = append(core, "hydration_batch_size", strconv.FormatUint(uint64(o.Batch), 10))
	}
	s := strconv.FormatUint(uint64(o.RegionSize), 10)
	if len(features) > 0 || len(core) > 0 {
		s += " " + strings.TrimSuffix(counted(features), " ")
	}
	if len(core) > 0 {
		s += " " + strings.TrimSuffix(counted(core), " ")
	}
	return s
}

// ParseOptions reads the arguments of a table line behind the three devices, by the kernel's rules and with its words for
// what is wrong. All errors are EINVAL.
func ParseOptions(words []string) (Options, error) {
	var o Options
	if len(words) < 1 {
		return o, invalid("Invalid number of arguments")
	}
	size, err := strconv.ParseUint(words[0], 10, 32)
	switch {
	case err != nil || block.Sector(size) < RegionSizeMin || block.Sector(size) > RegionSizeMax:
		return o, invalid("Invalid region size")
	case size&(size-1) != 0:
		return o, invalid("Region size is not a power of 2")
	}
	o.RegionSize, o.Threshold, o.Batch = block.Sector(size), 1, 1
	rest, err := o.parseFeatures(words[1:])
	if err != nil {
		return o, err
	}
	return o, o.parseCore(rest)
}

func (o *Options) parseFeatures(words []string) ([]string, error) {
	if len(words) == 0 {
		return nil, nil
	}
	n, err := strconv.ParseUint(words[0], 10, 32)
	if words = words[1:]; err != nil || n > 2 || int(n) > len(words) {
		return nil, invalid("Invalid number of feature arguments")
	}
	for _, w := range words[:n] {
		switch strings.ToLower(w) {
		case "no_hydration":
			o.Disabled = true
		case "no_discard_passdown":
			o.NoDiscardPassdown = true
		default:
			return nil, invalid("Invalid feature argument")
		}
	}
	return words[n:], nil
}

func (o *Options) parseCore(words []string) error {
	if len(words) == 0 {
		return nil
	}
	n, err := strconv.ParseUint(words[0], 10, 32)
	if words = words[1:]; err != nil || n > 4 || int(n) > len(words) {
		return invalid("Invalid number of core arguments")
	}
	if n%2 != 0 {
		return invalid("Number of core arguments must be even")
	}
	for ; n > 0; n, words = n-2, words[2:] {
		v, err := strconv.ParseUint(words[1], 10, 32)
		switch key := strings.ToLower(words[0]); {
		case key == "hydration_threshold" && err == nil:
			o.Threshold = uint32(v)
		case key == "hydration_batch_size" && err == nil:
			o.Batch = uint32(v)
		case key == "hydration_threshold" || key == "hydration_batch_size":
			return invalid("Invalid value for argument `" + key + "'")
		default:
			return invalid("Invalid core argument")
		}
	}
	return nil
}

// invalid is a fault of a table line.
func invalid(what string) error { return fmt.Errorf("%s: %w", what, syscall.EINVAL) }

// IsHydrated tells whether metadata says that every region is hydrated: a clone that needs no source.
func IsHydrated(m Metadata) (bool, error) {
	regions := Region((m.TargetSize() + m.RegionSize() - 1) / m.RegionSize())
	t := newTable(regions)
	count := 0
	err := m.LoadBits(func(first uint64, words []uint64) bool {
		for i, v := range words {
			if at := Region(first+uint64(i)) * 64; at < regions {
				count += bits.OnesCount64(v &^ t.behind(at))
			}
		}
		return true
	})
	return Region(count) == regions, err
}
