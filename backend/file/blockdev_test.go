package file

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cowherd/backend/devicetest"
	"cowherd/block"
)

// loopDevice is the path of a loop device with the given logical block, which is detached at the end of the test.
func loopDevice(t *testing.T, logicalBlock int) string {
	t.Helper()
	losetup, err := exec.LookPath("losetup")
	if err != nil {
		t.Skip("there is no losetup")
	}
	if os.Geteuid() != 0 {
		t.Skip("loop devices are for root")
	}
	image := filepath.Join(memoryDir(t), "loop.img")
	if err := os.WriteFile(image, make([]byte, modelSize), 0o600); err != nil {
		t.Fatal(err)
	}
	attach := exec.Command(losetup, "--find", "--show", "--sector-size", strconv.Itoa(logicalBlock), image)
	out, err := attach.CombinedOutput()
	if err != nil {
		t.Skipf("no loop device: %v: %s", err, out)
	}
	path := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command(losetup, "--detach", path).CombinedOutput(); err != nil {
			t.Errorf("losetup --detach %s: %v: %s", path, err, out)
		}
	})
	return path
}

func TestBlockDevice(t *testing.T) {
	for _, logicalBlock := range []int{512, 4096} {
		for _, o := range []Options{{}, {Direct: true}} {
			t.Run(strconv.Itoa(logicalBlock), func(t *testing.T) {
				leaks(t)
				path := loopDevice(t, logicalBlock)
				d, err := Open(path, o)
				if err != nil {
					t.Fatal(err)
				}
				closing(t, d)
				if l := d.Limits(); d.Size() != modelSize || l.LogicalBlock != logicalBlock || l.DiscardMax == 0 || !l.NeedsFlush {
					t.Errorf("size %d, limits %+v", d.Size(), l)
				}
				devicetest.Model(t, d, 30)
				devicetest.Disjoint(t, d, 4, 10)
				if list := devicetest.Extents(t, d, 0, modelSize); !slices.Equal(list, []block.Extent{{Length: modelSize}}) {
					t.Errorf("extents %v", list)
				}
				if _, err := Open(path, o); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), path) {
					t.Errorf("opened for writing twice: %v", err)
				}
				o.ReadOnly = true
				second, err := Open(path, o)
				if err != nil {
					t.Fatal(err)
				}
				closing(t, second)
				if err := block.Read(second, make([]byte, modelSize), 0); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestBlockDeviceReadOnly: a disk that is switched to read-only is a read-only device, however it was opened.
func TestBlockDeviceReadOnly(t *testing.T) {
	path := loopDevice(t, 512)
	if out, err := exec.Command("blockdev", "--setro", path).CombinedOutput(); err != nil {
		t.Skipf("blockdev --setro: %v: %s", err, out)
	}
	t.Cleanup(func() { // or whoever gets the loop device next would have it read-only
		if out, err := exec.Command("blockdev", "--setrw", path).CombinedOutput(); err != nil {
			t.Errorf("blockdev --setrw %s: %v: %s", path, err, out)
		}
	})
	d, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	closing(t, d)
	if !d.Limits().ReadOnly || d.Limits().NeedsFlush {
		t.Errorf("limits %+v", d.Limits())
	}
	if err := block.Read(d, make([]byte, 512), 0); err != nil {
		t.Error(err)
	}
}

// TestBlockDeviceLacks: what a block device cannot do is done another way, or refused.
func TestBlockDeviceLacks(t *testing.T) {
	leaks(t)
	d, err := Open(loopDevice(t, 512), Options{})
	if err != nil {
		t.Fatal(err)
	}
	closing(t, d)
	absent := func(int, int64, int64) error { return unix.ENOTSUP }
	d.sys.discard, d.sys.zeroout = absent, absent
	d.sys.fallocate = func(int, uint32, int64, int64) error { return unix.ENOTSUP }
	d.limits.DiscardMax = 0
	devicetest.Model(t, d, 30)
	for _, flags := range []block.Flags{0, block.NoUnmap} {
		if err := block.Do(d, block.OpWriteZeroes, flags|block.Fast, 0, 4096, nil); block.Errno(err) != unix.ENOTSUP {
			t.Errorf("fast write of zeroes, flags %d: %v", flags, err)
		}
	}
	if err := block.Do(d, block.OpDiscard, 0, 0, 4096, nil); block.Errno(err) != unix.ENOTSUP {
		t.Errorf("discard: %v", err)
	}
	d.sys.zeroout = func(int, int64, int64) error { return unix.EIO }
	d.noZeroout.Store(false)
	if err := block.Do(d, block.OpWriteZeroes, 0, 0, 4096, nil); block.Errno(err) != unix.EIO {
		t.Errorf("write of zeroes on a bad disk: %v", err)
	}
}

// TestSysfs: a device without the attributes has neither discard nor a fast way to zero.
func TestSysfs(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "good"), []byte("4096\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "bad"), []byte("many\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]int64{"good": 4096, "bad": 0, "missing": 0} {
		if n := number(dir, name); n != want {
			t.Errorf("%s: %d, want %d", name, n, want)
		}
	}
}
