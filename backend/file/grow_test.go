package file

import (
	"bytes"
	"errors"
	"math"
	"os"
	"os/exec"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"cowherd/backend/devicetest"
	"cowherd/block"
)

func TestGrow(t *testing.T) {
	for _, c := range []struct {
		name string
		make func(t *testing.T) *Device
	}{
		{"memory", func(t *testing.T) *Device { return created(t, memoryDir(t), 8192, Options{}) }},
		{"disk", func(t *testing.T) *Device { return onDisk(t, 8192) }},
		{"signals", func(t *testing.T) *Device {
			d := onDisk(t, 8192)
			d.interrupt()
			return d
		}},
		{"direct", func(t *testing.T) *Device { return direct(t) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			leaks(t)
			d := c.make(t)
			before := d.Size()
			p := bytes.Repeat([]byte{7}, 4096)
			if err := block.Write(d, p, before-4096); err != nil {
				t.Fatal(err)
			}
			for _, size := range []int64{-1, 0, before, before + 1<<20, before + 4096} {
				want := max(d.Size(), size)
				if err := d.Grow(size); err != nil || d.Size() != want {
					t.Fatalf("grow to %d: %v, %d bytes", size, err, d.Size())
				}
			}
			if info, err := os.Stat(d.Path()); err != nil || info.Size() != d.Size() {
				t.Errorf("the file: %v, %v", info, err)
			}
			got := make([]byte, 8192)
			if err := block.Read(d, got, before-4096); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, append(p, make([]byte, 4096)...)) {
				t.Error("the old end is not what was written, or what follows is not zeroes")
			}
			devicetest.Model(t, d, 50)
			devicetest.Extents(t, d, 0, d.Size())
		})
	}
}

// TestGrowRefuses: what cannot be leaves the device as it was.
func TestGrowRefuses(t *testing.T) {
	leaks(t)
	d := onDisk(t, 8192)
	if err := d.Grow(math.MaxInt64); !errors.Is(err, unix.EFBIG) || d.Size() != 8192 {
		t.Errorf("grow to everything: %v, %d bytes", err, d.Size())
	}
	d.sys.truncate = func(int, int64) error { return unix.ENOSPC }
	if err := d.Grow(16384); !errors.Is(err, unix.ENOSPC) || d.Size() != 8192 {
		t.Errorf("grow on a full disk: %v, %d bytes", err, d.Size())
	}
	devicetest.Model(t, d, 10)

	again, err := Open(d.Path(), Options{ReadOnly: true, Shared: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Grow(16384); !errors.Is(err, unix.EROFS) {
		t.Errorf("grow of what is read-only: %v", err)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	if err := again.Grow(16384); !errors.Is(err, errClosed) {
		t.Errorf("grow of what is closed: %v", err)
	}
}

// TestGrowLonger: what somebody else has made of the file is neither cut nor taken.
func TestGrowLonger(t *testing.T) {
	leaks(t)
	d := onDisk(t, 8192)
	if err := os.Truncate(d.Path(), 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := d.Grow(16384); err != nil || d.Size() != 16384 {
		t.Errorf("%v, %d bytes", err, d.Size())
	}
	if info, err := os.Stat(d.Path()); err != nil || info.Size() != 1<<20 {
		t.Errorf("the file: %v, %v", info, err)
	}
}

// TestGrowTruncated: a file that has lost its end is not made whole by growing.
func TestGrowTruncated(t *testing.T) {
	leaks(t)
	d := onDisk(t, 8192)
	if err := os.Truncate(d.Path(), 4096); err != nil {
		t.Fatal(err)
	}
	if err := d.Grow(16384); !errors.Is(err, unix.EIO) {
		t.Errorf("grow: %v", err)
	}
	if err := block.Write(d, make([]byte, 512), 0); block.Errno(err) != unix.EIO {
		t.Errorf("write: %v", err)
	}
	if err := d.Grow(16384); !errors.As(err, new(*failure)) {
		t.Errorf("grow once it has failed: %v", err)
	}
}

// TestGrowDirect: the end of a file must be within the reach of direct I/O.
func TestGrowDirect(t *testing.T) {
	leaks(t)
	d := direct(t)
	before := d.Size()
	if err := d.Grow(before + 1); !errors.Is(err, unix.EINVAL) || d.Size() != before {
		t.Errorf("%v, %d bytes", err, d.Size())
	}
}

// TestGrowUnderLoad: flushes and look-ups that run meanwhile never take a file that grows for one that was truncated.
func TestGrowUnderLoad(t *testing.T) {
	leaks(t)
	d := onDisk(t, 4096)
	var done sync.WaitGroup
	for grower := range int64(2) {
		done.Go(func() {
			for i := range int64(200) {
				if err := d.Grow(4096 * (2*i + grower)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	done.Go(func() {
		for range 200 {
			size := d.Size()
			if err := errors.Join(block.Write(d, make([]byte, 512), size-512), block.Flush(d)); err != nil {
				t.Error(err)
			}
			devicetest.Extents(t, d, 0, size)
		}
	})
	done.Wait()
	if d.Size() != 4096*399 {
		t.Errorf("%d bytes", d.Size())
	}
}

func TestGrowBlockDevice(t *testing.T) {
	leaks(t)
	path := loopDevice(t, 512)
	d, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	closing(t, d)
	if err := d.Grow(2 * modelSize); !errors.Is(err, unix.ENOSPC) || d.Size() != modelSize {
		t.Errorf("grow to what is not there: %v, %d bytes", err, d.Size())
	}
	image, err := os.ReadFile("/sys/block/" + path[len("/dev/"):] + "/loop/backing_file")
	if err != nil {
		t.Skipf("the file of the loop device is not known: %v", err)
	}
	if err := os.Truncate(string(bytes.TrimSpace(image)), 2*modelSize); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("losetup", "--set-capacity", path).CombinedOutput(); err != nil {
		t.Fatalf("losetup --set-capacity: %v: %s", err, out)
	}
	if err := d.Grow(modelSize + 512); err != nil || d.Size() != 2*modelSize {
		t.Errorf("%v, %d bytes", err, d.Size())
	}
	devicetest.Model(t, d, 20)
}

func TestStripedGrow(t *testing.T) {
	s := openStriped(t, 4096+512, 4096, 4)
	if err := block.Write(s, bytes.Repeat([]byte{7}, 4608), 0); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{512, 1<<20 + 512, 1 << 20} {
		want := max(s.Size(), size)
		if err := s.Grow(size); err != nil || s.Size() != want {
			t.Fatalf("grow to %d: %v, %d bytes", size, err, s.Size())
		}
	}
	got := make([]byte, 8192)
	if err := block.Read(s, got, 0); err != nil {
		t.Fatal(err)
	}
	if want := append(bytes.Repeat([]byte{7}, 4608), make([]byte, 3584)...); !bytes.Equal(got, want) {
		t.Error("what was written is not there, or what follows is not zeroes")
	}
	devicetest.Model(t, s, 100)
	s.files[1].sys.truncate = func(int, int64) error { return unix.EFBIG }
	if err := s.Grow(1 << 30); !errors.Is(err, unix.EFBIG) || s.Size() != 1<<20+512 {
		t.Errorf("grow that fails in the middle: %v, %d bytes", err, s.Size())
	}
}
