package file

import (
	"errors"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"cowherd/block"
)

// uncached makes every read of d need the disk, which is read.
func (d *Device) uncached(read func(fd int, p []byte, offset int64) (int, error)) {
	d.nowait = true
	d.sys.preadNowait = func(int, []byte, int64) (int, error) { return 0, unix.EAGAIN }
	d.sys.pread = read
}

// TestPool: reads that wait for the disk hold up neither Submit nor other requests, and are not more at a time than
// there are goroutines.
func TestPool(t *testing.T) {
	leaks(t)
	const count = 3 * workersMax
	d := onDisk(t, 1<<20)
	d.workersMax = 5
	var running, most atomic.Int64
	started, release := make(chan struct{}, count), make(chan struct{})
	d.uncached(func(_ int, p []byte, _ int64) (int, error) {
		now := running.Add(1)
		defer running.Add(-1)
		for old := most.Load(); now > old && !most.CompareAndSwap(old, now); old = most.Load() {
		}
		started <- struct{}{}
		<-release
		return len(p), nil
	})
	done := make(outcomes, count)
	for i := range int64(count) {
		done.submit(d, block.OpRead, 0, i*512, make([]byte, 512))
	}
	for range d.workersMax {
		<-started
	}
	if err := block.Write(d, []byte("inline"), 0); err != nil {
		t.Errorf("a write beside reads that wait: %v", err)
	}
	close(release)
	for range count {
		if got := <-done; got.err != nil {
			t.Error(got.err)
		}
	}
	if n := most.Load(); n != int64(d.workersMax) {
		t.Errorf("%d reads ran at a time, want %d", n, d.workersMax)
	}
}

// TestCloseWaits: Close returns after the completions of all requests, whether they run, wait or flush.
func TestCloseWaits(t *testing.T) {
	leaks(t)
	d, err := Temp(t.TempDir(), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	d.inMemory, d.workersMax = false, 2
	started, release := make(chan struct{}, 100), make(chan struct{})
	d.uncached(func(_ int, p []byte, _ int64) (int, error) {
		started <- struct{}{}
		<-release
		return len(p), nil
	})
	d.sys.fdatasync = func(int) error {
		<-release
		return nil
	}
	done := make(outcomes, 100)
	for range 10 {
		done.submit(d, block.OpRead, 0, 0, make([]byte, 512))
	}
	done.submit(d, block.OpFlush, 0, 0, nil)
	<-started
	closed := make(chan int)
	go func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		closed <- len(done)
	}()
	for !d.closed.Load() {
		runtime.Gosched()
	}
	close(release)
	if n := <-closed; n != 11 {
		t.Errorf("Close returned after %d of 11 completions", n)
	}
}

// TestDepth: a queue that carries one request at a time runs it inline after a few, but for a probe now and then; with
// company a request goes to the pool.
func TestDepth(t *testing.T) {
	leaks(t)
	d := onDisk(t, 1<<20)
	d.nowait = false
	q := d.queues.At(0)
	done := make(outcomes, 1)
	inline := func() bool { // runs one request, and tells whether it was done before Submit returned
		gate := make(chan struct{}, 1)
		d.sys.pread = func(_ int, p []byte, _ int64) (int, error) {
			q.mu.Lock()
			workers := q.workers
			q.mu.Unlock()
			if workers > 0 {
				<-gate
			}
			return len(p), nil
		}
		done.submit(d, block.OpRead, 0, 0, make([]byte, 512))
		was := len(done) == 1
		gate <- struct{}{}
		<-done
		for idle := false; !idle; { // the goroutine that ran it must not be taken for another one's
			q.mu.Lock()
			idle = q.workers == 0
			q.mu.Unlock()
		}
		return was
	}
	for i := 1; i <= 3*probeEvery; i++ {
		if got, want := inline(), i > aloneMin && i%probeEvery != 0; got != want {
			t.Errorf("request %d in a row: inline %v, want %v", i, got, want)
		}
	}
	q.mu.Lock()
	q.busy++ // company
	q.mu.Unlock()
	if inline() {
		t.Error("a request with company was run inline")
	}
	q.mu.Lock()
	q.busy--
	q.mu.Unlock()
	if inline() {
		t.Error("the first request without company was run inline")
	}
}

// TestFlushCoalesces: flushes that arrive while one runs share the next.
func TestFlushCoalesces(t *testing.T) {
	leaks(t)
	d := onDisk(t, 4096)
	var calls atomic.Int64
	started, release := make(chan struct{}, 10), make(chan struct{})
	d.sys.fdatasync = func(int) error {
		calls.Add(1)
		started <- struct{}{}
		<-release
		return nil
	}
	done := make(outcomes, 20)
	done.submit(d, block.OpFlush, 0, 0, nil)
	<-started
	for range 10 {
		done.submit(d, block.OpFlush, 0, 0, nil)
	}
	if len(done) != 0 {
		t.Error("a flush was completed before fdatasync returned")
	}
	close(release)
	for range 11 {
		if got := <-done; got.err != nil {
			t.Error(got.err)
		}
	}
	if n := calls.Load(); n != 2 {
		t.Errorf("%d calls of fdatasync for 1 flush and 10 behind it, want 2", n)
	}
}

// TestFailedFlush: after a failed fdatasync nothing is written and nothing is tried again, but reads go on.
func TestFailedFlush(t *testing.T) {
	leaks(t)
	for i, flush := range []func(d *Device) error{
		func(d *Device) error { return block.Flush(d) }, func(d *Device) error { return block.Flush(d) }, (*Device).Sync,
	} {
		d := onDisk(t, 4096)
		d.inMemory = i == 1
		var calls, writes atomic.Int64
		d.sys.fdatasync = func(int) error {
			calls.Add(1)
			return unix.ENOSPC // whatever it is, what it was to write may be lost
		}
		if err := block.Write(d, make([]byte, 512), 0); err != nil {
			t.Fatal(err)
		}
		d.sys.pwrite = func(_ int, p []byte, _ int64) (int, error) {
			writes.Add(1)
			return len(p), nil
		}
		for i := range 3 {
			err := flush(d)
			if !failedFor(err, unix.ENOSPC) || !strings.Contains(err.Error(), d.Path()) {
				t.Errorf("flush %d: %v, want EIO with the cause and the path", i, err)
			}
		}
		for _, op := range []block.Op{block.OpWrite, block.OpDiscard, block.OpWriteZeroes} {
			if err := block.Do(d, op, 0, 0, 512, make([]byte, 512)); !failedFor(err, unix.ENOSPC) {
				t.Errorf("%v after a failed flush: %v, want EIO with the cause", op, err)
			}
		}
		if err := block.Read(d, make([]byte, 512), 0); err != nil {
			t.Errorf("read after a failed flush: %v", err)
		}
		if calls.Load() != 1 || writes.Load() != 0 {
			t.Errorf("%d calls of fdatasync and %d writes after it failed", calls.Load(), writes.Load())
		}
	}
}

// failedFor tells whether err is the EIO of a device that has failed for cause.
func failedFor(err error, cause syscall.Errno) bool {
	return block.Errno(err) == syscall.EIO && errors.Is(err, cause)
}

// TestFailedFlushGroup: a flush that waits behind the one that fails gets its cause, not an attempt of its own.
func TestFailedFlushGroup(t *testing.T) {
	leaks(t)
	d := onDisk(t, 4096)
	var calls atomic.Int64
	started, release := make(chan struct{}, 2), make(chan struct{})
	d.sys.fdatasync = func(int) error {
		calls.Add(1)
		started <- struct{}{}
		<-release
		return unix.EIO
	}
	done := make(outcomes, 2)
	done.submit(d, block.OpFlush, 0, 0, nil)
	<-started
	done.submit(d, block.OpFlush, 0, 0, nil)
	close(release)
	for range 2 {
		if got := <-done; block.Errno(got.err) != syscall.EIO {
			t.Errorf("got %v, want EIO", got.err)
		}
	}
	if n := calls.Load(); n != 1 {
		t.Errorf("%d calls of fdatasync", n)
	}
}

// TestFUA: durable by one call where there is such a call, by two elsewhere.
func TestFUA(t *testing.T) {
	leaks(t)
	d := onDisk(t, 4096)
	var mu sync.Mutex
	var trace []string
	note := func(name string) {
		mu.Lock()
		defer mu.Unlock()
		trace = append(trace, name)
	}
	dsync := error(nil)
	d.sys.pwriteDsync = func(_ int, p []byte, _ int64) (int, error) {
		note("pwritev2")
		return len(p), dsync
	}
	d.sys.pwrite = func(_ int, p []byte, _ int64) (int, error) {
		note("pwrite")
		return len(p), nil
	}
	d.sys.fdatasync = func(int) error {
		note("fdatasync")
		return nil
	}
	d.sys.fallocate = func(int, uint32, int64, int64) error {
		note("fallocate")
		return nil
	}
	for _, c := range []struct {
		op    block.Op
		dsync error
		want  string
	}{
		{block.OpWrite, nil, "pwritev2"},
		{block.OpWriteZeroes, nil, "fallocate fdatasync"},
		{block.OpDiscard, nil, "fallocate fdatasync"},
		{block.OpWrite, unix.ENOTSUP, "pwritev2 pwrite fdatasync"},
		{block.OpWrite, unix.ENOTSUP, "pwrite fdatasync"},
	} {
		trace, dsync = nil, c.dsync
		if err := block.Do(d, c.op, block.FUA, 0, 512, make([]byte, 512)); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(trace, " "); got != c.want {
			t.Errorf("%v: %s, want %s", c.op, got, c.want)
		}
	}
}

// TestFailedFUA: a write that must be durable and fails with EIO ends writing by the page cache; with direct I/O it
// is one bad write.
func TestFailedFUA(t *testing.T) {
	leaks(t)
	for _, direct := range []bool{false, true} {
		d := onDisk(t, 4096)
		d.direct = direct
		d.sys.pwriteDsync = func(int, []byte, int64) (int, error) { return 0, unix.EIO }
		if err := block.Do(d, block.OpWrite, block.FUA, 0, 512, make([]byte, 512)); block.Errno(err) != syscall.EIO {
			t.Errorf("direct %v: %v, want EIO", direct, err)
		}
		if err := block.Write(d, make([]byte, 512), 0); (err == nil) != direct {
			t.Errorf("direct %v: a later write: %v", direct, err)
		}
	}
}

// TestErrors: errors of the system calls come up with their errno.
func TestErrors(t *testing.T) {
	leaks(t)
	d := onDisk(t, 4096)
	d.uncached(func(int, []byte, int64) (int, error) { return 0, unix.ENODEV })
	d.sys.pwrite = func(int, []byte, int64) (int, error) { return 0, unix.EDQUOT }
	d.sys.fallocate = func(int, uint32, int64, int64) error { return unix.EIO }
	for _, c := range []struct {
		op   block.Op
		want syscall.Errno
	}{
		{block.OpRead, unix.ENODEV}, {block.OpWrite, unix.EDQUOT},
		{block.OpDiscard, unix.EIO}, {block.OpWriteZeroes, unix.EIO},
	} {
		err := block.Do(d, c.op, 0, 0, 512, make([]byte, 512))
		if block.Errno(err) != c.want || !strings.Contains(err.Error(), d.Path()) {
			t.Errorf("%v: %v, want %v", c.op, err, c.want)
		}
	}
	d.sys.pwrite = func(int, []byte, int64) (int, error) { return 0, nil }
	if err := block.Write(d, make([]byte, 512), 0); block.Errno(err) != syscall.EIO {
		t.Errorf("a write that makes no progress: %v", err)
	}
}

// ignore is a Completer that does nothing.
type ignore struct{}

func (ignore) Complete(*block.Request, error) {}

func benchmark(b *testing.B, d *Device, op block.Op) {
	const span = 64 << 20
	p := make([]byte, 1<<20)
	for offset := int64(0); offset < span; offset += 1 << 20 {
		if err := block.Write(d, p, offset); err != nil {
			b.Fatal(err)
		}
	}
	var queues atomic.Uint32
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		r := block.Request{Op: op, Queue: block.Queue(queues.Add(1)), Data: make([]byte, 4096), Length: 4096}
		for i := int64(1); pb.Next(); i++ {
			r.Offset = i * 7919 % (span / 4096) * 4096
			r.Push(ignore{})
			d.Submit(&r)
		}
	})
}

func BenchmarkMemoryRead4K(b *testing.B) {
	benchmark(b, created(b, memoryDir(b), 64<<20, Options{}), block.OpRead)
}

func BenchmarkMemoryWrite4K(b *testing.B) {
	benchmark(b, created(b, memoryDir(b), 64<<20, Options{}), block.OpWrite)
}

func BenchmarkCachedRead4K(b *testing.B) {
	benchmark(b, created(b, diskDir(b), 64<<20, Options{}), block.OpRead)
}

// BenchmarkDirectRead4K: one submitter that waits for each request (depth 1), and one that keeps 32 in flight.
func BenchmarkDirectRead4K(b *testing.B) {
	const span = 64 << 20
	d, err := Create(filepath.Join(diskDir(b), "disk.img"), span, Options{Direct: true})
	if err != nil {
		b.Skip(err)
	}
	closing(b, d)
	if err := errors.Join(block.Write(d, make([]byte, span), 0), block.Flush(d)); err != nil {
		b.Fatal(err)
	}
	for _, depth := range []int{1, 32} {
		b.Run(strconv.Itoa(depth), func(b *testing.B) {
			done := make(outcomes, depth)
			for range depth {
				done <- outcome{r: &block.Request{Data: aligned(make([]byte, 2*memoryAlignMax), 4096), Length: 4096}}
			}
			b.ReportAllocs()
			i := int64(0)
			for b.Loop() {
				got := <-done
				if got.err != nil {
					b.Fatal(got.err)
				}
				i++
				got.r.Offset = i * 7919 % (span / 4096) * 4096
				got.r.Push(done)
				d.Submit(got.r)
			}
			for range depth {
				<-done
			}
		})
	}
}

func BenchmarkCachedWrite4K(b *testing.B) {
	benchmark(b, created(b, diskDir(b), 64<<20, Options{}), block.OpWrite)
}
