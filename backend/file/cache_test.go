package file

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"cowherd/block"
)

// TestSettle: what is dirty is written out; there is nothing to do for a device that has no page cache of its own, or
// where the kernel lacks the call; an error ends the device.
func TestSettle(t *testing.T) {
	leaks(t)
	const size = 1 << 20
	calls := 0
	var answer error
	write := func(int, int64, int64) error { calls++; return answer }
	direct := created(t, diskDir(t), size, Options{Direct: true})
	memory := created(t, memoryDir(t), size, Options{})
	cached := created(t, diskDir(t), size, Options{})
	if err := block.Write(cached, make([]byte, 8192), 4096); err != nil {
		t.Fatal(err)
	}
	if err := cached.Settle(4096, 8192); err != nil {
		t.Errorf("for real: %v", err)
	}
	for _, c := range []struct {
		device *Device
		length int64
		answer error
		calls  int
		failed bool
	}{
		{direct, 4096, unix.EIO, 0, false},
		{memory, 4096, unix.EIO, 0, false},
		{cached, 0, unix.EIO, 0, false},
		{cached, 4096, unix.ENOSYS, 1, false},
		{cached, 4096, nil, 1, false},
		{cached, 4096, unix.EIO, 1, true},
	} {
		c.device.sys.writeBack = write
		calls, answer = 0, c.answer
		err := c.device.Settle(0, c.length)
		if calls != c.calls || (err != nil) != c.failed || (c.device.failure.Load() != nil) != c.failed {
			t.Errorf("%s, %d bytes, %v: %d calls, error %v, failure %v", c.device, c.length, c.answer, calls, err,
				c.device.failure.Load())
		}
	}
	if err := block.Flush(cached); block.Errno(err) != unix.EIO || !strings.Contains(err.Error(), "sync_file_range") {
		t.Errorf("flush after it: %v", err)
	}
}

// TestSettleClosed: a closed device has no descriptor to call with.
func TestSettleClosed(t *testing.T) {
	leaks(t)
	d, err := Create(diskDir(t)+"/closed", 4096, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := d.Settle(0, 4096); err == nil {
		t.Error("no error")
	}
}
