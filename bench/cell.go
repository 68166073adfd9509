package bench

import (
	"fmt"
	"math"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"cowherd/internal/size"
)

// A Cell is one workload on one stack: what is measured as one line of a table. What does not concern its stack is
// zero. Plans say what cells there are; docs/cowherd-bench.md explains each field.
type Cell struct {
	Name      string `json:"name"`
	Stack     string `json:"stack"`
	Engine    string `json:"engine,omitempty"`
	Offload   string `json:"offload,omitempty"`
	Writes    string `json:"writes,omitempty"`
	Store     string `json:"store,omitempty"`
	Snapshots int    `json:"snapshots,omitempty"`
	Layers    int    `json:"layers,omitempty"`
	Hydration bool   `json:"hydration,omitempty"` // in the background, while the jobs run

	Device        string        `json:"device"`
	Size          int64         `json:"size_bytes"`
	Range         int64         `json:"range_bytes"` // of the device that jobs use, from its start
	Latency       time.Duration `json:"latency_ns,omitempty"`
	Bandwidth     int64         `json:"bandwidth_bytes,omitempty"` // in a second
	Queues        int           `json:"queues,omitempty"`
	CopyLatency   time.Duration `json:"copy_latency_ns,omitempty"`
	CopyBandwidth int64         `json:"copy_bandwidth_bytes,omitempty"` // in a second
	Dir           string        `json:"dir,omitempty"`
	Direct        bool          `json:"direct,omitempty"`
	URI           string        `json:"uri,omitempty"`
	OtherURI      string        `json:"other_uri,omitempty"`

	Chunk   int64   `json:"chunk_bytes,omitempty"`
	Region  int64   `json:"region_bytes,omitempty"`
	Block   int64   `json:"block_bytes,omitempty"`
	Pattern string  `json:"pattern,omitempty"`
	Theta   float64 `json:"theta,omitempty"`
	Read    int     `json:"read_percent,omitempty"`
	Data    int     `json:"data_percent,omitempty"`
	Jobs    int     `json:"jobs,omitempty"`
	Depth   int     `json:"depth,omitempty"`
	Rate    float64 `json:"rate,omitempty"` // requests a second of each job; 0: as fast as it can
	CPUs    int     `json:"cpus,omitempty"` // that goroutines run on at a time; 0: all

	Foreground     string  `json:"foreground,omitempty"` // beside a stream of copies
	ForegroundRate float64 `json:"foreground_rate,omitempty"`
	Yield          bool    `json:"yield,omitempty"`  // copies give way to it
	Packed         bool    `json:"packed,omitempty"` // copies lie one behind the other

	Warmup      time.Duration `json:"warmup_ns,omitempty"`
	Time        time.Duration `json:"time_ns,omitempty"`
	Count       int64         `json:"count,omitempty"` // requests of all jobs together
	Repetitions int           `json:"repetitions"`
	Compare     string        `json:"compare,omitempty"`
	Against     string        `json:"against,omitempty"`
	Counted     bool          `json:"counted,omitempty"`

	label string // see labelCells
}

// defaultCell is what a plan begins with.
func defaultCell() Cell {
	return Cell{
		Stack: stackBare, Engine: Scaled, Offload: offloadOff, Writes: writesFirst, Store: Transient, Snapshots: 1, Layers: 3,
		Device: deviceNull, Size: 512 << 20, Chunk: 4 << 10, Region: 64 << 10, Pattern: patternRandom, Theta: 0.99, Data: 100,
		Jobs: 1, Depth: 32, Repetitions: 3, Foreground: foregroundNone, ForegroundRate: foregroundRate,
	}
}

// The words of a plan.
const (
	stackBare           = "bare"
	stackSnapshotOrigin = "snapshot-origin"
	stackSnapshot       = "snapshot"
	stackClone          = "clone"
	stackCopies         = "copies"
	stackMapped         = "mapped"
	stackTransfer       = "transfer"
	stackHydration      = "hydration"
	stackStoreOpen      = "store-open"
	stackCommit         = "clone-commit"
	stackAftermath      = "aftermath"

	offloadOff      = "off"
	offloadAuto     = "auto"
	offloadOnly     = "only"
	offloadEmulated = "emulated"
	offloadWorker   = "worker"

	deviceNull   = "null"
	deviceBlank  = "blank"
	deviceMem    = "mem"
	deviceMedia  = "media"
	deviceFile   = "file"
	deviceRemote = "remote"
	deviceNBD    = "nbd"

	patternRandom     = "random"
	patternSequential = "sequential"
	patternStrided    = "strided"
	patternZipf       = "zipf"

	writesFirst = "first"
	writesLater = "later"
)

// value is a field of a cell that text can be read into.
type value interface {
	set(text string) error
	String() string
}

// field is one key of a plan.
type field struct {
	key   string
	value func(c *Cell) value
	// used tells whether the field says anything about cells of this kind; nil: it always does.
	used func(c *Cell) bool
}

// fields are all keys of a plan, in the order in which lists are multiplied out: the last varies fastest.
func fields() []field {
	return []field{
		{"name", func(c *Cell) value { return (*word)(&c.Name) }, nil},
		{"stack", func(c *Cell) value { return choice{&c.Stack, stackNames} }, nil},
		{"device", func(c *Cell) value { return choice{&c.Device, deviceNames} }, nil},
		{"size", func(c *Cell) value { return amount{&c.Size, 1 << 60} }, nil},
		{"range", func(c *Cell) value { return amount{&c.Range, 1 << 60} }, jobful},
		{"latency", func(c *Cell) value { return span{&c.Latency, time.Minute} }, onDevice(deviceNull, deviceRemote)},
		{"bandwidth", func(c *Cell) value { return amount{&c.Bandwidth, 1 << 50} }, onDevice(deviceNull, deviceRemote)},
		{"queues", func(c *Cell) value { return whole{&c.Queues, 0, 1024} }, onDevice(deviceNull, deviceRemote)},
		{"copy-latency", func(c *Cell) value { return span{&c.CopyLatency, time.Minute} }, hasController},
		{"copy-bandwidth", func(c *Cell) value { return amount{&c.CopyBandwidth, 1 << 50} }, hasController},
		{"dir", func(c *Cell) value { return (*word)(&c.Dir) }, onDevice(deviceFile)},
		{"direct", func(c *Cell) value { return flag{&c.Direct} }, onDevice(deviceFile)},
		{"uri", func(c *Cell) value { return (*word)(&c.URI) }, onDevice(deviceNBD)},
		{"other-uri", func(c *Cell) value { return (*word)(&c.OtherURI) }, onDevice(deviceNBD)},
		{"store", func(c *Cell) value { return choice{&c.Store, []string{Transient, Persistent}} }, isSnapshot},
		{"snapshots", func(c *Cell) value { return whole{&c.Snapshots, 0, 64} }, onStack(stackSnapshotOrigin)},
		{"layers", func(c *Cell) value { return whole{&c.Layers, 1, 64} }, onStack(stackMapped)},
		{"hydration", func(c *Cell) value { return flag{&c.Hydration} }, onStack(stackClone)},
		{"chunk", func(c *Cell) value { return amount{&c.Chunk, 1 << 30} }, hasChunks},
		{"region", func(c *Cell) value { return amount{&c.Region, 1 << 30} }, onStack(stackClone, stackHydration, stackCommit)},
		{"block", func(c *Cell) value { return amount{&c.Block, 1 << 30} }, hasBlocks},
		{"pattern", func(c *Cell) value { return choice{&c.Pattern, patternNames} }, goesOver},
		{"theta", func(c *Cell) value { return number{&c.Theta, 0.01, 10} }, isZipf},
		{"read", func(c *Cell) value { return whole{&c.Read, 0, 100} }, reads},
		{"writes", func(c *Cell) value { return choice{&c.Writes, []string{writesFirst, writesLater}} }, isCopyOnWrite},
		{"data", func(c *Cell) value { return whole{&c.Data, 0, 100} }, onStack(stackTransfer, stackHydration)},
		{"jobs", func(c *Cell) value { return whole{&c.Jobs, 1, 1024} }, hasJobs},
		{"depth", func(c *Cell) value { return whole{&c.Depth, 1, 4096} }, hasDepth},
		{"rate", func(c *Cell) value { return number{&c.Rate, 0, 1e9} }, jobful},
		{"foreground", func(c *Cell) value { return choice{&c.Foreground, foregroundNames} }, onStack(stackCopies)},
		{"foreground-rate", func(c *Cell) value { return number{&c.ForegroundRate, 1, 1e9} }, hasForeground},
		{"yield", func(c *Cell) value { return flag{&c.Yield} }, hasForeground},
		{"packed", func(c *Cell) value { return flag{&c.Packed} }, onStack(stackAftermath)},
		{"cpus", func(c *Cell) value { return whole{&c.CPUs, 0, 1024} }, nil},
		{"offload", func(c *Cell) value { return choice{&c.Offload, offloadNames} }, hasEngine},
		{"engine", func(c *Cell) value { return choice{&c.Engine, engineNames()} }, picksEngine},
		{"warmup", func(c *Cell) value { return span{&c.Warmup, time.Hour} }, jobful},
		{"time", func(c *Cell) value { return span{&c.Time, 24 * time.Hour} }, goesOver},
		{"count", func(c *Cell) value { return long{&c.Count, 0, math.MaxInt32} }, counts},
		{"repetitions", func(c *Cell) value { return whole{&c.Repetitions, 1, 1000} }, nil},
		{"compare", func(c *Cell) value { return choice{&c.Compare, append(comparedKeys(), "")} }, nil},
		{"against", func(c *Cell) value { return (*word)(&c.Against) }, nil},
		{"counted", func(c *Cell) value { return flag{&c.Counted} }, hasLeaves},
	}
}

var (
	stackNames = []string{
		stackBare, stackSnapshotOrigin, stackSnapshot, stackClone, stackCopies, stackMapped, stackTransfer, stackHydration,
		stackStoreOpen, stackCommit, stackAftermath,
	}
	deviceNames     = []string{deviceNull, deviceBlank, deviceMem, deviceMedia, deviceFile, deviceRemote, deviceNBD}
	patternNames    = []string{patternRandom, patternSequential, patternStrided, patternZipf}
	foregroundNames = []string{foregroundNone, foregroundRead, foregroundCopy}
	offloadNames    = []string{offloadOff, offloadAuto, offloadOnly, offloadEmulated, offloadWorker}
)

// comparedKeys are the fields that cells may be compared by.
func comparedKeys() []string {
	return []string{
		"stack", "device", "store", "snapshots", "layers", "hydration", "chunk", "region", "block", "pattern", "writes", "jobs",
		"depth", "cpus", "offload", "engine", "read", "foreground", "yield", "packed",
	}
}

func onStack(names ...string) func(*Cell) bool {
	return func(c *Cell) bool { return slices.Contains(names, c.Stack) }
}

func onDevice(names ...string) func(*Cell) bool {
	return func(c *Cell) bool { return slices.Contains(names, c.Device) }
}

// jobful tells whether jobs submit requests; the other stacks have drivers of their own.
func jobful(c *Cell) bool {
	return !onStack(stackTransfer, stackHydration, stackStoreOpen, stackCommit, stackAftermath)(c)
}

// goesOver tells whether a range is gone over in a pattern, for a time.
func goesOver(c *Cell) bool { return jobful(c) || c.Stack == stackAftermath }

func isSnapshot(c *Cell) bool    { return onStack(stackSnapshotOrigin, stackSnapshot)(c) }
func isCopyOnWrite(c *Cell) bool { return isSnapshot(c) || c.Stack == stackClone }
func hasChunks(c *Cell) bool     { return isSnapshot(c) || c.Stack == stackStoreOpen }
func picksEngine(c *Cell) bool {
	return isCopyOnWrite(c) || onStack(stackCopies, stackHydration, stackAftermath)(c)
}
func hasEngine(c *Cell) bool { return picksEngine(c) || c.Stack == stackTransfer }
func hasBlocks(c *Cell) bool { return jobful(c) || onStack(stackTransfer, stackAftermath)(c) }
func hasJobs(c *Cell) bool   { return jobful(c) || onStack(stackTransfer, stackAftermath)(c) }
func hasDepth(c *Cell) bool  { return jobful(c) || onStack(stackTransfer, stackAftermath)(c) }
func isZipf(c *Cell) bool    { return jobful(c) && c.Pattern == patternZipf }
func reads(c *Cell) bool     { return jobful(c) && c.Stack != stackCopies }
func hasForeground(c *Cell) bool {
	return c.Stack == stackCopies && c.Foreground != foregroundNone && c.Foreground != ""
}
func counts(c *Cell) bool    { return jobful(c) || onStack(stackStoreOpen, stackCommit)(c) }
func hasLeaves(c *Cell) bool { return jobful(c) || onStack(stackTransfer, stackHydration)(c) }

// hasController tells whether the devices have a copy command of their own, or a server that copies.
func hasController(c *Cell) bool {
	return onDevice(deviceNull, deviceRemote, deviceMedia)(c) && hasEngine(c) && c.Offload != offloadOff &&
		c.Offload != offloadEmulated
}

// unit is what is copied on write, in bytes; 0: nothing is.
func (c *Cell) unit() int64 {
	switch {
	case isSnapshot(c):
		return c.Chunk
	case c.Stack == stackClone:
		return c.Region
	}
	return 0
}

// normalise clears what does not concern the cell, so that cells that differ in nothing else are the same, and fills in
// what follows from the rest.
func (c *Cell) normalise() {
	if c.Block == 0 {
		c.Block = 4 << 10
		switch {
		case isSnapshot(c):
			c.Block = c.Chunk
		case c.Stack == stackTransfer:
			c.Block = 256 << 10
		}
	}
	if onStack(stackStoreOpen, stackCommit)(c) {
		c.Device = deviceMem
	}
	if c.Device == deviceRemote {
		if c.Latency == 0 {
			c.Latency = 200 * time.Microsecond
		}
		if c.Bandwidth == 0 {
			c.Bandwidth = 1 << 30
		}
	}
	if c.Range == 0 || c.Range > c.Size {
		c.Range = c.Size
	}
	zero := Cell{}
	for _, f := range fields() {
		if f.used != nil && !f.used(c) {
			switch to, from := f.value(c), f.value(&zero); v := to.(type) {
			case *word:
				*v = ""
			case choice:
				*v.p = ""
			default:
				_ = to.set(from.String()) // a zero that is below the least is set all the same
			}
		}
	}
	if c.Name == "" {
		c.Name = c.Stack
	}
}

// check tells what is wrong with the cell as a whole.
func (c *Cell) check() error {
	unit := c.unit()
	for _, p := range []struct {
		key   string
		value int64
	}{{"chunk", c.Chunk}, {"region", c.Region}, {"block", c.Block}} {
		if p.value != 0 && (p.value < 512 || p.value&(p.value-1) != 0) {
			return fmt.Errorf("%s: %d is not a power of two from 512 on", p.key, p.value)
		}
	}
	switch {
	case isSnapshot(c) && c.Chunk < 4096:
		return fmt.Errorf("chunk: %d is less than 4096", c.Chunk)
	case onStack(stackClone, stackHydration, stackCommit)(c) && c.Region < 4096:
		return fmt.Errorf("region: %d is less than 4096", c.Region)
	case c.Size <= 0 || c.Size%max(c.Block, unit, 512) != 0:
		return fmt.Errorf("size: %d is not a multiple of block, chunk and region", c.Size)
	case jobful(c) && (c.Range/max(c.Block, unit, 1) < int64(c.Jobs) || c.Range%max(c.Block, unit) != 0):
		return fmt.Errorf("range: %d is not some block, chunk or region for each of %d jobs", c.Range, c.Jobs)
	case jobful(c) && c.Range/c.Block > blocksMax:
		return fmt.Errorf("range: %d has more than %d blocks", c.Range, blocksMax)
	case c.Stack == stackAftermath && (c.Device != deviceFile || c.Direct):
		return fmt.Errorf("device: stack = %q is about files, by the page cache", c.Stack)
	case c.Stack == stackAftermath && c.Block < overwriteBlock:
		return fmt.Errorf("block: %d is less than %d", c.Block, overwriteBlock)
	case c.Stack == stackAftermath && c.Size/c.Block < int64(c.Jobs):
		return fmt.Errorf("size: %d is not some block for each of %d jobs", c.Size, c.Jobs)
	case c.Stack == stackAftermath && c.Size > blocksMax*overwriteBlock:
		return fmt.Errorf("size: %d is more than %d", c.Size, int64(blocksMax*overwriteBlock))
	case c.Device == deviceFile && c.Dir == "":
		return fmt.Errorf("dir: device = %q needs a directory", c.Device)
	case c.Device == deviceNBD && c.URI == "":
		return fmt.Errorf("uri: device = %q needs one", c.Device)
	case c.Device == deviceNBD && c.OtherURI == "" && (isCopyOnWrite(c) || onStack(stackCopies, stackTransfer, stackHydration)(c)):
		return fmt.Errorf("other-uri: stack = %q needs a second export", c.Stack)
	case c.Device == deviceNBD && c.Snapshots > 1:
		return fmt.Errorf("snapshots: there is one other export only")
	case c.Store == Persistent && onDevice(deviceNull, deviceBlank, deviceMedia, deviceRemote)(c):
		return fmt.Errorf("store: device = %q does not keep it", c.Device)
	case c.Bandwidth > 0 && c.Latency == 0:
		return fmt.Errorf("latency: a bandwidth needs one")
	case c.Engine == OneLock && !isSnapshot(c):
		return fmt.Errorf("engine: stack = %q has no exceptions for %q", c.Stack, c.Engine)
	case c.CPUs > runtime.NumCPU():
		return fmt.Errorf("cpus: %d is more than the %d of this machine", c.CPUs, runtime.NumCPU())
	case c.Offload == offloadWorker && c.Engine != Serialised:
		return fmt.Errorf("offload: %q is the serialised engine's", c.Offload)
	case c.Offload == offloadEmulated && c.Device != deviceMedia:
		return fmt.Errorf("offload: device = %q has no copy command that is emulated", c.Device)
	case c.Offload != "" && c.Offload != offloadOff && onDevice(deviceBlank, deviceMem, deviceNBD)(c) && c.Offload != offloadAuto:
		return fmt.Errorf("offload: device = %q has none", c.Device)
	case hasForeground(c) && c.Time == 0:
		return fmt.Errorf("foreground: it needs a time")
	case hasForeground(c) && c.Block < foregroundBlock:
		return fmt.Errorf("block: %d is less than the foreground's %d", c.Block, foregroundBlock)
	case hasForeground(c) && c.Range/c.Block < int64(c.Jobs)+foregroundUnits(c, c.Range/c.Block):
		return fmt.Errorf("range: %d is not some block for each of %d jobs and the foreground", c.Range, c.Jobs)
	case c.Warmup > 0 && c.Time == 0:
		return fmt.Errorf("warmup: it needs a time")
	case c.Counted && c.Device == deviceNBD:
		return fmt.Errorf("counted: not with device = %q", c.Device)
	}
	return nil
}

// Label tells the cell from the others of its plan: its name, and the fields in which those of that name differ.
func (c *Cell) Label() string {
	if c.label == "" {
		return c.Name
	}
	return c.label
}

// unlabelled are the fields that no label shows.
var unlabelled = []string{"name", "time", "warmup", "repetitions", "compare", "against", "counted", "range"}

// ambiguous are the fields whose values do not say by themselves what they are of.
var ambiguous = []string{"offload", "writes", "foreground"}

// labelCells gives each cell its label.
func labelCells(cells []*Cell) {
	named := map[string][]*Cell{}
	for _, c := range cells {
		c.label = c.Name
		named[c.Name] = append(named[c.Name], c)
	}
	for _, f := range fields() {
		if slices.Contains(unlabelled, f.key) {
			continue
		}
		for _, list := range named {
			if !differ(list, f) {
				continue
			}
			for _, c := range list {
				text := f.value(c).String()
				if f.used != nil && !f.used(c) || text == c.Name {
					continue
				}
				if _, ok := f.value(c).(choice); !ok || slices.Contains(ambiguous, f.key) {
					text = f.key + " " + text
				}
				c.label += ", " + text
			}
		}
	}
}

// differ tells whether cells differ in a field, those that it concerns.
func differ(cells []*Cell, f field) bool {
	values := map[string]bool{}
	for _, c := range cells {
		if f.used == nil || f.used(c) {
			values[f.value(c).String()] = true
		}
	}
	return len(values) > 1
}

// blocksMax bounds the blocks of a range: each takes four bytes of a job's list.
const blocksMax = 1 << 26

// get is a field's text; "" for a key that there is not.
func (c *Cell) get(key string) string {
	for _, f := range fields() {
		if f.key == key {
			return f.value(c).String()
		}
	}
	return ""
}

// fieldOf is the field of a key.
func fieldOf(key string) (field, error) {
	for _, f := range fields() {
		if f.key == key {
			return f, nil
		}
	}
	return field{}, fmt.Errorf("%s: there is no such key", key)
}

// Keys are the keys of a plan.
func Keys() []string {
	keys := make([]string, len(fields()))
	for i, f := range fields() {
		keys[i] = f.key
	}
	return keys
}

type word string

func (v *word) set(text string) error { *v = word(text); return nil }
func (v *word) String() string        { return string(*v) }

type choice struct {
	p     *string
	among []string
}

func (v choice) set(text string) error {
	if !slices.Contains(v.among, text) {
		return fmt.Errorf("%q is none of %s", text, strings.TrimSuffix(strings.Join(v.among, ", "), ", "))
	}
	*v.p = text
	return nil
}
func (v choice) String() string { return *v.p }

type flag struct{ p *bool }

func (v flag) set(text string) (err error) {
	if *v.p, err = strconv.ParseBool(text); err != nil {
		return fmt.Errorf("%q is neither true nor false", text)
	}
	return nil
}
func (v flag) String() string { return strconv.FormatBool(*v.p) }

type whole struct {
	p           *int
	least, most int
}

func (v whole) set(text string) error {
	n, err := strconv.Atoi(text)
	*v.p = n
	if err != nil || n < v.least || n > v.most {
		return fmt.Errorf("%q is not a number from %d to %d", text, v.least, v.most)
	}
	return nil
}
func (v whole) String() string { return strconv.Itoa(*v.p) }

type long struct {
	p           *int64
	least, most int64
}

func (v long) set(text string) error {
	n, err := strconv.ParseInt(text, 10, 64)
	*v.p = n
	if err != nil || n < v.least || n > v.most {
		return fmt.Errorf("%q is not a number from %d to %d", text, v.least, v.most)
	}
	return nil
}
func (v long) String() string { return strconv.FormatInt(*v.p, 10) }

type number struct {
	p           *float64
	least, most float64
}

func (v number) set(text string) error {
	n, err := strconv.ParseFloat(text, 64)
	*v.p = n
	if err != nil || !(n >= v.least && n <= v.most) {
		return fmt.Errorf("%q is not a number from %v to %v", text, v.least, v.most)
	}
	return nil
}
func (v number) String() string { return strconv.FormatFloat(*v.p, 'g', -1, 64) }

// amount is a size, or bytes in a second.
type amount struct {
	p    *int64
	most int64
}

func (v amount) set(text string) error {
	n, err := size.Parse(text)
	*v.p = n
	if err != nil {
		return err
	}
	if n > v.most {
		return fmt.Errorf("%s is more than %s", text, size.Exact(v.most))
	}
	return nil
}
func (v amount) String() string { return size.Exact(*v.p) }

type span struct {
	p    *time.Duration
	most time.Duration
}

func (v span) set(text string) error {
	d, err := time.ParseDuration(text)
	*v.p = d
	if err != nil || d < 0 || d > v.most {
		return fmt.Errorf("%q is not a time from 0s to %v", text, v.most)
	}
	return nil
}
func (v span) String() string { return v.p.String() }
