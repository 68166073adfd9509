//go:build interop

package interop

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"syscall"
	"unsafe"

	"cowherd/block"
)

// workload is random writes that anyone can repeat: on a device, in the guest, on a model.
type workload struct {
	Seed     uint64
	Count    int // of writes
	Min, Max int // sectors of a write
	Align    int // sectors of which the first one is a multiple; 0: any
}

// String is the workload as arguments of the guest's helper.
func (w workload) String() string {
	return fmt.Sprintf("%d %d %d %d %d", w.Seed, w.Count, w.Min, w.Max, w.Align)
}

// parseWorkload is the inverse of String.
func parseWorkload(args []string) (w workload, err error) {
	_, err = fmt.Sscan(strings.Join(args, " "), &w.Seed, &w.Count, &w.Min, &w.Max, &w.Align)
	return w, err
}

// each calls write for each write to a device of size bytes, until it fails. p is write's until it returns, and is
// aligned as direct I/O wants it.
func (w workload) each(size int64, write func(p []byte, offset int64) error) error {
	random := rand.New(rand.NewPCG(w.Seed, 0))
	buffer := alignedBuffer(w.Max * block.SectorSize)
	for i := range w.Count {
		sectors := min(w.Min+random.IntN(w.Max-w.Min+1), int(size/block.SectorSize))
		first := random.Int64N(size/block.SectorSize - int64(sectors) + 1)
		first -= first % int64(max(1, w.Align))
		p := buffer[:sectors*block.SectorSize]
		for at := 0; at < len(p); at += block.SectorSize {
			fillSector(p[at:at+block.SectorSize], random.Uint64())
		}
		if err := write(p, first*block.SectorSize); err != nil {
			return fmt.Errorf("write %d of %s, %d sectors from %d: %w", i, w, sectors, first, err)
		}
	}
	return nil
}

// fillSector fills a sector with one word: no two sectors are alike, and to make them takes little time.
func fillSector(p []byte, word uint64) {
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], word)
	}
}

// apply does the writes to a model of a device.
func (w workload) apply(model []byte) {
	_ = w.each(int64(len(model)), func(p []byte, offset int64) error {
		copy(model[offset:], p)
		return nil
	})
}

// sumBytes is the checksum of a model.
func sumBytes(model []byte) string {
	sum := sha256.Sum256(model)
	return hex.EncodeToString(sum[:])
}

// alignedBuffer is n bytes that begin on a page.
func alignedBuffer(n int) []byte {
	const page = 4096
	p := make([]byte, n+page)
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(p))) & (page - 1)
	return p[skip:][:n]
}

// guestProgram is the name by which this program is the guest's helper.
const guestProgram = "io"

// guestMain is the helper:
//
//	io write DEVICE SEED COUNT MIN MAX ALIGN    does a workload, past the page cache, and flushes
//	io fill DEVICE SEED COUNT MIN MAX ALIGN     the same up to the first write that fails, whose error it prints
//	io sum DEVICE                               prints the checksum, or why the device cannot be read
//	io offload NAME ...                         copies by offload and reports under a name: see guestOffload
func guestMain(args []string) (status int) {
	if len(args) < 2 {
		fmt.Fprintln(os.Stderr, "io: write|fill|sum DEVICE ..., or io: offload NAME ...")
		return 2
	}
	var err error
	switch args[0] {
	case "write", "fill":
		err = guestWrite(args[1], args[2:])
		if pathErr := (*os.PathError)(nil); args[0] == "fill" && errors.As(err, &pathErr) {
			fmt.Println(err)
			return 0
		}
	case "sum":
		err = guestSum(args[1])
	case "offload":
		err = guestOffload(args[1], args[2:])
	default:
		err = fmt.Errorf("unknown: %q", args)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "io:", err)
		return 1
	}
	return 0
}

func guestWrite(device string, args []string) error {
	w, err := parseWorkload(args)
	if err != nil {
		return fmt.Errorf("workload %q: %w", args, err)
	}
	f, err := os.OpenFile(device, os.O_RDWR|syscall.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	err = w.each(size, func(p []byte, offset int64) error {
		_, err := f.WriteAt(p, offset)
		return err
	})
	return errors.Join(err, f.Sync())
}

func guestSum(device string) error {
	f, err := os.OpenFile(device, os.O_RDONLY|syscall.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{f}, alignedBuffer(1<<20)); err != nil {
		fmt.Println("unreadable:", err)
		return nil
	}
	fmt.Println(hex.EncodeToString(h.Sum(nil)))
	return nil
}
