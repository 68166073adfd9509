package nbd

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"cowherd/block"
)

// bothForms runs a test with simple and with structured replies.
func bothForms(t *testing.T, test func(t *testing.T, structured bool)) {
	for _, structured := range []bool{false, true} {
		t.Run(fmt.Sprintf("structured=%v", structured), func(t *testing.T) { test(t, structured) })
	}
}

// expectRead receives a read's reply in one piece.
func (c *client) expectRead(structured bool, cookie, offset uint64, data []byte) {
	c.t.Helper()
	if structured {
		c.expectChunk(chunkFlagDone, chunkOffsetData, cookie, offset, data)
	} else {
		c.expectSimple(cookie, 0, data)
	}
}

func TestReadWrite(t *testing.T) {
	bothForms(t, func(t *testing.T, structured bool) {
		s := startServer(t, Config{}, testExport(t))
		c := s.dial()
		c.enter("disk", structured)
		c.request(cmdWrite, 0, 7, 3, 5, "hello")
		c.expectSimple(7, 0)
		c.request(cmdWrite, cmdFlagFUA, 8, 8, 5, "world")
		c.expectSimple(8, 0)
		c.request(cmdRead, cmdFlagFUA, 9, 2, 12)
		c.expectRead(structured, 9, 2, []byte("\x00helloworld\x00"))
		c.request(cmdFlush, 0, 10, 0, 0)
		c.expectSimple(10, 0)
		c.request(cmdRead, 0, 11, testSize-1, 1)
		c.expectRead(structured, 11, testSize-1, []byte{0})
		// Several in one message, the last one in two.
		all := message(uint32(magicRequest), uint16(0), uint16(cmdWrite), uint64(1), uint64(0), uint32(2), "ab",
			uint32(magicRequest), uint16(0), uint16(cmdRead), uint64(2), uint64(0), uint32(3),
			uint32(magicRequest), uint16(0), uint16(cmdWrite), uint64(3), uint64(0), uint32(4), "efgh")
		c.send(all[:len(all)-2])
		c.expectSimple(1, 0)
		c.expectRead(structured, 2, 0, []byte("ab\x00"))
		c.send(all[len(all)-2:])
		c.expectSimple(3, 0)
		c.disconnect()
	})
}

func TestZeroLength(t *testing.T) {
	bothForms(t, func(t *testing.T, structured bool) {
		s := startServer(t, Config{}, testExport(t))
		c := s.dial()
		c.enter("disk", structured)
		c.request(cmdRead, 0, 1, testSize, 0)
		if structured {
			c.expectChunk(chunkFlagDone, chunkNone, 1)
		} else {
			c.expectSimple(1, 0)
		}
		for i, number := range []uint16{cmdWrite, cmdTrim, cmdWriteZeroes, cmdCache} {
			c.request(number, 0, uint64(i), 0, 0)
			c.expectSimple(uint64(i), 0)
		}
		c.disconnect()
	})
}

// TestRefusals: each request is refused with its error, and the stream stays in step.
func TestRefusals(t *testing.T) {
	device := newFileDevice(t, testSize)
	device.limits.LogicalBlock = 512
	noTrim := *device
	noTrim.limits.DiscardMax = 0
	exports := []*Export{
		{Name: "disk", Device: device}, {Name: "ro", Device: device, ReadOnly: true}, {Name: "notrim", Device: &noTrim},
	}
	const huge = LengthMax + 512
	for _, tc := range []struct {
		export  string
		number  uint16
		flags   uint16
		offset  uint64
		length  uint32
		payload int
		want    uint32
	}{
		{"disk", 8, 0, 0, 512, 0, wireInvalid},
		{"disk", 0xffff, 0, 0, 0xffffffff, 0, wireInvalid},
		{"disk", cmdRead, cmdFlagNoHole, 0, 512, 0, wireInvalid},
		{"disk", cmdRead, 1 << 15, 0, 512, 0, wireInvalid},
		{"disk", cmdWrite, cmdFlagDF, 0, 512, 512, wireInvalid},
		{"disk", cmdTrim, cmdFlagNoHole, 0, 512, 0, wireInvalid},
		{"disk", cmdCache, cmdFlagFastZero, 0, 512, 0, wireInvalid},
		{"disk", cmdRead, 0, 1, 512, 0, wireInvalid},
		{"disk", cmdRead, 0, 0, 511, 0, wireInvalid},
		{"disk", cmdWrite, 0, 0, 100, 100, wireInvalid},
		{"disk", cmdRead, 0, testSize, 512, 0, wireInvalid},
		{"disk", cmdRead, 0, 1<<64 - 512, 1024, 0, wireInvalid},
		{"disk", cmdTrim, 0, testSize - 512, 1024, 0, wireInvalid},
		{"disk", cmdCache, 0, testSize, 512, 0, wireInvalid},
		{"disk", cmdWrite, 0, testSize, 512, 512, wireSpace},
		{"disk", cmdWrite, 0, 1<<64 - 512, 1024, 1024, wireSpace},
		{"disk", cmdWriteZeroes, 0, testSize - 512, 1024, 0, wireSpace},
		{"disk", cmdWriteZeroes, 0, 0, 0xfffffe00, 0, wireSpace},
		{"disk", cmdRead, 0, 0, huge, 0, wireInvalid},
		{"disk", cmdWrite, 0, 0, huge, huge, wireInvalid},
		{"disk", cmdFlush, 0, 512, 0, 0, wireInvalid},
		{"disk", cmdFlush, 0, 0, 512, 0, wireInvalid},
		{"disk", cmdBlockStatus, 0, 0, 512, 0, wireInvalid},
		{"ro", cmdWrite, 0, 0, 512, 512, wirePermission},
		{"ro", cmdTrim, 0, 0, 512, 0, wirePermission},
		{"ro", cmdWriteZeroes, 0, 0, 512, 0, wirePermission},
		{"notrim", cmdTrim, 0, 0, 512, 0, wireInvalid},
	} {
		bothForms(t, func(t *testing.T, structured bool) {
			s := startServer(t, Config{}, exports...)
			c := s.dial()
			c.enter(tc.export, structured)
			c.request(tc.number, tc.flags, 77, tc.offset, tc.length, make([]byte, tc.payload))
			c.expectError(structured, 77, tc.want)
			c.request(cmdRead, 0, 78, 0, 512)
			c.expectRead(structured, 78, 0, make([]byte, 512))
			c.disconnect()
		})
	}
}

// TestDFNeedsStructured: the flag is not advertised, so it is refused.
func TestDFNeedsStructured(t *testing.T) {
	s := startServer(t, Config{}, testExport(t))
	c := s.dial()
	c.enter("disk", false)
	c.request(cmdRead, cmdFlagDF, 1, 0, 512)
	c.expectSimple(1, wireInvalid)
	c.disconnect()
}

func TestOutOfStep(t *testing.T) {
	s := startServer(t, Config{}, testExport(t))
	for _, bytes := range [][]byte{
		make([]byte, requestSize),
		message(uint32(magicRequest), uint16(0), uint16(cmdRead), uint64(5), uint64(0), uint32(1), make([]byte, 28)),
	} {
		c := s.dial()
		c.enter("disk", false)
		c.send(bytes)
		if len(bytes) > requestSize {
			c.expectSimple(5, 0, "\x00")
		}
		c.expectEnd()
	}
}

// TestTruncated: a connection that ends in the middle of a header or a payload writes nothing of a small request and
// leaves nothing behind.
func TestTruncated(t *testing.T) {
	e := testExport(t)
	s := startServer(t, Config{}, e)
	for _, n := range []int{1, requestSize - 1, requestSize, requestSize + 100} {
		c := s.dial()
		c.enter("disk", false)
		b := message(uint32(magicRequest), uint16(0), uint16(cmdWrite), uint64(5), uint64(0), uint32(512),
			bytes.Repeat([]byte{1}, 512))
		c.send(b[:n])
		c.conn.Close()
	}
	large := s.dial()
	large.enter("disk", false)
	large.request(cmdWrite, 0, 5, 1024, 512<<10, bytes.Repeat([]byte{1}, 300<<10))
	large.conn.Close()
	c := s.dial()
	c.enter("disk", false)
	c.request(cmdRead, 0, 1, 0, 512)
	c.expectSimple(1, 0, make([]byte, 512))
	c.disconnect()
}

func TestLargeReadWrite(t *testing.T) {
	bothForms(t, func(t *testing.T, structured bool) {
		size := int64(40 << 20)
		e := &Export{Name: "disk", Device: newFileDevice(t, size)}
		s := startServer(t, Config{}, e)
		c := s.dial()
		c.enter("disk", structured)
		for i, tc := range []struct {
			offset, length int
			flags          uint16
		}{
			{0, inlineMax, 0}, {1, inlineMax + 1, cmdFlagFUA}, {100, pieceSize, 0}, {4096, 3*pieceSize + 5, 0},
			{7, LengthMax, cmdFlagFUA},
		} {
			data := make([]byte, tc.length)
			random := rand.NewChaCha8([32]byte{byte(i)})
			random.Read(data)
			go c.conn.Write(message(uint32(magicRequest), tc.flags, uint16(cmdWrite), uint64(i), uint64(tc.offset),
				uint32(tc.length), data))
			c.expectSimple(uint64(i), 0)
			c.request(cmdRead, 0, 50, uint64(tc.offset), uint32(tc.length))
			if got := c.readReply(structured, 50, uint64(tc.offset), tc.length); !bytes.Equal(got, data) {
				t.Fatalf("%+v: other data were read than written", tc)
			}
			if structured {
				c.request(cmdRead, cmdFlagDF, 51, uint64(tc.offset), uint32(tc.length))
				c.expectRead(true, 51, uint64(tc.offset), data)
			}
		}
		c.disconnect()
	})
}

// readReply receives the reply to a read, in any number of chunks, each byte once.
func (c *client) readReply(structured bool, cookie, offset uint64, length int) []byte {
	c.t.Helper()
	if !structured {
		c.expectSimple(cookie, 0)
		return c.receive(length)
	}
	data := bytes.Repeat([]byte{0xee}, length)
	covered := 0
	for {
		h := c.receive(chunkSize)
		if be.Uint32(h) != magicChunk || be.Uint64(h[8:]) != cookie {
			c.t.Fatalf("chunk header %x", h)
		}
		payload := c.receive(int(be.Uint32(h[16:])))
		at := be.Uint64(payload) - offset
		switch kind := be.Uint16(h[6:]); kind {
		case chunkOffsetData:
			covered += copy(data[at:], payload[8:])
		case chunkOffsetHole:
			n := int(be.Uint32(payload[8:]))
			clear(data[at : int(at)+n])
			covered += n
		default:
			c.t.Fatalf("chunk of type %#x: %x", kind, payload)
		}
		if be.Uint16(h[4:])&chunkFlagDone != 0 {
			break
		}
	}
	if covered != length {
		c.t.Fatalf("%d of %d bytes in the reply", covered, length)
	}
	return data
}

// TestHoles: ranges of zeroes in a large read come as hole chunks, unless the client wants one chunk.
func TestHoles(t *testing.T) {
	d := newFileDevice(t, 4<<20)
	s := startServer(t, Config{}, &Export{Name: "disk", Device: d})
	mark := bytes.Repeat([]byte{7}, 4096)
	if err := block.Write(d, mark, 1<<20); err != nil {
		t.Fatal(err)
	}
	c := s.dial()
	c.enter("disk", true)
	c.request(cmdRead, 0, 1, 512<<10, 1<<20)
	c.expectChunk(0, chunkOffsetHole, 1, uint64(512<<10), uint32(512<<10))
	c.expectChunk(0, chunkOffsetData, 1, uint64(1<<20), mark)
	c.expectChunk(chunkFlagDone, chunkOffsetHole, 1, uint64(1<<20+4096), uint32(512<<10-4096))
	want := make([]byte, 1<<20)
	copy(want[512<<10:], mark)
	c.request(cmdRead, cmdFlagDF, 2, 512<<10, 1<<20)
	c.expectChunk(chunkFlagDone, chunkOffsetData, 2, uint64(512<<10), want)
	c.request(cmdRead, 0, 3, 0, 4096) // a small read is never split
	c.expectChunk(chunkFlagDone, chunkOffsetData, 3, uint64(0), make([]byte, 4096))
	c.disconnect()
}

func TestTrimAndZeroes(t *testing.T) {
	bothForms(t, func(t *testing.T, structured bool) {
		d := newFileDevice(t, testSize)
		d.limits.DiscardMax, d.limits.WriteZeroesMax = 8192, 8192
		emulated := *d
		emulated.limits.WriteZeroesMax = 0
		s := startServer(t, Config{}, &Export{Name: "disk", Device: d}, &Export{Name: "emulated", Device: &emulated})
		for _, name := range []string{"disk", "emulated"} {
			c := s.dial()
			c.enter(name, structured)
			for i, tc := range []struct {
				number, flags uint16
				length        uint32
				want          uint32
				kept          bool
			}{
				{cmdTrim, 0, 4096, 0, false},
				{cmdTrim, cmdFlagFUA, 100000, 0, false},
				{cmdWriteZeroes, 0, 8192, 0, false},
				{cmdWriteZeroes, cmdFlagFUA, 8193, 0, false},
				{cmdWriteZeroes, cmdFlagNoHole, 300000, 0, false},
				{cmdWriteZeroes, cmdFlagFastZero, 4096, 0, false},
				{cmdWriteZeroes, cmdFlagFastZero | cmdFlagNoHole, 4096, wireUnsupport, true},
			} {
				length, wireError, kept := tc.length, tc.want, tc.kept
				if name == "emulated" && tc.flags&cmdFlagFastZero != 0 {
					wireError, kept = wireUnsupport, true
				}
				if err := block.Write(d, bytes.Repeat([]byte{9}, testSize), 0); err != nil {
					t.Fatal(err)
				}
				c.request(tc.number, tc.flags, uint64(i), 4096, length)
				if wireError == 0 {
					c.expectSimple(uint64(i), 0)
				} else {
					c.expectError(structured, uint64(i), wireError)
				}
				want := bytes.Repeat([]byte{9}, testSize)
				if !kept {
					clear(want[4096 : 4096+length])
				}
				got := make([]byte, testSize)
				if err := block.Read(d, got, 0); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, want) {
					t.Errorf("%s %+v: other contents than expected", name, tc)
				}
			}
			c.disconnect()
		}
	})
}

func TestCache(t *testing.T) {
	d := &countingDevice{fileDevice: newFileDevice(t, testSize)}
	s := startServer(t, Config{}, &Export{Name: "disk", Device: d})
	c := s.dial()
	c.enter("disk", false)
	c.request(cmdCache, 0, 1, 0, testSize)
	c.expectSimple(1, 0)
	if got := d.bytes[block.OpRead].Load(); got != testSize {
		t.Errorf("%d bytes were read", got)
	}
	c.disconnect()
}

// TestErrorsOfTheDevice: they reach the client with their errno, and no data with them.
func TestErrorsOfTheDevice(t *testing.T) {
	bothForms(t, func(t *testing.T, structured bool) {
		d := &failingDevice{fileDevice: newFileDevice(t, 4<<20)}
		s := startServer(t, Config{}, &Export{Name: "disk", Device: d})
		c := s.dial()
		c.enter("disk", structured)
		for i, tc := range []struct {
			number, flags uint16
			length        uint32
		}{
			{cmdRead, 0, 4096}, {cmdWrite, 0, 4096}, {cmdWrite, cmdFlagFUA, 4096}, {cmdFlush, 0, 0}, {cmdTrim, 0, 4096},
			{cmdWriteZeroes, 0, 4096}, {cmdCache, 0, 4096}, {cmdRead, 0, 1 << 20}, {cmdWrite, 0, 1 << 20},
			{cmdWrite, cmdFlagFUA, 1 << 20},
		} {
			for _, async := range []bool{false, true} {
				d.async.Store(async)
				offset := uint64(1 << 20)
				if tc.number == cmdFlush {
					offset = 0
				}
				payload := []byte{}
				if tc.number == cmdWrite {
					payload = make([]byte, tc.length)
				}
				c.request(tc.number, tc.flags, uint64(i), offset, tc.length, payload)
				c.expectError(structured, uint64(i), wireSpace)
			}
		}
		d.async.Store(false)
		d.from.Store(2 << 20) // fails in the middle of a large read
		c.request(cmdRead, 0, 99, 1<<20, 2<<20)
		if structured {
			for at := uint64(1 << 20); at < 2<<20; at += pieceSize {
				c.expectChunk(0, chunkOffsetData, 99, at, make([]byte, pieceSize))
			}
		}
		c.expectError(structured, 99, wireSpace)
		info := s.Connections()
		if len(info) != 1 || info[0].Commands["read"].Errors != 5 || info[0].Commands["write"].Errors != 8 {
			t.Errorf("connections: %+v", info)
		}
		c.disconnect()
	})
}

func TestBlockStatus(t *testing.T) {
	d := newFileDevice(t, testSize)
	if err := block.Write(d, bytes.Repeat([]byte{7}, 8192), 64<<10); err != nil {
		t.Fatal(err)
	}
	e := &Export{Name: "disk", Device: d, Contexts: []Context{{
		Name: "cowherd:copied",
		Extents: func(offset, length int64, yield func(int64, uint32) bool) error {
			for length > 0 && yield(min(length, 4096), uint32(offset/4096)%3) {
				offset, length = offset+4096, length-4096
			}
			return nil
		},
	}}}
	s := startServer(t, Config{}, e)
	c := s.dial()
	c.greet()
	c.option(optStructuredReply)
	c.expectReply(optStructuredReply, repAck)
	c.option(optSetMetaContext, text("disk"), uint32(2), text("base:allocation"), text("cowherd:copied"))
	c.expectReply(optSetMetaContext, repMetaContext, uint32(0), "base:allocation")
	c.expectReply(optSetMetaContext, repMetaContext, uint32(1), "cowherd:copied")
	c.expectReply(optSetMetaContext, repAck)
	c.goTo("disk")

	const hole = uint32(stateHole | stateZero)
	c.request(cmdBlockStatus, 0, 1, 60<<10, 16<<10)
	c.expectChunk(0, chunkBlockStatus, 1, uint32(0), uint32(4096), hole, uint32(8192), uint32(0), uint32(4096), hole)
	c.expectChunk(chunkFlagDone, chunkBlockStatus, 1, uint32(1), uint32(4096), uint32(0), uint32(4096), uint32(1),
		uint32(4096), uint32(2), uint32(4096), uint32(0))

	c.request(cmdBlockStatus, cmdFlagReqOne, 2, 60<<10, 16<<10)
	c.expectChunk(0, chunkBlockStatus, 2, uint32(0), uint32(4096), hole)
	c.expectChunk(chunkFlagDone, chunkBlockStatus, 2, uint32(1), uint32(4096), uint32(0))

	c.request(cmdBlockStatus, 0, 3, 0, 0)
	c.expectError(true, 3, wireInvalid)
	c.request(cmdBlockStatus, 0, 4, testSize-512, 1024)
	c.expectError(true, 4, wireInvalid)
	c.disconnect()
}

func TestDescriptorList(t *testing.T) {
	type extent struct {
		length int64
		flags  uint32
	}
	for _, tc := range []struct {
		name           string
		offset, length int64
		block          int64
		most           int
		extents        []extent
		want           []extent
	}{
		{"nothing", 0, 1000, 1, 9, nil, []extent{{1000, 0}}},
		{"merged", 0, 30, 1, 9, []extent{{10, 1}, {10, 1}, {10, 0}}, []extent{{20, 1}, {10, 0}}},
		{"empty extents", 0, 30, 1, 9, []extent{{0, 3}, {10, 1}, {0, 2}, {-5, 2}, {20, 1}}, []extent{{30, 1}}},
		{"cut", 5, 10, 1, 9, []extent{{6, 1}, {100, 0}}, []extent{{6, 1}, {4, 0}}},
		{"short", 0, 30, 1, 9, []extent{{10, 1}}, []extent{{10, 1}}},
		{"short, unaligned", 0, 1024, 512, 9, []extent{{10, 1}}, []extent{{512, 1}}},
		{"bounded", 0, 30, 1, 2, []extent{{10, 1}, {5, 0}, {5, 2}, {10, 3}}, []extent{{10, 1}, {5, 0}}},
		{"one", 0, 30, 1, 1, []extent{{10, 1}, {10, 1}, {10, 0}}, []extent{{20, 1}}},
		{"shared block", 512, 2048, 512, 9, []extent{{100, 3}, {1948, 1}}, []extent{{2048, 1}}},
		{"shared block, data", 0, 2048, 512, 9, []extent{{700, 3}, {1348, 0}}, []extent{{512, 3}, {1536, 0}}},
		{"shared block, hole behind", 0, 2048, 512, 9, []extent{{700, 0}, {1348, 3}}, []extent{{1024, 0}, {1024, 3}}},
		{"three in a block", 0, 1024, 512, 9, []extent{{600, 3}, {10, 0}, {414, 3}}, []extent{{512, 3}, {512, 0}}},
		{"to the boundary", 0, 1024, 512, 9, []extent{{100, 3}, {412, 1}, {512, 3}}, []extent{{512, 1}, {512, 3}}},
	} {
		l := descriptorList{
			offset: tc.offset, end: tc.offset + tc.length, start: tc.offset, blockMask: tc.block - 1, most: tc.most,
		}
		for _, e := range tc.extents {
			if !l.add(e.length, e.flags) {
				break
			}
		}
		l.finish()
		var want []byte
		for _, e := range tc.want {
			want = append(want, message(uint32(e.length), e.flags)...)
		}
		if !bytes.Equal(l.encoded, want) {
			t.Errorf("%s: %x, want %x", tc.name, l.encoded, want)
		}
	}
}

// TestModel compares what many requests in flight leave behind with a plain slice, over devices that complete now,
// later, or sometimes one and sometimes the other.
func TestModel(t *testing.T) {
	for _, kind := range []string{"now", "later", "mixed", "slow"} {
		bothForms(t, func(t *testing.T, structured bool) {
			runModel(t, kind, structured, 4<<20, 1500)
		})
	}
}

// modelRequest is a request in flight; they do not overlap.
type modelRequest struct {
	number         uint16
	offset, length int
	data           []byte
}

func runModel(t *testing.T, kind string, structured bool, size, steps int) {
	seed := rand.Uint64()
	t.Logf("kind %s, seed %d", kind, seed)
	random := rand.New(rand.NewPCG(seed, 1))
	d := newLaterDevice(t, int64(size), kind)
	s := startServer(t, Config{RequestsMax: 8}, &Export{Name: "disk", Device: d})
	c := s.dial()
	c.enter("disk", structured)
	model := make([]byte, size)
	inFlight := map[uint64]*modelRequest{}
	overlaps := func(r *modelRequest) bool {
		for _, o := range inFlight {
			if r.offset < o.offset+o.length && o.offset < r.offset+r.length {
				return true
			}
		}
		return false
	}
	sent := make(chan []byte, steps)
	ended := make(chan struct{})
	go func() { // a client that writes and reads at the same time cannot be blocked for ever
		defer close(ended)
		for b := range sent {
			if _, err := c.conn.Write(b); err != nil {
				t.Errorf("send: %v", err)
			}
		}
	}()
	for step := 0; step < steps || len(inFlight) > 0; step++ {
		r := &modelRequest{number: []uint16{cmdRead, cmdWrite, cmdWrite, cmdTrim, cmdWriteZeroes}[random.IntN(5)]}
		r.length = 512 * (1 + random.IntN(16))
		if random.IntN(20) == 0 {
			r.length = 512 * (1 + random.IntN(1500))
		}
		r.offset = 512 * random.IntN((size-r.length)/512)
		if step < steps && len(inFlight) < 24 && !overlaps(r) {
			flags := uint16(random.IntN(2)) * cmdFlagFUA
			b := message(uint32(magicRequest), flags, r.number, uint64(step), uint64(r.offset), uint32(r.length))
			switch r.number {
			case cmdRead:
				r.data = bytes.Clone(model[r.offset : r.offset+r.length])
			case cmdWrite:
				for i := r.offset; i < r.offset+r.length; i += 8 {
					be.PutUint64(model[i:], random.Uint64())
				}
				b = append(b, model[r.offset:r.offset+r.length]...)
			default:
				clear(model[r.offset : r.offset+r.length])
			}
			inFlight[uint64(step)] = r
			sent <- b
			continue
		}
		c.modelReply(structured, inFlight)
	}
	close(sent)
	<-ended
	c.disconnect()
	got := make([]byte, size)
	if err := block.Read(d.fileDevice, got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, model) {
		t.Errorf("seed %d: the device's contents differ from the model's", seed)
	}
}

// modelReply receives one reply, or one chunk of one, and checks it.
func (c *client) modelReply(structured bool, inFlight map[uint64]*modelRequest) {
	c.t.Helper()
	magic := be.Uint32(c.receive(4))
	if magic == magicSimple {
		h := c.receive(12)
		cookie := be.Uint64(h[4:])
		r := inFlight[cookie]
		if r == nil || be.Uint32(h) != 0 {
			c.t.Fatalf("simple reply %x to %+v", h, r)
		}
		if r.number == cmdRead {
			if structured || !bytes.Equal(c.receive(r.length), r.data) {
				c.t.Fatalf("read of %d at %d: wrong data", r.length, r.offset)
			}
		}
		delete(inFlight, cookie)
		return
	}
	h := c.receive(16)
	cookie := be.Uint64(h[4:])
	r := inFlight[cookie]
	payload := c.receive(int(be.Uint32(h[12:])))
	if magic != magicChunk || r == nil || r.number != cmdRead || len(payload) < 12 {
		c.t.Fatalf("chunk %x to %+v", h, r)
	}
	at := int(be.Uint64(payload)) - r.offset
	data := payload[8:]
	if be.Uint16(h[2:]) == chunkOffsetHole {
		data = make([]byte, be.Uint32(payload[8:]))
	}
	if !bytes.Equal(r.data[at:at+len(data)], data) {
		c.t.Fatalf("read of %d at %d: wrong data at %d", r.length, r.offset, at)
	}
	if be.Uint16(h)&chunkFlagDone != 0 {
		delete(inFlight, cookie)
	}
}

func TestErrorTextIsBounded(t *testing.T) {
	b := appendError(nil, 1, wireIO, strings.Repeat("x", 10000))
	if len(b) != smallReplyMax {
		t.Errorf("%d bytes", len(b))
	}
}
