package nbd

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cowherd/backend/devicetest"
	"cowherd/block"
	"cowherd/internal/invariant"
)

// brittle is a connection that breaks after a number of bytes, both ways together.
type brittle struct {
	net.Conn
	left *atomic.Int64
}

func newBrittle(c net.Conn, bytes int64) net.Conn {
	b := brittle{c, new(atomic.Int64)}
	b.left.Store(bytes)
	return b
}

func (b brittle) Read(p []byte) (int, error) {
	p = p[:min(int64(len(p)), max(b.left.Load(), 0))]
	if len(p) == 0 {
		_ = b.Close()
		return 0, io.EOF
	}
	n, err := b.Conn.Read(p)
	b.left.Add(-int64(n))
	return n, err
}

func (b brittle) Write(p []byte) (int, error) {
	n, err := b.Conn.Write(p[:min(int64(len(p)), max(b.left.Load(), 0))])
	b.left.Add(-int64(n))
	if err == nil && n < len(p) {
		_ = b.Close()
		return n, net.ErrClosed
	}
	return n, err
}

// patient makes a device connect anew for a while. Time limits of tests that must not run out are long.
func patient(c *Config) { c.ReconnectTimeout = time.Minute }

// faithful makes it trust the server, too.
func faithful(c *Config) { c.ReconnectTimeout, c.KeepsWrites = time.Minute, true }

// everything does one request of each kind and checks what is read. The export holds 64 bytes or more.
func everything(d *Device) error {
	got, want := make([]byte, 24), []byte("abcdefgh\x00\x00\x00\x00\x00\x00\x00\x00qrstuvwx")
	steps := []error{
		block.Write(d, []byte("abcdefghijklmnopqrstuvwx"), 16),
		block.Do(d, block.OpWriteZeroes, block.NoUnmap, 24, 8, nil),
		block.Flush(d),
		block.Do(d, block.OpWrite, block.FUA, 48, 8, []byte("01234567")),
		block.Do(d, block.OpDiscard, 0, 48, 8, nil),
		block.Read(d, got, 16),
	}
	if err := errors.Join(steps...); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("read %q", got)
	}
	covered := int64(0)
	if err := d.Extents(0, d.Size(), func(e block.Extent) bool { covered += e.Length; return true }); err != nil {
		return err
	}
	if covered != d.Size() {
		return fmt.Errorf("extents of %d bytes", covered)
	}
	return nil
}

// TestEveryByte breaks the first connection after any number of bytes, and then, the first one broken early, the
// second, so that each handshake and each message is broken everywhere. One run takes every third number, other ones
// each time, and fewer under the race detector.
func TestEveryByte(t *testing.T) {
	server, client := certificates(t, "localhost")
	tests := []struct {
		name string
		fake *fake
		tls  *tls.Config
		step int64
	}{
		{"structured", &fake{flags: fakeFlags}, nil, 3},
		{"simple, no FUA", &fake{flags: fakeFlags &^ flagFUA, simple: true}, nil, 3},
		{"TLS", &fake{flags: fakeFlags, tls: server}, client, 61},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			for second := range 2 {
				var next atomic.Int64
				step := test.step
				if invariant.Enabled {
					step = min(step*17, 101)
				}
				next.Store(rand.Int64N(step))
				var all sync.WaitGroup
				for range 8 { // most of the time is spent in pauses
					all.Go(func() {
						for {
							k := next.Add(step) - step
							if breakAt(t, test.fake, test.tls, second == 1, k) {
								return
							}
						}
					})
				}
				all.Wait()
				if k := next.Load(); k < 350 {
					t.Errorf("the conversation was over after %d bytes", k)
				}
			}
		})
	}
}

// breakAt breaks the first connection after k bytes of its transmission phase, or the second after k bytes in all. It
// tells whether the connection held.
func breakAt(t *testing.T, like *fake, secure *tls.Config, second bool, k int64) (unbroken bool) {
	t.Helper()
	f := &fake{flags: like.flags, simple: like.simple, tls: like.tls, size: 64, blockSize: []uint32{1, 64, 16}}
	f.serve = memory(make([]byte, 64))
	limits := []int64{1 << 40, 1 << 40}
	var first, watched *atomic.Int64
	f.wrap = func(number int, c net.Conn) net.Conn {
		if number >= len(limits) {
			return c
		}
		b := newBrittle(c, limits[number]).(brittle)
		if number == 0 {
			first = b.left
		}
		if (number == 1) == second {
			watched = b.left
		}
		return b
	}
	limits[1] = k
	if !second {
		limits[1] = 1 << 40
	}
	f.start(t)
	d, err := Open(context.Background(), with(f.config(), faithful, func(c *Config) { c.TLS = secure }))
	if err != nil {
		t.Error(err)
		return true
	}
	d.pauseMax = pauseMin
	first.Store(k)
	if second {
		first.Store(40)
	}
	defer func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}()
	if err := everything(d); err != nil {
		t.Errorf("broken after %d bytes: %v", k, err)
	}
	unbroken = watched.Load() > 0
	s := d.Stats()
	if unbroken && (s.Reconnects == 1) != second || s.Reconnects > 2 || s.InFlight != 0 {
		t.Errorf("broken after %d bytes: %+v", k, s)
	}
	return unbroken
}

func with(c Config, change ...func(*Config)) Config {
	for _, f := range change {
		f(&c)
	}
	return c
}

// TestOneOfSeveral has one connection break again and again while the others work.
func TestOneOfSeveral(t *testing.T) {
	const size = 1 << 20
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	f := &fake{size: size, flags: fakeFlags, serve: memory(make([]byte, size))}
	f.wrap = func(number int, c net.Conn) net.Conn {
		if number < 3 && number != 1 {
			return c
		}
		return newBrittle(c, 400+random.Int64N(400<<10))
	}
	f.start(t)
	d := f.open(t, faithful, func(c *Config) { c.Connections = 3 })
	devicetest.Disjoint(t, d, 6, 150)
	if s := d.Stats(); s.Reconnects == 0 || s.LastError == nil || s.Failed != nil {
		t.Errorf("nothing broke: %+v", s)
	}
}

// TestKilledAtRandom breaks all connections again and again, and has handshakes fail.
func TestKilledAtRandom(t *testing.T) {
	const size = 2 << 20
	for _, connections := range []int{1, 4} {
		t.Run(fmt.Sprint(connections), func(t *testing.T) {
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			random := rand.New(rand.NewPCG(seed, 0))
			f := &fake{size: size, flags: fakeFlags, blockSize: []uint32{512, 4096, 32 << 10}}
			f.serve = memory(make([]byte, size))
			f.wrap = func(number int, c net.Conn) net.Conn {
				switch {
				case number < connections:
					return newBrittle(c, 600+random.Int64N(1<<20))
				case random.IntN(4) == 0:
					return newBrittle(c, random.Int64N(300))
				}
				return newBrittle(c, 300+random.Int64N(32<<20))
			}
			f.start(t)
			d := f.open(t, faithful, func(c *Config) { c.Connections = connections })
			devicetest.Disjoint(t, d, 4, 200)
			if s := d.Stats(); s.Reconnects == 0 || s.Failed != nil {
				t.Errorf("%+v", s)
			}
		})
	}
}

// script of connections: each has a serve function of its own; the last one serves all that follow.
func inTurn(f *fake, serve ...func(s *session)) {
	var next atomic.Int64
	f.serve = func(s *session) { serve[min(int(next.Add(1)), len(serve))-1](s) }
}

// until serves the requests that are expected, and hangs up when gate is closed: an answer that the client has not taken
// note of when the connection is lost does not count.
func until(gate <-chan struct{}, p []byte, commands ...uint16) func(s *session) {
	return func(s *session) {
		defer func() { <-gate }()
		for _, command := range commands {
			r := s.next()
			if r == nil || r.command != command {
				panic(fmt.Sprintf("request %+v came where %d was expected", r, command))
			}
			if command == cmdWrite {
				copy(p[r.offset:], r.data)
			}
			s.ok(r)
		}
	}
}

// TestFlushAfterLoss is what a flush promises once a connection has been lost.
func TestFlushAfterLoss(t *testing.T) {
	write := func(d *Device) error { return block.Write(d, make([]byte, 512), 0) }
	durable := func(d *Device) error { return block.Do(d, block.OpWrite, block.FUA, 0, 512, make([]byte, 512)) }
	trim := func(d *Device) error { return block.Do(d, block.OpDiscard, 0, 0, 512, nil) }
	const all = 1 | flagFlush | flagFUA | flagTrim
	tests := []struct {
		name     string
		flags    uint16
		trust    bool
		before   []func(*Device) error
		commands []uint16 // that the first connection serves before it is lost
		doubt    bool
	}{
		{"nothing written", all, false, nil, nil, false},
		{"a write", all, false, []func(*Device) error{write}, []uint16{cmdWrite}, true},
		{"a trim", all, false, []func(*Device) error{trim}, []uint16{cmdTrim}, true},
		{"a write, trusted", all, true, []func(*Device) error{write}, []uint16{cmdWrite}, false},
		{"a write that was flushed", all, false, []func(*Device) error{write, flushed},
			[]uint16{cmdWrite, cmdFlush}, false},
		{"a write after a flush", all, false, []func(*Device) error{write, flushed, write},
			[]uint16{cmdWrite, cmdFlush, cmdWrite}, true},
		{"FUA", all, false, []func(*Device) error{durable}, []uint16{cmdWrite}, false},
		{"FUA by a flush", all &^ flagFUA, false, []func(*Device) error{durable}, []uint16{cmdWrite, cmdFlush}, false},
		{"a write that was FUA's", all, false, []func(*Device) error{write, durable}, []uint16{cmdWrite, cmdWrite}, true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			p := make([]byte, 4096)
			f := &fake{size: 4096, flags: test.flags, simple: true}
			answered := make(chan struct{})
			inTurn(f, until(answered, p, test.commands...), memory(p))
			f.start(t)
			events := make(chan Event, 10)
			d := f.open(t, patient, func(c *Config) {
				c.KeepsWrites = test.trust
				c.OnEvent = func(e Event) { events <- e }
			})
			for _, step := range test.before {
				if err := step(d); err != nil {
					t.Error(err)
				}
			}
			close(answered)
			lost, back := <-events, <-events
			if lost.Kind != ConnectionLost || lost.Err == nil || back.Kind != ConnectionBack || back.Attempts < 1 {
				t.Errorf("events %+v, %+v", lost, back)
			}
			if err := block.Read(d, make([]byte, 512), 0); err != nil {
				t.Error(err)
			}
			err := block.Flush(d)
			if !test.doubt {
				if err := errors.Join(err, write(d), block.Flush(d)); err != nil {
					t.Error(err)
				}
				return
			}
			for _, err := range []error{err, write(d), block.Flush(d)} {
				wantErrno(t, err, syscall.EIO)
				wantText(t, err, "1 writes that the NBD server acknowledged")
			}
			if e := <-events; e.Kind != WritesInDoubt || d.Stats().Doubt == nil || lost.Unflushed != 1 {
				t.Errorf("events %+v, %+v", lost, e)
			}
			if err := block.Read(d, make([]byte, 512), 0); err != nil {
				t.Errorf("a read while writes are in doubt: %v", err)
			}
		})
	}
}

func flushed(d *Device) error { return block.Flush(d) }

// TestWitness is a flush of a device with two connections of which one was lost.
func TestWitness(t *testing.T) {
	const size = 4096
	write := func(d *Device, queue block.Queue) error {
		w := newCollector()
		r := &block.Request{Op: block.OpWrite, Queue: queue, Length: 512, Data: make([]byte, 512)}
		r.Push(w)
		d.Submit(r)
		return w.wait(t, 1)[r]
	}
	tests := []struct {
		name  string
		lose  []int // connections, one after the other; each comes back before the next is lost
		doubt bool
	}{
		{"the writer", []int{0}, false},
		{"the other", []int{1}, false},
		{"both", []int{0, 1}, true},
		{"the same twice", []int{0, 0}, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f := &fake{size: size, flags: fakeFlags, simple: true, serve: memory(make([]byte, size))}
			accepted := make(chan net.Conn, 10)
			f.wrap = func(_ int, c net.Conn) net.Conn { accepted <- c; return c }
			f.start(t)
			events := make(chan Event, 10)
			d := f.open(t, patient, func(c *Config) {
				c.Connections = 2
				c.OnEvent = func(e Event) { events <- e }
			})
			streams := []net.Conn{<-accepted, <-accepted}
			if err := write(d, 0); err != nil {
				t.Fatal(err)
			}
			for _, number := range test.lose {
				_ = streams[number].Close()
				for e := range events {
					if e.Kind == ConnectionBack {
						break
					}
				}
				streams[number] = <-accepted
			}
			for range 2 {
				if err := block.Flush(d); (err != nil) != test.doubt {
					t.Errorf("flush: %v", err)
				}
			}
		})
	}
}

// TestLateAcknowledgement: a write that is answered before its batch is out does not count when the connection is lost
// in between: the flush of a younger connection, which heard of the loss before, would cover it without knowing of it.
func TestLateAcknowledgement(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	for _, up := range []bool{true, false} {
		e := export{size: 1 << 20, flags: flagFlush, logicalBlock: 512, partMax: partMax}
		d := &Device{config: Config{ReconnectTimeout: time.Minute}, export: e}
		c := newConn(d, 0, near, e)
		d.conns = []*conn{c}
		r := &block.Request{Op: block.OpWrite, Length: 512, Data: make([]byte, 512)}
		c.mu.Lock()
		c.freeLen--
		s := &c.slots[c.free[c.freeLen]]
		c.loadLocked(s, r)
		c.inflight++
		s.state, c.up = slotAnswered, up
		c.out.batch = append(c.out.batch, s)
		c.nextBatchLocked()
		c.mu.Unlock()
		if up && (len(c.out.early) != 1 || d.acked() != 1) {
			t.Errorf("an answer in time: %d settled, %d acknowledged", len(c.out.early), d.acked())
		}
		if !up && (len(c.out.early) != 0 || d.acked() != 0 || s.state != slotSent || s.request != r) {
			t.Errorf("an answer too late: %d settled, %d acknowledged, state %d", len(c.out.early), d.acked(), s.state)
		}
	}
}

// TestFlushMoves has the connection that a flush was sent on break: the other one has to answer for it.
func TestFlushMoves(t *testing.T) {
	p := make([]byte, 4096)
	f := &fake{size: 4096, flags: fakeFlags, simple: true}
	inTurn(f, func(s *session) {
		s.ok(s.next())
		s.next() // the flush, which is lost
	}, memory(p), func(s *session) { s.net.Close() })
	f.start(t)
	d := f.open(t, patient, func(c *Config) { c.Connections = 2 })
	if err := errors.Join(block.Write(d, make([]byte, 512), 0), block.Flush(d)); err != nil {
		t.Error(err)
	}
}

// TestPartsBeginAgain has a server lose the first part of a write, which it had acknowledged, with the connection: the
// next one must get all of it.
func TestPartsBeginAgain(t *testing.T) {
	for _, flags := range []uint16{fakeFlags, fakeFlags &^ flagFUA} {
		kept := make([]byte, 8192)
		f := &fake{size: 8192, flags: flags, simple: true, blockSize: []uint32{512, 4096, 4096}}
		inTurn(f, func(s *session) {
			s.ok(s.next())
			s.next() // the second part, which is lost
		}, memory(kept))
		d := f.start(t).open(t, patient)
		want := bytes.Repeat([]byte{7}, 8192)
		err := block.Do(d, block.OpWrite, block.FUA, 0, 8192, want)
		if err := errors.Join(err, block.Flush(d)); err != nil {
			t.Error(err)
		}
		f.change(func() {})
		if !bytes.Equal(kept, want) {
			t.Errorf("flags %#x: a part is missing", flags)
		}
	}
}

// TestSilence has a server take requests and say nothing.
func TestSilence(t *testing.T) {
	p := bytes.Repeat([]byte{7}, 4096)
	silent := func(late bool) func(s *session) {
		return func(s *session) {
			r := s.next()
			if s.next() != nil { // until the client sends no more
				panic("a request on a connection that was lost")
			}
			if late {
				s.ok(r)
				s.send(p[:r.length])
			}
		}
	}
	for _, late := range []bool{false, true} {
		t.Run(fmt.Sprintf("late %v", late), func(t *testing.T) {
			f := &fake{size: 4096, flags: fakeFlags, simple: true}
			again := make(chan struct{})
			inTurn(f, silent(late), func(s *session) {
				if late {
					<-again // the reply that came late is all there is
				}
				memory(p)(s)
			})
			f.start(t)
			d := f.open(t, patient, func(c *Config) { c.RequestTimeout = 20 * time.Millisecond })
			got := make([]byte, 512)
			if err := block.Read(d, got, 0); err != nil || got[0] != 7 {
				t.Errorf("%d, %v", got[0], err)
			}
			close(again)
			wantText(t, d.Stats().LastError, "silent for 20ms")
		})
	}
	t.Run("without another try", func(t *testing.T) {
		f := &fake{size: 4096, flags: fakeFlags, simple: true}
		inTurn(f, silent(false))
		d := f.start(t).open(t, func(c *Config) { c.RequestTimeout = 20 * time.Millisecond })
		err := block.Read(d, make([]byte, 512), 0)
		wantErrno(t, err, syscall.EIO)
		wantText(t, err, "silent for 20ms")
	})
}

// TestShutdownAnew has a server announce its end: what it refuses goes to the next connection.
func TestShutdownAnew(t *testing.T) {
	p := make([]byte, 4096)
	f := &fake{size: 4096, flags: fakeFlags}
	inTurn(f, func(s *session) {
		a, b := s.next(), s.next()
		s.chunk(a, replyFlagDone, chunkError, uint32(syscall.ESHUTDOWN), uint16(0))
		s.chunk(b, replyFlagDone, chunkData, b.offset, bytes.Repeat([]byte{7}, int(b.length))) // may end
		if s.next() != nil {
			t.Error("another request came")
		}
	}, memory(p))
	d := f.start(t).open(t, patient)
	done := newCollector()
	a := done.submit(d, block.OpWrite, 0, 0, bytes.Repeat([]byte{1}, 512))
	b := done.submit(d, block.OpRead, 0, 512, make([]byte, 512))
	errs := done.wait(t, 2)
	if errs[a] != nil || errs[b] != nil || b.Data[0] != 7 || p[0] != 1 {
		t.Errorf("%v, %v, %d, %d", errs[a], errs[b], b.Data[0], p[0])
	}
}

// TestAwayTooLong has the server go for good.
func TestAwayTooLong(t *testing.T) {
	tests := []struct {
		name   string
		change func(f *fake)
		want   string
	}{
		{"nobody listens", func(f *fake) { _ = f.listener.Close() }, "connect: "},
		{"nobody answers", func(f *fake) {
			f.greet = func(s *session) bool { _, _ = s.in.ReadByte(); return false }
		}, "deadline"},
		{"hangs up at once", func(f *fake) { f.greet = func(*session) bool { return false } }, "EOF"},
		{"hangs up after the handshake", func(f *fake) { f.serve = func(*session) {} }, "hung up"},
		{"no such export", func(f *fake) {
			f.answer = func(s *session, option uint32, _ []byte) bool {
				if option == optGo {
					s.reply(option, repErrUnknown)
				}
				return option == optGo
			}
		}, "no such export"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f := &fake{size: 4096, flags: fakeFlags}
			f.serve = func(s *session) {
				s.next()
				f.change(func() { test.change(f) }) // before the client can know
			}
			f.start(t)
			failed := make(chan Event, 1)
			d := f.open(t, func(c *Config) {
				c.ReconnectTimeout = 60 * time.Millisecond
				c.OnEvent = func(e Event) {
					if e.Kind == DeviceFailed {
						failed <- e
					}
				}
			})
			for range 2 {
				err := block.Write(d, make([]byte, 512), 0)
				wantErrno(t, err, syscall.EIO)
				wantText(t, err, "it did not come back in 60ms")
				wantText(t, err, test.want)
			}
			wantText(t, (<-failed).Err, test.want)
			if s := d.Stats(); s.Failed == nil || s.Live != 0 || s.InFlight != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// TestPoison is a request that the server dies of, again and again.
func TestPoison(t *testing.T) {
	f := &fake{size: 4096, flags: fakeFlags, simple: true}
	f.serve = func(s *session) {
		for r := s.next(); r != nil && r.command != cmdTrim; r = s.next() {
			s.ok(r)
		}
	}
	d := f.start(t).open(t, faithful)
	d.pauseMax = pauseMin
	err := block.Do(d, block.OpDiscard, 0, 0, 512, nil)
	wantErrno(t, err, syscall.EIO)
	wantText(t, err, "16 times while this request waited")
	if err := block.Flush(d); err != nil {
		t.Error(err)
	}
}

// TestCloseWhileAway closes a device whose server has gone: what waits fails at once.
func TestCloseWhileAway(t *testing.T) {
	f := &fake{size: 4096, flags: fakeFlags}
	f.serve = func(s *session) {
		s.next()
		_ = f.listener.Close()
	}
	f.start(t)
	d, err := Open(context.Background(), with(f.config(), func(c *Config) { c.ReconnectTimeout = time.Hour }))
	if err != nil {
		t.Fatal(err)
	}
	done := newCollector()
	const count = depth + 10
	for i := range count {
		done.submit(d, block.Op(i%2), 0, 0, make([]byte, 512))
	}
	f.done.Wait()
	begun := time.Now()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(begun); took > closeLimit/2 {
		t.Errorf("it took %v", took)
	}
	for _, err := range done.wait(t, count) {
		wantErrno(t, err, syscall.ESHUTDOWN)
	}
}

// TestAnotherExport has the server come back with something else.
func TestAnotherExport(t *testing.T) {
	was := export{size: 1 << 20, flags: fakeFlags, logicalBlock: 512, allocation: true}
	tests := []struct {
		name        string
		change      func(e *export)
		connections int
		want        string // "": it will do
	}{
		{"the same", func(*export) {}, 2, ""},
		{"another context", func(e *export) { e.context, e.structured = 9, true }, 2, ""},
		{"smaller blocks", func(e *export) { e.logicalBlock, e.partMax = 1, 4096 }, 2, ""},
		{"no FUA", func(e *export) { e.flags &^= flagFUA }, 2, ""},
		{"no block status", func(e *export) { e.allocation = false }, 2, ""},
		{"one connection is enough", func(e *export) { e.flags &^= flagMultiConn }, 1, ""},
		{"size", func(e *export) { e.size += 512 }, 2, "it had 1048576 bytes, and has 1049088 now"},
		{"read-only", func(e *export) { e.flags |= flagReadOnly }, 2, "read-only"},
		{"blocks", func(e *export) { e.logicalBlock = 4096 }, 2, "its minimum block was 512, and is 4096 now"},
		{"no flush", func(e *export) { e.flags &^= flagFlush }, 2, "durable"},
		{"no trim", func(e *export) { e.flags &^= flagTrim }, 2, "trim"},
		{"no zeroes", func(e *export) { e.flags &^= flagWriteZeroes }, 2, "zeroes"},
		{"no several connections", func(e *export) { e.flags &^= flagMultiConn }, 2, "agree"},
	}
	for _, test := range tests {
		e := was
		test.change(&e)
		err := e.replaces(&was, test.connections)
		if test.want == "" {
			if err != nil {
				t.Errorf("%s: %v", test.name, err)
			}
			continue
		}
		wantText(t, err, test.want)
	}
	f := &fake{size: 4096, flags: fakeFlags}
	f.serve = func(s *session) {
		s.next()
		f.change(func() { f.size = 8192 })
	}
	err := block.Write(f.start(t).open(t, patient), make([]byte, 512), 0)
	wantErrno(t, err, syscall.EIO)
	if !strings.Contains(err.Error(), "came back with another export: it had 4096 bytes, and has 8192 now") {
		t.Error(err)
	}
}

// TestStatusLost has the server come back without block status, when a query is in flight and when none is: all is data
// then, and the device lives on.
func TestStatusLost(t *testing.T) {
	for _, simple := range []bool{false, true} { // it may have lost structured replies with it
		for _, inFlight := range []bool{false, true} {
			t.Run(fmt.Sprintf("simple=%v,inFlight=%v", simple, inFlight), func(t *testing.T) {
				const size = 64 << 10
				first, ask := true, make(chan struct{})
				f := &fake{size: size, flags: fakeFlags}
				serve := memory(make([]byte, size))
				f.serve = func(s *session) {
					again := false
					f.change(func() { first, again = false, !first })
					if again {
						serve(s)
						return
					}
					if inFlight {
						if r := s.next(); r.command != cmdBlockStatus {
							t.Errorf("command %d instead of block status", r.command)
						}
					}
					f.change(func() { f.noContext, f.simple = true, simple })
					_ = s.net.Close()
					close(ask)
				}
				d := f.start(t).open(t, patient)
				if !inFlight {
					<-ask
					if err := block.Read(d, make([]byte, 512), 0); err != nil { // over the next connection
						t.Fatal(err)
					}
				}
				for range 2 {
					var got []block.Extent
					err := d.Extents(512, size-1024, func(e block.Extent) bool { got = append(got, e); return true })
					if want := (block.Extent{Offset: 512, Length: size - 1024}); err != nil || len(got) != 1 || got[0] != want {
						t.Errorf("extents %+v, %v, want %+v", got, err, want)
					}
				}
				if err := block.Flush(d); err != nil {
					t.Error(err)
				}
			})
		}
	}
}
