package nbd

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cowherd/block"
)

// model does random operations on d, an export of zeroes, and on a byte slice beside it.
func model(t *testing.T, d block.Device, seed uint64, steps int) {
	t.Helper()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	limits, size := d.Limits(), d.Size()
	want := make([]byte, size)
	unit := int64(limits.LogicalBlock)
	for step := range steps {
		offset := random.Int64N(size/unit) * unit
		length := min(random.Int64N(200<<10)/unit*unit, size-offset)
		data := make([]byte, length)
		var flags block.Flags
		if random.IntN(4) == 0 {
			flags |= block.FUA
		}
		if random.IntN(2) == 0 {
			flags |= block.NoUnmap
		}
		switch op := block.Op(random.IntN(5)); op {
		case block.OpRead:
			if err := block.Read(d, data, offset); err != nil {
				t.Fatalf("step %d: %v", step, err)
			}
			if !bytes.Equal(data, want[offset:offset+length]) {
				t.Fatalf("step %d: read of %d bytes at offset %d is wrong", step, length, offset)
			}
		case block.OpWrite:
			for i := range data {
				data[i] = byte(random.Uint32())
			}
			copy(want[offset:], data)
			if err := block.Do(d, op, flags&block.FUA, offset, length, data); err != nil {
				t.Fatalf("step %d: %v", step, err)
			}
		case block.OpFlush:
			if err := block.Flush(d); err != nil {
				t.Fatalf("step %d: %v", step, err)
			}
		case block.OpWriteZeroes, block.OpDiscard:
			// A discarded range reads as anything, but is zeroed here at once.
			if op == block.OpDiscard && limits.DiscardMax > 0 {
				if err := block.Do(d, op, 0, offset, length, nil); err != nil {
					t.Fatalf("step %d: %v", step, err)
				}
			}
			clear(want[offset : offset+length])
			if err := block.Do(d, block.OpWriteZeroes, flags, offset, length, nil); err != nil {
				t.Fatalf("step %d: %v", step, err)
			}
		}
	}
	got := make([]byte, size)
	if err := block.Read(d, got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Fatal("the device differs from the model at the end")
	}
}

func TestModel(t *testing.T) {
	const size = 1<<20 + 512
	tests := []struct {
		name string
		fake *fake
	}{
		{"structured", &fake{}},
		{"simple", &fake{simple: true}},
		{"small parts", &fake{blockSize: []uint32{512, 4096, 8192}}},
		{"maximum no multiple of the minimum", &fake{blockSize: []uint32{512, 4096, 8192 + 100}}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f := test.fake
			f.size, f.flags, f.serve = size, fakeFlags, memory(make([]byte, size))
			f.start(t)
			model(t, f.open(t), 1, 400)
		})
	}
	t.Run("TLS", func(t *testing.T) {
		server, client := certificates(t, "localhost")
		f := (&fake{size: size, flags: fakeFlags, serve: memory(make([]byte, size)), tls: server}).start(t)
		model(t, f.open(t, func(c *Config) { c.TLS = client }), 2, 100)
	})
}

// TestConcurrent writes disjoint ranges from many goroutines over several connections and reads them back.
func TestConcurrent(t *testing.T) {
	const size, workers, blocks = 1 << 20, 8, 32
	f := (&fake{size: size, flags: fakeFlags, serve: memory(make([]byte, size))}).start(t)
	d := f.open(t, func(c *Config) { c.Connections = 3 })
	if d.Connections() != 3 {
		t.Fatalf("%d connections, want 3", d.Connections())
	}
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			done := newCollector()
			for i := range blocks {
				data := bytes.Repeat([]byte{byte(w*blocks + i)}, 4096)
				r := &block.Request{Op: block.OpWrite, Queue: block.Queue(w), Offset: int64(w*blocks+i) * 4096,
					Length: 4096, Data: data}
				r.Push(done)
				d.Submit(r)
			}
			done.wait(t, blocks)
			for i := range blocks {
				got := make([]byte, 4096)
				if err := block.Read(d, got, int64(w*blocks+i)*4096); err != nil {
					t.Error(err)
				} else if !bytes.Equal(got, bytes.Repeat([]byte{byte(w*blocks + i)}, 4096)) {
					t.Errorf("block %d of worker %d is wrong", i, w)
				}
			}
		})
	}
	all.Wait()
}

// record is a serve function that answers everything and tells what came.
func record(log *[]string, mu *sync.Mutex) func(s *session) {
	return func(s *session) {
		for r := s.next(); r != nil; r = s.next() {
			mu.Lock()
			*log = append(*log, fmt.Sprintf("%d flags %d at %d+%d", r.command, r.flags, r.offset, r.length))
			mu.Unlock()
			s.ok(r)
			if r.command == cmdRead {
				s.send(make([]byte, r.length))
			}
		}
	}
}

// TestWire checks what goes over the wire for a request.
func TestWire(t *testing.T) {
	const plain = 1 | flagTrim | flagWriteZeroes | flagFlush
	tests := []struct {
		name   string
		flags  uint16
		op     block.Op
		flag   block.Flags
		length int64
		want   []string
	}{
		{"read", plain, block.OpRead, 0, 4096, []string{"0 flags 0 at 8192+4096"}},
		{"write", plain, block.OpWrite, 0, 4096, []string{"1 flags 0 at 8192+4096"}},
		{"nothing", plain, block.OpWrite, 0, 0, nil},
		{"FUA", plain | flagFUA, block.OpWrite, block.FUA, 4096, []string{"1 flags 1 at 8192+4096"}},
		{"FUA by a flush", plain, block.OpWrite, block.FUA, 4096, []string{"1 flags 0 at 8192+4096", "3 flags 0 at 0+0"}},
		{"FUA without anything", plain &^ flagFlush, block.OpWrite, block.FUA, 4096, []string{"1 flags 0 at 8192+4096"}},
		{"FUA of a read", plain | flagFUA, block.OpRead, block.FUA, 4096, []string{"0 flags 0 at 8192+4096"}},
		{"flush", plain, block.OpFlush, 0, 0, []string{"3 flags 0 at 0+0"}},
		{"flush without one", plain &^ flagFlush, block.OpFlush, 0, 0, nil},
		{"trim", plain, block.OpDiscard, 0, 4096, []string{"4 flags 0 at 8192+4096"}},
		{"zeroes", plain, block.OpWriteZeroes, 0, 4096, []string{"6 flags 0 at 8192+4096"}},
		{"zeroes, no hole, FUA", plain | flagFUA, block.OpWriteZeroes, block.NoUnmap | block.FUA, 4096,
			[]string{"6 flags 3 at 8192+4096"}},
		{"fast zeroes", plain | flagFastZero, block.OpWriteZeroes, block.Fast, 4096, []string{"6 flags 16 at 8192+4096"}},
		{"parts", plain, block.OpWrite, block.FUA, 20000 &^ 511, []string{"1 flags 0 at 8192+8192", "1 flags 0 at 16384+8192",
			"1 flags 0 at 24576+3584", "3 flags 0 at 0+0"}},
		{"parts of zeroes", plain, block.OpWriteZeroes, 0, 16384,
			[]string{"6 flags 0 at 8192+8192", "6 flags 0 at 16384+8192"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var mu sync.Mutex
			var got []string
			f := (&fake{size: 1 << 20, flags: test.flags, simple: true, blockSize: []uint32{512, 4096, 8192},
				serve: record(&got, &mu)}).start(t)
			var data []byte
			if test.op == block.OpRead || test.op == block.OpWrite {
				data = make([]byte, test.length)
			}
			if err := block.Do(f.open(t), test.op, test.flag, 8192, test.length, data); err != nil {
				t.Fatal(err)
			}
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(got, test.want) {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestFastZeroUnknown(t *testing.T) {
	f := (&fake{size: 1 << 20, flags: 1 | flagWriteZeroes, serve: memory(make([]byte, 1<<20))}).start(t)
	wantErrno(t, block.Do(f.open(t), block.OpWriteZeroes, block.Fast, 0, 4096, nil), syscall.ENOTSUP)
}

// TestDepth has more requests in flight than a connection has slots; the server answers the newest first.
func TestDepth(t *testing.T) {
	const count = 3*depth + 17
	f := &fake{size: 1 << 20, flags: fakeFlags}
	seen := make(chan int, count)
	f.serve = func(s *session) {
		for answered := 0; answered < count; {
			var batch []*wireRequest
			for want := min(depth, count-answered); len(batch) < want; {
				r := s.next()
				if r == nil {
					return
				}
				batch = append(batch, r)
			}
			seen <- len(batch)
			slices.Reverse(batch)
			for _, r := range batch {
				s.chunk(r, replyFlagDone, chunkData, r.offset, bytes.Repeat([]byte{byte(r.offset / 512)}, int(r.length)))
			}
			answered += len(batch)
		}
		s.next()
	}
	f.start(t)
	d := f.open(t)
	done := newCollector()
	var requests []*block.Request
	for i := range count {
		requests = append(requests, done.submit(d, block.OpRead, 0, int64(i)*512, make([]byte, 512)))
	}
	errs := done.wait(t, count)
	for i, r := range requests {
		if err := errs[r]; err != nil {
			t.Fatal(err)
		}
		if r.Data[0] != byte(i) || r.Data[511] != byte(i) {
			t.Fatalf("request %d has the data of another", i)
		}
	}
	if first := <-seen; first != depth {
		t.Errorf("%d requests were in flight at first, want %d", first, depth)
	}
}

// chain submits its request again from each completion.
type chain struct {
	d    block.Device
	left int
	done chan error
}

func (c *chain) Complete(r *block.Request, err error) {
	c.left--
	if err != nil || c.left == 0 {
		c.done <- err
		return
	}
	r.Push(c)
	c.d.Submit(r)
}

func TestSubmitFromCompletion(t *testing.T) {
	f := (&fake{size: 1 << 20, flags: fakeFlags, serve: memory(make([]byte, 1<<20))}).start(t)
	d := f.open(t)
	done := make(chan error)
	for i := range 2 * depth {
		c := &chain{d, 20, done}
		r := &block.Request{Op: block.Op(i % 2), Offset: int64(i) * 512, Length: 512, Data: make([]byte, 512)}
		r.Push(c)
		d.Submit(r)
	}
	for range 2 * depth {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
}

// TestEarlyAnswer has the server answer a write before it has taken the data: the request must not be completed while
// its memory is still being sent.
func TestEarlyAnswer(t *testing.T) {
	const length = 4 << 20
	f := &fake{size: 64 << 20, flags: fakeFlags}
	answered, drain := make(chan struct{}), make(chan struct{})
	f.serve = func(s *session) {
		r := s.header()
		s.chunk(r, replyFlagDone, chunkError, uint32(syscall.ENOSPC), uint16(4), "full")
		close(answered)
		<-drain
		data := make([]byte, length)
		if _, err := io.ReadFull(s.in, data); err != nil || slices.Contains(data, 0) {
			t.Errorf("the data changed under way (%v)", err)
		}
		s.ok(s.next())
		s.next()
	}
	f.start(t)
	d := f.open(t)
	done := newCollector()
	r := done.submit(d, block.OpWrite, 0, 0, bytes.Repeat([]byte{1}, length))
	<-answered
	time.Sleep(5 * time.Millisecond) // a completion that comes too early has the time to show
	done.mu.Lock()
	early := len(done.errs)
	done.mu.Unlock()
	if early != 0 {
		t.Error("the request was completed while its data was being sent")
	}
	close(drain)
	err := done.wait(t, 1)[r]
	clear(r.Data)
	wantErrno(t, err, syscall.ENOSPC)
	if !strings.Contains(err.Error(), "full") {
		t.Errorf("the server's message is missing: %v", err)
	}
	if err := block.Flush(d); err != nil {
		t.Error(err)
	}
}

// TestFullSocket has the server read slowly, so that the writer has to take over.
func TestFullSocket(t *testing.T) {
	const length, count = 256 << 10, 40
	f := &fake{size: 64 << 20, flags: fakeFlags}
	begin := make(chan struct{})
	f.serve = func(s *session) {
		<-begin
		for r := s.next(); r != nil; r = s.next() {
			if len(r.data) != length || r.data[0] != byte(r.offset/length) || r.data[length-1] != byte(r.offset/length) {
				t.Errorf("wrong data at offset %d", r.offset)
			}
			s.ok(r)
		}
	}
	f.start(t)
	d := f.open(t)
	done := newCollector()
	for i := range count {
		done.submit(d, block.OpWrite, 0, int64(i)*length, bytes.Repeat([]byte{byte(i)}, length))
	}
	close(begin) // all Submits have returned, though nothing was read
	for _, err := range done.wait(t, count) {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestClose(t *testing.T) {
	t.Run("says goodbye on every connection", func(t *testing.T) {
		f := (&fake{size: 1 << 20, flags: fakeFlags, serve: memory(make([]byte, 1<<20))}).start(t)
		d, err := Open(context.Background(), Config{Network: "unix", Address: f.path, Connections: 4})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
		}
		_ = f.listener.Close()
		f.done.Wait()
		if f.goodbyes() != 4 {
			t.Errorf("%d goodbyes, want 4", f.goodbyes())
		}
		wantErrno(t, block.Flush(d), syscall.ESHUTDOWN)
		if err := d.Extents(0, 512, func(block.Extent) bool { return true }); !strings.Contains(err.Error(), "closed") {
			t.Errorf("extents of a closed device: %v", err)
		}
	})
	t.Run("waits for what is in flight", func(t *testing.T) {
		f := &fake{size: 1 << 20, flags: fakeFlags}
		came, answer := make(chan struct{}), make(chan struct{})
		f.serve = func(s *session) {
			r := s.next()
			close(came)
			<-answer
			s.ok(r)
			s.next()
		}
		f.start(t)
		d := f.open(t)
		done := newCollector()
		r := done.submit(d, block.OpWrite, 0, 0, make([]byte, 512))
		<-came
		closed := make(chan error)
		go func() { closed <- d.Close() }()
		for c := d.conns[0]; ; runtime.Gosched() { // until Close has begun
			c.mu.Lock()
			begun := c.cause != nil
			c.mu.Unlock()
			if begun {
				break
			}
		}
		wantErrno(t, block.Flush(d), syscall.ESHUTDOWN)
		close(answer)
		if err := <-closed; err != nil {
			t.Error(err)
		}
		if err := done.wait(t, 1)[r]; err != nil {
			t.Error(err)
		}
		if f.goodbyes() != 1 {
			t.Error("no goodbye")
		}
	})
	t.Run("gives up a server that hangs", func(t *testing.T) {
		f := &fake{size: 1 << 20, flags: fakeFlags}
		f.serve = func(s *session) { _, _ = io.Copy(io.Discard, s.in) }
		f.start(t)
		d := f.open(t)
		d.closing = 20 * time.Millisecond
		done := newCollector()
		r := done.submit(d, block.OpWrite, 0, 0, make([]byte, 512))
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		wantErrno(t, done.wait(t, 1)[r], syscall.ESHUTDOWN)
	})
}

// TestLost has one of two connections drop: everything in flight fails on both, and everything later.
func TestLost(t *testing.T) {
	f := &fake{size: 1 << 20, flags: fakeFlags}
	var came sync.WaitGroup
	came.Add(2)
	var mu sync.Mutex
	first := true
	f.serve = func(s *session) {
		s.next()
		came.Done()
		came.Wait()
		mu.Lock()
		hangUp := first
		first = false
		mu.Unlock()
		if !hangUp {
			_, _ = io.Copy(io.Discard, s.in)
		}
	}
	f.start(t)
	d := f.open(t, func(c *Config) { c.Connections = 2 })
	done := newCollector()
	const count = 400 // more than the slots
	for i := range count {
		r := &block.Request{Op: block.OpRead, Queue: block.Queue(i), Length: 512, Data: make([]byte, 512)}
		r.Push(done)
		d.Submit(r)
	}
	for _, err := range done.wait(t, count) {
		wantErrno(t, err, syscall.EIO)
		if !strings.Contains(err.Error(), "hung up") {
			t.Fatalf("the cause is missing: %v", err)
		}
	}
	wantErrno(t, block.Flush(d), syscall.EIO)
	if err := d.Extents(0, 512, func(block.Extent) bool { return true }); block.Errno(err) != syscall.EIO {
		t.Errorf("extents: %v", err)
	}
}

// TestShutdown has the server announce its end: what is in flight may finish, and the client says goodbye.
func TestShutdown(t *testing.T) {
	f := &fake{size: 1 << 20, flags: fakeFlags}
	f.serve = func(s *session) {
		a, b := s.next(), s.next()
		s.chunk(a, replyFlagDone, chunkError, uint32(syscall.ESHUTDOWN), uint16(0))
		s.ok(b)
		if s.next() != nil {
			t.Error("another request came")
		}
	}
	f.start(t)
	d := f.open(t)
	done := newCollector()
	a := done.submit(d, block.OpWrite, 0, 0, make([]byte, 512))
	b := done.submit(d, block.OpWrite, 0, 512, make([]byte, 512))
	errs := done.wait(t, 2)
	wantErrno(t, errs[a], syscall.ESHUTDOWN)
	if err := errs[b]; err != nil {
		t.Error(err)
	}
	wantErrno(t, block.Flush(d), syscall.EIO)
	d.running.Wait()
	if f.goodbyes() != 1 {
		t.Errorf("%d goodbyes, want 1", f.goodbyes())
	}
}

// TestStream is a stream without a socket: all writing is the writer's.
func TestStream(t *testing.T) {
	const size = 1 << 20
	client, server := net.Pipe()
	var running sync.WaitGroup
	running.Go(func() {
		defer server.Close()
		s := &session{fake: &fake{}, net: server, in: bufio.NewReader(server), structured: true}
		memory(make([]byte, size))(s)
	})
	e := export{size: size, flags: fakeFlags, structured: true, allocation: true, context: fakeContext}
	if err := e.settle(nil); err != nil {
		t.Fatal(err)
	}
	d := newDevice(Config{}, []net.Conn{client}, []export{e})
	model(t, d, 3, 100)
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	running.Wait()
}
