package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cowherd/block"
)

func TestHandshake(t *testing.T) {
	const size = 1 << 20
	refuse := func(which, reply uint32) func(*session, uint32, []byte) bool {
		return func(s *session, option uint32, _ []byte) bool {
			if option == which {
				s.reply(option, reply)
			}
			return option == which
		}
	}
	greeting := func(flags uint16) func(*session) bool {
		return func(s *session) bool {
			s.send(uint64(magicInit), uint64(magicOption), flags)
			return true
		}
	}
	tests := []struct {
		name       string
		fake       *fake
		structured bool
		allocation bool
	}{
		{"everything", &fake{}, true, true},
		{"no structured replies", &fake{simple: true}, false, false},
		{"no context", &fake{noContext: true}, true, false},
		{"no context chosen", &fake{answer: func(s *session, option uint32, _ []byte) bool {
			if option == optSetMetaContext {
				s.reply(option, repAck)
			}
			return option == optSetMetaContext
		}}, true, false},
		{"context withdrawn", &fake{answer: func(s *session, option uint32, _ []byte) bool {
			if option == optSetMetaContext {
				s.reply(option, repMetaContext, uint32(1), contextAllocation)
				s.reply(option, repErrInvalid)
			}
			return option == optSetMetaContext
		}}, true, false},
		{"no GO", &fake{answer: refuse(optGo, repErrUnsupported)}, true, true},
		{"no GO, with zeroes",
			&fake{greet: greeting(handshakeFixedNewstyle), answer: refuse(optGo, repErrUnsupported)}, true, true},
		{"newstyle that is not fixed", &fake{greet: greeting(0)}, false, false},
		{"flags of the future", &fake{greet: greeting(0xffff)}, true, true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f := test.fake
			f.size, f.flags, f.serve = size, fakeFlags, memory(make([]byte, size))
			d := f.start(t).open(t)
			if d.export.structured != test.structured || d.export.allocation != test.allocation {
				t.Errorf("structured %v, allocation %v", d.export.structured, d.export.allocation)
			}
			model(t, d, 4, 20)
		})
	}
}

func TestHandshakeErrors(t *testing.T) {
	answer := func(which uint32, f func(*session)) *fake {
		return &fake{answer: func(s *session, option uint32, _ []byte) bool {
			if option == which {
				f(s)
			}
			return option == which
		}}
	}
	greet := func(parts ...any) *fake {
		return &fake{greet: func(s *session) bool { s.send(parts...); return false }}
	}
	tests := []struct {
		name string
		fake *fake
		want string
		is   error
	}{
		{"not NBD", greet("SSH-2.0-OpenSSH_9.2p1 Debian-2"), "not that of an NBD server", nil},
		{"hangs up", greet(), "EOF", nil},
		{"hangs up in the greeting", greet(uint64(magicInit), uint64(magicOption)), "read the greeting", nil},
		{"oldstyle", greet(uint64(magicInit), uint64(magicOldstyle)), "oldstyle", syscall.ENOTSUP},
		{"unknown style", greet(uint64(magicInit), uint64(1)), "no known style", nil},
		{"no such export", answer(optGo, func(s *session) { s.reply(optGo, repErrUnknown, "there is no disk") }),
			`no such export (it says "there is no disk")`, syscall.ENOENT},
		{"TLS wanted", answer(optStructuredReply, func(s *session) { s.reply(optStructuredReply, repErrTLSRequired) }),
			"it requires TLS", syscall.EACCES},
		{"shutting down", answer(optSetMetaContext, func(s *session) { s.reply(optSetMetaContext, repErrShutdown) }),
			"shutting down", syscall.ESHUTDOWN},
		{"an error of the future", answer(optGo, func(s *session) { s.reply(optGo, repErrorBit+99) }),
			"0x80000063", syscall.ENOTSUP},
		{"no size", answer(optGo, func(s *session) { s.reply(optGo, repAck) }), "size was not told", nil},
		{"size of a wrong size", answer(optGo, func(s *session) { s.reply(optGo, repInfo, uint16(infoExport), uint32(0)) }),
			"information 0 has 4 bytes", nil},
		{"empty information", answer(optGo, func(s *session) { s.reply(optGo, repInfo, "x") }), "of 1 bytes", nil},
		{"a size too large", &fake{size: 1 << 63}, "larger than a device can be", syscall.EFBIG},
		{"a strange minimum", &fake{size: 1 << 20, blockSize: []uint32{513, 4096, 1 << 20}},
			"minimum block size of 513", nil},
		{"a large minimum", &fake{size: 1 << 20, blockSize: []uint32{1 << 17, 1 << 17, 1 << 20}}, "minimum block size", nil},
		{"a maximum too small", &fake{size: 1 << 20, blockSize: []uint32{512, 4096, 511}}, "maximum block size of 511", nil},
		{"a wrong magic number", answer(optGo, func(s *session) { s.send(make([]byte, 20)) }), "begins with 0x0", nil},
		{"an answer to another option", answer(optGo, func(s *session) { s.reply(99, repAck) }),
			"option 99 is answered", nil},
		{"an answer too long", answer(optGo, func(s *session) {
			s.reply(optGo, repInfo, strings.Repeat("x", optionReplyMax+1))
		}), "has 65537 bytes", nil},
		{"an answer without end", answer(optGo, func(s *session) {
			for range optionRepliesMax + 1 {
				s.reply(optGo, repInfo, uint16(9), "x")
			}
		}), "more than 256 answers", nil},
		{"an answer to structured replies", answer(optStructuredReply, func(s *session) {
			s.reply(optStructuredReply, 2, "x")
		}), "answer 0x2 to option 8", nil},
		{"a strange answer to contexts", answer(optSetMetaContext, func(s *session) { s.reply(optSetMetaContext, 4, "x") }),
			"answer 0x4 of 1 bytes", nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if test.fake.size == 0 {
				test.fake.size = 1 << 20
			}
			test.fake.flags = fakeFlags
			test.fake.start(t)
			_, err := Open(context.Background(), test.fake.config())
			wantText(t, err, test.want)
			wantText(t, err, "nbd+unix:///disk?socket=")
			if test.is != nil && !errors.Is(err, test.is) {
				t.Errorf("got error %v, want %v", err, test.is)
			}
		})
	}
}

func TestOpenErrors(t *testing.T) {
	c := Config{Network: "unix", Address: t.TempDir() + "/nobody"}
	if _, err := Open(context.Background(), c); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("no socket: %v", err)
	}
	c.Connections = connectionsMax + 1
	if _, err := Open(context.Background(), c); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("too many connections: %v", err)
	}
	c.Connections, c.Export = 1, strings.Repeat("x", stringMax+1)
	if _, err := Open(context.Background(), c); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("a long name: %v", err)
	}
	t.Run("cancelled", func(t *testing.T) {
		begun := make(chan struct{})
		f := &fake{greet: func(s *session) bool {
			close(begun)
			_, _ = s.in.ReadByte() // until the client gives up
			return false
		}}
		f.start(t)
		ctx, cancel := context.WithCancel(context.Background())
		go func() { <-begun; cancel() }()
		if _, err := Open(ctx, f.config()); !errors.Is(err, context.Canceled) {
			t.Errorf("got error %v", err)
		}
	})
	t.Run("deadline", func(t *testing.T) {
		f := &fake{greet: func(s *session) bool {
			_, _ = s.in.ReadByte()
			return false
		}}
		f.start(t)
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
		defer cancel()
		if _, err := Open(ctx, f.config()); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got error %v", err)
		}
	})
	t.Run("disagreement", func(t *testing.T) {
		f := &fake{size: 1 << 20, flags: fakeFlags}
		f.answer = func(s *session, option uint32, _ []byte) bool {
			if option == optGo {
				f.size += 512 // the second of two connections is told another size
			}
			return false
		}
		f.start(t)
		c := f.config()
		c.Connections = 2
		_, err := Open(context.Background(), c)
		wantText(t, err, "disagree")
	})
	t.Run("side by side", func(t *testing.T) {
		// All connections but the first are greeted when they are all there.
		var first atomic.Bool
		var others sync.WaitGroup
		others.Add(3)
		f := &fake{size: 1 << 20, flags: fakeFlags}
		f.greet = func(s *session) bool {
			if !first.CompareAndSwap(false, true) {
				others.Done()
				others.Wait()
			}
			s.send(uint64(magicInit), uint64(magicOption), uint16(handshakeFixedNewstyle|handshakeNoZeroes))
			return true
		}
		if d := f.start(t).open(t, func(c *Config) { c.Connections = 4 }); d.Connections() != 4 {
			t.Errorf("%d connections", d.Connections())
		}
	})
	t.Run("one of several is refused", func(t *testing.T) {
		var count atomic.Int32
		f := &fake{size: 1 << 20, flags: fakeFlags, greet: func(s *session) bool {
			if count.Add(1) == 3 {
				return false
			}
			s.send(uint64(magicInit), uint64(magicOption), uint16(handshakeFixedNewstyle|handshakeNoZeroes))
			return true
		}}
		c := f.start(t).config()
		c.Connections = 8
		if _, err := Open(context.Background(), c); err == nil || errors.Is(err, context.Canceled) {
			t.Errorf("got error %v, want that of the connection", err)
		}
	})
}

func TestTLS(t *testing.T) {
	server, client := certificates(t, "localhost")
	start := func(t *testing.T, secure *tls.Config, greet func(*session) bool) *fake {
		return (&fake{size: 1 << 20, flags: fakeFlags, tls: secure, greet: greet}).start(t)
	}
	t.Run("another name", func(t *testing.T) {
		c := start(t, server, nil).config()
		c.TLS = client.Clone()
		c.TLS.ServerName = "elsewhere"
		_, err := Open(context.Background(), c)
		wantText(t, err, "elsewhere")
	})
	t.Run("refused", func(t *testing.T) {
		c := start(t, nil, nil).config()
		c.TLS = client
		_, err := Open(context.Background(), c)
		wantText(t, err, "refuses TLS: not supported")
	})
	t.Run("too old", func(t *testing.T) {
		old := func(s *session) bool { s.send(uint64(magicInit), uint64(magicOption), uint16(0)); return true }
		c := start(t, server, old).config()
		c.TLS = client
		_, err := Open(context.Background(), c)
		wantText(t, err, "too old for TLS")
	})
}

func TestLimits(t *testing.T) {
	tests := []struct {
		name string
		fake *fake
		size int64
		want block.Limits
	}{
		{"plain", &fake{size: 1 << 20, flags: 1}, 1 << 20,
			block.Limits{LogicalBlock: 512, PreferredIO: 4096, DiscardGranularity: 4096}},
		{"odd size", &fake{size: 1<<20 + 1, flags: 1}, 1<<20 + 1,
			block.Limits{LogicalBlock: 1, PreferredIO: 4096, DiscardGranularity: 4096}},
		{"everything", &fake{size: 1 << 20, flags: fakeFlags, blockSize: []uint32{1, 65536, 0xffffffff}}, 1 << 20,
			block.Limits{LogicalBlock: 1, PreferredIO: 65536, DiscardGranularity: 65536, NeedsFlush: true,
				DiscardMax: 1<<63 - 1, WriteZeroesMax: 1<<63 - 1}},
		{"read-only, large blocks",
			&fake{size: 1<<20 + 512, flags: 1 | flagReadOnly, blockSize: []uint32{4096, 0, 1 << 20}}, 1 << 20,
			block.Limits{LogicalBlock: 4096, PreferredIO: 4096, DiscardGranularity: 4096, ReadOnly: true}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			d := test.fake.start(t).open(t, func(c *Config) { c.Connections = 2 })
			if d.Size() != test.size || d.Limits() != test.want {
				t.Errorf("got %d, %+v, want %d, %+v", d.Size(), d.Limits(), test.size, test.want)
			}
			if want := 1 + int(test.fake.flags&flagMultiConn)/flagMultiConn; d.Connections() != want {
				t.Errorf("%d connections, want %d", d.Connections(), want)
			}
		})
	}
}
