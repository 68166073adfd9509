package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"cowherd/internal/size"
)

// "peers copy" measures copies of whole images by cowherd and by other programs. A cell is a place and an image; in each
// round every program copies the image once, in random order, so that none always finds the memory that another one has
// just freed. What is compared is the time from the start of the program to its end, or until the copy is durable.

// copyPlace is where images are copied.
type copyPlace struct {
	name    string
	durable bool    // fsync counts
	servers bool    // between two nbdkit servers
	bar     float64 // least ratio to the fastest peer
	tools   []copyTool
}

// copyTool is a program as it is run. FROM and TO in its arguments are the ends of the copy.
type copyTool struct {
	name      string
	command   []string
	truncated bool // the destination has to be there
	other     bool // another way of cowherd's: not compared
}

var (
	copyNBD       = []string{"nbdcopy", "--destination-is-zero", "FROM", "TO"}
	copyOurs      = copyTool{name: ours, command: []string{"COWHERD", "copy", "--quiet", "FROM", "TO"}}
	copyReadWrite = copyTool{name: "cowherd, read and write", other: true,
		command: []string{"COWHERD", "copy", "--quiet", "--method", "readwrite", "FROM", "TO"}}
	copyTools = []copyTool{
		copyOurs,
		{name: "nbdcopy", command: copyNBD, truncated: true},
		{name: "qemu-img convert -W -m 16", command: []string{"qemu-img", "convert", "-W", "-m", "16", "-f", "raw", "-O", "raw", "FROM", "TO"}},
		{name: "cp --sparse=always", command: []string{"cp", "--reflink=never", "--sparse=always", "FROM", "TO"}},
	}
	copyPlaces = []copyPlace{
		{name: "memory", bar: 1, tools: copyTools},
		{name: "disk", durable: true, bar: 1, tools: copyTools},
		{name: "servers", servers: true, bar: 1.1, tools: []copyTool{
			{name: ours, command: []string{"COWHERD", "copy", "--quiet", "--destination-is-zero", "FROM", "TO"}, truncated: true},
			{name: "nbdcopy", command: copyNBD, truncated: true},
		}},
		{name: "clone", durable: true, bar: 0.5, tools: []copyTool{
			copyOurs, {name: "cp --reflink=always", command: []string{"cp", "--reflink=always", "FROM", "TO"}}, copyReadWrite,
		}},
	}
)

// copyOptions are the flags of "peers copy".
type copyOptions struct {
	repetitions  int
	bytes        int64
	only         *regexp.Regexp
	memory, disk string
	cowherd      string
	json         bool
}

func parseCopyOptions(args []string, stderr io.Writer) (o copyOptions, err error) {
	o.bytes = 1 << 30
	var only string
	flags := flag.NewFlagSet("peers copy", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.IntVar(&o.repetitions, "reps", 5, "rounds of each cell")
	flags.Func("size", "`bytes` of data in each image (default 1GiB)", func(s string) (err error) {
		o.bytes, err = size.Parse(s)
		return err
	})
	flags.StringVar(&only, "only", "", "regular expression: measure these cells, named as in memory/full")
	flags.StringVar(&o.memory, "dir", "/dev/shm", "where images in memory go, in a directory that is removed")
	flags.StringVar(&o.disk, "disk", "/var/tmp", "where images on a disk go, in a directory that is removed")
	flags.StringVar(&o.cowherd, "cowherd", "bin/cowherd", "the cowherd that is measured")
	flags.BoolVar(&o.json, "json", false, "print JSON")
	if err = flags.Parse(args); err != nil {
		return o, err
	}
	if o.only, err = regexp.Compile(only); err != nil {
		return o, fmt.Errorf("-only: %w", err)
	}
	switch {
	case flags.NArg() > 0:
		return o, fmt.Errorf("arguments are not understood, only flags")
	case o.repetitions < 1:
		return o, fmt.Errorf("-reps is at least 1")
	case o.bytes < 1<<20 || o.bytes%(1<<20) != 0:
		return o, fmt.Errorf("-size is a multiple of 1 MiB")
	}
	o.cowherd, err = filepath.Abs(o.cowherd)
	return o, err
}

// copyRow is a line of the table.
type copyRow struct {
	Cell      string  `json:"cell"`
	Tool      string  `json:"tool"`
	Seconds   float64 `json:"seconds"` // medians
	Least     float64 `json:"seconds_min"`
	Most      float64 `json:"seconds_max"`
	MBPerS    float64 `json:"megabytes_per_second"` // of data
	CPU       float64 `json:"cpu_seconds"`          // of the program, and of servers
	Allocated int64   `json:"allocated_bytes"`
	Ratio     float64 `json:"ratio,omitempty"` // in cowherd's row: the fastest peer's time in the same round to its own
	RatioMin  float64 `json:"ratio_min,omitempty"`
	RatioMax  float64 `json:"ratio_max,omitempty"`
	Bar       float64 `json:"bar,omitempty"`
	Verdict   string  `json:"verdict,omitempty"`
	Foreign   float64 `json:"foreign"` // the most of the rounds, as a share of one CPU
}

// copyRun is one copy.
type copyRun struct {
	seconds, cpu, foreign float64
	allocated             int64
}

// copyBench is the program.
type copyBench struct {
	copyOptions
	progress io.Writer
	notes    []string
	rows     []copyRow
	ratios   []comparison
}

// runCopies is "peers copy".
func runCopies(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o, err := parseCopyOptions(args, stderr)
	if err != nil {
		return err
	}
	b, err := measureCopies(ctx, o, stderr)
	return errors.Join(err, b.write(stdout))
}

// measureCopies measures in all places. What it found is there even if there is an error.
func measureCopies(ctx context.Context, o copyOptions, stderr io.Writer) (*copyBench, error) {
	b := &copyBench{copyOptions: o, progress: stderr}
	for _, place := range copyPlaces {
		if err := b.place(ctx, place); err != nil {
			return b, fmt.Errorf("%s: %w", place.name, err)
		}
	}
	return b, nil
}

// place measures the cells of a place.
func (b *copyBench) place(ctx context.Context, place copyPlace) (err error) {
	var images []string
	for _, image := range []string{"full", "sparse"} {
		if b.only.MatchString(place.name+"/"+image) && (place.name != "clone" || image == "full") {
			images = append(images, image)
		}
	}
	if len(images) == 0 {
		return nil
	}
	dir := b.memory
	if place.name == "disk" {
		dir = b.disk
		if fs := (unix.Statfs_t{}); unix.Statfs(dir, &fs) == nil && fs.Type == unix.TMPFS_MAGIC {
			b.notes = append(b.notes, fmt.Sprintf("skipped: disk: %s is in memory: -disk says where there is one", dir))
			return nil
		}
	}
	work, err := os.MkdirTemp(dir, "cowherd-copy-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	if place.name == "clone" {
		mounted, unmount, why := mountXFS(work, b.bytes)
		if why != nil {
			b.notes = append(b.notes, fmt.Sprintf("skipped: clone: %v", why))
			return nil
		}
		defer func() { err = errors.Join(unmount(), err) }()
		return b.cell(ctx, place, images[0], mounted)
	}
	for _, image := range images {
		if err := b.cell(ctx, place, image, work); err != nil {
			return err
		}
	}
	return nil
}

// mountXFS makes a file system that shares blocks, with room for some copies of n bytes, on a file in dir.
func mountXFS(dir string, n int64) (mnt string, unmount func() error, err error) {
	disk := filepath.Join(dir, "disk")
	mnt = filepath.Join(dir, "mnt")
	err = errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, 3*n+(1<<30)), os.Mkdir(mnt, 0o700))
	if err != nil {
		return "", nil, err
	}
	for _, command := range [][]string{{"mkfs.xfs", "-q", "-m", "reflink=1", disk}, {"mount", "-o", "loop", disk, mnt}} {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			return "", nil, fmt.Errorf("%s: %w: %s", command[0], err, tail(out))
		}
	}
	return mnt, func() error {
		if out, err := exec.Command("umount", mnt).CombinedOutput(); err != nil {
			return fmt.Errorf("umount: %w: %s", err, tail(out))
		}
		return nil
	}, nil
}

// cell measures one image in a place.
func (b *copyBench) cell(ctx context.Context, place copyPlace, image, dir string) error {
	name := place.name + "/" + image
	from, to := filepath.Join(dir, image), filepath.Join(dir, "copy")
	if err := b.fill(ctx, from, image); err != nil {
		return err
	}
	defer os.Remove(from)
	runs := map[string][]copyRun{}
	var tools []copyTool
	for _, tool := range place.tools {
		if _, err := exec.LookPath(b.argument(tool.command[0], "", "")); err != nil {
			b.notes = append(b.notes, fmt.Sprintf("skipped: %s: %s: %v", name, tool.name, err))
			continue
		}
		tools = append(tools, tool)
	}
	for n := range b.repetitions {
		for _, i := range rand.Perm(len(tools)) {
			fmt.Fprintf(b.progress, "%s round %d %s\n", name, n+1, tools[i].name)
			run, err := b.copy(ctx, place, tools[i], from, to, n == 0)
			if err := errors.Join(err, os.Remove(to)); err != nil {
				return fmt.Errorf("%s: %s: %w", name, tools[i].name, err)
			}
			runs[tools[i].name] = append(runs[tools[i].name], run)
		}
	}
	for _, tool := range tools {
		b.rows = append(b.rows, b.row(name, place, tool, tools, runs))
	}
	b.compare(name, place, tools, runs)
	return nil
}

// fill makes an image: full of data, or a quarter of it, in runs of 64 KiB.
func (b *copyBench) fill(ctx context.Context, path, image string) error {
	if image == "full" {
		return fillImage(ctx, path, b.bytes)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	const run = 64 << 10
	random := rand.NewChaCha8([32]byte{})
	buffer := make([]byte, run)
	for at := int64(0); at < 4*b.bytes && err == nil; at += 4 * run {
		_, _ = random.Read(buffer) // never fails
		_, err = f.WriteAt(buffer, at)
	}
	if err == nil {
		err = f.Truncate(4 * b.bytes)
	}
	return errors.Join(err, f.Close())
}

// argument puts the ends of a copy in an argument.
func (b *copyBench) argument(text, from, to string) string {
	switch text {
	case "COWHERD":
		return b.cowherd
	case "FROM":
		return from
	case "TO":
		return to
	}
	return text
}

// copy copies once, and measures it. check: the copy is compared afterwards.
func (b *copyBench) copy(ctx context.Context, place copyPlace, tool copyTool, from, to string, check bool) (r copyRun, err error) {
	if tool.truncated {
		if err := makeAsLong(from, to); err != nil {
			return r, err
		}
	}
	ends := [2]string{from, to}
	var servers []*process
	if place.servers {
		for i, image := range ends {
			p, socket, err := startCopyServer(ctx, image)
			if err != nil {
				return r, err
			}
			defer p.stop()
			servers = append(servers, p)
			ends[i] = "nbd+unix:///?socket=" + socket
		}
	}
	if place.durable {
		unix.Sync() // what others left is not this one's
	}
	var args []string
	for _, a := range tool.command {
		args = append(args, b.argument(a, ends[0], ends[1]))
	}
	durable := ""
	if place.durable {
		durable = to
	}
	if r, err = timeCopy(ctx, args, durable, servers); err != nil {
		return r, err
	}
	var st unix.Stat_t
	if err := unix.Stat(to, &st); err != nil {
		return r, err
	}
	r.allocated = st.Blocks * 512
	if check {
		err = sameContent(from, to)
	}
	return r, err
}

// makeAsLong makes an empty file as long as another.
func makeAsLong(from, to string) error {
	stat, err := os.Stat(from)
	if err != nil {
		return err
	}
	return makeImage(to, stat.Size())
}

// timeCopy runs a program, and then syncs the file durable, if it is not "".
func timeCopy(ctx context.Context, args []string, durable string, servers []*process) (r copyRun, err error) {
	busy, err := machineCPU()
	if err != nil {
		return r, err
	}
	start := time.Now()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.SysProcAttr = apart()
	if out, err := cmd.CombinedOutput(); err != nil {
		return r, withLog(err, tail(out))
	}
	if durable != "" {
		if err := syncFile(durable); err != nil {
			return r, err
		}
	}
	took := time.Since(start)
	used := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	for _, p := range servers {
		n, err := processCPU(p.cmd.Process.Pid)
		if err != nil {
			return r, err
		}
		used += n
	}
	now, err := machineCPU()
	return copyRun{seconds: took.Seconds(), cpu: used.Seconds(), foreign: max((now-busy-used).Seconds()/took.Seconds(), 0)}, err
}

// startCopyServer serves an image by nbdkit. Its socket and its log lie beside the image.
func startCopyServer(ctx context.Context, image string) (p *process, socket string, err error) {
	socket = image + ".sock"
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, "", err
	}
	home := image + ".server" // its log is put beside it
	if err := os.MkdirAll(home, 0o700); err != nil {
		return nil, "", err
	}
	p, err = spawn(home, "nbdkit", "--foreground", "--unix", socket, "file", image)
	if err != nil {
		return nil, "", err
	}
	if err := p.waitListening(ctx, socket); err != nil {
		return nil, "", withLog(err, p.stop())
	}
	return p, socket, nil
}

func syncFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// sameContent compares two files.
func sameContent(a, b string) error {
	f, err := os.Open(a)
	if err != nil {
		return err
	}
	defer f.Close()
	g, err := os.Open(b)
	if err != nil {
		return err
	}
	defer g.Close()
	p, q := make([]byte, 1<<20), make([]byte, 1<<20)
	for {
		n, err := io.ReadFull(f, p)
		m, _ := io.ReadFull(g, q) // what is missing differs
		if n != m || !bytes.Equal(p[:n], q[:m]) {
			return fmt.Errorf("the copy is wrong")
		}
		if n < len(p) {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return nil
			}
			return err
		}
	}
}

// row sums up what a program did in a cell.
func (b *copyBench) row(cell string, place copyPlace, tool copyTool, tools []copyTool, all map[string][]copyRun) copyRow {
	runs := all[tool.name]
	pick := func(of func(copyRun) float64) (list []float64) {
		for _, r := range runs {
			list = append(list, of(r))
		}
		return list
	}
	seconds := pick(func(r copyRun) float64 { return r.seconds })
	row := copyRow{
		Cell: cell, Tool: tool.name, Seconds: median(seconds), Least: slices.Min(seconds), Most: slices.Max(seconds),
		CPU:       median(pick(func(r copyRun) float64 { return r.cpu })),
		Allocated: runs[len(runs)-1].allocated,
		Foreign:   slices.Max(pick(func(r copyRun) float64 { return r.foreign })),
	}
	row.MBPerS = float64(b.bytes) / 1e6 / row.Seconds
	if tool.name != ours {
		return row
	}
	if fastest := fastestPeer(tools, all); fastest != nil {
		r := copyRatio("", fastest, runs, place.bar)
		row.Ratio, row.RatioMin, row.RatioMax, row.Bar, row.Verdict = r.Median, r.Min, r.Max, r.Bar, r.Verdict
	}
	return row
}

// fastestPeer has the fastest copy of each round by another program than cowherd; nil if none is there.
func fastestPeer(tools []copyTool, all map[string][]copyRun) (fastest []copyRun) {
	for _, tool := range tools {
		switch {
		case tool.name == ours || tool.other:
		case fastest == nil:
			fastest = slices.Clone(all[tool.name])
		default:
			for n, run := range all[tool.name] {
				if run.seconds < fastest[n].seconds {
					fastest[n] = run
				}
			}
		}
	}
	return fastest
}

// copyRatio is how much longer others took than cowherd, round by round.
func copyRatio(against string, theirs, mine []copyRun, bar float64) *ratio {
	values := make([]float64, len(mine))
	for n := range mine {
		values[n] = theirs[n].seconds / mine[n].seconds
	}
	r := newRatio(against, values)
	r.judge(bar)
	return r
}

// compare adds the lines of a cell to the table of all parts: one for each other program, and one for the fastest of
// them, to which the bar belongs, if there are several.
func (b *copyBench) compare(cell string, place copyPlace, tools []copyTool, all map[string][]copyRun) {
	mine, ok := all[ours]
	if !ok {
		return
	}
	seconds := func(runs []copyRun) float64 {
		return median(each(runs, func(r copyRun) float64 { return r.seconds }))
	}
	line := func(peer string, runs []copyRun, bar float64) {
		b.ratios = append(b.ratios, comparison{
			Part: copyPart, Shape: "copy, " + cell, Unit: unitSeconds, Ours: seconds(mine), Peer: peer, Theirs: seconds(runs),
			Ratio: copyRatio(peer, runs, mine, bar),
		})
	}
	count := len(slices.DeleteFunc(slices.Clone(tools), func(t copyTool) bool { return t.name == ours || t.other }))
	for _, tool := range tools {
		switch {
		case tool.name == ours:
		case count == 1 && !tool.other:
			line(tool.name, all[tool.name], place.bar)
		default:
			line(tool.name, all[tool.name], 0)
		}
	}
	if count > 1 {
		line("the fastest of them", fastestPeer(tools, all), place.bar)
	}
}

// copyReport is what is printed as JSON.
type copyReport struct {
	Machine   string    `json:"machine"`
	DataBytes int64     `json:"data_bytes"`
	Rounds    int       `json:"rounds"`
	Rows      []copyRow `json:"rows"`
	Notes     []string  `json:"notes"`
}

func (b *copyBench) report() *copyReport {
	return &copyReport{machine(), b.bytes, b.repetitions, b.rows, b.notes}
}

// write prints the table, or JSON.
func (b *copyBench) write(w io.Writer) error {
	if b.json {
		return writeJSON(w, b.report())
	}
	fmt.Fprintf(w, "%s; %s of data; medians, rounds: %d\n\n", machine(), size.Human(b.bytes), b.repetitions)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "cell\tprogram\tseconds\tmin-max\tMB/s\tCPU s\tallocated\tratio\tmin-max\tbar\t\tforeign")
	for _, r := range b.rows {
		ratio := "\t\t\t"
		if r.Bar > 0 {
			ratio = fmt.Sprintf("%.2f\t%.2f-%.2f\t%g\t%s", r.Ratio, r.RatioMin, r.RatioMax, r.Bar, r.Verdict)
		}
		fmt.Fprintf(t, "%s\t%s\t%.3f\t%.3f-%.3f\t%.0f\t%.2f\t%s\t%s\t%.0f%%\n", r.Cell, r.Tool, r.Seconds, r.Least, r.Most, r.MBPerS,
			r.CPU, size.Human(r.Allocated), ratio, 100*r.Foreign)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := io.WriteString(w, strings.Join(append(b.notes, ""), "\n"))
	return err
}
