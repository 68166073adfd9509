package bench

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"cowherd/backend/file"
	"cowherd/block"
	"cowherd/kcopyd"
)

const (
	// overwriteBlock is the size of the writes after the copies: the block of the file systems.
	overwriteBlock = 4 << 10
	// readPiece is the size of the reads.
	readPiece = 1 << 20
	// aftermathTime is how long a file is overwritten where a plan says nothing.
	aftermathTime = 500 * time.Millisecond
)

// aftermath is what a file system has to do after a file was copied to another one piece by piece. Clones share blocks,
// which the copy is not charged for: extents are many, flushes long, and the first write to each block makes a copy of its
// own. Cells that read and write are what it is compared with.
type aftermath struct {
	cell   *Cell
	rand   *rand.Rand
	to     *file.Device
	source *os.File // by names of their own, to write past the page cache
	copied *os.File
	page   []byte   // of readPiece bytes, aligned as O_DIRECT wants it
	packed *packing // nil: each piece has been copied to where it was
	found  map[string]float64
}

// runAftermath copies a whole file in pieces, each of Block bytes, which is what the cell's latencies and rates are of, and
// then looks at what that has led to. The steps are those of docs/cowherd-bench.md.
func runAftermath(ctx context.Context, c *Cell, k *kit, r *rand.Rand) (_ *sampled, err error) {
	from, err := k.device(roleDevice, 0, c.Size)
	if err != nil {
		return nil, err
	}
	to, err := k.device(roleOther, 0, c.Size)
	if err != nil {
		return nil, err
	}
	x := &aftermath{cell: c, rand: r, to: to.(*file.Device), found: map[string]float64{}}
	if c.Offload == offloadOnly && len(x.to.CopyOffers(from)) == 0 {
		return nil, fmt.Errorf("the file system of %s does not share blocks between files: take one of XFS (reflink=1) or btrfs", c.Dir)
	}
	defer func() { err = errors.Join(err, x.close()) }()
	if err := x.open(from.(*file.Device)); err != nil {
		return nil, err
	}
	space, err := x.settled(ctx)
	if err != nil {
		return nil, err
	}
	s, err := x.copy(ctx, from)
	if err != nil {
		return nil, err
	}
	if err := x.after(ctx, space); err != nil {
		return nil, err
	}
	s.further = x.found
	return s, nil
}

// open opens both files once more.
func (x *aftermath) open(from *file.Device) (err error) {
	if x.page, err = unix.Mmap(-1, 0, readPiece, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON); err != nil {
		return fmt.Errorf("memory: %w", err)
	}
	if x.source, err = os.OpenFile(from.Path(), os.O_RDWR|unix.O_DIRECT, 0); err != nil {
		return err
	}
	x.copied, err = os.OpenFile(x.to.Path(), os.O_RDWR|unix.O_DIRECT, 0)
	return err
}

func (x *aftermath) close() error {
	var errs []error
	for _, f := range []*os.File{x.source, x.copied} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	if x.page != nil {
		errs = append(errs, unix.Munmap(x.page))
	}
	return errors.Join(errs...)
}

// copy makes all copies.
func (x *aftermath) copy(ctx context.Context, from block.Device) (_ *sampled, err error) {
	c := *x.cell
	c.Time, c.Range = 0, c.Size
	s := &stack{}
	defer func() { err = errors.Join(err, s.close()) }()
	copies := &copies{engine: s.newEngine(&c), from: from, to: x.to, offload: offloadOf(&c), class: kcopyd.Hydration}
	if c.Packed {
		x.packed = &packing{from: make([]int64, c.Size/c.Block)}
		copies.packed = x.packed
	}
	jobs := (&load{cell: &c, rand: x.rand}).jobs(nil, copies, false)
	stop := context.AfterFunc(ctx, func() {
		for _, j := range jobs {
			j.until.Store(0)
		}
	})
	defer stop()
	m, err := runJobs(jobs)
	if err := cmp.Or(ctx.Err(), err); err != nil {
		return nil, err
	}
	sample := &sampled{
		elapsed: m.elapsed, count: int64(m.count), bytes: int64(m.count) * c.Block, latency: m.latency, cpu: m.cpu, sent: int64(m.sent),
	}
	sample.stats, sample.queues = statsOf(s.engines)
	return sample, nil
}

// after goes through the steps that follow the copies, space bytes having been in use before.
func (x *aftermath) after(ctx context.Context, space float64) error {
	ofCopy, ofSource := x.blocks()
	steps := []func() error{
		func() error { return x.timed("copied_flush_ms", x.copied.Sync) },
		func() error { return x.timed("source_flush_ms", x.source.Sync) },
		func() error { return x.count("source_extents", x.source) },
		func() error { return x.count("copied_extents", x.copied) },
		func() error { return x.grown("copies_space_bytes", space) },
		func() error { return x.read(ctx, "copied_read_bytes_per_second", x.to.Path()) },
		func() error { return x.overwrite(ctx, "copied", x.copied, ofCopy) },
		func() error { return x.overwrite(ctx, "source", x.source, ofSource) },
		func() error { return x.count("copied_extents_after", x.copied) },
		func() error { return x.count("source_extents_after", x.source) },
		func() error { return x.grown("space_after_bytes", space) },
		func() error { return x.read(ctx, "copied_read_after_bytes_per_second", x.to.Path()) },
	}
	for _, step := range steps {
		if err := cmp.Or(ctx.Err(), step()); err != nil {
			return err
		}
	}
	return nil
}

// timed notes how long f takes, in ms.
func (x *aftermath) timed(name string, f func() error) error {
	began := time.Now()
	err := f()
	x.found[name] = float64(time.Since(began)) / float64(time.Millisecond)
	return err
}

// count notes how many extents a file has.
func (x *aftermath) count(name string, f *os.File) error {
	m := &fiemap{length: 1<<64 - 1, flags: fiemapSync}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fiemapIoctl, uintptr(unsafe.Pointer(m))); errno != 0 {
		return fmt.Errorf("extents of %s: %w", f.Name(), errno)
	}
	x.found[name] = float64(m.mapped)
	return nil
}

// used is how many bytes of the file system are in use, all of it having been written.
func (x *aftermath) used() (float64, error) {
	if err := unix.Syncfs(int(x.copied.Fd())); err != nil {
		return 0, fmt.Errorf("syncfs: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(x.copied.Fd()), &st); err != nil {
		return 0, fmt.Errorf("statfs: %w", err)
	}
	return float64(st.Blocks-st.Bfree) * float64(st.Bsize), nil
}

// settled is used when that does not change any more: file systems free the blocks of files that were removed later.
func (x *aftermath) settled(ctx context.Context) (float64, error) {
	const pause, pauses = 20 * time.Millisecond, 100
	last := -1.0
	for range pauses {
		now, err := x.used()
		if err := cmp.Or(ctx.Err(), err); err != nil || now == last {
			return now, err
		}
		last = now
		time.Sleep(pause)
	}
	return last, nil
}

// grown notes how much more is in use than before.
func (x *aftermath) grown(name string, before float64) error {
	now, err := x.used()
	x.found[name] = now - before
	return err
}

// read notes at what rate a file is read from its start to its end, by the page cache, in which there is none of it.
func (x *aftermath) read(ctx context.Context, name, path string) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return fmt.Errorf("fadvise: %w", err)
	}
	began, sum := time.Now(), 0
	for ctx.Err() == nil {
		n, err := f.Read(x.page)
		sum += n
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
	}
	x.found[name] = float64(sum) / time.Since(began).Seconds()
	return nil
}

// blocks are the offsets of blocks to overwrite: half of those of the copy, at random, and of the source those that the other
// half was copied from. So each is shared when it is written, if it was cloned.
func (x *aftermath) blocks() (ofCopy, ofSource []int64) {
	all := make([]int64, x.cell.Size/overwriteBlock)
	for i := range all {
		all[i] = int64(i) * overwriteBlock
	}
	x.rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	ofCopy, ofSource = all[:len(all)/2], all[len(all)/2:]
	if x.packed != nil {
		for i, at := range ofSource {
			ofSource[i] = x.packed.from[at/x.cell.Block] + at%x.cell.Block
		}
	}
	return ofCopy, ofSource
}

// overwrite writes blocks of a file past the page cache, one after the other, until the time is over, and flushes.
func (x *aftermath) overwrite(ctx context.Context, name string, f *os.File, list []int64) error {
	for i := range overwriteBlock {
		x.page[i] = byte(i>>9) | 2
	}
	limit := cmp.Or(x.cell.Time, aftermathTime)
	var took []float64 // us
	began := time.Now()
	for now := began; len(list) > 0 && now.Sub(began) < limit && ctx.Err() == nil; list = list[1:] {
		if _, err := f.WriteAt(x.page[:overwriteBlock], list[0]); err != nil {
			return err
		}
		then := now
		now = time.Now()
		took = append(took, float64(now.Sub(then))/us)
	}
	elapsed := time.Since(began)
	if len(took) > 0 {
		slices.Sort(took)
		x.found[name+"_overwrites_per_second"] = float64(len(took)) / elapsed.Seconds()
		x.found[name+"_overwrite_p50_us"] = took[len(took)/2]
		x.found[name+"_overwrite_p99_us"] = took[len(took)*99/100]
	}
	x.found[name+"_overwrites"] = float64(len(took))
	return x.timed(name+"_overwrite_flush_ms", f.Sync)
}
