package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cowherd/backend/file"
	"cowherd/block"
	"cowherd/dm"
	"cowherd/internal/size"
)

type cowExportCmd struct {
	outputFlags
	progressFlag
	viewArguments
	Out   string `arg:"" complete:"file" help:"The image to be made, or with --force a block device."`
	Force bool   `help:"Replace an image that is there, or write to a block device."`
}

func (cowExportCmd) Help() string {
	return `The image is sparse, and gets its name when it is complete. An invalid snapshot is refused.

Examples:

    cowherd cow export --origin vm.img vm-nightly.cow nightly.img
    cowherd cow export --origin /dev/vg0/vm /dev/vg0/cow /dev/vg0/restored --force
`
}

// exportReport is what was done, as JSON.
type exportReport struct {
	File         string  `json:"file"`
	Out          string  `json:"out"`
	SizeBytes    int64   `json:"size_bytes"`
	WrittenBytes int64   `json:"written_bytes"`
	Seconds      float64 `json:"seconds"`
}

func (c *cowExportCmd) Run(s *session) error {
	ctx, stop := signal.NotifyContext(s, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	start := time.Now()
	v, err := c.openView()
	if err != nil {
		return err
	}
	written, err := c.export(ctx, s, v)
	if err = errors.Join(err, v.close()); err != nil {
		return err
	}
	report := exportReport{c.File, c.Out, v.snapshot.Size(), written, time.Since(start).Seconds()}
	if c.JSON {
		return printJSON(s.stdout, report)
	}
	_, err = fmt.Fprintf(s.stdout, "%s: %s, %s of it written\n", c.Out, size.Human(report.SizeBytes), size.Human(written))
	return err
}

// export writes the view to where it is wanted.
func (c *cowExportCmd) export(ctx context.Context, s *session, v *view) (written int64, err error) {
	out, err := openOutput(c.Out, v.device.Size(), c.Force, c.Origin, c.File)
	if err != nil {
		return 0, err
	}
	p := c.newProgress(s, c.Out, v.device.Size())
	e := exporter{from: v.device, to: out.device, zeroed: out.temporary != "", progress: p}
	err = e.run(ctx)
	p.end()
	if errors.Is(err, context.Canceled) {
		err = errors.New("interrupted")
	}
	if err != nil {
		return 0, errors.Join(fmt.Errorf("export %s: %w", c.File, err), out.discard())
	}
	return e.written.Load(), out.keep(c.Force)
}

// output is the image that is being made.
type output struct {
	path      string
	temporary string // its name until it is complete; "": a block device
	device    *file.Device
}

// openOutput makes a new image of size bytes beside path, or opens the block device there. It must be none of the
// sources. force: there may be an image already, or it may be a block device.
func openOutput(path string, size int64, force bool, sources ...string) (*output, error) {
	stat, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, err
	case !force:
		return nil, fmt.Errorf("%s is there already: --force replaces it: %w", path, syscall.EEXIST)
	default:
		if path, err = replaceable(path, sources); err != nil {
			return nil, err
		}
		if stat.Mode()&os.ModeDevice != 0 {
			return openOutputDevice(path, size)
		}
	}
	temporary := filepath.Join(filepath.Dir(path), fmt.Sprintf(".%s.%d.part", filepath.Base(path), os.Getpid()))
	d, err := file.Create(temporary, size, file.Options{})
	if err != nil {
		return nil, err
	}
	return &output{path: path, temporary: temporary, device: d}, nil
}

// replaceable is the file that path leads to, unless it must not be replaced.
func replaceable(path string, sources []string) (string, error) {
	for _, source := range sources {
		same, err := sameFile(path, source)
		if err != nil {
			return "", err
		}
		if same {
			return "", fmt.Errorf("%s is what is to be read: %w", path, syscall.EINVAL)
		}
	}
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	stat, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	block := stat.Mode()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice
	if !block && !stat.Mode().IsRegular() {
		return "", fmt.Errorf("%s is neither a regular file nor a block device: %w", path, syscall.EINVAL)
	}
	return path, nil
}

// openOutputDevice opens a block device that has room for size bytes.
func openOutputDevice(path string, size int64) (*output, error) {
	d, err := file.Open(path, file.Options{})
	if err != nil {
		return nil, err
	}
	if d.Size() < size {
		return nil, errors.Join(fmt.Errorf("%s has %d bytes, %d are needed: %w", path, d.Size(), size, syscall.ENOSPC), d.Close())
	}
	return &output{path: path, device: d}, nil
}

// keep makes the image durable and gives it its name.
func (o *output) keep(force bool) error {
	if err := block.Flush(o.device); err != nil {
		return errors.Join(err, o.discard())
	}
	if err := o.device.Close(); err != nil || o.temporary == "" {
		return err
	}
	flags := uint(unix.RENAME_NOREPLACE)
	if force {
		flags = 0
	}
	err := unix.Renameat2(unix.AT_FDCWD, o.temporary, unix.AT_FDCWD, o.path, flags)
	if errors.Is(err, unix.EINVAL) { // a file system that cannot promise not to replace
		err = os.Rename(o.temporary, o.path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("give %s its name: %w", o.path, err), os.Remove(o.temporary))
	}
	return syncDir(filepath.Dir(o.path))
}

// discard takes the incomplete image away.
func (o *output) discard() error {
	err := o.device.Close()
	if o.temporary != "" {
		err = errors.Join(err, os.Remove(o.temporary))
	}
	return err
}

// syncDir makes the names in a directory durable.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

const (
	// exportWindow is what a worker takes at a time, in bytes; exportPiece is what it reads at once; exportBlock is the
	// unit in which zeroes are looked for.
	exportWindow = 16 << 20
	exportPiece  = 1 << 20
	exportBlock  = 4 << 10
)

// exporter copies what is not zero from one device to another, with a worker for each CPU. It does so itself because
// kcopyd, which copies what it is told to, does not look at the bytes.
type exporter struct {
	from     *dm.Device
	to       block.Device
	zeroed   bool // to holds zeroes everywhere
	progress *progress

	next    atomic.Int64 // where the next window begins
	written atomic.Int64 // bytes
}

// run copies everything. The first error ends it.
func (e *exporter) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			if err := e.work(ctx); err != nil {
				cancel(err)
			}
		})
	}
	workers.Wait()
	return context.Cause(ctx)
}

// work copies windows until there are no more.
func (e *exporter) work(ctx context.Context) error {
	w := exportWorker{exporter: e, buffer: make([]byte, exportPiece)}
	for {
		start := e.next.Add(exportWindow) - exportWindow
		if start >= e.from.Size() {
			return nil
		}
		if err := w.window(ctx, start, min(start+exportWindow, e.from.Size())); err != nil {
			return err
		}
	}
}

// exportWorker is one goroutine of an exporter.
type exportWorker struct {
	*exporter
	buffer []byte
}

// window copies the bytes [start, end).
func (w *exportWorker) window(ctx context.Context, start, end int64) error {
	var data []block.Extent
	err := w.from.Extents(start, end-start, func(x block.Extent) bool {
		data = append(data, x)
		return true
	})
	if err != nil {
		return err
	}
	for _, x := range data {
		if x.Zero {
			if err := w.zero(x.Offset, x.Length); err != nil {
				return err
			}
			w.progress.add(x.Length)
			continue
		}
		for offset := x.Offset; offset < x.Offset+x.Length; offset += exportPiece {
			if err := ctx.Err(); err != nil {
				return err
			}
			p := w.buffer[:min(exportPiece, x.Offset+x.Length-offset)]
			if err := w.piece(p, offset); err != nil {
				return err
			}
			w.progress.add(int64(len(p)))
		}
	}
	return nil
}

// piece copies as many bytes from offset on as p has, but for blocks that are zero.
func (w *exportWorker) piece(p []byte, offset int64) error {
	if err := block.Read(w.from, p, offset); err != nil {
		return err
	}
	for at := 0; at < len(p); {
		zero, end := isZero(p[at:min(at+exportBlock, len(p))]), at
		for end < len(p) && isZero(p[end:min(end+exportBlock, len(p))]) == zero {
			end = min(end+exportBlock, len(p))
		}
		var err error
		if zero {
			err = w.zero(offset+int64(at), int64(end-at))
		} else {
			err = block.Write(w.to, p[at:end], offset+int64(at))
			w.written.Add(int64(end - at))
		}
		if err != nil {
			return err
		}
		at = end
	}
	return nil
}

// zero makes a range zero, if it is not.
func (w *exportWorker) zero(offset, length int64) error {
	if w.zeroed {
		return nil
	}
	return block.Do(w.to, block.OpWriteZeroes, 0, offset, length, nil)
}

var zeroBlock [exportBlock]byte

// isZero tells whether p, at most a block, is all zero.
func isZero(p []byte) bool { return bytes.Equal(p, zeroBlock[:len(p)]) }
