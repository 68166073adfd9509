package file

import (
	"errors"
	"fmt"
	"math/bits"
	"sync/atomic"

	"cowherd/block"
)

// Striped is a device over several temporary files, which take turns in stripes: byte b lies in file
// b/stripe modulo the number of files. Writers of one file wait for each other in the kernel, on the lock of its inode;
// writers of different stripes need not.
type Striped struct {
	files  []*Device
	shift  uint         // log2 of the stripe in bytes
	size   atomic.Int64 // only Grow changes it
	limits block.Limits
}

var (
	_ block.Device = (*Striped)(nil)
	_ block.Grower = (*Striped)(nil)

	_ block.Remapper = (*Striped)(nil)
)

// TempStriped makes a device of size bytes over count unlinked sparse files in dir. stripe is a power of two, in
// bytes, a multiple of the files' logical block; count is a power of two.
func TempStriped(dir string, size, stripe int64, count int) (*Striped, error) {
	if bits.OnesCount64(uint64(stripe)) != 1 || bits.OnesCount(uint(count)) != 1 {
		return nil, fmt.Errorf("striped file: a stripe of %d bytes or %d files is not a power of two", stripe, count)
	}
	s := &Striped{shift: uint(bits.TrailingZeros64(uint64(stripe)))}
	s.size.Store(size)
	for range count {
		f, err := Temp(dir, s.share(size, count))
		if err != nil {
			return nil, errors.Join(err, s.Close())
		}
		s.files = append(s.files, f)
	}
	s.limits = s.files[0].Limits()
	return s, nil
}

// share is the length in bytes of each of count files when the device has size bytes.
func (s *Striped) share(size int64, count int) int64 {
	round := int64(count) << s.shift
	rounds := size / round
	if size%round != 0 {
		rounds++
	}
	return rounds << s.shift
}

// Size is the device's length in bytes.
func (s *Striped) Size() int64 { return s.size.Load() }

// Grow makes the device size bytes long, by holes at the ends of its files. When one of them cannot be that long the
// device is as it was; that others are longer than they need be does no harm.
func (s *Striped) Grow(size int64) error {
	for _, f := range s.files {
		if err := f.Grow(s.share(size, len(s.files))); err != nil {
			return err
		}
	}
	for {
		known := s.size.Load()
		if size <= known || s.size.CompareAndSwap(known, size) {
			return nil
		}
	}
}

// Limits are the files'.
func (s *Striped) Limits() block.Limits { return s.limits }

// place is the file that the byte at offset lies in, and where.
func (s *Striped) place(offset int64) (*Device, int64) {
	stripe, within := offset>>s.shift, offset&(1<<s.shift-1)
	count := int64(len(s.files))
	return s.files[stripe&(count-1)], stripe/count<<s.shift | within
}

// Remap implements block.Remapper: a range lies in one file up to the end of a stripe, or of all where there is but one
// file. Who holds an answer is counted in the first file, which Close waits for before it closes the others.
func (s *Striped) Remap(q block.Queue, offset, length int64) (to block.Device, at, n int64, ok bool) {
	if !s.files[0].enter(s.files[0].queues.At(uint(q))) {
		return nil, 0, 0, false
	}
	if len(s.files) == 1 {
		return s.files[0], offset, length, true
	}
	file, at := s.place(offset)
	return file, at, min(length, 1<<s.shift-offset&(1<<s.shift-1)), true
}

// Release implements block.Remapper.
func (s *Striped) Release(q block.Queue) { s.files[0].leave(s.files[0].queues.At(uint(q))) }

// Submit passes r to the file it lies in, or the parts of it to several.
func (s *Striped) Submit(r *block.Request) {
	if r.Op == block.OpFlush {
		s.flush(r)
		return
	}
	if r.Length > 0 && r.Offset>>s.shift != (r.End()-1)>>s.shift {
		s.split(r)
		return
	}
	to, offset := s.place(r.Offset)
	r.Offset = offset
	to.Submit(r)
}

func (s *Striped) flush(r *block.Request) {
	f := block.NewFan(r)
	for _, to := range s.files {
		to.Submit(f.Part(0, 0))
	}
	f.Done(nil)
}

func (s *Striped) split(r *block.Request) {
	f := block.NewFan(r)
	for offset, last := r.Offset, r.End(); offset < last; {
		end := min((offset>>s.shift+1)<<s.shift, last)
		p := f.Part(offset, end-offset)
		var to *Device
		to, p.Offset = s.place(offset)
		to.Submit(p)
		offset = end
	}
	f.Done(nil)
}

// Close closes the files, which ends them.
func (s *Striped) Close() error {
	var err error
	for _, f := range s.files {
		err = errors.Join(err, f.Close())
	}
	return err
}
