package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cowherd/block"
	"cowherd/internal/invariant"
)

// noise is n bytes that are not zero where they begin.
func noise(n int) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(p) // never fails
	p[0] = 1
	return p
}

// openRelay opens a relay until the test ends.
func openRelay(t testing.TB, from, to *Device) block.Relay {
	t.Helper()
	r, err := to.OpenRelay(t.Context(), from, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// pass relays one range.
func pass(r block.Relay, offset, length int64) error {
	return r.Move(offset, length, func([]byte) []byte { return nil })
}

// TestRelayForeign relays ranges of all sizes between other people's servers.
func TestRelayForeign(t *testing.T) {
	const size = 8 << 20
	image := func(t *testing.T) string {
		path := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	servers := map[string]func(t *testing.T) string{
		"memory": func(t *testing.T) string {
			socket, _ := nbdkit(t, "memory", "8M")
			return "nbd+unix:///?socket=" + socket
		},
		"file": func(t *testing.T) string {
			socket, _ := nbdkit(t, "file", image(t))
			return "nbd+unix:///?socket=" + socket
		},
		"qemu": func(t *testing.T) string {
			socket, _ := spawn(t, "qemu-nbd", "-f", "raw", "-t", "-e", "8", "-x", "disk", "-k", "SOCKET", image(t))
			return "nbd+unix:///disk?socket=" + socket
		},
	}
	for _, pair := range [][2]string{{"memory", "file"}, {"file", "memory"}, {"qemu", "file"}, {"file", "qemu"}} {
		t.Run(pair[0]+" to "+pair[1], func(t *testing.T) {
			from, to := connectTo(t, servers[pair[0]](t), 2), connectTo(t, servers[pair[1]](t), 2)
			content := noise(size)
			if err := block.Write(from, content, 0); err != nil {
				t.Fatal(err)
			}
			r := openRelay(t, from, to)
			at := int64(0)
			for _, length := range []int64{4096, 4608, 8192, 65536, 256 << 10, 300 << 10, 1 << 20, 1<<20 - 512, 1 << 20} {
				var p []byte
				err := r.Move(at, length, func(head []byte) []byte {
					if !bytes.Equal(head, content[at:at+4096]) {
						t.Errorf("%d bytes at %d begin with something else", length, at)
					}
					if length == 65536 {
						p = make([]byte, length)
					}
					return p
				})
				if err != nil {
					t.Fatal(err)
				}
				if p != nil {
					if !bytes.Equal(p, content[at:at+length]) {
						t.Error("another content was taken")
					}
					clear(content[at : at+length]) // the destination has nothing of it
				}
				at += length
			}
			var all sync.WaitGroup
			for range 3 { // side by side
				start := at
				all.Go(func() {
					for i := range int64(4) {
						if err := pass(r, start+i*65536, 65536); err != nil {
							t.Error(err)
						}
					}
				})
				at += 4 * 65536
			}
			all.Wait()
			clear(content[at:])
			got := make([]byte, size)
			if err := block.Read(to, got, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, content) {
				t.Error("another content")
			}
		})
	}
	t.Run("qemu that takes one client", func(t *testing.T) {
		socket, _ := spawn(t, "qemu-nbd", "-f", "raw", "-t", "-x", "disk", "-k", "SOCKET", image(t))
		from, to := connectTo(t, "nbd+unix:///disk?socket="+socket, 1), connectTo(t, servers["memory"](t), 1)
		_, err := to.OpenRelay(t.Context(), from, 1<<20)
		wantErrno(t, err, syscall.ENOTSUP)
		_, err = from.OpenRelay(t.Context(), to, 1<<20)
		wantErrno(t, err, syscall.ENOTSUP)
	})
}

// TestRelayRefused: pairs that there is no relay for.
func TestRelayRefused(t *testing.T) {
	serve := memory(make([]byte, 1<<20))
	good := (&fake{size: 1 << 20, flags: fakeFlags, serve: serve}).start(t).open(t)
	for _, test := range []struct {
		name string
		fake *fake
	}{
		{"no MULTI_CONN", &fake{size: 1 << 20, flags: fakeFlags &^ flagMultiConn, serve: serve}},
		{"short requests", &fake{size: 1 << 20, flags: fakeFlags, blockSize: []uint32{1, 4096, 512 << 10}, serve: serve}},
	} {
		t.Run(test.name, func(t *testing.T) {
			other := test.fake.start(t).open(t)
			_, err := good.OpenRelay(t.Context(), other, 1<<20)
			wantErrno(t, err, syscall.ENOTSUP)
			_, err = other.OpenRelay(t.Context(), good, 1<<20)
			wantErrno(t, err, syscall.ENOTSUP)
		})
	}
	t.Run("read-only", func(t *testing.T) {
		other := (&fake{size: 1 << 20, flags: fakeFlags | flagReadOnly, serve: serve}).start(t).open(t)
		_, err := other.OpenRelay(t.Context(), good, 1<<20)
		wantErrno(t, err, syscall.ENOTSUP)
	})
	t.Run("TLS", func(t *testing.T) {
		dir := directory(t)
		socket, _ := nbdkit(t, "--tls=require", "--tls-certificates="+dir, "--tls-verify-peer", "memory", "2M")
		other := connectTo(t, "nbds+unix:///?socket="+socket+"&tls-certificates="+dir, 2)
		_, err := good.OpenRelay(t.Context(), other, 1<<20)
		wantErrno(t, err, syscall.ENOTSUP)
		_, err = other.OpenRelay(t.Context(), good, 1<<20)
		wantErrno(t, err, syscall.ENOTSUP)
	})
	t.Run("another kind of device", func(t *testing.T) {
		_, err := good.OpenRelay(t.Context(), nil, 1<<20)
		wantErrno(t, err, syscall.ENOTSUP)
	})
	t.Run("another export by now", func(t *testing.T) {
		f := (&fake{size: 1 << 20, flags: fakeFlags, serve: serve}).start(t)
		other := f.open(t)
		f.change(func() { f.size = 2 << 20 })
		_, err := good.OpenRelay(t.Context(), other, 1<<20)
		wantErrno(t, err, syscall.ESTALE)
	})
	t.Run("nobody lets it in", func(t *testing.T) {
		f := (&fake{size: 1 << 20, flags: fakeFlags, serve: serve}).start(t)
		other := f.open(t)
		f.change(func() { f.greet = func(s *session) bool { _, _ = s.in.ReadByte(); return false } })
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		if _, err := good.OpenRelay(ctx, other, 1<<20); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}

// cut is a connection of a fake that ends after so many bytes that it sends or receives.
type cut struct {
	net.Conn
	reads, writes int64 // -1: any number
}

func (c *cut) Read(p []byte) (int, error) {
	if c.reads == 0 {
		_ = c.Close()
		return 0, io.EOF
	}
	if c.reads > 0 && int64(len(p)) > c.reads {
		p = p[:c.reads]
	}
	n, err := c.Conn.Read(p)
	if c.reads > 0 {
		c.reads -= int64(n)
	}
	return n, err
}

func (c *cut) Write(p []byte) (int, error) {
	if c.writes < 0 || int64(len(p)) < c.writes {
		if c.writes > 0 {
			c.writes -= int64(len(p))
		}
		return c.Conn.Write(p)
	}
	n, _ := c.Conn.Write(p[:c.writes])
	_ = c.Close()
	return n, io.ErrClosedPipe
}

// TestRelayCut has each server hang up at every byte that it sends or receives. What was passed is there.
func TestRelayCut(t *testing.T) {
	const size = 4600 // more than what is received with the header
	content := noise(size)
	step := int64(1)
	if invariant.Enabled || testing.Short() {
		step = 29 // the race detector is slow
	}
	for _, test := range []struct {
		name          string
		source, reads bool
		most          int64
	}{
		{"source sends", true, false, 400 + simpleSize + size},
		{"source receives", true, true, 200 + requestSize},
		{"destination sends", false, false, 400 + simpleSize},
		{"destination receives", false, true, 200 + requestSize + size},
	} {
		t.Run(test.name, func(t *testing.T) {
			var at atomic.Int64
			wrap := func(number int, c net.Conn) net.Conn {
				if number == 0 { // the device's own
					return c
				}
				if test.reads {
					return &cut{c, at.Load(), -1}
				}
				return &cut{c, -1, at.Load()}
			}
			target := make([]byte, size)
			source := &fake{size: size, flags: fakeFlags, serve: memory(content), blockSize: []uint32{1, 4096, 1 << 20}}
			destination := &fake{size: size, flags: fakeFlags, serve: memory(target), blockSize: []uint32{1, 4096, 1 << 20}}
			if test.source {
				source.wrap = wrap
			} else {
				destination.wrap = wrap
			}
			from, to := source.start(t).open(t), destination.start(t).open(t)
			passed := 0
			for n := int64(1); n < test.most; n += step {
				at.Store(n)
				if err := block.Write(to, make([]byte, size), 0); err != nil {
					t.Fatal(err)
				}
				r, err := to.OpenRelay(t.Context(), from, size)
				if err != nil {
					continue
				}
				err = pass(r, 0, size)
				if err := r.Close(); err != nil {
					t.Error(err)
				}
				if err != nil {
					continue
				}
				passed++
				got := make([]byte, size)
				if err := block.Read(to, got, 0); err != nil || !bytes.Equal(got, content) {
					t.Fatalf("cut at %d: it was passed and is not there, %v", n, err)
				}
			}
			if passed == 0 || passed > 700 {
				t.Errorf("%d of %d went through", passed, test.most)
			}
		})
	}
}

// TestRelayAnswers: servers that answer something else.
func TestRelayAnswers(t *testing.T) {
	const size = 1 << 20
	answer := func(parts func(r *wireRequest) []any) func(s *session) {
		return func(s *session) {
			for r := s.next(); r != nil; r = s.next() {
				s.send(parts(r)...)
			}
		}
	}
	bad := map[string]struct {
		serve func(s *session)
		want  syscall.Errno
		text  string
	}{
		"error": {answer(func(r *wireRequest) []any { return []any{uint32(magicSimple), uint32(28), r.cookie} }), syscall.ENOSPC, "no space"},
		"cookie": {answer(func(r *wireRequest) []any {
			return []any{uint32(magicSimple), uint32(0), r.cookie + 1, string(make([]byte, size))}
		}), 0, "cookie 0x2"},
		"magic": {answer(func(r *wireRequest) []any { return []any{uint32(magicStructured), uint32(0), r.cookie, uint32(0)} }), 0, "begins with 0x668e33ef"},
	}
	for name, test := range bad {
		for _, side := range []string{"source", "destination"} {
			t.Run(side+" "+name, func(t *testing.T) {
				good := &fake{size: size, flags: fakeFlags, serve: memory(noise(size))}
				other := &fake{size: size, flags: fakeFlags, serve: test.serve}
				from, to := good, other
				if side == "source" {
					from, to = other, good
				}
				r := openRelay(t, from.start(t).open(t), to.start(t).open(t))
				err := pass(r, 0, 65536)
				wantText(t, err, test.text)
				if test.want != 0 && !errors.Is(err, test.want) {
					t.Errorf("got %v, want %v", err, test.want)
				}
			})
		}
	}
}

// TestRelayStalls: a server that takes or sends nothing more, which ctx or the time limit ends.
func TestRelayStalls(t *testing.T) {
	const size = 8 << 20
	for _, side := range []string{"source", "destination"} {
		for _, how := range []string{"ctx", "timeout"} {
			t.Run(side+" "+how, func(t *testing.T) {
				reached, release := make(chan struct{}, 1), make(chan struct{})
				stall := func(s *session) {
					if s.header() != nil {
						reached <- struct{}{}
						<-release
					}
				}
				good := &fake{size: size, flags: fakeFlags, serve: memory(noise(size))}
				bad := &fake{size: size, flags: fakeFlags, serve: stall}
				from, to := good, bad
				if side == "source" {
					from, to = bad, good
				}
				timeout := func(c *Config) {
					if how == "timeout" {
						c.RequestTimeout = 20 * time.Millisecond
					}
				}
				ctx, cancel := context.WithCancel(t.Context())
				d := to.start(t).open(t)
				r, err := d.OpenRelay(ctx, from.start(t).open(t, timeout), size)
				if err != nil {
					t.Fatal(err)
				}
				r.(*relay).linger = 20 * time.Millisecond
				if how == "ctx" {
					go func() {
						<-reached
						cancel()
					}()
				}
				if err := pass(r, 0, size); err == nil {
					t.Error("it went through")
				}
				cancel()
				if err := r.Close(); err != nil {
					t.Error(err)
				}
				if err := pass(r, 0, 4096); err == nil {
					t.Error("a relay that is closed works")
				}
				close(release)
			})
		}
	}
}

// TestRelayAbandons: a write that was begun is over, one way or the other, when the relay is closed.
func TestRelayAbandons(t *testing.T) {
	const size = 65536
	var over atomic.Bool
	serve := func(s *session) {
		if s.header() == nil { // the device's own
			return
		}
		_, _ = io.Copy(io.Discard, s.in) // the client hangs up without a farewell
		time.Sleep(5 * time.Millisecond) // it takes a while to do the write
		over.Store(true)
	}
	broken := func(s *session) {
		if r := s.next(); r != nil {
			s.ok(r)
			s.send(make([]byte, size/2))
		}
	}
	source := &fake{size: size, flags: fakeFlags, serve: broken}
	destination := &fake{size: size, flags: fakeFlags, serve: serve}
	from, to := source.start(t).open(t), destination.start(t).open(t)
	r, err := to.OpenRelay(t.Context(), from, size)
	if err != nil {
		t.Fatal(err)
	}
	if err := pass(r, 0, size); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %v", err)
	}
	if err := r.Close(); err != nil || !over.Load() {
		t.Errorf("closed while the server is at it, %v", err)
	}
}

// TestRelayFlush: what was passed counts as written, and nothing counts that another server may not have.
func TestRelayFlush(t *testing.T) {
	const size = 1 << 20
	var mu sync.Mutex
	var own net.Conn // the device's
	destination := &fake{size: size, flags: fakeFlags, serve: memory(make([]byte, size)), wrap: func(number int, c net.Conn) net.Conn {
		mu.Lock()
		defer mu.Unlock()
		if number == 0 {
			own = c
		}
		return c
	}}
	back := make(chan struct{}, 1)
	to := destination.start(t).open(t, func(c *Config) {
		c.ReconnectTimeout = 10 * time.Second
		c.OnEvent = func(e Event) {
			if e.Kind == ConnectionBack {
				back <- struct{}{}
			}
		}
	})
	from := (&fake{size: size, flags: fakeFlags, serve: memory(noise(size))}).start(t).open(t)
	r := openRelay(t, from, to)
	flush := func() error {
		done := newCollector()
		x := done.submit(to, block.OpFlush, 0, 0, nil)
		return done.wait(t, 1)[x]
	}
	if err := pass(r, 0, 65536); err != nil || to.Stats().Unflushed != 1 {
		t.Fatalf("%v, %+v", err, to.Stats())
	}
	if err := flush(); err != nil || to.Stats().Unflushed != 0 {
		t.Fatalf("%v, %+v", err, to.Stats())
	}
	if err := pass(r, 0, 65536); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	_ = own.Close()
	mu.Unlock()
	<-back
	wantText(t, pass(r, 65536, 65536), "lost meanwhile")
	wantErrno(t, flush(), syscall.EIO) // the second one may be gone
	if err := pass(r, 0, 65536); err == nil {
		t.Error("a relay that has broken works")
	}
}

// TestRelayLeaks counts descriptors.
func TestRelayLeaks(t *testing.T) {
	const size = 65536
	from := (&fake{size: size, flags: fakeFlags, serve: memory(noise(size))}).start(t)
	to := (&fake{size: size, flags: fakeFlags, serve: memory(make([]byte, size))}).start(t)
	a, b := from.open(t), to.open(t)
	before := descriptors(t)
	for i := range 30 {
		r, err := b.OpenRelay(t.Context(), a, size)
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 1 {
			err = pass(r, 0, size)
		}
		if err := errors.Join(err, r.Close()); err != nil {
			t.Fatal(err)
		}
	}
	for deadline := time.Now().Add(10 * time.Second); descriptors(t) > before; { // the fakes close theirs, too
		if time.Now().After(deadline) {
			t.Fatalf("%d descriptors are open, %d were", descriptors(t), before)
		}
		time.Sleep(time.Millisecond)
	}
}

func descriptors(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip(err)
	}
	return len(list)
}

// BenchmarkRelay moves 1 MiB at a time, one relay, between two nbdkits in memory.
func BenchmarkRelay(b *testing.B) {
	for _, length := range []int64{256 << 10, 1 << 20} {
		b.Run(fmt.Sprint(length>>10, "KiB"), func(b *testing.B) {
			var ends [2]*Device
			for i := range ends {
				socket, _ := nbdkit(b, "memory", "64M")
				ends[i] = connectTo(b, "nbd+unix:///?socket="+socket, 1)
			}
			if err := block.Write(ends[0], noise(64<<20), 0); err != nil {
				b.Fatal(err)
			}
			r := openRelay(b, ends[0], ends[1])
			b.SetBytes(length)
			b.ReportAllocs()
			at := int64(0)
			for b.Loop() {
				if err := pass(r, at, length); err != nil {
					b.Fatal(err)
				}
				at = (at + length) % (64 << 20)
			}
		})
	}
}
