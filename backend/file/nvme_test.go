package file

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"cowherd/block"
)

// controller plays an NVMe controller whose namespace is a loop device. It obeys its limits and remembers the ranges of
// the commands that it was sent.
type controller struct {
	t      *testing.T
	disk   *os.File // past the page cache
	limits copyLimits
	status int   // of every Copy command, if not 0
	errno  error // of every ioctl, if not nil

	mu     sync.Mutex
	copies [][]int64 // +checklocks:mu
	// first block, block count, block count ..., of the sources
}

func (c *controller) ioctl(fd int, request uint, command *nvmeCommand) (int, error) {
	if c.errno != nil {
		return 0, c.errno
	}
	if request == nvmeIoctlID {
		return 7, nil
	}
	data := *(*unsafe.Pointer)(unsafe.Pointer(&command.address))
	switch {
	case request == nvmeIoctlAdmin && command.opcode == nvmeIdentify && command.dataLength == identifySize:
		p := (*[identifySize]byte)(data)
		clear(p[:])
		if command.word10 == identifyController {
			describeController(p)
			return 0, nil
		}
		if command.nsid != 7 {
			return 0x00b, nil
		}
		describeNamespace(p, c.limits)
		return 0, nil
	case request == nvmeIoctlIO && command.opcode == nvmeCopy && command.nsid == 7:
		return c.copy(command, data)
	}
	return 0x001, nil
}

// describeController writes that there is a Copy command.
func describeController(p *[identifySize]byte) {
	binary.LittleEndian.PutUint16(p[520:], 1<<8)
	binary.LittleEndian.PutUint16(p[534:], 1)
}

// describeNamespace writes what a namespace says of itself, in its third format.
func describeNamespace(p *[identifySize]byte, l copyLimits) {
	p[26] = 2
	p[128+2*4+2] = byte(l.blockShift)
	binary.LittleEndian.PutUint16(p[74:], uint16(l.rangeBlocks))
	binary.LittleEndian.PutUint32(p[76:], uint32(l.commandBlocks))
	p[80] = byte(l.ranges - 1)
}

func (c *controller) copy(command *nvmeCommand, data unsafe.Pointer) (int, error) {
	count := int(command.word12&0xff) + 1
	if int64(count) > c.limits.ranges || command.word12>>8 != 0 || int(command.dataLength) != 32*count {
		return 0x183, nil
	}
	to, all, done := int64(command.word10)|int64(command.word11)<<32, int64(0), []int64{}
	for _, r := range unsafe.Slice((*nvmeRange)(data), count) {
		blocks := int64(r.blocksLess1) + 1
		if all += blocks; blocks > c.limits.rangeBlocks || all > c.limits.commandBlocks {
			return 0x183, nil
		}
		if len(done) == 0 {
			done = append(done, int64(r.firstBlock))
		}
		done = append(done, blocks)
		p := aligned(make([]byte, blocks<<c.limits.blockShift+memoryAlignMax), int(blocks<<c.limits.blockShift))
		if c.status != 0 {
			continue
		}
		if _, err := c.disk.ReadAt(p, int64(r.firstBlock)<<c.limits.blockShift); err != nil {
			return 0x281, nil
		}
		if _, err := c.disk.WriteAt(p, to<<c.limits.blockShift); err != nil {
			return 0x280, nil
		}
		to += blocks
	}
	c.mu.Lock()
	c.copies = append(c.copies, done)
	c.mu.Unlock()
	return c.status, nil
}

// take returns the sources of the commands since it was last called.
func (c *controller) take() [][]int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	copies := c.copies
	c.copies = nil
	return copies
}

// nvmePair is a controller and its disk, opened for writing and again for reading.
func nvmePair(t *testing.T, o Options) (c *controller, d, s *Device) {
	t.Helper()
	path := loopDevice(t, 512)
	disk, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = disk.Close() })
	c = &controller{t: t, disk: disk, limits: copyLimits{blockShift: 9, rangeBlocks: 12, commandBlocks: 100, ranges: 4}}
	for _, device := range []**Device{&d, &s} {
		if *device, err = Open(path, o); err != nil {
			t.Fatal(err)
		}
		closing(t, *device)
		o.ReadOnly = true
		device := *device
		device.sys.nvme = c.ioctl
		device.nvme = sync.OnceValues(func() (*namespace, error) {
			limits, err := device.askLimits(7)
			return &namespace{disk: "nvme0n1", id: 7, copyLimits: limits}, err
		})
	}
	return c, d, s
}

// TestCopyCommand: data that is dirty in the page cache is copied over data that is dirty there, and is seen there.
func TestCopyCommand(t *testing.T) {
	for _, o := range []Options{{}, {Direct: true}} {
		leaks(t)
		c, d, s := nvmePair(t, o)
		want := scribbled(t, d, 1)
		offers := d.CopyOffers(s)
		// 48 blocks in four ranges are 24 KiB.
		if len(offers) != 1 || offers[0] != (block.CopyOffer{
			Method: block.CopyDevice, Granularity: 4096, LengthMax: 24 << 10, Concurrency: nvmeAtOnce,
		}) {
			t.Fatalf("%+v", offers)
		}
		for _, r := range []struct {
			from, to, length, want int64
			blocks                 []int64
		}{
			{0, 64 << 10, 24 << 10, 24 << 10, []int64{0, 12, 12, 12, 12}},
			{64 << 10, 4096, 12 << 10, 12 << 10, []int64{128, 12, 12}},
			{64 << 10, 0, 4096, 4096, []int64{128, 8}},
			{8192, 0, 8192, 8192, []int64{16, 12, 4}},
			{0, 32 << 10, 28 << 10, 0, nil},
			{512, 8192, 4096, 0, nil},
			{0, 8704, 4096, 0, nil},
			{0, 8192, 512, 0, nil},
			{0, 4096, 8192, 0, nil}, // overlap
			{4096, 0, 8192, 0, nil},
			{4096, 4096, 4096, 0, nil},
		} {
			n, err := d.Copy(block.CopyDevice, s, r.from, r.to, r.length)
			if err != nil || n != r.want {
				t.Errorf("%+v: %d, %v", r, n, err)
			}
			copies := c.take()
			if r.blocks == nil && copies != nil || r.blocks != nil && (len(copies) != 1 || !slices.Equal(copies[0], r.blocks)) {
				t.Errorf("%+v: commands %v", r, copies)
			}
			copy(want[r.to:], append([]byte(nil), want[r.from:r.from+n]...))
			holds(t, d, want)
		}
	}
}

// TestCopyCommandFails: what the controller says, and what the page cache keeps.
func TestCopyCommandFails(t *testing.T) {
	leaks(t)
	c, d, s := nvmePair(t, Options{})
	try := func(want unix.Errno, text string) {
		t.Helper()
		n, err := d.Copy(block.CopyDevice, s, 0, 8192, 4096)
		if n != 0 || block.Errno(err) != want || want != 0 && !strings.Contains(err.Error(), text) {
			t.Errorf("%d, %v, want %v", n, err, want)
		}
	}
	if d.CopyOffers(s) == nil {
		t.Fatal("no offer")
	}
	for status, want := range map[int]unix.Errno{
		0x001: unix.ENOTSUP, 0x4002: unix.ENOTSUP, 0x00b: unix.ENOTSUP, 0x183: unix.ENOTSUP, 0x187: unix.ENOTSUP,
		0x080: unix.EIO, 0x081: unix.ENOSPC, 0x280: unix.EIO, 0x281: unix.EIO, 0x006: unix.EIO, 0x6286: unix.EIO,
	} {
		c.status = status
		try(want, "NVMe status 0x")
	}
	c.status = 0
	for errno, want := range map[unix.Errno]unix.Errno{
		unix.EPERM: unix.ENOTSUP, unix.EACCES: unix.ENOTSUP, unix.ENOTTY: unix.ENOTSUP, unix.EINTR: unix.EIO, unix.ENODEV: unix.ENODEV,
	} {
		c.errno = errno
		try(want, "NVMe Copy")
	}
	c.errno = nil
	c.take()

	real := d.sys.cached
	calls := 0
	d.sys.cached = func(int, int64, int64) (uint64, error) { return 1, nil }
	try(0, "")
	if c.take() != nil {
		t.Error("a command although the page cache has something that it would hide")
	}
	d.sys.cached = func(fd int, offset, length int64) (uint64, error) {
		if calls++; calls == 1 {
			return 0, nil
		}
		return 1, nil
	}
	try(0, "")
	if c.take() == nil {
		t.Error("no command")
	}
	d.sys.cached = func(int, int64, int64) (uint64, error) { return 0, unix.ENOSYS }
	try(unix.ENOTSUP, "page cache")
	if offers := d.CopyOffers(s); offers != nil {
		t.Errorf("an offer of a kernel that does not know what is cached: %+v", offers)
	}
	d.sys.cached = real

	s.sys.writeBack = func(int, int64, int64) error { return unix.EIO }
	try(unix.EIO, "sync_file_range")
	if s.failure.Load() == nil || d.failure.Load() != nil {
		t.Error("the source has not failed, or the destination has")
	}
	try(unix.ENOTSUP, "writing is over")
}

// TestCopyCommandLate: an error of writing back the destination ends it.
func TestCopyCommandLate(t *testing.T) {
	leaks(t)
	_, d, s := nvmePair(t, Options{})
	d.sys.writeBack = func(int, int64, int64) error { return unix.EIO }
	if n, err := d.Copy(block.CopyDevice, s, 0, 8192, 4096); n != 0 || block.Errno(err) != unix.EIO {
		t.Errorf("%d, %v", n, err)
	}
	if err := block.Write(d, make([]byte, 512), 0); block.Errno(err) != unix.EIO || !strings.Contains(err.Error(), "sync_file_range") {
		t.Errorf("write: %v", err)
	}
}

// TestCommandOffers: no offer where the command cannot be had.
func TestCommandOffers(t *testing.T) {
	leaks(t)
	path := loopDevice(t, 512)
	d, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	closing(t, d)
	if offers := d.CopyOffers(d); offers != nil { // a loop device, asked in earnest
		t.Errorf("%+v", offers)
	}
	if _, err := d.Copy(block.CopyDevice, d, 0, 8192, 4096); block.Errno(err) != unix.ENOTSUP || !strings.Contains(err.Error(), "NVMe") {
		t.Errorf("%v", err)
	}
	for i, c := range []struct {
		to, from *namespace
		err      error
	}{
		{nil, nil, unix.EPERM},
		{&namespace{disk: "nvme0n1", copyLimits: copyLimits{9, 8, 8, 1}}, &namespace{disk: "nvme1n1"}, nil},
		{&namespace{disk: "nvme0n1", copyLimits: copyLimits{9, 8, 7, 1}}, &namespace{disk: "nvme0n1"}, nil}, // less than a page
	} {
		n := 0
		d.nvme = func() (*namespace, error) {
			if n++; n == 1 {
				return c.to, c.err
			}
			return c.from, c.err
		}
		if offers := d.CopyOffers(d); offers != nil {
			t.Errorf("case %d: %+v", i, offers)
		}
	}
}

func TestFindDisk(t *testing.T) {
	root := t.TempDir()
	disk := filepath.Join(root, "devices", "nvme0", "nvme0n1")
	write := func(name, text string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o700), os.WriteFile(name, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	write(disk+"/size", "1000\n")
	write(disk+"/nvme0n1p2/partition", "2\n")
	write(disk+"/nvme0n1p2/start", "63\n")
	write(disk+"/nvme0n1p3/partition", "3\n")
	write(disk+"/nvme0n1p3/start", "nowhere\n")
	numbers := filepath.Join(root, "numbers")
	if err := os.Mkdir(numbers, 0o700); err != nil {
		t.Fatal(err)
	}
	for number, place := range map[string]string{"259:0": "", "259:2": "nvme0n1p2", "259:3": "nvme0n1p3"} {
		if err := os.Symlink(filepath.Join(disk, place), filepath.Join(numbers, number)); err != nil {
			t.Fatal(err)
		}
	}
	disk, err := filepath.EvalSymlinks(disk)
	if err != nil {
		t.Fatal(err)
	}
	for minor, start := range map[uint32]int64{0: 0, 2: 63 * 512, 3: -1, 4: -1} {
		got, at, err := findDisk(numbers, unix.Mkdev(259, minor))
		if start < 0 && err == nil || start >= 0 && (err != nil || got != disk || at != start) {
			t.Errorf("259:%d: %s, %d, %v", minor, got, at, err)
		}
	}
}

func TestLimits(t *testing.T) {
	good := copyLimits{blockShift: 12, rangeBlocks: 65535, commandBlocks: 1<<32 - 1, ranges: 256}
	for _, c := range []struct {
		name string
		spec func(p *[identifySize]byte)
		want copyLimits
		text string
	}{
		{"good", func(*[identifySize]byte) {}, good, ""},
		{"small blocks", func(p *[identifySize]byte) { p[138] = 8 }, good, "2^8 bytes"},
		{"large blocks", func(p *[identifySize]byte) { p[138] = 31 }, good, "2^31 bytes"},
		{"metadata", func(p *[identifySize]byte) { p[136] = 8 }, good, "metadata"},
		{"protection", func(p *[identifySize]byte) { p[29] = 1 }, good, "metadata"},
		{"no range", func(p *[identifySize]byte) { p[74], p[75] = 0, 0 }, good, "0 blocks of a range"},
		{"no command", func(p *[identifySize]byte) { clear(p[76:80]) }, good, "0 at a time"},
		{"format 35", func(p *[identifySize]byte) { p[26], p[138], p[128+35*4+2] = 0x43, 0, 9 },
			copyLimits{9, 65535, 1<<32 - 1, 256}, ""},
	} {
		var p [identifySize]byte
		describeNamespace(&p, good)
		c.spec(&p)
		got, err := parseLimits(&p)
		if c.text == "" && (err != nil || got != c.want) || c.text != "" && (!errors.Is(err, unix.ENOTSUP) || !strings.Contains(err.Error(), c.text)) {
			t.Errorf("%s: %+v, %v", c.name, got, err)
		}
	}
	if got := good.commandMax(); got != nvmeMax {
		t.Errorf("the longest command has %d bytes", got)
	}
	var p [identifySize]byte
	describeController(&p)
	if err := checkController(&p); err != nil {
		t.Error(err)
	}
	p[534] = 2
	if err := checkController(&p); !errors.Is(err, unix.ENOTSUP) {
		t.Errorf("no descriptor format 0: %v", err)
	}
	p[521] = 0
	if err := checkController(&p); !errors.Is(err, unix.ENOTSUP) {
		t.Errorf("no Copy command: %v", err)
	}
}

// FuzzLimits: whatever a namespace says, what is made of it can be used.
func FuzzLimits(f *testing.F) {
	var p [identifySize]byte
	describeNamespace(&p, copyLimits{blockShift: 12, rangeBlocks: 128, commandBlocks: 128, ranges: 128})
	f.Add(p[:384+4])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		var p [identifySize]byte
		copy(p[:], data)
		l, err := parseLimits(&p)
		if err != nil {
			if !errors.Is(err, unix.ENOTSUP) {
				t.Error(err)
			}
			return
		}
		unit, most := l.granularity(), l.commandMax()
		if unit < 4096 || unit&(unit-1) != 0 || most < 1<<l.blockShift && most != nvmeMax || most > nvmeMax {
			t.Errorf("%+v: granularity %d, at most %d", l, unit, most)
		}
		if (most>>l.blockShift+l.rangeBlocks-1)/l.rangeBlocks > nvmeRangesMax {
			t.Errorf("%+v: too many ranges", l)
		}
		_ = checkController(&p)
	})
}
