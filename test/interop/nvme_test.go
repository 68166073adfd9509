//go:build interop

package interop

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"cowherd/backend/file"
	"cowherd/block"
	"cowherd/kcopyd"
)

// nvmeDisk is an NVMe namespace of the guest with two partitions, and what the emulation says of its Copy command.
type nvmeDisk struct {
	block                int64 // the logical block in bytes
	rangeMax, commandMax int64 // MSSRL and MCL, in blocks
	rangesLess1          int64 // MSRC
	size, first, second  int64 // bytes: of the image, and where the partitions begin
	part                 int64 // bytes of a partition
	failRead, failWrite  int64 // the sector of the image that cannot be read or written; 0: all can
	image                string
	longest              int64 // bytes that one command may copy
}

// make writes an image of zeroes with a partition table, and returns qemu's arguments for a controller with
// namespace number+1, which is that disk.
func (n *nvmeDisk) make(t *testing.T, number int) []string {
	t.Helper()
	n.image = filepath.Join(t.TempDir(), fmt.Sprintf("nvme%d", number))
	f, err := os.Create(n.image)
	if err != nil {
		t.Fatal(err)
	}
	// Four entries of 16 bytes from byte 446 on, each with a type in byte 4 and first block and count in the last eight.
	table := make([]byte, 512)
	for i, start := range []int64{n.first, n.second} {
		e := table[446+16*i:][:16]
		e[4] = 0x83
		binary.LittleEndian.PutUint32(e[8:], uint32(start/n.block))
		binary.LittleEndian.PutUint32(e[12:], uint32(n.part/n.block))
	}
	table[510], table[511] = 0x55, 0xaa
	_, err = f.Write(table)
	if err := errors.Join(err, f.Truncate(n.size), f.Close()); err != nil {
		t.Fatal(err)
	}
	n.longest = min(n.commandMax, n.rangeMax*(n.rangesLess1+1)) * n.block
	disk := fmt.Sprintf("driver=file,filename=%s,cache.no-flush=on", n.image)
	faults := fmt.Sprintf("driver=blkdebug,node-name=nvme-disk%d,image.driver=raw", number)
	for option := range strings.SplitSeq(disk, ",") {
		faults += ",image.file." + option
	}
	fail := func(kind string, sector int64) {
		if sector != 0 {
			faults += fmt.Sprintf(",inject-error.0.event=none,inject-error.0.iotype=%s,inject-error.0.sector=%d", kind, sector)
		}
	}
	fail("read", n.failRead)
	fail("write", n.failWrite)
	return []string{
		"-blockdev", faults,
		"-device", fmt.Sprintf("nvme,id=nvme%d,serial=%d", number, number),
		"-device", fmt.Sprintf("nvme-ns,bus=nvme%d,drive=nvme-disk%d,logical_block_size=%d,physical_block_size=%d,mssrl=%d,mcl=%d,msrc=%d,"+
			"nsid=%d", number, number, n.block, n.block, n.rangeMax, n.commandMax, n.rangesLess1, number+1),
	}
}

// model is what the image holds at first.
func (n *nvmeDisk) model(t *testing.T) []byte {
	t.Helper()
	p, err := os.ReadFile(n.image)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// check compares the image with the model.
func (n *nvmeDisk) check(t *testing.T, model []byte) {
	t.Helper()
	p := n.model(t)
	if bytes.Equal(p, model) {
		return
	}
	for i := range p {
		if p[i] != model[i] {
			t.Errorf("byte %d of the disk is %#x, not %#x; partitions begin at %d and %d", i, p[i], model[i], n.first, n.second)
			return
		}
	}
}

// pattern is length bytes from a seed.
func pattern(seed, length int64) []byte {
	p := make([]byte, length)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), 1}).Read(p)
	return p
}

// TestNVMe: the Copy command moves data between the partitions of a namespace and within one, past page caches that have
// something else, in commands that the controller takes.
func TestNVMe(t *testing.T) {
	t.Parallel()
	small := nvmeDisk{
		block: 512, rangeMax: 24, commandMax: 80, rangesLess1: 2, size: 24 * mib, first: 63 * 512, second: 12*mib + 512, part: 8 * mib,
	}
	large := nvmeDisk{
		block: 4096, rangeMax: 128, commandMax: 128, rangesLess1: 127, size: 24 * mib, first: 4096, second: 12 * mib, part: 8 * mib,
	}
	other := small
	hardware := append(append(small.make(t, 0), large.make(t, 1)...), other.make(t, 2)...)
	models := [][]byte{small.model(t), large.model(t)}
	dummy := newPair(t, "P", 4*kib, originSize, 1*mib)
	var script strings.Builder
	script.WriteString("n0=$(namespace 1) n1=$(namespace 2) n2=$(namespace 3)\n")
	const length = 4 * mib
	expect := map[string]int64{}
	for i, n := range []nvmeDisk{small, large} {
		for j, mode := range []string{"cached", "direct"} {
			seed := int64(2*i + j)
			// From one partition to the other, and from an end of the second to its other.
			across, within := fmt.Sprintf("across%d", seed), fmt.Sprintf("within%d", seed)
			from, to := int64(j)*4*mib, (1-int64(j))*4*mib
			fmt.Fprintf(&script, "io offload %s ${n%d}p2 ${n%d}p1 %d %d %d %s %d\n", across, i, i, to, from, length, mode, seed)
			p := pattern(seed, length)
			copy(models[i][n.first+from:], p)
			copy(models[i][n.second+to:], p)
			from, to = to, n.part-mib/2
			if from > 0 {
				to = 0
			}
			fmt.Fprintf(&script, "io offload %s ${n%d}p2 ${n%d}p2 %d %d %d %s %d\n", within, i, i, to, from, mib/2, mode, seed+8)
			p = pattern(seed+8, mib/2)
			copy(models[i][n.second+from:], p)
			copy(models[i][n.second+to:], p)
			longest := min(n.longest&^4095, 64*mib)
			expect[across], expect[within] = (length+longest-1)/longest, (mib/2+longest-1)/longest
		}
	}
	script.WriteString("io offload apart ${n2}p1 ${n0}p1 0 0 65536 cached 9\n" +
		"io offload foreign /dev/vdb ${n0}p1 0 0 65536 cached 9\n")
	g := kernelOn(t, hardware, script.String(), dummy.origin, dummy.cow)
	for name, calls := range expect {
		if got := g.report(name); got != "ok" {
			t.Errorf("%s: %s", name, got)
		}
		if got, want := g.report(name+" methods"), fmt.Sprintf("device: %d calls", calls); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	for _, name := range []string{"apart", "foreign"} {
		if got := g.report(name); !strings.Contains(got, "is not possible") {
			t.Errorf("%s: %s", name, got)
		}
	}
	copy(models[0][small.first:], pattern(9, 65536)) // the source was written before
	small.check(t, models[0])
	large.check(t, models[1])
	t.Log(g.Output)
}

// TestNVMeFaults: what the disk cannot read or write is an error of the copy that names the command's status.
func TestNVMeFaults(t *testing.T) {
	t.Parallel()
	good := nvmeDisk{
		block: 512, rangeMax: 128, commandMax: 128, rangesLess1: 127, size: 24 * mib, first: mib, second: 12 * mib, part: 8 * mib,
	}
	writes, reads := good, good
	writes.failWrite = (good.second + mib) / 512
	reads.failRead = (good.first + mib) / 512
	hardware := append(writes.make(t, 0), reads.make(t, 1)...)
	dummy := newPair(t, "P", 4*kib, originSize, 1*mib)
	g := kernelOn(t, hardware, fmt.Sprintf(`n0=$(namespace 1) n1=$(namespace 2)
io offload write ${n0}p2 ${n0}p1 0 0 %d copy 1
io offload before ${n0}p2 ${n0}p1 0 0 %d copy 1
io offload read ${n1}p2 ${n1}p1 0 0 %d copy 1
`, 2*mib, mib, 2*mib), dummy.origin, dummy.cow)
	t.Log(g.Output)
	for _, name := range []string{"write", "read"} {
		got := g.report(name)
		if !strings.Contains(got, "NVMe status 0x") || !strings.Contains(got, "input/output error") ||
			!strings.Contains(got, "at offset 1048576") {
			t.Errorf("%s of a bad sector: %s", name, got)
		}
	}
	if got := g.report("before"); got != "ok" {
		t.Errorf("before the bad sector: %s", got)
	}
}

// guestOffload is the guest's part: io offload NAME TARGET SOURCE TO FROM LENGTH MODE SEED. It fills the range of the
// source from the seed and the destination's with something else, so that with MODE cached both lie in the page cache and
// are dirty; copies by offload alone; and reads what the destination holds. MODE copy only copies.
func guestOffload(name string, args []string) error {
	var target, source, mode string
	var to, from, length, seed int64
	if _, err := fmt.Sscan(strings.Join(args, " "), &target, &source, &to, &from, &length, &mode, &seed); err != nil {
		return fmt.Errorf("offload %q: %w", args, err)
	}
	o := file.Options{Direct: mode == "direct"}
	d, err := file.Open(target, o)
	if err != nil {
		return err
	}
	s := d
	if source != target {
		if s, err = file.Open(source, o); err != nil {
			return err
		}
	}
	methods, result := offload(d, s, to, from, length, mode, seed)
	if result == nil {
		fmt.Printf("%s: ok\n", name)
	} else {
		fmt.Printf("%s: %v\n", name, result)
	}
	fmt.Printf("%s methods: %s\n", name, methods)
	fmt.Printf("%s offers: %+v\n", name, d.CopyOffers(s))
	err = errors.Join(block.Flush(d), d.Close())
	if s != d {
		err = errors.Join(err, block.Flush(s), s.Close())
	}
	return err
}

// counting counts the calls of Copy.
type counting struct {
	*file.Device
	calls atomic.Int64
}

func (c *counting) Copy(m block.CopyMethod, source block.Device, from, to, length int64) (int64, error) {
	c.calls.Add(1)
	n, err := c.Device.Copy(m, source, from, to, length)
	if err == nil && n < length {
		err = fmt.Errorf("a short copy of %d bytes instead of %d", n, length)
	}
	return n, err
}

// offload copies and checks, and tells by what method in how many calls.
func offload(d, s *file.Device, to, from, length int64, mode string, seed int64) (methods string, result error) {
	want := pattern(seed, length)
	if mode != "copy" {
		if err := errors.Join(block.Write(s, want, from), block.Write(d, pattern(seed+100, length), to)); err != nil {
			return "", err
		}
	}
	engine := kcopyd.NewScaled(kcopyd.Config{})
	counted := &counting{Device: d}
	done := make(chan error, 1)
	j := &kcopyd.Job{
		From: kcopyd.Region{Device: s, Offset: from}, To: []kcopyd.Region{{Device: counted, Offset: to}}, Length: length,
		Class: kcopyd.Bulk, Offload: kcopyd.OffloadOnly, Done: func(j *kcopyd.Job) { done <- j.Err() },
	}
	engine.Submit(j)
	result = <-done
	for _, m := range engine.Stats().Methods {
		methods += fmt.Sprintf("%s: %d calls", m.Method, counted.calls.Load())
	}
	if err := engine.Close(); err != nil || result != nil || mode == "copy" {
		return methods, errors.Join(result, err)
	}
	got := make([]byte, length)
	if err := block.Read(d, got, to); err != nil {
		return methods, err
	}
	if !bytes.Equal(got, want) {
		return methods, errors.New("the destination holds something else")
	}
	return methods, nil
}
